"""The command line's arguments: names and meanings are those of timm's validate.py as far as it has them."""
import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.utils import ParseKwargs

from .predict import PRECISIONS

__all__ = ['parse_arguments']


class _ModelKwargs(ParseKwargs):
    """timm's, where a word without an equals sign is a wrong command."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for value in values:
            if not value.partition('=')[1]:
                parser.error(f'{option_string} is {value}, expected KEY=VALUE')
        super().__call__(parser, namespace, values, option_string)  # type: ignore[no-untyped-call]

DESCRIPTION = """\
Measure the accuracy of a model on a data set: every image exactly once, whatever the batch size and the number of
processes. Several processes, one for each GPU: torchrun --nproc-per-node=8 scripts/validate.py ..."""

EPILOG = """\
ILSVRC2012_img_val.tar, or its 50,000 files in one folder, are labelled by this package: --data-dir names either.

The exit code is 0 if all was measured (and, with --check, is as the manifest has it), 1 if not, 2 for a wrong
command."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line; a wrong one ends the program with exit code 2.

    Args:
        argv: Arguments, those of the process where it is None.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(
        prog='validate.py', description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_model_arguments(parser.add_argument_group('what is measured'))
    _add_data_arguments(parser.add_argument_group('on which images'))
    _add_input_arguments(parser.add_argument_group("preprocessing, where it is not to be the model's own"))
    _add_engine_arguments(parser.add_argument_group('how'))
    _add_output_arguments(parser.add_argument_group('what is made of it'))
    args = parser.parse_args(argv)
    _check(parser, args)
    return args


def _add_model_arguments(group: Any) -> None:
    group.add_argument(
        '--model', '-m', metavar='NAME',
        help="a model of timm, with or without a tag; this package's training checkpoints name their own")
    group.add_argument(
        '--tag', metavar='NAME',
        help='a tag of the manifest, a pattern like "*tin200", or "all": those that have weights, one after the other')
    group.add_argument('--checkpoint', type=Path, metavar='PATH', help='weights, in place of the pretrained ones')
    group.add_argument(
        '--use-ema', dest='weights', action='store_const', const='ema', default='auto',
        help="the checkpoint's averaged weights, which are taken by default where it has any")
    group.add_argument(
        '--raw', dest='weights', action='store_const', const='raw', help='its raw weights, beside averaged ones')
    group.add_argument(
        '--pretrained', action='store_true', help="timm's argument; without --checkpoint it goes without saying")
    group.add_argument(
        '--num-classes', type=int, metavar='N', help="where it is not the model's or the checkpoint's own")
    group.add_argument(
        '--model-kwargs', nargs='*', default={}, action=_ModelKwargs, metavar='KEY=VALUE', help='options of the model')


def _add_data_arguments(group: Any) -> None:
    group.add_argument(
        '--data-dir', type=Path, metavar='PATH',
        help='folder with a folder for each class, or an archive of it: .tar, .tar.gz, .tar.bz2, .tar.xz')
    group.add_argument(
        '--dataset', default='', metavar='KIND/NAME',
        help='wds/ (WebDataset shards in --data-dir), hfds/NAME or hfids/NAME (a Hugging Face data set, or a local '
             'folder of parquet files; hfids streams), torch/NAME; default: a folder or an archive')
    group.add_argument(
        '--split', default='validation', metavar='NAME',
        help='default: validation, whose folder may also be called val; for wds/ also its shards, as in '
             '"val-{00..31}.tar|50000"')
    group.add_argument(
        '--num-samples', type=int, metavar='N', help="a stream's number of images, where nothing else tells it")
    group.add_argument(
        '--class-map', default='', metavar='FILE',
        help="the class folders' names, a line each, in the order of the classes")
    group.add_argument('--input-key', metavar='KEY', help='where the data set keeps the image')
    group.add_argument('--target-key', metavar='KEY', help='where it keeps the class')
    group.add_argument('--dataset-download', action='store_true', help='allow it for torch/ and hfids/')
    group.add_argument(
        '--subset', action='store_true',
        help='measure only the classes that data and model both have, by WordNet id, and let only their scores compete')
    group.add_argument(
        '--real-labels', nargs='?', const='', metavar='FILE',
        help="also count by ReaL labels: those that timm has, or a file's")


def _add_input_arguments(group: Any) -> None:
    group.add_argument('--img-size', type=int, metavar='N', help='side of the images in pixels')
    group.add_argument('--input-size', type=int, nargs=3, metavar='N', help='channels, height and width')
    group.add_argument('--crop-pct', type=float, metavar='X', help='share of the resized image that is cut out')
    group.add_argument('--crop-mode', choices=('center', 'squash', 'border'))
    group.add_argument('--interpolation', choices=('bilinear', 'bicubic', 'nearest', 'lanczos', 'box', 'hamming'))
    group.add_argument('--mean', type=float, nargs='+', metavar='X', help='of the pixels, from 0 to 1')
    group.add_argument('--std', type=float, nargs='+', metavar='X', help='of the pixels, from 0 to 1')


def _add_engine_arguments(group: Any) -> None:
    group.add_argument(
        '--batch-size', '-b', type=int, default=256, metavar='N',
        help='images of a batch of one process (default: 256); halved when memory runs out')
    group.add_argument(
        '--workers', '-j', type=int, default=min(4, os.cpu_count() or 1), metavar='N',
        help='processes that decode (default: 4, or as many as there are processors)')
    group.add_argument('--device', metavar='NAME', help='default: cuda if there is one, else cpu')
    group.add_argument(
        '--precision', nargs='+', choices=tuple(PRECISIONS), metavar='NAME',
        help='float32 (strict: no TF32), bfloat16, float16 (autocast); several are measured in one pass and compared '
             'with the first (default: float32)')
    group.add_argument('--amp', action='store_true', help="timm's argument: --precision of --amp-dtype")
    group.add_argument('--amp-dtype', default='float16', choices=('float16', 'bfloat16'), help='default: float16')
    group.add_argument('--channels-last', action='store_true', help='that memory layout')
    group.add_argument(
        '--torchcompile', nargs='?', const='inductor', metavar='BACKEND',
        help='compile the model (default backend: inductor)')


def _add_output_arguments(group: Any) -> None:
    group.add_argument(
        '--check', action='store_true',
        help="hold the figures against the manifest's, and leave with exit code 1 where they are off")
    group.add_argument(
        '--tolerance', type=float, default=0.05, metavar='X',
        help='by how many points of a percent top-1 and top-5 may be off (default: 0.05)')
    group.add_argument(
        '--output', type=Path, metavar='DIR',
        help='write results.json (figures and where they come from), per_class.csv, confused_pairs.csv, '
             'reliability.png and per_class.png; of several models, each into a folder of its name')
    group.add_argument('--results-file', type=Path, metavar='FILE', help='write a summary, a row a model')
    group.add_argument(
        '--results-format', choices=('csv', 'json'), help="default: json if the file's name ends so, else csv")


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what cannot be meant."""
    if args.tag is not None and (args.model or args.checkpoint):
        parser.error('--tag takes its own weights: name --model instead where you name --checkpoint')
    if args.tag is None and not (args.model or args.checkpoint):
        parser.error('nothing to measure: name --model, --tag or --checkpoint')
    if args.amp and args.precision:
        parser.error('--amp and --precision say the same: name one of them')
    overriding = ('subset', 'crop_pct', 'crop_mode', 'interpolation', 'mean', 'std')
    overridden = [name for name in overriding if getattr(args, name) not in (None, False)]
    if args.check and overridden:
        parser.error(f'--check measures a tag as it is published: leave out --{overridden[0].replace("_", "-")}')
    for name, least in (('batch_size', 1), ('workers', 0), ('tolerance', 0), ('img_size', 1), ('num_samples', 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f'--{name.replace("_", "-")} is {value}, expected {least} or more')
    if args.input_size and min(args.input_size) < 1:
        parser.error(f'--input-size is {args.input_size}, expected channels, height and width of 1 or more')
    if args.crop_pct is not None and not 0 < args.crop_pct <= 1:
        parser.error(f'--crop-pct is {args.crop_pct}, expected a share, more than 0 and at most 1')
    if args.torchcompile and args.torchcompile not in torch.compiler.list_backends(exclude_tags=()):
        known = ', '.join(torch.compiler.list_backends())
        parser.error(f'--torchcompile is {args.torchcompile}, expected a backend that torch has, as {known}')
    args.precision = tuple(dict.fromkeys([args.amp_dtype] if args.amp else args.precision or ['float32']))
