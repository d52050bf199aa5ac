"""Conversion of a trained ResNet's state dict to a GeoPrior ResNet's, wherever timm or torch loads one."""
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ..errors import GeoPriorError
from ..layers import GeoPriorAttn2d, GeoPriorConv2d
from .closed_form import FollowingLayers, InputModel, LayerFit, LayerModel, fit_layer

_logger = logging.getLogger(__name__)

IMAGE_SIZE = (3, 224, 224)  # for a model without a pretrained_cfg
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# the weights of a block that are read; all others stay as they are
_NORMS = ('bn2.weight', 'bn2.bias', 'bn2.running_mean', 'bn2.running_var')
_READ = ('conv1.weight', 'bn1.weight', 'bn1.bias', 'conv2.weight', *_NORMS, 'conv3.weight', 'bn3.weight',
         'bn3.running_mean', 'bn3.running_var')


_ADVICE = 'Use the weights of a ResNet with the same depth and options.'


class ConversionError(GeoPriorError):
    """A state dict cannot be converted for, or loaded into, a GeoPrior ResNet."""


@dataclass(frozen=True)
class AttentionBlock:
    """A bottleneck whose 3x3 layer has attention channels, and its place in the network."""
    prefix: str  # what the names of its weights begin with, such as 'layer2.0.'
    block: Any  # the bottleneck
    # height and width of the 3x3 layer's input in cells, at the input size of the model's pretrained_cfg
    map_size: tuple[int, int]
    # the 3x3 layer's stride. Map and stride are those of the network without `output_stride`, so that the weights do
    # not depend on it
    stride: int

    @property
    def attn(self) -> GeoPriorAttn2d:
        """The attention next to the 3x3 convolution."""
        attn: GeoPriorAttn2d = self.block.conv2.attn
        return attn

    @property
    def value_dim(self) -> int:
        """Channels of the attention."""
        return self.attn.value.out_channels


