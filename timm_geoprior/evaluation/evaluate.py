"""Evaluate one model on one data set: match the classes, choose the images, run every precision, count."""
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data import ImageNetInfo, RealLabelsImagenet, create_loader, resolve_data_config
from torch import Tensor, nn

from ..data.batches import init_worker, start_workers
from ..data.dataset import UNREADABLE, DataSplit, SelectedImages
from ..data.listing import ILSVRC_FILE, ilsvrc_val_labels
from ..distributed import gather, reduce_sum
from ..errors import EvaluationError, ProcessError, out_of_memory
from ..files import first_line
from ..progress import Progress, tell_on_stderr
from .classes import ClassMatch, match_classes
from .metrics import Counts, Predictions, target_ranks
from .models import LoadedModel, with_channels

SKIPPED, OUT_OF_RANGE = -1, -3  # in place of a class index, like UNREADABLE
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class EvalConfig:
    """How to measure; the names are those of timm's validate.py."""
    device: torch.device = torch.device('cpu')
    rank: int = 0  # this process
    world_size: int = 1  # number of processes
    precisions: tuple[str, ...] = ('float32',)  # float32, bfloat16 or float16; the reference first
    batch_size: int = 256  # images per batch of one process
    workers: int = 4  # processes that decode images, per process
    channels_last: bool = False
    torchcompile: str | None = None  # backend of `torch.compile`; None not to compile
    subset: bool = False  # measure only the classes that data and model both have
    real_labels: str | None = None  # file of ReaL labels, '' for timm's own; None not to use them
    # overrides of the model's own preprocessing, with the keys of timm's `resolve_data_config`
    overrides: Mapping[str, Any] = field(default_factory=dict)
    tell: Callable[[str], None] = print  # called with each message for the user


@dataclass(frozen=True)
class Plan:
    """What will be measured."""
    match: ClassMatch
    indices: NDArray[np.int64]  # the images, in the order of the data set; empty for a stream
    targets: NDArray[np.int64]  # the model's class index of each
    config: dict[str, Any]  # timm's data configuration

    @property
    def size_text(self) -> str:
        """Side of the images in pixels, or height and width."""
        _, height, width = self.config['input_size']
        return f'{width}' if height == width else f'{height} x {width}'

    @property
    def img_size(self) -> int:
        """Width of the network's input in pixels."""
        return int(self.config['input_size'][-1])


@dataclass(frozen=True)
class Pass:
    """The outcome of a pass over the data, of all processes together."""
    predictions: dict[str, Predictions]  # by precision
    largest_difference: dict[str, float]  # by precision: of any score from the first precision's
    unreadable: list[int]  # index of each image that could not be decoded; -1 for each in a stream
    left_out: int  # number of a stream's images whose class is not measured
    out_of_range: int  # number of a stream's labels for which the model has no class

    @property
    def counts(self) -> dict[str, Counts]:
        """Counts by precision."""
        return {precision: predictions.counts for precision, predictions in self.predictions.items()}


@dataclass(frozen=True)
class Evaluation:
    """What was measured."""
    loaded: LoadedModel
    plan: Plan
    outcome: Pass
    real: Counts | None  # with ReaL labels, over the images that have any
    transform: tuple[str, ...]  # the preprocessing's steps before the normalisation
    seconds: float  # time of the pass
    problems: tuple[str, ...] = ()  # what is missing from or wrong with the results, one sentence each


def set_numerics(precisions: Sequence[str]) -> None:
    """Make float32 strict: no TF32 or bfloat16 internally, and no cuDNN algorithms chosen by benchmarking.

    If float32 is not measured, cuDNN may benchmark its algorithms, as in timm's validation.
    """
    # not torch.backends.fp32_precision: torch.export and the compiler would then fail to read these
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision('highest')
    torch.backends.cudnn.benchmark = 'float32' not in precisions


# -- before the pass ---------------------------------------------------------------------------------------------------

