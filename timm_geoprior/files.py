"""Files: atomic writes, JSON, CSV, Markdown tables and figures."""
import csv
import functools
import hashlib
import io
import json
import os
import posixpath
import re
import sys
import tempfile
import unicodedata
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

NAME_START = 50  # characters of a name, of up to 4 bytes each, in that of its temporary file, which may have 255 bytes


def walk_files(
        root: str | Path, left_out: Callable[[str], bool] = lambda name: False) -> Iterator[tuple[str, str]]:
    """Find the files in a folder and its subfolders, following links.

    Args:
        root: The folder.
        left_out: Whether to skip a folder of this name.

    Yields:
        The name relative to the root, with forward slashes, and the path, in no particular order.

    Raises:
        OSError: A folder cannot be read, unless it is hidden or the file system's own.
    """
    def fail(error: OSError) -> None:
        if not re.match(r'\.|lost\+found$|\$RECYCLE|System Volume', os.path.basename(str(error.filename))):
            raise error

    ways: dict[str, tuple[str, ...]] = {str(root): (os.path.realpath(root),)}  # real paths from the root to each
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        way = ways.pop(folder)
        for name in list(folders):
            place = os.path.join(folder, name)
            if left_out(name):
                folders.remove(name)
            elif (real := os.path.realpath(place)) in way:  # a link to a parent, which would list every file again
                folders.remove(name)
            else:
                ways[place] = (*way, real)
        below = os.path.relpath(folder, root).replace(os.sep, '/')
        for file in files:
            yield posixpath.normpath(f'{below}/{file}'), os.path.join(folder, file)


def write_atomically(path: Path, content: bytes | Callable[[IO[bytes]], object]) -> None:
    """Write a file whole or not at all: temporary file beside it, fsync, rename.

    Args:
        path: Where to write. A pipe, a device or an open file (/dev/stdout) is written to directly.
        content: The bytes, or a function that writes them to the open file.

    Raises:
        OSError: The file cannot be written (a full disk, say); the old one is kept, and the temporary one removed.
    """
    write = content if callable(content) else lambda file: file.write(content)
    opened = re.fullmatch(r'/dev/(?:(stdout)|(stderr)|fd/(\d+))', str(path))  # may be a file, whose content must stay
    if opened or path.exists() and not path.is_file():
        sys.stdout.flush()
        place = path if opened is None else os.dup(int(opened[3] or opened.lastindex or 0))
        with open(place, 'wb') as stream:
            write(stream)
        return
    temporary = path.parent / f'.{path.name[:NAME_START]}.{uuid.uuid4().hex}.tmp'
    # the umask applies, as for every new file; tempfile's would be readable only by the owner
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.chmod(temporary, path.stat().st_mode & 0o777)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `path` at the end; an empty folder may already be there."""
    parent = path.resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f'.{path.name[:NAME_START]}.') as place:
        folder = Path(place, path.name)
        folder.mkdir()
        yield folder
        folder.rename(path)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON with a final newline. NaN and infinity, which JSON does not have, raise a ValueError."""
    # lone surrogates, from file names that are not UTF-8, become backslash escapes, which are valid JSON
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + '\n'
    write_atomically(path, text.encode(errors='backslashreplace'))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV. The columns are the keys of all rows, in order of appearance; no rows give an empty file."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    write_atomically(path, text.getvalue().encode(errors='backslashreplace'))


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[object]], left: Collection[int] = (0,)) -> str:
    """Make a Markdown table: the columns in `left` are left-aligned, the others right-aligned.

    Examples:
        >>> print(markdown_table(['model', 'top-1'], [['resnet50', 76.1]]))
        | model | top-1 |
        | --- | ---: |
        | resnet50 | 76.1 |
    """
    names = list(header)
    lines = [names, ['---' if column in left else '---:' for column in range(len(names))], *rows]
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)


def save_figure(path: Path, figure: Any, dpi: int = 150) -> None:
    """Save a matplotlib figure in the format of the path's suffix, with fonts that have the characters of its texts."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if found := [family for family in map(_family_of, text.get_text()) if family]:
            text.set_fontfamily([*text.get_fontfamily(), *dict.fromkeys(found)])
    # no software version, so that the same figure gives the same bytes
    metadata = {'Software': None} if path.suffix == '.png' else None
    write_atomically(
        path, lambda file: figure.savefig(file, format=path.suffix.lstrip('.'), dpi=dpi, metadata=metadata))


def drawable(name: str, instead: str = '?') -> str:
    """Make a name that matplotlib draws literally.

    `$` does not start a formula. A character that no installed font has loses its accents or is left out.

    Args:
        name: Any string, such as a class name; bytes of a file name that are not UTF-8 become question marks.
        instead: Replacement for a name of which nothing is left, such as its index.

    Returns:
        The text for `save_figure`, which chooses the fonts.
    """
    text = name.encode(errors='replace').decode()
    plain = ''.join(
        ' ' if character.isspace() else character if _family_of(character) is not None
        else unicodedata.normalize('NFKD', character).encode('ascii', 'ignore').decode() for character in text
        if character.isprintable() or character.isspace())
    return (plain.strip() or instead).replace('$', r'\$')


@functools.cache
def _family_of(character: str) -> str | None:
    """The installed font family that has a glyph for a character: '' for matplotlib's own, None where there is none."""
    from matplotlib.font_manager import fontManager
    from matplotlib.ft2font import FT2Font

    if character.isascii():
        return '' if character.isprintable() else None
    own = 'DejaVu Sans'
    for font in sorted(fontManager.ttflist, key=lambda font: (font.name != own, font.name)):
        regular = (font.style, font.weight, font.stretch) == ('normal', 400, 'normal')
        # matplotlib's Last Resort font has a box for every character
        if regular and not font.name.startswith('Last Resort') and FT2Font(font.fname).get_char_index(ord(character)):
            return '' if font.name == own else str(font.name)
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop, or the error's type where there is none.

    For torch's error about weights that do not fit, the second line, which names one of them, is added. For
    safetensors' error about a file in another format, the usual cause is added.
    """
    lines = str(error).splitlines()
    line = lines[0].rstrip('.:') if lines and lines[0] else type(error).__name__
    if line.startswith('Error(s) in loading state_dict'):
        line = ': '.join([line, *(line.strip().rstrip('.') for line in lines[1:2])])[:300]
    if 'header too large' in line:  # safetensors reads a Git LFS pointer's first bytes as the header's size
        line += '; if the file is a Git LFS pointer, run `git lfs pull`'
    return line


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error's message, which says what is wrong; the next one may give unsuitable advice."""
    return re.split(r'\. (?=[A-Z])', first_line(error))[0]


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is only a Git LFS pointer, as in a clone without `git lfs`."""
    with path.open('rb') as file:
        return file.read(64).startswith(b'version https://git-lfs.github.com/spec/')


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(2 ** 20):
            digest.update(chunk)
    return digest.hexdigest()
