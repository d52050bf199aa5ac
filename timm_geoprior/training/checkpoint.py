"""Checkpoints: written whole or not at all, read as data."""
import os
from pathlib import Path
from typing import IO, Any, Callable, Dict

import torch

__all__ = ['CheckpointError', 'load_checkpoint', 'save_checkpoint', 'write_atomically']


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written."""


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file through a temporary one beside it: whoever looks sees the old content or the new, never a part.

    Args:
        path: Where the file goes.
        write: Called with the open temporary file.

    Raises:
        OSError: As the file system has it (a full disk, say); the old file stands and the temporary one is gone.
    """
    part = path.with_name(f'.{path.name}.part{os.getpid()}')
    try:
        with open(part, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must outlive a power cut
    finally:
        os.close(folder)


def save_checkpoint(state: Dict[str, Any], path: Path) -> None:
    """Save tensors and plain containers with `torch.save`.

    Raises:
        CheckpointError: The file system refused; the checkpoint that was there is untouched.
    """
    try:
        write_atomically(path, lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:  # torch wraps a failed write into a RuntimeError
        raise CheckpointError(
            f'Could not write the checkpoint {path} ({error}); the one before it is untouched: free some space and '
            f'run again with --resume.') from error


def load_checkpoint(path: Path) -> Dict[str, Any]:
    """Load what `save_checkpoint` saved, as data: no pickled code is ever run.

    Raises:
        CheckpointError: The file is missing, damaged, or holds anything but tensors and plain containers.
    """
    if not path.is_file():
        raise CheckpointError(f'There is no checkpoint {path}: start without --resume, or name another folder.')
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f'{path} is not a checkpoint that can be read as data ({reason}).') from error
    if not isinstance(state, dict) or 'model' not in state:
        raise CheckpointError(f'{path} holds no training state, expected a dictionary with the key "model".')
    return state
