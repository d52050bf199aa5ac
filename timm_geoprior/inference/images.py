"""Pictures as people have them, made into what a network takes."""
import glob
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import GeoPriorError

__all__ = ['MAX_PIXELS', 'MAX_ASPECT_RATIO', 'ImageError', 'check_header', 'find_images', 'read_image', 'sample_image']

MAX_PIXELS = 178_956_970  # half a GiB of RGB, where Pillow itself refuses too
MAX_ASPECT_RATIO = 1000  # resized by its short side to 256 pixels, a thinner picture would not fit into memory

EXTENSIONS = ('.avif', '.bmp', '.gif', '.jfif', '.jp2', '.jpe', '.jpeg', '.jpg', '.pbm', '.pgm', '.png', '.ppm', '.tga',
              '.tif', '.tiff', '.webp')
_LITTER = re.compile(r'@eaDir|__MACOSX')  # of network drives and archives


class ImageError(GeoPriorError):
    """A file cannot be read as a picture."""


def _check_size(path: Path, image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f'{path} has {width} x {height} = {width * height:,} pixels, expected at most {MAX_PIXELS:,}: '
            f'scale it down.')
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(
            f'{path} has {width} x {height} pixels, expected one side at most {MAX_ASPECT_RATIO} times the other: '
            f'crop it.')


def _deep_grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit and floating-point grey, which Pillow would clip at 255."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
    whites = (1, 255, 65535) if image.mode == 'F' else (65535,)
    peak = float(values.max())
    white = next((white for white in whites if peak <= white), peak)
    return Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(('I', 'F')):
        return _deep_grey_to_8_bits(image).convert('RGB')
    if image.mode in ('LA', 'La', 'PA', 'RGBA', 'RGBa') or 'transparency' in image.info:
        rgba = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', rgba.size, 'white'), rgba)
    return image.convert('RGB')


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture of any kind that Pillow knows.

    Palette, CMYK, grey (1 to 32 bits and floating point, scaled, not clipped) and transparent pictures (laid on white)
    become RGB; of an animation the first frame is taken; a rotation that EXIF states is carried out.

    Args:
        path: The file.

    Returns:
        The picture in mode 'RGB', upright, at its full size.

    Raises:
        ImageError: The file is missing, a folder, no image or damaged; it has more than `MAX_PIXELS` pixels, or a side
            more than `MAX_ASPECT_RATIO` times the other.
    """
    path = Path(path)
    if path.is_dir():
        raise ImageError(f'{path} is a folder, expected an image file: name the files in it.')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Pillow warns of large pictures and odd metadata: both are dealt with here
            with Image.open(path) as image:
                _check_size(path, image)
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f'{path} does not exist, expected an image file: check its name.') from None
    except UnidentifiedImageError:
        raise ImageError(
            f'{path} is not an image that Pillow can read, expected JPEG, PNG, WebP, GIF, TIFF, BMP or the like: '
            f'convert it.') from None
    except Image.DecompressionBombError:
        raise ImageError(f'{path} has too many pixels, expected at most {MAX_PIXELS:,}: scale it down.') from None
    except Exception as error:  # a decoder fed with damaged bytes may raise anything
        raise ImageError(
            f'{path} cannot be decoded ({error}), expected a whole image: it is truncated or damaged, get it again.'
        ) from None


def sample_image() -> Image.Image:
    """A photograph of a cup of espresso, which comes with scikit-image, 600 x 400 pixels.

    Returns:
        The picture in mode 'RGB'.

    Raises:
        GeoPriorError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError:
        raise GeoPriorError(
            'The sample photograph comes with scikit-image, which is not installed. Name an image, or run '
            '`pip install scikit-image` (the extra "sample").') from None
    return Image.fromarray(data.coffee())


def _is_hidden(name: str) -> bool:
    return name.startswith('.') or _LITTER.fullmatch(name) is not None


def _walk(place: str) -> Iterator[str]:
    """Files of a folder and of all below it, without hidden ones and litter, sorted."""
    for folder, folders, files in os.walk(place):
        folders[:] = sorted(item for item in folders if not _is_hidden(item))
        yield from (os.path.join(folder, file) for file in sorted(files) if not _is_hidden(file))


def find_images(name: str) -> tuple[list[str], list[str]]:
    """The images that a word of the command line stands for.

    Args:
        name: A file, a folder to search with all that is below it, or a pattern such as `photos/**/*.jpg`.

    Returns:
        The image files, sorted, and what else the folder or pattern has, which is left out by its ending.

    Raises:
        ImageError: There is nothing by this name, a folder without images, or a file that is no image.
    """
    if os.path.isfile(name):
        return [name], []
    found = [name] if os.path.lexists(name) else [  # without hidden files, which glob leaves out
        item for item in sorted(glob.glob(name, recursive=True)) if not _LITTER.search(item)]
    files = dict.fromkeys(file for place in found for file in (_walk(place) if os.path.isdir(place) else [place]))
    images = [file for file in files if file.lower().endswith(EXTENSIONS)]
    others = [file for file in files if not file.lower().endswith(EXTENSIONS)]
    if not images:
        reason = 'has no images in it' if found else 'does not exist'
        raise ImageError(f'{name} {reason}. Name an image, a folder of images or a pattern.')
    return images, others


def check_header(path: str) -> None:
    """Find out whether a file is an image, without reading all of it.

    Raises:
        ImageError: It is none.
    """
    try:
        with Image.open(path):
            pass
    except Exception:
        read_image(path)  # says why
