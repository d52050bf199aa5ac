#!/usr/bin/env python3
"""Run variants of a recipe with several seeds, and compare them on images held out of training.

    python scripts/compare.py scripts/nano_variants.yaml --data-dir tiny-imagenet-200 --seeds 1 2 3 4 --output out

The order is seed by seed, so that what is there at any time is paired. Stopped, by whatever, it goes on with the same
command; with more seeds or variants, it does those that are new. The folder gets comparison.md (tables), comparison.png
and runs.csv after each run, and each run's own files below runs/. Without a file of variants:

    python scripts/compare.py r64_tin200 --set holdout=50 --variant 'prior: {}' \\
        --variant 'plain: {model_kwargs: {value_dims: [0, 0, 0, 0]}}' --data-dir tiny-imagenet-200 --output runs/control
"""
import argparse
import shlex
import sys
from pathlib import Path

import torch

import timm_geoprior  # noqa: F401  (registers the models)
from timm_geoprior.comparison import ComparisonError, compare, load_variants, report
from timm_geoprior.finetune import ERRORS
from timm_geoprior.training.engine import RunConfig


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', metavar='VARIANTS', help='a YAML file with recipe, set and variants, or a recipe')
    parser.add_argument('--data-dir', type=Path, required=True, help='folder whose train/ has one folder a class')
    parser.add_argument('--output', type=Path, required=True, help='folder of the runs and the report')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], metavar='N', help='default: 0 1 2')
    parser.add_argument(
        '--variant', action='append', default=[], metavar="'NAME: {KEY: VALUE}'",
        help="a variant, in place of the file's; the first is the base")
    parser.add_argument(
        '--set', action='append', default=[], metavar='KEY=VALUE', help='another value for a recipe key, in all')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu',
                        help='default: cuda if there is one, else cpu')
    parser.add_argument('-j', '--workers', type=int, default=2, help='processes that decode images')
    parser.add_argument('--save-every', type=int, default=100, help='updates between two checkpoints (default: 100)')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    config = RunConfig(
        args.data_dir, args.output, device=args.device, workers=args.workers, save_every=args.save_every)
    text = ''
    try:
        recipes = load_variants(args.source, args.set, args.variant)
        for rows in compare(recipes, list(dict.fromkeys(args.seeds)), config):
            if rows:
                text = report(rows, args.output, shlex.join(['python', *sys.argv]))
    except (ComparisonError, *ERRORS) as error:
        sys.exit(f'compare.py: {error}')
    except KeyboardInterrupt:  # while images are read; a run saves and leaves by itself
        sys.exit(130)
    print(f'\n{text}')


if __name__ == '__main__':
    main()
