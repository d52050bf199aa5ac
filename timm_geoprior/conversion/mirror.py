"""Which of timm's ResNets have a GeoPrior counterpart, and how it is built.

A network is identified by its modules, not by its name. Whether timm made it by name, from a Hub repository or with
options, the plain network built from what was found must have the same modules, one by one.
"""
import functools
import re
from dataclasses import dataclass, field
from typing import Any, cast

import timm
import torch
from timm.layers import BlurPool2d, get_act_layer
from timm.models import Bottleneck, ResNet
from torch import nn

from ..errors import GeoPriorError
from ..geoprior_resnet import GeoPriorBottleneck, GeoPriorResNet
from ..layers import GeoPriorConv2d

SHARES = (0.0, 1 / 16, 3 / 32, 7 / 64)  # of each stage's 3x3 channels: 8, 24 and 56 of 128, 256 and 512
ARCHITECTURES = ('geoprior_resnet50', 'geoprior_resnet101', 'geoprior_resnet152', 'geoprior_resnet14_nano')
STAGES = ('layer1', 'layer2', 'layer3', 'layer4')
BLOCKS = (Bottleneck, GeoPriorBottleneck)


@dataclass(frozen=True)
class Mirror:
    """How timm builds the GeoPrior ResNet that has a network's shape."""
    architecture: str  # registered name, such as 'geoprior_resnet50'
    # further options, as in config.json; empty if the architecture has the network's shape without any
    model_args: dict[str, Any] = field(default_factory=dict)
    num_classes: int = 1000
    in_chans: int = 3
    global_pool: str = 'avg'  # timm's name for the pooling

    def create(self, **kwargs: Any) -> GeoPriorResNet:
        """Build the network with random weights; `kwargs` go to `timm.create_model` and override these options."""
        options = {**self.model_args, 'num_classes': self.num_classes, 'in_chans': self.in_chans,
                   'global_pool': self.global_pool, **kwargs}
        return cast(GeoPriorResNet, timm.create_model(self.architecture, **options))


def blocks(model: nn.Module) -> list[tuple[str, Bottleneck]]:
    """The residual blocks of a ResNet with their names, front to back."""
    return [(f'{stage}.{index}', block) for stage in STAGES for index, block in enumerate(getattr(model, stage))]


def value_dim(block: nn.Module) -> int:
    """Number of a block's 3x3 channels that attention computes."""
    conv = block.conv2
    return conv.attn.value.out_channels if isinstance(conv, GeoPriorConv2d) else 0


def value_channels(width: int, share: float) -> int:
    """Value channels of a 3x3 layer.

    Args:
        width: The layer's output channels.
        share: Share of them that become value channels.

    Returns:
        The multiple of 8 nearest to that share, at least 8; 0 for a share of 0, or where 8 would be more than half.
    """
    return max(8 * round(width * share / 8), 8) if share and width >= 16 else 0


def mirror(source: nn.Module, name: str = 'The network') -> Mirror:
    """Find the GeoPrior ResNet that has a network's shape.

    The architecture is the registered one that needs the fewest further options. If it needs none, the numbers of
    value channels are its own; otherwise `value_channels` gives them for the large models' shares.

    Args:
        source: A timm ResNet of bottleneck blocks with plain 3x3 convolutions.
        name: What to call it in messages.

    Returns:
        What to build.

    Raises:
        GeoPriorError: It is another kind of network; the message names the part that has no GeoPrior counterpart.

    Examples:
        >>> with torch.device('meta'):
        ...     mirror(timm.create_model('wide_resnet50_2')).model_args
        {'base_width': 128, 'value_dims': [0, 16, 48, 112]}
    """
    _check_kind(source, name)
    network = cast(Any, source)
    found = {'num_classes': network.num_classes, 'in_chans': network.in_chans,
             'global_pool': network.global_pool.pool_type or ''}
    shape = _describe(source, name)
    options = {architecture: _options(shape, architecture) for architecture in ARCHITECTURES}
    architecture = min(options, key=lambda key: len(options[key]))
    made = Mirror(architecture, options[architecture], **found)
    _check_same(source, made, name)
    if not any(made.model_args.get('value_dims', SHARES)):
        raise GeoPriorError(f'{name} must have 3x3 layers of 16 channels or more after its first stage, got narrower '
                            f'ones. Use another source, such as resnet50.')
    return made


def _check_kind(source: nn.Module, name: str) -> None:
    if not isinstance(source, ResNet):
        raise GeoPriorError(f'{name} must be a ResNet of timm, got a {type(source).__name__}. '
                            f'Use one such as resnet50, resnet50d or wide_resnet50_2.')
    if empty := [stage for stage in STAGES if not len(getattr(source, stage, ()))]:
        raise GeoPriorError(f'{name} must have blocks in each of four stages, got none in {empty[0]}. '
                            f'Use another source, such as resnet50.')
    for place, block in blocks(source):
        if isinstance(getattr(block, 'conv2', None), GeoPriorConv2d):
            raise GeoPriorError(f'{name} must be a plain ResNet, got a GeoPrior ResNet ({place} has attention '
                                f'already). Use it as it is.')
        reason = _obstacle(block)
        if reason:
            raise GeoPriorError(f'{name} must be a ResNet of bottleneck blocks with plain 3x3 convolutions and batch '
                                f'norms, got {reason} in {place}. Use another source, such as resnet50.')


