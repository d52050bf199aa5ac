#!/usr/bin/env python3
"""Release a model: from a checkpoint to a staged folder, into the package, onto the Hub.

    python scripts/publish.py TAG RUN/last.pt --output DIR                        stage, and stop there
    python scripts/validate.py --model TAG --checkpoint DIR/model.safetensors --data-dir DATA \\
        --results-file val.json                                                   measure what was staged
    python scripts/publish.py TAG RUN/last.pt --results val.json --output DIR     stage with the figures
    python scripts/publish.py TAG --output DIR --bundle                           put it into the package, or
    python scripts/publish.py TAG --output DIR --push OWNER/NAME [--public]       onto the Hub

TAG is an entry of weights_manifest.json, planned or released. The token for the Hub is that of `hf auth login`, or
HF_TOKEN. A push that was interrupted goes on with the same command.
"""
import argparse
import sys
from pathlib import Path

import timm_geoprior  # noqa: F401  (registers the models)
from timm_geoprior.errors import GeoPriorError
from timm_geoprior.pretrained.manifest import ModelEntry, load_manifest, manifest_path
from timm_geoprior.release.cards import update_readme
from timm_geoprior.release.publish import PublishError, bundle, describe_push, push, read_staged, stage
from timm_geoprior.training.checkpoint import read_weights


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('tag', help='architecture.tag of the manifest')
    parser.add_argument('checkpoint', type=Path, nargs='?', help='checkpoint of a run, or a .safetensors file')
    parser.add_argument('--output', type=Path, required=True, help='the staged folder')
    parser.add_argument('--results', type=Path, help='JSON results file of scripts/validate.py, of these weights')
    parser.add_argument('--baseline', type=Path, help='such a file of the plain network of the same recipe')
    parser.add_argument(
        '--experiments', type=Path, nargs='+', default=[], metavar='FILE',
        help='Markdown for the model card, as scripts/experiments/compare.py writes it')
    parser.add_argument(
        '--use-ema', dest='weights', action='store_const', const='ema', default='auto',
        help="the checkpoint's averaged weights, which are taken by default where it has any")
    parser.add_argument(
        '--raw', dest='weights', action='store_const', const='raw', help='its raw weights, beside averaged ones')
    parser.add_argument('--bundle', action='store_true', help="put it into the package's weights folder")
    parser.add_argument('--push', metavar='OWNER/NAME', help='push it to this repository of the Hub')
    parser.add_argument('--public', action='store_true', help='make a new repository public')
    parser.add_argument('--dry-run', action='store_true', help='say what --push would do, and do not')
    parser.add_argument('--replace', action='store_true', help='other bytes for a bundled tag that is not released yet')
    args = parser.parse_args()
    for_staging = {'results': args.results, 'baseline': args.baseline, 'experiments': args.experiments,
                   'use-ema': args.weights == 'ema', 'raw': args.weights == 'raw'}
    if not args.checkpoint and (unused := [name for name, value in for_staging.items() if value]):
        parser.error(f'--{unused[0]} is for staging: name the checkpoint after the tag')
    if args.dry_run and not args.push:
        parser.error('--dry-run says what --push would do: name the repository by --push')
    if args.dry_run and args.bundle:
        parser.error('--dry-run is for --push alone: leave --bundle out')
    if not (args.checkpoint or args.bundle or args.push):
        parser.error('nothing to do: name a checkpoint to stage, --bundle or --push')
    return args


def stage_checkpoint(args: argparse.Namespace) -> None:
    run = args.checkpoint.parent if args.checkpoint.suffix == '.pt' else None
    entry = load_manifest().get(args.tag)
    checkpoint = read_weights(args.checkpoint, args.weights)
    if checkpoint.note:
        print(checkpoint.note)
    entry = stage(entry, checkpoint, args.output, args.results, args.baseline, run, args.experiments)
    print(f'staged {entry.name} in {args.output}: {entry.bytes:,} bytes, sha256 {entry.sha256}')


def report(entry: ModelEntry) -> None:
    update_readme(manifest_path().parent / 'README.md', load_manifest())
    where = f'{entry.hub_id} at {entry.revision}' if entry.status == 'published' else 'the package'
    print(f'{entry.name} is {entry.status}: {where}; the manifest and the README say so')


def main() -> None:
    args = parse_args()
    try:
        if args.checkpoint:
            stage_checkpoint(args)
        elif (staged := read_staged(args.output, load_manifest()).name) != args.tag:
            raise PublishError(f'{args.output} holds {staged}, expected {args.tag}: name the tag that was staged, or '
                               f'another folder.')
        if args.bundle:
            report(bundle(args.output, replace_weights=args.replace))
        if args.push and args.dry_run:
            print(describe_push(args.output, args.push, args.public))
        elif args.push:
            report(push(args.output, args.push, args.public))
    except GeoPriorError as error:
        sys.exit(f'publish.py: {error}')


if __name__ == '__main__':
    main()
