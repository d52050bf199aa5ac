"""What a command shows while it runs: messages, its own command line, and progress; and how it handles signals.

Progress is a bar on a terminal, a line each minute in a log file.
"""
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tqdm import tqdm

LOG_SECONDS = 60  # between two lines in a log file


def tell(text: str) -> None:
    """Print a message and flush, so that a log file has it at once."""
    print(text, flush=True)


def tell_on_stderr(text: str) -> None:
    """Print a message on stderr, apart from a command's results."""
    print(text, file=sys.stderr, flush=True)


def command_line(resume: bool = False) -> str:
    """This process's command line as a user would type it, with `--resume` on request."""
    program = Path(sys.argv[0])
    words = ['python', sys.argv[0]] if program.suffix == '.py' else [program.name]
    if program.name == '__main__.py':
        words = ['python', '-m', program.parent.name]
    arguments = [word for word in sys.argv[1:] if word != '--resume'] + ['--resume'] if resume else sys.argv[1:]
    return shlex.join([*words, *arguments])


@contextmanager
def handled_signals(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    """Call a handler on these signals while the context lasts."""
    main = threading.current_thread() is threading.main_thread()  # no other may set handlers
    previous = {number: signal.signal(number, handler) for number in numbers if main}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


class Progress:
    """The progress of a task.

    Examples:
        >>> with Progress('decoding', total=500) as progress:
        ...     progress.update(500)
    """

    def __init__(
            self, title: str, total: int | None, unit: str = 'images', done: int = 0,
            tell: Callable[[str], None] | None = tell_on_stderr) -> None:
        """
        Args:
            title: What is being done.
            total: How many there are; None if unknown.
            unit: What is counted, in the plural.
            done: How many are done at the start.
            tell: Called with each line for a log file; None shows nothing, not even on a terminal.
        """
        self.title, self.unit, self.first, self.tell = title, unit, done, tell
        self.started = self.told = time.monotonic()
        # a bar, which is redrawn, would fill a file with carriage returns
        self.bar = tqdm(total=total, initial=done, desc=title, unit=f' {unit}', leave=False,
                        disable=tell is None or not sys.stderr.isatty(), mininterval=0.5)
        self.done = done

    def __enter__(self) -> 'Progress':
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, count: int = 1, note: Callable[[], str] = str) -> None:
        """Add to the number done. `note` is called for a few words to show beside it, only when it is shown."""
        self.done += count
        if self.bar.update(count) and (words := note()):
            self.bar.set_postfix_str(words, refresh=False)
        now = time.monotonic()
        if self.tell is not None and self.bar.disable and now - self.told >= LOG_SECONDS:
            self.told = now
            total = f' of {self.bar.total:,}' if self.bar.total else ''
            speed = (self.done - self.first) / max(now - self.started, 1e-9)
            shown = f'{speed:,.0f}' if speed >= 10 else f'{speed:.2g}'  # for slow units, such as layers
            words = ', '.join(filter(None, (note(), f'{shown} {self.unit}/s')))
            self.tell(f'{self.title}: {self.done:,}{total} {self.unit}, {words}')
