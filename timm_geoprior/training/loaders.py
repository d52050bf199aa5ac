"""The data of a run: training batches, and held-out ones to choose the best epoch by."""
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
from timm.data import create_transform, resolve_data_config
from torchvision.transforms import InterpolationMode, TrivialAugmentWide

from ..data.batches import FolderLoader, LoaderConfig, generator
from ..data.dataset import DataSplit, Files, Images, SelectedImages, open_split
from ..data.listing import ILSVRC_ARCHIVE, SPLITS, DataOptions, folders_of_split
from ..data.memory import CropFlip, ImageTensors, MemoryLoader, decode_images
from ..data.preflight import repeated_classes
from ..data.reading import CorruptImages
from ..errors import EvaluationError, GeoPriorError
from ..files import first_line
from .recipe import Recipe, RunConfig

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class TrainingData:
    """The data that a run reads."""
    train: MemoryLoader | FolderLoader  # training batches by epoch
    held_out: Callable[[], Batches] | None  # gives one pass over the held-out batches; None if there are none
    class_names: tuple[str, ...]  # names of the classes, in the order of the targets
    # indices of the held-out images among the training images, shape (N,); may be empty
    held_indices: torch.Tensor
    held_names: tuple[str, ...]  # files of the images that are measured after each epoch
    train_sha256: str  # hash of the names of the training images


def _choose(
        found: DataSplit, indices: Sequence[int], labels: Sequence[int] | None = None,
        classes: tuple[str, ...] | None = None) -> DataSplit:
    """Some images of a split, with their own labels and classes or with others."""
    labelled = np.array(found.labels[list(indices)] if labels is None else labels, np.int64)
    reader, names = found.dataset.reader, tuple(found.names[index] for index in indices)
    dataset = Images(Files(reader.root, [reader.places[index] for index in indices], labelled), names)
    return replace(found, dataset=dataset, labels=labelled, names=names,
                   classes=found.classes if classes is None else classes)


def open_images(config: RunConfig, split: str, labelled: bool = True) -> DataSplit:
    """Open a split, and refuse repeated classes: without a folder of that name, all folders are read.

    The split may go by any of its usual names, in any case; '' stands for class folders without splits.
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


def _open_measured(config: RunConfig, names: tuple[str, ...]) -> DataSplit:
    """The images of --val-split; their targets are indices into the training classes."""
    archived = config.val_split.lower() in SPLITS['val'] and (config.data_dir / ILSVRC_ARCHIVE).is_file()
    if not (archived or folders_of_split(config.data_dir, config.val_split)):
        raise GeoPriorError(f'{config.data_dir} must have a folder of the split {config.val_split}, got none. Check '
                            f'--val-split, or set holdout instead.')
    found = open_images(config, config.val_split)
    unknown = sorted(set(found.classes) - set(names))
    if unknown:
        raise GeoPriorError(f'The classes of the split {config.val_split} must be among those of {config.train_split}, '
                            f'got {len(unknown)} others, such as {unknown[0]}. Check --val-split.')
    index = [names.index(name) for name in found.classes]
    return _choose(found, range(len(found.labels)), [index[label] for label in found.labels], names)


def open_training_data(
        recipe: Recipe, config: RunConfig, share: LoaderConfig, decoded: ImageTensors | None = None) -> TrainingData:
    """Open the data of a run.

    Args:
        recipe: How it is read, augmented and split.
        config: Where it is. The first process reports what all of them find, each process its own unreadable images.
        share: This process's share of it.
        decoded: The decoded training split, if the recipe holds it in memory; None decodes it here.

    Raises:
        GeoPriorError: There are no images, classes are repeated or differ, a class has too few images to hold some
            out, more images are unreadable than `config` allows, or timm does not accept the augmentation.
    """
    tell = config.tell
    if share.rank:
        config = replace(config, tell=lambda text: None)
    found = open_images(config, config.train_split, recipe.needs_labels or not config.class_names)
    if config.class_names:
        found = _with_classes(found, recipe, config)
    stay, held = _divide(found, recipe, config)
    val = _open_measured(config, found.classes) if config.val_split and not len(held) else None
    norms = resolve_data_config(pretrained_cfg={
        **model_cfg(recipe.model), **(recipe.model_kwargs.get('pretrained_cfg_overlay') or {})})
    size = recipe.measured_size
    train: MemoryLoader | FolderLoader
    held_out: Callable[[], Batches] | None = None
    if recipe.in_memory:
        decode = partial(decode_images, size=recipe.memory_size, workers=config.workers, max_corrupt=config.max_corrupt,
                         tell=None if share.rank else tell)
        images = decode(found.dataset) if decoded is None else decoded
        images = images.to(share.device)
        train = MemoryLoader(images.readable(stay if len(held) else None), norms['mean'], norms['std'],
                             CropFlip(recipe.scale, recipe.ratio, recipe.hflip), share)
        if val is not None:
            held_out = partial(train.in_order, decode(val.dataset).to(share.device).readable(), size)
        elif len(held):
            held_out = partial(train.in_order, images.readable(held), size)
    else:
        trained_on = _choose(found, stay.tolist()).dataset
        train = FolderLoader(trained_on, make_transform(recipe, norms), share, recipe.aug_repeats, config.workers,
                             config.max_corrupt, tell)
        if len(held) or val is not None:
            transform = create_transform(**{**norms, 'input_size': (3, size, size)})
            held_out = _from_files(
                _choose(found, held.tolist()) if val is None else val, transform, replace(config, tell=tell), share)
    names = '\n'.join(found.names[index] for index in stay.tolist())
    held_names = val.names if val else tuple(found.names[index] for index in held.tolist())
    return TrainingData(
        train, held_out, found.classes, held, held_names,
        hashlib.sha256(names.encode(errors='surrogateescape')).hexdigest())


def _with_classes(found: DataSplit, recipe: Recipe, config: RunConfig) -> DataSplit:
    """The training images with the network's classes; those that only the teacher labels all get class 0."""
    index, count = {name: place for place, name in enumerate(config.class_names)}, len(found.labels)
    unknown = [name for name in found.classes if name not in index]
    if unknown and recipe.needs_labels:
        raise GeoPriorError(f'The classes in {config.data_dir} must be those of the network, got {unknown[0]}. Rename '
                            f'the folders, or add --set distill_alpha=1, which needs no labels.')
    if found.classes and not unknown:
        labels = [index[found.classes[label]] for label in found.labels]
        return _choose(found, range(count), labels, config.class_names)
    if recipe.holdout or config.holdout_share:
        raise GeoPriorError(f'The images in {config.data_dir} must have the classes of the network for some to be held '
                            f'out, got {unknown[0] if unknown else "none"}. Set holdout=0.')
    config.tell(f'The images in {config.data_dir} are used without labels.')
    return _choose(found, range(count), [0] * count, config.class_names)


