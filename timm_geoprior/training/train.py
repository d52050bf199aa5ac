"""The command line of training: `scripts/train.py` and `timm-geoprior train`.

torch and timm are imported only when needed, so that `--help` and usage errors appear at once.
"""
import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import GeoPriorError, enough_memory, message_of, needs_extra
from ..progress import command_line
from .recipe import RunConfig, load_recipe, recipe_names

DESCRIPTION = """Train a model by a recipe.

    python scripts/train.py r64_tin200 --data-dir DATA --output RUN            one process
    torchrun --standalone --nproc-per-node 8 scripts/train.py paper_in1k --val-split val -j 8 ...     eight GPUs
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 scripts/train.py ...

Run the last line on each of four machines; HOST is one of them. Only the first process reads and writes --output.
An interrupted run resumes with --resume. To let torchrun restart and resume it:

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --nproc-per-node 8 --max-restarts 3 scripts/train.py ...

Without the variable, restarted workers get the addresses of the dead ones (pytorch/135712).
"""


def parse_arguments(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """The arguments of `main`."""
    parser = argparse.ArgumentParser(
        prog=prog, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('recipe', help=f'a YAML file, or one of: {", ".join(recipe_names())}')
    parser.add_argument(
        '--data-dir', type=Path, required=True, help='folder with one folder per split, each with one folder per class')
    parser.add_argument(
        '--output', type=Path, required=True, help='folder to write: checkpoints, summary.csv, results.json')
    parser.add_argument('--train-split', default='train', help='training split in --data-dir (default: train)')
    parser.add_argument(
        '--val-split', default='', help='split to measure after each epoch if the recipe holds nothing out')
    parser.add_argument('--model', default='', help="timm model to train instead of the recipe's, as a control")
    parser.add_argument(
        '--finetune', default='', metavar='pretrained|FILE|DIR',
        help="start from the weights of the model's tag, from a checkpoint (its averaged weights if it has any; a head "
             'of another size is initialized anew), or from a folder of `timm-geoprior convert`, which sets model and '
             'teacher')
    parser.add_argument(
        '--set', action='append', default=[], metavar='KEY=VALUE',
        help='override a recipe key, as in --set epochs=30; may be repeated')
    parser.add_argument('--seed', type=int, default=0, help='seed of weights, order and augmentation (default: 0)')
    parser.add_argument('--device', help='default: cuda if there is one, else cpu')
    parser.add_argument(
        '-j', '--workers', type=int, default=2,
        help='processes that decode images, per training process (default: 2)')
    parser.add_argument(
        '--save-every', type=int, default=200, help='updates between checkpoints within an epoch (default: 200)')
    parser.add_argument(
        '--max-corrupt', type=int, default=10,
        help='number of unreadable images to list and skip; with one more, the run stops (default: 10)')
    parser.add_argument('--resume', action='store_true', help='continue the run in --output')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, prog: str = 'timm-geoprior train') -> int:
    """Train as the command line says.

    Returns:
        The exit code: 0 after the last epoch, 1 after an error, 130 after Ctrl-C while the images are being read.

    Raises:
        GeoPriorError: The recipe cannot be used, or a package is missing.
        SystemExit: 130 or 143 after Ctrl-C or SIGTERM in training, once all is saved; 2 for a wrong command line.
    """
    args = parse_arguments(argv, prog)
    if args.model and args.finetune not in ('', 'pretrained') and Path(args.finetune).is_dir():
        raise GeoPriorError(f'--model must be left out with the folder {args.finetune}, which names its own, got '
                            f'{args.model}.')
    recipe = load_recipe(args.recipe, args.set + ([f'model={args.model}'] if args.model else []))
    with needs_extra('train'):
        from ..distributed import default_device, group_of_processes, is_first, should_report
        from .engine import Trainer
    # torchrun --max-restarts runs the same command again
    restarted = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0 and (args.output / 'last.pt').exists()
    config = RunConfig(
        args.data_dir, args.output, train_split=args.train_split, val_split=args.val_split, seed=args.seed,
        device=args.device or default_device(), workers=args.workers, finetune=args.finetune,
        resume=args.resume or restarted, save_every=args.save_every, max_corrupt=args.max_corrupt,
        command=command_line(resume=True))
    with group_of_processes():
        try:
            with enough_memory('Use a smaller batch_size with more grad_accum_steps, or another device.'):
                results = Trainer(recipe, config).fit()
        except GeoPriorError as error:
            if should_report(error):
                print(f'{prog}: {message_of(error)}', file=sys.stderr)
            return 1
        except KeyboardInterrupt:  # while the images are read; training saves and exits by itself
            return 130
        if is_first():
            print(json.dumps({key: results[key] for key in ('last', 'best', 'hours')}, indent=2))
    return 0
