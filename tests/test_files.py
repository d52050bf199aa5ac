"""Files: names of any script in figures, of any bytes in JSON and CSV, and of any length."""
import csv
import json
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from timm_geoprior.files import drawable, new_folder, save_figure, write_csv, write_json

NAMES = ['$_$', 'a$^$b', r'back\$slash$', '猫', 'قطة', '😀', '한국어', 'caf\udce9', '𓃠', 'naïve', 'a\tb\nc\x07']


@pytest.mark.parametrize('ending', ['.png', '.svg', '.pdf'])
def test_every_name_is_drawn_as_it_stands(ending, tmp_path):
    figures = pytest.importorskip('matplotlib.figure')
    figure = figures.Figure(layout='constrained')
    axes = figure.add_subplot()
    axes.set_yticks(range(len(NAMES)), [drawable(name, f'class {index}') for index, name in enumerate(NAMES)])
    axes.set_title('\n'.join(drawable(name) for name in NAMES))
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # matplotlib warns of each glyph that it draws as a box
        save_figure(tmp_path / f'names{ending}', figure)
    assert (tmp_path / f'names{ending}').stat().st_size > 1000


def test_what_no_font_has_is_transliterated_or_replaced(monkeypatch):
    manager = pytest.importorskip('matplotlib.font_manager').fontManager
    from timm_geoprior import files

    monkeypatch.setattr(manager, 'ttflist', [font for font in manager.ttflist if font.name == 'DejaVu Sans'])
    files._family_of.cache_clear()
    try:
        assert [drawable(name, '#7') for name in ('猫', 'ⅳ 猫 cat', 'ﬃ한', 'naïve', '$')] == [
            '#7', 'ⅳ  cat', 'ﬃ', 'naïve', r'\$']
        assert drawable('Ａｂ') == 'Ab'  # fullwidth letters, which DejaVu does not have
    finally:
        files._family_of.cache_clear()


def test_names_that_are_not_utf_8_are_written(tmp_path):
    rows = [{'name': 'caf\udce9', 'count': 1}]
    write_json(tmp_path / 'a.json', rows)
    assert json.loads((tmp_path / 'a.json').read_text(encoding='utf-8')) == rows
    write_csv(tmp_path / 'a.csv', rows)
    with Path(tmp_path / 'a.csv').open(encoding='utf-8') as file:
        assert next(csv.DictReader(file))['name'] == r'caf\udce9'


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='named pipes need POSIX')
def test_a_pipe_is_written_into(tmp_path):
    pipe = tmp_path / 'pipe'
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as reader:
        read = reader.submit(pipe.read_text)
        write_json(pipe, 'content')
        assert json.loads(read.result()) == 'content'
    assert pipe.is_fifo()


@pytest.mark.skipif(not Path('/dev/stdout').exists(), reason='/dev/stdout needs POSIX')
@pytest.mark.parametrize('into', ['a pipe', 'a file'])
def test_an_open_file_is_written_into(into, tmp_path):
    """It is not replaced; otherwise, earlier output would be lost."""
    code = ('from pathlib import Path; from timm_geoprior.files import write_json\n'
            'print("before", flush=True); write_json(Path("/dev/stdout"), "content"); print("after")')
    with open(tmp_path / 'log', 'wb') as log:
        stdout = subprocess.PIPE if into == 'a pipe' else log
        done = subprocess.run([sys.executable, '-c', code], stdout=stdout, check=True)
    assert (done.stdout or (tmp_path / 'log').read_bytes()) == b'before\n"content"\nafter\n'


@pytest.mark.parametrize('name', ['x' * 250, '猫' * 85])  # the longest name has 255 bytes
def test_temporary_names_fit_where_the_name_does(name, tmp_path):
    write_json(tmp_path / name, [])
    (tmp_path / name).unlink()
    with new_folder(tmp_path / name) as folder:
        (folder / 'file').touch()
    assert list((tmp_path / name).iterdir()) == [tmp_path / name / 'file']