def hold_out(targets: torch.Tensor, amount: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw images of each class to hold out. Returns sorted indices of the remaining images and of those held out.

    The same images are drawn every time, whatever the seed of a run. The amount is a number of images per class (0 for
    none), or a share below 1, rounded so that at least one image is held out and one remains.
    """
    held = torch.zeros(len(targets), dtype=torch.bool)
    for target in targets.unique().tolist() if amount else ():
        members = (targets == target).nonzero().flatten()
        images = len(members)
        wanted = int(amount) if amount >= 1 else max(min(round(amount * images), images - 1), 1)
        if wanted >= images:
            raise ValueError(f'Class {target} must have more than {wanted} images to hold out {wanted}, got {images}. '
                             f'Add images, or lower the recipe key holdout.')
        # drawn at random, since names rarely are in random order: the last may show one breed, or be from one camera
        order = torch.randperm(images, generator=generator('holdout', target))
        held[members[order[:wanted]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def _divide(found: DataSplit, recipe: Recipe, config: RunConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the training images that remain, and of those held out."""
    targets = torch.from_numpy(found.labels)
    try:
        return hold_out(targets, recipe.holdout or config.holdout_share)
    except ValueError as error:
        raise GeoPriorError(str(error)) from None


def _from_files(
        data: DataSplit, transform: Callable[..., torch.Tensor], config: RunConfig, share: LoaderConfig,
) -> Callable[[], Batches]:
    """A function that yields this process's share of the held-out images, in batches."""
    corrupt = CorruptImages(data.dataset, config.max_corrupt, config.tell)
    own = range(share.rank, len(data.labels), share.world_size)
    images = SelectedImages(data.dataset, own, data.labels[own], transform)

    def batches() -> Batches:
        for batch, targets, unreadable in images.batches(250, config.workers):
            corrupt.note(unreadable)
            yield batch.to(share.device), targets.to(share.device)
    return batches


def model_cfg(name: str) -> dict[str, Any]:
    """timm's configuration of a model, with the normalisation that its weights expect; empty if timm has none.

    For `local-dir:` and `hf-hub:` names, it is read from config.json there.
    """
    if ':' in name:
        with torch.device('meta'):
            model: Any = timm.create_model(name)
        return dict(model.pretrained_cfg)
    cfg = timm.get_pretrained_cfg(name)
    return cfg.to_dict() if cfg else {}


def _transform(recipe: Recipe, norms: dict[str, Any], size: int) -> Callable[..., torch.Tensor]:
    trivial = recipe.aa == 'ta_wide'  # torchvision's; timm has none
    transform: Callable[..., torch.Tensor] = create_transform(
        size, is_training=True, scale=recipe.scale, ratio=recipe.ratio, hflip=recipe.hflip,
        color_jitter=recipe.color_jitter, auto_augment=None if trivial else recipe.aa or None,
        interpolation=recipe.interpolation, mean=norms['mean'], std=norms['std'], re_prob=recipe.reprob,
        re_mode=recipe.remode)
    if trivial:  # where timm puts an AutoAugment: after crop and flip
        mode = InterpolationMode('bilinear' if recipe.interpolation == 'random' else recipe.interpolation)
        transform.transforms.insert(2, TrivialAugmentWide(interpolation=mode))  # type: ignore[attr-defined]
    return transform


def make_transform(recipe: Recipe, norms: dict[str, Any]) -> Callable[[int], Callable[..., torch.Tensor]]:
    """A function that makes timm's training transform for a size; it can be pickled, which spawned workers need."""
    try:
        _transform(recipe, norms, recipe.img_size)
    except Exception as error:  # timm's parsers may raise anything
        raise GeoPriorError(f'timm does not accept the recipe keys aa = {recipe.aa!r}, interpolation = '
                            f'{recipe.interpolation!r} and remode = {recipe.remode!r} ({type(error).__name__} '
                            f'{error}). Change one of them.') from error
    return partial(_transform, recipe, norms)
