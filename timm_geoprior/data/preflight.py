"""What can be known to be wrong before any time is spent on the network."""
import os
from collections import defaultdict
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .datasets import EvalSet
from .workers import init_worker

__all__ = ['empty_folders', 'find_unreadable', 'image_fault', 'nested_folders', 'repeated_classes']

_ENDS = {'JPEG': b'\xff\xd9', 'PNG': b'IEND\xaeB`\x82'}


def image_fault(file: BinaryIO) -> str | None:
    """Say why a file cannot be read as an image.

    A JPEG or PNG file with a good head and its format's end is taken to be whole; any other is decoded. That is a
    fraction of what decoding every image costs, and finds the files that were cut off, emptied or are no images.

    Args:
        file: Open for reading, can be sought in.

    Returns:
        The reason, or None.
    """
    try:
        with Image.open(file) as image:
            end = _ENDS.get(image.format or '')
            if end is not None:
                position = file.tell()
                file.seek(-len(end), os.SEEK_END)
                whole = file.read() == end
                file.seek(position)
                if whole:
                    return None
            image.load()
    except Exception as error:  # a decoder fed with damaged bytes may raise anything
        return str(error).splitlines()[0].replace(repr(file), 'it') if str(error) else type(error).__name__
    return None


class _Faults(Dataset[tuple[int, str] | None]):
    """The fault of each image, if any: read in a loader's workers, so that only they open archives."""

    def __init__(self, reader: Any, indices: NDArray[np.int64]) -> None:
        self.reader, self.indices = reader, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, str] | None:
        index = int(self.indices[position])
        try:
            with self.reader[index][0] as file:
                fault = image_fault(file)
        except Exception as error:  # a missing right to read it, a damaged archive
            fault = str(error) or type(error).__name__
        return None if fault is None else (index, fault)


def find_unreadable(
        data: EvalSet, indices: NDArray[np.int64], workers: int, quiet: bool = False) -> list[tuple[int, str]]:
    """Look at every image's head and end.

    Args:
        data: With an index.
        indices: The images to look at.
        workers: Processes that read.
        quiet: Show no progress.

    Returns:
        Index and reason of each image that cannot be read; none where the data are not files (torchvision's).
    """
    reader = getattr(data.dataset, 'reader', None)
    if reader is None:
        return []
    loader = DataLoader(_Faults(reader, indices), batch_size=64, num_workers=workers, collate_fn=list,
        worker_init_fn=init_worker)
    found: list[tuple[int, str]] = []
    with tqdm(total=len(indices), desc='checking', unit=' images', disable=True if quiet else None) as progress:
        for batch in loader:
            found += [fault for fault in batch if fault is not None]
            progress.update(len(batch))
    return found


def _root(data: EvalSet) -> str | None:
    """The folder whose folders are the classes; None where the data are no folder."""
    root = getattr(getattr(data.dataset, 'reader', None), 'root', None)
    return root if data.names and root is not None and os.path.isdir(root) else None


def nested_folders(data: EvalSet) -> list[str]:
    """Class folders that lie in another folder, by name: timm takes all it finds where the split has none."""
    folders = {os.path.dirname(name) for name in data.names} if _root(data) is not None else set()
    return sorted(folder for folder in folders if '/' in folder)


def empty_folders(data: EvalSet) -> list[str]:
    """Folders beside the class folders that hold no image, by name; none where the data are no folder."""
    root = _root(data)
    if root is None:
        return []
    filled = {name.split('/', 1)[0] for name in data.names}
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name not in filled)


def repeated_classes(data: EvalSet) -> list[tuple[str, list[str]]]:
    """Classes that stand more than once.

    timm takes the last folder's name for the class, so folders of the same name in different places become one class
    silently; and folders that differ only in case or blanks are two classes where one was meant.

    Returns:
        A class's name, and the folders that bear it.
    """
    folders: dict[str, set[str]] = defaultdict(set)
    for index, name in enumerate(data.names):
        folder = os.path.dirname(name)
        if os.path.basename(folder) == data.class_of(index):
            folders[data.class_of(index)].add(folder)
    alike: dict[str, set[str]] = defaultdict(set)
    for name in data.classes:
        alike[name.strip().casefold()].add(name)
    return [(name, sorted(places)) for found in (folders, alike) for name, places in found.items() if len(places) > 1]

