"""The command `timm-geoprior validate`, which scripts/validate.py runs too."""
import argparse
import contextlib
import datetime
import fnmatch
import importlib.util
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import ParseKwargs

from ..data.dataset import DataOptions, DataSplit, fingerprint, open_split
from ..data.listing import unpacked
from ..data.preflight import check_data
from ..distributed import find_device, joined
from ..errors import ClassMismatchError, EvaluationError, GeoPriorError, ProcessError
from ..files import write_csv, write_json
from ..pretrained.manifest import Metric, ModelEntry, load_manifest
from ..progress import handled_signals
from .classes import match_classes
from .evaluate import PRECISIONS, EvalConfig, Evaluation, Plan, evaluate, plan, set_numerics
from .models import LoadedModel, check_source, load_model
from .results import details, lines, summary_row, write_results

__all__ = ['find_metric', 'main', 'parse_arguments']

DESCRIPTION = """\
Measure the accuracy of a model on a data set. Every image is counted exactly once, whatever the batch size and the
number of processes. With several GPUs: torchrun --standalone --nproc-per-node 8 scripts/validate.py ..."""

EPILOG = """\
ILSVRC2012_img_val.tar, or a folder with its 50,000 files, needs no labels: they are part of this package.

The exit code is 0 if everything was measured (and, with --check, agrees with the manifest), 1 if not, 2 for a wrong
command."""