def plan(data: DataSplit, loaded: LoadedModel, config: EvalConfig) -> Plan:
    """Match the classes, choose the images and settle the preprocessing."""
    num_classes = int(loaded.model.num_classes)  # type: ignore[arg-type]  # every model of timm has it
    match = match_classes(
        data.classes, loaded.wnids, loaded.names, num_classes, config.subset, sorted_names=data.sorted_names)
    targets = match.apply(data.labels)
    indices = np.flatnonzero(targets >= 0)
    if len(targets) and targets.max() >= num_classes:
        raise EvaluationError(f"The labels must be less than the model's number of classes, {num_classes}, got "
                              f'{targets.max()}. Check --data-dir, or take another model.')
    if not data.is_stream and not len(indices):
        raise EvaluationError(f'None of the {len(targets):,} images has a class of the model. Check --split: test sets '
                              f'are often published without labels.')
    if config.real_labels is not None:
        _check_real_labels(data, loaded, config)
    overrides = {'img_size': loaded.img_size, **{k: v for k, v in config.overrides.items() if v is not None}}
    try:
        preprocessing = resolve_data_config(overrides, model=loaded.model, use_test_size=True)
    except AssertionError:  # from timm
        raise EvaluationError('--mean and --std must have one number, or one for each channel of the images. Correct '
                              'them.') from None
    channels = int(getattr(loaded.model, 'in_chans', preprocessing['input_size'][0]))
    preprocessing['input_size'] = (channels, *preprocessing['input_size'][1:])
    if channels not in (1, 3):
        raise EvaluationError(f'The model must take images of one or three channels, got {loaded.name}, which takes '
                              f'{channels}. Measure it from Python.')
    return Plan(match, indices, targets[indices], with_channels(preprocessing, channels))


def _check_real_labels(data: DataSplit, loaded: LoadedModel, config: EvalConfig) -> None:
    if config.subset or loaded.wnids != tuple(ImageNetInfo('imagenet-1k').label_names()):
        raise EvaluationError(f"--real-labels needs all of ImageNet-1k's classes in their order, which {loaded.name} "
                              f'is not measured on. Leave it out.')
    names = [name.rpartition('/')[2] for name in data.names]
    if not names or not all(ILSVRC_FILE.fullmatch(name) for name in names):
        raise EvaluationError(f"--real-labels needs ILSVRC's validation images, named like "
                              f'ILSVRC2012_val_00000001.JPEG, got {names[0] if names else "images without names"}. '
                              f'Leave it out.')


class _RealLabels:
    """ReaL labels of this process's images, in their order, and counts of the predictions that are among them."""

    def __init__(self, names: list[str], file: str) -> None:
        count = len(ilsvrc_val_labels())
        try:
            every: Any = RealLabelsImagenet(range(count), file or None).real_labels
        except (OSError, ValueError, AssertionError) as error:
            raise EvaluationError(f'--real-labels must be a JSON list of {count:,} lists, got {file} '
                                  f"({error or 'another length'}). Leave out the name to use timm's own.") from None
        # timm's keys are the original names; copies on the Hub append the class
        self.labels = iter([every[name[:len('ILSVRC2012_val_00000001')] + '.JPEG'] for name in names])
        self.own = [0, 0, 0]  # in the order of `Counts`

    def add(self, scores: Tensor, targets: Tensor) -> None:
        """Count a batch. Unreadable images are left out: their scores are those of a blank image."""
        for answers, target in zip(scores.topk(5).indices.tolist(), targets.tolist(), strict=True):
            labels = next(self.labels)
            if labels and target != UNREADABLE:
                self.own[0] += 1
                self.own[1] += answers[0] in labels
                self.own[2] += any(answer in labels for answer in answers)

    def counts(self, device: torch.device) -> Counts:
        """The counts of all processes."""
        return Counts(*reduce_sum(torch.tensor(self.own, dtype=torch.int64, device=device)).tolist())


def _to_model_class(to_model: NDArray[np.int64], num_classes: int, label: int) -> int:
    """A stream's label as the model's class index."""
    if label == UNREADABLE:
        return label
    if not 0 <= label < (len(to_model) or num_classes):
        return OUT_OF_RANGE
    return int(to_model[label]) if len(to_model) else label


def _seed_worker(worker: Any) -> int:
    """Called by timm's loader in each worker; returns the worker's own seed, as timm expects."""
    init_worker(worker)
    return int(worker.seed)


def _make_loader(dataset: Any, plan: Plan, config: EvalConfig) -> Iterable[Batch]:
    """Batches as in timm's validation: its transform, its collation, its normalisation on the device."""
    loader: Any = create_loader(
        dataset, batch_size=config.batch_size, num_workers=config.workers, device=config.device,
        pin_memory=config.device.type == 'cuda', worker_seeding=_seed_worker,  # type: ignore[arg-type]
        persistent_workers=config.workers > 0,  # so that the pass does not include the time to stop them
        **plan.config)
    loader.loader = start_workers(loader.loader)  # torch's own, which is iterated once
    return cast(Iterable[Batch], loader)


