"""Training images kept out of training, to choose recipes and checkpoints by."""

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
    held = torch.zeros(len(targets), dtype=torch.bool)
    for target in targets.unique().tolist():
        members = (targets == target).nonzero().flatten()
        if per_class >= len(members):
            raise ValueError(f'Class {target} has {len(members)} images, more than {per_class} are needed to hold out '
                             f'{per_class}: lower the recipe key holdout.')
        held[members[len(members) - per_class:]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def hold_out_share(targets: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Split off the last images of each class, a share of them, rounded; at least one is held out and one stays.

    Args:
        targets: Class of each image, shape (N,).
        share: Between 0 and 1.

    Returns:
        Indices that stay in training, and indices held out, both ascending.

    Raises:
        ValueError: A class has one image.
    """
    held = torch.zeros(len(targets), dtype=torch.bool)
    for target in targets.unique().tolist():
        members = (targets == target).nonzero().flatten()
        if len(members) < 2:
            raise ValueError(f'Class {target} has one image, expected at least 2 to hold one out: add some.')
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        held[members[len(members) - count:]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()
