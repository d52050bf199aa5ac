"""Conversion with images: ridge regression on activations, front to back, towards the closed form.

Each block is fitted after the blocks before it have been converted. Its inputs are those of the converted network, its
targets the activations of the trained one, the source, for the same images.

1. For each of a few radii around the closed form's, the 3x3 convolution's outputs are regressed on the attention over
   the block's inputs, towards the closed form's value projection.
2. The channels replaced are those with the smallest squared error after norm and activation, weighted by the squared
   weights of the 1x1 convolution and the norm after it. The radius is the one with the smallest sum of these errors.
3. The 1x1 convolution is regressed on its new inputs, towards the closed form's weights. Its target is the output of
   the source's block before the last activation, minus the converted block's shortcut, so that it compensates for what
   earlier blocks lost (as in pruning: He et al., 2017, arXiv 1707.06168, section 3.3). Its constant goes into the norm
   after it.
4. The outputs of both blocks are the inputs of the next.

Penalties are chosen by five-fold cross-validation over the batches; the radii of a layer share one.
"""
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GeoPriorError
from ..geoprior_resnet import GeoPriorResNet
from ..layers import GeoPriorAttn2d, GeoPriorConv2d, mix_values
from .activations import Activations
from .closed_form import SMALLEST_RADIUS, LayerFit, LayerModel, correct
from .mirror import blocks
from .ridge import Moments, choose_penalty, solve
from .state_dict import AttentionBlock, apply_fit, attention_blocks, layer_models

Block = Any  # a Bottleneck of timm, whose parts are modules or None
PARTS = 5  # number of parts that the batches are divided into to choose a penalty
RADII = tuple(2.0 ** (step / 4) for step in (-2, -1, 0, 1, 2))  # times the closed form's


@dataclass(frozen=True)
class FittedLayer:
    """The result of fitting a layer."""
    name: str  # name of the block
    value_dim: int  # channels that the attention computes
    radius: float  # radius in cells of the undilated grid
    # share of those channels' energy that the attention misses, after norm and activation, weighted by the next
    # convolution
    lost: float
    output: float  # squared error of the block's output as a share of the energy of the source's


