"""The data of a run: training batches, and held-out ones to choose by."""
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_dataset, create_transform, resolve_data_config
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import InterpolationMode, TrivialAugmentWide

from ..data.datasets import EvalSet
from ..data.datasets import open_data as open_split
from ..data.folder import FolderLoader
from ..data.memory import CropFlip, ImageTensors, MemoryLoader, decode_images
from ..data.preflight import repeated_classes
from ..data.reading import CorruptImages
from ..data.splits import hold_out, hold_out_share
from ..data.workers import init_worker
from ..errors import EvaluationError, GeoPriorError
from .config import RunConfig
from .recipe import Recipe, RecipeError

__all__ = ['DataError', 'TrainingData', 'model_cfg', 'open_data', 'open_images', 'split_off']

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


class DataError(GeoPriorError):
    """Images that cannot be trained on, or measured; the message says why and what to do."""


class _Labelled(Dataset[tuple[torch.Tensor, int, int]]):
    """A timm data set with targets of our own: image, target, index; -1 is the target of what cannot be read."""

    def __init__(self, dataset: Any, targets: torch.Tensor) -> None:
        self.dataset, self.targets = dataset, targets

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        try:
            with self.dataset.reader[index][0] as file, Image.open(file) as opened:
                image, target = opened.convert('RGB'), int(self.targets[index])
        except Exception:  # a decoder fed with damaged bytes may raise anything
            image, target = Image.new('RGB', (8, 8)), -1
        return self.dataset.transform(image), target, index


def open_images(config: RunConfig, split: str) -> EvalSet:
    """Open a split in which each class stands once: timm takes all folders there are for one that it does not find.

    Args:
        config: Says where the images are.
        split: The split's name, its folder's.

    Raises:
        DataError: There is no such folder, or it has no images, or a class twice.
    """
    if not config.data_dir.is_dir():
        raise DataError(f'{config.data_dir} is no folder, expected one with a folder {split}: check --data-dir.')
    try:
        found = open_split(config.data_dir, split=split)
    except EvaluationError as error:
        raise DataError(f'The split {split} in {config.data_dir} cannot be opened ({error.__cause__ or error}), '
                        f'expected one folder of images a class in it: check --data-dir and the split.') from error
    if repeated := repeated_classes(found):
        name, places = repeated[0]
        raise DataError(f'{config.data_dir} has {len(repeated)} classes more than once, such as {name} in '
                        f'{" and ".join(places[:3])}, expected one folder a class for the split {split}: check '
                        f'--data-dir and the split.')
    return found


def _open_measured(config: RunConfig, names: tuple[str, ...]) -> _Labelled:
    """The images of --val-split with the training classes' targets."""
    found = open_images(config, config.val_split)
    unknown = sorted(set(found.classes) - set(names))
    if unknown:
        raise DataError(f'The split {config.val_split} has {len(unknown)} classes that {config.train_split} does not '
                        f'have, such as {unknown[0]}, expected the same class folders: check --val-split.')
    index = torch.tensor([names.index(name) for name in found.classes])
    return _Labelled(found.dataset, index[torch.from_numpy(found.labels)])


