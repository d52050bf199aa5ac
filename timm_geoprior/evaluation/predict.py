"""One pass over the images, in one or several precisions at once."""
import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_loader
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data.datasets import EvalSet, take_shards
from ..data.workers import init_worker
from ..distributed import joined, reduce_sum
from ..errors import ProcessError
from .accuracy import Counts, target_ranks

__all__ = ['PRECISIONS', 'Forward', 'Pass', 'Predictions', 'Shard', 'gather', 'make_loader', 'predict', 'set_numerics']

PRECISIONS = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
SKIPPED, UNREADABLE, OUT_OF_RANGE = -1, -2, -3  # in place of a class index
Batch = tuple[Tensor, Tensor]
_Array = TypeVar('_Array', bound=NDArray[Any])


def set_numerics(precisions: Sequence[str]) -> None:
    """Make float32 strict: no TF32 or bfloat16 inside, and algorithms that are not chosen by a race.

    Where float32 is not measured, cuDNN may try its algorithms out, as in timm's validation.

    Args:
        precisions: What will be measured, of `PRECISIONS`.
    """
    # not torch.backends.fp32_precision: after that torch.export and the compiler fail to read these
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision('highest')
    torch.backends.cudnn.benchmark = 'float32' not in precisions


class Shard(Dataset[tuple[Any, int]]):
    """One process's images of an indexed data set: each once, none repeated to fill a batch.

    Process r of n takes every n-th image from the r-th on. timm's own dataset puts the next image in the place of one
    that cannot be read; here such an image is marked, so that it is counted as what it is.
    """

    def __init__(
            self,
            data: EvalSet,
            indices: NDArray[np.int64],
            targets: NDArray[np.int64],
            rank: int = 0,
            world_size: int = 1,
            img_mode: str = 'RGB',
    ) -> None:
        """
        Args:
            data: With an index.
            indices: The images to evaluate, shape (images,).
            targets: The model's class index of each, shape (images,).
            rank: This process.
            world_size: Number of processes.
            img_mode: Pillow's mode that the images are converted to.
        """
        self.dataset = data.dataset
        self.indices = indices[rank::world_size]
        self.targets = targets[rank::world_size]
        self.img_mode = img_mode
        self.transform: Callable[[Image.Image], Any] | None = None  # timm's create_loader sets it

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        assert self.transform is not None
        try:
            image, target = self._read(int(self.indices[position])), int(self.targets[position])
        except Exception:  # a decoder fed with damaged bytes may raise anything
            image, target = Image.new(self.img_mode, (8, 8)), UNREADABLE
        return self.transform(image), target

    def _read(self, index: int) -> Image.Image:
        reader = getattr(self.dataset, 'reader', None)
        if reader is None:  # torchvision's: they decode by themselves
            image: Image.Image = self.dataset[index][0]
            return image.convert(self.img_mode)
        with reader[index][0] as file, Image.open(file) as image:
            return image.convert(self.img_mode)


class _ToModelClass:
    """A stream's label as the model's class index."""

    def __init__(self, to_model: NDArray[np.int64], num_classes: int) -> None:
        self.to_model, self.num_classes = to_model, num_classes

    def __call__(self, label: int) -> int:
        if not 0 <= label < (len(self.to_model) or self.num_classes):
            return OUT_OF_RANGE
        return int(self.to_model[label]) if len(self.to_model) else label


def _seed_worker(worker: Any) -> int:
    """What timm's loader calls in each worker, whose own seed it wants back."""
    init_worker(worker)
    return int(worker.seed)


