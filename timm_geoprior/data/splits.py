"""The splits of a data set's folder, and training images kept out of training to choose recipes and checkpoints by."""
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from .batches import generator

__all__ = ['SPLITS', 'folders_of_split', 'hold_out', 'names_of_split']

SPLITS = {
    'train': ('train', 'training'),
    'val': ('val', 'valid', 'validation', 'dev', 'eval', 'evaluation'),
    'test': ('test', 'testing'),
}


def folders_of_split(folder: Path, split: str) -> list[str]:
    """Find the folders that a split may mean: of that very name first, then of its other names, in any case."""
    return names_of_split([entry.name for entry in os.scandir(folder) if entry.is_dir()], split)


def names_of_split(names: Iterable[str], split: str) -> list[str]:
    """Which of some folders' names a split may mean, as `folders_of_split` has it."""
    meaning = next((words for words in SPLITS.values() if split.lower() in words), (split.lower(),))
    return sorted((name for name in names if name.lower() in meaning), key=lambda name: (
        name != split, name.lower() != split.lower(), meaning.index(name.lower()), name))


def hold_out(targets: torch.Tensor, amount: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw images of each class to hold out. The same images are drawn each time, whatever the seed of a run.

    Args:
        targets: Class of each image, shape (N,).
        amount: A number of images of each class, 0 for none, or a share below 1 of them, rounded, of which at least
            one is held out and one stays.

    Returns:
        Indices that stay in training, and indices held out, both ascending.

    Raises:
        ValueError: A class has no more images than would be held out.
    """
    held = torch.zeros(len(targets), dtype=torch.bool)
    for target in targets.unique().tolist() if amount else ():
        members = (targets == target).nonzero().flatten()
        images = len(members)
        wanted = int(amount) if amount >= 1 else max(min(round(amount * images), images - 1), 1)
        if wanted >= images:
            raise ValueError(f'Class {target} must have more than {wanted} images to hold out {wanted}, got {images}. '
                             f'Add images, or lower the recipe key holdout.')
        # drawn, since names are rarely in random order: the last ones may be of one breed, or one camera
        order = torch.randperm(images, generator=generator('holdout', target))
        held[members[order[:wanted]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()
