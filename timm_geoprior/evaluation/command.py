"""The command line of validation: `scripts/validate.py`."""
import argparse
import contextlib
import datetime
import fnmatch
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..data.datasets import EvalSet, fingerprint, open_data, plain_archive
from ..distributed import find_device, joined
from ..errors import EvaluationError, GeoPriorError, ProcessError
from ..pretrained.manifest import load_manifest
from .arguments import parse_arguments
from .check import deviations, find_metric
from .classes import ClassMismatchError, match_classes
from .evaluate import Evaluation, Plan, Settings, check_data, evaluate, plan
from .models import LoadedModel, load_model
from .predict import set_numerics
from .report import lines, provenance, summary_row, write_report, write_summary

__all__ = ['main']


@dataclass
class _Run:
    """What one command does, and what has come of it so far."""
    args: argparse.Namespace
    settings: Settings
    command: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)
    faults: int = 0

    def say(self, text: str) -> None:
        """A result, on stdout."""
        if not self.settings.rank:
            print(text, flush=True)

    def fail(self, text: str) -> None:
        """What makes the exit code 1."""
        self.faults += 1
        self.settings.tell(text)


def _check_output(args: argparse.Namespace) -> None:
    """Find out before the pass whether its results can be written."""
    if args.output:
        if importlib.util.find_spec('matplotlib') is None:
            raise EvaluationError('matplotlib is not installed, expected it for the plots of --output: pip install '
                                  'matplotlib (the extra "train").')
        try:
            args.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvaluationError(f'{args.output} cannot be made ({error.strerror}), expected a folder for the '
                                  f'results: check --output.') from None
    if args.results_file and not args.results_file.absolute().parent.is_dir():
        raise EvaluationError(f'{args.results_file.parent} does not exist, expected a folder for the results file: '
                              f'make it, or check --results-file.')
    if args.results_file and args.results_file.is_dir():
        raise EvaluationError(f'{args.results_file} is a folder, expected a file: name one in it by --results-file.')


def _device(args: argparse.Namespace) -> torch.device:
    """Start the group of processes, if there is one, and find this one's device."""
    if args.device is None:
        args.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    device, args.rank, args.world_size = find_device(args.device)
    return device


def _settings(args: argparse.Namespace, device: torch.device) -> Settings:
    rank = args.rank
    input_keys = ('img_size', 'input_size', 'crop_pct', 'crop_mode', 'interpolation', 'mean', 'std')
    return Settings(
        device, rank, args.world_size, args.precision, args.batch_size, args.workers, args.channels_last,
        args.torchcompile, args.subset, args.real_labels, {key: getattr(args, key) for key in input_keys},
        lambda text: None if rank else print(text, file=sys.stderr, flush=True))


def _names(args: argparse.Namespace) -> list[str | None]:
    """The models to measure; None is the one that the checkpoint names."""
    if args.tag is None:
        return [load_manifest().get(args.model).name if args.check and args.model else args.model]
    if not _is_sweep(args):
        return [load_manifest().get(args.tag).name]
    pattern = '*' if args.tag == 'all' else args.tag
    entries = load_manifest().models.values()
    names = [entry.name for entry in entries if entry.has_weights and fnmatch.fnmatch(entry.name, pattern)]
    if not names:
        raise EvaluationError(f'--tag {args.tag} means no tag that has weights, expected one that has, of '
                              f'{", ".join(entry.name for entry in entries)}.')
    return [*names]


def _is_sweep(args: argparse.Namespace) -> bool:
    return args.tag is not None and (args.tag == 'all' or any(sign in args.tag for sign in '*?['))


def _open(args: argparse.Namespace, root: Path | None) -> EvalSet:
    options = {key: getattr(args, key) for key in ('class_map', 'num_samples', 'input_key', 'target_key')}
    mode = 'L' if args.input_size and args.input_size[0] == 1 else 'RGB'
    return open_data(root, args.dataset, args.split, download=args.dataset_download, input_img_mode=mode,
                     **{key: value for key, value in options.items() if value})


def _measure_all(run: _Run) -> None:
    """Open the data once, and go through the models."""
    args = run.args
    names = _names(args)
    with contextlib.ExitStack() as stack:
        root = args.data_dir
        if root is not None and not args.dataset:
            root = stack.enter_context(plain_archive(root))
        data = _open(args, root)
        check_data(data, run.settings)
        for name in names:
            try:
                _measure(run, data, name)
            except ClassMismatchError as error:
                if not _is_sweep(args):
                    raise
                run.settings.tell(f'{name} is passed over: {error}')
            except GeoPriorError as error:
                if not _is_sweep(args) or isinstance(error, ProcessError):
                    raise
                run.fail(f'{name} failed: {error}')
    if not run.rows and not run.faults:
        raise EvaluationError('No model was measured, expected one that has the classes of the data: check --data-dir.')


