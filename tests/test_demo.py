"""The demo page, served by real processes and used in a real browser."""
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
import timm
from PIL import Image

from programs import Program
from timm_geoprior.cli import main
from timm_geoprior.data.reading import read_image
from timm_geoprior.inference.classifier import load_classifier
from timm_geoprior.pretrained.download import download_tag
from timm_geoprior.pretrained.manifest import default_model, load_manifest

NANO = 'geoprior_resnet14_nano.r64_tin200'
# the command, in a process that reports every connection to another machine
WATCHED = """
import sys

def watch(event, args):
    if event in ('socket.connect', 'socket.getaddrinfo'):
        host = args[0] if event == 'socket.getaddrinfo' else args[1][0] if isinstance(args[1], tuple) else 'localhost'
        if host not in (None, '', 'localhost', '127.0.0.1', '::1', '0.0.0.0'):
            print('reached for', host, file=sys.stderr, flush=True)

sys.addaudithook(watch)
from timm_geoprior.cli import main
from timm_geoprior.data.reading import read_image
sys.exit(main(sys.argv[1:]))
"""


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as server:
        return server.getsockname()[1]


def names(picture, model=NANO):
    return [guess['name'] for guess in load_classifier(model)(picture)]


@contextmanager
def running(command, log, **options):
    """Run a process that serves the page, and yield its address."""
    with open(log, 'w') as stderr, Program(command, stderr=stderr.fileno(), **options) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith('Open http://127.0.0.1:'), log.read_text()
            yield line.split()[1]
        finally:
            process.send_signal(signal.SIGKILL)


@pytest.fixture
def demo():
    pytest.importorskip('gradio')
    pytest.importorskip('matplotlib')
    pytest.importorskip('skimage')
    from timm_geoprior.inference import demo

    return demo


@pytest.fixture(scope='module')
def chromium():
    with pytest.importorskip('playwright.sync_api').sync_playwright() as playwright:
        found = [path for name in ('chromium', 'chromium-browser', 'google-chrome') if (path := shutil.which(name))]
        path = [*found, playwright.chromium.executable_path][0]
        if not os.path.exists(path):
            pytest.skip('no Chromium is installed')
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope='module')
def log(tmp_path_factory):
    return tmp_path_factory.mktemp('demo') / 'stderr.txt'


@pytest.fixture(scope='module')
def url(log):
    """The page, with a copy of the bundled model as a second one, which is selected at first."""
    pytest.importorskip('gradio')
    pytest.importorskip('skimage')
    copy = download_tag(NANO, log.parent / 'copies')
    command = ['-c', WATCHED, 'demo', '--port', str(free_port()), '--model', f'local-dir:{copy}']
    with running(command, log, env={**os.environ, 'GRADIO_TEMP_DIR': str(log.parent / 'files')}) as url:
        yield url


@contextmanager
def opened(chromium, url, **options):
    """Open the page, and yield it with the hosts that it has sent requests to."""
    with chromium.new_context(**options) as context:
        page = context.new_page()
        page.set_default_timeout(60_000)
        hosts = set()
        page.on('request', lambda request: hosts.add(urlsplit(request.url).hostname))
        page.goto(url)
        page.wait_for_selector('#windows img')
        yield page, hosts


def wait_for_names(page, expected):
    page.wait_for_function(
        'names => JSON.stringify([...document.querySelectorAll("#guesses dt")].map(e => e.innerText)) == '
        'JSON.stringify(names)', arg=expected)


def windows(page):
    return page.get_attribute('#windows img', 'src')


def click(page, across, down):
    """Click on the picture, and wait for other windows."""
    before, box = windows(page), page.locator('#picture img').bounding_box()
    page.locator('#picture img').click(position={'x': box['width'] * across, 'y': box['height'] * down})
    page.wait_for_function('src => document.querySelector("#windows img").src != src', arg=before)
    return windows(page)


def message(page, name):
    found = page.locator('[data-testid=toast-text]', has_text=name).first
    found.wait_for()
    return found.inner_text()


