#!/usr/bin/env python3
"""Check and measure the networks on a GPU: one script, ten minutes, one report.

    python scripts/experiments/gpu_report.py --output gpu --data-dir tiny-imagenet-200

It needs no internet access. It runs four parts in this order, and writes each result as soon as it is available:

- equality: logits of the bundled networks against their golden outputs, per precision, eager, in channels_last,
  compiled and reparameterized; float32 without TF32.
- tests: tests/test_device.py on the device (layer, networks, training, validation against the CPU). It needs pytest and
  scikit-image.
- counts: correct predictions of `scripts/validate.py` per precision and batch size, and of a plain loop over timm's
  loader. It needs --data-dir, a folder with Tiny-ImageNet's validation images in val/, one folder per class.
- speed: images per second and peak memory, as ratios to timm's networks in the same process, the most important first.

Whatever does not fit into the time is listed as not measured. --rehearse runs every part on the CPU with small networks
and images; its speeds mean nothing. OUTPUT/report.md is the report, printed at the end; OUTPUT/speed.csv has every
comparison, and OUTPUT/speed.png shows images per second over the number of parameters.
"""
import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.utils import reparameterize_model
from torch import nn

from benchmark import (
    BenchmarkError,
    Workload,
    create_network,
    measure_speed,
    median_speeds,
    peak_bytes,
    plot_speed,
    prepare_step,
    ratios,
    reset_peak,
    summarize,
)
from timm_geoprior.files import first_line, markdown_table, write_csv, write_json
from timm_geoprior.pretrained.loading import load_golden
from timm_geoprior.pretrained.manifest import load_manifest
from timm_geoprior.pretrained.verify import GOLDEN_TOLERANCES, golden_error
from timm_geoprior.progress import command_line
from timm_geoprior.provenance import git_commit, hardware, versions

VALIDATE = Path(__file__).parents[1] / 'validate.py'
TESTS = Path(__file__).parents[2] / 'tests' / 'test_device.py'
SECONDS = {'eager': 15, 'compile': 60, 'cudagraphs': 60}  # estimate for one comparison, including compilation
Row = dict[str, Any]


@dataclass
class Report:
    """The arguments of the script and its results so far.

    Attributes:
        args: The parsed command line.
        until: When to stop, on the clock of `time.monotonic`.
        rows: Part -> its rows.
        skipped: What was not measured, and why.
    """
    args: argparse.Namespace
    until: float
    rows: dict[str, list[Row]] = field(
        default_factory=lambda: {part: [] for part in ('equality', 'tests', 'counts', 'speed')})
    skipped: list[str] = field(default_factory=list)

    def has_time(self, seconds: float, what: str) -> bool:
        """Whether `seconds` are left; if not, `what` is recorded as skipped."""
        left = self.until - time.monotonic()
        if left < seconds:
            self.skipped.append(f'{what} (no time left)')
        return left >= seconds

    def add(self, part: str, row: Row) -> None:
        """Add a row, and write all rows of its part."""
        self.rows[part].append(row)
        write_csv(self.args.output / f'{part}.csv', self.rows[part])
        print(', '.join(f'{key} {value}' for key, value in row.items()), file=sys.stderr, flush=True)


# -- equality ----------------------------------------------------------------------------------------------------------

def _compiled(model: nn.Module) -> nn.Module:
    torch.compiler.reset()
    return torch.compile(model, dynamic=False)  # type: ignore[return-value]


VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    'eager': lambda model: model,
    'channels_last': lambda model: model.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
    'reparameterized': reparameterize_model,
    'compiled': _compiled,
}


def check_equality(report: Report) -> None:
    """Compare logits of the bundled networks with their golden outputs."""
    entries = [entry for entry in load_manifest().models.values() if entry.status == 'bundled']
    for variant, change in VARIANTS.items():
        for entry in sorted(entries, key=lambda entry: entry.bytes or 0)[:1 if report.args.rehearse else None]:
            for precision, tolerance in GOLDEN_TOLERANCES.items():
                if report.args.rehearse and variant == 'compiled' and precision != 'float32':
                    continue  # compiling takes a minute
                what = f'{entry.name}, {variant}, {precision}'
                if not report.has_time(60 if variant == 'compiled' else 5, f'equality of {what}'):
                    continue
                model = timm.create_model(entry.name, pretrained=True).to(report.args.device, getattr(torch, precision))
                try:
                    error = golden_error(change(model.eval()), load_golden(entry))
                except Exception as failed:  # the compiler raises whatever its backend raises
                    report.skipped.append(f'equality of {what} ({first_line(failed)})')
                    continue
                report.add('equality', {'model': entry.name, 'variant': variant, 'precision': precision,
                                        'error': f'{error:.1e}', 'tolerance': tolerance, 'equal': error <= tolerance})


