"""Measured against claimed."""
from collections.abc import Mapping

from ..errors import EvaluationError
from ..pretrained.manifest import Metric, ModelEntry
from .accuracy import Counts

__all__ = ['deviations', 'find_metric']


def find_metric(entry: ModelEntry, precision: str, img_size: int, num_images: int | None) -> Metric:
    """The manifest's figure that a measurement can be held against.

    Args:
        entry: The tag's.
        precision: Of the measurement.
        img_size: Side of its images in pixels.
        num_images: Number of its images; None where that is not known before.

    Returns:
        The figure.

    Raises:
        EvaluationError: The manifest has no figure for that; the message says which it has.
    """
    if not entry.metrics:
        raise EvaluationError(f'The manifest has no figure for {entry.name}, expected one to check against: leave '
                              f'--check out, or take a tag that has one.')
    fitting = [m for m in entry.metrics if (m.precision, m.img_size) == (precision, img_size)]
    if not fitting:
        known = ', '.join(sorted({f'{m.precision} at {m.img_size} px' for m in entry.metrics}))
        raise EvaluationError(f'The manifest has no figure of {entry.name} for {precision} at {img_size} px, expected '
                              f'{known}: measure that.')
    for metric in fitting:
        if num_images in (None, metric.num_images):
            return metric
    known = ', '.join(f'{m.dataset} {m.split} with {m.num_images:,} images' for m in fitting)
    raise EvaluationError(f'These are {num_images:,} images, not the set that the figure of {entry.name} in the '
                          f'manifest is for, expected {known}: check --data-dir and --split.')


def deviations(metric: Metric, counts: Counts) -> Mapping[str, float]:
    """How far a measurement is from the manifest's figure, in points: measured minus claimed.

    Args:
        metric: The manifest's.
        counts: The measured ones.

    Returns:
        By 'top-1' and 'top-5'.
    """
    return {'top-1': 100 * counts.top1_correct / counts.num_images - metric.top1,
            'top-5': 100 * counts.top5_correct / counts.num_images - metric.top5}