def _obstacle(block: nn.Module) -> str:
    """The part of a block that has no counterpart, in words; '' if every part has one."""
    if type(block) not in BLOCKS:
        return {'BasicBlock': 'a basic block'}.get(type(block).__name__, f'a {type(block).__name__}')
    block = cast(Bottleneck, block)
    if block.conv2.groups != 1:
        return f'a convolution of {block.conv2.groups} groups'
    if block.se is not None:
        return f'channel attention ({type(block.se).__name__})'
    others = [norm for norm in (block.bn1, block.bn2, block.bn3) if not isinstance(norm, nn.BatchNorm2d)]
    return f'a {type(others[0]).__name__}' if others else ''


def _describe(model: Any, name: str) -> dict[str, Any]:
    """The options of timm's ResNet that a network was built with, as JSON types."""
    stages = [getattr(model, stage) for stage in STAGES]
    first = stages[0][0]
    channels = [stage[0].conv3.out_channels // 4 for stage in stages]
    # timm's width is floor(channels * base_width / 64): the widest stage is affected least by the rounding
    base_width = 64 * stages[-1][0].bn2.num_features / channels[-1]
    shape = {
        'layers': [len(stage) for stage in stages],
        'channels': channels,
        'base_width': int(base_width) if base_width == int(base_width) else base_width,
        'block_reduce_first': first.bn2.num_features // first.conv1.out_channels,
        'act_layer': _act_name(first.act1, name),
        'aa_layer': _aa_name(stages, name),
        'output_stride': 32 // stages[-1][-1].dilation,
        'replace_stem_pool': isinstance(model.maxpool, nn.Sequential) and isinstance(model.maxpool[0], nn.Conv2d),
        **_stem(model.conv1), **_shortcut(stages),
    }
    values = [value_dim(stage[0]) for stage in stages]
    return {**shape, 'value_dims': values} if any(values) else shape


def _stem(conv: nn.Module) -> dict[str, Any]:
    if not isinstance(conv, nn.Sequential):
        return {'stem_type': '', 'stem_width': 64}
    first, second = (cast(nn.Conv2d, conv[place]).out_channels for place in (0, 3))
    return {'stem_type': 'deep' if first == second else 'deep_tiered', 'stem_width': second}


def _shortcut(stages: list[Any]) -> dict[str, Any]:
    """How shortcuts change the number of channels, from stages 2 to 4: stage 1 has 1x1 kernels in any case."""
    found = [stage[0].downsample for stage in stages[1:] if stage[0].downsample is not None]
    pooled = bool(found) and len(found[0]) == 3
    size = 1 if pooled or not found else max(shortcut[0].kernel_size[0] for shortcut in found)
    return {'avg_down': pooled, 'down_kernel_size': size}


def _act_name(act: nn.Module, name: str) -> str:
    """timm's name for an activation: its class name in lower case, with or without underscores."""
    words = re.sub(r'(?<=[A-Za-z])(?=[A-Z][a-z])', '_', type(act).__name__).lower()
    for known in (words, words.replace('_', '')):
        try:
            if get_act_layer(known) is type(act):
                return known
        except KeyError:
            continue
    raise GeoPriorError(f'{name} must have an activation that timm knows by name, got {type(act).__name__}. '
                        f'Use another source, such as resnet50.')


def _aa_name(stages: list[Any], name: str) -> str | None:
    layers = {type(block.aa) for stage in stages for block in stage if not isinstance(block.aa, nn.Identity)}
    names = {nn.AvgPool2d: 'avg', BlurPool2d: 'blur'}
    if len(layers) > 1 or layers - names.keys():
        raise GeoPriorError(f'{name} must be smoothed by average or blur pooling, got '
                            f'{", ".join(sorted(layer.__name__ for layer in layers))}. Use another source.')
    return names[layers.pop()] if layers else None


@functools.cache
def _shape(architecture: str) -> dict[str, Any]:
    with torch.device('meta'):
        return _describe(timm.create_model(architecture), architecture)


def _options(shape: dict[str, Any], architecture: str) -> dict[str, Any]:
    """The options by which a shape differs from an architecture's, and if there are any, the value channels to use."""
    own = _shape(architecture)
    options = {key: value for key, value in shape.items() if value != own[key]}
    widths = [int(channels * shape['base_width'] / 64) for channels in shape['channels']]
    dims = [value_channels(width, share) for width, share in zip(widths, SHARES, strict=True)]
    return {**options, 'value_dims': dims} if options and dims != own['value_dims'] else options


def _check_same(source: nn.Module, made: Mirror, name: str) -> None:
    """Check that the plain network with these options has the source's modules, one by one."""
    with torch.device('meta'):
        plain = made.create(value_dims=(0, 0, 0, 0))
    got, expected = _leaves(source), _leaves(plain)
    for place in [*got, *expected]:
        if got.get(place) != expected.get(place):
            raise GeoPriorError(f"{name} must be built as timm's ResNet builds its networks, got {place} = "
                                f'{got.get(place)} where the mirror has {expected.get(place)}. Use another source.')


def _leaves(model: nn.Module) -> dict[str, str]:
    """The modules without children, as text, except those that act in training only (drop path)."""
    return {name: repr(module) for name, module in model.named_modules()
            if not list(module.children()) and not name.endswith(('drop_path', 'drop_block'))}
