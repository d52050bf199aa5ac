"""The data of a run: training batches, and held-out ones to choose by."""
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import timm
import torch
import torch.nn.functional as F
from timm.data import create_dataset, create_transform, resolve_data_config
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import TrivialAugmentWide

from ..data.folder import FolderLoader
from ..data.memory import CropFlip, ImageTensors, MemoryLoader, decode_images
from ..data.splits import hold_out
from .recipe import Recipe

if TYPE_CHECKING:
    from .engine import RunConfig

__all__ = ['TrainingData', 'open_data']

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class TrainingData:
    """What a run reads.

    Attributes:
        train: Training batches by epoch.
        held_out: Gives the held-out batches once through, or None where nothing is held out.
        class_names: Names of the classes in their order, the folders' names.
        normalization: Mean and standard deviation of the channels that the images were normalised by.
    """

    train: MemoryLoader | FolderLoader
    held_out: Callable[[], Batches] | None
    class_names: tuple[str, ...]
    normalization: tuple[tuple[float, ...], tuple[float, ...]]


class _SomeImages:
    """Some images of a timm data set, with what `FolderLoader` needs of one: a reader, names, a length."""

    def __init__(self, dataset: Any, indices: list[int]) -> None:
        self.dataset, self.indices = dataset, indices

    @property
    def reader(self) -> '_SomeImages':
        return self

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset.reader[self.indices[index]]

    def filename(self, index: int) -> str:
        """Name of an image's file."""
        return str(self.dataset.filename(self.indices[index]))


def _class_names(dataset: Any) -> tuple[str, ...]:
    return tuple(sorted(dataset.reader.class_to_idx, key=dataset.reader.class_to_idx.get))


def _targets(dataset: Any) -> torch.Tensor:
    return torch.tensor([target for _, target in dataset.reader.samples])


def open_data(
        recipe: Recipe, config: 'RunConfig', batch_size: int, device: torch.device, rank: int, world_size: int,
) -> TrainingData:
    """Open the data of a run.

    Args:
        recipe: Says how it is read, augmented and split.
        config: Says where it is.
        batch_size: Images in each batch of this process.
        device: Where the batches go; a set in memory lies there whole.
        rank: This process among `world_size`.
        world_size: Number of processes.

    Raises:
        RuntimeError: No images where `config` says (timm's own words).
        ValueError: More images held out of a class than it has.
    """
    dataset = create_dataset('', root=str(config.data_dir), split=config.train_split)
    norms = resolve_data_config(pretrained_cfg=_pretrained_cfg(recipe))
    part = {'seed': config.seed, 'rank': rank, 'world_size': world_size}
    stay, held = hold_out(_targets(dataset), recipe.holdout) if recipe.holdout else (None, None)
    names = _class_names(dataset)
    val = create_dataset('', root=str(config.data_dir), split=config.val_split) if config.val_split else None
    if recipe.in_memory:
        images = decode_images(dataset, recipe.memory_size, config.workers).to(device)
        held_images = images.subset(held) if held is not None else None
        if val is not None and held is None:
            held_images = decode_images(val, recipe.memory_size, config.workers).to(device)
        train_images = images.subset(stay) if stay is not None else images
        augment = CropFlip(recipe.scale, recipe.ratio, recipe.hflip)
        loader = MemoryLoader(train_images, batch_size, norms['mean'], norms['std'], augment, **part)
        size = recipe.eval_size or recipe.img_size
        measured = _memory_batches(loader, held_images, size, rank, world_size) if held_images is not None else None
        return TrainingData(loader, measured, names, (norms['mean'], norms['std']))
    train = _SomeImages(dataset, stay.tolist()) if stay is not None else dataset
    folder = FolderLoader(
        train, batch_size, _Transform(recipe, norms), repeats=recipe.aug_repeats, workers=config.workers,
        max_corrupt=config.max_corrupt, device=device, **part)
    measured = None
    if held is not None or val is not None:
        if held is not None:
            val, indices = create_dataset('', root=str(config.data_dir), split=config.train_split), held.tolist()
        else:
            assert val is not None
            indices = list(range(len(val)))
        val.transform = create_transform(**{**norms, 'input_size': (3, *[recipe.eval_size or recipe.img_size] * 2)})
        measured = _folder_batches(Subset(val, indices[rank::world_size]), config.workers, device)
    return TrainingData(folder, measured, names, (norms['mean'], norms['std']))


def _pretrained_cfg(recipe: Recipe) -> dict[str, Any]:
    cfg = timm.get_pretrained_cfg(recipe.model)
    return cfg.to_dict() if cfg else {}


class _Transform:
    """timm's training transform for a size; a class, since workers that are spawned need to pickle it."""

    def __init__(self, recipe: Recipe, norms: dict[str, Any]) -> None:
        self.recipe, self.norms = recipe, norms

    def __call__(self, size: int) -> Callable[..., torch.Tensor]:
        recipe = self.recipe
        trivial = recipe.aa == 'ta_wide'  # torchvision's, which timm has not
        transform: Callable[..., torch.Tensor] = create_transform(
            size, is_training=True, scale=recipe.scale, ratio=recipe.ratio, hflip=recipe.hflip,
            color_jitter=recipe.color_jitter, auto_augment=None if trivial else recipe.aa or None,
            interpolation=recipe.interpolation,
            mean=self.norms['mean'], std=self.norms['std'], re_prob=recipe.reprob, re_mode=recipe.remode)
        if trivial:  # where timm puts an AutoAugment: after crop and flip
            transform.transforms.insert(2, TrivialAugmentWide())  # type: ignore[attr-defined]
        return transform


def _memory_batches(
        loader: MemoryLoader, images: ImageTensors, size: int, rank: int, world_size: int) -> Callable[[], Batches]:
    def batches() -> Batches:
        for index in torch.arange(rank, len(images), world_size).split(250):
            part = images.subset(index)
            batch = (part.images.float() - loader.mean) / loader.std
            if batch.shape[-1] != size:
                batch = F.interpolate(batch, size=(size, size), mode='bicubic', antialias=True)
            yield batch, part.targets
    return batches


def _folder_batches(dataset: Subset[Any], workers: int, device: torch.device) -> Callable[[], Batches]:
    def batches() -> Batches:
        for images, targets in DataLoader(dataset, 250, num_workers=workers):
            yield images.to(device), targets.to(device)
    return batches
