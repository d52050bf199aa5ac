"""Training images kept out of training, to choose recipes and checkpoints by."""
from collections.abc import Callable

import torch

__all__ = ['hold_out', 'hold_out_share']


def hold_out(targets: torch.Tensor, per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split off the last images of each class, in the data set's order (file names, sorted).

    Args:
        targets: Class of each image, shape (N,).
        per_class: Images of each class to hold out.

    Returns:
        Indices that stay in training, and indices held out, both ascending.

    Raises:
        ValueError: A class has no more images than would be held out.
    """
    def count(target: int, images: int) -> int:
        if per_class >= images:
            raise ValueError(f'Class {target} has {images} images, more than {per_class} are needed to hold out '
                             f'{per_class}: lower the recipe key holdout.')
        return per_class

    return _split_off(targets, count)


def hold_out_share(targets: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Split off the last images of each class, a share of them, rounded; at least one is held out and one stays.

    Args:
        targets: Class of each image, shape (N,).
        share: Between 0 and 1.

    Returns:
        As `hold_out`.

    Raises:
        ValueError: A class has one image.
    """
    def count(target: int, images: int) -> int:
        if images < 2:
            raise ValueError(f'Class {target} has one image, expected at least 2 to hold one out: add some.')
        return min(max(round(share * images), 1), images - 1)

    return _split_off(targets, count)


def _split_off(targets: torch.Tensor, count: Callable[[int, int], int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hold out the last `count(class, its images)` images of each class."""
    held = torch.zeros(len(targets), dtype=torch.bool)
    for target in targets.unique().tolist():
        members = (targets == target).nonzero().flatten()
        held[members[len(members) - count(target, len(members)):]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()