def make_loader(
        source: Shard | EvalSet,
        config: dict[str, Any],
        batch_size: int,
        workers: int,
        device: torch.device,
        to_model: NDArray[np.int64] | None = None,
        num_classes: int = 0,
        rank: int = 0,
        world_size: int = 1,
) -> Iterable[Batch]:
    """Batches as timm's validation makes them: its transform, its collation, its normalisation on the device.

    Args:
        source: One process's images, or a stream.
        config: timm's data configuration.
        batch_size: Images of a batch.
        workers: Processes that decode.
        device: Where the batches go.
        to_model: For a stream: the model's class index of each label, empty where the labels are that already.
        num_classes: For a stream: number of the model's classes.
        rank: For a stream: this process.
        world_size: For a stream: number of processes.

    Returns:
        Pairs of images, shape (batch, channels, height, width), and class indices, shape (batch,).
    """
    dataset: Any = source
    if isinstance(source, EvalSet):
        dataset = source.dataset
        dataset.target_transform = _ToModelClass(np.empty(0, np.int64) if to_model is None else to_model, num_classes)
        shards = take_shards(source, rank, world_size)
        if not shards:
            return ()
        workers = min(workers, shards)  # one without a shard has nothing to do
    elif not len(source):
        return ()
    loader: Iterable[Batch] = create_loader(  # workers that outlive the pass: the time of their end is not the pass's
        dataset, batch_size=batch_size, num_workers=workers, device=device, pin_memory=device.type == 'cuda',
        persistent_workers=workers > 0, worker_seeding=_seed_worker,  # type: ignore[arg-type]
        **config)
    return loader


class Forward:
    """A model's forward pass that halves the batch when memory runs out, and goes on with the halves."""

    def __init__(self, model: nn.Module, tell: Callable[[str], None] = print) -> None:
        """
        Args:
            model: Gives scores of shape (batch, classes).
            tell: Called with a sentence when a batch is halved.
        """
        self.model = model
        self.tell = tell
        self.limit: int | None = None

    def __call__(self, images: Tensor) -> Tensor:
        while True:
            size = min(self.limit or len(images), len(images))
            try:
                return torch.cat([self.model(part) for part in torch.split(images, size)])
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                if size == 1:
                    raise ProcessError('There is not enough memory for one image, expected some for a batch: take '
                                       'a smaller --img-size, a lower precision or another device.') from None
            # outside of the handler, where the failed attempt's tensors are free
            self.limit = (size + 1) // 2
            if images.is_cuda:
                torch.cuda.empty_cache()
            self.tell(f'Not enough memory for {size} images at a time: going on with {self.limit}.')


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or 'DefaultCPUAllocator' in str(error)


