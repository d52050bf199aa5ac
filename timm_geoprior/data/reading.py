"""The one reader of images: a file of any kind, from a folder, an archive or a data set, made into RGB."""
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import CorruptImagesError, ImageError
from ..files import first_line

__all__ = ['EXTENSIONS', 'LITTER', 'MAX_ASPECT_RATIO', 'MAX_PIXELS', 'CorruptImages', 'Item', 'check_size',
           'ignores_rotation', 'read_image', 'read_item', 'read_readable', 'tell_of_rotations']

Tell = Callable[[str], object]  # gets a sentence that a person should read
MAX_PIXELS = 178_956_970  # half a GiB of RGB, where Pillow itself refuses too
MAX_ASPECT_RATIO = 1000  # resized by its short side to 256 pixels, a thinner image would not fit into memory
EXTENSIONS = ('.avif', '.bmp', '.gif', '.jfif', '.jp2', '.jpe', '.jpeg', '.jpg', '.pbm', '.pgm', '.png', '.ppm', '.tga',
              '.tif', '.tiff', '.webp')
# what network drives, macOS, Windows, Jupyter and programs that copy or show photographs put beside people's files
LITTER = re.compile(
    r'@eaDir|#recycle|#snapshot|\.@__thumb|\.@upload_cache|@Recycle|@Recently-Snapshot|\$RECYCLE\.BIN|lost\+found|'
    r'System Volume Information|__MACOSX|\._.*|\.AppleDouble|\.DS_Store|\.Spotlight-V100|\.fseventsd|\.TemporaryItems|'
    r'\.Trash.*|Thumbs\.db|desktop\.ini|\.ipynb_checkpoints|__pycache__|\.git|\.dropbox\.cache|\.stversions|'
    r'\.picasaoriginals')
# as in the official archives, and with the class at the end as in copies on the Hugging Face Hub
_ILSVRC = re.compile(r'(ILSVRC2012_(val|test)_\d{8}|n\d{8}_\d+)(_n\d{8})?\.jpe?g', re.IGNORECASE)
_ORIENTATION = 0x0112  # of EXIF; 1 is upright


def read_image(source: str | os.PathLike[str] | BinaryIO, name: str = '', mode: str = 'RGB') -> Image.Image:
    """Read an image of any kind that Pillow knows.

    Palette, CMYK, grey (1 to 32 bits and floating point, scaled, not clipped) and transparent images (laid on white)
    become RGB; of an animation the first frame is taken; a rotation that EXIF states is carried out. ILSVRC's own
    files, known by their names, are the exception: published accuracies were measured without the rotation, so they
    give the pixels of timm's reader.

    Args:
        source: A path, or a file open for reading.
        name: Of an open file, for messages and for ILSVRC's exception.
        mode: Pillow's mode of the result: 'RGB', or 'L' for networks that take grey.

    Returns:
        The image, upright, at its full size.

    Raises:
        ImageError: The file is missing, a folder, no image or damaged; it has more than `MAX_PIXELS` pixels, or a side
            more than `MAX_ASPECT_RATIO` times the other.

    Example:
        >>> read_image('photo.jpg').mode
        'RGB'
    """
    return _read(source, name or os.fsdecode(source), mode)[0]  # type: ignore[arg-type]


def _read(source: str | os.PathLike[str] | BinaryIO, name: str, mode: str) -> tuple[Image.Image, bool]:
    """An image, and whether a rotation was left out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Pillow warns of large images and odd metadata: both are dealt with here
            with Image.open(source) as image:
                check_size(name, image)
                if _is_ilsvrc(name):
                    return image.convert(mode), ignores_rotation(image, name)
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return _to_rgb(image).convert(mode), False
    except ImageError:
        raise
    except Exception as error:  # a decoder fed with damaged bytes may raise anything
        raise ImageError(f'{name} {_fault(source, error)}') from None


def _fault(source: object, error: Exception) -> str:
    """What is wrong with a file, and what to do."""
    if isinstance(source, (str, os.PathLike)) and Path(source).is_dir():
        return 'is a folder. Name an image file in it.'
    if isinstance(error, FileNotFoundError):
        return 'does not exist. Check its name.'
    if isinstance(error, UnidentifiedImageError):
        return 'is not an image that Pillow can read, such as JPEG, PNG, WebP, GIF, TIFF or BMP. Convert it.'
    if isinstance(error, Image.DecompressionBombError):
        return f'must have at most {MAX_PIXELS:,} pixels, got more. Scale it down.'
    if isinstance(error, MemoryError):
        return 'takes more memory than there is, or is damaged. Free some memory, or get it again.'
    return f'cannot be decoded ({first_line(error)}): it is truncated or damaged. Get it again.'


def check_size(name: str, image: Image.Image) -> None:
    """Raise ImageError for an opened image that is too large or too thin to be decoded."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f'{name} must have at most {MAX_PIXELS:,} pixels, got {width} x {height} = '
                         f'{width * height:,}. Scale it down.')
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(f'{name} must have no side more than {MAX_ASPECT_RATIO} times the other, got {width} x '
                         f'{height} pixels. Crop it.')


