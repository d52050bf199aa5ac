"""Opening a split of a data set: a folder, an archive, WebDataset shards, or a Hugging Face or torchvision data set."""
import hashlib
import io
import json
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data import ImageDataset, IterableImageDataset, create_dataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import EvaluationError, ImageError
from ..files import first_line
from .batches import init_worker, start_workers
from .listing import DataOptions, Place, list_archive, list_images
from .reading import EXTENSIONS, LITTER, read_image, read_item

UNREADABLE = -2  # the target of an image that cannot be read
KINDS = ('torch', 'wds', 'hfds', 'hfids')


@dataclass(frozen=True)
class DataSplit:
    """A split of a data set, opened, for training, evaluation and conversion alike."""
    dataset: Any  # a timm or torchvision data set; with an index, its images are read with `read_item`
    classes: tuple[str, ...]  # names in the order of the labels; empty if the data have none
    labels: NDArray[np.int64]  # index into `classes` of each image, -1 for one without a class; empty for a stream
    names: tuple[str, ...]  # file of each image, with its folder inside the data set; empty if unknown
    is_stream: bool = False  # the images come in their own order, without an index
    sorted_names: bool = False  # the classes are merely in the order of their folders' names
    expected: int = 0  # number of images according to the data set's own description, 0 if it has none
    containers: tuple[str, ...] = ()  # the shards that hold the images of a WebDataset
    notes: tuple[str, ...] = ()  # what the user should know about the data, one sentence each

    def name_of(self, index: int) -> str:
        """What to call an image in a message."""
        return self.names[index] if self.names else f'image {index}'

    def class_of(self, index: int) -> str:
        """The name of an image's class, else its label."""
        label = int(self.labels[index])
        return self.classes[label] if self.classes else str(label)


def open_split(
        root: Path | None, split: str = 'validation', name: str = '', options: DataOptions | None = None) -> DataSplit:
    """Open a split of a data set.

    ILSVRC's validation images as downloaded, in one folder or in ILSVRC2012_img_val.tar, get their labels from this
    package.

    Args:
        root: Folder or uncompressed archive; for `hfds` and `hfids` the cache folder, or None.
        split: Name of the split.
        name: timm's '<type>/<name>': '' for folders and archives, else torch/, wds/, hfds/ or hfids/.
        options: How to read it; None for the defaults.

    Raises:
        EvaluationError: It cannot be opened, has no images, or has class folders inside one another.

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
    if kind == 'torch':
        return _open_torch(root, split, name, options)
    try:
        listed = list_images(root, split, options)
    except OSError as error:
        raise EvaluationError(f'{root} cannot be read ({first_line(error)}). Check --data-dir.') from None
    # 0 for an image without a class, as in timm: a loader treats -1 as an image that cannot be read
    dataset = Images(Files(listed.root, listed.places, np.maximum(listed.labels, 0).tolist()), listed.names)
    return DataSplit(
        dataset, listed.classes, listed.labels, listed.names, sorted_names=listed.sorted_names, notes=listed.notes)


def _create(name: str, root: Path | None, split: str, **options: Any) -> Any:
    """Create timm's data set, or say what is wrong with it."""
    try:
        return create_dataset(name, root=None if root is None else str(root), split=split, **options)
    except Exception as error:  # timm's readers raise different errors
        raise EvaluationError(f'The data set {name} cannot be opened ({type(error).__name__}: {first_line(error)}). '
                              f'Check --data-dir, --dataset and --split.') from error


def _open_torch(root: Path, split: str, name: str, options: DataOptions) -> DataSplit:
    dataset = _create(name, root, split, download=options.download)
    if hasattr(dataset, 'loader'):  # reads files
        dataset.loader = read_image
    labels = np.asarray(dataset.targets, dtype=np.int64)
    return DataSplit(dataset, _ordered(getattr(dataset, 'class_to_idx', {})), labels, ())


