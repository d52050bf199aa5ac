#!/usr/bin/env python3
"""Compare variants of a recipe over several seeds, on images held out of training.

    python scripts/experiments/compare.py scripts/experiments/nano_variants.yaml --data-dir tiny-imagenet-200 \\
        --seeds 1 2 3 4 --output out

Runs with the same seed see the same images in the same order with the same crops. Differences are therefore taken
within each seed, and the report gives their mean with Student's t interval. The validation set is not used.

Seeds run one after the other, each with all variants, so that an unfinished comparison has paired runs too. An
interrupted comparison resumes with the same command. Further seeds or variants are added to the existing runs. After
each run, --output has comparison.md (tables), comparison.png and runs.csv, and the files of each run in runs/.

Variants may also be named on the command line:

    python scripts/experiments/compare.py r64_tin200 --set holdout=50 --variant 'prior: {}' \\
        --variant 'plain: {model_kwargs: {value_dims: [0, 0, 0, 0]}}' --data-dir tiny-imagenet-200 --output runs/control
"""
import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from scipy.stats import t as student
from timm.utils import natural_key
from torch import nn

import timm_geoprior  # noqa: F401  (registers the models)
from timm_geoprior.data.batches import LoaderConfig
from timm_geoprior.data.dataset import fingerprint
from timm_geoprior.data.memory import ImageTensors, decode_images
from timm_geoprior.distributed import default_device
from timm_geoprior.errors import GeoPriorError, exit_on_error
from timm_geoprior.evaluation.metrics import count_correct
from timm_geoprior.files import first_line, markdown_table, save_figure, write_atomically, write_csv, write_json
from timm_geoprior.layers import GeoPriorAttn2d
from timm_geoprior.progress import command_line
from timm_geoprior.radii import learned_radii, scale_radii
from timm_geoprior.training.engine import Trainer
from timm_geoprior.training.loaders import open_images, open_training_data
from timm_geoprior.training.parts import check_recipe
from timm_geoprior.training.recipe import Recipe, RunConfig, load_recipe, make_recipe

FACTORS = (0.75, 1, 2)  # evaluation sizes, as multiples of the recipe's own
MIN_SEEDS = 3  # with two, the interval would use a t quantile of 12.7
Row = dict[str, Any]


# -- what is compared --------------------------------------------------------------------------------------------------

def load_variants(source: str, overrides: Sequence[str] = (), variants: Sequence[str] = ()) -> dict[str, Recipe]:
    """Read the variants to compare.

    Args:
        source: A recipe, or a YAML file with the keys `recipe`, `set` (overrides of the recipe's keys) and `variants`
            (the keys that each name changes; `model_kwargs` and `opt_kwargs` are merged with the recipe's).
        overrides: 'key=value' strings for every variant.
        variants: 'name: {key: value, ...}' strings that replace those of the file; the first is the base.

    Returns:
        The recipe of each variant by its name, the base first.

    Raises:
        GeoPriorError: There are fewer than two variants, or they cannot be compared.
        GeoPriorError: A key or value is not valid in a recipe.
    """
    path = Path(source)
    plan = _mapping(path.read_text(), source) if path.suffix in ('.yaml', '.yml') and path.is_file() else {}
    if 'variants' not in plan:
        plan = {'recipe': source}
    unknown = sorted(set(plan) - {'recipe', 'set', 'variants'})
    if unknown or 'recipe' not in plan:
        raise GeoPriorError(f'{source} must have the keys recipe, set and variants, got {", ".join(map(str, plan))}.')
    if not isinstance(plan['recipe'], str):
        raise GeoPriorError(f'{source} must name a recipe or a YAML file as its recipe, got {plan["recipe"]!r}.')
    own = [f'{key}={json.dumps(value)}' for key, value in _changes(plan.get('set'), f'{source}, set').items()]
    base = load_recipe(plan['recipe'], own + list(overrides))
    named = {name: changes for text in variants for name, changes in _mapping(text, '--variant').items()}
    named = named or _changes(plan.get('variants'), f'{source}, variants')
    if len(named) < 2:
        raise GeoPriorError(f'{source} and --variant must name at least two variants, got {len(named)}. Write '
                            f"--variant 'NAME: {{KEY: VALUE}}' for each, the base first.")
    recipes = {str(name): _vary(base, str(name), _changes(changes, f'variant {name}'))
               for name, changes in named.items()}
    _check_comparable(recipes)
    return recipes


