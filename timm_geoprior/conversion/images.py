"""The images that a conversion is fitted to, and the held-out images that it is measured on."""
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data import create_transform
from torch import Tensor

from ..data.batches import generator
from ..data.dataset import DataSplit, SelectedImages, open_split
from ..data.listing import DataOptions
from ..errors import EvaluationError, GeoPriorError
from ..files import first_sentence

MIN_IMAGES = 10  # images, two of which are held out
HELD_OUT, MAX_HELD_OUT = 1 / 5, 1000


@dataclass(frozen=True)
class ImageSets:
    """Images of a folder, drawn at random."""
    data: DataSplit  # the folder as timm reads it
    fit: NDArray[np.int64]  # indices of the images to fit to, shape (images,)
    held_out: NDArray[np.int64]  # indices of the images to measure on
    unreadable: set[str] = field(default_factory=set)  # names of images that could not be read


def draw_images(folder: Path, limit: int) -> ImageSets:
    """Find a folder's images, at any depth, and draw those to fit to and those to hold out.

    At most `limit` images are fitted to. A fifth of the folder's images are held out, at most 1,000.
    """
    if limit < MIN_IMAGES:
        raise GeoPriorError(f'--limit must be at least {MIN_IMAGES}, got {limit}.')
    if not os.access(folder, os.R_OK):
        fault = 'cannot be read' if os.path.exists(folder) else 'does not exist'
        raise GeoPriorError(f'--images must be a folder of images, got {folder}, which {fault}. Check its name.')
    try:
        data = open_split(folder, '', options=DataOptions(labelled=False))
    except EvaluationError as error:  # without its advice, which is meant for `validate`
        raise _too_few(folder, f'none ({first_sentence(error)})') from None
    count = len(data.labels)
    if count < MIN_IMAGES:
        raise _too_few(folder, str(count))
    order = torch.randperm(count, generator=generator(0, 'conversion')).numpy()
    held_out = min(round(HELD_OUT * count), MAX_HELD_OUT)
    return ImageSets(data, order[held_out:][:limit], order[:held_out])


def _too_few(folder: Path, found: str) -> GeoPriorError:
    return GeoPriorError(f'{folder} must hold at least {MIN_IMAGES} images, got {found}. Add some, name another '
                         f'folder or uncompressed .tar, or leave out --images for the closed form.')


@dataclass(frozen=True)
class PreparedImages:
    """Batches of images preprocessed for a network, decoded on demand."""
    sets: ImageSets  # the folder
    indices: NDArray[np.int64]  # the images, shape (images,)
    config: dict[str, Any]  # timm's data config for the network
    batch_size: int  # largest number of images in a batch
    workers: int = 0  # worker processes for decoding

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images, (N, C, H, W), and labels, (N,), of each batch, without unreadable images: at most half."""
        channels, data = self.config['input_size'][0], self.sets.data
        images = SelectedImages(
            data.dataset, self.indices, data.labels[self.indices], create_transform(**self.config),
            'L' if channels == 1 else 'RGB')
        unreadable = 0
        for batch, labels, bad in images.batches(self.batch_size, self.workers):
            names = [data.name_of(index) for index in bad]
            unreadable += len(names)
            self.sets.unreadable.update(names)
            if 2 * unreadable > len(self.indices):
                raise GeoPriorError(f'Most images must be readable, got {unreadable} of {len(self.indices)} that are '
                                    f'not, such as {names[0]}. Check the folder.')
            if len(labels):
                yield batch, labels
