"""Checkpoints: written whole or not at all, read as data."""
from pathlib import Path
from typing import Any

import torch

from ..errors import GeoPriorError
from ..files import write_atomically

__all__ = ['CheckpointError', 'load_checkpoint', 'save_checkpoint']


class CheckpointError(GeoPriorError):
    """A checkpoint that cannot be read or written."""


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Save tensors and plain containers with `torch.save`.

    Raises:
        CheckpointError: The file system refused; the checkpoint that was there is untouched.
    """
    try:
        write_atomically(path, lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:  # torch's comes after the file system's, and says less
        cause: BaseException = error
        while not isinstance(cause, OSError) and cause.__context__ is not None:
            cause = cause.__context__
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause).splitlines()[0]
        raise CheckpointError(
            f'Could not write the checkpoint {path} ({reason}); the one before it is untouched: free some space and '
            f'run again with --resume.') from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load what `save_checkpoint` saved, as data: no pickled code is ever run.

    Raises:
        CheckpointError: The file is missing, damaged, or holds anything but tensors and plain containers.
    """
    if not path.is_file():
        raise CheckpointError(f'There is no checkpoint {path}: start without --resume, or name another folder.')
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a damaged file
        reason = str(error).splitlines()[0].split('. ')[0] if str(error) else type(error).__name__
        raise CheckpointError(f'{path} is not a checkpoint that can be read as data ({reason}), expected one of '
                              f'scripts/train.py: put a whole copy there, or train into another folder.') from error
    if not isinstance(state, dict) or 'model' not in state:
        raise CheckpointError(f'{path} holds no training state, expected a dictionary with the key "model": name the '
                              f'folder of a run of scripts/train.py.')
    return state
