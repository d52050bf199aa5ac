"""What a network attends to, on one page: its windows over a photograph, Grad-CAM, its effective receptive field.

Grad-CAM: Selvaraju et al., ICCV 2017, arXiv 1610.02391, with the library grad-cam. Effective receptive field: Luo et
al., NeurIPS 2016, arXiv 1701.04128, the gradient of the last map's central position with respect to the input.
"""
import copy
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from PIL import Image
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from ..errors import GeoPriorError
from ..files import drawable, save_figure
from ..layers import GeoPriorConv2d
from .classifier import Classifier
from .windows import (
    COLORS,
    ON_PHOTO,
    PANEL_WIDTH,
    View,
    Window,
    draw_heading,
    draw_photo,
    fill_windows,
    fitting_size,
    learned_windows,
    new_figure,
    to_input,
    view_of,
)

DRAWS = 4  # random weights and noise images that an effective receptive field is averaged over
FAINTEST = 1e-4  # smallest gradient that is drawn, as a share of the largest
ALIKE = 0.1  # share of the plain network's reach, below which a difference in reach is not visible


def effective_field(model: nn.Module, images: Tensor) -> Tensor:
    """The effective receptive field of the last map's central position, for inputs of shape (B, C, H, W).

    It is the mean over the images of the gradient's magnitude, summed over the channels, shape (H, W).
    """
    images = images.clone().requires_grad_()
    features = model.forward_features(images)  # type: ignore[operator]
    center = features[:, :, features.shape[2] // 2, features.shape[3] // 2].sum()
    (gradient,) = torch.autograd.grad(center, images)
    return gradient.abs().sum(1).mean(0)


def _plain_twin(model: nn.Module) -> nn.Module:
    """The ResNet of the same widths and depth, with plain convolutions in place of those with attention."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if isinstance(module, GeoPriorConv2d):
                conv = module.conv
                setattr(parent, name, nn.Conv2d(
                    conv.in_channels, conv.out_channels + module.attn.value.out_channels, 3, conv.stride[0],
                    padding=conv.dilation[0], dilation=conv.dilation[0], bias=False))
    return model


def receptive_pair(model: nn.Module, size: int) -> tuple[Tensor, Tensor]:
    """Effective receptive fields of a network and of the plain ResNet of its widths and depth, each (size, size).

    Both have random weights, so that they are comparable; the first keeps its learned radii. Each field is the mean
    over several draws of weights and noise images, with the same seeds.
    """
    own, plain = copy.deepcopy(model).eval(), _plain_twin(model).eval()
    radii = {name: value for name, value in model.state_dict().items() if name.endswith('log_radius')}
    shape = 1, int(model.in_chans), size, size  # type: ignore[arg-type]
    fields = torch.zeros(2, size, size)
    with torch.random.fork_rng(devices=()):
        for draw in range(DRAWS):
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(draw))
            for field, network in zip(fields, (own, plain), strict=True):
                torch.manual_seed(draw)
                network.init_weights(zero_init_last=False)  # type: ignore[operator]  # a zero branch sees nothing
                if network is own:
                    network.load_state_dict(radii, strict=False)
                field += effective_field(network, noise) / DRAWS
    return fields[0], fields[1]


def _field_size(model: Any, view: View) -> int:
    """A side with room around the input: a whole number of cells plus one pixel, so that the middle cell is centred."""
    cells: int = 2 * model.feature_info[-1]['reduction']
    return cells * math.ceil(max(256, 2 * view.width, 2 * view.height) / cells) + 1


def _radius_of_share(field: Tensor, share: float) -> float:
    """Radius of the circle around the middle that holds a share of the field, in pixels."""
    places = torch.arange(len(field)) + 0.5 - len(field) / 2
    distance = (places[:, None] ** 2 + places ** 2).sqrt().flatten()
    order = distance.argsort()
    inside = field.flatten().double()[order].cumsum(0)
    return float(distance[order][int(torch.searchsorted(inside, share * inside[-1]))])


def _first_name(name: str) -> str:
    """The first of a class's names, in a form that matplotlib draws literally."""
    return drawable(name.split(',')[0])


def _draw_guesses(axes: Axes, classifier: Classifier, guesses: Sequence[dict[str, Any]]) -> None:
    for row, guess in enumerate(guesses):
        weight, color = ('bold', '#1d3557') if row == 0 else ('normal', '#a8b8cc')
        axes.barh(row, guess['probability'], height=0.34, color=color)
        name = _first_name(guess['name'])
        size = fitting_size(name, 11, PANEL_WIDTH - 0.6, weight)
        axes.text(0, row - 0.27, name, fontsize=size, va='bottom', fontweight=weight)
        axes.text(1, row - 0.27, f'{guess["probability"]:.1%}', fontsize=11, va='bottom', ha='right')
    axes.set(xlim=(0, 1), ylim=(4.5, -0.75), box_aspect=1)
    axes.set_axis_off()
    draw_heading(axes, 'What it says', drawable(classifier.name.rstrip('/').split('/')[-1]))


def _draw_grad_cam(
        axes: Axes, classifier: Classifier, image: Image.Image, view: View, guess: dict[str, Any]) -> None:
    """Draw Grad-CAM for a class, from the last stage whose map has at least four cells per side, else the very last."""
    model: Any = classifier.model
    sizes = [(math.ceil(view.height / info['reduction']), math.ceil(view.width / info['reduction']), info['module'])
             for info in model.feature_info]
    rows, columns, stage = ([size for size in sizes if min(size[:2]) >= 4] or sizes)[-1]
    target = ClassifierOutputTarget([label for label, _ in classifier.classes].index(guess['label']))
    with GradCAM(model=model, target_layers=[model.get_submodule(stage)]) as cam:
        heat = cam(input_tensor=classifier.transform(image)[None], targets=[target])[0]
    draw_photo(axes, image, view)
    axes.imshow(heat, cmap='inferno', alpha=0.55, extent=(0, view.width, view.height, 0), interpolation='bicubic')
    draw_heading(axes, f'Grad-CAM: {_first_name(guess["name"])}', f'{stage}, {columns} × {rows} cells')


def _draw_field(axes: Axes, field: Tensor, view: View, lines: Sequence[str]) -> AxesImage:
    """Draw a receptive field, on axes in pixels around its middle, with the input's frame and some lines of text."""
    half = len(field) / 2
    drawn = axes.imshow((field / field.max()).clamp(min=FAINTEST).numpy(), cmap='magma', norm=LogNorm(FAINTEST, 1),
                        extent=(-half, half, half, -half))
    axes.add_patch(Rectangle((-view.width / 2, -view.height / 2), view.width, view.height, fill=False,
                             edgecolor='white', linestyle=':'))
    axes.text(0, view.height / 2 + 0.18 * half, f'input, {view.width} × {view.height} px', **ON_PHOTO)
    axes.text(0, 0.96 * half, '\n'.join(lines), **{**ON_PHOTO, 'va': 'bottom'})
    axes.set(xticks=(), yticks=())
    return drawn


def _draw_reach(axes: Axes, windows: Sequence[Window]) -> None:
    """Draw how far each layer looks, compared with a 3x3 convolution on the same map."""
    stages = list(dict.fromkeys(window.stage for window in windows))
    for row, window in enumerate(windows):
        color = COLORS[stages.index(window.stage) % len(COLORS)]
        axes.barh(row, 1.5 * window.cell[1], height=0.7, color=color, alpha=0.35)
        axes.plot(window.radius * window.cell[1], row, 'o', color=color, markeredgecolor='0.3')
    axes.set(box_aspect=1, xlim=(0, None), ylim=(len(windows) - 0.5, -0.5), yticks=())
    limit = axes.get_xlim()[1]
    axes.set_xticks([place for place in axes.get_xticks() if place <= limit])  # ticks beyond it would extend the axis
    axes.set_axis_on()
    axes.spines[['top', 'right', 'left']].set_visible(False)
    axes.set_xlabel('px, layers from first to last', fontsize=9, color='0.35')


def _draw_fields(panels: Sequence[Axes], model: nn.Module, view: View, windows: Sequence[Window]) -> None:
    """Draw the receptive field, and below it the plain network's if that differs, else the reach of each layer."""
    own, plain = receptive_pair(model, _field_size(model, view))
    reach, plain_reach = (_radius_of_share(field, 0.99) for field in (own, plain))
    draw_heading(panels[0], 'Receptive field: GeoPrior', 'random weights, learned radii')
    lines = [f'99% of it within {reach:.0f} px']
    if abs(reach - plain_reach) < ALIKE * plain_reach:
        _draw_reach(panels[1], windows)
        draw_heading(panels[1], 'Reach of each layer', 'dot: radius, bar: 3 × 3 convolution')
        lines += [f'plain ResNet: {plain_reach:.0f} px']
    else:
        _draw_field(panels[1], plain, view, [f'99% of it within {plain_reach:.0f} px'])
        draw_heading(panels[1], 'Receptive field: plain ResNet', 'same depth and widths, random weights')
    bar = panels[0].inset_axes((0.14, 0.94, 0.4, 0.025))
    drawn = _draw_field(panels[0], own, view, lines)
    scale = panels[0].figure.colorbar(drawn, cax=bar, orientation='horizontal')
    scale.set_ticks([FAINTEST, 1], labels=['0.01%', '100%'])
    scale.minorticks_off()
    bar.tick_params(colors='white', labelsize=8, length=0)


def draw_explanation(
        classifier: Classifier, image: Image.Image, point: tuple[float, float] | None = None) -> Figure:
    """Draw what a network attends to in a picture, as a figure for 16:9 slides.

    Args:
        classifier: Its model is a `GeoPriorResNet`.
        image: The picture, in mode 'RGB'.
        point: Where the windows are drawn, x and y in pixels of the picture, from its top left corner; None for the
            middle.

    Raises:
        GeoPriorError: The network has no attention layers, or the point is outside the part that it sees.
    """
    view = view_of(classifier, image.size)
    place = to_input(view, image.size, point)
    windows = learned_windows(classifier.model, view, place)
    stages = len({window.stage for window in windows})
    columns = max(stages, 3) + 1
    figure = new_figure(3.3 * columns, 7.3)
    panels = figure.subplots(2, columns)
    for axes in panels.flat:
        axes.set_axis_off()
    fill_windows([panels[0, 0], *panels[1, :stages]], image, view, windows, place)
    guesses = classifier(image)
    _draw_guesses(panels[0, 1], classifier, guesses)
    _draw_grad_cam(panels[0, 2], classifier, image, view, guesses[0])
    _draw_fields(panels[:, -1], classifier.model, view, windows)
    return figure


def check_output(path: Path) -> None:
    """Check the extension and the folder of a figure's path, before anything is computed."""
    if path.suffix.lower() not in ('.png', '.jpg', '.jpeg', '.pdf', '.svg'):
        raise GeoPriorError(f'The output must end in .png, .jpg, .pdf or .svg, got {path}. Name another.')
    if not path.parent.is_dir():
        raise GeoPriorError(f'The output must be in a folder that exists, got {path}. Make the folder first.')
    if os.path.isdir(path):
        raise GeoPriorError(f'The output must be a file, got the folder {path}. Name a file in it.')


def save_explanation(
        classifier: Classifier, image: Image.Image, path: Path, point: tuple[float, float] | None = None) -> None:
    """Write the figure of `draw_explanation`.

    Args:
        classifier: Its model is a `GeoPriorResNet`.
        image: The picture, in mode 'RGB'.
        path: The file, whose extension sets the format: .png, .jpg, .pdf or .svg.
        point: As for `draw_explanation`.

    Raises:
        GeoPriorError: The extension is not one of these, the file cannot be written, or there is nothing to draw.

    Examples:
        >>> from timm_geoprior.inference.classifier import load_classifier
        >>> from timm_geoprior.inference.inputs import sample_image
        >>> save_explanation(load_classifier('geoprior_resnet14_nano'), sample_image(), Path('explain.png'))
    """
    check_output(path)
    figure = draw_explanation(classifier, image, point)
    try:
        save_figure(path, figure)
    except OSError as error:
        raise GeoPriorError(f'{path} cannot be written ({error.strerror}). Name another place with --output.') from None
