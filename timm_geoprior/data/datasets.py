"""Where the images come from: timm's data sets, archives of any compression, and ILSVRC's own files as downloaded."""
import bz2
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import lzma
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from timm.data import ImageNetInfo, create_dataset

from ..errors import EvaluationError

__all__ = ['EvalSet', 'fingerprint', 'ilsvrc_val_labels', 'open_data', 'plain_archive', 'take_shards']

ILSVRC_FILE = re.compile(r'ILSVRC2012_val_(\d{8})\.JPEG')
ILSVRC_ARCHIVE = 'ILSVRC2012_img_val.tar'
KINDS = ('torch', 'wds', 'hfds', 'hfids')
STREAMS = ('wds', 'hfids')


@dataclass(frozen=True)
class EvalSet:
    """A data set opened for evaluation.

    Attributes:
        dataset: What timm's `create_dataset` gave.
        classes: Names of the classes in the order of the labels; empty where the data name none.
        labels: Index into `classes` of each image, shape (images,); empty for a stream.
        names: File name of each image, with its folder inside the data set; empty where they are not known.
        is_stream: Whether the images come in an order of their own, without an index.
        shards: Files of a WebDataset; empty for other data.
    """
    dataset: Any
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    is_stream: bool = False
    shards: tuple[str, ...] = ()

    def name_of(self, index: int) -> str:
        """What to call an image in a message."""
        return self.names[index] if self.names else f'image {index}'

    def class_of(self, index: int) -> str:
        """The name of an image's class, else its label."""
        label = int(self.labels[index])
        return self.classes[label] if self.classes else str(label)


@functools.cache
def ilsvrc_val_labels() -> NDArray[np.int64]:
    """Class indices (synsets sorted) of ILSVRC2012_val_00000001 to 00050000, shape (50000,)."""
    packed = resources.files(__package__).joinpath('ilsvrc2012_val_labels.txt.xz').read_bytes()
    return np.array(lzma.decompress(packed).split(), dtype=np.int64)


@contextlib.contextmanager
def plain_archive(path: Path) -> Iterator[Path]:
    """Give timm's tar reader what it can read: an uncompressed archive whose name ends in .tar.

    A compressed one is unpacked to a temporary file for as long as the context lasts: images cannot be sought in it.

    Args:
        path: A folder or an archive, compressed by gzip, bzip2, xz or not at all.

    Yields:
        The folder, the archive itself where timm reads it as it is, or the temporary one.

    Raises:
        EvaluationError: There is no such file, it is no archive, or it is damaged.
    """
    if not path.exists():
        raise EvaluationError(f'{path} does not exist, expected a folder of images or a tar archive: check --data-dir.')
    if path.is_dir() or (path.suffix == '.tar' and _opener(path) is open):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, 'images.tar')
        try:
            with _opener(path)(path, 'rb') as source, plain.open('wb') as target:
                shutil.copyfileobj(source, target, 2 ** 20)
        except (EOFError, OSError, lzma.LZMAError) as error:
            raise EvaluationError(
                f'{path} cannot be unpacked ({error}), expected a whole archive: it is damaged or cut off, '
                f'or {tempfile.gettempdir()} is full.') from None
        yield plain


def _opener(path: Path) -> Any:
    """The function that opens a file uncompressed, by its first bytes."""
    with path.open('rb') as file:
        start = file.read(6)
    for magic, opener in ((b'\xfd7zXZ\0', lzma.open), (b'\x1f\x8b', gzip.open), (b'BZh', bz2.open)):
        if start.startswith(magic):
            return opener
    return open


