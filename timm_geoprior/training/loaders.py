"""The data of a run: training batches, and held-out ones to choose by."""
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import InterpolationMode, TrivialAugmentWide

from ..data.batches import FolderLoader, LoaderConfig, init_worker
from ..data.dataset import DataOptions, DataSplit, Files, Images, open_split
from ..data.memory import CropFlip, ImageTensors, MemoryLoader, decode_images
from ..data.preflight import repeated_classes
from ..data.reading import CorruptImages, read_item
from ..data.splits import hold_out, hold_out_share
from ..errors import EvaluationError, GeoPriorError, ImageError
from ..files import first_line
from .recipe import Recipe, RunConfig

__all__ = ['TrainingData', 'model_cfg', 'open_images', 'open_training_data']

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class TrainingData:
    """What a run reads."""
    train: MemoryLoader | FolderLoader  # training batches by epoch
    held_out: Callable[[], Batches] | None  # gives the held-out batches once through, or None where nothing is held out
    class_names: tuple[str, ...]  # names of the classes in their order, the folders' names
    # places of the training images that are held out, shape (N,); empty where there are none
    held_indices: torch.Tensor
    held_names: tuple[str, ...]  # their files
    train_sha256: str  # hash of the names of the files that are trained on


class _Measured(Dataset[tuple[torch.Tensor, int, int]]):
    """Transformed image, target and index; -1 is the target of what cannot be read."""

    def __init__(self, dataset: Images) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        try:
            image, target = read_item(self.dataset, index), int(self.dataset.reader.labels[index])
        except (ImageError, OSError):
            image, target = Image.new('RGB', (8, 8)), -1
        return self.dataset.transform(image), target, index


def _choose(found: DataSplit, indices: Sequence[int], labels: Sequence[int]) -> Images:
    """Some images of a split, in an order and with labels of their own."""
    reader = found.dataset.reader
    files = Files(reader.root, [reader.places[index] for index in indices], labels)
    return Images(files, [found.names[index] for index in indices])


def open_images(config: RunConfig, split: str, labelled: bool = True) -> DataSplit:
    """Open a split in which each class stands once: timm takes all folders there are for one that it does not find.

    The split's name may be another name of it, in any case, or '' for class folders without splits.

    Raises:
        GeoPriorError: There is no such folder, or it has no images, or a class twice.
    """
    if not config.data_dir.is_dir():
        raise GeoPriorError(f'{config.data_dir} must be a folder with a folder {split} in it. Check --data-dir.')
    try:
        found = open_split(config.data_dir, split, options=DataOptions(labelled=labelled))
    except EvaluationError as error:
        hint = ', or add --set distill_alpha=1, which needs no labels' if config.class_names else ''
        raise GeoPriorError(f'The split {split} in {config.data_dir} cannot be opened ({first_line(error)}). It must '
                            f'have one folder of images for each class{hint}.') from error
    if labelled and (repeated := repeated_classes(found)):
        name, places = repeated[0]
        raise GeoPriorError(f'The split {split} in {config.data_dir} must have one folder for each class, got '
                            f'{len(repeated)} classes more than once, such as {name} in {" and ".join(places[:3])}. '
                            f'Check --data-dir and --train-split.')
    for note in found.notes:
        config.tell(note)
    return found


def _open_measured(config: RunConfig, names: tuple[str, ...]) -> Images:
    """The images of --val-split with the training classes' targets."""
    found = open_images(config, config.val_split)
    unknown = sorted(set(found.classes) - set(names))
    if unknown:
        raise GeoPriorError(f'The classes of the split {config.val_split} must be among those of {config.train_split}, '
                            f'got {len(unknown)} others, such as {unknown[0]}. Check --val-split.')
    index = [names.index(name) for name in found.classes]
    return _choose(found, range(len(found.labels)), [index[label] for label in found.labels])


@dataclass(frozen=True)
class _Opened:
    """The training split of a run, divided."""
    recipe: Recipe
    config: RunConfig
    share: LoaderConfig
    found: DataSplit
    stay: torch.Tensor
    held: torch.Tensor

    @property
    def norms(self) -> dict[str, Any]:
        """timm's data configuration of the recipe's model."""
        overlay = self.recipe.model_kwargs.get('pretrained_cfg_overlay', {})
        norms: dict[str, Any] = resolve_data_config(pretrained_cfg={**model_cfg(self.recipe.model), **overlay})
        return norms

    @property
    def measured_size(self) -> int:
        """Side of the images when measured, in pixels."""
        return self.recipe.eval_size or self.recipe.img_size


