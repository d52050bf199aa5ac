#!/usr/bin/env python3
"""Measure speed, start and memory of models side by side.

    python scripts/benchmark.py geoprior_resnet50 resnet50 --channels-last --output bench

The first model is compared with each of the others: a ratio for every repetition, its median and, in brackets, the
middle half. Above one, the first is faster (images a second) or needs more (seconds, bytes).
"""
import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.utils import ParseKwargs
from tqdm import tqdm

import timm_geoprior  # noqa: F401  (registers the models)
from timm_geoprior.benchmark import (
    ENGINES,
    BenchmarkError,
    Report,
    Setting,
    compare,
    measure_speed,
    measure_startup,
    plot_ratios,
    ratios,
    usable_models,
)

QUANTITIES = {
    'speed.csv': ('images_per_second',),
    'startup.csv': ('create_seconds', 'first_call_seconds', 'peak_bytes'),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='+', metavar='MODEL', help='models of timm, ours first')
    parser.add_argument('--output', type=Path, required=True, help='folder for CSV, results.json, ratios.png')
    parser.add_argument('--device', default='cpu', help='cpu, cuda or cuda:N')
    parser.add_argument('--amp', action='store_true', help='autocast to --amp-dtype')
    parser.add_argument('--amp-dtype', default='bfloat16', choices=('bfloat16', 'float16'), help='default: bfloat16')
    parser.add_argument('--channels-last', action='store_true', help='that memory format')
    engine = parser.add_mutually_exclusive_group()
    engine.add_argument('--compile', action='store_true', help='torch.compile; as --engine compile')
    engine.add_argument('--engine', default='eager', choices=ENGINES, help='what runs the models (default: eager)')
    parser.add_argument('--train', action='store_true', help='forward, backward and an SGD step')
    parser.add_argument(
        '--reparameterize', action='store_true', help="timm's reparameterize_model: norms folded, where a model has it")
    parser.add_argument('--img-size', type=int, default=224, metavar='N', help='pixels (default: 224)')
    parser.add_argument('--batch-size', '-b', type=int, default=16, metavar='N', help='default: 16')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), metavar='N', help='of the CPU')
    parser.add_argument('--repeats', type=int, default=15, metavar='N', help='repetitions (default: 15)')
    parser.add_argument('--min-seconds', type=float, default=1.0, metavar='X', help='of one repetition (default: 1)')
    parser.add_argument(
        '--startup', type=int, default=0, metavar='N', help='also creation, first call and peak memory, N times each')
    parser.add_argument(
        '--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE', help='options of every model')
    return parser.parse_args()


def measure(args: argparse.Namespace) -> None:
    setting = Setting(
        args.device, args.amp_dtype if args.amp else 'float32', args.channels_last,
        'compile' if args.compile else args.engine, args.train, args.img_size, args.batch_size, args.threads,
        args.reparameterize, args.model_kwargs)
    names, reasons = usable_models(args.models)
    for remark in filter(None, [setting.check(), *reasons]):
        print(f'benchmark.py: {remark}', file=sys.stderr)
    torch.set_num_threads(args.threads)
    report = Report(args.output, setting, shlex.join(['python', *sys.argv]))
    sources: dict[str, tuple[Iterator[dict[str, Any]], int]] = {
        'speed.csv': (measure_speed(names, setting, args.repeats, args.min_seconds), args.repeats),
        'startup.csv': (measure_startup(names, setting, args.startup), args.startup)}
    results: dict[str, dict[str, list[float]]] = {}
    for file, (rows, repeats) in sources.items():
        if not repeats:
            continue
        collected = report.collect(file, tqdm(rows, file, repeats * len(names), leave=False))
        for quantity in QUANTITIES[file]:
            print('\n'.join(compare(collected, names, quantity)))
            results[quantity] = ratios(collected, names, quantity)
    report.finish({'models': names, 'ratios': results})
    if names[1:]:
        plot_ratios(results, args.output / 'ratios.png')


def main() -> None:
    args = parse_args()
    try:
        measure(args)
    except BenchmarkError as error:
        sys.exit(f'benchmark.py: {error}')


if __name__ == '__main__':
    main()
