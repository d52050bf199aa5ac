"""The command `timm-geoprior validate`, which scripts/validate.py runs too.

torch and timm are imported only when needed, so that `--help` and usage errors appear at once.
"""
import argparse
import math
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import GeoPriorError, enough_memory, needs_extra
from ..progress import command_line, handled_signals

DESCRIPTION = """\
Measure the accuracy of a model on a data set. Every image is counted exactly once, whatever the batch size and the
number of processes. With several GPUs: torchrun --standalone --nproc-per-node 8 scripts/validate.py ..."""

EPILOG = """\
ILSVRC2012_img_val.tar, or a folder with its 50,000 files, needs no labels: they are part of this package.

The exit code is 0 if everything was measured (and, with --check, agrees with the manifest), 1 if not, 2 for a wrong
command."""


def main(argv: Sequence[str] | None = None, prog: str = 'timm-geoprior validate') -> int:
    """Measure as the command line says.

    Args:
        argv: Arguments; None takes those of the process.
        prog: Name of the command, for its help and messages.

    Returns:
        The exit code: 0 if everything was measured and agrees with the manifest, 1 if not, 128 plus the signal's
        number after Ctrl-C or SIGTERM.

    Raises:
        GeoPriorError: A package is missing.

    Example:
        >>> main(['--tag', 'geoprior_resnet14_nano', '--data-dir', 'tiny-imagenet-200', '--split', 'val', '--check'])
        0
    """
    args = parse_arguments(argv, prog)
    given = sys.argv[1:] if argv is None else [*argv]
    of_process = sys.argv[len(sys.argv) - len(given):] == given
    command = command_line() if of_process else shlex.join([*prog.split(), *given])
    with needs_extra('train', 'scipy'):
        from ..distributed import group_of_processes, is_first, should_report
        from .measure import measure
    with group_of_processes():
        try:
            with (handled_signals(_stop, signal.SIGINT, signal.SIGTERM),
                  enough_memory('Use a smaller --batch-size, fewer --workers, or another device.')):
                return 1 if measure(args, command) else 0
        except GeoPriorError as error:
            if should_report(error):
                print(f'{prog}: {error}', file=sys.stderr)
            return 1
        except _Stopped as stopped:
            number = int(stopped.args[0])
            if is_first():
                name = signal.Signals(number).name
                print(f'{prog}: stopped by {name}. Unfinished results are not written.', file=sys.stderr)
            return 128 + number


class _Stopped(BaseException):
    """A signal arrived. Not an `Exception`, so that no handler on the way mistakes it for an error."""


def _stop(number: int, frame: FrameType | None) -> None:
    """Exit in order: the workers end with this process, and no file is half-written."""
    raise _Stopped(number)


# -- the arguments, with the names and meanings of those in timm's validate.py -----------------------------------------

class _ModelKwargs(argparse.Action):
    """timm's `ParseKwargs`, with a usage error for a word without an equals sign."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for value in values:
            if not value.partition('=')[1]:
                parser.error(f'{option_string} must be KEY=VALUE, got {value}')
        from timm.utils import ParseKwargs
        ParseKwargs(self.option_strings, self.dest)(parser, namespace, values, option_string)


def parse_arguments(argv: Sequence[str] | None = None, prog: str = 'timm-geoprior validate') -> argparse.Namespace:
    """Parse and check the command line; a wrong one ends the program with exit code 2."""
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
        help='measure only the classes that data and model share, by WordNet id or name, and ignore all other '
             'scores')
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
        '--precision', nargs='+', choices=('float32', 'bfloat16', 'float16'), metavar='NAME',
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
    """Refuse values and combinations that make no sense."""
    if args.tag is not None and (args.model or args.checkpoint):
        parser.error('--tag measures the weights of the tag. Use --model with --checkpoint instead')
    if args.tag is None and not (args.model or args.checkpoint):
        parser.error('nothing to measure. Name --model, --tag or --checkpoint')
    if args.amp and args.precision:
        parser.error('--amp and --precision both set the precision. Use one of them')
    # the manifest's figures are for the model's own preprocessing, and for all its classes
    overriding = ('subset', 'model_kwargs', 'num_classes', 'input_size', 'crop_pct', 'crop_mode', 'interpolation',
                  'mean', 'std')
    overridden = [name for name in overriding if getattr(args, name)]
    if args.check and overridden:
        parser.error(f'--check measures a tag as it was published. Leave out --{overridden[0].replace("_", "-")}')
    for name, least in (('batch_size', 1), ('workers', 0), ('tolerance', 0), ('img_size', 1), ('num_samples', 1)):
        value = getattr(args, name)
        if value is not None and not value >= least:  # NaN is refused, too
            parser.error(f'--{name.replace("_", "-")} must be {least} or more, got {value}')
    if args.input_size and min(args.input_size) < 1:
        parser.error(f'--input-size must be channels, height and width of 1 or more, got {args.input_size}')
    if args.crop_pct is not None and not 0.01 <= args.crop_pct <= 1:
        parser.error(f'--crop-pct must be from 0.01 to 1, got {args.crop_pct}')
    for name, limit in (('mean', -math.inf), ('std', 0.0)):
        values = getattr(args, name)
        if values and not all(limit < value < math.inf for value in values):
            parser.error(f'--{name} must be finite{" and above 0" if name == "std" else ""}, got '
                         f'{" ".join(map(str, values))}')
    if args.torchcompile:
        from torch.compiler import list_backends
        if args.torchcompile not in list_backends(exclude_tags=()):
            parser.error(f'--torchcompile must be a backend of torch ({", ".join(list_backends())}), got '
                         f'{args.torchcompile}')
    args.precision = tuple(dict.fromkeys([args.amp_dtype] if args.amp else args.precision or ['float32']))
