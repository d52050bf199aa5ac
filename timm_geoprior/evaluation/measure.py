"""What `timm-geoprior validate` does: measure models on a data set, and compare the results with the manifest."""
import argparse
import contextlib
import datetime
import fnmatch
import importlib.util
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data.dataset import DataSplit, fingerprint, open_split
from ..data.listing import DataOptions, is_inside_images, unpacked
from ..data.preflight import check_data
from ..distributed import default_device, find_device
from ..errors import ClassMismatchError, EvaluationError, GeoPriorError, ProcessError
from ..files import write_csv, write_json
from ..pretrained.manifest import Metric, ModelEntry, load_manifest
from ..progress import tell_on_stderr
from ..training.checkpoint import check_exists
from .classes import match_classes
from .evaluate import EvalConfig, Evaluation, Plan, evaluate, plan, set_numerics
from .models import LoadedModel, check_source, load_model
from .results import FILES, details, lines, summary_row, write_results


@dataclass
class _Run:
    """What one command does, and its results so far."""
    args: argparse.Namespace
    config: EvalConfig
    command: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)
    faults: int = 0

    def say(self, text: str) -> None:
        """Print a result to stdout."""
        if not self.config.rank:
            print(text, flush=True)

    def fail(self, text: str) -> None:
        """Report a problem, which makes the exit code 1."""
        self.faults += 1
        self.config.tell(text)


def measure(args: argparse.Namespace, command: str) -> int:
    """Measure as the arguments of `validate.py` say, and write the results; returns the number of problems reported."""
    _check_output(args)
    run = _Run(args, _config(args, *find_device(args.device or default_device())), command)
    set_numerics(run.config.precisions)
    _measure_all(run)
    return run.faults


def _check_output(args: argparse.Namespace) -> None:
    """Refuse, before the pass, an output that cannot be written."""
    if args.output:
        if importlib.util.find_spec('matplotlib') is None:
            raise EvaluationError('--output needs matplotlib for its plots. Run `pip install matplotlib` '
                                  '(the extra "train").')
        if not args.dataset and args.data_dir and args.data_dir.is_dir() and is_inside_images(
                args.output, args.data_dir, args.split):
            raise EvaluationError(f'The output must lie outside the folder of the images, since its plots would be '
                                  f'read as some of them, got {args.output}. Name another folder with --output.')
        others = [name for name in FILES if (args.output / name).exists()]
        if others and 'results.json' not in others:
            raise EvaluationError(f'The output must be a new folder or have earlier results, got {args.output}, which '
                                  f'has another {others[0]}. Name another with --output.')
        try:
            args.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvaluationError(
                f'The folder {args.output} cannot be created ({error.strerror}). Check --output.') from None
    if args.results_file and not args.results_file.absolute().parent.is_dir():
        raise EvaluationError(f'The folder {args.results_file.parent} does not exist. Create it, or check '
                              f'--results-file.')
    if args.results_file and args.results_file.is_dir():
        raise EvaluationError(f'--results-file must be a file, got the folder {args.results_file}. Name a file in it.')
    for path in (args.results_file, args.output and args.output / 'results.json'):
        if path and not _may_write(path):
            raise EvaluationError(f'{path} must be a new file or earlier results, got another file or a read-only '
                                  f'place. Name another with --results-file or --output.')


def _may_write(path: Path) -> bool:
    """Whether a file can be written and replaces nothing but earlier results."""
    if path.exists() and not path.is_file():  # a device or a pipe
        return True
    if not os.access(path.absolute().parent, os.W_OK):
        return False
    if not path.exists() or not path.stat().st_size:
        return True
    try:
        text = path.read_text(encoding='utf-8')
        if text.startswith('model,top1,'):  # a table
            return True
        found = json.loads(text)
    except (OSError, ValueError):
        return False
    first = found[0] if isinstance(found, list) and found else found
    return isinstance(first, dict) and {'results', 'preprocessing'} <= first.keys()


