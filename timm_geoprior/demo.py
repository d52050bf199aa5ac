"""A page to try the models on: a picture in, its five most probable classes out, and where the attention looks."""
import html
import platform
import shutil
import tempfile
from functools import lru_cache
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import gradio as gr
import skimage
from huggingface_hub import SpaceCardData
from matplotlib.figure import Figure
from packaging.requirements import Requirement
from PIL import Image
from timm.data import resolve_model_data_config

from .classifier import Classifier, ClassifierError, load_classifier
from .cli import default_model
from .hub import WeightsError
from .images import ImageError, read_image
from .manifest import load_manifest, manifest_path
from .windows import WindowsError, draw_windows

__all__ = ['DemoError', 'build', 'serve', 'write_space']

SAMPLES = [Path(skimage.data.data_dir, name) for name in (
    'coffee.png', 'chelsea.png', 'rocket.jpg', 'astronaut.png', 'motorcycle_left.png')]
PREVIEW_SIDE = 1024  # pixels; what is shown and drawn on, the network gets the picture itself
MAX_UPLOAD = '50mb'
ERRORS = (ClassifierError, ImageError, WeightsError, WindowsError)

TITLE = 'What it sees, and how far it looks'
LEAD = ('Drop a picture or pick a sample. Then click into it: the attention layers look at what is light from there. How '
        'far they look is all that they have learned of it, one radius each; it is the same in every picture.')
CSS = """
#message p {border-left: 4px solid #d97706; padding: 8px 12px; margin: 0; overflow-wrap: anywhere}
#picture img {cursor: crosshair}
"""

APP = '''"""The page of timm_geoprior, as a Hugging Face Space serves it."""
from timm_geoprior.demo import serve

serve({model!r})
'''
SPACE = """---
{metadata}
---

# {title}

{lead}

| model | licence of its weights | they were trained on |
| --- | --- | --- |
{models}

`app.py` serves the page, here or anywhere: `pip install -r requirements.txt && python app.py`.
"""

load = lru_cache(maxsize=None)(load_classifier)


class DemoError(RuntimeError):
    """The page cannot be served, or its folder not be written; the message says what to do."""


def _about(name: str) -> str:
    """What a visitor has to know of a model: what it can tell apart, and how well."""
    classifier, entry = load(name), load_manifest().models.get(name)
    _, height, width = resolve_model_data_config(classifier.model)['input_size']
    about = f'It knows {len(classifier.classes)} classes, and sees {width} x {height} pixels'
    for metric in entry.metrics[:1] if entry else ():
        about += f'; of the {metric.num_images:,} {metric.split} images of {metric.dataset} it names {metric.top1:.1f}%'
    return about + '.'


def _notice(error: Exception, path: str = '') -> str:
    """A message as HTML, in which a file is called as its owner knows it."""
    message = str(error).replace(path, Path(path).name) if path else str(error)
    return f'<p role="alert">{html.escape(message)}</p>'


def _guesses(classifier: Classifier, image: Image.Image) -> dict[str, float]:
    """Probabilities by name; of two classes with one name, the second has its label beside it."""
    guesses: dict[str, float] = {}
    for guess in classifier(image):
        name = f'{guess["name"]} ({guess["label"]})' if guess['name'] in guesses else guess['name']
        guesses[name] = guess['probability']
    return guesses


def _open(path: str, name: str) -> tuple[Any, ...]:
    """Show a picture: message, path, picture, point, classes and windows; a bad one leaves what was there."""
    try:
        image, classifier = read_image(path), load(name)
        guesses = _guesses(classifier, image)
        image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        return '', path, image, None, guesses, draw_windows(classifier, image)
    except ERRORS as error:
        return _notice(error, path), *[gr.skip()] * 5


def _upload(path: str, name: str) -> tuple[Any, ...]:
    """Show an uploaded picture, and empty the field it was dropped into for the next."""
    return None, *_open(path, name)


def _pick(name: str, event: gr.SelectData) -> tuple[Any, ...]:
    return _open(str(SAMPLES[event.index]), name)


def _click(image: Image.Image, name: str, event: gr.SelectData) -> tuple[Any, ...]:
    """Draw the windows at another point: message, point and windows."""
    try:
        return '', event.index, draw_windows(load(name), image, tuple(event.index))
    except ERRORS as error:
        return _notice(error), gr.skip(), gr.skip()


def _switch(name: str, path: str, image: Image.Image, point: tuple[float, float] | None) -> tuple[Any, ...]:
    """Ask another model the same: message, what it is, classes and windows."""
    try:
        classifier = load(name)
        return '', _about(name), _guesses(classifier, read_image(path)), draw_windows(classifier, image, point)
    except ERRORS as error:
        return _notice(error, path), *[gr.skip()] * 3


