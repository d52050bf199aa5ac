"""GeoPrior ResNets: a share of each 3x3 convolution's channels comes from a modelled self-attention.

Tan, Nguyen, Dax, Niessner, Brox: *Explicitly Modeled Attention Maps for Image Classification*, AAAI 2021,
arXiv 2006.07872. The authors published no code. The kernel, the learned radius and the place of the attention are the
paper's; the numbers of value channels are reconstructed from the two cost figures of its abstract.
"""
from functools import partial
from typing import Any

import torch
from timm.models import Bottleneck, ResNet, generate_default_cfgs, register_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .hub import build_with_verified_weights, pretrained_cfgs
from .layers import GeoPriorAttn2d, GeoPriorConv2d, KernelType

__all__ = ['GeoPriorBottleneck', 'GeoPriorResNet']


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: nn.Module, last: int = 0) -> nn.Module:
    """Put a batch norm, or its last channels, into the convolution before it; what then stands in the norm's place."""
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or norm.running_var is None:
        return norm
    dtype = torch.promote_types(conv.weight.dtype, torch.float32)
    mean, var = norm.running_mean[-last:].to(dtype), norm.running_var[-last:].to(dtype)
    scale, shift, bias = (t if t is None else t[-last:].to(dtype) for t in (norm.weight, norm.bias, conv.bias))
    fused = fuse_conv_bn_weights(conv.weight.to(dtype), bias, mean, var, norm.eps, scale, shift)
    conv.weight, conv.bias = (
        nn.Parameter(t.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad) for t in fused)
    return nn.Identity()


class GeoPriorBottleneck(Bottleneck):
    """timm's Bottleneck with a GeoPriorConv2d for its 3x3 convolution where the stage has value channels."""

    def __init__(
            self,
            *args: Any,
            value_dim: int = 0,
            attn_heads: int = 1,
            attn_radius: float = 3.0,
            attn_kernel: KernelType = 'gaussian',
            **kwargs: Any,
    ) -> None:
        """
        Args:
            *args: As timm's Bottleneck.
            value_dim: Output channels of the 3x3 layer that come from the attention, 0 for the plain convolution.
            attn_heads: Number of radii.
            attn_radius: Initial radius, in cells of the layer's input grid.
            attn_kernel: 'gaussian' or 'laplacian'.
            **kwargs: As timm's Bottleneck.

        Raises:
            ValueError: What GeoPriorConv2d refuses.
        """
        super().__init__(*args, **kwargs)
        if value_dim:
            plain = self.conv2  # its own stride: an aa_layer leaves the stride to itself
            self.conv2 = GeoPriorConv2d(  # type: ignore[assignment]
                plain.in_channels, plain.out_channels, value_dim, plain.stride[0], plain.dilation[0],
                attn_heads, attn_radius, attn_kernel, device=plain.weight.device, dtype=plain.weight.dtype)

    def reparameterize(self) -> None:
        """Fold the batch norms into the convolutions, and merge the attention's projection into the 3x3, for inference.

        `timm.utils.reparameterize_model` calls it. The outputs are those of eval mode up to rounding.
        """
        self.bn1 = _fold(self.conv1, self.bn1)
        if isinstance(self.conv2, GeoPriorConv2d):
            self.conv2.reparameterize()
            if self.conv2.attn.stride > 1:  # its values pass the 3x3 by
                _fold(self.conv2.attn.value, self.bn2, last=self.conv2.value_dim)
            # the attention's weights sum to one: the shift of its values is that of its outputs
            self.bn2 = _fold(self.conv2.conv, self.bn2)
        else:
            self.bn2 = _fold(self.conv2, self.bn2)
        self.bn3 = _fold(self.conv3, self.bn3)
        if isinstance(self.downsample, nn.Sequential):  # a convolution and its norm, after a pooling or not
            conv = self.downsample[-2]
            assert isinstance(conv, nn.Conv2d)
            self.downsample[-1] = _fold(conv, self.downsample[-1])


class _StageBlock(partial[GeoPriorBottleneck]):
    """A block class with arguments of its stage's own: timm's `block_args` reach the blocks of every stage."""

    expansion = GeoPriorBottleneck.expansion


def _check_stages(**stages: tuple[int, ...]) -> None:
    for name, values in stages.items():
        if not isinstance(values, (tuple, list)) or len(values) != 4:
            raise ValueError(f'{name} is {values}, expected four numbers, one a stage: change {name}.')
    if min(stages['value_dims']) < 0:
        raise ValueError(f'value_dims is {stages["value_dims"]}, expected none below 0: change value_dims.')


