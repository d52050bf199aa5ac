"""Activations of many images in a temporary file, so that a network can be run block by block, not image by image."""
import tempfile

import numpy as np
import torch
from torch import Tensor

from ..errors import GeoPriorError


class Activations:
    """The maps of each batch of images at one place in a network, float16, in a file that is deleted with this object.

    A batch is read, and the next block's output is written in its place. The file is not mapped into memory, so that a
    full disk raises an error instead of killing the process.
    """

    def __init__(self, batches: int, values: int) -> None:
        """
        Args:
            batches: Number of batches.
            values: Largest number of values in a batch at any place.
        """
        self.file = tempfile.TemporaryFile()  # closed, and so deleted, with this object
        self.batches, self.values = batches, values
        self.shapes: dict[int, tuple[int, ...]] = {}

    def write(self, batch: int, maps: Tensor, place: str) -> None:
        """Store a batch's maps, (N, C, H, W).

        Args:
            batch: Index of the batch.
            maps: Its maps.
            place: Their place in the network, for error messages.

        Raises:
            GeoPriorError: The maps are not finite, are too large for float16, or cannot be written.
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
