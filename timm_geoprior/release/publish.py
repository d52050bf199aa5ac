"""The command `timm-geoprior publish`, which scripts/publish.py runs too.

Nothing here imports torch or timm before it is needed, so that `--help` and usage errors appear at once.
"""
import argparse
from collections.abc import Sequence
from pathlib import Path

from ..errors import needs_extra

DESCRIPTION = """Release a model: from a checkpoint to a staged folder, then into the package or onto the Hub.

    timm-geoprior publish TAG RUN/last.pt --output DIR                       stage only
    timm-geoprior validate --model TAG --checkpoint DIR/model.safetensors --data-dir DATA \\
        --results-file val.json                                              measure what was staged
    timm-geoprior publish TAG RUN/last.pt --results val.json --output DIR    stage with the figures
    timm-geoprior publish TAG --output DIR --bundle                          put it into the package, or
    timm-geoprior publish TAG --output DIR --push OWNER/NAME [--public]      onto the Hub
    timm-geoprior publish TAG --results val.json                             record figures of a converted tag

TAG is a planned or released entry of weights_manifest.json. The Hub token comes from `hf auth login` or HF_TOKEN.
An interrupted push continues with the same command.
"""


def _parse_arguments(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('tag', help='architecture.tag of the manifest')
    parser.add_argument('checkpoint', type=Path, nargs='?', help='training checkpoint, or a .safetensors file')
    parser.add_argument('--output', type=Path, help='staged folder, to write or to release')
    parser.add_argument('--results', type=Path, help='JSON results file of `timm-geoprior validate` for these weights')
    parser.add_argument('--baseline', type=Path, help='the same for the plain network trained by the same recipe')
    parser.add_argument(
        '--experiments', type=Path, nargs='+', default=[], metavar='FILE',
        help='Markdown for the model card, such as the report of scripts/experiments/compare.py')
    parser.add_argument(
        '--use-ema', dest='weights', action='store_const', const='ema', default='auto',
        help="use the checkpoint's averaged weights (the default if it has any)")
    parser.add_argument(
        '--raw', dest='weights', action='store_const', const='raw', help='use its raw weights')
    parser.add_argument('--bundle', action='store_true', help='put the staged weights into the package')
    parser.add_argument('--push', metavar='OWNER/NAME', help='push the staged folder to this Hub repository')
    parser.add_argument('--public', action='store_true', help='make a new repository public')
    parser.add_argument('--dry-run', action='store_true', help='only print what --push would do')
    parser.add_argument(
        '--replace', action='store_true', help='allow new weights for a bundled tag that is not released')
    args = parser.parse_args(argv)
    if problem := _problem(args):
        parser.error(problem)
    return args


def _problem(args: argparse.Namespace) -> str:
    """What is wrong with the combination of options; '' if nothing is."""
    staging = {'results': args.results, 'baseline': args.baseline, 'experiments': args.experiments,
               'use-ema': args.weights == 'ema', 'raw': args.weights == 'raw'}
    unused = [name for name, value in staging.items() if value]
    if not args.output:
        alone = unused == ['results'] and not (args.checkpoint or args.bundle or args.push)
        return '' if alone else '--output is needed, except for --results alone, to record figures of a converted tag'
    if unused and not args.checkpoint:
        return f'--{unused[0]} is for staging: name the checkpoint after the tag'
    if args.dry_run and not args.push:
        return '--dry-run prints what --push would do: name the repository with --push'
    if args.dry_run and args.bundle:
        return '--dry-run is for --push only: leave out --bundle'
    if not (args.checkpoint or args.bundle or args.push):
        return 'nothing to do: name a checkpoint to stage, or add --bundle or --push'
    return ''


def main(argv: Sequence[str] | None = None, prog: str = 'timm-geoprior publish') -> int:
    """Stage, bundle or push a model; returns the exit code, 0, or raises a GeoPriorError."""
    args = _parse_arguments(argv, prog)
    with needs_extra('train', 'matplotlib'):
        from .releasing import release
    release(args)
    return 0
