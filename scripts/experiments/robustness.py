#!/usr/bin/env python3
"""Compare networks with plain ones of the same recipe and seed under conditions that they were not trained for.

    python scripts/experiments/robustness.py --data-dir tiny-imagenet-200 --split val --output out \\
        --pair runs/prior/0/last.pt runs/plain/0/last.pt --pair runs/prior/1/last.pt runs/plain/1/last.pt

Each --pair names two checkpoints, the network with the prior and the plain one; averaged weights are used if there are
any. Both are measured on the same images, resized to 0.5 to 2 times their evaluation size, shifted by an eighth and a
quarter of their side (image i in direction i % 4), and with a square of a sixteenth and a quarter of their area
covered. Shifted-in and covered areas get the mean colour. The calibration error is that of the unchanged images.

--output receives robustness.md with the mean difference and two 95% intervals: over the images for these networks
(bootstrap), and over the seeds if there are three pairs or more (Student's t). robustness.csv has one row per pair and
condition.
"""
import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from numpy.typing import NDArray
from scipy.stats import bootstrap
from timm.data import resolve_data_config
from torch import Tensor, nn

import timm_geoprior  # noqa: F401  (registers the models)
from compare import MIN_SEEDS, paired_interval
from timm_geoprior.data.memory import ImageTensors, decode_images
from timm_geoprior.distributed import default_device
from timm_geoprior.errors import GeoPriorError, exit_on_error
from timm_geoprior.evaluation.metrics import Predictions, calibrate, target_ranks
from timm_geoprior.files import first_line, markdown_table, write_atomically, write_csv
from timm_geoprior.progress import command_line
from timm_geoprior.provenance import git_commit, hardware, versions
from timm_geoprior.training.checkpoint import read_weights
from timm_geoprior.training.loaders import model_cfg, open_images
from timm_geoprior.training.parts import build_model
from timm_geoprior.training.recipe import Recipe, RunConfig, make_recipe

SIZES = (0.5, 0.75, 1.25, 1.5, 2.0)
SHIFTS = (1 / 8, 1 / 4)
COVERED = (1 / 16, 1 / 4)
BATCH = 200  # a multiple of the four directions
DIRECTIONS = ((1, 0), (0, 1), (-1, 0), (0, -1))
Change = Callable[[Tensor, int], Tensor]


def shift(images: Tensor, share: float) -> Tensor:
    """Shift images (B, 3, H, W) by a share of their side, image i in direction i % 4, and fill with zeros."""
    step = round(share * images.shape[-1])
    moved = torch.empty_like(images)
    for index, (x, y) in enumerate(DIRECTIONS):
        moved[index::4] = TF.affine(images[index::4], 0, [step * x, step * y], 1, [0, 0])
    return moved


def cover(images: Tensor, first: int, area: float) -> Tensor:
    """Cover a square of the given share of the area with zeros. Its position depends only on the image's index."""
    side = round(area ** 0.5 * images.shape[-1])
    covered = images.clone()
    for index, image in enumerate(covered):
        random = torch.Generator().manual_seed(first + index)
        top, left = torch.randint(images.shape[-1] - side + 1, (2,), generator=random).tolist()
        TF.erase(image, top, left, side, side, torch.zeros((), device=image.device), inplace=True)
    return covered


def conditions(size: int, interpolation: str) -> dict[str, Change]:
    """Changes to normalised images by name. Each takes images and the index of the first, and returns them resized."""
    def resize(images: Tensor, factor: float = 1) -> Tensor:
        side = round(factor * size)
        if images.shape[-1] == side:
            return images
        return F.interpolate(images, size=(side, side), mode=interpolation, antialias=True)

    named: dict[str, Change] = {'as they are': lambda images, first: resize(images)}
    for factor in SIZES:
        named[f'{factor:g} times the size'] = lambda images, first, factor=factor: resize(images, factor)
    for share in SHIFTS:
        named[f'moved by 1/{1 / share:.0f}'] = lambda images, first, share=share: resize(shift(images, share))
    for area in COVERED:
        named[f'1/{1 / area:.0f} covered'] = lambda images, first, area=area: resize(cover(images, first, area))
    return named


