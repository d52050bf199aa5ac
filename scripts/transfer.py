#!/usr/bin/env python3
"""Measure what a model's weights are worth on another set of images, beside random ones.

    python scripts/transfer.py geoprior_resnet50 --data-dir cifar10 --per-class 10 100 1000 --img-size 64 --output out
    python scripts/transfer.py geoprior_resnet50 --data-dir caltech101 --img-size 64 --output out

With trained and with random weights: k nearest neighbours and a linear probe on frozen features, and the fine-tuning of
`timm-geoprior finetune`, each with several draws of the labels. Stopped, by whatever, it goes on with the same command;
with more seeds or labels, it does what is new. The folder gets transfer.md (a table), transfer.png and transfer.csv of
all data sets that were measured into it. Of fine-tuned networks only the curves and results are kept.
"""
import argparse
import shlex
import sys
from pathlib import Path

import torch

import timm_geoprior  # noqa: F401  (registers the models)
from timm_geoprior.finetune import ERRORS
from timm_geoprior.transfer import METHODS, Transfer, TransferError, report, transfer


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', metavar='MODEL', help='a tag or an architecture with weights, or local-dir:FOLDER')
    parser.add_argument(
        '--data-dir', type=Path, required=True,
        help='folder with train/ and test/ (or val/), each with one folder of images a class')
    parser.add_argument('--output', type=Path, required=True, help='folder of the results')
    parser.add_argument(
        '--per-class', type=int, nargs='+', default=[0], metavar='N', help='labels a class (default: all there are)')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], metavar='N', help='default: 0 1 2')
    parser.add_argument(
        '--methods', nargs='+', default=list(METHODS), choices=METHODS, help='default: knn linear finetune')
    parser.add_argument('--img-size', type=int, default=0, metavar='N', help="pixels (default: the model's own)")
    parser.add_argument(
        '--set', action='append', default=[], metavar='KEY=VALUE', help='another value for a key of finetune.yaml')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu',
                        help='default: cuda if there is one, else cpu')
    parser.add_argument('-j', '--workers', type=int, default=2, help='processes that decode images')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    job = Transfer(
        args.data_dir, args.output, args.model, tuple(dict.fromkeys(args.per_class)), tuple(dict.fromkeys(args.seeds)),
        tuple(args.methods), args.img_size, tuple(args.set), args.device, args.workers,
        shlex.join(['python', *sys.argv]))
    text = ''
    try:
        for rows in transfer(job):
            if rows:
                text = report(rows, args.output)
    except (TransferError, *ERRORS) as error:
        sys.exit(f'transfer.py: {error}')
    except KeyboardInterrupt:  # while images are read; a run saves and leaves by itself
        sys.exit(130)
    print(f'\n{text}')


if __name__ == '__main__':
    main()
