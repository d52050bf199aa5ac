"""What is read off the predictions: intervals, calibration, classes, confusions."""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .predict import Predictions

__all__ = ['Calibration', 'calibrate', 'confused_pairs', 'per_class', 'wilson_interval']


def wilson_interval(correct: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson, 1927; Brown, Cai and DasGupta, 2001).

    Args:
        correct: Number of successes.
        total: Number of trials.
        level: How often such an interval holds the true share.

    Returns:
        Its ends, from 0 to 1; both ends of that range where there were no trials.
    """
    if not total:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = correct / total
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    scale = 1 + z * z / total
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


@dataclass(frozen=True)
class Calibration:
    """How far confidence and accuracy are apart, by bins of confidence.

    Attributes:
        edges: Of the bins, shape (bins + 1,).
        counts: Images in each bin, shape (bins,).
        accuracy: Share of right answers in each bin; NaN where it is empty.
        confidence: Mean confidence in each bin; NaN where it is empty.
        error: Expected calibration error, from 0 to 1; NaN without images.
    """
    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    accuracy: NDArray[np.float64]
    confidence: NDArray[np.float64]
    error: float


def calibrate(predictions: Predictions, bins: int = 15) -> Calibration:
    """Expected calibration error of the first answers in bins of equal width (Guo et al., 2017, section 2).

    Args:
        predictions: Those whose confidence is NaN are left out.
        bins: Number of bins; the upper edge belongs to a bin.

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
        wnids: WordNet id of each class, or nothing.
        names: Readable name of each class, or nothing.

    Returns:
        A row a class, in class order: `class`, `wnid`, `name`, `num_images`, `top1_correct`, `top5_correct`, `top1`
        and the ends of its 95% interval in percent, and `most_often_taken_for`, the most frequent wrong answer.
    """
    rows = []
    for index in np.unique(predictions.target):
        own = predictions.target == index
        wrong = predictions.predicted[own & ~predictions.correct]
        count, top1, top5 = int(own.sum()), int(predictions.correct[own].sum()), int((predictions.rank[own] < 5).sum())
        low, high = wilson_interval(top1, count)
        rows.append({
            'class': int(index), 'wnid': _label(wnids, index), 'name': _label(names, index),
            'num_images': count, 'top1_correct': top1, 'top5_correct': top5, 'top1': round(100 * top1 / count, 4),
            'top1_low': round(100 * low, 4), 'top1_high': round(100 * high, 4),
            'most_often_taken_for': _describe(int(np.bincount(wrong).argmax()), wnids, names) if len(wrong) else '',
        })
    return rows


def confused_pairs(
        predictions: Predictions, wnids: Sequence[str], names: Sequence[str], limit: int = 100) -> list[dict[str, Any]]:
    """The pairs of classes that are taken for each other most often.

    Args:
        predictions: Of all images.
        wnids: WordNet id of each class, or nothing.
        names: Readable name of each class, or nothing.
        limit: Rows at most.

    Returns:
        A row a pair of true and predicted class, the most frequent first: index, `wnid` and `name` of both, `count`,
        and `share` of the true class's images in percent.
    """
    wrong = ~predictions.correct
    pairs, counts = np.unique(
        np.stack([predictions.target[wrong], predictions.predicted[wrong]], 1), axis=0, return_counts=True)
    totals = np.bincount(predictions.target) if len(predictions.target) else np.empty(0)
    return [{
        'class': int(true), 'wnid': _label(wnids, true), 'name': _label(names, true),
        'predicted_class': int(predicted), 'predicted_wnid': _label(wnids, predicted),
        'predicted_name': _label(names, predicted), 'count': int(count), 'share': round(100 * count / totals[true], 4),
    } for (true, predicted), count in ((pairs[i], counts[i]) for i in np.argsort(-counts, kind='stable')[:limit])]


def _label(labels: Sequence[str], index: int) -> str:
    return labels[index] if labels else ''


def _describe(index: int, wnids: Sequence[str], names: Sequence[str]) -> str:
    """The readable name, else the WordNet id, else the index."""
    return _label(names, index) or _label(wnids, index) or str(index)
