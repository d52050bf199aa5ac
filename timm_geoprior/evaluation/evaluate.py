"""One model on one data set, from the preflight to the counts."""
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data import ImageNetInfo, RealLabelsImagenet, resolve_data_config
from tqdm import tqdm

from ..data.datasets import ILSVRC_FILE, EvalSet, ilsvrc_val_labels
from ..data.preflight import empty_folders, find_unreadable, nested_folders, repeated_classes
from ..distributed import reduce_sum
from ..errors import EvaluationError
from .accuracy import Counts
from .classes import ClassMatch, match_classes
from .models import LoadedModel
from .predict import Forward, Pass, Shard, gather, make_loader, predict

__all__ = ['Evaluation', 'Plan', 'Settings', 'check_data', 'evaluate', 'plan']


@dataclass(frozen=True)
class Settings:
    """How to measure; the names are those of timm's validation.

    Attributes:
        device: Where the network runs.
        rank: This process.
        world_size: Number of processes.
        precisions: What to compute in, the reference first.
        batch_size: Images of a batch of one process.
        workers: Processes that decode, for each process.
        channels_last: Give the network images in that memory layout.
        torchcompile: Backend of `torch.compile`; None not to compile.
        subset: Measure only the classes that data and model both have.
        real_labels: File of ReaL labels, '' for timm's own; None not to use them.
        overrides: What replaces the model's own preprocessing, in the words of timm's `resolve_data_config`.
        tell: Called with each sentence that a person should read.
    """
    device: torch.device = torch.device('cpu')
    rank: int = 0
    world_size: int = 1
    precisions: tuple[str, ...] = ('float32',)
    batch_size: int = 256
    workers: int = 4
    channels_last: bool = False
    torchcompile: str | None = None
    subset: bool = False
    real_labels: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    tell: Callable[[str], None] = print


@dataclass(frozen=True)
class Plan:
    """What will be measured.

    Attributes:
        match: Which class of the data is which of the model's.
        indices: The images, in the order of the data set; empty for a stream.
        targets: The model's class index of each.
        config: timm's data configuration.
    """
    match: ClassMatch
    indices: NDArray[np.int64]
    targets: NDArray[np.int64]
    config: dict[str, Any]

    @property
    def img_size(self) -> int:
        """Width of the network's input in pixels."""
        return int(self.config['input_size'][-1])


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        loaded: The model.
        plan: What was to be measured.
        outcome: Counts and predictions.
        real: Counts by ReaL labels, of the images that have any.
        transform: The preprocessing's steps before the normalisation.
        seconds: Time of the pass.
        problems: Why the figures are not those of the whole set, a sentence each.
    """
    loaded: LoadedModel
    plan: Plan
    outcome: Pass
    real: Counts | None
    transform: tuple[str, ...]
    seconds: float
    problems: tuple[str, ...] = ()


def check_data(data: EvalSet, settings: Settings) -> None:
    """Look for what is wrong with the data set whatever the model; each process takes its share of the images.

    Args:
        data: The data set.
        settings: Of the measurement.

    Raises:
        EvaluationError: Classes stand twice, or images cannot be read; the message lists them.
    """
    if data.is_stream:
        settings.tell('These data are a stream: they are looked at as they come.')
        return
    per_class = np.bincount(data.labels, minlength=len(data.classes))
    without, per_class = int((per_class == 0).sum()), per_class[per_class > 0]
    spread = ' to '.join(f'{count:,}' for count in sorted({per_class.min(), per_class.max()}))
    settings.tell(f'{len(data.labels):,} images in {len(per_class):,} classes, {spread} in each'
                  f'{f"; {without:,} classes have none" if without else ""}.')
    if repeated := repeated_classes(data):
        places = '; '.join(f'{name}: {", ".join(places[:4])}' for name, places in repeated[:5])
        raise EvaluationError(f'Classes stand more than once, {len(repeated)} in number ({places}), expected one '
                              f'folder a class: name one split by --split or --data-dir, or join the folders.')
    if nested := nested_folders(data):
        settings.tell(f'Class folders lie deeper than one level, as {nested[0]} does: no folder of this split was '
                      f'found, or classes are grouped; all of them are taken.')
    if empty := empty_folders(data):
        settings.tell(f'Folders without images: {", ".join(empty[:10])}{" and others" if len(empty) > 10 else ""}.')
    own = np.arange(len(data.labels))[settings.rank::settings.world_size]
    faults = gather(np.array(find_unreadable(data, own, settings.workers, quiet=settings.rank > 0), dtype=object)
                    .reshape(-1, 2))
    if len(faults):
        listed = '\n'.join(f'  {data.name_of(index)}: {reason}' for index, reason in sorted(faults.tolist()))
        raise EvaluationError(f'{len(faults)} of {len(data.labels):,} images cannot be read, expected none: get them '
                              f'again, or take them out.\n{listed}')


def plan(data: EvalSet, loaded: LoadedModel, settings: Settings) -> Plan:
    """Match the classes, choose the images and settle the preprocessing.

    Args:
        data: The data set.
        loaded: The model.
        settings: Of the measurement.

    Returns:
        The plan.

    Raises:
        ClassMismatchError: The classes are not the model's.
        EvaluationError: ReaL labels were asked for on other images than ILSVRC's, or in another order of classes.
    """
    num_classes = int(loaded.model.num_classes)  # type: ignore[arg-type]  # every model of timm has it
    match = match_classes(data.classes, loaded.wnids, loaded.names, num_classes, settings.subset)
    targets = match.apply(data.labels)
    indices = np.flatnonzero(targets >= 0)
    if len(targets) and targets.max() >= num_classes:
        raise EvaluationError(f"The data have the label {targets.max()}, expected less than the model's {num_classes} "
                              f'classes: check --data-dir, or take another model.')
    if settings.real_labels is not None:
        _check_real_labels(data, loaded, settings)
    overrides = {'img_size': loaded.img_size, **{k: v for k, v in settings.overrides.items() if v is not None}}
    config = resolve_data_config(overrides, model=loaded.model, use_test_size=True)
    return Plan(match, indices, targets[indices], config)


def _check_real_labels(data: EvalSet, loaded: LoadedModel, settings: Settings) -> None:
    if settings.subset or loaded.wnids != tuple(ImageNetInfo('imagenet-1k').label_names()):
        raise EvaluationError(f"--real-labels are for all of ImageNet-1k's classes in their order, and {loaded.name} "
                              f'is not measured on those: leave it out.')
    names = [name.rpartition('/')[2] for name in data.names]
    if not names or not all(ILSVRC_FILE.fullmatch(name) for name in names):
        got = names[0] if names else 'data without file names'
        raise EvaluationError(f"--real-labels are for ILSVRC's validation images, expected names like "
                              f'ILSVRC2012_val_00000001.JPEG, got {got}: leave it out.')


def evaluate(data: EvalSet, loaded: LoadedModel, plan: Plan, settings: Settings) -> Evaluation:
    """Run a model over the data set, every image once.

    Args:
        data: The data set.
        loaded: The model.
        plan: What to measure.
        settings: How to measure it.

    Returns:
        What was measured, the same in every process.
    """
    model: Any = loaded.model.to(settings.device)
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if settings.torchcompile:
        model = torch.compile(model, backend=settings.torchcompile)
    shard = None if data.is_stream else _shard(data, plan, settings)
    loader: Any = make_loader(
        data if shard is None else shard, plan.config, settings.batch_size, settings.workers, settings.device,
        plan.match.to_model, int(loaded.model.num_classes), settings.rank,  # type: ignore[arg-type]
        settings.world_size)
    real = None
    if settings.real_labels is not None and shard is not None:
        real = _real_labels([data.names[i] for i in shard.indices], settings.real_labels)
    start = time.perf_counter()
    with _progress(loaded.name, len(plan.indices) or _expected(data), settings) as bar:
        outcome = predict(
            Forward(model, settings.tell), loader, settings.precisions, settings.device,
            None if shard is None else shard.indices, plan.match.competing, settings.channels_last,
            real.add_result if real else None, lambda count: _advance(bar, count * settings.world_size))
    seconds = time.perf_counter() - start
    steps = getattr(getattr(getattr(loader, 'dataset', None), 'transform', None), 'transforms', ())
    return Evaluation(loaded, plan, outcome, _real_counts(real, outcome, settings.device), tuple(map(repr, steps)),
                      seconds, _problems(data, plan, outcome))


def _expected(data: EvalSet) -> int:
    """Number of a stream's images as its own description has it, 0 where it has none."""
    return int(getattr(data.dataset.reader, 'num_samples', 0) or 0)


