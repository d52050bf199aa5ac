"""The one reader of images: it reads any kind of file, from a folder, an archive or a data set, as RGB."""
import os
import re
import warnings
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import CorruptImagesError, ImageError
from ..files import first_line

Tell = Callable[[str], object]  # gets a message for the user
MAX_PIXELS = 178_956_970  # half a GiB of RGB; Pillow refuses larger images too
MAX_ASPECT_RATIO = 1000  # with its short side resized to 256 pixels, a thinner image would not fit into memory
EXTENSIONS = ('.avif', '.bmp', '.gif', '.jfif', '.jp2', '.jpe', '.jpeg', '.jpg', '.pbm', '.pgm', '.png', '.ppm', '.tga',
              '.tif', '.tiff', '.webp')
# what network drives, macOS, Windows, Jupyter, and programs that sync or show files leave among the user's files
LITTER = re.compile(
    r'@eaDir|#recycle|#snapshot|\.@__thumb|\.@upload_cache|@Recycle|@Recently-Snapshot|\$RECYCLE\.BIN|lost\+found|'
    r'System Volume Information|__MACOSX|\._.*|\.AppleDouble|\.DS_Store|\.Spotlight-V100|\.fseventsd|\.TemporaryItems|'
    r'\.Trash.*|Thumbs\.db|desktop\.ini|\.ipynb_checkpoints|__pycache__|\.git|\.dropbox\.cache|\.stversions|'
    r'\.picasaoriginals')
# as in the official archives, and with the class at the end as in copies on the Hugging Face Hub
_ILSVRC = re.compile(r'(ILSVRC2012_(val|test)_\d{8}|n\d{8}_\d+)(_n\d{8})?\.jpe?g', re.IGNORECASE)
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright


def read_image(source: str | os.PathLike[str] | BinaryIO, name: str = '', mode: str = 'RGB') -> Image.Image:
    """Read an image in any format that Pillow knows.

    Palette, CMYK, grey (1 to 32 bits and floating point, scaled, not clipped) and transparent images (on a white
    background) become RGB; of an animation, the first frame is read; a rotation in the EXIF data is applied. ILSVRC's
    own files, identified by their names, are the exception: published accuracies were measured without the rotation,
    so their pixels are those of timm's reader.

    Args:
        source: A path, or a file open for reading.
        name: Name of an open file, for messages and to identify ILSVRC's files.
        mode: Pillow's mode of the result: 'RGB', or 'L' for networks with grey input.

    Returns:
        The image at its full size, upright unless it is one of ILSVRC's.

    Raises:
        ImageError: The file is missing, a folder, not an image, or damaged; it has more than `MAX_PIXELS` pixels, or a
            side more than `MAX_ASPECT_RATIO` times the other.

    Example:
        >>> read_image('photo.jpg').mode
        'RGB'
    """
    return _read(source, name or os.fsdecode(source), mode)[0]  # type: ignore[arg-type]


def _read(source: str | os.PathLike[str] | BinaryIO, name: str, mode: str) -> tuple[Image.Image, bool]:
    """An image, and whether a rotation was ignored."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Pillow warns about large images and odd metadata: both are handled here
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
    if isinstance(source, (str, os.PathLike)) and os.path.isdir(source):
        return 'is a folder. Name an image file in it.'
    if isinstance(error, FileNotFoundError):
        return 'does not exist. Check its name.'
    if isinstance(error, PermissionError):
        return f'cannot be read ({error.strerror}). Check its permissions and those of its folders.'
    if isinstance(error, UnidentifiedImageError):
        return 'is not an image that Pillow can read, such as JPEG, PNG, WebP, GIF, TIFF or BMP. Convert it.'
    if isinstance(error, Image.DecompressionBombError):
        return f'must have at most {MAX_PIXELS:,} pixels, got more. Scale it down.'
    if isinstance(error, MemoryError):
        return 'takes more memory than there is, or is damaged. Free some memory, or replace the file.'
    return f'cannot be decoded ({first_line(error)}): it is truncated or damaged. Replace the file.'


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
    # a 16-bit file whose brightest value is 255 holds 8 bits; 12 bits cannot be told from a dark image
    whites: tuple[int, ...] = (1, 255, 65535) if image.mode == 'F' else (255, 65535)
    peak, low = float(values.max()), float(values.min())
    if low < -0.1 * abs(peak):  # black is not 0 either, as when the mean was subtracted
        values, peak, whites = values - low, peak - low, ()
    # no file says which value is white: the lowest usual one, which resizing may have exceeded, or the brightest pixel
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
    """Whether an image states a rotation that `read_image` ignores, since it is one of ILSVRC's own."""
    return _is_ilsvrc(name) and image.getexif().get(_ORIENTATION, 1) in range(2, 9)


class Item(NamedTuple):
    """An image of a data set."""
    image: Image.Image  # in mode 'RGB'
    target: int  # its class index
    replaced: int  # the requested index if that image cannot be read and this one replaces it; else -1
    rotation_ignored: bool  # whether a rotation that its file states was ignored


def read_item(dataset: Any, index: int, mode: str = 'RGB') -> Image.Image:
    """Read an image of a data set.

    Args:
        dataset: One of timm's with an index, or of torchvision's, which decode images themselves.
        index: Place of the image in it.
        mode: As in `read_image`.

    Raises:
        ImageError: As in `read_image`.
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
                image, ignored = _read(file, str(dataset.filename(place)), 'RGB')
        except (ImageError, OSError):
            continue
        return Item(image, int(target), index if offset else -1, ignored)
    raise CorruptImagesError(f'Ten images in a row from {dataset.filename(index)} on cannot be read. Check the files.')


class CorruptImages:
    """The unreadable images of a data set, each reported once, up to a limit."""

    def __init__(self, dataset: Any, limit: int, tell: Tell = warnings.warn) -> None:
        self.dataset, self.limit, self.tell = dataset, limit, tell
        self.indices: set[int] = set()

    def note(self, indices: list[int]) -> None:
        """Record `Item.replaced` of some images, -1 for no fault; more than the limit raise CorruptImagesError."""
        for index in set(indices) - self.indices - {-1}:
            self.indices.add(index)
            self.tell(f'{self.dataset.filename(index)} cannot be read as an image and is skipped.')
        if len(self.indices) > self.limit:
            raise CorruptImagesError(f'The number of unreadable images must be at most {self.limit}, got '
                                     f'{len(self.indices)}. Repair the data set, or raise --max-corrupt.')


def tell_of_rotations(count: int, tell: Tell = warnings.warn) -> None:
    """Report how many files state a rotation that was ignored, if any do."""
    if count:
        tell(f"{count:,} of ILSVRC's files state a rotation (EXIF), which is ignored as in published accuracies.")
