#!/usr/bin/env python3
"""Measure what verified loading costs: create_model with checked weights beside the same without the check.

    python scripts/benchmark_loading.py geoprior_resnet14_nano

The unchecked one is timm's own loading of a copy of the file. Repetitions alternate; the ratio is verified over
unchecked seconds, its median and, in brackets, the middle half.
"""
import argparse
import shutil
import sys
import tempfile

import timm
import torch
from torch.utils.benchmark import Timer

from timm_geoprior.benchmark import summarize
from timm_geoprior.hub import WeightsError, bundled_path, read_verified
from timm_geoprior.manifest import ManifestError, ModelEntry, load_manifest


def measure(entry: ModelEntry, repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copy(bundled_path(entry), folder)
        call = f'timm.create_model({entry.name!r}, pretrained=True'
        calls = {'verified': f'{call})', 'unchecked': f'{call}, pretrained_cfg_overlay={{"file": {copy!r}}})'}
        timers = {name: Timer(text, globals={'timm': timm}, num_threads=torch.get_num_threads())
                  for name, text in calls.items()}
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for repetition in range(repeats + 1):  # timeit's own warm-up is one call; the first round fills the caches
            for name in sorted(calls, reverse=bool(repetition % 2)):
                seconds[name].append(timers[name].timeit(1).mean)
    for name, values in seconds.items():
        spread = summarize(values[1:])
        print(f'{name}: {1e3 * spread.median:.1f} ms [{1e3 * spread.low:.1f}, {1e3 * spread.high:.1f}]')
    spread = summarize([a / b for a, b in zip(seconds['verified'][1:], seconds['unchecked'][1:], strict=True)])
    print(f'ratio: {spread.median:.3f} [{spread.low:.3f}, {spread.high:.3f}] of {repeats} pairs, {entry.bytes:,} '
          f'bytes, {torch.get_num_threads()} threads, torch {torch.__version__}, timm {timm.__version__}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('tag', help='a tag whose weights are in the package')
    parser.add_argument('--repeats', type=int, default=40, help='pairs (default: 40)')
    args = parser.parse_args()
    try:
        entry = load_manifest().get(args.tag)
        read_verified(entry, bundled_path(entry))
    except (ManifestError, WeightsError) as error:
        sys.exit(f'benchmark_loading.py: {error}')
    measure(entry, args.repeats)


if __name__ == '__main__':
    main()
