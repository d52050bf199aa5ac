"""Pictures as people have them, made into what a network takes."""
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import GeoPriorError

__all__ = ['MAX_PIXELS', 'MAX_ASPECT_RATIO', 'ImageError', 'read_image', 'sample_image']

MAX_PIXELS = 178_956_970  # half a GiB of RGB, where Pillow itself refuses too
MAX_ASPECT_RATIO = 1000  # resized by its short side to 256 pixels, a thinner picture would not fit into memory


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
    """The photograph of a cat that scikit-image carries, 451 x 300 pixels.

    Returns:
        The picture in mode 'RGB'.

    Raises:
        ImageError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError:
        raise ImageError(
            'No image was named, and the sample photograph comes with scikit-image, which is not installed: '
            'name an image, or `pip install scikit-image` (the extra "sample").') from None
    return Image.fromarray(data.cat())
