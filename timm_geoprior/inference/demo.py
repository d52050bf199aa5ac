"""A web page for trying the models: the five most probable classes of a picture, and where the attention looks."""
import html
import os
import platform
import shutil
import socket
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import gradio as gr
import skimage
from huggingface_hub import SpaceCardData
from matplotlib.figure import Figure
from matplotlib.text import Text
from packaging.requirements import Requirement
from PIL import Image, ImageDraw, ImageOps
from timm.data import resolve_model_data_config

from ..data.reading import read_image
from ..errors import GeoPriorError
from ..files import new_folder
from ..pretrained.manifest import default_model, load_manifest, manifest_path
from .classifier import Classifier, load_classifier
from .windows import draw_windows, learned_windows, to_input, view_of

SAMPLES = [Path(skimage.data.data_dir, name) for name in ('coffee.png', 'chelsea.png', 'rocket.jpg', 'astronaut.png')]
PREVIEW_SIDE = 1024  # pixels of the preview that is shown, clicked and drawn on; the picture itself is classified
MAX_UPLOAD = '50mb'
SECONDS = 10  # that a message stays on the page

TITLE = 'GeoPrior ResNet: what it sees, and how far it looks'
LEAD = ('Drop a picture or pick a sample, then click on it: what stays light is where the attention layers look from '
        'that point. How far they look is all they have learned about it: one radius each, the same in every picture.')
LEGEND = ('**Light**: where the attention looks from the cross, in cells of the layers. **Circle**: the learned '
          'radius of a layer, at which its attention has fallen to 61% of its peak (a diamond: to 37%). '
          '**Dotted**: the cell that looks, the one nearest to the cross. The **frame** on the picture marks the part '
          'that the network sees.')
CSS = """
.gradio-container {  /* Gradio's own greys are too light to read */
    --block-info-text-color: var(--block-label-text-color); --body-text-color-subdued: var(--block-label-text-color)}
#picture img {cursor: crosshair}
#guesses dl {display: grid; grid-template-columns: 1fr max-content; gap: 2px 12px; margin: 0; font-size: 16px}
#guesses dd {text-align: right}
#guesses dt, #guesses dd {margin: 4px 0 0; padding: 0; color: var(--body-text-color)}
#guesses dt:first-of-type, #guesses dt:first-of-type + dd {font-weight: 700}
#guesses .bar {grid-column: 1 / -1; height: 8px; min-width: 1px; border-radius: 4px; background: var(--color-accent)}
#samples .container {width: 72px; height: 72px}
#samples img {width: 100%; height: 100%; object-fit: cover}
"""
# the last input of every event, so that figures are drawn to fit the browser window
WINDOW_JS = """(...inputs) => [...inputs.slice(0, -1), {
    dark: document.body.classList.contains('dark'), narrow: window.innerWidth < 640}]"""

# on a phone the windows are below the picture: scroll to them
SCROLL_JS = """() => {
    if (window.innerWidth < 640) {
        document.querySelector('#windows').scrollIntoView({behavior: 'smooth', block: 'start'});
    }
}"""

APP = '''"""The timm_geoprior demo as a Hugging Face Space."""
from timm_geoprior.inference.demo import serve

serve({model!r})
'''
SPACE = """---
{metadata}
---

# {title}

{lead}

| model | licence of its weights | terms of their training data |
| --- | --- | --- |
{models}

`app.py` serves the page, here or anywhere: `pip install -r requirements.txt && python app.py`.
"""

load = lru_cache(maxsize=None)(load_classifier)


@dataclass(frozen=True)
class _Shown:
    """The picture on a visitor's page."""
    path: str
    size: tuple[int, int]  # its width and height, in pixels
    preview: Image.Image  # what is displayed and drawn on, at most `PREVIEW_SIDE` wide and high
    point: tuple[float, float] | None = None  # where it was clicked, in pixels of the preview; None for the middle


def _about(name: str) -> str:
    """What a visitor should know about a model: what it can tell apart, and how well."""
    classifier, entry = load(name), load_manifest().tags.get(name)
    _, height, width = resolve_model_data_config(classifier.model)['input_size']
    about = f'Knows {len(classifier.classes)} classes, sees {width} x {height} pixels'
    for metric in entry.metrics[:1] if entry else ():
        about += f', top-1 {metric.top1:.1f}% on the {metric.num_images:,} images of {metric.dataset} {metric.split}'
    return ' '.join([f'{about}.', *classifier.notes])


def _guesses(classifier: Classifier, image: Image.Image) -> str:
    """The most probable classes as HTML; if two classes share a name, the second is shown with its label."""
    rows, seen = [], set()
    for guess in classifier(image):
        name, probability = guess['name'], guess['probability']
        if name in seen:
            name = f'{name} ({guess["label"]})'
        seen.add(name)
        share = f'{probability:.1%}' if probability >= 0.001 else '< 0.1%'
        rows.append(f'<dt>{html.escape(name)}</dt><dd>{share}</dd>'
                    f'<div class="bar" style="width: {100 * probability:.2f}%"></div>')
    return f'<dl>{"".join(rows)}</dl>'