def open_training_data(
        recipe: Recipe, config: RunConfig, share: LoaderConfig, decoded: ImageTensors | None = None) -> TrainingData:
    """Open the data of a run.

    Args:
        recipe: Says how it is read, augmented and split.
        config: Says where it is.
        share: What this process takes of it.
        decoded: The images of the training split where a recipe holds them in memory; decoded anew where it is None.

    Raises:
        GeoPriorError: No images where `config` says, classes that stand twice or differ, more images held out of a
            class than it has, more unreadable ones than `config` allows, or an augmentation that timm cannot make.
    """
    found = open_images(config, config.train_split, recipe.needs_labels or not config.class_names)
    if config.class_names:
        found = _with_classes(found, recipe, config)
    stay, held = _divide(found, recipe, config)
    opened = _Opened(recipe, config, share, found, stay, held)
    val = None
    if config.val_split and not len(held):
        val = _open_measured(config, found.classes)
    train, held_out = _from_memory(opened, val, decoded) if recipe.in_memory else _from_files(opened, val)
    names = '\n'.join(found.names[index] for index in stay.tolist())
    return TrainingData(
        train, held_out, found.classes, held, tuple(found.names[index] for index in held.tolist()),
        hashlib.sha256(names.encode(errors='surrogateescape')).hexdigest())


def _with_classes(found: DataSplit, recipe: Recipe, config: RunConfig) -> DataSplit:
    """Training images with the classes that the network has. Of what only a teacher labels, all get the first one."""
    index = {name: place for place, name in enumerate(config.class_names)}
    unknown = [name for name in found.classes if name not in index]
    if unknown and recipe.needs_labels:
        raise GeoPriorError(f'The classes in {config.data_dir} must be those of the network, got {unknown[0]}. Rename '
                            f'the folders, or add --set distill_alpha=1, which needs no labels.')
    if found.classes and not unknown:
        return _relabel(found, [index[found.classes[label]] for label in found.labels], config.class_names)
    if recipe.holdout or config.holdout_share:
        raise GeoPriorError(f'The images in {config.data_dir} must have the classes of the network for some to be held '
                            f'out, got {unknown[0] if unknown else "none"}. Set holdout=0.')
    config.tell(f'The images in {config.data_dir} are used without labels.')
    return _relabel(found, [0] * len(found.labels), config.class_names)


def _relabel(found: DataSplit, labels: Sequence[int], classes: tuple[str, ...]) -> DataSplit:
    return dataclasses.replace(found, dataset=_choose(found, range(len(labels)), labels),
                               labels=np.array(labels, np.int64), classes=classes)


def _divide(found: DataSplit, recipe: Recipe, config: RunConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the training images that stay and of those held out."""
    targets = torch.from_numpy(found.labels)
    try:
        if recipe.holdout:
            return hold_out(targets, recipe.holdout)
        if config.holdout_share:
            return hold_out_share(targets, config.holdout_share)
    except ValueError as error:
        raise GeoPriorError(str(error)) from None
    return torch.arange(len(targets)), torch.empty(0, dtype=torch.int64)


def _from_memory(
        opened: _Opened, val: Images | None, decoded: ImageTensors | None,
) -> tuple[MemoryLoader, Callable[[], Batches] | None]:
    recipe, config, share, norms = opened.recipe, opened.config, opened.share, opened.norms
    images = _decode(opened.found.dataset, recipe, config) if decoded is None else decoded
    images = images.to(share.device)
    augment = CropFlip(recipe.scale, recipe.ratio, recipe.hflip)
    trained_on = images.readable(opened.stay if len(opened.held) else None)
    loader = MemoryLoader(trained_on, norms['mean'], norms['std'], augment, share)
    if len(opened.held):
        measured = images.readable(opened.held)
    elif val is not None:
        measured = _decode(val, recipe, config).to(share.device).readable()
    else:
        return loader, None
    return loader, _memory_batches(loader, measured, opened.measured_size)


def _from_files(
        opened: _Opened, val: Images | None) -> tuple[FolderLoader, Callable[[], Batches] | None]:
    recipe, config, share, norms = opened.recipe, opened.config, opened.share, opened.norms
    found = opened.found
    train = _choose(found, opened.stay.tolist(), found.labels[opened.stay])
    loader = FolderLoader(
        train, _make_transform(recipe, norms), share, recipe.aug_repeats, config.workers, config.max_corrupt)
    if len(opened.held):
        val = _choose(found, opened.held.tolist(), found.labels[opened.held])
    if val is None:
        return loader, None
    val.transform = create_transform(**{**norms, 'input_size': (3, opened.measured_size, opened.measured_size)})
    corrupt = CorruptImages(val, config.max_corrupt)
    own = Subset(_Measured(val), range(share.rank, len(val), share.world_size))
    return loader, _folder_batches(own, config.workers, share.device, corrupt)


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
        raise GeoPriorError(f'timm can make nothing of the recipe keys aa = {recipe.aa!r}, interpolation = '
                            f'{recipe.interpolation!r} and remode = {recipe.remode!r} ({type(error).__name__} '
                            f'{error}). Change one of them.') from error
    return transform


def _memory_batches(loader: MemoryLoader, images: ImageTensors, size: int) -> Callable[[], Batches]:
    def batches() -> Batches:
        for index in torch.arange(loader.config.rank, len(images), loader.config.world_size).split(250):
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
