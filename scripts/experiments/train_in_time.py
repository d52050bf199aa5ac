#!/usr/bin/env python3
"""Train with a recipe in a given time, by scaling the number of epochs to the speed of the device.

    python scripts/experiments/train_in_time.py r128_tin200 --data-dir tiny-imagenet-200 --output runs --minutes 9 \\
        --model geoprior_resnet50 --model resnet50

Use it for a GPU that is available for a few minutes only. The script decodes the images once, times some updates of
each model at each image size of the recipe, and multiplies the epochs at each size by one factor, so that the learning
rate schedule of the last model ends in time. On a GPU the networks run as CUDA graphs. The models are trained for the
same number of epochs, one after the other, each in a folder named after it in --output. A run that takes too long saves
a checkpoint and exits with code 143; the same command resumes it.

At the end each folder has release.pt, at most a quarter as large as last.pt: the weights in float16, averaged if the
recipe says so, with everything that scripts/publish.py and scripts/validate.py read from a checkpoint. If you can only
send files of 64 MB and receive files of 16 MB, transfer parts:

    tar cz tiny-imagenet-200/train | split -b 60M - shards/              # there: cat shards/* | tar xz
    split -b 15M runs/resnet50/release.pt release.                       # here: cat release.* > release.pt
"""
import argparse
import gc
import math
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import timm_geoprior  # noqa: F401  (registers the models)
from timm_geoprior.data.memory import ImageTensors, decode_images
from timm_geoprior.distributed import default_device, find_device
from timm_geoprior.errors import GeoPriorError, exit_on_error
from timm_geoprior.progress import tell_on_stderr
from timm_geoprior.release.staging import release_tensors
from timm_geoprior.training.checkpoint import load_checkpoint, read_weights, save_checkpoint
from timm_geoprior.training.engine import Statistics, Trainer
from timm_geoprior.training.loaders import open_images
from timm_geoprior.training.parts import check_recipe
from timm_geoprior.training.recipe import Recipe, RunConfig, load_recipe

TIMED_UPDATES = 20
RESERVE = 10  # seconds for the work after a model's last epoch
MARGIN = 0.97  # share of the remaining time that is planned


@dataclass(frozen=True)
class Speed:
    """Measured times, in seconds.

    Attributes:
        update: One update, by image size.
        epoch: One epoch without its updates, mostly saving the checkpoint.
        once: Extra time of the first updates, summed over the sizes.
    """

    update: dict[int, float]
    epoch: float
    once: float

    def of(self, recipe: Recipe, updates_per_epoch: int) -> float:
        """Seconds that all epochs of a recipe take."""
        sizes = [recipe.size_at(epoch) for epoch in range(recipe.epochs)]
        return sum(updates_per_epoch * self.update[size] + self.epoch for size in sizes)


class GraphedTrainer(Trainer):
    """A Trainer that runs the network as CUDA graphs, one for each image size, and saves every tenth epoch.

    At small sizes, launching the kernels of a ResNet-50 one by one takes longer than the kernels themselves. Without
    CUDA, only the saving differs.
    """

    graphed_size = 0

    def _train_epoch(self) -> None:
        size = self.recipe.size_at(self.epoch)
        if self.device.type == 'cuda' and size != self.graphed_size:
            self._capture(size)
        super()._train_epoch()

    def _capture(self, size: int) -> None:
        self.model.__dict__.pop('forward', None)  # the graphs of another size
        gc.collect()  # they are in reference cycles, which keep their memory
        self.model.train()
        images = torch.zeros(self._batch_share(), 3, size, size, device=self.device)
        statistics = Statistics(self.model)
        with torch.autocast('cuda', getattr(torch, self.recipe.amp_dtype), self.recipe.amp, cache_enabled=False):
            torch.cuda.make_graphed_callables(self.model, (images.contiguous(memory_format=self.memory_format),))
        statistics.restore()  # undoes the warm-up passes before a capture
        self.graphed_size = size

    def save(self, path: Path, whole: bool = True) -> None:
        if self.stop_signal or self.epoch % 10 == 0 or self.epoch == self.recipe.epochs:
            super().save(path, whole)


