"""The device of a process, and its place in a group of processes."""
import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from timm.utils import init_distributed_device, world_info_from_env
from torch import Tensor

from .errors import CorruptImagesError, GeoPriorError, ProcessError
from .files import first_line

_Array = TypeVar('_Array', bound=NDArray[Any])
_Value = TypeVar('_Value')


def default_device() -> str:
    """A GPU if there is one, else the CPU."""
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def find_device(name: str) -> tuple[torch.device, int, int]:
    """Find this process's device; under torchrun, join the other processes.

    Args:
        name: A torch device; under torchrun, 'cuda' means this process's GPU.

    Returns:
        The device, this process's rank, and the number of processes.

    Raises:
        ProcessError: The device does not exist or cannot be used.
    """
    if name.startswith('cuda') and not torch.cuda.is_available():
        raise ProcessError(f'--device must be a device of this machine, got {name}, and torch finds no GPU. '
                           f'Use --device cpu.')
    if name.startswith('meta'):
        raise ProcessError(f'--device must be one that computes, got {name}. Use --device cpu.')
    try:
        if joined():
            return torch.empty(0, device=name).device, dist.get_rank(), dist.get_world_size()
        torch.device(name)  # finds a typo before this process waits for others
        place = argparse.Namespace(device=name)
        # nothing may be allocated before this call, or every process would take memory on GPU 0
        device = torch.empty(0, device=init_distributed_device(place)).device
    except Exception as error:  # torch raises different errors for different devices
        raise ProcessError(f'--device {name} cannot be used ({first_line(error)}). Use cuda, cpu or another device of '
                           f'torch.') from None
    return device, int(place.rank), int(place.world_size)


def joined() -> bool:
    """Whether this process belongs to a group of processes."""
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def group_of_processes() -> Iterator[None]:
    """Leave the group at the end, if this process joins one inside the context."""
    before = joined()
    try:
        yield
    finally:
        if joined() and not before:
            dist.destroy_process_group()


def is_first() -> bool:
    """Whether this process is the first of its group, or alone."""
    return not joined() or dist.get_rank() == 0


def from_first(function: Callable[[], _Value], device: torch.device) -> _Value:
    """Call a function in the first process only, and return its result in all of them.

    Only that process's machine needs access to the files that the function reads.

    Raises:
        GeoPriorError, OSError: The function raised one; it is raised in all processes, which would otherwise wait for a
            result.
    """
    if not joined():
        return function()
    box: list[Any] = [None, None]
    if is_first():
        try:
            box[0] = function()
        except (GeoPriorError, OSError) as error:
            box[1] = error
    dist.broadcast_object_list(box, device=device)
    if box[1] is not None:
        raise box[1]
    return cast(_Value, box[0])


def should_report(error: GeoPriorError) -> bool:
    """Whether this process should print an error that ends it.

    Processes that have joined a group stop at the same error, which only the first one on each machine prints. An
    error that may occur in only some of them is printed by each.
    """
    return isinstance(error, (CorruptImagesError, ProcessError)) or not joined() or world_info_from_env()[0] == 0


def reduce_sum(tensor: Tensor) -> Tensor:
    """Sum an integer tensor over all processes, in place; a single process leaves it unchanged."""
    if joined():
        dist.all_reduce(tensor)
    return tensor


def gather(own: _Array) -> _Array:
    """Concatenate the arrays of all processes, in the order of their ranks."""
    if not joined():
        return own
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return cast(_Array, np.concatenate(gathered))
