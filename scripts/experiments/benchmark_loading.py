#!/usr/bin/env python3
"""Measure what verified loading costs: create_model with and without checking the weights.

    python scripts/experiments/benchmark_loading.py geoprior_resnet50

Both load the same file of random weights, written as `scripts/publish.py` writes weights: once as a bundled tag, and
once as a user's own file, which timm loads without a check. Repetitions alternate. The ratio is the time with the check
divided by the time without it: the median and, in brackets, the interquartile range.
"""
import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import timm
import torch
from torch.utils.benchmark import Timer

from benchmark import summarize
from timm_geoprior.pretrained import cfgs, manifest
from timm_geoprior.pretrained.manifest import Golden, ManifestError, ModelEntry, load_manifest
from timm_geoprior.release.staging import export_weights


def bundle_random_weights(entry: ModelEntry, folder: Path) -> ModelEntry:
    """Bundle random weights in `folder` as a tag, for this process only. Its file of golden outputs does not exist."""
    path = folder / f'{entry.name}.safetensors'
    sha256 = export_weights(timm.create_model(entry.architecture).state_dict(), path, {})
    entry = replace(entry, status='bundled', file=path.name, sha256=sha256, bytes=path.stat().st_size, dtype='float16',
                    golden=Golden('golden.safetensors', '0' * 64))
    whole = load_manifest()
    temporary = folder / 'weights_manifest.json'
    temporary.write_text(replace(whole, models={**whole.models, entry.name: entry}).to_json(), encoding='utf-8')
    cfgs.WEIGHTS_DIR, manifest.manifest_path = folder, lambda: temporary
    return entry


def measure(entry: ModelEntry, repeats: int) -> None:
    path = cfgs.bundled_path(entry)
    copy = path.with_name('copy.safetensors')
    copy.hardlink_to(path)
    call = 'timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": file})'
    timers = {what: Timer(call, globals={'timm': timm, 'name': entry.name, 'file': str(file)},
                          num_threads=torch.get_num_threads()) for what, file in (('verified', path),
                                                                                  ('unchecked', copy))}
    seconds: dict[str, list[float]] = {what: [] for what in timers}
    for repetition in range(repeats + 1):  # the first round fills the caches
        for what in sorted(timers, reverse=bool(repetition % 2)):
            seconds[what].append(timers[what].timeit(1).mean)
    for what, values in seconds.items():
        spread = summarize(values[1:])
        print(f'{what}: {1e3 * spread.median:.1f} ms [{1e3 * spread.low:.1f}, {1e3 * spread.high:.1f}]')
    spread = summarize([a / b for a, b in zip(seconds['verified'][1:], seconds['unchecked'][1:], strict=True)])
    print(f'ratio: {spread.median:.3f} [{spread.low:.3f}, {spread.high:.3f}] of {repeats} pairs, {entry.bytes:,} '
          f'bytes, {torch.get_num_threads()} threads, torch {torch.__version__}, timm {timm.__version__}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', help='a model in the manifest')
    parser.add_argument('--repeats', type=int, default=40, help='pairs of repetitions (default: 40)')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            entry = load_manifest().get(args.model)
        except ManifestError as error:
            sys.exit(f'benchmark_loading.py: {error}')
        measure(bundle_random_weights(entry, Path(folder)), args.repeats)


if __name__ == '__main__':
    main()