def measure(recipe: Recipe, config: RunConfig, decoded: ImageTensors) -> Speed:
    """Time some updates at each size: two epochs each, the first of which is a warm-up."""
    sizes = list(dict.fromkeys(recipe.size_at(epoch) for epoch in range(recipe.epochs)))
    probe = replace(
        recipe, epochs=2 * len(sizes), progressive=tuple((2 * i, size) for i, size in enumerate(sizes)),
        warmup_epochs=0, mixup_off_epoch=0, lr=1e-6, min_lr=0, warmup_lr=0)  # the recipe's lr needs a warm-up
    used = torch.arange(len(decoded), device=decoded.targets.device) < TIMED_UPDATES * recipe.batch_size
    # images with target -1 are left out, like unreadable ones
    some = ImageTensors(decoded.images, decoded.targets.where(used, -1))
    with tempfile.TemporaryDirectory() as folder:
        trainer = GraphedTrainer(
            probe, replace(config, output=Path(folder) / 'probe', tell=lambda text: None), some)
        marks = [(time.perf_counter(), 0.0)]

        def note(history: Sequence[dict[str, Any]]) -> bool:
            marks.append((time.perf_counter(), trainer.seconds))
            return False

        trainer.fit(stop=note)
    spans = [(after[0] - before[0], after[1] - before[1]) for before, after in zip(marks, marks[1:], strict=False)]
    first, second = spans[::2], spans[1::2]
    return Speed(
        {size: trained / trainer.updates_per_epoch for size, (_, trained) in zip(sizes, second, strict=True)},
        epoch=sum(wall - trained for wall, trained in second) / len(sizes),
        once=sum(max(one[0] - other[0], 0) for one, other in zip(first, second, strict=True)))


def scale(recipe: Recipe, factor: float) -> Recipe:
    """The recipe with its epochs multiplied by a factor, at least one at each size."""
    pairs = [pair for pair in recipe.progressive if pair[0] < recipe.epochs] or [(0, recipe.img_size)]
    ends = [*(start for start, _ in pairs[1:]), recipe.epochs]
    epochs, progressive = 0, []
    for (start, size), end in zip(pairs, ends, strict=True):
        progressive.append((epochs, size))
        epochs += max(1, int(factor * (end - start)))
    share = epochs / recipe.epochs

    def scaled(number: int) -> int:
        return max(1, round(share * number)) if number else 0  # 0 has a meaning of its own

    return replace(
        recipe, epochs=epochs, progressive=tuple(progressive), warmup_epochs=scaled(recipe.warmup_epochs),
        mixup_off_epoch=scaled(recipe.mixup_off_epoch), decay_epochs=share * recipe.decay_epochs)


def fit_to_time(recipes: Sequence[Recipe], config: RunConfig, decoded: ImageTensors, end: float) -> list[Recipe]:
    """The recipes with as many epochs as there is time for, the same number in each.

    Raises:
        GeoPriorError: There is no time for one epoch at each size.
    """
    speeds = [measure(recipe, config, decoded) for recipe in recipes]
    updates = int((decoded.targets >= 0).sum()) // recipes[0].batch_size
    once = sum(speed.once for speed in speeds)
    left = MARGIN * (end - time.monotonic() - RESERVE * len(recipes) - once)

    def seconds(of: Sequence[Recipe]) -> float:
        return sum(speed.of(recipe, updates) for recipe, speed in zip(of, speeds, strict=True))

    factor = left / seconds(recipes)
    found = [scale(recipe, factor) for recipe in recipes]
    for recipe, speed in zip(found, speeds, strict=True):
        rates = ', '.join(f'{recipe.batch_size / took:.0f} at {size} px' for size, took in speed.update.items())
        print(f'{recipe.model}: {rates} images/s, and {speed.epoch:.2f} s more per epoch.')
    print(f'Epochs: {found[0].epochs} instead of {recipes[0].epochs}, {list(found[0].progressive)}, '
          f'{seconds(found):.0f} s of {left:.0f} s.', flush=True)
    if seconds(found) > left:
        raise GeoPriorError(f'One epoch at each size takes {seconds(found):.0f} s, and {max(left, 0):.0f} s are left. '
                            f'Raise --minutes.')
    return found


