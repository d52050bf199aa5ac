"""The output of a measurement: text, JSON with its provenance, CSV, plots."""
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import drawable, save_figure, write_csv, write_json
from ..provenance import git_commit, hardware, versions
from .evaluate import EvalConfig, Evaluation
from .metrics import Calibration, Counts, calibrate, confused_pairs, per_class, wilson_interval

FILES = ('results.json', 'per_class.csv', 'confused_pairs.csv', 'reliability.png', 'per_class.png')  # of --output


def _accuracies(counts: Counts) -> dict[str, Any]:
    """Counts with both accuracies and their 95% intervals in percent."""
    found: dict[str, Any] = counts._asdict()
    # four decimals of a percent resolve one image in a million
    for name, correct in (('top1', counts.top1_correct), ('top5', counts.top5_correct)):
        found[name] = round(100 * correct / counts.num_images, 4) if counts.num_images else None
        found[f'{name}_interval'] = [round(100 * end, 4) for end in wilson_interval(correct, counts.num_images)]
    return found


def result_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The results in each precision, the reference first; the others include their differences from it."""
    outcome = evaluation.outcome
    reference, *_ = outcome.predictions
    rows = []
    for precision, predictions in outcome.predictions.items():
        counts, error = predictions.counts, calibrate(predictions).error
        row = {'precision': precision, **_accuracies(counts),
               'calibration_error': None if math.isnan(error) else round(100 * error, 4),  # JSON has no NaN
               'not_finite': int(np.isnan(predictions.confidence).sum())}
        if precision != reference and counts.num_images:
            first = outcome.predictions[reference]
            row['difference'] = {
                'from': reference,
                'top1': round(100 * (counts.top1_correct - first.counts.top1_correct) / counts.num_images, 4),
                'top5': round(100 * (counts.top5_correct - first.counts.top5_correct) / counts.num_images, 4),
                'predictions': int((predictions.predicted != first.predicted).sum()),
                'largest_of_a_score': outcome.largest_difference[precision],
            }
        rows.append(row)
    return rows


def lines(evaluation: Evaluation) -> list[str]:
    """The results as lines of text."""
    images = len(next(iter(evaluation.outcome.predictions.values())).index)
    text = [f'{evaluation.loaded.name}: {images:,} images at {evaluation.plan.size_text} px, '
            f'{images / evaluation.seconds:,.0f} images/s; 95% intervals in brackets']
    for row in result_rows(evaluation) if images else ():
        line = _line(row['precision'], row)
        if row['calibration_error'] is not None:
            line += f'   calibration error {row["calibration_error"]:.2f} points'
        text.append(line)
        if 'difference' in row:
            gap = row['difference']
            text.append(f'{"":<12} from {gap["from"]}: top-1 {gap["top1"]:+.2f} points, top-5 {gap["top5"]:+.2f}; '
                        f'{gap["predictions"]:,} top-1 predictions differ, scores by up to '
                        f'{gap["largest_of_a_score"]:.2g}')
        if row['not_finite']:
            text.append(f'{"":<12} {row["not_finite"]:,} images have scores that are not finite')
    if evaluation.real is not None:
        count = evaluation.real.num_images
        figures = _line('ReaL', _accuracies(evaluation.real)) if count else f'  {"ReaL":<10}   no figure'
        text.append(f'{figures}   of {count:,} with ReaL labels')
    return text


def _line(label: str, row: Mapping[str, Any]) -> str:
    parts = [f'  {label:<10}']
    for key, name in (('top1', 'top-1'), ('top5', 'top-5')):
        low, high = row[f'{key}_interval']
        parts.append(f'{name} {row[key]:.2f}% [{low:.2f}, {high:.2f}] {row[f"{key}_correct"]:,}')
    return '   '.join(parts)


def details(evaluation: Evaluation, config: EvalConfig) -> dict[str, Any]:
    """What was measured and how, so that it can be repeated; plain containers for JSON."""
    plan, loaded = evaluation.plan, evaluation.loaded
    images = len(evaluation.outcome.predictions[config.precisions[0]].index)
    return {
        'model': loaded.name, 'results': result_rows(evaluation),
        **({'real_labels': _accuracies(evaluation.real)} if evaluation.real else {}),
        'problems': list(evaluation.problems), 'notes': [*loaded.notes, *plan.match.notes],
        'seconds': round(evaluation.seconds, 3),
        'images_per_second': round(images / evaluation.seconds, 1),
        'weights': loaded.weights, 'model_kwargs': dict(loaded.model_kwargs),
        'parameters': sum(p.numel() for p in loaded.model.parameters()),
        'classes': {'model': int(loaded.model.num_classes),  # type: ignore[arg-type]
                    # how many are among the targets, unknown for a stream
                    'with_images': len(np.unique(plan.targets)) if len(plan.targets) else None,
                    'competing': None if plan.match.competing is None else list(plan.match.competing)},
        'preprocessing': {**plan.config, 'steps': list(evaluation.transform),
                          'then': '(x - 255 mean) / (255 std) of the uint8 pixels, float32, on the device'},
        'engine': {'device': hardware(config.device), 'processes': config.world_size,
                   'batch_size': config.batch_size, 'workers': config.workers,
                   'channels_last': config.channels_last, 'torchcompile': config.torchcompile,
                   'allow_tf32': torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32},
        'commit': git_commit(), 'software': versions(),
    }


def summary_row(evaluation: Evaluation) -> dict[str, Any]:
    """A model's row of the results file: timm's columns, then precision, counts and the ends of the 95% intervals."""
    first = result_rows(evaluation)[0]
    config, parameters = evaluation.plan.config, sum(p.numel() for p in evaluation.loaded.model.parameters())
    top1, top5 = first['top1'] or 0.0, first['top5'] or 0.0
    ends = {f'{key}_{end}': first[f'{key}_interval'][place]
            for key in ('top1', 'top5') for place, end in enumerate(('low', 'high'))}
    return {
        'model': evaluation.loaded.name, 'top1': top1, 'top1_err': round(100 - top1, 4), 'top5': top5,
        'top5_err': round(100 - top5, 4), 'param_count': round(parameters / 1e6, 2),
        'img_size': evaluation.plan.img_size, 'crop_pct': config['crop_pct'], 'interpolation': config['interpolation'],
        'precision': first['precision'],
        **{key: first[key] for key in ('num_images', 'top1_correct', 'top5_correct')}, **ends,
    }


def write_results(folder: Path, evaluation: Evaluation, found: Mapping[str, Any]) -> None:
    """Write results.json, per_class.csv, confused_pairs.csv, reliability.png and per_class.png.

    Args:
        folder: Where to write; it is created if it does not exist.
        evaluation: Of one model; classes and plots are of the first precision.
        found: The content of results.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    predictions = next(iter(evaluation.outcome.predictions.values()))
    loaded = evaluation.loaded
    rows = per_class(predictions, loaded.wnids, loaded.names)
    write_json(folder / 'results.json', found)
    write_csv(folder / 'per_class.csv', rows)
    write_csv(folder / 'confused_pairs.csv', confused_pairs(predictions, loaded.wnids, loaded.names))
    if rows:
        _plot_reliability(folder / 'reliability.png', calibrate(predictions), loaded.name)
        _plot_classes(folder / 'per_class.png', rows, loaded.name)


