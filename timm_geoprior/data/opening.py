"""Opening a split: a folder, an archive, WebDataset shards, a Hugging Face data set, torchvision's."""
import json
import posixpath
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import create_dataset

from ..errors import EvaluationError
from ..files import first_line
from .dataset import DataOptions, DataSplit, Files, Images, Stream
from .listing import list_archive, open_folder
from .reading import EXTENSIONS, LITTER, read_image

__all__ = ['open_split']

KINDS = ('torch', 'wds', 'hfds', 'hfids')


def open_split(
        root: Path | None, split: str = 'validation', name: str = '', options: DataOptions | None = None) -> DataSplit:
    """Open a split of a data set.

    ILSVRC's validation images as they are downloaded, in one folder or in ILSVRC2012_img_val.tar, get their labels
    from this package.

    Args:
        root: Folder or uncompressed archive; for `hfds` and `hfids` the cache folder, or None.
        split: Name of the split.
        name: timm's '<type>/<name>': '' for folders and archives, else torch/, wds/, hfds/ or hfids/.
        options: How it is read, where not as usual.

    Raises:
        EvaluationError: It cannot be opened, has no images, or has classes inside of one another.

    Example:
        >>> open_split(Path('imagenet'), 'val').classes[0]
        'n01440764'
    """
    options = options or DataOptions()
    kind = name.partition('/')[0].lower()
    if kind not in ('', *KINDS):
        raise EvaluationError(f'--dataset must begin with {", ".join(f"{kind}/" for kind in KINDS)}, got {name}. Leave '
                              f'it out for a folder or an archive.')
    if kind and options.class_map:
        raise EvaluationError(f'--class-map names class folders, and {name} has none. Leave it out.')
    if kind in ('hfds', 'hfids'):
        return _open_hub(root, split, name, options)
    if root is None:
        raise EvaluationError('No data to read. Name a folder or an archive with --data-dir.')
    if kind == 'wds':
        return _open_shards(root, split, options)
    return _open_torch(root, split, name, options) if kind else open_folder(root, split, options)


def _create(name: str, root: Path | None, split: str, **options: Any) -> Any:
    """timm's data set, or one sentence about what is wrong with it."""
    try:
        return create_dataset(name, root=None if root is None else str(root), split=split, **options)
    except Exception as error:  # each of timm's readers raises its own
        raise EvaluationError(f'The data set {name} cannot be opened ({type(error).__name__}: {first_line(error)}). '
                              f'Check --data-dir, --dataset and --split.') from error


def _open_torch(root: Path, split: str, name: str, options: DataOptions) -> DataSplit:
    dataset = _create(name, root, split, download=options.download)
    if hasattr(dataset, 'loader'):  # of files
        dataset.loader = read_image
    labels = np.asarray(dataset.targets, dtype=np.int64)
    return DataSplit(dataset, _ordered(getattr(dataset, 'class_to_idx', {})), labels, ())


def _ordered(class_to_idx: Mapping[str, int]) -> tuple[str, ...]:
    """Names of the classes in the order of their labels, which must be 0, 1, 2 and so on."""
    names = {int(label): str(name) for name, label in class_to_idx.items()}
    if sorted(names) != list(range(len(class_to_idx))):
        raise EvaluationError(f'The labels of the classes must be 0 to {len(class_to_idx) - 1}, each once, got '
                              f'{sorted(names)[:5]} and so on. Number them anew.')
    return tuple(names[label] for label in sorted(names))


