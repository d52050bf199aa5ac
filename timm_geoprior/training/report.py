"""What a run says and leaves for people: progress, a CSV row for each epoch, the recipe echoed, curves."""
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ..files import save_figure, write_atomically, write_csv
from ..provenance import versions
from .recipe import Recipe

__all__ = ['EpochLog', 'Progress', 'describe_epoch', 'plot_history', 'write_recipe']

LOG_SECONDS = 60  # between two lines of progress in a log file


class Progress:
    """How far an epoch is: a bar on a terminal, a line each minute where stderr is a file."""

    def __init__(
            self, title: str, updates: tuple[int, int], batch_size: int, tell: Callable[[str], None] | None) -> None:
        """
        Args:
            title: Of the epoch.
            updates: Those that are done, and all of the epoch.
            batch_size: Images of an update.
            tell: Called with each line; None shows nothing.
        """
        self.title, self.batch_size, self.tell = title, batch_size, tell
        self.first, self.total = updates
        self.started = self.told = time.monotonic()
        self.bar = tqdm(
            total=self.total, initial=self.first, desc=title, unit_scale=batch_size, unit='img', leave=False,
            disable=tell is None or not sys.stderr.isatty(), mininterval=0.5)

    def update(self, done: int, mean_loss: Callable[[], float]) -> None:
        """Note that an update is done. The loss is asked for, and so waited for, only when it is shown."""
        if self.bar.update():
            self.bar.set_postfix(loss=f'{mean_loss():.3f}', refresh=False)
        now = time.monotonic()
        if self.tell is not None and self.bar.disable and now - self.told >= LOG_SECONDS:
            self.told = now
            speed = (done - self.first) * self.batch_size / max(now - self.started, 1e-9)
            self.tell(f'{self.title}: {done * self.batch_size:,} of {self.total * self.batch_size:,} images, '
                      f'loss {mean_loss():.3f}, {speed:,.0f} images/s')

    def close(self) -> None:
        """Take the bar away."""
        self.bar.close()


def describe_epoch(history: list[dict[str, Any]]) -> str:
    """A line about the last epoch."""
    row = history[-1]
    text = f'epoch {row["epoch"] + 1}: training loss {row["train_loss"]:.3f}'
    if 'top1' in row:
        scores = [past.get('ema_top1', past['top1']) for past in history]
        best = all(scores[-1] > score for score in scores[:-1])
        text += f', held-out top-1 {scores[-1]:.2f}%{" (best)" if best else ""}'
    return f'{text}, {row["images_per_second"]:,.0f} images/s'


class EpochLog:
    """summary.csv and TensorBoard's events, a row for each epoch; rows of an earlier start are not written twice."""

    def __init__(self, output: Path, epochs_behind: int) -> None:
        """
        Args:
            output: The run's folder.
            epochs_behind: Epochs that a resumed run has behind it; TensorBoard's events of later ones are dropped.
        """
        self.output = output
        self.events = SummaryWriter(str(output / 'tensorboard'), purge_step=epochs_behind or None)

    def write(self, history: list[dict[str, Any]]) -> None:
        """Write the last row of the history to TensorBoard and all of it to summary.csv."""
        for key, value in history[-1].items():
            for head, number in enumerate(value if isinstance(value, list) else [value]):
                suffix = f'.{head}' if isinstance(value, list) else ''
                self.events.add_scalar(key.replace('.', '/', 1) + suffix, number, history[-1]['epoch'])
        self.events.flush()
        write_csv(self.output / 'summary.csv', history)

    def close(self) -> None:
        """End TensorBoard's events."""
        self.events.close()


def plot_history(history: list[dict[str, Any]], output: Path) -> None:
    """Draw curves.png (loss, accuracy, learning rate) and, where the model has radii, radii.png."""
    epochs = [row['epoch'] + 1 for row in history]
    radii = [key for key in history[0] if key.startswith('radius.')]
    curves = [
        ('training loss', ['train_loss']), ('held-out top-1 (%)', ['top1', 'ema_top1']), ('learning rate', ['lr'])]
    shown = [(title, [key for key in keys if key in history[0]]) for title, keys in curves]
    _plot(epochs, history, [(title, keys) for title, keys in shown if keys], output / 'curves.png')
    if radii:
        _plot(epochs, history, [('radius (cells)', radii)], output / 'radii.png')


def _plot(epochs: list[int], history: list[dict[str, Any]], panels: list[tuple[str, list[str]]], path: Path) -> None:
    figure = Figure(figsize=(4 * len(panels) + 1, 3.5), layout='constrained')
    for axes, (title, keys) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for index, key in enumerate(keys):
            label = key.removeprefix('radius.').removesuffix('.conv2.attn')
            style = ('-', '--', ':', '-.')[index // 10 % 4]  # there are ten colours
            axes.plot(epochs, [row[key] for row in history], style, label=label)
        axes.set(title=title, xlabel='epoch')
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            axes.legend(fontsize='small')
    save_figure(path, figure, dpi=120)


def write_recipe(recipe: Recipe, output: Path, commit: str) -> None:
    """Write recipe.yaml, every key with its value, below what it runs with."""
    used = ', '.join(f'{name} {version}' for name, version in versions().items())
    plain = json.loads(json.dumps(recipe.to_dict()))  # tuples as lists
    text = f'# {used}, commit {commit or "unknown"}\n{yaml.safe_dump(plain, sort_keys=False)}'
    write_atomically(output / 'recipe.yaml', text.encode())
