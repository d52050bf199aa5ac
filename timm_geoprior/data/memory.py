"""A set of small images, held in memory as uint8 and augmented in batches.

Decoding the same JPEG files every epoch takes most of the time on a few cores, and all of it on a GPU. Here crop, flip
and resize are one sampling of the batch (`torch.nn.functional.grid_sample`), on whatever device the images are.
"""
import functools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..progress import Progress, tell_on_stderr
from .batches import LoaderConfig, generator, map_in_workers
from .reading import CorruptImages, Tell, read_readable, tell_of_rotations


@dataclass(frozen=True)
class ImageTensors:
    """Images of one size with their targets."""
    images: torch.Tensor  # uint8, shape (N, 3, H, W)
    targets: torch.Tensor  # class indices, -1 for an image that could not be read, int64, shape (N,)

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> 'ImageTensors':
        """The same set on another device."""
        return ImageTensors(self.images.to(device), self.targets.to(device))

    def subset(self, indices: torch.Tensor) -> 'ImageTensors':
        """The images at these indices."""
        indices = indices.to(self.images.device)
        return ImageTensors(self.images[indices], self.targets[indices])

    def readable(self, indices: torch.Tensor | None = None) -> 'ImageTensors':
        """The images at these indices, or all, without those that could not be read."""
        read = (self.targets >= 0).cpu()
        if indices is None:
            return self if read.all() else self.subset(read.nonzero()[:, 0])
        return self.subset(indices[read[indices]])


def _decode(dataset: Any, size: int, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor, list[int], int]:
    """Images as uint8, (N, 3, size, size), targets, what `CorruptImages.note` takes, and count of ignored rotations."""
    items = [read_readable(dataset, index) for index in indices]
    images = [item.image if item.image.size == (size, size) else  # already that size
              item.image.resize((size, size), Image.Resampling.BICUBIC) for item in items]
    targets = torch.tensor([item.target if item.replaced < 0 else -1 for item in items])
    return (torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2), targets,
            [item.replaced for item in items], sum(item.rotation_ignored for item in items))


def decode_images(
        dataset: Any, size: int, workers: int = 2, max_corrupt: int = 10,
        tell: Tell | None = warnings.warn) -> ImageTensors:
    """Decode a data set once.

    Args:
        dataset: One of timm's data sets, with a reader that has an index.
        size: Side of the square images, in pixels; images of another size are resized to it.
        workers: Number of processes that decode.
        max_corrupt: Number of unreadable images that are tolerated; the target of each is -1.
        tell: Called with each message for the user; None also shows no progress.

    Returns:
        The images in the data set's order.

    Raises:
        CorruptImagesError: More than `max_corrupt` images could not be read.
    """
    corrupt = CorruptImages(dataset, max_corrupt, tell or str)
    images = torch.empty(len(dataset), 3, size, size, dtype=torch.uint8)
    targets = torch.empty(len(dataset), dtype=torch.int64)
    ignored = 0
    with Progress('decoding', len(dataset), tell=tell and tell_on_stderr) as progress:
        decode = functools.partial(_decode, dataset, size)
        for batch, labels, bad, ignored_here in map_in_workers(decode, range(len(dataset)), 500, workers):
            corrupt.note(bad)
            place = slice(progress.done, progress.done + len(batch))
            images[place], targets[place] = batch, labels
            ignored += ignored_here
            progress.update(len(batch))
    tell_of_rotations(ignored, tell or str)
    return ImageTensors(images, targets)