def write_release(output: Path) -> None:
    """Write release.pt: last.pt with only the weights to release, the averaged ones if there are any."""
    state = load_checkpoint(output / 'last.pt')
    weights = release_tensors(read_weights(output / 'last.pt').state_dict)
    left_out = {'model_ema', 'optimizer', 'scaler'}
    save_checkpoint(
        {**{key: value for key, value in state.items() if key not in left_out}, 'model': weights},
        output / 'release.pt')


def plan(args: argparse.Namespace) -> tuple[list[Recipe], list[Path]]:
    """The recipe of each model, and the folder of its run. If a run has begun, all models use its recipe."""
    recipe = load_recipe(args.recipe, args.set)
    models = args.model or [recipe.model]
    if len(set(models)) < len(models):
        raise GeoPriorError(f'--model must name each model once, got {", ".join(models)}.')
    folders = [args.output / model for model in models]
    begun = [folder / 'recipe.yaml' for folder in folders if (folder / 'last.pt').exists()]
    if begun:
        recipe = load_recipe(begun[0])
    # a graph writes its gradients to fixed memory, where a second part of a batch would overwrite those of the first
    for key, wanted in (('in_memory', True), ('holdout', 0), ('grad_accum_steps', 1), ('torchcompile', False)):
        if (got := getattr(recipe, key)) != wanted:
            raise GeoPriorError(f'The recipe key {key!r} must be {str(wanted).lower()} here, got {str(got).lower()}. '
                                f'Add --set {key}={str(wanted).lower()}.')
    recipes = [replace(recipe, model=model) for model in models]
    for each in recipes:  # before the first is trained
        check_recipe(each)
    return recipes, folders


def run(args: argparse.Namespace, end: float) -> None:
    """Train each model to the end, or until the time is up."""
    device, _, processes = find_device(args.device)
    if processes > 1:
        raise GeoPriorError(f'There must be one process, got {processes}. Leave torchrun out.')
    if not (math.isfinite(args.minutes) and args.minutes >= 0):
        raise GeoPriorError(f'--minutes must be a number of at least 0, got {args.minutes}. Change it.')
    recipes, folders = plan(args)
    config = RunConfig(
        args.data_dir, args.output, seed=args.seed, device=args.device, workers=args.workers,
        command='the same command')
    images = open_images(config, config.train_split)
    decoded = decode_images(
        images.dataset, recipes[0].memory_size, config.workers, config.max_corrupt, config.tell
    ).to(device)
    if args.minutes and not any((folder / 'last.pt').exists() for folder in folders):
        recipes = fit_to_time(recipes, config, decoded, end)
    if args.minutes:
        signal.signal(signal.SIGALRM, lambda number, frame: signal.raise_signal(signal.SIGTERM))
        signal.setitimer(signal.ITIMER_REAL, max(end - time.monotonic() - RESERVE / 3, 1))
    for recipe, folder in zip(recipes, folders, strict=True):
        resume = (folder / 'last.pt').exists()
        tell_on_stderr(f'{recipe.model}: {recipe.epochs} epochs{", resumed" if resume else ""}.')
        GraphedTrainer(recipe, replace(config, output=folder, resume=resume), decoded).fit()
        write_release(folder)
    signal.setitimer(signal.ITIMER_REAL, 0)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('recipe', help='name or YAML file of a recipe with in_memory; a resumed run keeps its own')
    parser.add_argument(
        '--data-dir', type=Path, required=True, help='folder with train/, which has one folder per class')
    parser.add_argument('--output', type=Path, required=True, help='folder to write')
    parser.add_argument(
        '--minutes', type=float, default=0, help="time for the whole command; without it, the recipe's epochs are kept")
    parser.add_argument(
        '--model', action='append', default=[], metavar='NAME',
        help="timm model to train instead of the recipe's; may be repeated")
    parser.add_argument(
        '--set', action='append', default=[], metavar='KEY=VALUE', help='override a recipe key')
    parser.add_argument('--seed', type=int, default=0, help='seed of weights, order and augmentation (default: 0)')
    parser.add_argument('--device', default=default_device(), help='default: cuda if there is one, else cpu')
    parser.add_argument('-j', '--workers', type=int, default=2, help='processes that decode images (default: 2)')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with exit_on_error():
        run(args, time.monotonic() + 60 * args.minutes)


if __name__ == '__main__':
    main()