class GeoPriorResNet(ResNet):
    """ResNet of GeoPriorBottlenecks; timm's ResNet in everything else."""

    def __init__(
            self,
            layers: tuple[int, ...],
            value_dims: tuple[int, ...] = (0, 8, 24, 56),
            attn_heads: int = 1,
            attn_radius: float = 3.0,
            attn_kernel: KernelType = 'gaussian',
            channels: tuple[int, ...] = (64, 128, 256, 512),
            cardinality: int = 1,
            **kwargs: Any,
    ) -> None:
        """
        Args:
            layers: Blocks of each of the four stages.
            value_dims: Value channels of each stage, 0 for a plain stage.
            attn_heads: Radii of each attention layer.
            attn_radius: Initial radius in cells of the layer's input grid.
            attn_kernel: 'gaussian' or 'laplacian'.
            channels: Width of each stage's 3x3 layers, a quarter of its output channels.
            cardinality: Only 1.
            **kwargs: The rest of timm's ResNet.

        Raises:
            ValueError: Options that the layer cannot honour: groups, another block, a wrong number of stages, or
                what GeoPriorConv2d refuses.
        """
        if cardinality != 1:
            raise ValueError(f'cardinality is {cardinality}, expected 1: a GeoPrior layer has no groups, leave it out.')
        if 'block' in kwargs:
            raise ValueError(f'block is {kwargs["block"]}, expected none: GeoPriorBottleneck it is, leave it out.')
        _check_stages(layers=layers, value_dims=value_dims, channels=channels)
        attn: dict[str, Any] = {'attn_heads': attn_heads, 'attn_radius': attn_radius, 'attn_kernel': attn_kernel}
        blocks = tuple(_StageBlock(GeoPriorBottleneck, value_dim=value_dim, **attn) for value_dim in value_dims)
        super().__init__(blocks, layers, channels=channels, **kwargs)  # type: ignore[arg-type]

    def init_weights(self, zero_init_last: bool = True) -> None:
        """Initialize everything, after `to_empty` too: as timm's ResNet, the attention by the scale of its whole layer.

        Args:
            zero_init_last: Zero-initialize the last norm of each residual branch.
        """
        for module in self.modules():
            reset = getattr(module, 'reset_parameters', None)
            # timm's own leaves out all but the weights of convolutions
            if reset and not (isinstance(module, nn.Conv2d) and module.bias is None):
                reset()
        super().init_weights(zero_init_last=zero_init_last)
        for module in self.modules():
            if isinstance(module, GeoPriorAttn2d):
                module.reset_parameters()


def _create_geoprior_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> GeoPriorResNet:
    return build_with_verified_weights(GeoPriorResNet, variant, pretrained, **kwargs)


default_cfgs = generate_default_cfgs(pretrained_cfgs())


@register_model
def geoprior_resnet50(pretrained: bool = False, **kwargs: Any) -> GeoPriorResNet:
    """GeoPrior ResNet-50."""
    return _create_geoprior_resnet('geoprior_resnet50', pretrained, **dict({'layers': (3, 4, 6, 3)}, **kwargs))


@register_model
def geoprior_resnet101(pretrained: bool = False, **kwargs: Any) -> GeoPriorResNet:
    """GeoPrior ResNet-101."""
    return _create_geoprior_resnet('geoprior_resnet101', pretrained, **dict({'layers': (3, 4, 23, 3)}, **kwargs))


@register_model
def geoprior_resnet152(pretrained: bool = False, **kwargs: Any) -> GeoPriorResNet:
    """GeoPrior ResNet-152."""
    return _create_geoprior_resnet('geoprior_resnet152', pretrained, **dict({'layers': (3, 8, 36, 3)}, **kwargs))


@register_model
def geoprior_resnet14_nano(pretrained: bool = False, **kwargs: Any) -> GeoPriorResNet:
    """GeoPrior ResNet-14 for images of 64 pixels: one narrow block a stage, ResNet-D's stem and shortcuts."""
    model_args = {
        'layers': (1, 1, 1, 1), 'channels': (32, 64, 112, 144), 'value_dims': (0, 8, 16, 24),
        'stem_type': 'deep', 'stem_width': 16, 'avg_down': True}
    return _create_geoprior_resnet('geoprior_resnet14_nano', pretrained, **dict(model_args, **kwargs))