def _measure(run: _Run, data: EvalSet, name: str | None) -> None:
    args, settings = run.args, run.settings
    if _is_sweep(args) and name is not None:  # do not fetch weights for other classes
        labels = load_manifest().label_sets[load_manifest().get(name).label_set]
        match_classes(data.classes, labels.wnids, labels.names, labels.num_classes, args.subset)
    loaded = load_model(name, args.checkpoint, args.weights, args.num_classes,
                        args.input_size[0] if args.input_size else 3, args.model_kwargs)
    planned = plan(data, loaded, settings)
    for note in (*loaded.notes, *planned.match.notes):
        settings.tell(note)
    _compare_with_figures(run, data, loaded, planned)
    seen = {'data_dir': str(args.data_dir) if args.data_dir else None, 'dataset': args.dataset, 'split': args.split,
            **(fingerprint(data, planned.indices, args.dataset) if not settings.rank else {})}
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')
    evaluation = evaluate(data, loaded, planned, settings)
    run.rows.append(summary_row(evaluation))
    for line in lines(evaluation):
        run.say(line)
    for problem in evaluation.problems:
        run.fail(problem)
    if args.check:
        _check_figures(run, evaluation)
    if settings.rank:
        return
    run.details.append(provenance(evaluation, settings, run.command, seen, started))
    if args.output:
        write_report(args.output / loaded.name if _is_sweep(args) else args.output, evaluation, run.details[-1])


def _compare_with_figures(run: _Run, data: EvalSet, loaded: LoadedModel, planned: Plan) -> None:
    """Say before the pass whether these images are the set that the manifest's figure is for."""
    entry, count = loaded.entry, None if data.is_stream else len(planned.indices)
    if run.args.check:
        if entry is None:
            raise EvaluationError(f'{loaded.name} is not in the manifest, expected one of '
                                  f'{", ".join(load_manifest().models)} for --check: leave it out.')
        if run.args.checkpoint and loaded.weights['sha256'] != entry.sha256:
            raise EvaluationError(f'{run.args.checkpoint} has the sha256 {loaded.weights["sha256"]}, expected '
                                  f'{entry.sha256} of {entry.name} for --check: leave one of them out.')
        for precision in run.settings.precisions:
            find_metric(entry, precision, planned.img_size, count)
    elif (entry is not None and loaded.weights.get('sha256') == entry.sha256 and count is not None
          and count not in {metric.num_images for metric in entry.metrics}):
        for metric in entry.metrics:
            run.settings.tell(f"These {count:,} images are not the set that the manifest's figure is for: "
                              f'{metric.dataset} {metric.split}, {metric.num_images:,} images.')


def _check_figures(run: _Run, evaluation: Evaluation) -> None:
    """Hold what was measured against the manifest."""
    entry, tolerance = evaluation.loaded.entry, run.args.tolerance
    assert entry is not None
    for precision, counts in evaluation.outcome.counts.items():
        metric = find_metric(entry, precision, evaluation.plan.img_size, counts.num_images)
        for name, points in deviations(metric, counts).items():
            claimed = metric.top1 if name == 'top-1' else metric.top5
            text = f"{name} in {precision} is {points:+.4f} points from the manifest's {claimed:.2f}%"
            if abs(points) <= tolerance:
                run.say(f'  check: {text}, within {tolerance}.')
            else:
                run.fail(f'The check failed: {text}, expected {tolerance} at most.')


def _write_results(run: _Run) -> None:
    path = run.args.results_file
    if path is None or run.settings.rank or not run.rows:
        return
    form = run.args.results_format or ('json' if path.suffix == '.json' else 'csv')
    write_summary(path, run.rows, run.details, form)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line says.

    Args:
        argv: Arguments, those of the process where it is None.

    Returns:
        The exit code: 0 if all was measured and found as claimed, 1 if not, 130 after Ctrl-C.
    """
    args = parse_arguments(argv)
    command = shlex.join(sys.argv if argv is None else ['validate.py', *argv])
    joined_before = joined()
    args.rank = 0
    try:
        _check_output(args)
        run = _Run(args, _settings(args, _device(args)), command)
        set_numerics(run.settings.precisions)
        _measure_all(run)
        _write_results(run)
        return 1 if run.faults else 0
    except GeoPriorError as error:
        if not args.rank or isinstance(error, ProcessError):  # the others have met the same
            print(f'validate.py: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if joined() and not joined_before:
            dist.destroy_process_group()