@torch.inference_mode()
def predict(
        network: nn.Module, images: ImageTensors, norms: tuple[Tensor, Tensor], change: Change, amp: bool,
) -> Predictions:
    """The network's predictions on images with one change applied."""
    answers: list[tuple[Tensor, Tensor, Tensor]] = []
    for first in range(0, len(images), BATCH):
        part = images.subset(torch.arange(first, min(first + BATCH, len(images))))
        changed = change((part.images.float() - norms[0]) / norms[1], first)
        with torch.autocast(changed.device.type, torch.bfloat16, amp):
            logits = network(changed.contiguous(memory_format=torch.channels_last)).float()
        best = logits.softmax(1).max(1)
        answers.append((target_ranks(logits, part.targets), best.indices, best.values))
    joined = [torch.cat(values).cpu().numpy() for values in zip(*answers, strict=True)]
    return Predictions(np.arange(len(images)), images.targets.cpu().numpy(), *joined)


def load(path: Path, classes: Sequence[str]) -> tuple[nn.Module, Recipe, int | None]:
    """Network, recipe and seed of a checkpoint.

    Raises:
        GeoPriorError: It was trained on other classes, or its model does not exist.
    """
    saved = read_weights(path)
    if saved.class_names != tuple(classes):
        raise GeoPriorError(f'{path} must be trained on the {len(classes)} classes of the images, got '
                            f'{len(saved.class_names)} others. Check --data-dir.')
    recipe = make_recipe(saved.recipe, str(path))
    try:
        network = build_model(recipe, len(classes), start=saved)
    except RuntimeError as error:  # this version may not have the model
        raise GeoPriorError(f'{path} cannot be loaded ({first_line(error)}). Measure it with the version of this '
                            f'package that trained it.') from None
    return network.eval(), recipe, saved.seed


def measure(
        path: Path, images: ImageTensors, classes: Sequence[str], amp: bool, interpolation: str = '',
) -> tuple[dict[str, Predictions], dict[str, Any]]:
    """A checkpoint's predictions by condition, and facts about it; the default interpolation is the model's own."""
    network, recipe, seed = load(path, classes)
    device = images.images.device
    data = resolve_data_config(pretrained_cfg=model_cfg(recipe.model))
    mean, std = (255 * torch.tensor(data[key], device=device).view(1, -1, 1, 1) for key in ('mean', 'std'))
    network = network.to(device, memory_format=torch.channels_last)
    size = recipe.measured_size
    interpolation = interpolation or data['interpolation']
    changes = conditions(size, interpolation)
    found = {name: predict(network, images, (mean, std), change, amp) for name, change in changes.items()}
    facts = {'recipe': {**recipe.to_dict(), 'model': '', 'model_kwargs': {}}, 'seed': seed, 'size': size,
             'interpolation': interpolation}
    return found, facts


def statistics(pairs: Sequence[Sequence[Predictions]], index: NDArray[Any], calibration: bool) -> NDArray[np.float64]:
    """Accuracy or calibration error in percent on the images at `index`, of shape (pairs, 2)."""
    def one(answers: Predictions) -> float:
        part = Predictions(*(values[index] for values in vars(answers).values()))
        return 100 * (calibrate(part).error if calibration else float(part.correct.mean()))

    return np.array([[one(answers) for answers in pair] for pair in pairs])


def compare(name: str, pairs: Sequence[Sequence[Predictions]], calibration: bool = False) -> tuple[
        NDArray[np.float64], list[str]]:
    """The figures of each pair under a condition, and the condition's line in the report."""
    every = np.arange(len(pairs[0][0].target))
    found = statistics(pairs, every, calibration)

    def difference(index: NDArray[Any]) -> float:
        values = statistics(pairs, index, calibration)
        return float((values[:, 0] - values[:, 1]).mean())

    interval = bootstrap((every,), difference, vectorized=False, n_resamples=1000, method='percentile', rng=0)
    low, high = interval.confidence_interval
    prior, plain = found.mean(0)
    over_seeds = paired_interval(found[:, 0] - found[:, 1])
    line = [name, f'{prior:.2f}', f'{plain:.2f}', f'{prior - plain:+.2f}', f'{low:+.2f} to {high:+.2f}']
    return found, [*line, *([str(over_seeds)] if len(pairs) >= MIN_SEEDS else [])]