def test_without_gradio(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    monkeypatch.delitem(sys.modules, 'timm_geoprior.inference.demo', raising=False)
    assert main(['demo']) == 1
    assert capsys.readouterr().err == (
        "timm-geoprior: This command needs gradio, which is not installed. Run `pip install 'timm-geoprior[demo]'`.\n")


@pytest.mark.usefixtures('demo')
def test_a_port_in_use(capsys):
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
        assert main(['demo', '--port', str(port)]) == 1
    assert capsys.readouterr().err == (
        f'timm-geoprior: Port {port} cannot be opened (Address already in use). '
        f'Name a free one with --port.\n')


@pytest.mark.usefixtures('demo')
def test_a_model_without_attention(capsys, tmp_path):
    timm.models.save_for_hf(timm.create_model('resnet10t'), tmp_path)
    assert main(['demo', '--port', str(free_port()), '--model', f'local-dir:{tmp_path}']) == 1
    assert 'must be a GeoPrior ResNet, got one without attention layers' in capsys.readouterr().err


@pytest.mark.usefixtures('demo')
@pytest.mark.parametrize('port', ['0', '65536'])
def test_no_port(capsys, port):
    assert main(['demo', '--port', port]) == 1
    assert f'Port {port} cannot be opened (Not from 1 to 65535)' in capsys.readouterr().err


def test_samples_and_clicks(demo, chromium, url):
    with opened(chromium, url, viewport={'width': 1400, 'height': 1200}) as (page, _):
        wait_for_names(page, names(read_image(demo.SAMPLES[0])))
        one, other = click(page, 0.3, 0.3), click(page, 0.7, 0.6)
        assert other != one
        assert click(page, 0.3, 0.3) == one
        box = page.locator('#picture img').bounding_box()
        page.locator('#picture img').click(position={'x': 0.05 * box['width'], 'y': 0.5 * box['height']})
        x, y = map(float, re.search(r'got ([\d.]+),([\d.]+)\.', message(page, 'that the network sees')).groups())
        # in pixels of the picture, not of its display
        assert (x, y) == (pytest.approx(0.05 * 600, abs=3), pytest.approx(0.5 * 400, abs=3))
        page.locator('[data-testid=toast-text]').wait_for(state='detached', timeout=40_000)
        page.locator('#samples button').nth(1).click()
        wait_for_names(page, names(read_image(demo.SAMPLES[1])))


def shown(page):
    """The picture as the page shows it."""
    answer = page.request.get(page.evaluate('document.querySelector("#picture img").src'))
    return Image.open(io.BytesIO(answer.body())).convert('RGB')


def test_the_picture_shows_the_point_and_what_the_network_sees(demo, chromium, url):
    """A white cross at the clicked point, a white frame around the cropped square, and a darker margin."""
    with opened(chromium, url, viewport={'width': 1400, 'height': 1200}) as (page, _):
        own = read_image(demo.SAMPLES[0]).resize((1024, 683))
        for across, down in ((0.5, 0.5), (0.62, 0.4)):
            if across != 0.5:
                click(page, across, down)
            picture = shown(page)
            assert picture.size == (1024, 683)
            assert min(picture.getpixel((round(across * 1024), round(down * 683)))) > 240
            left, right = (1024 - 683) / 2, (1024 + 683) / 2
            for x in (left + 1, right - 2):
                assert min(picture.getpixel((round(x), 300))) > 200
            for x in (60, 960):
                assert sum(picture.getpixel((x, 300))) < 0.7 * sum(own.getpixel((x, 300)))
            assert picture.getpixel((300, 600)) == pytest.approx(own.getpixel((300, 600)), abs=25)


def test_probabilities_are_legible_below_one_percent(demo, chromium, url):
    guesses = load_classifier(NANO)(read_image(demo.SAMPLES[0]))
    assert guesses[-1]['probability'] < 0.005
    with opened(chromium, url) as (page, _):
        wait_for_names(page, [guess['name'] for guess in guesses])
        told = [text.strip() for text in page.locator('#guesses dd').all_inner_texts()]
        assert told == [f'{guess["probability"]:.1%}' for guess in guesses]
        legend = page.inner_text('#legend')
    assert all(word in legend for word in ('Light', 'Circle', 'Dotted', 'frame'))


def test_a_share_is_never_nothing(demo):
    """Less than a thousandth is shown as such; HTML in a name is escaped."""
    said = demo._guesses(FixedClassifier(), None)
    assert re.findall('<dd>(.*?)</dd>', said) == ['99.9%', '< 0.1%', '< 0.1%']
    assert re.findall('<dt>(.*?)</dt>', said) == ['&lt;b&gt;', 'x', 'x (c)']


class FixedClassifier:
    """Returns fixed predictions."""

    def __call__(self, image):
        return [{'label': label, 'name': name, 'probability': probability}
                for label, name, probability in (('a', '<b>', 0.999), ('b', 'x', 0.0006), ('c', 'x', 0.0004))]


def test_a_tap_brings_the_windows_into_view(chromium, url):
    with opened(chromium, url, viewport={'width': 400, 'height': 800}, has_touch=True, is_mobile=True) as (page, _):
        place = 'document.querySelector("#windows").getBoundingClientRect().top'
        image = page.locator('#picture img')
        image.scroll_into_view_if_needed()
        assert page.evaluate(place) > 400
        box = image.bounding_box()
        image.tap(position={'x': 0.6 * box['width'], 'y': 0.5 * box['height']})
        page.wait_for_function(f'{place} < 200 && {place} > -50')


def test_another_model(demo, chromium, url):
    with opened(chromium, url) as (page, _):
        assert 'Knows 200 classes, sees 64 x 64 pixels.' in page.inner_text('#model')
        page.locator('#model input').click()
        page.get_by_role('option', name=NANO, exact=True).click()
        page.locator('#model', has_text='on the 10,000 images of Tiny-ImageNet-200 val').wait_for()
        wait_for_names(page, names(read_image(demo.SAMPLES[0])))


def test_bad_files_then_a_good_one(demo, chromium, url, tmp_path):
    """A bad file is reported on the page and changes nothing; a TIFF, which no browser shows, is accepted after it."""
    bad = {
        'notes.txt': ('not a picture', 'is not an image that Pillow can read'),
        'renamed.jpg': ('not a picture', 'is not an image that Pillow can read'),
        'empty.png': ('', 'is not an image that Pillow can read'),
        'large.png': ('', 'exceed the maximum allowed size of 50.0 Mb'),
        'bomb.png': ('', 'must have at most 178,956,970 pixels, got more. Scale it down.'),
    }
    for name, (text, _) in bad.items():
        (tmp_path / name).write_text(text)
    os.truncate(tmp_path / 'large.png', 100_000_000)
    Image.new('1', (20_000, 20_000)).save(tmp_path / 'bomb.png')
    read_image(demo.SAMPLES[1]).save(tmp_path / 'cat.tif')
    with opened(chromium, url) as (page, _):
        before = page.inner_text('#guesses'), windows(page), page.get_attribute('#picture img', 'src')
        for name, (_, sentence) in bad.items():
            page.set_input_files('#file input[type=file]', tmp_path / name)
            assert sentence in message(page, name)
        assert (page.inner_text('#guesses'), windows(page), page.get_attribute('#picture img', 'src')) == before
        page.set_input_files('#file input[type=file]', tmp_path / 'cat.tif')
        wait_for_names(page, names(read_image(tmp_path / 'cat.tif')))
        page.wait_for_function('document.querySelector("#picture img").naturalHeight == 681')


def test_narrow_and_dark_without_a_network(chromium, url, log):
    with opened(chromium, url, viewport={'width': 400, 'height': 800}, color_scheme='dark') as (page, hosts):
        shape = page.evaluate('(i => i.naturalHeight / i.naturalWidth)(document.querySelector("#windows img"))')
        assert shape > 3  # panels below each other
        assert page.evaluate('document.documentElement.scrollWidth') == 400
        assert hosts == {'127.0.0.1'}
    assert log.read_text() == ''


def test_a_space(demo, chromium, tmp_path, capsys):
    from huggingface_hub import SpaceCard

    folder = tmp_path / 'space'
    assert main(['demo', '--space', str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        'README.md', 'app.py', 'requirements.txt', 'timm_geoprior']
    card = SpaceCard.load(folder / 'README.md')
    assert (card.data.sdk, card.data.app_file) == ('gradio', 'app.py')
    assert re.fullmatch(r'6\.\d+\.\d+', card.data.sdk_version)
    assert NANO in card.text
    needed = dict(line.split('==') for line in (folder / 'requirements.txt').read_text().split())
    assert needed['gradio'] == card.data.sdk_version
    assert {'matplotlib', 'scikit-image', 'timm', 'torch'} <= set(needed)

    assert main(['demo', '--space', str(tmp_path / 'large'), '--model', 'geoprior_resnet50']) == 0
    assert '| geoprior_resnet50.from_a1_in1k | apache-2.0 |' in (tmp_path / 'large' / 'README.md').read_text()
    shutil.rmtree(tmp_path / 'large')
    assert main(['demo', '--space', str(folder)]) == 1
    assert 'must be new or empty, got' in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ['space']

    find = 'import importlib.util; print(importlib.util.find_spec("timm_geoprior").origin)'
    found = subprocess.run([sys.executable, '-c', find], cwd=folder, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(folder / 'timm_geoprior' / '__init__.py')
    environment = {
        **os.environ, 'GRADIO_SERVER_PORT': str(free_port()), 'GRADIO_TEMP_DIR': str(tmp_path / 'files')}
    first = default_model(load_manifest()).name
    with running(['app.py'], tmp_path / 'stderr.txt', cwd=folder, env=environment) as url:
        with opened(chromium, url) as (page, _):
            assert page.input_value('#model input') == first
            wait_for_names(page, names(read_image(demo.SAMPLES[0]), first))