class _Inputs:
    """The inputs of the current block for the same images, in the source and in the model."""

    def __init__(self, device: torch.device, batches: int, values: int) -> None:
        self.device = device
        self.source, self.model = Activations(batches, values), Activations(batches, values)

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Index, inputs in the source and inputs in the model, (N, C, H, W), of each batch."""
        for batch in list(self.source.shapes):  # fewer than announced if no image of a batch could be read
            yield batch, self.source.read(batch, self.device), self.model.read(batch, self.device)

    def advance(self, name: str, source: nn.Module | None, model: nn.Module) -> float:
        """Replace a block's inputs with its outputs; returns their squared error as a share of the source's energy.

        `source` is None if the source's outputs are in place already.
        """
        missed = energy = 0.0
        for batch, x, y in self:
            if source is not None:
                x = source(x)
                self.source.write(batch, x, f'the output of {name}')
            y = model(y)
            missed += float((x - y).square().sum(dtype=torch.float64))
            energy += float(x.square().sum(dtype=torch.float64))
            self.model.write(batch, y, f'the output of {name}, converted,')
        return missed / energy if energy else 0.0


@torch.no_grad()
def activation_bytes(model: GeoPriorResNet, input_size: tuple[int, int, int]) -> int:
    """Bytes that each image takes in the temporary files: the largest map from the first attention layer's block on."""
    seen: list[int] = []
    start = _first(model)
    hooks = [block.register_forward_hook(lambda module, args, output: seen.append(max(args[0].numel(), output.numel())))
             for _, block in blocks(model)[start:]]
    try:
        model.eval()(torch.zeros(1, *input_size, device=next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return 4 * max(seen)  # two networks, two bytes per value


def _first(model: GeoPriorResNet) -> int:
    """Index of the first block that has an attention layer."""
    return next(index for index, (_, block) in enumerate(blocks(model)) if isinstance(block.conv2, GeoPriorConv2d))


@torch.no_grad()
def refine(
        source: nn.Module, model: GeoPriorResNet, images: Iterable[Tensor], count: int, batch_size: int,
        advanced: Callable[[FittedLayer], object] = lambda layer: None,
) -> list[FittedLayer]:
    """Fit a converted network to images, in place.

    Args:
        source: The trained ResNet, in eval mode.
        model: Its mirror with the closed form's weights, in eval mode, on the same device.
        images: Batches of preprocessed images, (N, C, H, W), at least two and preferably `PARTS` or more.
        count: Number of batches.
        batch_size: Largest number of images in a batch.
        advanced: Called with the fit of each layer once it is done.

    Returns:
        One entry for each attention layer, front to back.

    Raises:
        GeoPriorError: There are no images, activations do not fit float16, or the temporary files cannot be written.
    """
    start, attention = _first(model), {item.prefix: item for item in attention_blocks(model)}
    inputs, layers = _enter(source, model, images, count, batch_size, start), []
    for (name, old), (_, new) in list(zip(blocks(source), blocks(model), strict=True))[start:]:
        item = attention.get(f'{name}.')
        if item:
            radius, lost = _fit_attention(inputs, old, item)
            _fit_next(inputs, name, old, new)
        output = inputs.advance(name, None if item else old, new)
        if item:
            layers.append(FittedLayer(name, item.value_dim, radius, lost, output))
            advanced(layers[-1])
    return layers


def _enter(
        source: nn.Module, model: GeoPriorResNet, images: Iterable[Tensor], count: int, batch_size: int, start: int,
) -> _Inputs:
    """Run the images up to the first block that has attention; before it both networks are the same."""
    device = next(model.parameters()).device
    inputs = None
    for batch, part in enumerate(images):
        if inputs is None:
            size = (part.shape[1], part.shape[2], part.shape[3])
            inputs = _Inputs(device, count, batch_size * activation_bytes(model, size) // 4)
        x = part.to(device).contiguous(memory_format=torch.channels_last)
        x = model.maxpool(model.act1(model.bn1(model.conv1(x))))
        for _, block in blocks(model)[:start]:
            x = block(x)
        for kept in (inputs.source, inputs.model):
            kept.write(batch, x, 'the input of the first attention layer')
    if inputs is None:
        raise GeoPriorError('There must be images to fit to, got none. Name a folder that has some.')
    return inputs


# -- one block ---------------------------------------------------------------------------------------------------------

def _before(block: Block, x: Tensor) -> Tensor:
    """The input of the 3x3 layer."""
    maps: Tensor = block.act1(block.bn1(block.conv1(x)))
    return maps


def _after(block: Block, x: Tensor) -> Tensor:
    """The input of the 1x1 convolution after the 3x3 layer."""
    maps: Tensor = block.aa(block.act2(block.bn2(block.conv2(_before(block, x)))))
    return maps


def _shortcut(block: Block, x: Tensor) -> Tensor:
    maps: Tensor = x if block.downsample is None else block.downsample(x)
    return maps


def _rows(maps: Tensor) -> Tensor:
    """Maps (N, C, H, W) as samples, (N H W, C)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in eval mode, float64."""
    scale: Tensor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - scale * norm.running_mean.double()


def _fit_attention(inputs: _Inputs, old: Block, item: AttentionBlock) -> tuple[float, float]:
    """Choose a block's radius and channels and fit the value projection; returns the radius and the share missed."""
    layer, following = layer_models(item, old.state_dict())
    importance = following.next_weight.square().sum(0).to(inputs.device)
    radii, fits = _candidates(inputs, old, item, layer, importance)
    errors, energy = _errors(inputs, old, item, radii, fits)
    best = (errors * importance).topk(item.value_dim, dim=1, largest=False)
    place = int(best.values.sum(1).argmin())
    channels = best.indices[place].sort().values
    weight, constant = (tensor[channels].cpu() for tensor in fits[place])
    missed = best.values[place].sum() / (energy * importance)[channels].sum().clamp(min=1e-30)
    channels = channels.cpu()
    correction = correct(layer, following, channels, weight, torch.tensor(radii[place:place + 1], dtype=torch.float64))
    fit = LayerFit(channels, (radii[place],), weight, -constant, errors[place].cpu()[channels], *correction)
    new = item.block.state_dict()
    for name, tensor in apply_fit(old.state_dict(), fit).items():
        new[name].copy_(tensor)
    return radii[place], float(missed)


def _mixed(attn: GeoPriorAttn2d, x: Tensor, radius: float) -> Tensor:
    """The attention with a radius over the input of the 3x3 layer, as samples."""
    return _rows(mix_values(x, x.new_tensor([math.log(radius)]), attn.stride, attn.dilation, attn.kernel))


def _candidates(
        inputs: _Inputs, old: Block, item: AttentionBlock, layer: LayerModel, importance: Tensor,
) -> tuple[list[float], list[tuple[Tensor, Tensor]]]:
    """Radii around the closed form's, and for each of them weights and constants for all 3x3 channels."""
    center = float(item.attn.log_radius.double().mean().exp())
    radii = [max(center * ratio, SMALLEST_RADIUS) for ratio in RADII]
    moments = [Moments(PARTS, old.conv2.in_channels, old.conv2.out_channels, inputs.device) for _ in radii]
    for batch, x, y in inputs:
        wanted, given = _rows(old.conv2(_before(old, x))), _before(item.block, y)
        for radius, sums in zip(radii, moments, strict=True):
            sums.add(batch % PARTS, _mixed(item.attn, given, radius), wanted)
    priors = [layer.values(torch.arange(len(old.conv2.weight)), radius).to(inputs.device) for radius in radii]
    scale, _ = _affine(old.bn2)
    middle = len(radii) // 2
    penalty = choose_penalty(moments[middle], priors[middle], importance * scale.square())
    return radii, [solve(sums, prior, penalty) for sums, prior in zip(moments, priors, strict=True)]


def _errors(
        inputs: _Inputs, old: Block, item: AttentionBlock, radii: list[float], fits: list[tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Squared error after norm and activation for each radius and channel, and the energy of each channel."""
    scale, shift = _affine(old.bn2)
    errors = torch.zeros(len(radii), len(scale), dtype=torch.float64, device=inputs.device)
    energy = torch.zeros_like(errors[0])
    # the norm is folded into the weights
    scaled = [((weight * scale[:, None]).T.float(), (constant * scale + shift).float()) for weight, constant in fits]
    for _, x, y in inputs:
        wanted = old.act2(old.bn2(old.conv2(_before(old, x))))
        wanted, given = _rows(wanted), _before(item.block, y)
        energy += wanted.square().sum(0, dtype=torch.float64)
        for error, radius, (weight, constant) in zip(errors, radii, scaled, strict=True):
            got = old.act2(torch.addmm(constant, _mixed(item.attn, given, radius), weight))
            error += (got - wanted).square().sum(0, dtype=torch.float64)
    return errors, energy


def _fit_next(inputs: _Inputs, name: str, old: Block, new: Block) -> None:
    """Fit the 1x1 convolution after the 3x3 layer to the source block's output minus the new block's shortcut.

    The source's outputs, which are computed on the way, replace its inputs.
    """
    sums = Moments(PARTS, new.conv3.in_channels, new.conv3.out_channels, inputs.device)
    for batch, x, y in inputs:
        whole = old.bn3(old.conv3(_after(old, x))) + _shortcut(old, x)
        sums.add(batch % PARTS, _rows(_after(new, y)), _rows(whole - _shortcut(new, y)))
        inputs.source.write(batch, old.act3(whole), f'the output of {name}')
    scale, _ = _affine(old.bn3)
    prior = new.conv3.weight.double().flatten(1) * scale[:, None]
    penalty = choose_penalty(sums, prior, torch.ones_like(scale))
    weight, constant = solve(sums, prior, penalty)
    alive = scale.abs() > 1e-3 * scale.abs().max()  # a norm with a scale near zero cannot be inverted
    weight = weight[alive] / scale[alive, None]
    new.conv3.weight[alive] = weight[:, :, None, None].float()
    new.bn3.running_mean[alive] = ((old.bn3.bias - constant) / scale)[alive].float()