def run(args: argparse.Namespace) -> str:
    """Measure all pairs and write the report."""
    config = RunConfig(args.data_dir, args.output, device=args.device, workers=args.workers)
    found = open_images(config, args.split)
    images = decode_images(found.dataset, Recipe.memory_size, args.workers, tell=config.tell).readable()
    images = images.to(torch.device(args.device))
    measured, seeds, first = [], [], None
    for pair in args.pair:
        prior, facts = measure(pair[0], images, found.classes, args.amp)
        # timm resizes images for its plain networks differently, but a pair must see the same images
        plain, others = measure(pair[1], images, found.classes, args.amp, facts['interpolation'])
        if facts != others:
            raise GeoPriorError(f'{pair[0]} and {pair[1]} must have the same recipe but for the network, and the '
                                f'same seed. Name two runs that were trained side by side.')
        own = {**facts, 'seed': 0, 'recipe': {**facts['recipe'], 'teacher_path': ''}}  # each seed may have its own
        first = first or own
        if own != first:
            raise GeoPriorError(f'All pairs must have the same recipe, got another one in {pair[0]}. Measure it in a '
                                f'run of its own.')
        measured.append((prior, plain))
        seeds.append(facts['seed'])
        print(f'seed {facts["seed"]}: measured', flush=True)
    lines, rows = [], []
    for name, calibration in [*((name, False) for name in measured[0][0]), ('calibration error, as they are', True)]:
        key = 'as they are' if calibration else name
        figures, line = compare(name, [[prior[key], plain[key]] for prior, plain in measured], calibration)
        lines.append(line)
        rows += [{'condition': name, 'seed': seed, 'prior': prior, 'plain': plain, 'num_images': len(images),
                  'size': facts['size'], 'commit': git_commit(), 'torch': versions()['torch'],
                  'hardware': hardware(images.images.device)}
                 for seed, (prior, plain) in zip(seeds, figures.tolist(), strict=True)]
    head = ['images', 'prior', 'plain', 'difference', '95% over images', '± over seeds']
    table = markdown_table(head[:len(lines[0])], lines)
    intro = (f'{len(images):,} images of {args.split} at {facts["size"]} px unless said otherwise, in '
             f'{"bfloat16" if args.amp else "float32"}, top-1 in percent, '
             f'{f"means of {len(seeds)} pairs (seeds" if len(seeds) > 1 else "of one pair (seed"} '
             f'{", ".join(map(str, seeds))}). A lower calibration error is better.')
    text = f'`{command_line()}`\n\n{intro}\n\n{table}\n'
    args.output.mkdir(parents=True, exist_ok=True)
    write_csv(args.output / 'robustness.csv', rows)
    write_atomically(args.output / 'robustness.md', text.encode())
    return text


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--pair', type=Path, nargs=2, action='append', required=True, metavar=('PRIOR', 'PLAIN'),
        help='two checkpoints of scripts/train.py; repeat for each seed')
    parser.add_argument(
        '--data-dir', type=Path, required=True, help='folder with the split, which has one folder per class')
    parser.add_argument('--split', default='val', help='split to measure (default: val)')
    parser.add_argument('--output', type=Path, required=True, help='folder to write')
    parser.add_argument('--device', default=default_device(), help='default: cuda if there is one, else cpu')
    parser.add_argument('--amp', action='store_true', help='compute in bfloat16, by autocast (default: float32)')
    parser.add_argument('-j', '--workers', type=int, default=2, help='processes that decode images (default: 2)')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with exit_on_error():
        text = run(args)
    print(f'\n{text}')


if __name__ == '__main__':
    main()
