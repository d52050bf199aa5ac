"""Top-1 and top-5 as whole counts."""
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed import reduce_sum

__all__ = ['Counts', 'count_correct', 'target_ranks']


class Counts(NamedTuple):
    """How many images were seen, and of how many the class was the first, or among the first five."""
    num_images: int
    top1_correct: int
    top5_correct: int


def target_ranks(logits: Tensor, targets: Tensor) -> Tensor:
    """The place of each target in its row's order, 0 for the first.

    Of equal scores the lower class index stands first, on every device and in every precision (`topk` leaves the order
    of equal scores open). A NaN stands before every number, and a target whose own score is NaN behind all classes: a
    network that gives NaN is not right by chance.

    Args:
        logits: Scores, shape (batch, classes).
        targets: Class indices, shape (batch,).

    Returns:
        int64, shape (batch,), 0 to the number of classes.
    """
    own = logits.gather(1, targets[:, None])
    before = torch.arange(logits.shape[1], device=logits.device) < targets[:, None]
    return (~(logits <= own) | ((logits == own) & before)).sum(1)


def count_correct(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Counts:
    """Count a model's correct answers over this process's batches, summed over all processes.

    The sum is right if every image is in one process's batches once; processes may have different numbers of them, or
    none. Precision is the caller's: call it under `torch.autocast` for a lower one.

    Args:
        model: Gives logits of shape (batch, classes); evaluated in eval mode, each module left in the mode it was in.
        batches: Pairs of images and class indices (batch,), on the model's device.

    Returns:
        The counts, the same in every process. With five classes or fewer, every image counts for the top five.
    """
    if isinstance(model, DistributedDataParallel):  # its forward waits for every process: they may have fewer batches
        model = model.module
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
