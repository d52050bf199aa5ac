"""Progress on a terminal and in a log file."""
import io
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from timm.data import create_dataset

import timm_geoprior
from timm_geoprior import progress
from timm_geoprior.data.memory import decode_images


@pytest.fixture(params=[True, False])
def stderr(request):
    stream = io.StringIO()
    stream.isatty = lambda: request.param
    return stream


def decode(photo_folder, stderr):
    with redirect_stderr(stderr):
        decode_images(create_dataset('', root=str(photo_folder), split='train'), size=16, workers=0)


def test_what_takes_less_than_a_minute(stderr, photo_folder):
    """A bar that disappears, and nothing in a file."""
    decode(photo_folder, stderr)
    assert ('decoding: ' in stderr.getvalue()) == stderr.isatty()
    assert '\n' not in stderr.getvalue()


def test_a_line_each_minute_in_a_file(stderr, photo_folder, monkeypatch):
    monkeypatch.setattr(progress, 'LOG_SECONDS', 0)
    decode(photo_folder, stderr)
    if stderr.isatty():
        assert '\r' in stderr.getvalue()
    else:
        (line,) = stderr.getvalue().splitlines()
        assert line.startswith('decoding: 48 of 48 images, ')


@pytest.mark.parametrize('total', [None, 7])
def test_what_is_shown_beside_the_number(stderr, monkeypatch, total):
    monkeypatch.setattr(progress, 'LOG_SECONDS', 0)
    monkeypatch.setattr(progress.time, 'monotonic', iter([0, 2]).__next__)
    told = []
    with redirect_stderr(stderr), progress.Progress('epoch 1', total, 'steps', done=3, tell=told.append) as bar:
        bar.update(2, lambda: 'loss 1')
    assert told == ([] if stderr.isatty() else [f'epoch 1: 5{" of 7" if total else ""} steps, loss 1, 1 steps/s'])


def test_nothing_where_nothing_is_told(stderr):
    with redirect_stderr(stderr), progress.Progress('epoch 1', 7, tell=None) as bar:
        bar.update(7, lambda: pytest.fail('nobody asked'))
    assert stderr.getvalue() == ''


def test_no_bar_is_drawn_otherwise():
    package = Path(timm_geoprior.__file__).parent
    users = [path.name for path in package.rglob('*.py') if 'tqdm' in path.read_text(encoding='utf-8')]
    assert users == ['progress.py']