def _deep_grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit and floating-point grey, which Pillow would clip at 255."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
    # a file of 16 bits whose brightest value is 255 holds 8; 12 bits cannot be told from a dark picture
    whites: tuple[int, ...] = (1, 255, 65535) if image.mode == 'F' else (255, 65535)
    peak, low = float(values.max()), float(values.min())
    if low < -0.1 * abs(peak):  # no usual black either, as where the mean was subtracted
        values, peak, whites = values - low, peak - low, ()
    # no file says which value is white: the least usual one, which resizing may have exceeded, else the brightest pixel
    white = next((white for white in whites if peak <= 1.1 * white), peak) or 1
    return Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(('I', 'F')):
        return _deep_grey_to_8_bits(image).convert('RGB')
    if image.mode in ('LA', 'La', 'PA', 'RGBA', 'RGBa') or 'transparency' in image.info:
        rgba = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', rgba.size, 'white'), rgba)
    return image.convert('RGB')


def _is_ilsvrc(name: str) -> bool:
    return _ILSVRC.fullmatch(re.split(r'[\\/]', name)[-1]) is not None


def ignores_rotation(image: Image.Image, name: str) -> bool:
    """Whether an image states a rotation that `read_image` leaves out, since it is one of ILSVRC's own."""
    return _is_ilsvrc(name) and image.getexif().get(_ORIENTATION, 1) in range(2, 9)


class Item(NamedTuple):
    """An image of a data set."""
    image: Image.Image  # in mode 'RGB'
    target: int  # its class index
    replaced: int  # the index that was asked for, where that image cannot be read and this one stands in; else -1
    turned: bool  # whether a rotation that its file states was left out


def read_item(dataset: Any, index: int, mode: str = 'RGB') -> Image.Image:
    """Read an image of a data set.

    Args:
        dataset: One of timm's with an index, or of torchvision, which decodes by itself.
        index: Place of the image in it.
        mode: As `read_image` has it.

    Raises:
        ImageError: As `read_image`.
        OSError: The file cannot be opened.
    """
    if not hasattr(dataset, 'reader'):
        image: Image.Image = dataset[index][0]
        return image.convert(mode)
    with dataset.reader[index][0] as file:
        return read_image(file, str(dataset.filename(index)), mode)


def read_readable(dataset: Any, index: int) -> Item:
    """Read an image of a data set, or the nearest one after it that can be read."""
    for offset in range(10):
        place = (index + offset) % len(dataset)
        try:
            file, target = dataset.reader[place][:2]
            with file:
                image, turned = _read(file, str(dataset.filename(place)), 'RGB')
        except (ImageError, OSError):
            continue
        return Item(image, int(target), index if offset else -1, turned)
    raise CorruptImagesError(f'Ten images in a row from {dataset.filename(index)} on cannot be read. Check the files.')


class CorruptImages:
    """The unreadable images of a data set, each told once, up to a limit."""

    def __init__(self, dataset: Any, limit: int, tell: Tell = warnings.warn) -> None:
        self.dataset, self.limit, self.tell = dataset, limit, tell
        self.indices: set[int] = set()

    def note(self, indices: list[int]) -> None:
        """Take note of `Item.replaced` of some images, -1 for no fault; more than the limit are CorruptImagesError."""
        for index in set(indices) - self.indices - {-1}:
            self.indices.add(index)
            self.tell(f'{self.dataset.filename(index)} cannot be read as an image and is skipped.')
        if len(self.indices) > self.limit:
            raise CorruptImagesError(f'The number of unreadable images must be at most {self.limit}, got '
                                     f'{len(self.indices)}. Repair the data set, or raise --max-corrupt.')


def tell_of_rotations(count: int, tell: Tell = warnings.warn) -> None:
    """Tell how many files state a rotation that was left out, if any do."""
    if count:
        tell(f"{count:,} of ILSVRC's files state a rotation (EXIF), which is ignored as in published accuracies.")
