"""Which images are in a folder or an archive, and which class each of them has."""
import codecs
import contextlib
import functools
import lzma
import posixpath
import re
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from timm.data import ImageNetInfo

from ..errors import EvaluationError
from ..files import first_line, walk_files
from .reading import EXTENSIONS, LITTER

SPLITS = {
    'train': ('train', 'training'),
    'val': ('val', 'valid', 'validation', 'dev', 'eval', 'evaluation'),
    'test': ('test', 'testing'),
}
ILSVRC_FILE = re.compile(r'ILSVRC2012_val_(\d{8})(_n\d{8})?\.JPEG')
ILSVRC_ARCHIVE = 'ILSVRC2012_img_val.tar'
Place = str | tuple[str, int, int]  # a file, or the file, offset and size of a part of one
_Found = tuple[str, Place]  # the name of a file inside the data set, and where it is


@dataclass(frozen=True)
class DataOptions:
    """How a data set is read; the names are those of timm's `create_dataset`."""
    class_map: str = ''  # text file with the names of the class folders, one per line, in the order of the classes
    num_samples: int | None = None  # number of images, if a stream does not state it
    input_key: str = ''  # column or key of the image; for folders, extensions of image files, such as '.jpg;.bmp'
    target_key: str = ''  # column or key of the class
    download: bool = False  # allow timm to download the data set
    labelled: bool = True  # reject images that are not in class folders; if False, they have no class


@dataclass(frozen=True)
class Listing:
    """The images of a folder or an archive; fields that `DataSplit` also has mean the same there."""
    root: Path
    places: list[Place]
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    sorted_names: bool
    notes: tuple[str, ...]


def folders_of_split(folder: Path, split: str) -> list[str]:
    """Find the folders that a split may mean, in any case: first of that exact name, then of its other names."""
    return names_of_split([path.name for path in folder.iterdir() if path.is_dir()], split)


def is_inside_images(output: Path, data_dir: Path, *splits: str) -> bool:
    """Whether images written to `output` would be read as images of these splits, or of another that exists."""
    try:
        found = {split: folders_of_split(data_dir, split) for split in (*splits, *SPLITS)}
        place = output.resolve()
    except (OSError, RuntimeError):  # reported when the images are listed, or the folder is made
        return False
    folders = [data_dir / name for names in found.values() for name in names]
    if not any(found[split] for split in splits):
        folders.append(data_dir)
    return any(folder.resolve() in (place, *place.parents) for folder in folders)


def names_of_split(names: Iterable[str], split: str) -> list[str]:
    """The folder names that a split may mean, in the order of `folders_of_split`."""
    meaning = next((words for words in SPLITS.values() if split.lower() in words), (split.lower(),))
    return sorted((name for name in names if name.lower() in meaning), key=lambda name: (
        name != split, name.lower() != split.lower(), meaning.index(name.lower()), name))


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Unpack a compressed archive, which allows no random access, while the context lasts.

    Args:
        path: A folder or an archive: .tar, .tar.gz, .tar.bz2, .tar.xz or .zip, whatever its name.

    Yields:
        The folder or the uncompressed archive itself, else a temporary folder.

    Raises:
        EvaluationError: The file does not exist, is not an archive, or cannot be unpacked.
    """
    if not path.exists():
        raise EvaluationError(f'{path} does not exist. Name a folder or an archive with --data-dir.')
    if path.is_dir() or _is_plain_tar(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix=f'{path.name}-') as folder:  # messages name files in it
        try:
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as packed:
                    packed.extractall(folder)
            else:
                with tarfile.open(path) as archive:
                    _unpack_tar(archive, Path(folder).resolve())
        except (EOFError, OSError, RuntimeError, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile) as error:
            raise EvaluationError(f'{path} cannot be unpacked ({first_line(error)}). It is not a tar or zip archive, '
                                  f'is damaged or cut off, or {tempfile.gettempdir()} is full.') from None
        yield Path(folder)


def _unpack_tar(archive: tarfile.TarFile, folder: Path) -> None:
    """Unpack an archive, with nothing written outside the folder."""
    if hasattr(tarfile, 'data_filter'):
        archive.extractall(folder, filter='data')
        return
    for member in archive.getmembers():  # Python before 3.10.12 and 3.11.4
        if not (member.isfile() or member.isdir()) or not (folder / member.name).resolve().is_relative_to(folder):
            raise tarfile.TarError(f'{member.name!r} is a link or a device, or lies outside the archive')
    archive.extractall(folder)


def _is_plain_tar(path: Path) -> bool:
    try:
        with tarfile.open(path, 'r:'):
            return True
    except tarfile.TarError:
        return False


def list_images(root: Path, split: str, options: DataOptions) -> Listing:
    """List and label the images of a split, as in `open_split`."""
    archive = root / ILSVRC_ARCHIVE
    found: Iterable[_Found]
    if root.is_dir():
        below = next(iter(folders_of_split(root, split)), '')
        if not below and split.lower() in SPLITS['val'] and archive.is_file():
            root, found, below = archive, list_archive(archive), archive.name
        else:
            root = root / below
            found = walk_files(root)
    elif root.is_file():
        found = list_archive(root)
        below = next(iter(names_of_split({name.split('/')[0] for name, _ in found if '/' in name}, split)), '')
        if below:
            found = [(name.removeprefix(f'{below}/'), place) for name, place in found if name.startswith(f'{below}/')]
    else:
        raise EvaluationError(f'{root} does not exist. Check --data-dir.')
    extensions = tuple(options.input_key.lower().split(';')) if options.input_key else EXTENSIONS
    images, notes = _choose_images(found, extensions)
    if not images:
        raise EvaluationError(f'{root} has no images. They must end in {", ".join(extensions)} and lie in one folder '
                              f'per class. Check --data-dir and --split.{"".join(f" {note}" for note in notes)}')
    if split and not below:
        _check_split(root, split, (name for name, _ in images))
    if options.labelled:
        _check_nesting([name for name, _ in images], root)
    listed = _with_ilsvrc_labels(_labelled(root, images, options.class_map, notes), options.labelled)
    return replace(listed, notes=(*listed.notes, *_missing_of_ilsvrc(listed.names)))


def _check_split(root: Path, split: str, names: Iterable[str]) -> None:
    """Reject a folder that has other splits but not this one; a class may have a split's name."""
    other = {word for words in SPLITS.values() if split.lower() not in words for word in words}
    # a million names have only a thousand folders
    groups = {PurePosixPath(folder).parent for folder in {posixpath.dirname(name) for name in names}}
    if found := sorted({str(folder) for group in groups for folder in (group, *group.parents)
                        if folder.name.lower() in other}):
        raise EvaluationError(f"{root} must have a folder of the split {split}, got {', '.join(found[:3])} only. Check "
                              f"the split's name, or name the folder of the classes.")