def attention_blocks(model: nn.Module) -> Iterator[AttentionBlock]:
    """The bottlenecks of a GeoPriorResNet that have attention channels, in order."""
    _, height, width = (getattr(model, 'pretrained_cfg', None) or {}).get('input_size') or IMAGE_SIZE
    for stage in range(1, 5):
        # a user may have removed or replaced stages and blocks
        for index, block in enumerate((getattr(model, f'layer{stage}', None) or nn.Identity()).children()):
            if not isinstance(getattr(block, 'conv2', None), GeoPriorConv2d):
                continue
            halves = stage > 1 and index == 0
            cell = 2 ** (stage if halves else stage + 1)
            # an aa_layer takes over the stride of the convolution
            stride = 2 if halves and isinstance(getattr(block, 'aa', nn.Identity()), nn.Identity) else 1
            yield AttentionBlock(f'layer{stage}.{index}.', block, (-(-height // cell), -(-width // cell)), stride)


def is_plain_resnet(state_dict: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether a state dict has a plain 3x3 convolution where the GeoPriorResNet has attention, and no attention."""
    blocks = [item.prefix for item in attention_blocks(model)]
    return (any(f'{prefix}conv2.weight' in state_dict for prefix in blocks)
            and not any(key.startswith(f'{prefix}conv2.attn.') for key in state_dict for prefix in blocks))


_Arguments = ParamSpec('_Arguments')
_Result = TypeVar('_Result')
_LOCK = threading.Lock()


def on_one_thread(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Run on a single torch thread, on the CPU and without gradients, whatever the caller has set.

    Sums are then computed in the same order for any number of threads. One thread converts ResNet-152 in 1.5 s; two
    took 28 s while another process was running, because they wait for each other at each of many small products.
    """
    def single(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.device('cpu'), torch.no_grad():
                return function(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    @functools.wraps(function)
    def alone(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        # a new thread sees the process's number of threads, not the caller's; one conversion at a time, since the
        # second of two would read the first one's 1, and restore that
        with _LOCK, ThreadPoolExecutor(1) as thread:
            return thread.submit(single, *args, **kwargs).result()

    return alone


@on_one_thread
def convert_state_dict(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Turn the state dict of a plain ResNet into that of a GeoPrior ResNet, in closed form.

    The formulas are in `timm_geoprior.conversion.closed_form`. The replaced channels of each 3x3 layer move after the
    others, in its rows, in its norm and in the columns of the next 1x1 convolution.

    Args:
        state_dict: Weights of the ResNet that the model is made from; only the blocks that have attention in the model
            are read. It is not changed.
        model: The GeoPriorResNet that is to load them. Only its structure and its pretrained_cfg are read.

    Returns:
        Name -> tensor on the source's device: matrices in the source's dtype, vectors in at least float32.

    Raises:
        ConversionError: A weight of these blocks is missing, has the wrong shape, or is not finite.

    Examples:
        >>> source = timm.create_model('resnet50', pretrained=True)
        >>> model = timm.create_model('geoprior_resnet50', num_classes=1000)
        >>> model.load_state_dict(convert_state_dict(source.state_dict(), model))
        <All keys matched successfully>
    """
    converted, shapes = dict(state_dict), _plain_shapes(model)
    for item in attention_blocks(model):
        _check_block(item, shapes)
        _check_tensors(state_dict, {item.prefix + name: shapes[item.prefix + name] for name in _READ})
    fits = []
    for item, block, fit in fit_blocks(state_dict, model):
        fits.append(fit)
        changed = apply_fit(block, fit)
        for name, tensor in changed.items():
            if not torch.isfinite(tensor).all():
                raise ConversionError(f'Converted weights must be finite in {tensor.dtype}, got inf in '
                                      f'{item.prefix}{name}. Convert the weights as torch.float64.')
        del converted[f'{item.prefix}conv2.weight']
        converted.update({item.prefix + name: tensor for name, tensor in changed.items()})
    if fits:
        channels, radii = sum(len(fit.channels) for fit in fits), [radius for fit in fits for radius in fit.radii]
        _logger.info(
            f'Converted the weights of a plain ResNet in closed form: {channels} channels of {len(fits)} layers became '
            f'attention, with radii from {min(radii):.2f} to {max(radii):.2f} cells.')
    return converted


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert a plain ResNet's state dict while timm loads it, and leave a GeoPrior one as it is.

    This is timm's `pretrained_filter_fn`. With another number of classes timm loads what fits and silently skips the
    rest, so this checks every name and shape of a plain ResNet's weights, and that a GeoPrior ResNet's have all of the
    3x3 layers. Only the classifier and the first convolution's input channels may differ: timm adapts them itself.

    Args:
        state_dict: The weights that timm has read.
        model: The GeoPriorResNet that is to load it.

    Returns:
        The model's state dict.

    Raises:
        ConversionError: The weights are of neither, or of a different ResNet.
    """
    if not any(True for _ in attention_blocks(model)) or any('.conv2.attn.' in key for key in state_dict):
        if missing := [key for key in model.state_dict() if '.conv2.' in key and key not in state_dict]:
            raise ConversionError(f'Weights must have the 3x3 layers of the network, got none for {missing[0]}. Build '
                                  f'it with the options of the weights, such as value_dims.')
        return state_dict
    classifier = (getattr(model, 'pretrained_cfg', None) or {}).get('classifier') or 'fc'
    shapes = {**_plain_shapes(model), f'{classifier}.weight': (None, None), f'{classifier}.bias': (None,)}
    for key in state_dict:
        if key not in shapes:
            raise ConversionError(
                f'Weights to be converted must be those of a plain ResNet, got {key} among them. {_ADVICE}')
    _check_tensors(state_dict, {
        key: shape for key, shape in shapes.items()
        if not key.endswith('.num_batches_tracked') and (key in state_dict or not key.startswith(f'{classifier}.'))})
    return convert_state_dict(state_dict, model)


def _plain_shapes(model: nn.Module) -> dict[str, tuple[int | None, ...]]:
    """Names and shapes of the plain ResNet's weights; None where timm adapts a size itself."""
    shapes: dict[str, tuple[int | None, ...]] = {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for item in attention_blocks(model):
        for name in ('conv2.conv.weight', 'conv2.attn.value.weight', 'conv2.attn.log_radius'):
            shapes.pop(item.prefix + name, None)
        conv = item.block.conv2.conv
        shapes[f'{item.prefix}conv2.weight'] = (conv.out_channels + item.value_dim, conv.in_channels, 3, 3)
    first = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    out_channels, _, *kernel = shapes[f'{first}.weight']
    return {**shapes, f'{first}.weight': (out_channels, None, *kernel)}


def _check_block(item: AttentionBlock, shapes: Mapping[str, object]) -> None:
    """Check that the block has the weights to load: norms may be of another kind, or folded into convolutions."""
    for name in _READ:
        if item.prefix + name not in shapes:
            raise ConversionError(f'A network that loads a plain ResNet must have batch norms with weights and '
                                  f'statistics, got none in {item.prefix}{name}. Create it again and load into that.')
    for act in (item.block.act1, item.block.act2):
        if any(True for _ in act.parameters()):
            raise ConversionError(f'A network that loads a plain ResNet must have activations without weights, got '
                                  f'{type(act).__name__} in {item.prefix.rstrip(".")}. Use another act_layer.')


def _check_tensors(state_dict: Mapping[str, Any], shapes: Mapping[str, tuple[int | None, ...]]) -> None:
    for key, shape in shapes.items():
        tensor = state_dict.get(key)
        if not isinstance(tensor, Tensor):
            got = 'none' if tensor is None else type(tensor).__name__
            raise ConversionError(f'Weights to be converted must hold a tensor {key}, got {got}. {_ADVICE}')
        if len(tensor.shape) != len(shape) or any(
                expected not in (None, size) for size, expected in zip(tensor.shape, shape, strict=True)):
            expected_shape = ' x '.join('any' if size is None else str(size) for size in shape)
            raise ConversionError(
                f'Weights to be converted must have {key} of the shape {expected_shape}, got '
                f'{" x ".join(map(str, tensor.shape))}. {_ADVICE}')
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.is_meta:
            raise ConversionError(f'Weights to be converted must be dense, of 16, 32 or 64 bits of floating point, and '
                                  f'not on the meta device, got {key} as {tensor.dtype}, {tensor.layout} on '
                                  f'{tensor.device}. Use another checkpoint.')
        if not torch.isfinite(tensor).all():
            raise ConversionError(
                f'Weights to be converted must be finite, got inf or nan in {key}. Use another checkpoint.')
        if key.endswith('.running_var') and (tensor < 0).any():
            raise ConversionError(f'Weights to be converted must have variances of at least 0, got '
                                  f'{float(tensor.min()):.3g} in {key}. Use another checkpoint.')


def layer_models(item: AttentionBlock, block: Mapping[str, Tensor]) -> tuple[LayerModel, FollowingLayers]:
    """The closed form's models of a plain bottleneck, given its weights by local name, such as 'conv2.weight'."""
    inputs = InputModel.after_norm(block['bn1.weight'], block['bn1.bias'], item.block.act1, block['conv1.weight'])
    layer = LayerModel(block['conv2.weight'], inputs, item.map_size, item.stride, item.attn.kernel)
    scale = block['bn3.weight'].double().cpu() / (block['bn3.running_var'].double().cpu() + item.block.bn3.eps).sqrt()
    next_weight = block['conv3.weight'].flatten(1).double().cpu() * scale[:, None]
    return layer, FollowingLayers(block['bn2.weight'], block['bn2.bias'], item.block.act2, next_weight)


def fit_blocks(
        state_dict: Mapping[str, Tensor], model: nn.Module,
) -> Iterator[tuple[AttentionBlock, dict[str, Tensor], LayerFit]]:
    """Each block that has attention in the model, the plain bottleneck's weights by local name, and the fit."""
    for item in attention_blocks(model):
        block = {name: state_dict[item.prefix + name] for name in _READ}
        layer, following = layer_models(item, block)
        yield item, block, fit_layer(layer, following, item.value_dim, len(item.attn.log_radius))


def apply_fit(block: Mapping[str, Tensor], fit: LayerFit) -> dict[str, Tensor]:
    """Apply a fit to the weights of a bottleneck.

    Args:
        block: The plain bottleneck's weights by local name, such as 'conv2.weight'.
        fit: The fit of its 3x3 convolution.

    Returns:
        The weights that replace 'conv2.weight' and those that change, by local name in the GeoPrior bottleneck.
    """
    conv2, conv3 = block['conv2.weight'], block['conv3.weight']
    replaced = torch.zeros(len(conv2), dtype=torch.bool).index_fill(0, fit.channels, True)
    order = torch.cat([torch.arange(len(conv2))[~replaced], fit.channels])
    norm = {name: block[name].double().cpu() for name in _NORMS}
    norm['bn2.running_mean'] = norm['bn2.running_mean'].index_add(0, fit.channels, fit.mean_shift)
    next_weight = conv3.flatten(1).double().cpu()
    columns = next_weight[:, fit.channels]
    vectors = {
        'conv2.attn.log_radius': torch.tensor(fit.radii, dtype=torch.float64).log(),
        **{name: tensor[order] for name, tensor in norm.items()},
        'bn3.running_mean': block['bn3.running_mean'].double().cpu() - columns @ fit.constant,
    }
    like = block['bn2.weight']
    return {
        'conv2.conv.weight': conv2[order[:-len(fit.channels)].to(conv2.device)],
        'conv2.attn.value.weight': fit.values[:, :, None, None].to(conv2),
        'conv3.weight': (next_weight + columns @ fit.correction)[:, order, None, None].to(conv3),
        **{name: tensor.to(like.device, torch.promote_types(like.dtype, torch.float32))
           for name, tensor in vectors.items()},
    }