def main(argv: Sequence[str] | None = None, prog: str = 'validate.py') -> int:
    """Measure what the command line says.

    Args:
        argv: Arguments; None takes those of the process.
        prog: Name of the command, for its help and messages.

    Returns:
        The exit code: 0 if everything was measured and agrees with the manifest, 1 if not, 128 plus the signal's
        number after Ctrl-C or SIGTERM.

    Example:
        >>> main(['--tag', 'geoprior_resnet14_nano', '--data-dir', 'tiny-imagenet-200', '--split', 'val', '--check'])
        0
    """
    args = parse_arguments(argv, prog)
    command = shlex.join(sys.argv if argv is None else [prog, *argv])
    joined_before = joined()
    rank = 0
    try:
        with handled_signals(_stop, signal.SIGINT, signal.SIGTERM):
            _check_output(args)
            device, rank, world_size = find_device(args.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
            run = _Run(args, _config(args, device, rank, world_size), command)
            set_numerics(run.config.precisions)
            _measure_all(run)
            return 1 if run.faults else 0
    except GeoPriorError as error:
        if not rank or isinstance(error, ProcessError):  # the others have met the same
            print(f'{prog}: {error}', file=sys.stderr)
        return 1
    except _Stopped as stopped:
        number = int(stopped.args[0])
        if not rank:
            name = signal.Signals(number).name
            print(f'{prog}: stopped by {name}. What was not finished is not written.', file=sys.stderr)
        return 128 + number
    finally:
        if joined() and not joined_before:
            dist.destroy_process_group()


class _Stopped(BaseException):
    """A signal came; not an `Exception`, so that nothing on the way takes it for a fault of its own."""


def _stop(number: int, frame: FrameType | None) -> None:
    """Leave in order: the workers end with this process, and nothing is half-written."""
    raise _Stopped(number)


# -- the arguments: as far as timm's validate.py has them, with its names and meanings ---------------------------------

class _ModelKwargs(ParseKwargs):
    """timm's, where a word without an equals sign is a wrong command."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for value in values:
            if not value.partition('=')[1]:
                parser.error(f'{option_string} must be KEY=VALUE, got {value}')
        super().__call__(parser, namespace, values, option_string)  # type: ignore[no-untyped-call]


def parse_arguments(argv: Sequence[str] | None = None, prog: str = 'validate.py') -> argparse.Namespace:
    """Parse and check the command line, of which `main` says more; a wrong one ends the program with exit code 2."""
    parser = argparse.ArgumentParser(
        prog=prog, description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_model_arguments(parser.add_argument_group('model'))
    _add_data_arguments(parser.add_argument_group('data'))
    _add_input_arguments(parser.add_argument_group("preprocessing, by default the model's own"))
    _add_engine_arguments(parser.add_argument_group('computation'))
    _add_output_arguments(parser.add_argument_group('output'))
    args = parser.parse_args(argv)
    _check(parser, args)
    return args


def _add_model_arguments(group: Any) -> None:
    group.add_argument(
        '--model', '-m', metavar='NAME',
        help='a model of timm, with or without a tag; not needed for checkpoints of `timm-geoprior train`')
    group.add_argument(
        '--tag', metavar='NAME',
        help='a tag of the manifest, a pattern like "*tin200", or "all"; measures every match with weights in turn')
    group.add_argument('--checkpoint', type=Path, metavar='PATH', help='weights to use instead of the pretrained ones')
    group.add_argument(
        '--use-ema', dest='weights', action='store_const', const='ema', default='auto',
        help="use the checkpoint's averaged weights (the default if it has any)")
    group.add_argument(
        '--raw', dest='weights', action='store_const', const='raw', help='use its raw weights, not averaged ones')
    group.add_argument(
        '--pretrained', action='store_true', help='accepted as in timm; the default without --checkpoint')
    group.add_argument('--num-classes', type=int, metavar='N', help="default: the model's or the checkpoint's")
    group.add_argument(
        '--model-kwargs', nargs='*', default={}, action=_ModelKwargs, metavar='KEY=VALUE',
        help='keyword arguments of the model')


def _add_data_arguments(group: Any) -> None:
    group.add_argument(
        '--data-dir', type=Path, metavar='PATH',
        help='folder with one folder per class, or an archive of it: .tar, .tar.gz, .tar.bz2, .tar.xz, .zip')
    group.add_argument(
        '--dataset', default='', metavar='KIND/NAME',
        help='wds/ (WebDataset shards in --data-dir), hfds/NAME or hfids/NAME (a Hugging Face data set, or a local '
             'folder of parquet files; hfids streams), torch/NAME; default: a folder or an archive')
    group.add_argument(
        '--split', default='validation', metavar='NAME',
        help='default: validation, whose folder may also be called val; for wds/ also its shards, as in '
             '"val-{00..31}.tar|50000"')
    group.add_argument(
        '--num-samples', type=int, metavar='N', help='number of images in a stream, if it is not known otherwise')
    group.add_argument(
        '--class-map', default='', metavar='FILE',
        help='text file with the names of the class folders, one per line, in the order of the classes')
    group.add_argument('--input-key', metavar='KEY', help='column or key of the image')
    group.add_argument('--target-key', metavar='KEY', help='column or key of the class')
    group.add_argument('--dataset-download', action='store_true', help='download the data set (torch/ and hfids/ only)')
    group.add_argument(
        '--subset', action='store_true',
        help='measure only the classes that data and model share, by WordNet id, and ignore the scores of all others')
    group.add_argument(
        '--real-labels', nargs='?', const='', metavar='FILE',
        help="also count by ReaL labels: timm's, or those in a file")


def _add_input_arguments(group: Any) -> None:
    group.add_argument('--img-size', type=int, metavar='N', help='side of the images in pixels')
    group.add_argument('--input-size', type=int, nargs=3, metavar='N', help='channels, height and width')
    group.add_argument('--crop-pct', type=float, metavar='X', help='fraction of the resized image that the crop keeps')
    group.add_argument('--crop-mode', choices=('center', 'squash', 'border'))
    group.add_argument('--interpolation', choices=('bilinear', 'bicubic', 'nearest', 'lanczos', 'box', 'hamming'))
    group.add_argument(
        '--mean', type=float, nargs='+', metavar='X', help='mean of each channel, for pixels from 0 to 1')
    group.add_argument('--std', type=float, nargs='+', metavar='X', help='standard deviation of each channel')


def _add_engine_arguments(group: Any) -> None:
    group.add_argument(
        '--batch-size', '-b', type=int, default=256, metavar='N',
        help='images per batch and process (default: 256); halved when memory runs out')
    group.add_argument(
        '--workers', '-j', type=int, default=min(4, os.cpu_count() or 1), metavar='N',
        help='processes that decode images (default: 4, or the number of processors)')
    group.add_argument('--device', metavar='NAME', help='default: cuda if there is one, else cpu')
    group.add_argument(
        '--precision', nargs='+', choices=tuple(PRECISIONS), metavar='NAME',
        help='float32 (strict: no TF32), bfloat16 or float16 (autocast); several are measured in one pass and compared '
             'with the first (default: float32)')
    group.add_argument('--amp', action='store_true', help='the same as --precision with --amp-dtype')
    group.add_argument('--amp-dtype', default='float16', choices=('float16', 'bfloat16'), help='default: float16')
    group.add_argument('--channels-last', action='store_true', help='use the channels-last memory layout')
    group.add_argument(
        '--torchcompile', nargs='?', const='inductor', metavar='BACKEND',
        help='compile the model (default backend: inductor)')


def _add_output_arguments(group: Any) -> None:
    group.add_argument(
        '--check', action='store_true',
        help="compare the accuracies with the manifest's, and exit with code 1 if they differ")
    group.add_argument(
        '--tolerance', type=float, default=0.05, metavar='X',
        help='percentage points by which top-1 and top-5 may differ (default: 0.05)')
    group.add_argument(
        '--output', type=Path, metavar='DIR',
        help='write results.json (figures and where they come from), per_class.csv, confused_pairs.csv, '
             'reliability.png and per_class.png; for several models, into a folder for each')
    group.add_argument(
        '--results-file', type=Path, metavar='FILE',
        help='write a summary: everything about each model if it ends in .json, else a table (CSV)')


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse values and combinations that cannot be meant."""
    if args.tag is not None and (args.model or args.checkpoint):
        parser.error('--tag measures the weights of the tag. Use --model with --checkpoint instead')
    if args.tag is None and not (args.model or args.checkpoint):
        parser.error('nothing to measure. Name --model, --tag or --checkpoint')
    if args.amp and args.precision:
        parser.error('--amp and --precision say the same. Use one of them')
    # the manifest's figures are of the model's own preprocessing, and of all its classes
    overriding = ('subset', 'crop_pct', 'crop_mode', 'interpolation', 'mean', 'std')
    overridden = [name for name in overriding if getattr(args, name) not in (None, False)]
    if args.check and overridden:
        parser.error(f'--check measures a tag as it was published. Leave out --{overridden[0].replace("_", "-")}')
    for name, least in (('batch_size', 1), ('workers', 0), ('tolerance', 0), ('img_size', 1), ('num_samples', 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f'--{name.replace("_", "-")} must be {least} or more, got {value}')
    if args.input_size and min(args.input_size) < 1:
        parser.error(f'--input-size must be channels, height and width of 1 or more, got {args.input_size}')
    if args.crop_pct is not None and not 0 < args.crop_pct <= 1:
        parser.error(f'--crop-pct must be more than 0 and at most 1, got {args.crop_pct}')
    if args.torchcompile and args.torchcompile not in torch.compiler.list_backends(exclude_tags=()):
        known = ', '.join(torch.compiler.list_backends())
        parser.error(f'--torchcompile must be a backend of torch ({known}), got {args.torchcompile}')
    args.precision = tuple(dict.fromkeys([args.amp_dtype] if args.amp else args.precision or ['float32']))


# -- the run -----------------------------------------------------------------------------------------------------------

@dataclass
class _Run:
    """What one command does, and what has come of it so far."""
    args: argparse.Namespace
    config: EvalConfig
    command: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)
    faults: int = 0

    def say(self, text: str) -> None:
        """A result, on stdout."""
        if not self.config.rank:
            print(text, flush=True)

    def fail(self, text: str) -> None:
        """What makes the exit code 1."""
        self.faults += 1
        self.config.tell(text)


def _check_output(args: argparse.Namespace) -> None:
    """Find out before the pass whether its results can be written."""
    if args.output:
        if importlib.util.find_spec('matplotlib') is None:
            raise EvaluationError('--output needs matplotlib for its plots. Run `pip install matplotlib` '
                                  '(the extra "train").')
        try:
            args.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvaluationError(
                f'The folder {args.output} cannot be made ({error.strerror}). Check --output.') from None
    if args.results_file and not args.results_file.absolute().parent.is_dir():
        raise EvaluationError(f'The folder {args.results_file.parent} does not exist. Make it, or check '
                              f'--results-file.')
    if args.results_file and args.results_file.is_dir():
        raise EvaluationError(f'--results-file must be a file, got the folder {args.results_file}. Name a file in it.')


def _config(args: argparse.Namespace, device: torch.device, rank: int, world_size: int) -> EvalConfig:
    input_keys = ('img_size', 'input_size', 'crop_pct', 'crop_mode', 'interpolation', 'mean', 'std')
    return EvalConfig(
        device, rank, world_size, args.precision, args.batch_size, args.workers, args.channels_last,
        args.torchcompile, args.subset, args.real_labels, {key: getattr(args, key) for key in input_keys},
        lambda text: None if rank else print(text, file=sys.stderr, flush=True))


def _names(args: argparse.Namespace) -> list[str | None]:
    """The models to measure; None is the one that the checkpoint names."""
    if args.tag is None:
        return [load_manifest().get(args.model).name if args.check and args.model else args.model]
    if not _is_sweep(args):
        return [load_manifest().get(args.tag).name]
    tags = load_manifest().tags.values()
    if args.tag == 'all':  # of the converted ones, those whose figure can be checked: each is a download
        names = [entry.name for entry in tags if entry.is_released or entry.metrics]
    else:
        names = [entry.name for entry in tags if entry.has_weights and fnmatch.fnmatch(entry.name, args.tag)]
    if not names:
        raise EvaluationError(f'--tag {args.tag} must match a tag that has weights. `timm-geoprior list` shows them.')
    return [*names]


def _is_sweep(args: argparse.Namespace) -> bool:
    return args.tag is not None and (args.tag == 'all' or any(sign in args.tag for sign in '*?['))


def _measure_all(run: _Run) -> None:
    """Open the data once, and go through the models."""
    args = run.args
    names = _names(args)
    for name in names:
        if args.checkpoint is None and name is not None:
            check_source(name)  # before any time is spent on the images
    in_files = args.data_dir is not None and not args.dataset
    with unpacked(args.data_dir) if in_files else contextlib.nullcontext(args.data_dir) as root:
        options = DataOptions(args.class_map, args.num_samples, args.input_key, args.target_key, args.dataset_download)
        data = open_split(root, args.split, args.dataset, options)
        check_data(data, args.workers, run.config.tell, run.config.rank, run.config.world_size)
        for name in names:
            try:
                _measure(run, data, name)
            except ClassMismatchError as error:
                if not _is_sweep(args):
                    raise
                run.config.tell(f'{name} is skipped: {error}')
            except GeoPriorError as error:
                if not _is_sweep(args) or isinstance(error, ProcessError):
                    raise
                run.fail(f'{name} failed: {error}')
    if not run.rows and not run.faults:
        raise EvaluationError('No model was measured: none has the classes of the data. Check --data-dir.')


def _measure(run: _Run, data: DataSplit, name: str | None) -> None:
    args, config = run.args, run.config
    if _is_sweep(args) and name is not None:  # before weights are fetched that are for other classes
        labels = load_manifest().label_sets.get(load_manifest().get(name).label_set)
        if labels is None:
            raise ClassMismatchError(f'{name} must have a classifier, got a backbone without one.')
        match_classes(data.classes, labels.wnids, labels.names, labels.num_classes, args.subset)
    loaded = load_model(name, args.checkpoint, args.weights, args.num_classes,
                        args.input_size[0] if args.input_size else 3, args.model_kwargs)
    planned = plan(data, loaded, config)
    for note in (*loaded.notes, *planned.match.notes):
        config.tell(note)
    _compare_with_figures(run, data, loaded, planned)
    seen = {'data_dir': str(args.data_dir) if args.data_dir else None, 'dataset': args.dataset, 'split': args.split,
            'notes': list(data.notes),
            **(fingerprint(data, planned.indices, args.dataset) if not config.rank else {})}
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')
    evaluation = evaluate(data, loaded, planned, config)
    run.rows.append(summary_row(evaluation))
    for line in lines(evaluation):
        run.say(line)
    for problem in evaluation.problems:
        run.fail(problem)
    if args.check:
        _check_figures(run, evaluation)
    if not config.rank:
        run.details.append({**details(evaluation, config), 'data': seen, 'command': run.command, 'started': started})
        _write(run, evaluation)


def _write(run: _Run, evaluation: Evaluation) -> None:
    """Write what has been measured so far: a sweep that is stopped keeps it."""
    args, name = run.args, evaluation.loaded.name
    if args.output:
        write_results(args.output / name if _is_sweep(args) else args.output, evaluation, run.details[-1])
    if args.results_file and args.results_file.suffix == '.json':
        write_json(args.results_file, run.details[0] if len(run.details) == 1 else run.details)
    elif args.results_file:
        write_csv(args.results_file, run.rows)


# -- measured against claimed ------------------------------------------------------------------------------------------

def find_metric(entry: ModelEntry, precision: str, img_size: int, num_images: int | None) -> Metric:
    """The manifest's figure that a measurement at `img_size` pixels can be held against.

    Raises:
        EvaluationError: The manifest has none for that precision, size and number of images (None is any number).
    """
    if not entry.metrics:
        raise EvaluationError(f'The manifest has no figure for {entry.name}. Leave out --check, or take a tag that has '
                              f'one.')
    fitting = [m for m in entry.metrics if (m.precision, m.img_size) == (precision, img_size)]
    if not fitting:
        known = ' and '.join(sorted({f'{m.precision} at {m.img_size} px' for m in entry.metrics}))
        raise EvaluationError(f'The manifest has no figure of {entry.name} for {precision} at {img_size} px, only for '
                              f'{known}. Measure that.')
    for metric in fitting:
        if num_images in (None, metric.num_images):
            return metric
    known = ' or '.join(f'{m.dataset} {m.split} with {m.num_images:,} images' for m in fitting)
    raise EvaluationError(f"The manifest's figure of {entry.name} is for {known}, got {num_images:,}. Check --data-dir "
                          f'and --split.')


def _compare_with_figures(run: _Run, data: DataSplit, loaded: LoadedModel, planned: Plan) -> None:
    """Say before the pass, which may take hours, whether these images are the set that the manifest's figure is for."""
    entry, count = loaded.entry, None if data.is_stream else len(planned.indices)
    if run.args.check:
        if entry is None:
            raise EvaluationError(f'--check needs a tag of the manifest ({", ".join(load_manifest().models)}), got '
                                  f'{loaded.name}. Leave it out.')
        if run.args.checkpoint and loaded.weights['sha256'] != entry.sha256:
            raise EvaluationError(f'--check needs the weights of {entry.name}, whose sha256 is {entry.sha256}, got '
                                  f'{run.args.checkpoint} with {loaded.weights["sha256"]}. Leave one of them out.')
        for precision in run.config.precisions:
            find_metric(entry, precision, planned.img_size, count)
    elif (entry is not None and loaded.weights.get('sha256') == entry.sha256 and count is not None
          and count not in {metric.num_images for metric in entry.metrics}):
        for metric in entry.metrics:
            run.config.tell(f"These {count:,} images are not the set that the manifest's figure is for: "
                              f'{metric.dataset} {metric.split}, {metric.num_images:,} images.')


def _check_figures(run: _Run, evaluation: Evaluation) -> None:
    """Compare what was measured with the manifest."""
    entry, tolerance = evaluation.loaded.entry, run.args.tolerance
    assert entry is not None
    for precision, counts in evaluation.outcome.counts.items():
        metric = find_metric(entry, precision, evaluation.plan.img_size, counts.num_images)
        for name, correct, claimed in (
                ('top-1', counts.top1_correct, metric.top1), ('top-5', counts.top5_correct, metric.top5)):
            points = 100 * correct / counts.num_images - claimed
            text = f"{name} in {precision} is {points:+.4f} points from the manifest's {claimed:.2f}%"
            if abs(points) <= tolerance:
                run.say(f'  check: {text}, within {tolerance}.')
            else:
                run.fail(f'The check failed: {text}. The tolerance is {tolerance}.')
