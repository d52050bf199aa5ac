"""Where each attention layer looks from a point of a picture, drawn to scale."""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Ellipse, Patch, Polygon, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.textpath import TextPath
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from ..errors import GeoPriorError
from ..layers import GeoPriorAttn2d, attention_map
from ..radii import cell_size, learned_radii
from .classifier import Classifier

COLORS = ('#2ec4b6', '#ffb703', '#ff5d8f', '#8ecae6')  # one per stage
PANEL_WIDTH = 2.6  # inches available for a panel's titles
PHOTO_SIDE = 600  # side of a drawn photograph, in pixels
DARK_EDGE = [withStroke(linewidth=3, foreground='black', alpha=0.55)]  # keeps lines visible on any background
ON_PHOTO: dict[str, Any] = {  # the same for text
    'color': 'white', 'fontsize': 9, 'ha': 'center', 'va': 'center',
    'path_effects': [withStroke(linewidth=2, foreground='black')]}


@dataclass(frozen=True)
class View:
    """The part of a picture that a network sees."""
    box: tuple[float, float, float, float]  # left, top, right and bottom, in pixels of the picture
    height: int  # of the network's input, in pixels
    width: int  # of the network's input, in pixels


@dataclass(frozen=True)
class Window:
    """Where one head of an attention layer looks from a point."""
    stage: str  # name of the layer's stage
    weights: Tensor  # attention on each cell of the layer's map, shape (height, width); their sum is one
    center: tuple[float, float]  # the middle of the query's cell, x and y in pixels of the input
    cell: tuple[float, float]  # width and height of a cell, in pixels of the input
    radius: float  # in cells
    kernel: str  # 'gaussian' or 'laplacian'

    def outline(self, center: tuple[float, float], **style: Any) -> Patch:
        """The radius around a point, in pixels of the input: where the weight falls to e^-1/2 (Laplacian: e^-1)."""
        (x, y), across, down = center, self.radius * self.cell[0], self.radius * self.cell[1]
        if self.kernel == 'laplacian':
            return Polygon([(x - across, y), (x, y - down), (x + across, y), (x, y + down)], fill=False, **style)
        return Ellipse(center, 2 * across, 2 * down, fill=False, **style)


def view_of(classifier: Classifier, size: tuple[int, int]) -> View:
    """The part of a picture of a size (width, height) that the classifier's preprocessing keeps.

    With the crop mode 'border' it may extend beyond the picture.
    """
    config = resolve_model_data_config(classifier.model)
    height, width = config['input_size'][1:]
    rows, columns = (math.floor(side / config['crop_pct']) for side in (height, width))  # as timm resizes
    scales = size[0] / columns, size[1] / rows
    if config['crop_mode'] != 'squash':
        scales = (max(scales) if config['crop_mode'] == 'border' else min(scales),) * 2
    (x, y), across, down = (size[0] / 2, size[1] / 2), scales[0] * width / 2, scales[1] * height / 2
    return View((x - across, y - down, x + across, y + down), height, width)


def to_input(view: View, size: tuple[int, int], point: tuple[float, float] | None) -> tuple[float, float]:
    """A point of a picture, as x and y in pixels of the network's input.

    Args:
        view: What the network sees of the picture.
        size: Width and height of the picture, in pixels.
        point: x and y in pixels of the picture, from its top left corner; None for the middle.

    Raises:
        GeoPriorError: The point is outside the picture, or outside the part that the network sees.
    """
    width, height = size
    x, y = point or (width / 2, height / 2)
    left, top, right, bottom = view.box
    if not (0 <= x <= width and 0 <= y <= height):  # nan too
        raise GeoPriorError(f'The point must be in the picture (x from 0 to {width}, y from 0 to {height}), '
                            f'got {x:g},{y:g}.')
    if not (left <= x <= right and top <= y <= bottom):
        raise GeoPriorError(
            f'The point must be in the part of the picture that the network sees (x from {max(left, 0):.0f} to '
            f'{min(right, width):.0f}, y from {max(top, 0):.0f} to {min(bottom, height):.0f}), got {x:g},{y:g}.')
    return (x - left) / (right - left) * view.width, (y - top) / (bottom - top) * view.height


