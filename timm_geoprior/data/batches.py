"""What every loader here needs, and training batches of a timm data set in an exactly reproducible order.

Random numbers are seeded by what they are for: a resumed run draws the same ones as an uninterrupted run.
"""
import hashlib
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from ..distributed import reduce_sum
from .reading import CorruptImages, Tell, read_readable, tell_of_rotations

Key = tuple[int, int, int, int]  # epoch, index, repeat, size


@dataclass(frozen=True)
class LoaderConfig:
    """Which images one process gets, and when."""
    batch_size: int  # images per batch and process; an incomplete last batch is left out
    device: torch.device = torch.device('cpu')  # device of the batches
    seed: int = 0  # seed of order and augmentation
    rank: int = 0  # rank of this process
    world_size: int = 1  # number of processes


def _seed_of(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], 'little') >> 1


def generator(*parts: object) -> torch.Generator:
    """A CPU generator whose seed is a hash of the parts, such as (seed, 'order', epoch)."""
    return torch.Generator().manual_seed(_seed_of(*parts))


def seed_everything(*parts: object) -> None:
    """Seed torch, numpy and random with a hash of the parts; timm's mixup, erasing and drop path draw from these."""
    seed = _seed_of(*parts)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def init_worker(worker: object) -> None:
    """Leave Ctrl-C and SIGTERM to the parent process, which saves or exits cleanly.

    SLURM, systemd, `timeout` and a terminal send them to all processes of a group at once, and a worker that died first
    would end its parent with a traceback. On Linux, only a SIGTERM from the parent itself ends a worker.

    Args:
        worker: Its number, from `DataLoader(worker_init_fn=...)`; not used.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == 'linux':  # elsewhere Python does not say who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # also for all threads that are started later
        threading.Thread(target=_end_with_parent, daemon=True).start()
    elif sys.platform != 'win32':  # otherwise the parent could not end it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)  # at once, as torch's own handler does


def start_workers(loader: DataLoader[Any]) -> Any:
    """Return an iterator over a loader whose workers run `init_worker`.

    Ctrl-C and SIGTERM are blocked while the workers start: they cannot handle them yet, and inherit the block.
    """
    if sys.platform == 'win32':
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def map_in_workers(work: Callable[[list[int]], Any], indices: Sequence[int], batch_size: int, workers: int) -> Any:
    """Iterate over what `work` returns for successive lists of `batch_size` indices; worker processes call it."""
    # the indices are the data set: a list of them is processed where torch would only collate it
    data: Any = indices
    return start_workers(DataLoader(data, batch_size, num_workers=workers, worker_init_fn=init_worker, collate_fn=work))


class _SeededImages(Dataset[tuple[torch.Tensor, int, int, bool]]):
    """Images of a timm data set, each augmented with its own seed, whatever the workers and the batch size."""

    def __init__(self, dataset: Any, make_transform: Callable[[int], Callable[[Image.Image], torch.Tensor]], seed: int):
        self.dataset = dataset
        self.make_transform = make_transform
        self.seed = seed
        self.transforms: dict[int, Callable[[Image.Image], torch.Tensor]] = {}

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, int, int, bool]:
        """The fields of an `Item`, the image transformed."""
        epoch, index, repeat, size = key
        if size not in self.transforms:
            self.transforms[size] = self.make_transform(size)
        item = read_readable(self.dataset, index)
        seed_everything(self.seed, 'augment', epoch, index, repeat)
        return self.transforms[size](item.image), item.target, item.replaced, item.rotation_ignored and not repeat


class _EpochBatches(Sampler[list[Key]]):
    """The batches of one epoch for one process, as keys."""

    def __init__(self, count: int, config: LoaderConfig, repeats: int) -> None:
        self.count, self.config, self.repeats = count, config, max(repeats, 1)
        self.epoch = self.size = self.first_batch = 0

    def __len__(self) -> int:
        return self.count // (self.config.batch_size * self.config.world_size)

    def __iter__(self) -> Iterator[list[Key]]:
        batch_size, world_size = self.config.batch_size, self.config.world_size
        order = torch.randperm(self.count, generator=generator(self.config.seed, 'order', self.epoch)).tolist()
        total = len(self) * batch_size * world_size
        # repeated augmentation (Hoffer et al., 2019): repeats are adjacent, so that they spread over the processes
        keys = [(self.epoch, order[i // self.repeats], i % self.repeats, self.size) for i in range(total)]
        share = keys[self.config.rank::world_size]
        for batch in range(self.first_batch, len(self)):
            yield share[batch * batch_size:(batch + 1) * batch_size]


class FolderLoader:
    """Shuffled, augmented, normalised batches of a timm data set, in the order of `MemoryLoader`.

    An image that cannot be read is reported and replaced by the next readable one.
    """

    def __init__(
            self,
            dataset: Any,
            make_transform: Callable[[int], Callable[[Image.Image], torch.Tensor]],
            config: LoaderConfig,
            repeats: int = 0,
            workers: int = 2,
            max_corrupt: int = 10,
            tell: Tell = warnings.warn,
    ) -> None:
        """
        Args:
            dataset: One from timm's `create_dataset`, with a reader that has an index.
            make_transform: Returns the training transform for a size in pixels.
            config: Batch size, seed, this process and its device.
            repeats: Repeated augmentation: how often each image of an epoch's share is augmented, 0 for once.
            workers: Number of processes that decode.
            max_corrupt: Number of distinct unreadable images that are tolerated.
            tell: Called with each message for the user.
        """
        self.batches = _EpochBatches(len(dataset), config, repeats)
        self.device, self.rank, self.tell = config.device, config.rank, tell
        self.loader = DataLoader(
            _SeededImages(dataset, make_transform, config.seed), batch_sampler=self.batches, num_workers=workers,
            worker_init_fn=init_worker, persistent_workers=workers > 0, pin_memory=self.device.type == 'cuda')
        self.corrupt = CorruptImages(dataset, max_corrupt, tell)
        self.rotations_told = False

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, size: int, first_batch: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of one epoch, as in `MemoryLoader.epoch`."""
        self.batches.epoch, self.batches.size, self.batches.first_batch = epoch, size, first_batch
        ignored = 0
        for number, (images, targets, bad, ignored_here) in enumerate(start_workers(self.loader), 1):
            self.corrupt.note(bad.tolist())
            ignored += int(ignored_here.sum())
            if number == len(self) and not self.rotations_told:  # a whole epoch; the last yield may never return
                self.rotations_told = True
                total = int(reduce_sum(torch.tensor(ignored, device=self.device)))
                tell_of_rotations(0 if self.rank else total, self.tell)
            yield images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
