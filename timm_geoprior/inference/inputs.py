"""The images given to a command: a file, a folder, a pattern, or the sample photograph."""
import glob
import os
import re
from collections.abc import Iterator

from PIL import Image

from ..data.reading import EXTENSIONS, LITTER, read_image
from ..errors import GeoPriorError, ImageError
from ..files import walk_files


def sample_image() -> Image.Image:
    """A photograph of a cup of espresso in mode 'RGB', 600 x 400 pixels, which comes with scikit-image."""
    try:
        from skimage import data
    except ImportError:
        raise GeoPriorError(
            'The sample photograph comes with scikit-image, which is not installed. Name an image, or run '
            '`pip install scikit-image` (the extra "sample").') from None
    return Image.fromarray(data.coffee())


def _is_hidden(name: str) -> bool:
    return name.startswith('.') or LITTER.fullmatch(name) is not None


def _walk(place: str) -> Iterator[str]:
    """Files in a folder and below it, without hidden ones and litter, sorted with each folder's own files first."""
    try:
        found = [(name.split('/'), path) for name, path in walk_files(place, _is_hidden)]
    except OSError as error:
        raise ImageError(
            f'The folder {error.filename} cannot be read ({error.strerror}). Check its permissions.') from None
    for parts, path in sorted(found, key=lambda item: (item[0][:-1], item[0][-1])):
        if not _is_hidden(parts[-1]):
            yield path


def find_images(name: str) -> tuple[list[str], list[str]]:
    """The image files that a command-line argument stands for, and other files, left out because of their extension.

    The argument is a file, a folder to search recursively, or a pattern such as `photos/**/*.jpg`.
    """
    if os.path.isfile(name):
        return [name], []
    found = [name] if os.path.lexists(name) else [  # without hidden files, which glob leaves out
        item for item in sorted(glob.glob(name, recursive=True))
        if not any(map(LITTER.fullmatch, re.split(r'[\\/]', item)))]
    files = dict.fromkeys(file for place in found for file in (_walk(place) if os.path.isdir(place) else [place]))
    images = [file for file in files if file.lower().endswith(EXTENSIONS)]
    others = [file for file in files if not file.lower().endswith(EXTENSIONS)]
    if not images:
        if not found and _is_denied(name):
            read_image(name)  # raises the error that says why
        reason = 'has no images in it' if found else 'does not exist'
        raise ImageError(f'{name} {reason}. Name an image, a folder of images or a pattern.')
    return images, others


def _is_denied(path: str) -> bool:
    try:
        os.stat(path)
    except PermissionError:
        return True
    except (OSError, ValueError):
        pass
    return False


def check_header(path: str) -> None:
    """Raise ImageError if a file is not an image, without reading all of it."""
    try:
        with Image.open(path):
            pass
    except Exception:
        read_image(path)  # raises the error that says why
