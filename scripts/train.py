#!/usr/bin/env python3
"""Train a model by a recipe.

    python scripts/train.py r64_tin200 --data-dir DATA --output RUN            one process
    torchrun --standalone --nproc-per-node 8 scripts/train.py paper_in1k --val-split val -j 8 ...     eight GPUs
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 scripts/train.py ...

The last line is run on each of four machines; HOST is one of them. The first process alone reads and writes --output.
A run that was stopped, by whatever, goes on with the same command and --resume. To have torchrun do so by itself:

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --nproc-per-node 8 --max-restarts 3 scripts/train.py ...

(the variable, since torchrun's shared store gives restarted workers the addresses of the dead ones, pytorch/135712)
"""
import argparse
import json
import os
import sys
from pathlib import Path

import torch

import timm_geoprior  # noqa: F401  (registers the models)
from timm_geoprior.data.reading import CorruptImagesError
from timm_geoprior.errors import EvaluationError, WeightsError
from timm_geoprior.training.checkpoint import CheckpointError
from timm_geoprior.training.config import RunConfig
from timm_geoprior.training.engine import TrainingError, train
from timm_geoprior.training.recipe import RecipeError, load_recipe, recipe_names
from timm_geoprior.training.sources import DataError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('recipe', help=f'a YAML file, or one of: {", ".join(recipe_names())}')
    parser.add_argument(
        '--data-dir', type=Path, required=True, help='folder with one folder of images a class in each split')
    parser.add_argument(
        '--output', type=Path, required=True, help='folder of the run: checkpoints, summary.csv, results.json')
    parser.add_argument('--train-split', default='train', help='folder of the training images below --data-dir')
    parser.add_argument('--val-split', default='', help='split measured each epoch where the recipe holds nothing out')
    parser.add_argument('--model', default='', help="a timm model in place of the recipe's, for a control")
    parser.add_argument(
        '--finetune', default='', metavar='pretrained|FILE',
        help="start from the weights of the model's tag, or from a checkpoint; another head is drawn anew")
    parser.add_argument(
        '--set', action='append', default=[], metavar='KEY=VALUE',
        help='another value for a recipe key, as in --set epochs=30; as often as need be')
    parser.add_argument('--seed', type=int, default=0, help='of weights, order and augmentation (default: 0)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu',
                        help='default: cuda if there is one, else cpu')
    parser.add_argument(
        '-j', '--workers', type=int, default=2,
        help='processes that decode images, for each process that trains (default: 2)')
    parser.add_argument(
        '--save-every', type=int, default=200, help='updates between two checkpoints in mid-epoch (default: 200)')
    parser.add_argument(
        '--max-corrupt', type=int, default=10,
        help='unreadable images that are named and skipped; at one more the run stops (default: 10)')
    parser.add_argument(
        '--resume', action='store_true', help='go on with the run in --output, by the same recipe and seed')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    overrides = args.set + ([f'model={args.model}'] if args.model else [])
    try:
        recipe = load_recipe(args.recipe, overrides)
        # torchrun --max-restarts runs the same command again
        restarted = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0 and (args.output / 'last.pt').exists()
        config = RunConfig(
            args.data_dir, args.output, train_split=args.train_split, val_split=args.val_split, seed=args.seed,
            device=args.device, workers=args.workers, finetune=args.finetune, resume=args.resume or restarted,
            save_every=args.save_every, max_corrupt=args.max_corrupt)
        results = train(recipe, config)
    except (RecipeError, TrainingError, DataError, CheckpointError, CorruptImagesError, EvaluationError,
            WeightsError) as error:
        sentence = str(error).rpartition('CorruptImagesError: ')[2]  # a loader's worker puts its traceback before it
        sys.exit(f'train.py: {sentence}')
    except KeyboardInterrupt:  # while images are read; a run saves and leaves by itself
        sys.exit(130)
    print(json.dumps({key: results[key] for key in ('last', 'best', 'hours')}, indent=2))


if __name__ == '__main__':
    main()