# -- tests -------------------------------------------------------------------------------------------------------------

def run_tests(report: Report) -> None:
    """Run tests/test_device.py in its own process: how many tests passed, and which failed."""
    rehearse = report.args.rehearse  # only the tests of the layer
    if not report.has_time(10 if rehearse else 60, f'tests of {TESTS.name}'):
        return
    path = report.args.output / 'tests.xml'
    path.unlink(missing_ok=True)
    command = [sys.executable, '-m', 'pytest', '-q', '-n0', f'--junitxml={path.resolve()}', str(TESTS)]
    command += ['-k', 'layer'] * rehearse
    try:
        done = subprocess.run(command, cwd=TESTS.parents[1], capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        report.skipped.append(f'tests of {TESTS.name} (still running after 3 minutes)')
        return
    if not path.is_file():
        report.skipped.append(f'tests of {TESTS.name} ({(done.stderr or done.stdout).strip().splitlines()[-1]})')
        return
    outcomes: dict[str, list[str]] = {'passed': [], 'failure': [], 'error': [], 'skipped': []}
    for case in ElementTree.parse(path).iter('testcase'):
        outcomes[next((tag for tag in outcomes if case.find(tag) is not None), 'passed')].append(str(case.get('name')))
    bad = outcomes['failure'] + outcomes['error']
    report.add('tests', {'passed': len(outcomes['passed']), 'skipped': len(outcomes['skipped']), 'failed': len(bad),
                         'which': ', '.join(bad)})


# -- counts ------------------------------------------------------------------------------------------------------------

def check_counts(report: Report) -> None:
    """Count the correct predictions of validate.py per precision and batch size, and of a plain timm loop."""
    args = report.args
    if args.data_dir is None:
        report.skipped.append('counts of validate.py (no --data-dir)')
        return
    name = min((entry for entry in load_manifest().models.values() if entry.status == 'bundled'),
               key=lambda entry: entry.bytes or 0).name
    largest, *others = (4, 1) if args.rehearse else (256, 64, 1)
    if report.has_time(60, "counts and speed of validate.py and timm's loader"):
        try:
            report.add('counts', _plain_loop(args, name, largest))
        except Exception as error:  # timm's data set and loader raise errors of many kinds
            report.add('counts', {'by': "timm's loader", 'batch_size': largest, 'failed': first_line(error)})
        report.add('counts', _validate(args, name, largest, ['float32'])[0])
    for batch_size in (largest, *others):
        if report.has_time(60, f'counts with batches of {batch_size}'):
            for row in _validate(args, name, batch_size, list(GOLDEN_TOLERANCES)):
                report.add('counts', row)


def _validate(args: argparse.Namespace, name: str, batch_size: int, precisions: list[str]) -> list[Row]:
    path = args.output / f'validate-{batch_size}-{len(precisions)}.json'
    command = [sys.executable, VALIDATE, '--model', name, '--data-dir', args.data_dir, '--split', 'val', '--precision',
               *precisions, '--batch-size', batch_size, '--device', args.device, '--workers', args.workers,
               '--results-file', path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode or not path.is_file():
        reason = (done.stderr.strip().splitlines() or ['no message'])[-1]
        return [{'by': 'validate.py', 'batch_size': batch_size, 'failed': reason}]
    found = json.loads(path.read_text())
    found = found[0] if isinstance(found, list) else found
    speed = found['images_per_second'] if len(precisions) == 1 else ''  # several are measured in one pass
    return [{'by': 'validate.py', 'batch_size': batch_size, 'precision': result['precision'],
             'images': result['num_images'], 'top1_correct': result['top1_correct'], 'images_per_second': speed}
            for result in found['results']]


@torch.inference_mode()
def _plain_loop(args: argparse.Namespace, name: str, batch_size: int) -> Row:
    """What timm's own validate.py does, in float32."""
    device = torch.device(args.device)
    model = timm.create_model(name, pretrained=True).to(device).eval()
    cfg = resolve_model_data_config(model)
    loader = create_loader(
        create_dataset('', args.data_dir, split='val'), batch_size=batch_size, num_workers=args.workers, device=device,
        use_prefetcher=device.type == 'cuda',
        **{key: cfg[key] for key in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')})
    correct = images = 0
    started = time.perf_counter()
    for inputs, labels in loader:
        correct += int((model(inputs.to(device)).argmax(1) == labels.to(device)).sum())
        images += len(labels)
    seconds = time.perf_counter() - started
    return {'by': "timm's loader", 'batch_size': batch_size, 'precision': 'float32', 'images': images,
            'top1_correct': correct, 'images_per_second': round(images / seconds, 1)}


# -- speed -------------------------------------------------------------------------------------------------------------

PLAIN = [(f'geoprior_resnet{depth}', f'resnet{depth}') for depth in (50, 101, 152)]
COMPUTED = [('geoprior_resnet50', 'halonet50ts'), ('geoprior_resnet50', 'lambda_resnet50ts')]


def workloads(args: argparse.Namespace) -> list[tuple[tuple[str, str], Workload]]:
    """The comparisons, the most important first."""
    half = Workload(args.device, 'bfloat16', channels_last=True, batch_size=256, num_threads=torch.get_num_threads())
    merged, train = replace(half, reparameterize=True), replace(half, train=True)
    small, strict = replace(half, batch_size=64), replace(half, precision='float32')
    first, rest = PLAIN[:1], PLAIN[1:]
    todo = [(pair, load) for pair in PLAIN for load in (half, merged, train)]
    todo += [(pair, replace(load, engine='compile')) for pair in first for load in (half, merged, train)]
    todo += [(pair, replace(load, engine='cudagraphs', batch_size=batch_size)) for pair in first
             for load in (half, merged) for batch_size in (64, 1)]
    todo += [(pair, load) for pair in PLAIN for load in (small, replace(small, reparameterize=True))]
    todo += [(pair, load) for pair in first for load in (
        strict, replace(strict, reparameterize=True), replace(strict, train=True, batch_size=64),
        replace(half, batch_size=1), replace(merged, batch_size=1))]
    todo += [(pair, replace(load, img_size=256)) for pair in COMPUTED for load in (
        small, replace(small, reparameterize=True))]
    todo += [(pair, replace(load, engine='compile')) for pair in rest for load in (half, merged, train)]
    todo += [(pair, load) for pair in rest for load in (strict, replace(strict, train=True, batch_size=64))]
    if not args.rehearse:
        return todo
    tiny = [replace(load, img_size=32, batch_size=2) for load in (half, merged, train)]
    tiny += [replace(tiny[0], engine=engine) for engine in ('compile', 'cudagraphs')]
    return [(('geoprior_resnet14_nano', 'resnet10t'), load) for load in tiny]


def measure_all(report: Report) -> None:
    """Measure images per second of each pair, repetition by repetition, and peak memory."""
    args = report.args
    repeats, seconds = (2, 0.01) if args.rehearse else (7, 0.3)
    panels: dict[str, dict[str, float]] = {}  # of speed.png: eager inference in batches, not reparameterized
    for names, load in workloads(args):
        what = f'{" / ".join(names)}, {load}'
        if not report.has_time(SECONDS[load.engine], f'speed of {what}'):
            continue
        try:
            load.check()
            torch.compiler.reset()
            rows = list(measure_speed(names, load, repeats, seconds))
            peaks = [_peak(name, load) for name in names] if load.engine == 'eager' else []
        except (BenchmarkError, RuntimeError) as error:  # out of memory is a RuntimeError
            report.skipped.append(f'speed of {what} ({first_line(error)})')
            continue
        finally:
            torch.cuda.empty_cache()
        speeds = median_speeds(rows)
        ratio = summarize(ratios(rows, names, 'images_per_second')[names[1]])
        report.add('speed', {
            'model': names[0], 'beside': names[1], 'workload': str(load),
            'images_per_second': f'{speeds[names[0]]:.1f}',
            'beside_images_per_second': f'{speeds[names[1]]:.1f}',
            'ratio': f'{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]',
            'peak_MB': f'{peaks[0] / 1e6:.0f}' if peaks else '',
            'peak_ratio': f'{peaks[0] / peaks[1]:.3f}' if peaks and peaks[1] else ''})
        if load.engine == 'eager' and load.batch_size > 1 and not load.train and not load.reparameterize:
            panels.setdefault(str(load), {}).update(speeds)
    if panels:
        plot_speed(panels, args.output / 'speed.png')


def _peak(name: str, load: Workload) -> int:
    """Bytes that a network and two steps take in addition to what is in use."""
    torch.cuda.empty_cache()
    before = reset_peak(load)
    step = prepare_step(create_network(name, load), load, Path())
    step(), step()  # momentum exists only from the second step on
    return peak_bytes(load) - before


# -- the report --------------------------------------------------------------------------------------------------------

def _facts(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    return {'command': command_line(), 'hardware': hardware(device), 'driver': _driver(device),
            'versions': {**versions(), 'cuda': torch.version.cuda}, 'commit': git_commit(), 'rehearsal': args.rehearse}


def _driver(device: torch.device) -> str | None:
    if device.type != 'cuda':
        return None
    try:
        return subprocess.run(['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'], check=True,
                              capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def write_report(report: Report) -> str:
    """Write report.md and results.json, and return the report's text."""
    facts = _facts(report.args)
    write_json(report.args.output / 'results.json', {**facts, **report.rows, 'not_measured': report.skipped})
    software = ', '.join(f'{name} {version}' for name, version in facts['versions'].items())
    sections = [f'# {facts["hardware"]}', f'`{facts["command"]}`',
                f'Driver {facts["driver"]}; {software}; commit {facts["commit"]}.']
    if report.args.rehearse:
        sections.append('**A rehearsal on the CPU: the speeds mean nothing.**')
    for part, rows in report.rows.items():
        header = list(dict.fromkeys(key for row in rows for key in row))
        lines = [[str(row.get(key, '')) for key in header] for row in rows]
        sections += [f'## {part.capitalize()}', markdown_table(header, lines) if rows else 'Not measured.']
    if report.skipped:
        sections += ['## Not measured', '\n'.join(f'- {what}' for what in report.skipped)]
    text = '\n\n'.join(sections) + '\n'
    (report.args.output / 'report.md').write_text(text, encoding='utf-8')
    return text


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, required=True, help='folder to write')
    parser.add_argument(
        '--data-dir', type=Path, help='folder with val/, which has the 200 class folders of Tiny-ImageNet')
    parser.add_argument('--device', default='', help='default: cuda, or cpu with --rehearse')
    parser.add_argument('--minutes', type=float, default=9.5, metavar='X', help='total time (default: 9.5)')
    parser.add_argument(
        '-j', '--workers', type=int, default=8, metavar='N', help='processes that decode images (default: 8)')
    parser.add_argument('--rehearse', action='store_true', help='run every part on the CPU with small networks')
    args = parser.parse_args()
    args.device = args.device or ('cpu' if args.rehearse else 'cuda')
    if not args.rehearse and torch.device(args.device).type != 'cuda':
        parser.error('--device must be a GPU: add --rehearse to run on the CPU')
    if args.data_dir and not (args.data_dir / 'val').is_dir():
        parser.error(f'--data-dir must be a folder with val/ in it, got {args.data_dir}')
    return args


def main() -> None:
    args = parse_args()
    try:
        Workload(args.device).check()
    except BenchmarkError as error:
        sys.exit(f'gpu_report.py: {error}')
    args.output.mkdir(parents=True, exist_ok=True)
    Workload(args.device).use_device()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    report = Report(args, time.monotonic() + 60 * args.minutes)
    for part in (check_equality, run_tests, check_counts, measure_all):
        part(report)
        text = write_report(report)  # after each part, so that an interrupted session leaves a report
    print(text)
    failed = any(row.get('failed') for part in ('tests', 'counts') for row in report.rows[part])
    sys.exit(failed or any(not row['equal'] for row in report.rows['equality']))


if __name__ == '__main__':
    main()