def _shard(data: EvalSet, plan: Plan, settings: Settings) -> Shard:
    mode = 'RGB' if plan.config['input_size'][0] == 3 else 'L'  # as timm's validation
    return Shard(data, plan.indices, plan.targets, settings.rank, settings.world_size, mode)


def _progress(name: str, total: int, settings: Settings) -> 'tqdm[Any]':
    return tqdm(total=total or None, desc=name, unit=' images', disable=True if settings.rank else None)


def _advance(bar: 'tqdm[Any]', count: int) -> None:
    """Move the bar; the other processes are taken to be as far as this one."""
    bar.update(min(count, bar.total - bar.n) if bar.total else count)


def _problems(data: EvalSet, plan: Plan, outcome: Pass) -> tuple[str, ...]:
    """Hold the images that came against those that were to come."""
    if outcome.out_of_range:
        raise EvaluationError(f"{outcome.out_of_range} labels are not among the model's classes, expected all to be: "
                              f'check --dataset and --target-key, or take another model.')
    first = next(iter(outcome.predictions.values()))
    if data.is_stream:
        came, expected = len(first.index) + outcome.left_out, _expected(data)
        return (f'{came:,} images came, expected {expected:,}: some could not be read, or --num-samples is wrong.',
                ) if expected not in (0, came) else ()
    seen = np.sort(np.concatenate([first.index, np.array(outcome.unreadable, dtype=np.int64)]))
    if not np.array_equal(seen, plan.indices):
        raise EvaluationError('Some images were evaluated twice or not at all, expected each once: report this fault.')
    names = ', '.join(data.name_of(index) for index in outcome.unreadable)
    count = f'{len(outcome.unreadable)} of {len(plan.indices):,} images'
    return (f'Could not be decoded and do not count, {count}: {names}.',) if names else ()


def _real_labels(names: list[str], file: str) -> Any:
    """timm's evaluator of ReaL labels, for these images in this order."""
    count = len(ilsvrc_val_labels())
    try:
        real = RealLabelsImagenet([f'ILSVRC2012_val_{i + 1:08d}.JPEG' for i in range(count)], file or None)
    except (OSError, ValueError, AssertionError) as error:
        raise EvaluationError(f'{file} cannot be read as ReaL labels ({error or "wrong number"}), expected a '
                              f"JSON list of {count:,} lists: leave the name out for timm's own.") from None
    real.filenames = names  # it asks for all names at first, and then goes through them in order
    return real


def _real_counts(real: Any, outcome: Pass, device: torch.device) -> Counts | None:
    if real is None or outcome.unreadable:
        return None
    own = [len(real.is_correct[1]), sum(real.is_correct[1]), sum(real.is_correct[5])]
    return Counts(*reduce_sum(torch.tensor(own, dtype=torch.int64, device=device)).tolist())