def _windows(
        classifier: Classifier, image: Image.Image, point: tuple[float, float] | None,
        window: dict[str, bool]) -> Figure:
    """The windows from a point, as a figure for a light or dark, wide or narrow browser window."""
    figure = draw_windows(classifier, image, point, columns=1 if window['narrow'] else 2)
    figure.patch.set_alpha(0)
    if window['dark']:
        for text in figure.findobj(Text):
            text.set_color('white')
    return figure


def _mark(classifier: Classifier, preview: Image.Image, point: tuple[float, float] | None) -> Image.Image:
    """A picture with a frame around the part that the network sees, the rest darkened, and a cross at the point."""
    left, top, right, bottom = map(round, view_of(classifier, preview.size).box)
    inside = max(left, 0), max(top, 0), min(right, preview.width), min(bottom, preview.height)
    marked = Image.blend(preview, Image.new('RGB', preview.size), 0.5)
    marked.paste(preview.crop(inside), inside)
    draw, unit = ImageDraw.Draw(marked), max(preview.size) / PREVIEW_SIDE
    x, y = point or (preview.width / 2, preview.height / 2)
    for color, width, arm in (('black', 12, 30), ('white', 6, 27)):
        stroke, reach = max(round(width * unit), 1), arm * unit
        draw.rectangle((inside[0], inside[1], inside[2] - 1, inside[3] - 1), outline=color, width=max(stroke // 2, 1))
        draw.line([x - reach, y, x + reach, y], fill=color, width=stroke)
        draw.line([x, y - reach, x, y + reach], fill=color, width=stroke)
    return marked


def _tell(error: Exception, path: str = '') -> None:
    """Show an error on the page, with only the name of the uploaded file, not its temporary path."""
    gr.Warning(html.escape(str(error).replace(path, Path(path).name) if path else str(error)), duration=SECONDS)


def _open(path: str, name: str, window: dict[str, bool]) -> tuple[Any, ...]:
    """Show a picture: its `_Shown`, its marked preview, the classes and the windows; a bad one changes nothing."""
    try:
        image, classifier = read_image(path), load(name)
        guesses = _guesses(classifier, image)
        preview = ImageOps.contain(image, (PREVIEW_SIDE, PREVIEW_SIDE))
        shown = _Shown(path, image.size, preview)
        return shown, _mark(classifier, preview, None), guesses, _windows(classifier, preview, None, window)
    except GeoPriorError as error:
        _tell(error, path)
        return (gr.skip(),) * 4


def _click(shown: _Shown, name: str, window: dict[str, bool], event: gr.SelectData) -> tuple[Any, ...]:
    """Move the cross to another point, and draw the windows from there."""
    try:
        classifier, (x, y) = load(name), event.index
        scale = shown.size[0] / shown.preview.width
        # checked in the picture's own pixels, so that the message is in pixels that the visitor knows
        to_input(view_of(classifier, shown.size), shown.size, (round(x * scale), round(y * scale)))
        moved = replace(shown, point=(x, y))
        return moved, _mark(classifier, shown.preview, (x, y)), _windows(classifier, shown.preview, (x, y), window)
    except GeoPriorError as error:
        _tell(error)
        return (gr.skip(),) * 3


def _switch(name: str, shown: _Shown, window: dict[str, bool]) -> tuple[Any, ...]:
    """Switch to another model: its description, the part of the picture it sees, the classes and the windows."""
    try:
        classifier = load(name)
        guesses = _guesses(classifier, read_image(shown.path))
        figure = _windows(classifier, shown.preview, shown.point, window)
        return gr.Dropdown(info=_about(name)), _mark(classifier, shown.preview, shown.point), guesses, figure
    except GeoPriorError as error:
        _tell(error, shown.path)
        return (gr.skip(),) * 4


def build(model: str | None = None) -> gr.Blocks:
    """Build the page.

    Args:
        model: The model selected at first, in any form that `load_classifier` takes; None for the default model.

    Returns:
        The page, which offers all bundled and published models and the named one.

    Raises:
        GeoPriorError: `load_classifier` cannot load the model, or it has no attention layers.
    """
    manifest = load_manifest()
    classifier = load(model or default_model(manifest).name)
    learned_windows(classifier.model, view_of(classifier, (1, 1)), (0, 0))  # raises if there is nothing to show
    chosen = classifier.name
    names = [entry.name for entry in manifest.models.values() if entry.is_released]
    with gr.Blocks(title='timm_geoprior', analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        shown, window = gr.State(), gr.JSON(visible=False)
        gr.Markdown(f'# {TITLE}\n{LEAD}')
        with gr.Row(equal_height=True):
            file = gr.File(label='Your own picture', height=140, min_width=280, elem_id='file')
            samples = gr.Dataset(
                components=[gr.Image(render=False)], samples=[[path] for path in SAMPLES], type='index',
                label='Samples', min_width=280, elem_id='samples')
            tag = gr.Dropdown(
                list(dict.fromkeys([*names, chosen])), value=chosen, label='Model', info=_about(chosen),
                min_width=280, elem_id='model')
        with gr.Row():
            with gr.Column(scale=2):
                picture = gr.Image(
                    label='Picture', type='pil', interactive=False, buttons=[], height=320, elem_id='picture',
                    alt_text='The chosen picture: a click shows the windows from there.')
                guesses = gr.HTML(elem_id='guesses')
            with gr.Column(scale=3):
                windows = gr.Plot(label='Where the attention looks', show_label=False, elem_id='windows')
                gr.Markdown(LEGEND, elem_id='legend')
        outputs = [shown, picture, guesses, windows]
        page.load(lambda *inputs: _open(str(SAMPLES[0]), *inputs), [tag, window], outputs, js=WINDOW_JS)
        samples.click(lambda index, *inputs: _open(str(SAMPLES[index]), *inputs), [samples, tag, window], outputs,
                      js=WINDOW_JS)
        # the upload field is emptied for the next picture
        file.upload(lambda *inputs: (None, *_open(*inputs)), [file, tag, window], [file, *outputs], js=WINDOW_JS)
        picture.select(
            _click, [shown, tag, window], [shown, picture, windows], js=WINDOW_JS,
            trigger_mode='always_last', show_progress='hidden'  # no flicker on rapid clicks, of which the last counts
        ).then(None, js=SCROLL_JS)
        tag.input(_switch, [tag, shown, window], [tag, picture, guesses, windows], js=WINDOW_JS)
    return page


def _check_port(port: int) -> None:
    """Check the port before anything is loaded: Gradio's threads would outlive a failure to open it."""
    try:
        if port < 1:
            raise OverflowError('not a port')
        socket.create_server((os.environ.get('GRADIO_SERVER_NAME', '127.0.0.1'), port)).close()
    except (OSError, OverflowError) as error:
        reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else 'Not from 1 to 65535'
        raise GeoPriorError(
            f'Port {port} cannot be opened ({reason}). Name a free one with --port.') from None


def serve(model: str | None = None, port: int | None = None) -> None:
    """Serve the page until it is interrupted.

    Args:
        model: As in `build`.
        port: Local port; None for the first free one from 7860. The environment variables GRADIO_SERVER_NAME and
            GRADIO_SERVER_PORT change the defaults.

    Raises:
        GeoPriorError: The port cannot be opened.
    """
    if port is not None:
        _check_port(port)
    for name in ('no_proxy', 'NO_PROXY'):  # Gradio checks that its own server is up, which a proxy would break
        os.environ[name] = ','.join(filter(None, (os.environ.get(name), '127.0.0.1', 'localhost')))
    page = build(model)
    _, url, _ = page.launch(
        server_port=port, max_file_size=MAX_UPLOAD, ssr_mode=False, prevent_thread_lock=True, quiet=True, css=CSS,
        footer_links=['settings'], theme=gr.themes.Default(font=['system-ui', 'sans-serif']))
    print(f'Open {url} (Ctrl-C to stop).', flush=True)
    page.block_thread()


def _requirements() -> list[str]:
    """The packages that the page needs, in the versions installed here, so that the Space runs the same code."""
    needed = map(Requirement, requires('timm-geoprior') or ())
    names = {need.name for need in needed if need.marker is None or need.marker.evaluate({'extra': 'demo'})}
    return [f'{name}=={version(name).partition("+")[0]}' for name in sorted(names)]


def write_space(folder: Path, model: str | None = None) -> None:
    """Write the folder of a Hugging Face Space that serves the page, including this package and its weights.

    Args:
        folder: A new or empty folder.
        model: A model of the manifest, to be selected at first; None for the default model.

    Raises:
        GeoPriorError: The folder has something in it, or cannot be written.
        ManifestError: There is no such model.
    """
    manifest = load_manifest()
    first = manifest.get(model) if model else default_model(manifest)
    models = [entry for entry in manifest.models.values() if entry.is_released or entry.name == first.name]
    models += [first] * (first not in models)  # a converted model
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
            raise GeoPriorError(f'The folder of a Space must be new or empty, got {folder}, which has files in it. '
                                f'Name another.')
        with new_folder(folder) as whole:
            package = shutil.copytree(Path(__file__).parents[1], whole / 'timm_geoprior',
                                      ignore=shutil.ignore_patterns('__pycache__'))
            shutil.copy(manifest_path(), package)
            for name, text in files.items():
                (whole / name).write_text(text, encoding='utf-8')
    except OSError as error:
        raise GeoPriorError(f'{folder} cannot be written ({error.strerror}). Name another folder.') from None