def _config(args: argparse.Namespace, device: torch.device, rank: int, world_size: int) -> EvalConfig:
    input_keys = ('img_size', 'input_size', 'crop_pct', 'crop_mode', 'interpolation', 'mean', 'std')
    return EvalConfig(
        device, rank, world_size, args.precision, args.batch_size, args.workers, args.channels_last,
        args.torchcompile, args.subset, args.real_labels, {key: getattr(args, key) for key in input_keys},
        (lambda text: None) if rank else tell_on_stderr)


def _names(args: argparse.Namespace) -> list[str | None]:
    """The models to measure; None is the one that the checkpoint names."""
    if args.tag is None:
        return [load_manifest().get(args.model).name if args.check and args.model else args.model]
    if not _is_sweep(args):
        return [load_manifest().get(args.tag).name]
    tags = load_manifest().tags.values()
    if args.tag == 'all':  # converted tags only if they have figures to check, since each is a download
        names = [entry.name for entry in tags if entry.is_released or entry.metrics]
    else:
        names = [entry.name for entry in tags if entry.has_weights and fnmatch.fnmatch(entry.name, args.tag)]
    if not names:
        raise EvaluationError(f'--tag {args.tag} must match a tag that has weights. `timm-geoprior list` shows them.')
    return [*names]


def _is_sweep(args: argparse.Namespace) -> bool:
    return args.tag is not None and (args.tag == 'all' or any(sign in args.tag for sign in '*?['))


def _measure_all(run: _Run) -> None:
    """Open the data once, and measure the models one by one."""
    args = run.args
    names = _names(args)
    for name in names:  # before spending time on the images
        if args.checkpoint is not None:
            check_exists(args.checkpoint)
        elif name is not None:
            check_source(name)
    in_files = args.data_dir is not None and not args.dataset
    with unpacked(args.data_dir) if in_files else contextlib.nullcontext(args.data_dir) as root:
        options = DataOptions(args.class_map, args.num_samples, args.input_key, args.target_key, args.dataset_download)
        data = open_split(root, args.split, args.dataset, options)
        check_data(data, args.workers, run.config.tell, run.config.rank, run.config.world_size)
        for name in names:
            try:
                _measure(run, data, name)
            except ClassMismatchError as error:
                if not _is_sweep(args):
                    raise
                run.config.tell(f'{name} is skipped: {error}')
            except GeoPriorError as error:
                if not _is_sweep(args) or isinstance(error, ProcessError):
                    raise
                run.fail(f'{name} failed: {error}')
    if not run.rows and not run.faults:
        raise EvaluationError('No model was measured: none has the classes of the data. Check --data-dir.')


def _measure(run: _Run, data: DataSplit, name: str | None) -> None:
    args, config = run.args, run.config
    if _is_sweep(args) and name is not None:  # before downloading weights for other classes
        labels = load_manifest().label_sets.get(load_manifest().get(name).label_set)
        if labels is None:
            raise ClassMismatchError(f'{name} must have a classifier, got a backbone without one.')
        match_classes(data.classes, labels.wnids, labels.names, labels.num_classes, args.subset)
    loaded = load_model(name, args.checkpoint, args.weights, args.num_classes,
                        args.input_size[0] if args.input_size else 3, args.model_kwargs)
    planned = plan(data, loaded, config)
    for note in (*loaded.notes, *planned.match.notes):
        config.tell(note)
    _compare_with_figures(run, data, loaded, planned)
    seen = {'data_dir': str(args.data_dir) if args.data_dir else None, 'dataset': args.dataset, 'split': args.split,
            'notes': list(data.notes),
            **(fingerprint(data, planned.indices, args.dataset) if not config.rank else {})}
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')
    evaluation = evaluate(data, loaded, planned, config)
    run.rows.append(summary_row(evaluation))
    for line in lines(evaluation):
        run.say(line)
    for problem in evaluation.problems:
        run.fail(problem)
    if args.check:
        _check_figures(run, evaluation)
    if not config.rank:
        run.details.append({**details(evaluation, config), 'data': seen, 'command': run.command, 'started': started})
        _write(run, evaluation)


