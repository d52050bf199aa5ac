"""The learned radii of a network: how far each of its attention layers looks."""
import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from .layers import MAX_RADIUS, GeoPriorAttn2d


class LayerRadii(NamedTuple):
    """The radii of one attention layer."""
    name: str  # name of the layer in the network
    height: int  # number of rows of the layer's input
    width: int  # number of columns of the layer's input
    cells: tuple[float, ...]  # radius of each head, in cells of the layer's input

    @property
    def relative(self) -> tuple[float, ...]:
        """The radii as shares of the input's longer side, which are comparable across layers and image sizes."""
        return tuple(radius / max(self.height, self.width) for radius in self.cells)


def radii_in_cells(model: nn.Module) -> dict[str, Any]:
    """Each layer's radii in cells of its input grid, by the layer's name; a list where it has several heads."""
    radii = {name: module.radius().tolist() for name, module in model.named_modules() if hasattr(module, 'log_radius')}
    return {name: values if len(values) > 1 else values[0] for name, values in radii.items()}


def cell_size(pixels: int, cells: int) -> float:
    """The side of a map's cell in pixels of the image. The last cell may reach beyond the image.

    Args:
        pixels: Height or width of the image.
        cells: Number of the map's rows or columns.

    Examples:
        >>> cell_size(100, 7)
        16
    """
    strides = (2 ** power for power in range(pixels.bit_length() + 1))
    # a network rounds up each time it halves its map, which equals dividing by the whole stride and rounding up
    return next((stride for stride in strides if -(-pixels // stride) == cells), pixels / cells)


def _note_size(sizes: dict[str, tuple[int, int]], name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
    sizes[name] = (args[0].shape[-2], args[0].shape[-1])


@torch.no_grad()
def learned_radii(model: nn.Module, input_size: tuple[int, int, int]) -> list[LayerRadii]:
    """Read the radii of every attention layer. An all-zero image is passed through the network to find the input sizes.

    Args:
        model: Any network with `GeoPriorAttn2d` layers.
        input_size: Size of the image, (channels, height, width). The radii in cells do not depend on it.

    Returns:
        One entry per layer, in the order of the network. Layers that the forward pass does not reach are left out.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, GeoPriorAttn2d)}
    sizes: dict[str, tuple[int, int]] = {}
    hooks = [layer.register_forward_pre_hook(partial(_note_size, sizes, name)) for name, layer in layers.items()]
    modes = [(module, module.training) for module in model.modules()]  # frozen norms may be in eval mode already
    parameter = next(model.parameters())
    try:
        model.eval()(torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    finally:
        for module, training in modes:
            module.training = training
        for hook in hooks:
            hook.remove()
    return [LayerRadii(name, *sizes[name], tuple(layer.radius().tolist()))
            for name, layer in layers.items() if name in sizes]


@torch.no_grad()
def scale_radii(model: nn.Module, factor: float) -> None:
    """Multiply the radii of every attention layer, in place.

    Radii are in cells, whatever the size of the image. If images are enlarged (same content, more pixels),
    scaling the radii by the same factor keeps each window the same share of the image. Radii stay from 1e-4 to
    1e4 cells, beyond which the map does not change.

    Args:
        model: Any network with `GeoPriorAttn2d` layers, including one made with `features_only` or reparameterized.
        factor: Factor to multiply the radii by, such as 2 for images of twice the side length.

    Raises:
        ValueError: If the factor is not a finite number above 0.

    Examples:
        >>> import timm, timm_geoprior
        >>> model = timm.create_model('geoprior_resnet14_nano', attn_radius=1.5)
        >>> scale_radii(model, 2)
        >>> model.layer2[0].conv2.attn.radius()
        tensor([3.])
    """
    if not 0 < factor < math.inf:  # rejects nan too
        raise ValueError(
            f'factor must be a finite number above 0, got {factor}. Use the new image size divided by the old one.')
    limit = math.log(MAX_RADIUS)
    for module in model.modules():
        if isinstance(module, GeoPriorAttn2d):
            module.log_radius.add_(math.log(factor)).clamp_(-limit, limit)