def _open_hub(root: Path | None, split: str, name: str, options: DataOptions) -> DataSplit:
    """A Hugging Face data set, with an index (hfds) or as a stream (hfids)."""
    stream = name.lower().startswith('hfids/')
    keys = {'input_key': options.input_key or 'image', 'target_key': options.target_key or 'label'}
    more = {'num_samples': options.num_samples, 'download': options.download} if stream else {}
    # '' and below `decode` leave the decoding to the package's reader
    dataset = _create(name, root, split, input_img_mode='', **keys, **more)
    reader = dataset.reader
    if not stream:
        table = reader.dataset.data  # in which the image's column is made, empty, where there is none
        filled = [column for column in table.column_names if table.column(column).null_count < len(table)]
        _check_columns(name, keys, filled)
        labels = [-1 if label is None else label for label in reader.dataset[keys['target_key']]]
        chunks = table.column(keys['input_key']).chunks
        paths = [path for chunk in chunks for path in chunk.field('path').to_pylist()]
        names = tuple(paths) if len(paths) == len(reader) and all(paths) else ()
        return DataSplit(Images(reader, names), _ordered(reader.class_to_idx), np.array(labels, np.int64), names)
    if reader.builder.info.features is None:
        reader.builder.as_streaming_dataset()  # reads them from the files' schema
    features = reader.builder.info.features or {}
    _check_columns(name, keys, features)
    features[keys['input_key']].decode = False
    classes = getattr(features[keys['target_key']], 'names', ())
    return DataSplit(Stream(reader), tuple(classes), np.empty(0, np.int64), (), is_stream=True,
                     expected=int(reader.num_samples or 0))


def _check_columns(name: str, keys: Mapping[str, str], columns: Iterable[str]) -> None:
    for option, key in keys.items():
        if key not in columns:
            raise EvaluationError(f'{name} has no column {key}, it has: {", ".join(columns)}. Name the column by '
                                  f'--{option.replace("_", "-")}.')


def _open_shards(root: Path, split: str, options: DataOptions) -> DataSplit:
    """WebDataset shards on this machine, each image with an index: every process counts its own, none twice."""
    info = _create('wds/', root, split).reader.split_info
    image_keys = (options.input_key or ';'.join(EXTENSIONS).replace('.', '')).lower().split(';')
    names, places, labels = [], [], []
    for shard in info.filenames:
        if not (root / shard).is_file():
            raise EvaluationError(f'{root / shard} does not exist, but --split {split} names it. Check --data-dir and '
                                  f'--split.')
        for key, parts in _samples(root / shard).items():
            image_key = next((image_key for image_key in image_keys if image_key in parts), None)
            if image_key is None:
                raise EvaluationError(f'{key} in {shard} has no image under {";".join(image_keys)}, it has: '
                                      f'{", ".join(parts)}. Name the key of the image by --input-key.')
            names.append(f'{shard}/{key}.{image_key}')
            places.append(parts[image_key])
            labels.append(_label_in_shard(f'{key} in {shard}', parts, options.target_key or info.alt_label))
    if not names:
        raise EvaluationError(f'The shards {split} in {root} have no images. Check --data-dir and --split.')
    return DataSplit(
        Images(Files(root, places, labels), names), (), np.array(labels, np.int64), tuple(names),
        containers=tuple(str(root / shard) for shard in info.filenames),
        expected=options.num_samples or info.num_samples)


def _samples(shard: Path) -> dict[str, dict[str, tuple[str, int, int]]]:
    """The files of a shard by the part of their names before the first dot, and by the part after it, as WebDataset."""
    samples: dict[str, dict[str, tuple[str, int, int]]] = {}
    for name, place in list_archive(shard):
        folder, base = posixpath.split(name)
        stem, _, ending = base.partition('.')
        assert not isinstance(place, str)
        if ending and not LITTER.fullmatch(base):
            samples.setdefault(posixpath.join(folder, stem), {})[ending.lower()] = place
    return samples


def _label_in_shard(sample: str, parts: Mapping[str, tuple[str, int, int]], target_key: str) -> int:
    """The class of a sample: the number in its .cls, or under a key of its .json."""
    part = 'json' if target_key else 'cls'
    if part not in parts:
        raise EvaluationError(f'{sample} has no .{part} with its class, it has: {", ".join(parts)}. Name the key of '
                              f'the class in .json by --target-key.')
    path, offset, size = parts[part]
    with open(path, 'rb') as shard:
        shard.seek(offset)
        content = shard.read(size)
    try:
        return int(json.loads(content)[target_key] if target_key else content)
    except (KeyError, TypeError, ValueError) as error:
        raise EvaluationError(f'{sample} must have a whole number{f" under {target_key}" if target_key else ""} in its '
                              f'.{part}, got {content[:60]!r} ({type(error).__name__}). Check --target-key.') from None
