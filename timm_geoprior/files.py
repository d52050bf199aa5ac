"""Files: written whole or not at all, JSON, CSV, Markdown tables and figures."""
import csv
import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

__all__ = ['first_line', 'save_figure', 'write_atomically', 'write_csv', 'write_json']


def write_atomically(path: Path, content: bytes | Callable[[IO[bytes]], object]) -> None:
    """Put content at a path whole or not at all: temporary file beside it, fsync, rename.

    Args:
        path: Where it goes.
        content: The bytes, or what writes them into the open temporary file.

    Raises:
        OSError: As the file system has it (a full disk, say); the old file stands and the temporary one is gone.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.', suffix='.tmp')
    try:
        with os.fdopen(handle, 'wb') as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o644)  # mkstemp's is 0600
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write JSON, indented, with a newline at the end.

    Raises:
        ValueError: The content has a NaN or an infinity, which JSON does not know.
        OSError: As `write_atomically`.
    """
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + '\n').encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV. The columns are the keys of all rows, in order of appearance; no rows make an empty file.

    Raises:
        OSError: As `write_atomically`.
    """
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def save_figure(path: Path, figure: Any, dpi: int = 150) -> None:
    """Save a matplotlib figure in the format of the path's suffix.

    Raises:
        OSError: As `write_atomically`.
    """
    # without the software's version: the same figure gives the same bytes
    metadata = {'Software': None} if path.suffix == '.png' else None
    write_atomically(
        path, lambda file: figure.savefig(file, format=path.suffix.lstrip('.'), dpi=dpi, metadata=metadata))


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop, or the error's type where there is none."""
    lines = str(error).splitlines()
    return lines[0].rstrip('.') if lines and lines[0] else type(error).__name__