def _ordered(class_to_idx: Mapping[str, int]) -> tuple[str, ...]:
    """Names of the classes in the order of their labels, which must be 0, 1, 2 and so on."""
    names = {int(label): str(name) for name, label in class_to_idx.items()}
    if sorted(names) != list(range(len(class_to_idx))):
        raise EvaluationError(f'The labels of the classes must be 0 to {len(class_to_idx) - 1}, each once, got '
                              f'{sorted(names)[:5]} and so on. Renumber them.')
    return tuple(names[label] for label in sorted(names))


def _open_hub(root: Path | None, split: str, name: str, options: DataOptions) -> DataSplit:
    """A Hugging Face data set, with an index (hfds) or as a stream (hfids)."""
    stream = name.lower().startswith('hfids/')
    keys = {'input_key': options.input_key or 'image', 'target_key': options.target_key or 'label'}
    more = {'num_samples': options.num_samples, 'download': options.download} if stream else {}
    # '' here and `decode = False` below leave the decoding to this package's reader
    dataset = _create(name, root, split, input_img_mode='', **keys, **more)
    reader = dataset.reader
    if not stream:
        table = reader.dataset.data  # timm's cast to images adds an empty column if there is none
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
            raise EvaluationError(f'{name} has no column {key}, only {", ".join(columns)}. Name the column with '
                                  f'--{option.replace("_", "-")}.')


def _open_shards(root: Path, split: str, options: DataOptions) -> DataSplit:
    """Local WebDataset shards, each image with an index: every process counts its own, and none is counted twice."""
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
                raise EvaluationError(f'{key} in {shard} has no image under {";".join(image_keys)}, only '
                                      f'{", ".join(parts)}. Name the key of the image with --input-key.')
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
    """The files of a shard, grouped as in WebDataset: by their names before the first dot, then by what follows it."""
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
        raise EvaluationError(f'{sample} has no .{part} with its class, only {", ".join(parts)}. Name the key of '
                              f'the class in .json with --target-key.')
    path, offset, size = parts[part]
    with open(path, 'rb') as shard:
        shard.seek(offset)
        content = shard.read(size)
    try:
        return int(json.loads(content)[target_key] if target_key else content)
    except (KeyError, TypeError, ValueError) as error:
        raise EvaluationError(f'{sample} must have a whole number{f" under {target_key}" if target_key else ""} in its '
                              f'.{part}, got {content[:60]!r} ({type(error).__name__}). Check --target-key.') from None


# -- images and their files -------------------------------------------------------------------------------------------

class Files:
    """Files and parts of files, with the interface of timm's readers."""

    def __init__(self, root: Path, places: Sequence[Place], labels: Sequence[int] | NDArray[np.int64]) -> None:
        self.root, self.places, self.labels = root, places, labels

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        place = self.places[index]
        if isinstance(place, str):
            return open(place, 'rb'), int(self.labels[index])
        path, offset, size = place
        # opened each time: after a fork, all workers would share an open file and its position
        with open(path, 'rb') as archive:
            archive.seek(offset)
            return io.BytesIO(archive.read(size)), int(self.labels[index])

    def size(self, index: int) -> int:
        """Size of an image's file in bytes."""
        place = self.places[index]
        if not isinstance(place, str):
            return place[2]
        return os.path.getsize(place) if os.path.exists(place) else 0  # missing, or a broken link: unreadable too


