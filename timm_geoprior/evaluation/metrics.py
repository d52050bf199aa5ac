"""Metrics computed from scores: counts, intervals, calibration, accuracy per class, confusions."""
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..distributed import reduce_sum

NO_RANK = 2 ** 20  # exact in float32


class Counts(NamedTuple):
    """Numbers of images: all, those whose class has the highest score, and those with it among the top five."""
    num_images: int
    top1_correct: int
    top5_correct: int


def target_ranks(logits: Tensor, targets: Tensor) -> Tensor:
    """The rank of each target among the scores of its row, 0 for the highest.

    Of equal scores, the lower class index ranks first, on every device and in every precision (`topk` leaves the order
    of equal scores undefined). No target is right in a row whose highest score is not finite, which has no softmax: its
    rank is `NO_RANK`. A score of -inf, of a class that is left out, ranks last.

    Args:
        logits: Scores, shape (batch, classes).
        targets: Class indices, shape (batch,).

    Returns:
        int64, shape (batch,), below the number of classes, or NO_RANK.
    """
    own = logits.gather(1, targets[:, None])
    before = torch.arange(logits.shape[1], device=logits.device) < targets[:, None]
    ranks = ((logits > own) | ((logits == own) & before)).sum(1)
    return ranks.masked_fill(~logits.amax(1).isfinite(), NO_RANK)  # the maximum of a row with a NaN is NaN


def count_correct(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Counts:
    """Count a model's correct predictions over this process's batches, summed over all processes.

    The sum is right if every image is in the batches of exactly one process; processes may have different numbers of
    batches, or none. For a lower precision, call this under `torch.autocast`.

    Args:
        model: Returns logits of shape (batch, classes). It must not be wrapped in DistributedDataParallel, since
            processes may have different numbers of batches. It runs in eval mode; each module's mode is restored.
        batches: Pairs of images and class indices (batch,), on the model's device.

    Returns:
        The counts, the same in every process. With five classes or fewer, every image with finite scores counts as
        correct in the top five.
    """
    counts = torch.zeros(3, dtype=torch.int64, device=next(model.parameters()).device)
    modes = [(module, module.training) for module in model.modules()]  # frozen norms may be in eval mode already
    model.eval()
    try:
        with torch.inference_mode():
            for images, targets in batches:
                ranks = target_ranks(model(images), targets)
                counts[0] += len(targets)
                counts[1] += (ranks < 1).sum()
                counts[2] += (ranks < 5).sum()
    finally:
        for module, training in modes:
            module.training = training
    return Counts(*reduce_sum(counts).tolist())


@dataclass(frozen=True)
class Predictions:
    """The predictions for each image, in the order of the data set if it has one."""
    index: NDArray[np.int64]  # in the data set, -1 in a stream
    target: NDArray[np.int32]  # the model's index of the true class
    rank: NDArray[np.int32]  # rank of the true class among the scores, 0 for the highest
    predicted: NDArray[np.int32]  # the class with the highest score
    confidence: NDArray[np.float32]  # its softmax probability; NaN where a score is not finite

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether the top-1 prediction is correct."""
        correct: NDArray[np.bool_] = self.rank == 0
        return correct

    @property
    def confused(self) -> NDArray[np.bool_]:
        """Whether another class has the highest score; False where a score is not finite."""
        confused: NDArray[np.bool_] = ~self.correct & ~np.isnan(self.confidence)
        return confused

    @property
    def counts(self) -> Counts:
        """The counts, as from `count_correct`."""
        return Counts(len(self.rank), int(self.correct.sum()), int((self.rank < 5).sum()))


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a share, from 0 to 1 (Wilson, 1927; Brown, Cai and DasGupta, 2001)."""
    from scipy.stats import binomtest  # an extra, and slow to import

    if not total:
        return 0.0, 1.0
    low, high = binomtest(correct, total).proportion_ci(0.95, method='wilson')
    return float(low), float(high)


@dataclass(frozen=True)
class Calibration:
    """Confidence compared with accuracy, by bins of confidence."""
    edges: NDArray[np.float64]  # of the bins, shape (bins + 1,)
    counts: NDArray[np.int64]  # images in each bin, shape (bins,)
    accuracy: NDArray[np.float64]  # share of correct predictions in each bin; NaN if it is empty
    confidence: NDArray[np.float64]  # mean confidence in each bin; NaN if it is empty
    error: float  # expected calibration error, from 0 to 1; NaN without images


def calibrate(predictions: Predictions, bins: int = 15) -> Calibration:
    """Expected calibration error of the top-1 predictions, in bins of equal width (Guo et al., 2017, section 2).

    Args:
        predictions: Those whose confidence is NaN are left out.
        bins: Number of bins; each includes its upper edge.

    Returns:
        The bins and the error.
    """
    finite = ~np.isnan(predictions.confidence)
    confidence = predictions.confidence[finite].astype(np.float64)
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side='left') - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    with np.errstate(invalid='ignore'):
        accuracy = np.bincount(place, predictions.correct[finite], bins) / counts
        mean = np.bincount(place, confidence, bins) / counts
    error = float(np.nansum(np.abs(accuracy - mean) * counts) / len(confidence)) if len(confidence) else math.nan
    return Calibration(edges, counts, accuracy, mean, error)