def _write(run: _Run, evaluation: Evaluation) -> None:
    """Write all results so far, so that an interrupted sweep keeps them."""
    args, name = run.args, evaluation.loaded.name
    if args.output:
        write_results(args.output / name if _is_sweep(args) else args.output, evaluation, run.details[-1])
    if args.results_file and args.results_file.suffix == '.json':
        write_json(args.results_file, run.details[0] if len(run.details) == 1 else run.details)
    elif args.results_file:
        write_csv(args.results_file, run.rows)


# -- measured against claimed ------------------------------------------------------------------------------------------

def find_metric(entry: ModelEntry, precision: str, img_size: int, num_images: int | None) -> Metric:
    """The manifest's figure to compare a measurement at `img_size` pixels with.

    Raises:
        EvaluationError: The manifest has none for that precision, size and number of images (None for any number).
    """
    if not entry.metrics:
        raise EvaluationError(f'The manifest has no figure for {entry.name}. Leave out --check, or take a tag that has '
                              f'one.')
    fitting = [m for m in entry.metrics if (m.precision, m.img_size) == (precision, img_size)]
    if not fitting:
        known = ' and '.join(sorted({f'{m.precision} at {m.img_size} px' for m in entry.metrics}))
        raise EvaluationError(f'The manifest has no figure of {entry.name} for {precision} at {img_size} px, only for '
                              f'{known}. Use that precision and size.')
    for metric in fitting:
        if num_images in (None, metric.num_images):
            return metric
    known = ' or '.join(f'{m.dataset} {m.split} with {m.num_images:,} images' for m in fitting)
    raise EvaluationError(f"The manifest's figure of {entry.name} is for {known}, got {num_images:,}. Check --data-dir "
                          f'and --split.')


def _compare_with_figures(run: _Run, data: DataSplit, loaded: LoadedModel, planned: Plan) -> None:
    """Check before the pass, which may take hours, that these images are the set that the manifest's figure is for."""
    entry, count = loaded.entry, None if data.is_stream else len(planned.indices)
    if run.args.check:
        if entry is None:
            raise EvaluationError(f'--check needs a tag of the manifest ({", ".join(load_manifest().models)}), got '
                                  f'{loaded.name}. Leave it out.')
        if run.args.checkpoint and loaded.weights['sha256'] != entry.sha256:
            raise EvaluationError(f'--check needs the weights of {entry.name}, whose sha256 is {entry.sha256}, got '
                                  f'{run.args.checkpoint} with {loaded.weights["sha256"]}. Leave one of them out.')
        for precision in run.config.precisions:
            find_metric(entry, precision, planned.img_size, count)
    elif (entry is not None and loaded.weights.get('sha256') == entry.sha256 and count is not None
          and count not in {metric.num_images for metric in entry.metrics}):
        for metric in entry.metrics:
            run.config.tell(f"These {count:,} images are not the set that the manifest's figure is for: "
                            f'{metric.dataset} {metric.split}, {metric.num_images:,} images.')


def _check_figures(run: _Run, evaluation: Evaluation) -> None:
    """Compare what was measured with the manifest."""
    entry, tolerance = evaluation.loaded.entry, run.args.tolerance
    assert entry is not None
    for precision, counts in evaluation.outcome.counts.items():
        metric = find_metric(entry, precision, evaluation.plan.img_size, counts.num_images)
        for name, correct, claimed in (
                ('top-1', counts.top1_correct, metric.top1), ('top-5', counts.top5_correct, metric.top5)):
            points = 100 * correct / counts.num_images - claimed
            text = f"{name} in {precision} is {points:+.4f} points from the manifest's {claimed:.2f}%"
            if abs(points) <= tolerance:
                run.say(f'  check: {text}, within {tolerance}.')
            else:
                run.fail(f'The check failed: {text}. The tolerance is {tolerance}.')