@torch.no_grad()
def learned_windows(model: nn.Module, view: View, point: tuple[float, float]) -> list[Window]:
    """Where each head of each attention layer looks from a point, in the network's order.

    The point is x and y in pixels of the input; a layer's window is that of its nearest query.
    """
    windows = []
    for found in learned_radii(model, (int(model.in_chans), view.height, view.width)):  # type: ignore[arg-type]
        layer = model.get_submodule(found.name)
        assert isinstance(layer, GeoPriorAttn2d)
        cell = cell_size(view.width, found.width), cell_size(view.height, found.height)
        down, across = (attention_map(layer.log_radius.float(), size, layer.stride, layer.dilation, layer.kernel)
                        for size in (found.height, found.width))
        column, row = (min(max(round((place / length - 0.5) / layer.stride), 0), maps.shape[1] - 1)
                       for place, length, maps in zip(point, cell, (across, down), strict=True))
        center = (layer.stride * column + 0.5) * cell[0], (layer.stride * row + 0.5) * cell[1]
        for head, radius in enumerate(found.cells):
            weights = torch.outer(down[head, row], across[head, column])
            windows.append(Window(found.name.split('.')[0], weights, center, cell, radius, layer.kernel))
    if not windows:
        raise GeoPriorError('The model must be a GeoPrior ResNet, got one without attention layers. Choose another.')
    return windows


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches, whose panels keep clear of its edges."""
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.12, rect=(0, 0, 1, 0.98)))


def fitting_size(text: str, size: float, width: float = PANEL_WIDTH, weight: str = 'normal') -> float:
    """The largest font size, up to `size` points, at which a text is at most `width` inches wide."""
    plain = ''.join(character if character.isascii() else 'W' for character in text.replace('$', 'S'))
    drawn = TextPath((0, 0), plain, size=size, prop=FontProperties(weight=weight)).get_extents().width / 72
    return size * min(1, width / drawn) if drawn > 0 else size


def draw_heading(axes: Axes, title: str, line: str = '') -> None:
    """Draw a title and a smaller line below it, each shrunk if it is wider than the panel."""
    size = fitting_size(title, 12, weight='bold')
    axes.set_title(title, loc='left', fontsize=size, fontweight='bold', pad=22 if line else 8)
    axes.text(0, 1.02, line, transform=axes.transAxes, fontsize=fitting_size(line, 9.5), color='0.35', va='bottom')


def _draw_legend(axes: Axes, stages: Sequence[str]) -> None:
    """Draw a legend of the stages' colours."""
    handles = [Line2D([], [], color=color, linewidth=3) for color, _ in zip(COLORS, stages, strict=False)]
    legend = axes.legend(handles, stages, loc='lower left', fontsize=9, framealpha=0.75, facecolor='black',
                         edgecolor='none', labelcolor='white', handlelength=1.2, borderaxespad=0.4,
                         title='radius of a layer in')
    legend.get_title().set(color='white', fontsize=9)
    legend.set_in_layout(False)