def split_off(
        targets: torch.Tensor, recipe: Recipe, config: RunConfig,
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """Indices of the training images that stay and of those held out, or two None where all of them stay."""
    if recipe.holdout:
        return hold_out(targets, recipe.holdout)
    if config.holdout_share:
        return hold_out_share(targets, config.holdout_share)
    return None, None


def open_data(
        recipe: Recipe, config: RunConfig, batch_size: int, device: torch.device, rank: int, world_size: int,
        decoded: ImageTensors | None = None,
) -> TrainingData:
    """Open the data of a run.

    Args:
        recipe: Says how it is read, augmented and split.
        config: Says where it is.
        batch_size: Images in each batch of this process.
        device: Where the batches go; a set in memory lies there whole.
        rank: This process among `world_size`.
        world_size: Number of processes.
        decoded: The images of the training split where a recipe holds them in memory; decoded anew where it is None.

    Raises:
        DataError: No images where `config` says, classes that stand twice or differ, or more images held out of a class
            than it has.
        CorruptImagesError: More images cannot be read than `config` allows.
        RecipeError: timm cannot make the recipe's augmentation.
    """
    found = open_images(config, config.train_split)
    norms = resolve_data_config(pretrained_cfg=model_cfg(recipe.model))
    try:
        stay, held = split_off(torch.from_numpy(found.labels), recipe, config)
    except ValueError as error:
        raise DataError(str(error)) from None
    val = _open_measured(config, found.classes) if config.val_split and held is None else None
    part = {'seed': config.seed, 'rank': rank, 'world_size': world_size}
    size = recipe.eval_size or recipe.img_size
    measured: Callable[[], Batches] | None = None
    loader: MemoryLoader | FolderLoader
    if recipe.in_memory:
        images = (_decode(found.dataset, recipe, config) if decoded is None else decoded).to(device)
        augment = CropFlip(recipe.scale, recipe.ratio, recipe.hflip)
        loader = MemoryLoader(images.readable(stay), batch_size, norms['mean'], norms['std'], augment, **part)
        if held is not None:
            measured = _memory_batches(loader, images.readable(held), size, rank, world_size)
        elif val is not None:
            found_val = _decode(val.dataset, recipe, config)
            val_images = ImageTensors(found_val.images, val.targets.where(found_val.targets >= 0, -1)).to(device)
            measured = _memory_batches(loader, val_images.readable(), size, rank, world_size)
    else:
        train = _SomeImages(found.dataset, stay.tolist()) if stay is not None else found.dataset
        loader = FolderLoader(
            train, batch_size, _make_transform(recipe, norms), repeats=recipe.aug_repeats, workers=config.workers,
            max_corrupt=config.max_corrupt, device=device, **part)
        if held is not None:
            own = create_dataset('', root=str(config.data_dir), split=config.train_split)
            val = _Labelled(own, torch.from_numpy(found.labels))
        if val is not None:
            val.dataset.transform = create_transform(**{**norms, 'input_size': (3, size, size)})
            indices = held.tolist() if held is not None else list(range(len(val)))
            corrupt = CorruptImages(val.dataset, config.max_corrupt)
            measured = _folder_batches(Subset(val, indices[rank::world_size]), config.workers, device, corrupt)
    return TrainingData(loader, measured, found.classes, (norms['mean'], norms['std']))


def _decode(dataset: Any, recipe: Recipe, config: RunConfig) -> ImageTensors:
    return decode_images(dataset, recipe.memory_size, config.workers, config.max_corrupt)


def model_cfg(name: str) -> dict[str, Any]:
    """timm's configuration of a model, with the normalisation that its weights expect; empty where timm has none.

    Args:
        name: An architecture, with or without a tag, or `local-dir:` or `hf-hub:` and a place, which says it itself.
    """
    if ':' in name:
        with torch.device('meta'):
            model: Any = timm.create_model(name)
        return dict(model.pretrained_cfg)
    cfg = timm.get_pretrained_cfg(name)
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
            mode = InterpolationMode('bilinear' if recipe.interpolation == 'random' else recipe.interpolation)
            transform.transforms.insert(2, TrivialAugmentWide(interpolation=mode))  # type: ignore[attr-defined]
        return transform


def _make_transform(recipe: Recipe, norms: dict[str, Any]) -> _Transform:
    transform = _Transform(recipe, norms)
    try:
        transform(recipe.img_size)
    except Exception as error:  # timm's parsers fail in their own ways
        raise RecipeError(f'timm can make nothing of the recipe keys aa = {recipe.aa!r}, interpolation = '
                          f'{recipe.interpolation!r} and remode = {recipe.remode!r} ({type(error).__name__} {error}).'
                          ) from error
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


def _folder_batches(
        dataset: Subset[Any], workers: int, device: torch.device, corrupt: CorruptImages) -> Callable[[], Batches]:
    def batches() -> Batches:
        for images, targets, indices in DataLoader(dataset, 250, num_workers=workers, worker_init_fn=init_worker):
            corrupt.note(indices[targets < 0].tolist())
            yield images[targets >= 0].to(device), targets[targets >= 0].to(device)
    return batches