def list_archive(path: Path) -> list[_Found]:
    """The files of an uncompressed archive, and of archives nested in it, as for ILSVRC's training images."""
    found: list[_Found] = []

    def add(archive: tarfile.TarFile, start: int, prefix: str) -> None:
        for member in archive:
            name = posixpath.normpath(posixpath.join(prefix, member.name))
            if member.isfile() and name.endswith('.tar'):
                with tarfile.open(fileobj=archive.extractfile(member)) as inner:
                    add(inner, start + member.offset_data, name.removesuffix('.tar'))
            elif member.isfile():
                found.append((name, (str(path), start + member.offset_data, member.size)))

    try:
        with tarfile.open(path, 'r:') as outer:
            add(outer, 0, '')
    except (tarfile.TarError, OSError) as error:
        raise EvaluationError(f'{path} cannot be read as a tar archive ({first_line(error)}). It is damaged or cut '
                              f'off. Replace the file.') from None
    return found


def _choose_images(found: Iterable[_Found], extensions: tuple[str, ...]) -> tuple[list[_Found], list[str]]:
    """The images, in natural order as in timm's reader, and notes on what is left out."""
    images: list[_Found] = []
    litter: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for name, place in found:
        part = next((part for part in name.split('/') if LITTER.fullmatch(part)), None)
        extension = posixpath.splitext(name)[1].lower()
        if part is not None:
            litter['._*' if part.startswith('._') else part] += 1
        elif extension in extensions:
            images.append((name, place))
        else:
            others[extension or posixpath.basename(name)] += 1
    images.sort(key=lambda image: natural_key(image[0]))
    notes = [f'Skipped {counts.total():,} {what}: {_enumerate(counts)}.' for counts, what in (
        (litter, 'files that systems and programs leave behind'), (others, 'files without an image extension'),
    ) if counts]
    return images, notes


def natural_key(name: str) -> tuple[list[int | str], str]:
    """timm's key, which sorts 'a2' before 'a10', without its error for digits like '²'.

    Names with equal keys in timm, such as 'a1' and 'A01', are sorted by their characters, not left in the disk's order.
    """
    return [int(part) if part.isdecimal() else part for part in re.split(r'(\d+)', name.lower())], name


def _enumerate(counts: Counter[str], limit: int = 5) -> str:
    """The most frequent items with their counts."""
    listed = ', '.join(f'{name} ({count:,})' for name, count in counts.most_common(limit))
    return listed + (', ...' if len(counts) > limit else '')


def _check_nesting(names: Sequence[str], root: Path) -> None:
    """Reject a folder of images inside another one, and images deeper than GROUP/CLASS/IMAGE."""
    folders = {PurePosixPath(folder) for folder in {posixpath.dirname(name) for name in names}}
    common = PurePosixPath(posixpath.commonpath(folders))
    for folder in sorted(folders):
        outer = next((parent for parent in folder.parents if parent in folders), None)
        if outer is not None:
            raise EvaluationError(f'{root / outer} has images, and so has {root / folder} inside of it. Each class '
                                  f'must be one folder: move or remove one of the two.')
        if len(folder.parts) - len(common.parts) > 2:
            raise EvaluationError(f'{root / folder} has images too far down. They must lie in CLASS/IMAGE or '
                                  f'GROUP/CLASS/IMAGE: name the folder of the classes with --data-dir.')


