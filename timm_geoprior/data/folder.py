"""Batches of a timm data set whose order and augmentation can be repeated exactly."""
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from .images import CorruptImages, read_readable, warn_of_rotations
from .seeding import generator, seed_everything
from .workers import init_worker

__all__ = ['FolderLoader']

Key = tuple[int, int, int, int]  # epoch, index, repeat, size


class _SeededImages(Dataset[tuple[torch.Tensor, int, int, bool]]):
    """Images of a timm data set, each augmented by a seed of its own: workers and batches change nothing."""

    def __init__(self, dataset: Any, make_transform: Callable[[int], Callable[[Image.Image], torch.Tensor]], seed: int):
        self.dataset = dataset
        self.make_transform = make_transform
        self.seed = seed
        self.transforms: dict[int, Callable[[Image.Image], torch.Tensor]] = {}

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, int, int, bool]:
        """As `Item`, transformed."""
        epoch, index, repeat, size = key
        if size not in self.transforms:
            self.transforms[size] = self.make_transform(size)
        item = read_readable(self.dataset, index)
        seed_everything(self.seed, 'augment', epoch, index, repeat)
        return self.transforms[size](item.image), item.target, item.replaced, item.turned


class _EpochBatches(Sampler[list[Key]]):
    """The batches of one epoch for one process, as keys."""

    def __init__(self, count: int, batch_size: int, repeats: int, seed: int, rank: int, world_size: int) -> None:
        self.count, self.batch_size, self.repeats = count, batch_size, max(repeats, 1)
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch = self.size = self.first_batch = 0

    def __len__(self) -> int:
        return self.count // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[Key]]:
        order = torch.randperm(self.count, generator=generator(self.seed, 'order', self.epoch)).tolist()
        total = len(self) * self.batch_size * self.world_size
        # repeated augmentation (Hoffer et al., 2019): repeats lie side by side, so that they spread over the processes
        keys = [(self.epoch, order[i // self.repeats], i % self.repeats, self.size) for i in range(total)]
        share = keys[self.rank::self.world_size]
        for batch in range(self.first_batch, len(self)):
            yield share[batch * self.batch_size:(batch + 1) * self.batch_size]


class FolderLoader:
    """Shuffled, augmented, normalised batches of a timm data set, in the order of `MemoryLoader`.

    An image that cannot be read is named in a warning and its nearest readable neighbour stands in for it.
    """

    def __init__(
            self,
            dataset: Any,
            batch_size: int,
            make_transform: Callable[[int], Callable[[Image.Image], torch.Tensor]],
            seed: int = 0,
            rank: int = 0,
            world_size: int = 1,
            repeats: int = 0,
            workers: int = 2,
            max_corrupt: int = 10,
            device: torch.device | None = None,
    ) -> None:
        """
        Args:
            dataset: One of timm's `create_dataset`, with a reader that has an index.
            batch_size: Images in each batch of this process; an incomplete last batch is left out.
            make_transform: Gives the training transform for a size in pixels.
            seed: Seed of order and augmentation.
            rank: This process among `world_size`.
            world_size: Number of processes.
            repeats: Repeated augmentation: how often each image of an epoch's share is augmented, 0 for once.
            workers: Processes that decode.
            max_corrupt: Different unreadable images after which the run stops.
            device: Where the batches go, the CPU where it is None.
        """
        self.dataset = dataset
        self.batches = _EpochBatches(len(dataset), batch_size, repeats, seed, rank, world_size)
        self.device = device or torch.device('cpu')
        self.loader = DataLoader(
            _SeededImages(dataset, make_transform, seed), batch_sampler=self.batches, num_workers=workers,
            worker_init_fn=init_worker, persistent_workers=workers > 0, pin_memory=self.device.type == 'cuda')
        self.corrupt = CorruptImages(dataset, max_corrupt)
        self.turned: int | None = None  # files whose rotation is ignored, in the first epoch

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, size: int, first_batch: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of one epoch, as `MemoryLoader.epoch` gives them.

        Raises:
            CorruptImagesError: More than `max_corrupt` images could not be read.
        """
        self.batches.epoch, self.batches.size, self.batches.first_batch = epoch, size, first_batch
        turned = 0
        for images, targets, bad, turned_here in self.loader:
            self.corrupt.note(bad.tolist())
            turned += int(turned_here.sum())
            yield images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
        if self.turned is None:
            self.turned = turned
            warn_of_rotations(turned)
