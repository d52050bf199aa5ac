"""GeoPrior ResNets: some channels of the 3x3 layers come from self-attention with a modeled map.

Tan, Nguyen, Dax, Niessner, Brox: *Explicitly Modeled Attention Maps for Image Classification*, AAAI 2021,
arXiv 2006.07872. The authors published no code. The kernel, the learned radius and the placement of the attention are
from the paper. The numbers of value channels are reconstructed from the two cost figures in its abstract.
"""
from functools import partial
from typing import Any

import torch
from timm.layers import BlurPool2d
from timm.models import Bottleneck, ResNet, generate_default_cfgs, register_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

from .conversion.state_dict import checkpoint_filter_fn, convert_state_dict, is_plain_resnet
from .layers import GeoPriorAttn2d, GeoPriorConv2d, KernelType
from .pretrained.cfgs import pretrained_cfgs
from .pretrained.loading import build_with_verified_weights

__all__ = ['GeoPriorBottleneck', 'GeoPriorResNet']


# by exact type: a subclass may do more, such as the activation of timm's BatchNormAct2d
FOLDABLE_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)


def _is_bare(conv: nn.Module) -> bool:
    """Whether a convolution applies its weight and nothing else.

    Subclasses, adapters around a convolution and parametrized, pruned, quantized or distributed weights do more.
    """
    return type(conv) is nn.Conv2d and type(conv.weight) is nn.Parameter


def _fold_channels(norm: Any, channels: slice, conv: nn.Conv2d) -> None:
    dtype = torch.promote_types(conv.weight.dtype, torch.float32)
    mean, var = (tensor[channels].to(dtype) for tensor in (norm.running_mean, norm.running_var))
    scale, shift = (None if tensor is None else tensor[channels].to(dtype) for tensor in (norm.weight, norm.bias))
    bias = None if conv.bias is None else conv.bias.to(dtype)
    fused = fuse_conv_bn_weights(conv.weight.to(dtype), bias, mean, var, norm.eps, scale, shift)
    conv.weight, conv.bias = (nn.Parameter(t.to(conv.weight.dtype), conv.weight.requires_grad) for t in fused)


@torch.no_grad()
def _fold(norm: nn.Module, *convs: nn.Module) -> nn.Module:
    """Fold a batch norm into the convolutions that it follows.

    Args:
        norm: The norm, over the concatenated outputs of the convolutions.
        *convs: The convolutions, in the order of their channels.

    Returns:
        What takes the place of the norm: an identity, or the norm itself if it cannot be folded.
    """
    if type(norm) not in FOLDABLE_NORMS or norm.running_mean is None or not all(map(_is_bare, convs)):
        return norm
    start = 0
    for conv in convs:
        assert isinstance(conv, nn.Conv2d)
        end = start + conv.weight.shape[0]
        _fold_channels(norm, slice(start, end), conv)
        start = end
    return nn.Identity()