def _labelled(root: Path, images: list[_Found], class_map: str, notes: list[str]) -> Listing:
    """Label images by their folders' names, in natural order as in timm's reader, or in the order of a class map."""
    folders = Counter(_class_folder(name) for name, _ in images)
    classes = _read_class_map(class_map, root) if class_map else sorted(folders, key=natural_key)
    index = {name: label for label, name in enumerate(classes)}
    unknown = Counter({folder: count for folder, count in folders.items() if folder not in index})
    if unknown.total() == len(images):
        raise EvaluationError(f'--class-map {class_map} must name class folders, such as {next(iter(folders))}, got '
                              f'{classes[0]} and so on. Correct the file.')
    if unknown:
        notes = [*notes, f'Skipped {unknown.total():,} images in {len(unknown)} folders that --class-map does not '
                         f'name: {_enumerate(unknown)}.']
        images = [image for image in images if _class_folder(image[0]) in index]
    labels = np.array([index[_class_folder(name)] for name, _ in images], np.int64)
    return Listing(root, [place for _, place in images], tuple(classes), labels, tuple(name for name, _ in images),
                   sorted_names=not class_map, notes=tuple(notes))


def _class_folder(name: str) -> str:
    return posixpath.basename(posixpath.dirname(name))


def _read_class_map(file: str, root: Path) -> list[str]:
    """Names of the class folders, one per line; blank lines at the end are ignored."""
    path = next((path for path in (Path(file), root / file) if path.is_file()), None)
    if path is None:
        raise EvaluationError(f'--class-map {file} does not exist. Check its path.')
    content = path.read_bytes()
    # Windows writes byte order marks, PowerShell UTF-16; bytes that are not UTF-8 may still be a folder's name
    encoding = 'utf-16' if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else 'utf-8-sig'
    lines = content.decode(encoding, errors='surrogateescape').rstrip().splitlines()
    classes = [line.strip() for line in lines]
    if '' in classes:
        raise EvaluationError(f'--class-map {file} must have one name per line, got a blank line '
                              f'{classes.index("") + 1}. Remove it, or write the name there.')
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if twice or not classes:
        raise EvaluationError(f'--class-map {file} must name each class once, got '
                              f'{f"{twice[0]} twice" if twice else "an empty file"}. Correct it.')
    return classes


# -- ILSVRC ------------------------------------------------------------------------------------------------------------

@functools.cache
def ilsvrc_val_labels() -> NDArray[np.int64]:
    """Class indices (synsets sorted) of ILSVRC2012_val_00000001 to 00050000, shape (50000,)."""
    packed = resources.files(__package__).joinpath('ilsvrc2012_val_labels.txt.xz').read_bytes()
    return np.array(lzma.decompress(packed).split(), dtype=np.int64)


def _ilsvrc_numbers(names: Iterable[str]) -> NDArray[np.int64]:
    """The number in each file name; 0 if the name is not one of the 50,000."""
    matches = (ILSVRC_FILE.fullmatch(posixpath.basename(name)) for name in names)
    numbers = np.array([int(match[1]) if match else 0 for match in matches])
    return np.where(numbers <= len(ilsvrc_val_labels()), numbers, 0)


def _with_ilsvrc_labels(listed: Listing, labelled: bool) -> Listing:
    """Label ILSVRC's validation images by their numbers if they are not in class folders."""
    if len(listed.classes) > 1 or re.fullmatch(r'n\d{8}', listed.classes[0]):
        return listed
    numbers = _ilsvrc_numbers(listed.names)
    if not numbers.all():
        name = listed.names[int(np.argmin(numbers != 0))]
        if '/' in name and not ILSVRC_FILE.fullmatch(posixpath.basename(name)):  # one class, in a folder of its own
            return listed
        if not labelled:
            return replace(listed, classes=(), labels=np.full_like(listed.labels, -1), sorted_names=False)
        raise EvaluationError(f'{name} must lie in a folder of its class, or be one of ILSVRC2012_val_00000001.JPEG to '
                              f'00050000.JPEG. Sort the images into one folder per class.')
    wnids = ImageNetInfo('imagenet-1k').label_names()
    present, labels = np.unique(ilsvrc_val_labels()[numbers - 1], return_inverse=True)
    return replace(listed, classes=tuple(wnids[label] for label in present), labels=labels, sorted_names=False)


def _missing_of_ilsvrc(names: Sequence[str]) -> list[str]:
    """A note on which of ILSVRC's validation images are missing in the classes that are present."""
    numbers = _ilsvrc_numbers(names)
    if not len(numbers) or not numbers.all():
        return []
    labels = ilsvrc_val_labels()
    of_classes = np.flatnonzero(np.isin(labels, labels[numbers - 1])) + 1
    missing = np.setdiff1d(of_classes, numbers)
    if not len(missing):
        return []
    listed = ', '.join(f'ILSVRC2012_val_{number:08}.JPEG' for number in missing[:3])
    return [f'{len(missing):,} of the {len(of_classes):,} validation images of ILSVRC in these classes are missing: '
            f'{listed}{", ..." if len(missing) > 3 else ""}']
