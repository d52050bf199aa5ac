"""The device that a process computes on, and its place among others."""
import argparse
import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from timm.utils import init_distributed_device, world_info_from_env
from torch import Tensor

from .errors import CorruptImagesError, GeoPriorError, ProcessError
from .files import first_line

__all__ = ['default_device', 'find_device', 'gather', 'group_of_processes', 'is_first', 'joined', 'reduce_sum', 'tells']

_Array = TypeVar('_Array', bound=NDArray[Any])


def default_device() -> str:
    """A GPU if there is one, else the CPU."""
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def find_device(name: str) -> tuple[torch.device, int, int]:
    """Find this process's device; under torchrun, join the other processes.

    Args:
        name: A device of torch; under torchrun, the GPU of this process for 'cuda'.

    Returns:
        The device, this process's rank, and the number of processes.

    Raises:
        ProcessError: There is no such device.
    """
    if name.startswith('cuda') and not torch.cuda.is_available():
        raise ProcessError(f'--device must be a device of this machine, got {name}, and torch finds no GPU. '
                           f'Use --device cpu.')
    if name.startswith('meta'):
        raise ProcessError(f'--device must be one that computes, got {name}. Use --device cpu.')
    try:
        if joined():
            return torch.empty(0, device=name).device, dist.get_rank(), dist.get_world_size()
        torch.device(name)  # a typo is found before any waiting for others
        place = argparse.Namespace(device=name)
        # only after this is the first byte allocated: before, every process would take memory of GPU 0
        device = torch.empty(0, device=init_distributed_device(place)).device
    except Exception as error:  # torch's own differ from device to device
        raise ProcessError(f'--device {name} cannot be used ({first_line(error)}). Use cuda, cpu or another device of '
                           f'torch.') from None
    return device, int(place.rank), int(place.world_size)


def joined() -> bool:
    """Whether this process belongs to a group of processes."""
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def group_of_processes() -> Iterator[None]:
    """Leave the group at the end, if this process joins one in between."""
    before = joined()
    try:
        yield
    finally:
        if joined() and not before:
            dist.destroy_process_group()


def is_first() -> bool:
    """Whether this process is the first of its group, or alone."""
    return not joined() or dist.get_rank() == 0


def tells(error: GeoPriorError) -> bool:
    """Whether this process is to print an error that ends it.

    Processes that have met stop at the same error. The first one of each machine prints it, unless each may have its
    own.
    """
    return isinstance(error, (CorruptImagesError, ProcessError)) or not joined() or world_info_from_env()[0] == 0


def reduce_sum(tensor: Tensor) -> Tensor:
    """Sum an integer tensor over all processes, in place; alone, it stays as it is."""
    if joined():
        dist.all_reduce(tensor)
    return tensor


def gather(own: _Array) -> _Array:
    """The arrays of all processes, one after the other."""
    if not joined():
        return own
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return cast(_Array, np.concatenate(gathered))
