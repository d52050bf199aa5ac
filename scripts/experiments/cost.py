#!/usr/bin/env python3
"""Estimate what the ImageNet recipes cost, from a measured training speed, as a Markdown table.

    python scripts/experiments/benchmark.py geoprior_resnet50 geoprior_resnet101 \\
        geoprior_resnet152 --train --output bench/train
    python scripts/experiments/cost.py bench/train

Assumptions of each column:
- device-hours: the images of all epochs divided by the speed of one device, which is scaled by the number of pixels for
  other image sizes. A teacher adds a third: a step costs three forward passes, and the teacher's is a fourth.
  Validation after each epoch is ignored: it is 50,000 forward passes, against 1,281,167 training images.
- hours on 8, 64: device-hours divided evenly. A device is as fast with its share of the batch as in the measurement,
  and nothing waits for data or gradients; the other columns say what that requires.
- images/s needed on 1, 8, 64: what the loader must decode and augment: the speed times the number of devices.
- gradients: float32, all-reduced in a ring in each step: each device sends 2 (n - 1) / n times the parameters' bytes.
- network: these bytes divided by the duration of a step with n devices sharing the batch, to hide the transfer.
- disk: images/s needed times the mean size of a training image. Every image is read from disk every time, none cached.
"""
import argparse
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import timm
import torch

from benchmark import summarize
from timm_geoprior.files import markdown_table
from timm_geoprior.training.recipe import Recipe, load_recipe

RECIPES = ('paper_in1k', 'sgd100', 'a1', 'a2', 'a3', 'torchvision_v2', 'warm_in1k')
IMAGES = 1_281_167
IMAGE_BYTES = 147_897_477_120 / IMAGES  # of ILSVRC2012_img_train.tar, 115 kB
DEVICES = (1, 8, 64)


def measured_speed(folder: Path) -> tuple[dict[str, float], int, str]:
    """Training images/s of each model (median over repetitions), the image size in pixels, and device and precision."""
    results = json.loads((folder / 'results.json').read_text())
    if not results['setting']['train']:
        raise ValueError(f'{folder} must hold training speeds, got those of inference. Run benchmark.py with --train.')
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


HEADER = (
    'recipe', 'model', 'epochs', 'batch', 'device-hours', 'hours on 8', 'on 64', 'images/s needed on 1', '8', '64',
    'gradients, GB sent per device and step (8, 64)', 'network, GB/s per device (8, 64)', 'disk, MB/s (1, 8, 64)')


def rows(speeds: dict[str, float], img_size: int) -> Iterator[list[object]]:
    """The table's rows."""
    for name in RECIPES:
        recipe = load_recipe(name)
        for model, speed in speeds.items():
            taught = speed * 3 / 4 if recipe.teacher else speed
            at_size = taught * (img_size / recipe.size_at(recipe.epochs - 1)) ** 2
            hours = IMAGES * pixels_seen(recipe) / (taught * img_size ** 2) / 3600
            sent = {n: 2 * (n - 1) / n * parameter_bytes(model) / 1e9 for n in DEVICES}
            network = {n: sent[n] * at_size * n / recipe.batch_size for n in DEVICES}
            disk = [f'{at_size * n * IMAGE_BYTES / 1e6:,.1f}' for n in DEVICES]
            yield [name, model, recipe.epochs, recipe.batch_size, *(f'{hours / n:,.1f}' for n in DEVICES),
                   *(f'{at_size * n:,.1f}' for n in DEVICES), f'{sent[8]:.3f}, {sent[64]:.3f}',
                   f'{network[8]:.3g}, {network[64]:.3g}', '; '.join(disk)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('speed', type=Path, help='output folder of scripts/experiments/benchmark.py --train')
    args = parser.parse_args()
    try:
        speeds, img_size, device = measured_speed(args.speed)
    except (OSError, ValueError) as error:
        sys.exit(f'cost.py: {error}')
    print(f'One device: {device}, measured at {img_size} px.\n')
    print(markdown_table(HEADER, rows(speeds, img_size), left=(0, 1)))


if __name__ == '__main__':
    main()