@dataclass
class Forward:
    """A model's forward pass that halves the batch when memory runs out, and continues with the halves."""
    model: nn.Module  # gives scores of shape (batch, classes)
    tell: Callable[[str], None] = print  # called with a message when a batch is halved
    limit: int | None = None  # images at a time, once memory has run out

    def __call__(self, images: Tensor) -> Tensor:
        while True:
            size = min(self.limit or len(images), len(images))
            try:
                return torch.cat([self.model(part) for part in torch.split(images, size)])
            except Exception as error:  # a model may raise anything
                if not out_of_memory(error):
                    size_of = ' x '.join(map(str, images.shape[1:]))
                    raise ProcessError(f'The model cannot be run on images of {size_of} ({first_line(error)}). Check '
                                       f'--img-size and --model-kwargs.') from error
                if size == 1:
                    raise ProcessError('There is not enough memory for one image. Use a smaller --img-size, a lower '
                                       'precision or another device.') from None
            # outside the handler, where the failed attempt's tensors are freed
            self.limit = (size + 1) // 2
            if images.is_cuda:
                torch.cuda.empty_cache()
            self.tell(f'Not enough memory for {size} images at a time: going on with {self.limit}.')


# -- the pass ----------------------------------------------------------------------------------------------------------

def evaluate(data: DataSplit, loaded: LoadedModel, plan: Plan, config: EvalConfig) -> Evaluation:
    """Run a model on every image of the data set once; each process gets the results of all."""
    model: Any = loaded.model.to(config.device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if config.torchcompile:
        model = torch.compile(model, backend=config.torchcompile)
    share = slice(config.rank, None, config.world_size)
    dataset: Any = data.dataset if data.is_stream else SelectedImages(
        data.dataset, plan.indices[share], plan.targets[share])
    dataset.mode = 'RGB' if plan.config['input_size'][0] == 3 else 'L'  # as in timm's validation
    if data.is_stream:
        dataset.target_transform = functools.partial(
            _to_model_class, plan.match.to_model, int(loaded.model.num_classes))  # type: ignore[arg-type]
    loader = _make_loader(dataset, plan, config)
    real = None
    if config.real_labels is not None and not data.is_stream:
        real = _RealLabels([data.names[i].rpartition('/')[2] for i in dataset.indices], config.real_labels)
    total = len(plan.indices) or data.expected or None
    progress = Progress(loaded.name, total, tell=None if config.rank else tell_on_stderr)

    def after_batch(scores: Tensor, targets: Tensor) -> None:
        if real is not None:
            real.add(scores, targets)
        count = len(targets) * config.world_size  # assumes that the other processes are as far as this one
        progress.update(min(count, total - progress.done) if total else count)

    start = time.perf_counter()
    with progress:
        outcome = predict(Forward(model, config.tell), loader, config, None if data.is_stream else dataset.indices,
                          plan.match.competing, after_batch)
    seconds = time.perf_counter() - start
    steps = getattr(getattr(dataset, 'transform', None), 'transforms', ())
    return Evaluation(loaded, plan, outcome, real.counts(config.device) if real else None, tuple(map(repr, steps)),
                      seconds, _problems(data, plan, outcome))


def predict(
        forward: Callable[[Tensor], Tensor],
        loader: Iterable[Batch],
        config: EvalConfig,
        indices: NDArray[np.int64] | None = None,
        competing: Sequence[int] | None = None,
        after_batch: Callable[[Tensor, Tensor], None] | None = None,
) -> Pass:
    """Evaluate every batch in every precision.

    Args:
        forward: Maps images to scores.
        loader: This process's batches, on the device.
        config: Its `precisions` are run, 'float32' as it is, the others under autocast.
        indices: Index in the data set of each image from the loader, in its order; None for a stream.
        competing: Classes whose scores compete; None for all.
        after_batch: Called with the first precision's scores of each batch, and its targets.

    Returns:
        The predictions of all processes together, the same in each.
    """
    batches: list[Tensor] = []  # each of shape (1 + 3 * precisions, batch): targets, then `_answers` per precision
    largest = torch.zeros(len(config.precisions), device=config.device)
    with torch.inference_mode():
        for images, targets in loader:
            if config.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            scores = [_scores(forward, images, precision, competing) for precision in config.precisions]
            batches.append(torch.cat([targets[None].float(), *(_answers(own, targets) for own in scores)]))
            largest = torch.maximum(largest, torch.stack([_largest(own - scores[0], targets) for own in scores]))
            if after_batch is not None:
                after_batch(scores[0], targets)
    # only now: processes may have different numbers of batches, and one with fewer would keep the others waiting
    own = torch.cat(batches, 1).cpu().numpy().T if batches else np.empty((0, 1 + 3 * len(config.precisions)))
    place = np.full(len(own), -1) if indices is None else indices[:len(own)]
    rows = gather(np.column_stack([place, own.astype(np.float64)]))  # float64 holds indices exactly
    largest_of_all = gather(largest.cpu().numpy()[None]).max(0).tolist()
    return _read_rows(rows, dict(zip(config.precisions, largest_of_all, strict=True)))


def _read_rows(rows: NDArray[np.float64], largest: dict[str, float]) -> Pass:
    """Predictions from rows of index, target, and the three `_answers` in each precision."""
    rows = rows[np.argsort(rows[:, 0], kind='stable')]
    index, target = rows[:, 0].astype(np.int64), rows[:, 1].astype(np.int32)
    counted = target >= 0
    predictions = {}
    for number, precision in enumerate(largest):
        rank, predicted, confidence = rows[counted, 2 + 3 * number:5 + 3 * number].T
        predictions[precision] = Predictions(
            index[counted], target[counted], rank.astype(np.int32), predicted.astype(np.int32),
            confidence.astype(np.float32))
    return Pass(predictions, largest, index[target == UNREADABLE].tolist(), int((target == SKIPPED).sum()),
                int((target == OUT_OF_RANGE).sum()))


def _scores(
        forward: Callable[[Tensor], Tensor], images: Tensor, precision: str, competing: Sequence[int] | None) -> Tensor:
    """float32 scores; those of classes that do not compete are minus infinity."""
    lower = precision != 'float32'
    with torch.autocast(images.device.type, getattr(torch, precision)) if lower else nullcontext():
        scores = forward(images).float()
    if competing is not None:
        kept = torch.full_like(scores, -torch.inf)
        index = torch.as_tensor(competing, device=scores.device)
        scores = kept.index_copy(1, index, scores.index_select(1, index))
    return scores


def _answers(scores: Tensor, targets: Tensor) -> Tensor:
    """Rank of the target, predicted class and its probability, float32, shape (3, batch)."""
    confidence, predicted = scores.softmax(1).max(1)
    ranks = target_ranks(scores, targets.clamp(min=0))
    return torch.stack([ranks.float(), predicted.float(), confidence])  # float32 is exact up to 2 ** 24 classes


def _largest(difference: Tensor, targets: Tensor) -> Tensor:
    """The largest finite magnitude in the rows of counted images; the difference of two infinities is NaN."""
    counted = (targets >= 0)[:, None] & difference.isfinite()
    return difference.abs().where(counted, 0).max()


def _problems(data: DataSplit, plan: Plan, outcome: Pass) -> tuple[str, ...]:
    """Compare the images that were evaluated with those expected, and describe what is wrong."""
    if outcome.out_of_range:
        raise EvaluationError(f"Each label must be one of the model's classes, got {outcome.out_of_range} others. "
                              f'Check --dataset and --target-key, or take another model.')
    first = next(iter(outcome.predictions.values()))
    problems = []
    came = len(data.labels)
    if data.is_stream:
        came = len(first.index) + outcome.left_out + len(outcome.unreadable)
    else:
        seen = np.sort(np.concatenate([first.index, np.array(outcome.unreadable, dtype=np.int64)]))
        # a check of this module itself: no accuracy may rest on an image that was counted twice
        if not np.array_equal(seen, plan.indices):
            raise EvaluationError('Some images were evaluated twice or not at all. Please report this bug.')
    if data.expected not in (0, came):
        problems.append(f'The data must have {data.expected:,} images, got {came:,}. Some are missing, or the number '
                        f'is wrong.')
    if outcome.unreadable:
        total = came if data.is_stream else len(plan.indices)
        names = '' if data.is_stream else ': ' + ', '.join(data.name_of(index) for index in outcome.unreadable)
        problems.append(f'{len(outcome.unreadable)} of {total:,} images could not be decoded and were left out{names}.')
    for precision, predictions in outcome.predictions.items():
        if count := int(np.isnan(predictions.confidence).sum()):
            problems.append(f'{count:,} images have scores that are not finite in {precision}, and count as wrong. '
                            f'Check the weights and the preprocessing.')
    return tuple(problems)