def _mapping(text: str, where: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise GeoPriorError(f'{where} is not YAML ({first_line(error)}).') from None
    if not isinstance(values, dict):
        raise GeoPriorError(f"{where} must hold 'NAME: {{KEY: VALUE}}', got {text.strip()[:60]!r}.")
    return values


def _changes(values: Any, where: str) -> dict[str, Any]:
    if values is not None and not isinstance(values, dict):
        raise GeoPriorError(f'{where} must be keys and values, got {values!r}.')
    return values or {}


def _vary(base: Recipe, name: str, changes: Mapping[str, Any]) -> Recipe:
    values = base.to_dict()
    for key, value in changes.items():
        both = isinstance(values.get(key), dict) and isinstance(value, dict)
        values[key] = {**values[key], **value} if both else value
    recipe = make_recipe(values, f'variant {name}')
    try:
        check_recipe(recipe)
    except GeoPriorError as error:
        raise GeoPriorError(f'Variant {name}: {error}') from error
    return recipe


def _check_comparable(recipes: Mapping[str, Recipe]) -> None:
    for name, recipe in recipes.items():
        if not re.fullmatch(r'\w[\w.-]*', name):
            raise GeoPriorError(f'A variant name must consist of letters, digits, _, - and dots, got {name!r}.')
        if not (recipe.holdout and recipe.in_memory):
            raise GeoPriorError(
                f'Variant {name} must hold out images for the comparison and keep images in memory, got '
                f'holdout={recipe.holdout} and in_memory={recipe.in_memory}. Add --set holdout=50 '
                f'--set in_memory=true.')
    for key in ('holdout', 'memory_size', 'eval_size'):
        values = {recipe.measured_size if key == 'eval_size' else getattr(recipe, key) for recipe in recipes.values()}
        if len(values) > 1:
            raise GeoPriorError(f'{key} must be the same in all variants, which are compared on the same images, got '
                                f'{" and ".join(map(str, sorted(values)))}.')


# -- the runs ----------------------------------------------------------------------------------------------------------

def compare(
        recipes: Mapping[str, Recipe], seeds: Sequence[int], config: RunConfig, tell: Callable[[str], None] = print,
) -> Iterator[list[Row]]:
    """Run every variant with every seed, seed by seed, so that an unfinished comparison has paired runs too.

    Finished runs are kept and unfinished ones resumed. The images are decoded once, and only if there is a run to do.

    Args:
        recipes: The variants' recipes.
        seeds: Seeds of weights, order and augmentation.
        config: Settings of the runs; each run writes to the folder `runs/VARIANT/SEED` in its `output`.
        tell: Called with a sentence for each run.

    Yields:
        The rows of all finished runs, including those in `output` with other seeds, at the start and after each run:
        by variant, the base first.

    Raises:
        GeoPriorError: A finished run used another recipe, or other images than the remaining runs would.
        RuntimeError: See `Trainer`.
        SystemExit: On SIGTERM and Ctrl-C, after a checkpoint.
    """
    order = list(recipes)

    def place_of(row: Row) -> tuple[int, int]:
        return order.index(row['variant']), row['seed']

    found = {path: results for name in recipes for path in (config.output / 'runs' / name).glob('*/results.json')
             if (results := _finished(name, recipes[name], path))}
    rows = [_row(path.parents[1].name, results) for path, results in found.items()]
    rows.sort(key=place_of)
    yield rows
    done = {(row['variant'], row['seed']) for row in rows}
    todo = [(seed, name) for seed in seeds for name in recipes if (name, seed) not in done]
    if not todo:
        return
    data = open_images(config, config.train_split)
    images = fingerprint(data, np.arange(len(data.labels)))
    for path, results in found.items():
        if results['measured']['images'] != images:
            raise GeoPriorError(f'{path.parent} was trained on {results["measured"]["images"]["files"]:,} other '
                                f'images than the {images["files"]:,} in {config.data_dir}: check --data-dir, or '
                                f'compare in another --output.')
    decoded = decode_images(data.dataset, recipes[todo[0][1]].memory_size, config.workers, config.max_corrupt,
                            config.tell)
    for seed, name in todo:
        place = replace(config, output=config.output / 'runs' / name / str(seed), seed=seed)
        row = run(name, recipes[name], place, decoded, images)
        tell(f'{name}, seed {seed}: held-out top-1 {row["top1"]:.2f}% after {row["hours"]:.2f} hours')
        rows = sorted([*rows, row], key=place_of)
        yield rows


def _finished(name: str, recipe: Recipe, path: Path) -> dict[str, Any] | None:
    """The results of a run, if it was finished and measured."""
    results: dict[str, Any] = json.loads(path.read_text())
    if 'measured' not in results:
        return None
    now = json.loads(json.dumps(recipe.to_dict()))  # tuples as lists
    for key in now:
        if results['recipe'].get(key) != now[key]:
            raise GeoPriorError(
                f'{path.parent} was trained with {key} = {results["recipe"].get(key)!r}, variant {name} has '
                f'{now[key]!r}: give changed variants another name, or compare in another --output.')
    return results


def run(name: str, recipe: Recipe, place: RunConfig, decoded: ImageTensors, images: Mapping[str, Any]) -> Row:
    """Do or resume one run, and measure the trained network.

    Args:
        name: The variant's name.
        recipe: The variant's recipe.
        place: Settings of the run.
        decoded: The training images, including the held-out ones.
        images: Their `fingerprint`, stored with the results.

    Returns:
        The run's row.
    """
    torch.compiler.reset()  # after eight networks, torch.compile would run the next one uncompiled
    trainer = Trainer(recipe, replace(place, resume=(place.output / 'last.pt').exists()), decoded)
    results = trainer.fit()
    network = trainer.ema.module if trainer.ema else trainer.model
    results['measured'] = {**measure(network, recipe, place, trainer.device, decoded), 'images': dict(images)}
    write_json(place.output / 'results.json', results)
    return _row(name, results)


def measure(
        network: nn.Module, recipe: Recipe, place: RunConfig, device: torch.device, decoded: ImageTensors,
) -> dict[str, Any]:
    """Measure accuracy on the held-out images at several sizes, with radii in cells and as shares of the map.

    A radius is learned in cells. At another size it either stays the same in cells or scales with the map.

    Args:
        network: The trained network; its radii are restored at the end.
        recipe: Defines the held-out images, and the size that `FACTORS` multiply.
        place: Settings of the run, with the location of the images.
        device: The network's device.
        decoded: The decoded images.

    Returns:
        Accuracies in percent, as `top1` and `top1_xFACTOR_UNIT`, and the radii of each layer.
    """
    size = recipe.measured_size
    radii = learned_radii(network, (3, size, size))
    measured: dict[str, Any] = {'eval_size': size}
    for factor in FACTORS:
        other = replace(recipe, eval_size=round(factor * size))
        held_out = open_training_data(other, place, LoaderConfig(1, device), decoded).held_out
        assert held_out is not None  # load_variants requires a holdout
        for unit in ('cells', 'share') if radii and factor != 1 else ('cells',):
            with _scaled_radii(network, other.eval_size / size if unit == 'share' else 1):
                counts = count_correct(network, held_out())
            key = 'top1' if factor == 1 else f'top1_x{factor}_{unit}'
            measured[key] = 100 * counts.top1_correct / counts.num_images
            measured['num_images'] = counts.num_images
        del held_out  # frees GPU memory before the next size is prepared
    measured['radii'] = {layer.name: {'map': max(layer.height, layer.width), 'cells': layer.cells,
                                      'share': layer.relative} for layer in radii}
    return measured


@contextmanager
def _scaled_radii(network: nn.Module, scale: float) -> Iterator[None]:
    radii = [module.log_radius for module in network.modules() if isinstance(module, GeoPriorAttn2d)]
    learned = [radius.detach().clone() for radius in radii]
    try:
        scale_radii(network, scale)
        yield
    finally:
        with torch.no_grad():
            for radius, value in zip(radii, learned, strict=True):
                radius.copy_(value)


def _row(name: str, results: Mapping[str, Any]) -> Row:
    """One run as a flat row, with the values of a layer's heads separated by spaces."""
    row = {'variant': name, 'seed': results['seed'], 'parameters': results['parameters'], **results['measured']}
    del row['images']
    for layer, radii in row.pop('radii').items():
        short = layer.removesuffix('.conv2.attn')
        row[f'map.{short}'] = radii['map']
        row[f'radius.{short}'] = ' '.join(f'{value:.4f}' for value in radii['cells'])
        row[f'share.{short}'] = ' '.join(f'{value:.4f}' for value in radii['share'])
    recipe = results['recipe']
    return {**row, 'hours': results['hours'], 'commit': results['commit'], 'model': recipe['model'],
            'recipe': recipe['name'], 'epochs': recipe['epochs'], 'img_size': recipe['img_size'],
            'precision': recipe['amp_dtype'] if recipe['amp'] else 'float32', 'hardware': results['hardware'],
            'torch': results['versions']['torch']}


# -- the report --------------------------------------------------------------------------------------------------------

class Interval(NamedTuple):
    """A mean, and half the width of its 95% interval by Student's t, which is NaN if there are too few values."""
    mean: float
    half: float

    def __str__(self) -> str:
        return f'{self.mean:+.2f}' + ('' if math.isnan(self.half) else f' ± {self.half:.2f}')


def paired_interval(differences: Sequence[float]) -> Interval:
    """The mean of differences between runs with the same seed, and its 95% interval."""
    count = len(differences)
    if count < MIN_SEEDS:
        return Interval(statistics.fmean(differences) if count else math.nan, math.nan)
    half = student.ppf(0.975, count - 1) * statistics.stdev(differences) / math.sqrt(count)
    return Interval(statistics.fmean(differences), float(half))


def differences(rows: Sequence[Row], name: str, base: str, key: str = 'top1', other: str = '') -> list[float]:
    """`key` of a variant's runs minus `key` (or `other`, if given) of the base's runs with the same seeds."""
    own, others = ({row['seed']: row for row in rows if row['variant'] == wanted} for wanted in (name, base))
    return [own[seed][key] - others[seed][other or key] for seed in own if seed in others]


def write_comparison(rows: Sequence[Row], output: Path, command: str) -> str:
    """Write runs.csv, comparison.md and comparison.png.

    Args:
        rows: Rows of all runs so far; the first row's variant is the base.
        output: Folder to write to.
        command: Command line of the comparison, for the report.

    Returns:
        The text of comparison.md.
    """
    names = list(dict.fromkeys(row['variant'] for row in rows))
    seeds = sorted({row['seed'] for row in rows})
    first = rows[0]
    models, recipes, epochs, size, precision = (
        distinct(rows, key) for key in ('model', 'recipe', 'epochs', 'img_size', 'precision'))
    head = (f'{models} by the recipe {recipes}: {epochs} epochs, the last at {size} px, in {precision}. Top-1 in '
            f'percent of {first["num_images"]:,} images held out of training, after the last epoch, at '
            f'{first["eval_size"]} px in float32. Differences are to {names[0]}, paired by seed: the mean ± half the '
            f'width of its 95% interval (Student). An interval covers the variation between seeds on these images; '
            f'other images would add to it.')
    if len(names) > 2:
        head += f' Each interval is for one comparison, not corrected for {len(names) - 1} of them.'
    commits = list(dict.fromkeys(row['commit'] or 'unknown' for row in rows))
    if len(commits) > 1:
        head += f' The runs are of {len(commits)} commits: {", ".join(commits)}.'
    if len(seeds) < MIN_SEEDS:
        head += f' No intervals yet, with {len(seeds)} of the {MIN_SEEDS} seeds that they need.'
    sections = [f'`{command}`', head, _accuracy_table(rows, names, seeds)]
    if radii := _radii_table(rows, names):
        sections += ['Radii at the end, averaged over the seeds, in cells (and as a share of the map); heads are '
                     'separated by commas.', radii,
                     'Top-1 of the held-out images at other sizes, resized from those in memory. A radius either stays '
                     'the same in cells or is scaled with the map (share). '
                     f'Differences are to {names[0]}, both in cells.',
                     _size_table(rows, names)]
    text = '\n\n'.join(sections) + '\n'
    output.mkdir(parents=True, exist_ok=True)
    write_csv(output / 'runs.csv', rows)
    write_atomically(output / 'comparison.md', text.encode())
    _plot(rows, names, output / 'comparison.png')
    return text


def distinct(rows: Sequence[Row], key: str) -> str:
    """The distinct values of a column, joined by 'and'."""
    return ' and '.join(dict.fromkeys(str(row.get(key) or 'unknown') for row in rows))


def _layers(rows: Sequence[Row]) -> list[str]:
    """Layers with attention in natural order, the tenth after the ninth."""
    layers = {key.removeprefix('radius.') for row in rows for key in row if key.startswith('radius.')}
    return sorted(layers, key=natural_key)


def _accuracy_table(rows: Sequence[Row], names: Sequence[str], seeds: Sequence[int]) -> str:
    lines = []
    for name in names:
        own = {row['seed']: row for row in rows if row['variant'] == name}
        pairs = differences(rows, name, names[0])
        mean = statistics.fmean(row['top1'] for row in own.values())
        lines.append([name, f'{next(iter(own.values()))["parameters"]:,}',
                      *(f'{own[seed]["top1"]:.2f}' if seed in own else '' for seed in seeds), f'{mean:.2f}',
                      'base' if name == names[0] else str(paired_interval(pairs)), str(len(pairs))])
    header = ['variant', 'parameters', *(f'seed {seed}' for seed in seeds), 'mean', 'difference', 'n']
    return markdown_table(header, lines)


def _heads(rows: Iterable[Row], key: str) -> list[float]:
    """Each head's value in a column, averaged over runs."""
    values = [[float(part) for part in row[key].split()] for row in rows if row.get(key)]
    return [statistics.fmean(column) for column in zip(*values, strict=True)]


def _radii_table(rows: Sequence[Row], names: Sequence[str]) -> str:
    """One line per variant with attention and one column per layer; empty if no variant has attention."""
    layers, lines = _layers(rows), []
    for name in names:
        own = [row for row in rows if row['variant'] == name]
        pairs = [zip(_heads(own, f'radius.{layer}'), _heads(own, f'share.{layer}'), strict=True) for layer in layers]
        cells = [', '.join(f'{radius:.2f} ({share:.2f})' for radius, share in pair) for pair in pairs]
        lines += [[name, *cells]] if any(cells) else []
    maps = {layer: next(row[f'map.{layer}'] for row in rows if f'map.{layer}' in row) for layer in layers}
    header = ['variant', *(f'{layer}, map of {cells}' for layer, cells in maps.items())]
    return markdown_table(header, lines) if lines else ''


def _size_table(rows: Sequence[Row], names: Sequence[str]) -> str:
    header, lines = ['variant'], []
    size = rows[0]['eval_size']
    for factor in FACTORS:
        pixels = f'{round(factor * size)} px'
        header += [pixels] if factor == 1 else [f'{pixels}, cells', 'difference', f'{pixels}, share', 'share - cells']
    for name in names:
        own = [row for row in rows if row['variant'] == name]
        line = [name]
        for factor in FACTORS:
            cells, share = ('top1', '') if factor == 1 else (f'top1_x{factor}_cells', f'top1_x{factor}_share')
            line.append(f'{statistics.fmean(row[cells] for row in own):.2f}')
            if share:
                line.append('base' if name == names[0] else str(paired_interval(
                    differences(rows, name, names[0], cells))))
            if share and share in own[0]:
                line += [f'{statistics.fmean(row[share] for row in own):.2f}',
                         str(paired_interval(differences(own, name, name, share, cells)))]
            elif share:
                line += ['', '']
        lines.append(line)
    return markdown_table(header, lines)


def _plot(rows: Sequence[Row], names: Sequence[str], path: Path) -> None:
    """Draw differences to the base, relative radii, and the effect of the radius's unit, with one line per variant."""
    figure = Figure(figsize=(13, 1.8 + 0.36 * len(names)), layout='constrained')
    accuracy, radii, sizes = figure.subplots(1, 3, sharey=True)
    for place, name in enumerate(names):
        _draw_spread(accuracy, place, differences(rows, name, names[0]), 'C0')
        own = [row for row in rows if row['variant'] == name]
        for offset, factor in ((-0.12, FACTORS[0]), (0.12, FACTORS[-1])):
            if f'top1_x{factor}_share' in own[0]:
                pairs = differences(own, name, name, f'top1_x{factor}_share', f'top1_x{factor}_cells')
                _draw_spread(sizes, place + offset, pairs, 'C1' if offset < 0 else 'C2', f'{factor} times the size')
    layers = _layers(rows)
    stages = list(dict.fromkeys(layer.rpartition('.')[0] for layer in layers))
    for color, stage in enumerate(stages):
        points = [(share, place) for place, name in enumerate(names) for layer in layers
                  if layer.startswith(f'{stage}.')
                  for share in _heads((row for row in rows if row['variant'] == name), f'share.{layer}')]
        radii.plot(*zip(*points, strict=True), 'o', color=f'C{color}', markersize=5, alpha=0.8, label=stage)
    accuracy.set_yticks(range(len(names)), names)
    accuracy.set_ylim(len(names) - 0.5, -0.5)
    accuracy.set(xlabel=f'top-1 beyond {names[0]} (points)')
    radii.set(xlabel="radius over its map's extent", xscale='log')
    radii.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    radii.xaxis.set_major_formatter('{x:g}')
    radii.xaxis.set_minor_formatter('')
    sizes.set(xlabel='top-1: radii as shares minus in cells (points)')
    for axes in (accuracy, sizes):
        axes.axvline(0, color='0.6', linewidth=0.8)
    for axes in (accuracy, radii, sizes):
        axes.grid(alpha=0.3)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            by_label = dict(zip(labels, handles, strict=True))  # one entry per label
            axes.legend(by_label.values(), by_label.keys(), fontsize='small', loc='lower center',
                        bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    save_figure(path, figure, dpi=130)


def _draw_spread(axes: Axes, place: float, values: Sequence[float], color: str, label: str = '') -> None:
    """Draw each seed's value faintly, and their mean with its interval."""
    if values:
        mean, half = paired_interval(values)
        axes.plot(values, [place] * len(values), '|', color=color, alpha=0.6)
        axes.errorbar(mean, place, xerr=0 if math.isnan(half) else half, fmt='o', color=color, capsize=3, label=label)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', metavar='VARIANTS', help='a YAML file with recipe, set and variants, or a recipe')
    parser.add_argument(
        '--data-dir', type=Path, required=True, help='folder with train/, which has one folder per class')
    parser.add_argument('--output', type=Path, required=True, help='folder of the runs and the report')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], metavar='N', help='default: 0 1 2')
    parser.add_argument(
        '--variant', action='append', default=[], metavar="'NAME: {KEY: VALUE}'",
        help="a variant, instead of the file's; the first is the base")
    parser.add_argument(
        '--set', action='append', default=[], metavar='KEY=VALUE', help='override a recipe key, in all variants')
    parser.add_argument('--device', default=default_device(), help='default: cuda if there is one, else cpu')
    parser.add_argument('-j', '--workers', type=int, default=2, help='processes that decode images')
    parser.add_argument('--save-every', type=int, default=100, help='updates between two checkpoints (default: 100)')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    config = RunConfig(
        args.data_dir, args.output, device=args.device, workers=args.workers, save_every=args.save_every,
        command=command_line())
    text = ''
    try:
        with exit_on_error():
            recipes = load_variants(args.source, args.set, args.variant)
            for rows in compare(recipes, list(dict.fromkeys(args.seeds)), config):
                if rows:
                    text = write_comparison(rows, args.output, command_line())
    except KeyboardInterrupt:  # while images are read; a run saves a checkpoint and exits by itself
        sys.exit(130)
    print(f'\n{text}')


if __name__ == '__main__':
    main()