def draw_photo(axes: Axes, image: Image.Image, view: View) -> None:
    """Draw the part of a picture that the network sees, on axes in pixels of the input."""
    left, top, right, bottom = view.box
    box = max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)
    photo = image.resize((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.LANCZOS, box=box)
    across, down = view.width / (right - left), view.height / (bottom - top)
    extent = (box[0] - left) * across, (box[2] - left) * across, (box[3] - top) * down, (box[1] - top) * down
    axes.imshow(photo, extent=extent, interpolation='antialiased')
    axes.set(xlim=(0, view.width), ylim=(view.height, 0))
    axes.set_axis_off()


def _draw_cross(axes: Axes, point: tuple[float, float]) -> None:
    axes.plot(*point, '+', color='white', markersize=13, markeredgewidth=2.2,
              path_effects=[withStroke(linewidth=4, foreground='black')])


def _draw_stage(axes: Axes, windows: Sequence[Window], color: str) -> None:
    """Shade all but where the query looks, in the layers' own cells, and draw the radius of each layer around it."""
    rows, columns = max(tuple(window.weights.shape) for window in windows)
    across, down = min(window.cell for window in windows)
    weights = torch.stack([
        torch.kron(window.weights / window.weights.max(),  # a coarser layer's cell is a whole number of finer ones
                   torch.ones(round(window.cell[1] / down), round(window.cell[0] / across)))[:rows, :columns]
        for window in windows]).mean(0)
    shade = np.zeros((rows, columns, 4))
    shade[..., 3] = 0.88 * (1 - weights / weights.max()).numpy()
    axes.imshow(shade, extent=(0, columns * across, rows * down, 0), interpolation='nearest')
    for window in windows:
        axes.add_patch(window.outline(window.center, edgecolor=color, linewidth=2, path_effects=DARK_EDGE))
    (x, y), (width, height) = windows[-1].center, windows[-1].cell
    axes.add_patch(Rectangle((x - width / 2, y - height / 2), width, height, fill=False, edgecolor='white',
                             linewidth=1.2, linestyle=':', path_effects=DARK_EDGE))


def _range(values: Sequence[float], digits: int) -> str:
    return '–'.join(sorted({f'{value:.{digits}f}' for value in (min(values), max(values))}, key=float))


def _radii_line(windows: Sequence[Window]) -> str:
    """The radii of a stage's layers in pixels, and in cells if all its maps have the same size."""
    pixels = f'{_range([window.radius * window.cell[1] for window in windows], 0)} px'
    if len({window.weights.shape for window in windows}) > 1:
        return f'radius {pixels}'
    return f'radius {_range([window.radius for window in windows], 1)} of {len(windows[0].weights)} cells = {pixels}'


def fill_windows(
        panels: Sequence[Axes], image: Image.Image, view: View, windows: Sequence[Window],
        point: tuple[float, float]) -> None:
    """Draw the windows of every stage: all of them on the first panel, each stage on one of the others.

    The point is in pixels of the input.
    """
    stages = list(dict.fromkeys(window.stage for window in windows))
    draw_heading(panels[0], 'How far it looks', f'learned radii to scale, {view.width} × {view.height} px')
    for axes in panels:
        draw_photo(axes, image, view)
    _draw_legend(panels[0], stages)
    for axes, stage, color in zip(panels[1:], stages, COLORS, strict=False):
        own = [window for window in windows if window.stage == stage]
        _draw_stage(axes, own, color)
        draw_heading(axes, f'Attention in {stage}', _radii_line(own))
        for window in own:
            panels[0].add_patch(window.outline(point, edgecolor=color, linewidth=2, path_effects=DARK_EDGE))
    for axes in panels:
        _draw_cross(axes, point)
    panels[-1].text(0.5, 0.05, 'dotted: the cell that looks', transform=panels[-1].transAxes, **ON_PHOTO)


def draw_windows(
        classifier: Classifier, image: Image.Image, point: tuple[float, float] | None = None,
        columns: int = 2) -> Figure:
    """Draw where the attention layers look from a point of a picture, 3.5 inches wide for each column of panels.

    Args:
        classifier: Its model is a GeoPrior ResNet.
        image: The picture, in mode 'RGB'.
        point: x and y in pixels of the picture, from its top left corner; None for the middle.
        columns: Number of panels side by side.

    Raises:
        GeoPriorError: The network has no attention layers, or the point is outside the part that it sees.
    """
    view = view_of(classifier, image.size)
    place = to_input(view, image.size, point)
    windows = learned_windows(classifier.model, view, place)
    count = 1 + len({window.stage for window in windows})
    rows = math.ceil(count / columns)
    figure = new_figure(3.5 * columns, 3.9 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_axis_off()
    fill_windows(panels[:count], image, view, windows, place)
    return figure
