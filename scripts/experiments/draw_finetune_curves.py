#!/usr/bin/env python3
"""Draw the accuracy of fine-tuning from trained and from random weights, and print a Markdown table of it.

The runs are output folders of `timm-geoprior finetune`, at RUNS/DATA/START/SEED. START appears in the legend.
"""
import argparse
import csv
import json
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from timm_geoprior.files import markdown_table, save_figure

Runs = dict[str, dict[str, list[Path]]]


def find_runs(folder: Path) -> Runs:
    """Finished runs by data set and start, sorted by path."""
    runs: Runs = {}
    for path in sorted(folder.glob('*/*/*/results.json')):
        data, start, _ = path.parent.relative_to(folder).parts
        if 'measured' in json.loads(path.read_text()):
            runs.setdefault(data, {}).setdefault(start, []).append(path.parent)
    return runs


def measured(run: Path) -> dict[str, float]:
    """The final measurement of a run, with its seed and training hours."""
    results = json.loads((run / 'results.json').read_text())
    return {**results['measured'], 'hours': results['hours'], 'seed': results['seed']}


def table(runs: Runs) -> str:
    """One row per run: accuracy on the measured images, with its interval, and training time in minutes."""
    rows = []
    for data, starts in runs.items():
        for start, folders in starts.items():
            for values in map(measured, folders):
                low, high = values['top1_interval']
                rows.append([data, start, values['seed'], f'{values["top1_correct"]:,} of {values["num_images"]:,}',
                             f'{values["top1"]:.2f}', f'{low:.2f}, {high:.2f}', f'{60 * values["hours"]:.1f}'])
    return markdown_table(
        ['data', 'start', 'seed', 'correct', 'top-1 %', '95% interval', 'minutes'], rows, left=(0, 1))


def draw(axes: Axes, data: str, starts: dict[str, list[Path]]) -> None:
    """Draw held-out accuracy over the epochs, one line per run, and next to it the final measurement."""
    epochs = 0
    for color, (start, folders) in enumerate(starts.items()):
        for number, run in enumerate(folders):
            with (run / 'summary.csv').open(newline='') as file:
                rows = list(csv.DictReader(file))
            seen = [float(row.get('ema_top1') or row['top1']) for row in rows]
            axes.plot([int(row['epoch']) + 1 for row in rows], seen, color=f'C{color}', alpha=0.8,
                      label='' if number else f'{start} weights')
            epochs = max(epochs, len(rows))
    for color, folders in enumerate(starts.values()):
        for number, values in enumerate(map(measured, folders)):
            low, high = values['top1_interval']
            axes.errorbar(epochs + 0.8 + 0.4 * number, values['top1'], fmt='o', markersize=4, capsize=3,
                          yerr=[[values['top1'] - low], [high - values['top1']]], color=f'C{color}')
    axes.axvline(epochs + 0.4, color='0.7', linewidth=0.8)
    axes.set(title=data, xlabel='epoch', ylim=(0, 100))
    axes.set_xticks([*range(1, epochs + 1), epochs + 1], [*map(str, range(1, epochs + 1)), 'end'])
    axes.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', type=Path, help='the folder RUNS')
    parser.add_argument(
        '--output', type=Path, default=Path('finetune_curves.png'),
        help='PNG file to write (default: finetune_curves.png)')
    args = parser.parse_args()
    runs = find_runs(args.runs)
    if not runs:
        sys.exit(f'{args.runs} must hold finished runs of `timm-geoprior finetune` at DATA/START/SEED, got none. '
                 'Name their folder.')
    figure = Figure(figsize=(4.2 * len(runs) + 0.4, 3.6), layout='constrained')
    panels = figure.subplots(1, len(runs), squeeze=False, sharey=True)[0]
    for axes, (data, starts) in zip(panels, runs.items(), strict=True):
        draw(axes, data, starts)
    panels[0].set_ylabel('top-1 (%)')
    panels[-1].legend(loc='lower right')
    save_figure(args.output, figure, dpi=110)
    print(table(runs))


if __name__ == '__main__':
    main()