def open_data(root: Path | None, name: str = '', split: str = 'validation', **options: Any) -> EvalSet:
    """Open a data set through timm's `create_dataset`.

    ILSVRC's validation images as they are downloaded, in one folder or in ILSVRC2012_img_val.tar, get their labels
    from this package.

    Args:
        root: Folder or uncompressed archive; for `hfds` and `hfids` the cache folder, or None.
        name: timm's '<type>/<name>': '' for folders and archives, else torch/, wds/, hfds/ or hfids/.
        split: Name of the split.
        **options: The rest of `create_dataset`.

    Returns:
        The data set.

    Raises:
        EvaluationError: It cannot be opened, or has no images.
    """
    kind = name.partition('/')[0].lower()
    if kind not in ('', *KINDS):
        raise EvaluationError(f'--dataset is {name!r}, expected nothing (a folder or an archive) or one that begins '
                              f'with {", ".join(f"{kind}/" for kind in KINDS)}.')
    if root is None and kind not in ('hfds', 'hfids'):
        raise EvaluationError('No data were named, expected a folder or an archive: name it by --data-dir.')
    if not kind and root is not None:
        root = _downloaded_archive(root, split)
    try:
        dataset = create_dataset(name, root=None if root is None else str(root), split=split, **options)
    except Exception as error:  # each of timm's readers raises its own
        shown = name or root
        reason = str(error).splitlines()[0] if str(error) else 'timm says no more'
        raise EvaluationError(f'The data set {shown} cannot be opened ({type(error).__name__}: {reason}), expected '
                              f'images that timm reads: check --data-dir, --dataset and --split.') from error
    if kind in STREAMS:
        shards = tuple(dataset.reader.split_info.filenames) if kind == 'wds' else ()
        return EvalSet(dataset, _class_names(dataset.reader), np.empty(0, np.int64), (), is_stream=True, shards=shards)
    data = _indexed(dataset, kind)
    if not len(data.labels):
        raise EvaluationError(f'{name or root} has no images, expected some: check --data-dir and --split.')
    return _with_ilsvrc_labels(data) if not kind else data


def _downloaded_archive(root: Path, split: str) -> Path:
    """ILSVRC's archive of validation images where the folder holds it instead of a folder of images."""
    archive = root / ILSVRC_ARCHIVE
    folders = any((root / folder).is_dir() for folder in (split, 'val', 'validation'))
    return archive if split in ('val', 'validation') and archive.is_file() and not folders else root


def _class_names(source: Any) -> tuple[str, ...]:
    """Names of the classes of a reader (or a torchvision data set) in the order of its labels."""
    found = getattr(source, 'class_to_idx', None) or getattr(source, 'class_name_to_idx', None) or {}
    if not found and hasattr(source, 'builder'):  # timm's stream of a Hugging Face data set, before 1.0.31
        if source.builder.info.features is None:
            source.builder.as_streaming_dataset()  # reads them from the files' schema
        feature = (source.builder.info.features or {}).get(source.target_key)
        found = {name: label for label, name in enumerate(getattr(feature, 'names', ()))}
    names = {int(label): str(name) for name, label in found.items()}
    if sorted(names) != list(range(len(found))):
        raise EvaluationError(f'The classes have the labels {sorted(names)[:5]} and so on, expected 0 to '
                              f'{len(found) - 1}, each once: check --class-map.')
    return tuple(names[label] for label in sorted(names))


def _indexed(dataset: Any, kind: str) -> EvalSet:
    source = dataset if kind == 'torch' else dataset.reader
    labels: Sequence[int]
    if kind == 'hfds':
        labels, names = source.dataset[source.label_key], _hub_names(source)
    elif hasattr(source, 'targets'):  # archives and torchvision
        labels = source.targets
        names = () if kind == 'torch' else dataset.filenames()
    else:
        labels, names = [target for _, target in source.samples], dataset.filenames()
    names = tuple(name.replace(os.sep, '/') for name in names)
    return EvalSet(dataset, _class_names(source), np.asarray(labels, dtype=np.int64), names)


def _hub_names(reader: Any) -> Sequence[str]:
    """File names that a Hugging Face data set keeps beside its images, without reading those."""
    chunks = reader.dataset.data.column(reader.image_key).chunks
    paths = [path for chunk in chunks for path in chunk.field('path').to_pylist()]
    return paths if len(paths) == len(reader) and all(paths) else ()