def _plot_reliability(path: Path, calibration: Calibration, title: str) -> None:
    """Accuracy by confidence, and how many images each bin has (Guo et al., 2017, figure 1)."""
    from matplotlib.figure import Figure  # an optional dependency
    figure = Figure(figsize=(5, 6), layout='constrained')
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = calibration.edges[1]
    middles = calibration.edges[:-1] + width / 2
    upper.plot([0, 1], [0, 1], color='gray', linestyle='--', label='perfectly calibrated')
    upper.bar(middles, calibration.accuracy, 0.94 * width, color='tab:blue', label='accuracy')
    upper.plot(calibration.confidence, calibration.accuracy, '.', color='black', label='at the mean confidence')
    upper.set(ylabel='accuracy', xlim=(0, 1), ylim=(0, 1),
              title=f'{drawable(title)}\nexpected calibration error {100 * calibration.error:.2f} points')
    upper.legend(loc='upper left')
    lower.bar(middles, calibration.counts, 0.94 * width, color='tab:gray')
    lower.set(xlabel='confidence', ylabel='images')
    save_figure(path, figure)


def _plot_classes(path: Path, rows: Sequence[Mapping[str, Any]], title: str, shown: int = 12) -> None:
    """All classes by accuracy with their intervals, and the names of the best and the worst."""
    from matplotlib.figure import Figure
    ordered = sorted(rows, key=lambda row: float(row['top1']))
    figure = Figure(figsize=(11, 5.5), layout='constrained')
    left, right = figure.subplots(1, 2)
    position = np.arange(len(ordered))
    left.fill_between(position, [row['top1_low'] for row in ordered], [row['top1_high'] for row in ordered],
                      color='tab:blue', alpha=0.25, linewidth=0, label='95% interval')
    left.plot(position, [row['top1'] for row in ordered], color='tab:blue', label='top-1')
    left.axhline(float(np.mean([row['top1'] for row in ordered])), color='gray', linestyle='--', label='mean')
    left.set(xlabel='classes, from worst to best', ylabel='top-1 accuracy (%)', ylim=(0, 100), title=drawable(title))
    left.legend(loc='upper left')
    ends = ordered if len(ordered) <= 2 * shown else [*ordered[:shown], *ordered[-shown:]]
    labels = [drawable(_short(row['name'] or row['wnid']), str(row['class'])) for row in ends]
    place = np.arange(len(ends)) + (np.arange(len(ends)) >= shown) * (len(ends) < len(ordered))
    right.barh(place, [row['top1'] for row in ends], color='tab:blue', xerr=(
        [row['top1'] - row['top1_low'] for row in ends], [row['top1_high'] - row['top1'] for row in ends]),
        error_kw={'elinewidth': 0.8, 'ecolor': 'gray'})
    right.set(yticks=place, yticklabels=labels, xlim=(0, 100), xlabel='top-1 accuracy (%)',
              title='worst and best classes' if len(ends) < len(ordered) else 'classes')
    right.tick_params(axis='y', labelsize=7)
    save_figure(path, figure)


def _short(name: str, length: int = 32) -> str:
    """The first of a class's names, shortened."""
    first = name.split(',')[0]
    return first if len(first) <= length else first[:length - 1] + '…'