class Images(ImageDataset):
    """timm's data set, with images read by this package's reader."""

    def __init__(self, reader: Any, names: Sequence[str]) -> None:
        super().__init__('', reader=reader)  # type: ignore[no-untyped-call]
        self.names = names

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Name of an image, with its folder inside the data set."""
        name = self.names[index] if self.names else f'image {index}'
        return posixpath.basename(name) if basename else name

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = read_item(self, index), int(self.reader[index][1])
        return image if self.transform is None else self.transform(image), target


class SelectedImages(Dataset[tuple[Any, int]]):
    """Some images of a data set, each once, in a given order and with given targets.

    torch's DistributedSampler repeats images until all processes have the same number of them, and timm's data set
    replaces an image that cannot be read with the next one. Here such an image has the target UNREADABLE.
    """

    def __init__(
            self, dataset: Any, indices: Sequence[int] | NDArray[np.int64], targets: Sequence[int] | NDArray[np.int64],
            transform: Callable[[Image.Image], Tensor] | None = None, mode: str = 'RGB') -> None:
        self.dataset, self.indices, self.targets, self.mode = dataset, indices, targets, mode
        self.transform: Any = transform  # timm's create_loader sets its own

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Any, int]:
        try:
            image, target = read_item(self.dataset, int(self.indices[place]), self.mode), int(self.targets[place])
        except Exception:  # torchvision's data sets, which decode themselves, may raise anything
            image, target = Image.new(self.mode, (8, 8)), UNREADABLE
        return self.transform(image), target

    def batches(self, batch_size: int, workers: int) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        """For each batch, the readable images, their targets, and the data set's indices of the unreadable images."""
        done = 0
        for images, targets in start_workers(
                DataLoader(self, batch_size, num_workers=workers, worker_init_fn=init_worker)):
            readable = targets != UNREADABLE
            unreadable = [int(self.indices[done + place]) for place in (~readable).nonzero()[:, 0].tolist()]
            done += len(targets)
            yield images[readable], targets[readable], unreadable


class Stream(IterableImageDataset):
    """timm's stream, with images read by this package's reader; an unreadable one has the target UNREADABLE."""

    def __init__(self, reader: Any) -> None:
        super().__init__(None, reader=reader)  # type: ignore[no-untyped-call]
        self.mode = 'RGB'

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        for found, label in self.reader:
            try:
                file = io.BytesIO(found['bytes']) if found['bytes'] else open(found['path'], 'rb')
                with file:
                    image = read_image(file, found['path'] or 'image', self.mode)
                target = -1 if label is None else int(label)
            except (ImageError, OSError):
                image, target = Image.new(self.mode, (8, 8)), UNREADABLE
            yield self.transform(image), self.target_transform(target)


def fingerprint(data: DataSplit, indices: NDArray[np.int64], name: str = '') -> dict[str, Any]:
    """Numbers by which two people can tell whether they have the same data.

    Args:
        data: The data set.
        indices: The images that are counted.
        name: timm's name of the data set.

    Returns:
        `files`, `bytes`, and `names_sha256`, the hash of the sorted names, one per line: of the images as CLASS/FILE
        (the same from a folder and from an archive), else of the files that hold them. Empty if neither is known.
    """
    if data.names and not data.containers:
        sizes = _sizes(data.dataset.reader, indices)
        names = [f'{data.class_of(i)}/{posixpath.basename(data.names[i])}' for i in indices]
    else:
        place = Path(name.partition('/')[2])  # a local Hugging Face data set: a folder of parquet files
        files = [Path(path) for path in data.containers] or [place, *place.rglob('*')]
        files = [path for path in files if path.is_file()]
        sizes, names = [path.stat().st_size for path in files], [path.name for path in files]
    # a name that is not UTF-8 is hashed as its raw bytes
    digest = hashlib.sha256('\n'.join(sorted(names)).encode(errors='surrogateescape')).hexdigest()
    return {'files': len(names), 'bytes': sum(sizes), 'names_sha256': digest} if names else {}


def _sizes(reader: Any, indices: NDArray[np.int64]) -> list[int]:
    if isinstance(reader, Files):
        return [reader.size(i) for i in indices]
    import pyarrow.compute as pc  # for a Hugging Face data set, whose images are cells of a table
    chunks = reader.dataset.data.column(reader.image_key).chunks
    sizes = [size or 0 for chunk in chunks for size in pc.binary_length(chunk.field('bytes')).to_pylist()]
    return [sizes[i] for i in indices]