@dataclass(frozen=True)
class Predictions:
    """What was answered for each image, in the order of the data set where that has one.

    Attributes:
        index: Index in the data set, -1 in a stream, int64.
        target: The model's index of the true class, int32.
        rank: Place of the true class in the order of the scores, 0 for the first, int32.
        predicted: The class with the highest score, int32.
        confidence: Its softmax probability; NaN where a score is not finite, float32.
    """
    index: NDArray[np.int64]
    target: NDArray[np.int32]
    rank: NDArray[np.int32]
    predicted: NDArray[np.int32]
    confidence: NDArray[np.float32]

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether the first answer is right."""
        correct: NDArray[np.bool_] = self.rank == 0
        return correct


@dataclass
class Pass:
    """What came out of a pass over the data.

    Attributes:
        counts: By precision, summed as integers over all processes.
        predictions: By precision, from all processes.
        largest_difference: By precision: the largest difference of a score from the first precision's.
        unreadable: Index of each image that could not be decoded.
        left_out: Number of a stream's images whose class is not measured.
        out_of_range: Number of a stream's labels that the model has no class for.
    """
    counts: dict[str, Counts] = field(default_factory=dict)
    predictions: dict[str, Predictions] = field(default_factory=dict)
    largest_difference: dict[str, float] = field(default_factory=dict)
    unreadable: list[int] = field(default_factory=list)
    left_out: int = 0
    out_of_range: int = 0


def predict(
        forward: Callable[[Tensor], Tensor],
        loader: Iterable[Batch],
        precisions: Sequence[str],
        device: torch.device,
        indices: NDArray[np.int64] | None = None,
        competing: Sequence[int] | None = None,
        channels_last: bool = False,
        on_scores: Callable[[Tensor], None] | None = None,
        on_images: Callable[[int], None] | None = None,
) -> Pass:
    """Evaluate every batch in every precision.

    Args:
        forward: Images to scores.
        loader: This process's batches, on the device.
        precisions: Of `PRECISIONS`; 'float32' runs as it is, the others under autocast. The first is the reference.
        device: Of the batches.
        indices: Index in the data set of each image that the loader gives, in its order; None in a stream.
        competing: Classes whose scores compete; None for all.
        channels_last: Give the network images in that memory layout.
        on_scores: Called with the reference's scores of each batch.
        on_images: Called with the number of images of each batch, when it has been evaluated.

    Returns:
        Counts and predictions of all processes together, the same in each.
    """
    parts: dict[str, list[Tensor]] = {precision: [] for precision in precisions}
    difference = {precision: torch.zeros((), device=device) for precision in precisions}
    all_targets: list[Tensor] = []
    with torch.inference_mode():
        for images, targets in loader:
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            reference: Tensor | None = None
            for precision in precisions:
                scores = _scores(forward, images, precision, competing)
                parts[precision].append(_answers(scores, targets))
                if reference is None:
                    reference = scores
                    if on_scores is not None:
                        on_scores(scores)
                else:
                    difference[precision] = torch.maximum(difference[precision], _largest(scores - reference, targets))
            all_targets.append(targets)
            if on_images is not None:
                on_images(len(targets))
    return _collect(parts, difference, all_targets, indices, device)


def _scores(
        forward: Callable[[Tensor], Tensor],
        images: Tensor,
        precision: str,
        competing: Sequence[int] | None,
) -> Tensor:
    """float32 scores; a class that does not compete has minus infinity."""
    lower = torch.autocast(images.device.type, PRECISIONS[precision], enabled=precision != 'float32')
    with lower if precision != 'float32' else contextlib.nullcontext():
        scores = forward(images).float()
    if competing is not None:
        kept = torch.full_like(scores, -torch.inf)
        index = torch.as_tensor(competing, device=scores.device)
        scores = kept.index_copy(1, index, scores.index_select(1, index))
    return scores


def _answers(scores: Tensor, targets: Tensor) -> Tensor:
    """Rank of the target, predicted class and its probability, float64, shape (3, batch)."""
    confidence, predicted = scores.softmax(1).max(1)
    ranks = target_ranks(scores, targets.clamp(min=0))
    return torch.stack([ranks.double(), predicted.double(), confidence.double()])


def _largest(difference: Tensor, targets: Tensor) -> Tensor:
    """The largest finite magnitude in the rows of images that count."""
    counted = (targets >= 0)[:, None] & difference.isfinite()
    return difference.abs().where(counted, 0).max()


def _collect(
        parts: dict[str, list[Tensor]],
        difference: dict[str, Tensor],
        all_targets: list[Tensor],
        indices: NDArray[np.int64] | None,
        device: torch.device,
) -> Pass:
    """Bring the processes' shares together."""
    targets = torch.cat(all_targets).cpu().numpy() if all_targets else np.empty(0, np.int64)
    index = np.full(len(targets), -1) if indices is None else indices[:len(targets)]
    counted = targets >= 0
    result = Pass(unreadable=sorted(gather(index[targets == UNREADABLE]).tolist()))
    result.left_out = len(gather(index[targets == SKIPPED]))
    result.out_of_range = len(gather(index[targets == OUT_OF_RANGE]))
    everything = gather(index[counted])
    order = np.argsort(everything, kind='stable')
    everything_target = gather(targets[counted].astype(np.int32))[order]
    for precision, batches in parts.items():
        answers = torch.cat(batches, 1).cpu().numpy() if batches else np.empty((3, 0))
        rank, predicted, confidence = (gather(row[counted])[order] for row in answers)
        result.predictions[precision] = Predictions(
            everything[order], everything_target, rank.astype(np.int32), predicted.astype(np.int32),
            confidence.astype(np.float32))
        own = [counted.sum(), (answers[0][counted] < 1).sum(), (answers[0][counted] < 5).sum()]
        result.counts[precision] = Counts(*reduce_sum(torch.tensor(own, dtype=torch.int64, device=device)).tolist())
        result.largest_difference[precision] = float(gather(np.array([difference[precision].item()])).max())
    return result


def gather(own: _Array) -> _Array:
    """The arrays of all processes, one after the other."""
    if not joined():
        return own
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return cast(_Array, np.concatenate(gathered))
