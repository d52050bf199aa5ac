"""The splits of a data set's folder, and training images kept out of training to choose recipes and checkpoints by."""
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from .batches import generator

__all__ = ['SPLITS', 'folders_of_split', 'hold_out', 'hold_out_share', 'names_of_split']

SPLITS = {
    'train': ('train', 'training'),
    'val': ('val', 'valid', 'validation', 'dev', 'eval', 'evaluation'),
    'test': ('test', 'testing'),
}


def folders_of_split(folder: Path, split: str) -> list[str]:
    """Find the folders that a split may mean: of that very name first, then of its other names, in any case.

    Args:
        folder: The data set's.
        split: Name of the split, such as 'train', 'validation' or one of the data set's own.
    """
    return names_of_split([entry.name for entry in os.scandir(folder) if entry.is_dir()], split)


def names_of_split(names: Iterable[str], split: str) -> list[str]:
    """Which of some folders' names a split may mean, as `folders_of_split` has it."""
    meaning = next((words for words in SPLITS.values() if split.lower() in words), (split.lower(),))
    return sorted((name for name in names if name.lower() in meaning), key=lambda name: (
        name != split, name.lower() != split.lower(), meaning.index(name.lower()), name))


def hold_out(targets: torch.Tensor, per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw images of each class to hold out. The same images are drawn each time, whatever the seed of a run.

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
            raise ValueError(f'Class {target} must have more than {per_class} images to hold out {per_class}, got '
                             f'{images}. Lower the recipe key holdout.')
        return per_class

    return _split_off(targets, count)


def hold_out_share(targets: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a share of the images of each class, rounded; at least one is held out and one stays.

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
            raise ValueError(f'Class {target} must have at least 2 images to hold one out, got one. Add some.')
        return min(max(round(share * images), 1), images - 1)

    return _split_off(targets, count)


def _split_off(targets: torch.Tensor, count: Callable[[int, int], int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hold out `count(class, its images)` images of each class."""
    held = torch.zeros(len(targets), dtype=torch.bool)
    for target in targets.unique().tolist():
        members = (targets == target).nonzero().flatten()
        # drawn, since names are rarely in random order: the last ones may be of one breed, or one camera
        order = torch.randperm(len(members), generator=generator('holdout', target))
        held[members[order[:count(target, len(members))]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()