@dataclass(frozen=True)
class CropFlip:
    """Random resized crop and horizontal flip as one affine sampling of a batch.

    The aspect ratio is drawn log-uniformly, as torchvision's RandomResizedCrop does; a side longer than the image's
    is cut to it.
    """
    scale: tuple[float, float] = (0.35, 1.0)  # smallest and largest share of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # smallest and largest aspect ratio
    hflip: float = 0.5  # probability of a flip

    num_draws = 5

    def matrices(self, draws: torch.Tensor) -> torch.Tensor:
        """Affine matrices for `affine_grid`, shape (B, 2, 3), from uniform draws, shape (B, 5)."""
        area = self.scale[0] + (self.scale[1] - self.scale[0]) * draws[:, 0]
        log_ratio = math.log(self.ratio[0]) + math.log(self.ratio[1] / self.ratio[0]) * draws[:, 1]
        width = (area * log_ratio.exp()).sqrt().clamp(max=1.0)
        height = (area / log_ratio.exp()).sqrt().clamp(max=1.0)
        center_x = (1 - width) * (2 * draws[:, 2] - 1)
        center_y = (1 - height) * (2 * draws[:, 3] - 1)
        flip = torch.where(draws[:, 4] < self.hflip, -1.0, 1.0)
        zero = torch.zeros_like(width)
        rows = [torch.stack([flip * width, zero, center_x], 1), torch.stack([zero, height, center_y], 1)]
        return torch.stack(rows, 1)

    def __call__(self, images: torch.Tensor, draws: torch.Tensor, size: int) -> torch.Tensor:
        """Sample float images (B, 3, H, W) at `size` x `size`, one crop and flip for each row of draws."""
        grid = F.affine_grid(self.matrices(draws), [len(images), 3, size, size], align_corners=False)
        return F.grid_sample(images, grid, mode='bilinear', padding_mode='reflection', align_corners=False)


class MemoryLoader:
    """Shuffled, augmented, normalised batches of an `ImageTensors`.

    Order and augmentation of an image depend on the seed, the epoch and its index alone, whatever the batch size and
    the number of processes: each process takes every `world_size`-th image of the same order.
    """

    def __init__(
            self,
            data: ImageTensors,
            mean: tuple[float, ...],
            std: tuple[float, ...],
            augment: CropFlip,
            config: LoaderConfig,
    ) -> None:
        """
        Args:
            data: The set.
            mean: Mean of each channel, for images from 0 to 1.
            std: Standard deviation of each channel.
            augment: Crop and flip.
            config: Batch size, seed and rank; the batches are on the set's device.
        """
        self.data, self.augment, self.config = data, augment, config
        device = data.images.device
        self.mean = 255 * torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.std = 255 * torch.tensor(std, device=device).view(1, -1, 1, 1)

    def __len__(self) -> int:
        return len(self.data) // (self.config.batch_size * self.config.world_size)

    def epoch(self, epoch: int, size: int, first_batch: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of one epoch.

        Args:
            epoch: Number of the epoch, from 0.
            size: Side of the images, in pixels.
            first_batch: Number of batches to skip, for a run that resumes in mid-epoch.

        Yields:
            Images, float32, (batch_size, 3, size, size), and targets, (batch_size,).
        """
        device, batch_size, world_size = self.data.images.device, self.config.batch_size, self.config.world_size
        # every process draws for all images: the same numbers, whatever its share and the batch size
        order = torch.randperm(len(self.data), generator=generator(self.config.seed, 'order', epoch))
        draws = torch.rand(len(self.data), CropFlip.num_draws, generator=generator(self.config.seed, 'augment', epoch))
        share = order[:len(self) * batch_size * world_size][self.config.rank::world_size]
        # copied at once: a copy for each batch would wait for work that is queued on the device
        batches = share.to(device).split(batch_size), draws[share].to(device).split(batch_size)
        for batch, rows in list(zip(*batches, strict=True))[first_batch:]:
            images = (self.data.images[batch].float() - self.mean) / self.std
            yield self.augment(images, rows, size), self.data.targets[batch]

    def in_order(self, data: ImageTensors, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of another set's images, not augmented and in order: this process's share, for evaluation."""
        for index in torch.arange(self.config.rank, len(data), self.config.world_size).split(250):
            part = data.subset(index)
            batch = (part.images.float() - self.mean) / self.std
            if batch.shape[-1] != size:
                batch = F.interpolate(batch, size=(size, size), mode='bicubic', antialias=True)
            yield batch, part.targets