def per_class(predictions: Predictions, wnids: Sequence[str], names: Sequence[str]) -> list[dict[str, Any]]:
    """Accuracy of each class that has images.

    Args:
        predictions: Of all images.
        wnids: WordNet id of each class; may be empty.
        names: Readable name of each class; may be empty.

    Returns:
        A row for each class, in class order: `class`, `wnid`, `name`, `num_images`, `top1_correct`, `top5_correct`,
        `top1` and the ends of its 95% interval in percent, and `most_often_taken_for`, the most frequent wrong answer.
    """
    rows = []
    for index in np.unique(predictions.target):
        own = predictions.target == index
        wrong = predictions.predicted[own & predictions.confused]
        count, top1 = int(own.sum()), int(predictions.correct[own].sum())
        low, high = wilson_interval(top1, count)
        rows.append({
            'class': int(index), 'wnid': _label(wnids, index), 'name': _label(names, index), 'num_images': count,
            'top1_correct': top1, 'top5_correct': int((predictions.rank[own] < 5).sum()),
            'top1': round(100 * top1 / count, 4), 'top1_low': round(100 * low, 4), 'top1_high': round(100 * high, 4),
            'most_often_taken_for': _describe(int(np.bincount(wrong).argmax()), wnids, names) if len(wrong) else '',
        })
    return rows


def confused_pairs(
        predictions: Predictions, wnids: Sequence[str], names: Sequence[str], limit: int = 100) -> list[dict[str, Any]]:
    """The most frequent confusions of two classes.

    Args:
        predictions: Of all images.
        wnids: WordNet id of each class; may be empty.
        names: Readable name of each class; may be empty.
        limit: Maximum number of rows.

    Returns:
        A row for each pair of true and predicted class, the most frequent first: index, `wnid` and `name` of both,
        `count`, and `share` of the true class's images in percent.
    """
    wrong = predictions.confused
    pairs, counts = np.unique(
        np.stack([predictions.target[wrong], predictions.predicted[wrong]], 1), axis=0, return_counts=True)
    totals = np.bincount(predictions.target)
    order = np.argsort(-counts, kind='stable')[:limit]  # stable: of equal counts, the lower classes first
    return [{
        'class': int(true), 'wnid': _label(wnids, true), 'name': _label(names, true),
        'predicted_class': int(predicted), 'predicted_wnid': _label(wnids, predicted),
        'predicted_name': _label(names, predicted), 'count': int(count), 'share': round(100 * count / totals[true], 4),
    } for (true, predicted), count in zip(pairs[order], counts[order], strict=True)]


def _label(labels: Sequence[str], index: int) -> str:
    return labels[index] if labels else ''


def _describe(index: int, wnids: Sequence[str], names: Sequence[str]) -> str:
    """The readable name, else the WordNet id, else the index."""
    return _label(names, index) or _label(wnids, index) or str(index)
