"""The exceptions of this package. Each message says what is wrong and what to do."""
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module


class GeoPriorError(RuntimeError):
    """Something that the caller can fix; commands print its message and exit with code 1."""


class EvaluationError(GeoPriorError):
    """The requested measurement cannot be made."""


class ClassMismatchError(EvaluationError):
    """The classes of the data do not match the model's."""


class ProcessError(EvaluationError):
    """An error that may occur in only one of several processes, so that each has to report its own."""


class ImageError(GeoPriorError):
    """A file cannot be read as an image."""


class CorruptImagesError(GeoPriorError):
    """Too many images cannot be read."""


class WeightsError(GeoPriorError):
    """Weights cannot be loaded: there are none, they cannot be fetched, or their bytes do not match the manifest."""


def message_of(error: GeoPriorError) -> str:
    """An error's message, without the traceback that a data loader's worker puts before it."""
    return str(error).rpartition(f'{type(error).__name__}: ')[2]


# parts of out-of-memory messages in other errors: torch's allocators, cuBLAS, and torch's data loaders
_OUT_OF_MEMORY = ('DefaultCPUAllocator', 'out of memory', 'bad_alloc', 'ALLOC_FAILED', 'Caught MemoryError')


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory has run out, which each library reports differently."""
    if isinstance(error, GeoPriorError):  # its message may contain a file name that matches
        return False
    return (isinstance(error, MemoryError) or getattr(error, 'errno', None) == errno.ENOMEM
            or isinstance(error, RuntimeError) and any(part in str(error) for part in _OUT_OF_MEMORY))


def disk_is_full(error: BaseException) -> bool:
    """Whether a file cannot be written because it would take too much space, and not for another reason."""
    return getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_advice(error: BaseException) -> str:
    """What to do if a file cannot be written. Libraries' own errors, without a number, mean a full disk."""
    denied = isinstance(error, OSError) and not disk_is_full(error)
    return 'Check its path and permissions' if denied else 'Free some space'


@contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Turn any library's out-of-memory error into a ProcessError, since it may occur in only one process."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not out_of_memory(error):
            raise
        raise ProcessError(f'There is not enough memory. {advice}') from error


@contextmanager
def exit_on_error() -> Iterator[None]:
    """For scripts: print the message of a GeoPriorError after the script's name, and exit with code 1."""
    try:
        yield
    except GeoPriorError as error:
        sys.exit(f'{os.path.basename(sys.argv[0])}: {message_of(error)}')


@contextmanager
def needs_extra(name: str, *later: str) -> Iterator[None]:
    """Say which extra provides a missing package; `later` lists modules that are needed only after the work."""
    try:
        for module in later:
            import_module(module)
        yield
    except ModuleNotFoundError as error:
        raise GeoPriorError(
            f"This command needs {error.name}, which is not installed. Run `pip install 'timm-geoprior[{name}]'`."
        ) from error