def _with_ilsvrc_labels(data: EvalSet) -> EvalSet:
    """Label ILSVRC's validation images by their numbers where no class folders do it."""
    if len(data.classes) > 1 or re.fullmatch(r'n\d{8}', data.classes[0]):
        return data
    numbers = []
    for name in data.names:
        match = ILSVRC_FILE.fullmatch(os.path.basename(name))
        if match is None and '/' in name:  # one class, in a folder of its own
            return data
        if match is None or not 1 <= int(match[1]) <= len(ilsvrc_val_labels()):
            raise EvaluationError(
                f'{name} lies in no class folder, expected CLASS/IMAGE, or only ILSVRC2012_val_00000001.JPEG to '
                f'00050000.JPEG: sort the images into one folder a class.')
        numbers.append(int(match[1]))
    wnids = ImageNetInfo('imagenet-1k').label_names()
    present, labels = np.unique(ilsvrc_val_labels()[np.array(numbers) - 1], return_inverse=True)
    return dataclasses.replace(data, classes=tuple(wnids[label] for label in present), labels=labels)


def take_shards(data: EvalSet, rank: int, world_size: int) -> int:
    """Give a stream's process its own shards, each to one process, none to two.

    timm's WebDataset reader would cut every process off after the same number of images, so as to leave some out and
    repeat others. Its reader of Hugging Face streams divides them exactly by itself.

    Args:
        data: A stream.
        rank: This process.
        world_size: Number of processes.

    Returns:
        The number of shards that this process reads; 1 for a stream that is not made of shards.
    """
    if not data.shards:
        return 1
    reader, own = data.dataset.reader, data.shards[rank::world_size]
    reader.split_info = dataclasses.replace(reader.split_info, filenames=own)
    reader.dist_rank, reader.dist_num_replicas = 0, 1
    return len(own)


def fingerprint(data: EvalSet, indices: NDArray[np.int64], name: str = '') -> dict[str, Any]:
    """What a second person's data can be compared by.

    Args:
        data: The data set.
        indices: The images that are counted.
        name: timm's name of the data set.

    Returns:
        `files`, `bytes`, and `names_sha256`, the hash of the sorted names, one a line: of the images as CLASS/FILE
        (the same from a folder and from an archive), else of the files that hold them. Empty where neither is known.
    """
    if not data.is_stream and data.names:
        sizes = _image_bytes(data, indices)
        names = [f'{data.class_of(i)}/{os.path.basename(data.names[i])}' for i in indices]
    else:
        paths = _container_files(data, name)
        sizes, names = [os.path.getsize(path) for path in paths], [os.path.basename(path) for path in paths]
    digest = hashlib.sha256('\n'.join(sorted(names)).encode()).hexdigest()
    return {'files': len(names), 'bytes': sum(sizes), 'names_sha256': digest} if names else {}


def _image_bytes(data: EvalSet, indices: NDArray[np.int64]) -> list[int]:
    reader = data.dataset.reader
    if hasattr(reader, 'dataset'):
        import pyarrow.compute as pc
        chunks = reader.dataset.data.column(reader.image_key).chunks
        sizes = [size or 0 for chunk in chunks for size in pc.binary_length(chunk.field('bytes')).to_pylist()]
        return [sizes[i] for i in indices]
    if isinstance(reader.samples[0][0], tarfile.TarInfo):
        return [int(reader.samples[i][0].size) for i in indices]
    return [os.path.getsize(reader.samples[i][0]) for i in indices]


def _container_files(data: EvalSet, name: str) -> list[str]:
    """The local files that a stream is read from."""
    if data.shards:
        paths = [os.path.join(data.dataset.reader.root or '', file) for file in data.shards]
    else:
        path = Path(name.partition('/')[2])
        paths = [str(file) for file in path.rglob('*')] if path.is_dir() else [str(path)]
    return [path for path in paths if os.path.isfile(path)]
