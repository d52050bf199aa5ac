#!/usr/bin/env python3
"""What the ImageNet recipes cost, reckoned from measured training speed, as a table in Markdown.

    python scripts/benchmark.py geoprior_resnet50 geoprior_resnet101 geoprior_resnet152 --train --output bench/train
    python scripts/cost.py bench/train

Assumptions, column by column:
- images/s: measured on one device; at another size in proportion to the pixels.
- hours on 1, 8, 64 devices: the images over as many times that speed, so data and gradients must keep up.
- gradients: float32, all-reduced in a ring each step: a device sends 2 (n - 1) / n times the parameters' bytes.
- network: that over the duration of a step, n devices sharing the batch, for gradients that hide behind the step.
- disk: images/s of 64 devices times the mean size of a training image, read anew each epoch.
"""
import argparse
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import timm
import torch

from timm_geoprior.benchmark import summarize
from timm_geoprior.training.recipe import Recipe, load_recipe

RECIPES = ('paper_in1k', 'sgd100', 'a1', 'a2', 'a3', 'torchvision_v2')
IMAGES = 1_281_167
IMAGE_BYTES = 147_897_477_120 / IMAGES  # ILSVRC2012_img_train.tar
DEVICES = (1, 8, 64)


def measured_speed(folder: Path) -> tuple[dict[str, float], int, str]:
    """Training images/s of each model (the median of its repetitions), their size in pixels, and the device's name."""
    results = json.loads((folder / 'results.json').read_text())
    if not results['setting']['train']:
        raise ValueError(f'{folder} was measured without --train, expected training speed: run benchmark.py with it.')
    speeds: dict[str, list[float]] = {}
    with (folder / 'speed.csv').open(newline='') as file:
        for row in csv.DictReader(file):
            speeds.setdefault(row['model'], []).append(float(row['images_per_second']))
    device = f'{results["hardware"]}, {results["setting"]["precision"]}'
    return {name: summarize(speeds[name]).median for name in results['models']}, results['setting']['img_size'], device


def parameter_bytes(name: str) -> int:
    """Bytes of a model's float32 gradients."""
    with torch.device('meta'):
        model = timm.create_model(name, num_classes=1000)
    return 4 * sum(parameter.numel() for parameter in model.parameters())


def pixels_seen(recipe: Recipe) -> float:
    """Pixels of one image over all epochs, whose sizes may differ."""
    return sum(recipe.size_at(epoch) ** 2 for epoch in range(recipe.epochs))


def table(speeds: dict[str, float], img_size: int) -> Iterator[str]:
    """The table's lines."""
    yield ('| recipe | model | epochs | batch | images/s, last size | hours on 1 | on 8 | on 64 | gradients a step, '
           'GB sent a device (8) | network, GB/s a device (8, 64) | disk, MB/s (64) |')
    yield '| --- | --- |' + ' ---: |' * 9
    for name in RECIPES:
        recipe = load_recipe(name)
        for model, speed in speeds.items():
            at_size = speed * (img_size / recipe.size_at(recipe.epochs - 1)) ** 2
            hours = IMAGES * pixels_seen(recipe) / (speed * img_size ** 2) / 3600
            sent = {n: 2 * (n - 1) / n * parameter_bytes(model) / 1e9 for n in DEVICES}
            network = {n: sent[n] * at_size * n / recipe.batch_size for n in DEVICES}
            disk = at_size * DEVICES[-1] * IMAGE_BYTES / 1e6
            cells = [name, model, recipe.epochs, recipe.batch_size, f'{at_size:,.1f}',
                     *(f'{hours / n:,.1f}' for n in DEVICES), f'{sent[8]:.2f}',
                     f'{network[8]:.3g}, {network[64]:.3g}', f'{disk:,.1f}']
            yield '| ' + ' | '.join(map(str, cells)) + ' |'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('speed', type=Path, help='output folder of scripts/benchmark.py --train')
    args = parser.parse_args()
    try:
        speeds, img_size, device = measured_speed(args.speed)
    except (OSError, ValueError) as error:
        sys.exit(f'cost.py: {error}')
    print(f'One device: {device}, measured at {img_size} px.\n')
    print('\n'.join(table(speeds, img_size)))


if __name__ == '__main__':
    main()
