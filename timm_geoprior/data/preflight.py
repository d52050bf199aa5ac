"""Checks of a data set, before any time is spent on the network."""
import functools
import os
import posixpath
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ..distributed import gather
from ..errors import EvaluationError
from ..files import first_line
from ..progress import Progress, tell_on_stderr
from .batches import map_in_workers
from .dataset import DataSplit
from .reading import LITTER, MAX_PIXELS, check_size, ignores_rotation, tell_of_rotations

ROTATION_IGNORED = ''  # in place of a fault: a rotation that is ignored
_ENDS = {'JPEG': b'\xff\xd9', 'PNG': b'IEND\xaeB`\x82'}


def check_data(
        data: DataSplit, workers: int, tell: Callable[[str], None] = print, rank: int = 0, world_size: int = 1) -> None:
    """Check a data set, whatever the model. Each process checks its share of the images.

    Args:
        data: The data set.
        workers: Number of processes that read.
        tell: Called with each message for the user.
        rank: Rank of this process.
        world_size: Number of processes.

    Raises:
        EvaluationError: A class has several folders, or images cannot be read; the message lists them.
    """
    if data.is_stream:
        tell('The data are a stream. Images are checked as they come.')
        return
    per_class = np.bincount(data.labels[data.labels >= 0], minlength=len(data.classes))
    without, per_class = int((per_class == 0).sum()), per_class[per_class > 0]
    spread = ' to '.join(f'{count:,}' for count in sorted({min(per_class, default=0), max(per_class, default=0)}))
    tell(f'{len(data.labels):,} images in {len(per_class):,} classes, {spread} in each'
         f'{f"; {without:,} classes have none" if without else ""}.')
    for note in data.notes:
        tell(note)
    if repeated := repeated_classes(data):
        places = '; '.join(f'{name}: {", ".join(places[:4])}' for name, places in repeated[:5])
        raise EvaluationError(f'Each class must have one folder, got several for {len(repeated)} ({places}). Name one '
                              f'split with --split or --data-dir, or join the folders.')
    folders = {posixpath.dirname(name) for name in data.names} if _root(data) is not None else set()
    if nested := sorted(folder for folder in folders if '/' in folder):
        tell(f'Class folders lie deeper than one level, as {nested[0]} does: there is no folder of this split, or '
             f'classes are grouped. All of them are used.')
    if empty := empty_folders(data):
        tell(f'Folders without images: {", ".join(empty[:10])}{" and others" if len(empty) > 10 else ""}.')
    own = range(rank, len(data.labels), world_size)
    found = gather(np.array(_look_at(data, own, workers, quiet=rank > 0), dtype=object).reshape(-1, 2)).tolist()
    faults = [(index, fault) for index, fault in found if fault != ROTATION_IGNORED]
    tell_of_rotations(len(found) - len(faults), tell)
    if faults:
        listed = '\n'.join(f'  {data.name_of(index)}: {reason}' for index, reason in sorted(faults))
        raise EvaluationError(f'{len(faults)} of {len(data.labels):,} images cannot be read. Replace or remove '
                              f'them:\n{listed}')


def image_fault(file: BinaryIO, name: str = '') -> str | None:
    """Say why a file cannot be read as an image; None for a good one, `ROTATION_IGNORED` if its rotation is ignored.

    A JPEG or PNG file with a valid header and its format's end marker is assumed to be complete; any other is decoded.
    This costs a fraction of decoding every image, and finds files that are truncated, empty or not images.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # as in `read_image`
            with Image.open(file) as image:
                check_size('it', image)
                if not _is_whole(file, image):
                    image.load()
                return ROTATION_IGNORED if ignores_rotation(image, name) else None
    except Image.DecompressionBombError:
        return f'it must have at most {MAX_PIXELS:,} pixels, got more. Scale it down'
    except Exception as error:  # a decoder fed with damaged bytes may raise anything
        return first_line(error).replace(repr(file), 'it')


def _is_whole(file: BinaryIO, image: Image.Image) -> bool:
    """Whether a JPEG or PNG file ends with its format's end marker."""
    end = _ENDS.get(image.format or '')
    if end is None:
        return False
    position = file.tell()
    file.seek(-len(end), os.SEEK_END)
    found = file.read()
    file.seek(position)
    return found == end


def _faults(data: DataSplit, indices: list[int]) -> list[tuple[int, str]]:
    """Index and fault of each image that has one, by `image_fault`."""
    faults: list[tuple[int, str]] = []
    for index in indices:
        fault: str | None
        try:
            with data.dataset.reader[index][0] as file:
                fault = image_fault(file, data.name_of(index))
        except Exception as error:  # no permission to read it, a damaged archive
            fault = first_line(error)
        faults += [] if fault is None else [(index, fault)]
    return faults


def _look_at(data: DataSplit, indices: Any, workers: int, quiet: bool) -> list[tuple[int, str]]:
    """Index and fault of each image that has one; none for torchvision's data sets, which have no reader."""
    if not hasattr(data.dataset, 'reader'):
        return []
    found: list[tuple[int, str]] = []
    with Progress('checking', len(indices), tell=None if quiet else tell_on_stderr) as progress:
        for batch in map_in_workers(functools.partial(_faults, data), indices, 64, workers):
            found += batch
            progress.update(min(64, len(indices) - progress.done))
    return found


def _root(data: DataSplit) -> Any:
    """The folder that contains the class folders; None if the data are not a folder."""
    root = getattr(getattr(data.dataset, 'reader', None), 'root', None)
    return root if data.names and root is not None and os.path.isdir(root) and not data.containers else None


def empty_folders(data: DataSplit) -> list[str]:
    """Names of the folders beside the class folders that hold no image; none if the data are not a folder."""
    root = _root(data)
    if root is None:
        return []
    filled = {name.split('/', 1)[0] for name in data.names}
    return sorted(path.name for path in Path(root).iterdir()
                  if path.is_dir() and path.name not in filled and not LITTER.fullmatch(path.name))


def repeated_classes(data: DataSplit) -> list[tuple[str, list[str]]]:
    """Classes that have several folders, and those folders.

    The last folder's name is the class, so folders of the same name in different places would silently become one
    class; and folders that differ only in case or outer blanks are two classes where one was meant.
    """
    folders: dict[str, set[str]] = defaultdict(set)
    for index, name in enumerate(data.names):
        folder = posixpath.dirname(name)
        if posixpath.basename(folder) == data.class_of(index):
            folders[data.class_of(index)].add(folder)
    alike: dict[str, set[str]] = defaultdict(set)
    for name in data.classes:
        alike[name.strip().casefold()].add(name)
    return [(name, sorted(places)) for found in (folders, alike) for name, places in found.items() if len(places) > 1]
