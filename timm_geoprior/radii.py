"""The learned radii of a network, which say how far each of its attention layers looks."""
import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from .layers import GeoPriorAttn2d

__all__ = ['LayerRadii', 'learned_radii', 'scale_radii']


class LayerRadii(NamedTuple):
    """The radii of one attention layer.

    Attributes:
        name: Name of the layer in the network.
        height: Rows of the layer's input map.
        width: Columns of it.
        cells: Radius of each head, in cells of that map.
    """
    name: str
    height: int
    width: int
    cells: tuple[float, ...]

    @property
    def relative(self) -> tuple[float, ...]:
        """The radii relative to the map's longer side: what compares layers, and sizes of input."""
        return tuple(radius / max(self.height, self.width) for radius in self.cells)


def _note_size(sizes: dict[str, tuple[int, int]], name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
    sizes[name] = (args[0].shape[-2], args[0].shape[-1])


@torch.no_grad()
def learned_radii(model: nn.Module, input_size: tuple[int, int, int]) -> list[LayerRadii]:
    """Read the radii of every attention layer; one black picture is passed through for the sizes of the maps.

    Args:
        model: Any network with `GeoPriorAttn2d` layers.
        input_size: Size of the input, (channels, height, width); the maps scale with it, the radii do not.

    Returns:
        One entry a layer, in the order of the network.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, GeoPriorAttn2d)}
    sizes: dict[str, tuple[int, int]] = {}
    hooks = [layer.register_forward_pre_hook(partial(_note_size, sizes, name)) for name, layer in layers.items()]
    training = model.training
    parameter = next(model.parameters())
    try:
        model.eval()(torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return [LayerRadii(name, *sizes[name], tuple(layer.radius().tolist())) for name, layer in layers.items()]


@torch.no_grad()
def scale_radii(model: nn.Module, factor: float) -> None:
    """Multiply the radii of every attention layer, in place.

    A radius is so many cells of its map, whatever the map's size. For images that are enlarged (the same content in
    more pixels), the factor of the enlargement keeps each radius the same share of the picture.

    Args:
        model: Any network with `GeoPriorAttn2d` layers, as it is, by `features_only`, or reparameterized.
        factor: What the radii are multiplied by, such as 2 for images of twice the side.

    Raises:
        ValueError: The factor is not a finite number above 0.

    Examples:
        >>> import timm, timm_geoprior
        >>> model = timm.create_model('geoprior_resnet14_nano', attn_radius=1.5)
        >>> scale_radii(model, 2)
        >>> model.layer2[0].conv2.attn.radius()
        tensor([3.])
    """
    if not 0 < factor < math.inf:  # nan too
        raise ValueError(f'The factor of the radii is {factor}, expected a finite number above 0: give the new size '
                         f'of the images divided by the old one.')
    for module in model.modules():
        if isinstance(module, GeoPriorAttn2d):
            module.log_radius.add_(math.log(factor))