class GeoPriorBottleneck(Bottleneck):
    """timm's Bottleneck, with a GeoPriorConv2d in place of its 3x3 convolution if the stage has value channels."""

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
            *args: Arguments of timm's Bottleneck.
            value_dim: Number of channels of the 3x3 layer that the attention computes; 0 keeps the plain convolution.
            attn_heads: Number of radii.
            attn_radius: Initial radius, in cells of the layer's input.
            attn_kernel: 'gaussian' or 'laplacian'.
            **kwargs: Arguments of timm's Bottleneck.

        Raises:
            ValueError: If GeoPriorConv2d rejects an option.
        """
        super().__init__(*args, **kwargs)
        if value_dim:
            plain = self.conv2  # the stride is 1 where an aa_layer strides instead
            self.conv2 = GeoPriorConv2d(  # type: ignore[assignment]
                plain.in_channels, plain.out_channels, value_dim, plain.stride[0], plain.dilation[0],
                attn_heads, attn_radius, attn_kernel, device=plain.weight.device, dtype=plain.weight.dtype)

    def reparameterize(self) -> None:
        """Fold the batch norms into the convolutions, for inference; `timm.utils.reparameterize_model` calls it.

        Outputs are those of eval mode, up to rounding. Norms and convolutions of other types stay as they are.
        """
        self.bn1 = _fold(self.bn1, self.conv1)
        conv2: Any = self.conv2
        if type(conv2) is GeoPriorConv2d and type(conv2.attn) is GeoPriorAttn2d:
            # the attention's weights sum to one, so a scale and shift of its outputs can be applied to its values
            self.bn2 = _fold(self.bn2, conv2.conv, conv2.attn.value)
        else:
            self.bn2 = _fold(self.bn2, conv2)
        self.bn3 = _fold(self.bn3, self.conv3)
        if isinstance(self.downsample, nn.Sequential):  # [pool,] conv, norm
            self.downsample[-1] = _fold(self.downsample[-1], self.downsample[-2])


class _StageBlock(partial[GeoPriorBottleneck]):
    """A block class with arguments for one stage. timm passes `block_args` to the blocks of all stages."""

    expansion = GeoPriorBottleneck.expansion


def _check_stages(**stages: tuple[int, ...]) -> None:
    for name, values in stages.items():
        if not isinstance(values, (tuple, list)) or len(values) != 4:
            raise ValueError(f'{name} must be four numbers (one per stage), got {values}.')
    if min(stages['value_dims']) < 0:
        raise ValueError(f'value_dims must not be negative, got {stages["value_dims"]}.')


def _aa_class(name: str) -> type[nn.Module]:
    layers: dict[str, type[nn.Module]] = {'avg': nn.AvgPool2d, 'blur': BlurPool2d}
    if name not in layers:
        raise ValueError(f"aa_layer must be 'avg' or 'blur', got {name!r}. Change aa_layer.")
    return layers[name]


class GeoPriorResNet(ResNet):
    """timm's ResNet, made of GeoPriorBottlenecks.

    It also loads the weights of the plain ResNet of the same depth and options: `load_state_dict`, timm's
    `checkpoint_path` and `pretrained` convert them in closed form (`timm_geoprior.conversion`), or raise a
    `ConversionError` (a RuntimeError) that says what does not fit.

    Examples:
        >>> model = GeoPriorResNet((3, 4, 6, 3), value_dims=(0, 8, 24, 56), num_classes=10)
        >>> model(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(
            self,
            layers: tuple[int, ...],
            value_dims: tuple[int, ...] = (0, 8, 24, 56),
            attn_heads: int = 1,
            attn_radius: float = 3.0,
            attn_kernel: KernelType = 'gaussian',
            channels: tuple[int, ...] = (64, 128, 256, 512),
            cardinality: int = 1,
            aa_layer: type[nn.Module] | str | None = None,
            **kwargs: Any,
    ) -> None:
        """
        Args:
            layers: Number of blocks in each of the four stages.
            value_dims: Number of value channels in each stage; 0 makes a plain ResNet stage.
            attn_heads: Number of radii per attention layer.
            attn_radius: Initial radius, in cells of the layer's input.
            attn_kernel: 'gaussian' or 'laplacian'.
            channels: Width of the 3x3 layers in each stage, a quarter of the stage's output channels.
            cardinality: Must be 1.
            aa_layer: Anti-aliasing layer, as in timm: a class, or the name 'avg' or 'blur'.
            **kwargs: Other arguments of timm's ResNet.

        Raises:
            ValueError: If `cardinality` is not 1, `block` is given, the number of stages is not four, or GeoPriorConv2d
                rejects an option.
        """
        if cardinality != 1:
            raise ValueError(f'cardinality must be 1 (GeoPrior layers have no groups), got {cardinality}.')
        if 'block' in kwargs:
            raise ValueError(f'block must not be given (it is GeoPriorBottleneck), got {kwargs["block"]}.')
        _check_stages(layers=layers, value_dims=value_dims, channels=channels)
        attn: dict[str, Any] = {'attn_heads': attn_heads, 'attn_radius': attn_radius, 'attn_kernel': attn_kernel}
        blocks = tuple(_StageBlock(GeoPriorBottleneck, value_dim=value_dim, **attn) for value_dim in value_dims)
        if isinstance(aa_layer, str):  # as in a config.json; timm's stem takes only classes
            aa_layer = _aa_class(aa_layer)
        super().__init__(blocks, layers, channels=channels, aa_layer=aa_layer, **kwargs)  # type: ignore[arg-type]

    def init_weights(self, zero_init_last: bool = True) -> None:
        """Initialize all parameters and buffers, also after `to_empty`.

        The weights are drawn as in timm's ResNet, and those of the attention by `GeoPriorAttn2d.reset_parameters`.

        Args:
            zero_init_last: Zero-initialize the last norm of each residual branch.
        """
        for module in self.modules():
            reset = getattr(module, 'reset_parameters', None)
            # timm's init_weights draws only the weights of convolutions
            if reset and not (isinstance(module, nn.Conv2d) and module.bias is None):
                reset()
        super().init_weights(zero_init_last=zero_init_last)
        for module in self.modules():
            if isinstance(module, GeoPriorAttn2d):
                module.reset_parameters()

    def _load_from_state_dict(
            self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
            missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str]) -> None:
        # timm calls its checkpoint filter only for `pretrained`
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        if is_plain_resnet(own, self):
            converted = convert_state_dict(own, self)  # if it raises, nothing has been loaded yet
            if local_metadata.get('assign_to_params_buffers'):  # takes the dtypes too, which a norm must not mix
                converted = {key: value.to(own.get(key, value).dtype) for key, value in converted.items()}
            for key in own:
                del state_dict[prefix + key]
            state_dict.update({prefix + key: value for key, value in converted.items()})
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


def _create_geoprior_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> GeoPriorResNet:
    return build_with_verified_weights(
        GeoPriorResNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


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
    """GeoPrior ResNet-14 for 64-pixel images: one narrow block per stage, with the stem and shortcuts of ResNet-D."""
    model_args = {
        'layers': (1, 1, 1, 1), 'channels': (32, 64, 112, 144), 'value_dims': (0, 8, 16, 24),
        'stem_type': 'deep', 'stem_width': 16, 'avg_down': True}
    return _create_geoprior_resnet('geoprior_resnet14_nano', pretrained, **dict(model_args, **kwargs))
