"""Activations of many images in a temporary file: a network is gone through block by block, not image by image."""
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import GeoPriorError

__all__ = ['Activations']


class Activations:
    """The maps of each batch of images at one place in a network, float16, in a file that is gone with the process.

    A batch is read, and what the next block makes of it is written in its place. The file is read and written, not
    mapped into memory: a full disk is an error then, and not the end of the process.
    """

    def __init__(self, batches: int, values: int, folder: Path | None = None) -> None:
        """
        Args:
            batches: Number of batches.
            values: Largest number of values that a batch has at any place.
            folder: Where the file goes, the system's folder for temporary files where it is None.
        """
        self.file = tempfile.TemporaryFile(dir=folder)  # closed, and gone, with this object
        self.batches, self.values = batches, values
        self.shapes: dict[int, tuple[int, ...]] = {}

    def write(self, batch: int, maps: Tensor, place: str) -> None:
        """Keep a batch's maps, (N, C, H, W).

        Args:
            batch: Which batch.
            maps: Its maps.
            place: Where in the network, for messages.

        Raises:
            GeoPriorError: They are not finite, too large for float16, or there is no room for them.
        """
        half = maps.permute(0, 2, 3, 1).to('cpu', torch.float16).contiguous()
        if not half.isfinite().all():
            got = f'{maps.abs().max():.3g}' if maps.isfinite().all() else 'values that are not finite'
            raise GeoPriorError(f'The activations at {place} must be finite and within ±65,504, got {got}. '
                                f'Check the weights of the source, and its mean and std.')
        self.shapes[batch] = tuple(half.shape)
        try:
            self.file.seek(2 * batch * self.values)
            self.file.write(half.numpy().data)
            self.file.flush()
        except OSError as error:
            raise GeoPriorError(f'The temporary file must hold {2 * self.batches * self.values:,} bytes, got '
                                f'{error.strerror}. Make room, set TMPDIR, or lower --limit.') from None

    def read(self, batch: int, device: torch.device) -> Tensor:
        """A batch's maps, (N, C, H, W), float32, in channels_last format."""
        half = np.empty(self.shapes[batch], np.float16)
        self.file.seek(2 * batch * self.values)
        self.file.readinto(half.data.cast('B'))
        return torch.from_numpy(half).to(device).float().permute(0, 3, 1, 2)
