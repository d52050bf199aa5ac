"""Images of a timm data set, where some may be unreadable."""
import warnings
from typing import Any

from PIL import Image

from ..errors import GeoPriorError

__all__ = ['CorruptImages', 'CorruptImagesError', 'read_image']


class CorruptImagesError(GeoPriorError):
    """More images could not be read than a run puts up with."""


def read_image(dataset: Any, index: int) -> tuple[Image.Image, int, int]:
    """Read an image, or the nearest one after it that can be read.

    Args:
        dataset: With a timm reader that has an index.
        index: Place of the image in it.

    Returns:
        The image in RGB, its own target, and the index that was asked for where another image stands in, else -1.

    Raises:
        CorruptImagesError: Ten images in a row cannot be read.
    """
    count = len(dataset)
    for offset in range(10):
        file, target = dataset.reader[(index + offset) % count][:2]
        try:
            return Image.open(file).convert('RGB'), int(target), index if offset else -1
        except Exception:  # a decoder fed with damaged bytes may raise anything
            continue
    raise CorruptImagesError(f'Ten images in a row from {dataset.filename(index)} on cannot be read: '
                             f'check the data set.')


class CorruptImages:
    """The unreadable images of a data set, each named once in a warning, up to a limit."""

    def __init__(self, dataset: Any, limit: int) -> None:
        self.dataset, self.limit = dataset, limit
        self.indices: set[int] = set()

    def note(self, indices: list[int]) -> None:
        """Take note of what `read_image` gave; -1 is no fault.

        Raises:
            CorruptImagesError: There are more than the limit.
        """
        for index in set(indices) - self.indices - {-1}:
            self.indices.add(index)
            warnings.warn(f'{self.dataset.filename(index)} cannot be read as an image and is skipped.', stacklevel=3)
        if len(self.indices) > self.limit:
            raise CorruptImagesError(
                f'{len(self.indices)} images cannot be read, expected at most {self.limit}: repair the data set, or '
                f'raise --max-corrupt.')
