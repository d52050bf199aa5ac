"""Reports of a run: a line and a CSV row per epoch, the recipe with every key, curves."""
import json
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.utils.tensorboard import SummaryWriter

from ..files import save_figure, write_atomically, write_csv
from ..provenance import versions
from .recipe import Recipe


def describe_epoch(history: list[dict[str, Any]]) -> str:
    """A line about the last epoch."""
    row = history[-1]
    text = f'epoch {row["epoch"] + 1}: training loss {row["train_loss"]:.3f}'
    if 'top1' in row:
        scores = [past.get('ema_top1', past['top1']) for past in history]
        best = all(scores[-1] > score for score in scores[:-1])
        text += f', held-out top-1 {scores[-1]:.2f}%{" (best)" if best else ""}'
    return f'{text}, {row["images_per_second"]:,.0f} images/s'


def log_epoch(events: SummaryWriter, history: list[dict[str, Any]], output: Path) -> None:
    """Write the last row of the history to TensorBoard, and all rows to summary.csv."""
    for key, value in history[-1].items():
        for head, number in enumerate(value if isinstance(value, list) else [value]):
            suffix = f'.{head}' if isinstance(value, list) else ''
            events.add_scalar(key.replace('.', '/', 1) + suffix, number, history[-1]['epoch'])
    events.flush()
    write_csv(output / 'summary.csv', history)


def plot_history(history: list[dict[str, Any]], output: Path) -> None:
    """Plot curves.png (loss, accuracy, learning rate) and, if the model has radii, radii.png."""
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
            style = ('-', '--', ':', '-.')[index // 10 % 4]  # matplotlib cycles through ten colours
            axes.plot(epochs, [row[key] for row in history], style, label=label)
        axes.set(title=title, xlabel='epoch')
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            axes.legend(fontsize='small')
    save_figure(path, figure, dpi=120)


def write_recipe(recipe: Recipe, output: Path, commit: str) -> None:
    """Write recipe.yaml with every key, below a comment with the versions and the commit."""
    used = ', '.join(f'{name} {version}' for name, version in versions().items())
    plain = json.loads(json.dumps(recipe.to_dict()))  # tuples as lists
    text = f'# {used}, commit {commit or "unknown"}\n{yaml.safe_dump(plain, sort_keys=False)}'
    write_atomically(output / 'recipe.yaml', text.encode())