def build(model: str | None = None) -> gr.Blocks:
    """Build the page.

    Args:
        model: The model that is chosen at first, as `load_classifier` takes it; the default model where it is None.

    Returns:
        The page, on which all models of the manifest that have weights can be chosen.

    Raises:
        ClassifierError: `load_classifier` cannot load the model, and so ManifestError and WeightsError.
    """
    manifest = load_manifest()
    chosen = load(model or default_model(manifest).name).name
    names = [entry.name for entry in manifest.models.values() if entry.has_weights]
    with gr.Blocks(title='timm_geoprior', analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        path, point = gr.State(str(SAMPLES[0])), gr.State()
        gr.Markdown(f'# {TITLE}\n{LEAD}')
        message = gr.HTML(elem_id='message')
        with gr.Row():
            with gr.Column(scale=2):
                picture = gr.Image(
                    label='Picture', type='pil', interactive=False, buttons=[], height=320, elem_id='picture',
                    alt_text='The chosen picture. Click into it to see the windows there.')
                samples = gr.Gallery(
                    SAMPLES, label='Samples', columns=len(SAMPLES), rows=1, height=110, object_fit='cover',
                    allow_preview=False, interactive=False, buttons=[], elem_id='samples')
                file = gr.File(label='Your own picture', height=130, elem_id='file')
                tag = gr.Dropdown(dict.fromkeys([*names, chosen]), value=chosen, label='Model', elem_id='model')
                about = gr.Markdown(_about(chosen))
            with gr.Column(scale=3):
                guesses = gr.Label(label='Five most probable classes', elem_id='guesses')
                windows = gr.Plot(label='Where the attention looks from there', elem_id='windows')
        shown = [message, path, picture, point, guesses, windows]
        page.load(_open, [path, tag], shown)
        samples.select(_pick, tag, shown)
        file.upload(_upload, [file, tag], [file, *shown])
        picture.select(_click, [picture, tag], [message, point, windows])
        tag.input(_switch, [tag, path, picture, point], [message, about, guesses, windows])
    return page


def serve(model: str | None = None, port: int | None = None) -> None:
    """Serve the page until it is interrupted.

    Args:
        model: As in `build`.
        port: Port of this machine; where it is None the first free one from 7860 on. The environment variables
            GRADIO_SERVER_NAME and GRADIO_SERVER_PORT say otherwise.

    Raises:
        DemoError: The port cannot be opened.
    """
    page = build(model)
    try:
        _, url, _ = page.launch(
            server_port=port, max_file_size=MAX_UPLOAD, ssr_mode=False, prevent_thread_lock=True, quiet=True, css=CSS,
            footer_links=['settings'], theme=gr.themes.Default(font=['system-ui', 'sans-serif']))
    except OSError:
        raise DemoError(f'Port {port} is in use or not open to you, expected a free one: name another by --port.') from None
    print(f'Open {url} (Ctrl-C ends it).', flush=True)
    page.block_thread()


def _requirements() -> list[str]:
    """What the page needs of other packages, in the versions that are here: what ran here is what runs there."""
    needed = map(Requirement, requires('timm-geoprior') or ())
    names = {need.name for need in needed if need.marker is None or need.marker.evaluate({'extra': 'demo'})}
    return [f'{name}=={version(name).partition("+")[0]}' for name in sorted(names)]


def write_space(folder: Path, model: str | None = None) -> None:
    """Write the folder of a Hugging Face Space that serves the page, this package and its weights in it.

    Args:
        folder: New or empty.
        model: A model of the manifest, the one that is chosen at first.

    Raises:
        DemoError: The folder has something in it, or cannot be written.
        ManifestError: No such model.
    """
    manifest = load_manifest()
    first = manifest.get(model) if model else default_model(manifest)
    models = [entry for entry in manifest.models.values() if entry.has_weights]
    metadata = SpaceCardData(
        title='timm_geoprior', sdk='gradio', sdk_version=version('gradio'), app_file='app.py', license='apache-2.0',
        python_version='.'.join(platform.python_version_tuple()[:2]),
        models=[entry.hub_id for entry in models if entry.hub_id] or None)
    rows = [f'| {entry.name} | {entry.license} | {entry.data_terms} |' for entry in models]
    files = {
        'app.py': APP.format(model=first.name),
        'requirements.txt': '\n'.join([*_requirements(), '']),
        'README.md': SPACE.format(metadata=metadata.to_yaml(), title=TITLE, lead=LEAD, models='\n'.join(rows)),
    }
    try:
        if folder.exists() and any(folder.iterdir()):
            raise DemoError(f'{folder} has files in it, expected a new or an empty folder: name another.')
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            whole = Path(scratch, 'space')
            package = shutil.copytree(Path(__file__).parent, whole / 'timm_geoprior',
                                      ignore=shutil.ignore_patterns('__pycache__'))
            shutil.copy(manifest_path(), package)
            for name, text in files.items():
                (whole / name).write_text(text, encoding='utf-8')
            whole.replace(folder)
    except OSError as error:
        raise DemoError(f'{folder} cannot be written ({error.strerror}), expected a new or an empty folder: '
                        f'name another.') from None
