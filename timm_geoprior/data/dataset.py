"""An opened split of a data set: what it holds, how its images are reached, and what it can be recognised by."""
import hashlib
import io
import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data import ImageDataset, IterableImageDataset

from ..errors import ImageError
from .reading import read_image, read_item

__all__ = ['UNREADABLE', 'DataOptions', 'DataSplit', 'Files', 'Images', 'Place', 'Stream', 'fingerprint']

UNREADABLE = -2  # the target of an image of a stream that cannot be read
Place = str | tuple[str, int, int]  # a file, or file, offset and size of a part of one


@dataclass(frozen=True)
class DataOptions:
    """How a data set is read; the names are those of timm's `create_dataset`."""
    class_map: str = ''  # text file with the names of the class folders, one per line, in the order of the classes
    num_samples: int | None = None  # number of images, where a stream does not tell it
    input_key: str = ''  # column or key of the image; for folders, endings of image files, such as '.jpg;.bmp'
    target_key: str = ''  # column or key of the class
    download: bool = False  # allow timm to download the data set
    labelled: bool = True  # refuse a folder whose images are not in class folders; else they have no class


@dataclass(frozen=True)
class DataSplit:
    """A split of a data set, opened, for training, evaluation and conversion alike."""
    dataset: Any  # a data set of timm's kind; with an index, its images are read by `read_item`
    classes: tuple[str, ...]  # names in the order of the labels; empty where the data name none
    labels: NDArray[np.int64]  # index into `classes` of each image, -1 for one without a class; empty for a stream
    names: tuple[str, ...]  # file of each image, with its folder inside the data set; empty where they are not known
    is_stream: bool = False  # the images come in an order of their own, without an index
    sorted_names: bool = False  # the order of the classes is only that of their folders' names
    expected: int = 0  # number of images by the data set's own description, 0 where it has none
    containers: tuple[str, ...] = ()  # files that hold the images, where those are no files of their own
    notes: tuple[str, ...] = ()  # what a person should know about the data, a sentence each

    def name_of(self, index: int) -> str:
        """What to call an image in a message."""
        return self.names[index] if self.names else f'image {index}'

    def class_of(self, index: int) -> str:
        """The name of an image's class, else its label."""
        label = int(self.labels[index])
        return self.classes[label] if self.classes else str(label)


class Files:
    """Files and parts of files, with the interface of timm's readers."""

    def __init__(self, root: Path, places: Sequence[Place], labels: Sequence[int]) -> None:
        self.root, self.places, self.labels = root, places, labels

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        place = self.places[index]
        if isinstance(place, str):
            return open(place, 'rb'), self.labels[index]
        path, offset, size = place
        # opened anew each time: an open file, and its position, would be shared by all workers after a fork
        with open(path, 'rb') as archive:
            archive.seek(offset)
            return io.BytesIO(archive.read(size)), self.labels[index]

    def size(self, index: int) -> int:
        """Bytes of an image's file."""
        place = self.places[index]
        return os.path.getsize(place) if isinstance(place, str) else place[2]


class Images(ImageDataset):
    """timm's data set, whose images are read as all others are."""

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


class Stream(IterableImageDataset):
    """A stream of timm's whose images are read as all others are; what cannot be read has the target UNREADABLE."""

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
        (the same from a folder and from an archive), else of the files that hold them. Empty where neither is known.
    """
    if data.names and not data.containers:
        sizes = _sizes(data.dataset.reader, indices)
        names = [f'{data.class_of(i)}/{posixpath.basename(data.names[i])}' for i in indices]
    else:
        place = Path(name.partition('/')[2])  # a Hugging Face data set on this machine: a folder of parquet files
        files = [Path(path) for path in data.containers] or [place, *place.rglob('*')]
        files = [path for path in files if path.is_file()]
        sizes, names = [path.stat().st_size for path in files], [path.name for path in files]
    # a name that is no UTF-8 counts with its own bytes
    digest = hashlib.sha256('\n'.join(sorted(names)).encode(errors='surrogateescape')).hexdigest()
    return {'files': len(names), 'bytes': sum(sizes), 'names_sha256': digest} if names else {}


def _sizes(reader: Any, indices: NDArray[np.int64]) -> list[int]:
    if isinstance(reader, Files):
        return [reader.size(i) for i in indices]
    import pyarrow.compute as pc  # of a Hugging Face data set, whose images are cells of a table
    chunks = reader.dataset.data.column(reader.image_key).chunks
    sizes = [size or 0 for chunk in chunks for size in pc.binary_length(chunk.field('bytes')).to_pylist()]
    return [sizes[i] for i in indices]
