"""The exceptions of this package. Each message is one sentence that says what is wrong and what to do."""
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

__all__ = ['ClassMismatchError', 'CorruptImagesError', 'EvaluationError', 'GeoPriorError', 'ImageError', 'ProcessError',
           'WeightsError', 'enough_memory', 'message_of', 'needs_extra', 'out_of_memory']


class GeoPriorError(RuntimeError):
    """Something that the caller can put right; commands print it as one line and exit with code 1."""


class EvaluationError(GeoPriorError):
    """What was asked for cannot be measured."""


class ClassMismatchError(EvaluationError):
    """The data's classes are not the model's."""


class ProcessError(EvaluationError):
    """An error that a single process of several may meet alone, so that each process has to report it."""


class ImageError(GeoPriorError):
    """A file cannot be read as a picture."""


class CorruptImagesError(GeoPriorError):
    """More images could not be read than a run puts up with."""


class WeightsError(GeoPriorError):
    """Weights cannot be loaded: there are none, they cannot be fetched, or their bytes are not the manifest's."""


def message_of(error: GeoPriorError) -> str:
    """An error's message without the traceback that a data loader's worker has put before it."""
    return str(error).rpartition(f'{type(error).__name__}: ')[2]


# in what libraries say of it in an error of another kind: torch's allocators, cuBLAS, and torch's data loaders
_OUT_OF_MEMORY = ('DefaultCPUAllocator', 'out of memory', 'bad_alloc', 'ALLOC_FAILED', 'Caught MemoryError')


def out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, which each library says in its own way."""
    if isinstance(error, GeoPriorError):  # whose sentence may name a file of such a name
        return False
    return (isinstance(error, MemoryError) or getattr(error, 'errno', None) == errno.ENOMEM
            or isinstance(error, RuntimeError) and any(part in str(error) for part in _OUT_OF_MEMORY))


@contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Turn any library's error of too little memory into a ProcessError, since one process may meet it alone."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not out_of_memory(error):
            raise
        raise ProcessError(f'There is not enough memory. {advice}') from error


@contextmanager
def needs_extra(name: str, *later: str) -> Iterator[None]:
    """Say which extra a missing package belongs to, also one of those that are imported only after the work."""
    try:
        for module in later:
            import_module(module)
        yield
    except ModuleNotFoundError as error:
        raise GeoPriorError(
            f"This command needs {error.name}, which is not installed. Run `pip install 'timm-geoprior[{name}]'`."
        ) from error
