"""An opened data set, whose images are read as all others are."""
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

__all__ = ['UNREADABLE', 'DataOptions', 'DataSplit', 'Files', 'Images', 'Place', 'Stream']

UNREADABLE = -2  # the target of an image of a stream that cannot be read
Place = str | tuple[str, int, int]  # a file, or file, offset and size of a part of one


@dataclass(frozen=True)
class DataOptions:
    """How a data set is read, where it is not as usual; the names are those of timm's `create_dataset`.

    Attributes:
        class_map: Text file with the names of the class folders, one per line, in the order of the classes.
        num_samples: Number of images, where a stream does not tell it.
        input_key: Column or key of the image; for folders, endings of image files, such as '.jpg;.bmp'.
        target_key: Column or key of the class.
        download: Allow timm to download the data set.
        labelled: Refuse a folder whose images are not in class folders; else they have no class.
    """
    class_map: str = ''
    num_samples: int | None = None
    input_key: str = ''
    target_key: str = ''
    download: bool = False
    labelled: bool = True


@dataclass(frozen=True)
class DataSplit:
    """A data set, opened.

    Attributes:
        dataset: A data set of timm's kind; with an index, its images are read by `read_item`.
        classes: Names of the classes in the order of the labels; empty where the data name none.
        labels: Index into `classes` of each image, -1 for one without a class, shape (images,); empty for a stream.
        names: File name of each image, with its folder inside the data set; empty where they are not known.
        is_stream: Whether the images come in an order of their own, without an index.
        sorted_names: Whether the order of the classes is only that of their folders' names.
        expected: Number of images by the data set's own description, 0 where it has none.
        containers: Files that hold the images, where those are no files of their own.
        notes: What a person should know about the data, a sentence each.
    """
    dataset: Any
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    is_stream: bool = False
    sorted_names: bool = False
    expected: int = 0
    containers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

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
        with open(path, 'rb') as archive:
            archive.seek(offset)
            return io.BytesIO(archive.read(size)), self.labels[index]

    def size(self, index: int) -> int:
        """Bytes of an image's file."""
        place = self.places[index]
        return os.path.getsize(place) if isinstance(place, str) else place[2]


class Images(ImageDataset):
    """timm's data set, whose images are read as all others are."""

    def __init__(self, root: str, reader: Any, names: Sequence[str]) -> None:
        super().__init__(root, reader=reader)  # type: ignore[no-untyped-call]
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
