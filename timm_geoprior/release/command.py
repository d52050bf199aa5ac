"""The command `timm-geoprior publish`, which `scripts/publish.py` runs too."""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import GeoPriorError
from ..pretrained.manifest import ModelEntry, load_manifest, manifest_path
from ..training.checkpoint import read_weights
from .cards import update_readme
from .publish import PublishError, bundle, describe_push, push, read_staged, record_results, stage

__all__ = ['main']

DESCRIPTION = """Release a model: from a checkpoint to a staged folder, then into the package or onto the Hub.

    timm-geoprior publish TAG RUN/last.pt --output DIR                       stage, and stop there
    timm-geoprior validate --model TAG --checkpoint DIR/model.safetensors --data-dir DATA \\
        --results-file val.json                                              measure what was staged
    timm-geoprior publish TAG RUN/last.pt --results val.json --output DIR    stage with the figures
    timm-geoprior publish TAG --output DIR --bundle                          put it into the package, or
    timm-geoprior publish TAG --output DIR --push OWNER/NAME [--public]      onto the Hub
    timm-geoprior publish TAG --results val.json                             record figures of a converted tag

TAG is an entry of weights_manifest.json, planned or released. The Hub's token comes from `hf auth login` or HF_TOKEN.
An interrupted push continues with the same command.
"""


def _parse_arguments(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('tag', help='architecture.tag of the manifest')
    parser.add_argument('checkpoint', type=Path, nargs='?', help='checkpoint of a run, or a .safetensors file')
    parser.add_argument('--output', type=Path, help='the staged folder')
    parser.add_argument('--results', type=Path, help='JSON results file of `timm-geoprior validate` for these weights')
    parser.add_argument('--baseline', type=Path, help='the same for the plain network trained by the same recipe')
    parser.add_argument(
        '--experiments', type=Path, nargs='+', default=[], metavar='FILE',
        help='Markdown for the model card, such as the report of scripts/experiments/compare.py')
    parser.add_argument(
        '--use-ema', dest='weights', action='store_const', const='ema', default='auto',
        help='the averaged weights; the default if the checkpoint has any')
    parser.add_argument(
        '--raw', dest='weights', action='store_const', const='raw', help='the raw weights, even beside averaged ones')
    parser.add_argument('--bundle', action='store_true', help="put it into the package's weights folder")
    parser.add_argument('--push', metavar='OWNER/NAME', help='push it to this repository of the Hub')
    parser.add_argument('--public', action='store_true', help='make a new repository public')
    parser.add_argument('--dry-run', action='store_true', help='only print what --push would do')
    parser.add_argument('--replace', action='store_true', help='other bytes for a bundled tag that is not released')
    args = parser.parse_args(argv)
    if problem := _problem(args):
        parser.error(problem)
    return args


def _problem(args: argparse.Namespace) -> str:
    """What is wrong with the options together; '' if nothing is."""
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


def _stage(args: argparse.Namespace) -> None:
    entry = load_manifest().get(args.tag)
    checkpoint = read_weights(args.checkpoint, args.weights)
    if checkpoint.note:
        print(checkpoint.note)
    run = args.checkpoint.parent if args.checkpoint.suffix == '.pt' else None
    entry = stage(entry, checkpoint, args.output, args.results, args.baseline, run, args.experiments)
    print(f'Staged {entry.name} in {args.output}: {entry.bytes:,} bytes, SHA-256 {entry.sha256}')


def _report(entry: ModelEntry) -> None:
    readme = manifest_path().parent / 'README.md'
    if readme.is_file():  # in a checkout; a wheel has none
        update_readme(readme, load_manifest())
    if entry.status == 'converted':
        print(f'{entry.name} has a top-1 accuracy of {entry.metrics[0].top1:.2f}%. {manifest_path()} is updated.')
        return
    where = f'{entry.hub_id} at {entry.revision}' if entry.status == 'published' else 'the package'
    print(f'{entry.name} is {entry.status}: {where}. {manifest_path()} is updated.')


def main(argv: Sequence[str] | None = None, prog: str = 'publish.py') -> int:
    """Stage, bundle or push a model.

    Args:
        argv: Arguments; None takes those of the process.
        prog: Name of the command, for its help.

    Returns:
        The exit code: 0, or 1 after a message on stderr.
    """
    args = _parse_arguments(argv, prog)
    try:
        if not args.output:
            _report(record_results(load_manifest().get(args.tag), args.results))
        elif args.checkpoint:
            _stage(args)
        elif (staged := read_staged(args.output, load_manifest()).name) != args.tag:
            raise PublishError(f'{args.output} must hold {args.tag}, got {staged}. Name that tag, or another folder.')
        if args.bundle:
            _report(bundle(args.output, replace_weights=args.replace))
        if args.push and args.dry_run:
            print(describe_push(args.output, args.push, args.public))
        elif args.push:
            _report(push(args.output, args.push, args.public))
    except GeoPriorError as error:
        print(f'publish: {error}', file=sys.stderr)
        return 1
    return 0
