#!/usr/bin/env python3
"""Compare the speed, startup and memory of models.

    python scripts/experiments/benchmark.py geoprior_resnet50 resnet50 --channels-last --output bench

A machine's speed drifts by more than the networks differ, so each repetition measures every network once, in one
process and in alternating order. The first model is compared with each of the others by the ratio within each
repetition; the median ratio is printed, with the interquartile range in brackets. A ratio above one means that the
first model is faster (images per second) or needs more (seconds, bytes).
"""
import argparse
import contextlib
import csv
import dataclasses
import multiprocessing
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.utils import ParseKwargs, reparameterize_model
from torch import nn
from torch.utils.benchmark import Timer
from tqdm import tqdm

import timm_geoprior  # noqa: F401  (registers the models)
from timm_geoprior.errors import GeoPriorError
from timm_geoprior.files import save_figure, write_json
from timm_geoprior.progress import command_line
from timm_geoprior.provenance import git_commit, hardware, versions

ENGINES = ('eager', 'compile', 'cudagraphs', 'torchscript', 'onnxruntime', 'aotinductor')
COMPILED = {'compile': None, 'cudagraphs': 'reduce-overhead'}  # engine -> mode of torch.compile
PROCESS = Path('/proc/self')

Step = Callable[[], object]


class BenchmarkError(GeoPriorError):
    """A workload that cannot be measured; the message says why and what to do."""


@dataclass(frozen=True)
class Workload:
    """How networks are run.

    Attributes:
        device: 'cpu', 'cuda' or 'cuda:N'.
        precision: 'float32', or the autocast dtype.
        channels_last: Whether the network and the images use the channels-last memory format.
        engine: What runs the network, one of `ENGINES`.
        train: Whether to run forward, backward and an SGD step instead of only the forward pass.
        img_size: Side of the images, in pixels.
        batch_size: Images per step.
        num_threads: CPU threads.
        reparameterize: Whether to call `timm.utils.reparameterize_model`, which leaves networks that do not support it
            unchanged.
        model_kwargs: Keyword arguments of every network.
    """

    device: str = 'cpu'
    precision: str = 'float32'
    channels_last: bool = False
    engine: str = 'eager'
    train: bool = False
    img_size: int = 224
    batch_size: int = 16
    num_threads: int = 1
    reparameterize: bool = False
    model_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def check(self) -> str:
        """Reject a workload that cannot run here.

        Returns:
            A warning about a workload whose result may mislead; usually empty.

        Raises:
            BenchmarkError: The device or the engine does not support the workload.
        """
        device = torch.device(self.device)
        if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
            raise BenchmarkError(f'device is {self.device}, this machine has {torch.cuda.device_count()} CUDA devices: '
                                 f'use --device cpu.')
        if self.engine not in ('eager', *COMPILED) and (self.train or self.precision != 'float32'):
            raise BenchmarkError(f'The engine {self.engine} must run inference in float32, got '
                                 f'{"training" if self.train else self.precision}. Leave out --train and --amp.')
        if self.train and self.reparameterize:
            raise BenchmarkError('A reparameterized network must be measured in inference, got training: it has no '
                                 'batch norms left to train. Leave out --train or --reparameterize.')
        if self.engine == 'onnxruntime' and device.type != 'cpu':
            raise BenchmarkError(f'The engine onnxruntime must run on the cpu, got {self.device}. Leave out --device.')
        if device.type == 'cuda' and self.precision == 'bfloat16' and not torch.cuda.is_bf16_supported(False):
            raise BenchmarkError(f'{torch.cuda.get_device_name(device)} has no bfloat16: use --amp-dtype float16.')
        capabilities: dict[str, Any] = getattr(torch.cpu, 'get_capabilities', dict)()  # from torch 2.11 on
        if device.type == 'cpu' and self.precision == 'bfloat16' and not (
                capabilities.get('avx512_bf16', True) or capabilities.get('amx_bf16', True)):
            return 'this CPU has no bfloat16 instructions: bfloat16 is emulated'
        return ''

    def __str__(self) -> str:
        return ', '.join(filter(None, (
            'training' if self.train else 'inference', 'reparameterized' if self.reparameterize else '', self.engine,
            self.precision, f'batch {self.batch_size}', f'{self.img_size} px')))

    def use_device(self) -> None:
        """Make the device torch's current one, which `synchronize`, timers and memory statistics refer to."""
        if torch.device(self.device).type == 'cuda':
            torch.cuda.set_device(torch.device(self.device).index or 0)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context that a step runs in."""
        if self.precision == 'float32':
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.device).type, getattr(torch, self.precision))


def usable_models(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The models that the installed timm has, and a message about each one that it lacks.

    Raises:
        BenchmarkError: The first model, with which the others are compared, is missing.
    """
    missing = [name for name in names if not timm.is_model(name.split('.')[0])]
    reasons = [f'{name} is skipped: timm {timm.__version__} has no such model.' for name in missing]
    if names[0] in missing:
        raise BenchmarkError(f'{reasons[0]} Name one of timm.list_models().')
    return [name for name in names if name not in missing], reasons


# -- one step ----------------------------------------------------------------------------------------------------------

def create_network(name: str, workload: Workload) -> nn.Module:
    """A network with random weights, for 1,000 classes unless `model_kwargs` say otherwise."""
    model: nn.Module = timm.create_model(name, **{'num_classes': 1000, **workload.model_kwargs})
    layout = torch.channels_last if workload.channels_last else torch.contiguous_format
    model = model.to(device=workload.device).train(workload.train)
    for parameter in model.parameters():
        if parameter.dim() == 4:  # `model.to(memory_format=...)` fails on the 5D weights of a lambda layer
            parameter.data = parameter.data.contiguous(memory_format=layout)
    return reparameterize_model(model) if workload.reparameterize else model


def prepare_step(model: nn.Module, workload: Workload, folder: Path) -> Step:
    """A function that runs a network once on a fixed batch.

    Args:
        model: The network, from `create_network`.
        workload: How it is run.
        folder: Folder for the engine's files.
    """
    layout = torch.channels_last if workload.channels_last else torch.contiguous_format
    shape = (workload.batch_size, 3, workload.img_size, workload.img_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    images = images.to(workload.device).contiguous(memory_format=layout)
    if workload.train:
        return _training_step(model, images, workload)
    run = _engine(model, images, workload, folder)

    @torch.inference_mode()
    def step() -> object:
        with workload.autocast():
            return run(images)

    return step


def _training_step(model: nn.Module, images: torch.Tensor, workload: Workload) -> Step:
    targets = torch.randint(1000, (len(images),), device=images.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    scaler = torch.amp.GradScaler(images.device.type, enabled=workload.precision == 'float16')
    network = _compiled(model, workload) if workload.engine in COMPILED else model

    def step() -> None:
        with workload.autocast():
            loss = F.cross_entropy(network(images), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def _compiled(model: nn.Module, workload: Workload) -> Callable[[torch.Tensor], torch.Tensor]:
    compiled: Callable[[torch.Tensor], torch.Tensor] = torch.compile(
        model, dynamic=False, mode=COMPILED[workload.engine])
    return compiled


def _engine(
        model: nn.Module, images: torch.Tensor, workload: Workload, folder: Path) -> Callable[[torch.Tensor], object]:
    """The network as the workload's engine runs it."""
    if workload.engine in COMPILED:
        return _compiled(model, workload)
    if workload.engine == 'eager':
        return model
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')  # TorchScript's deprecation, and the exporter's warnings about its own code
        if workload.engine == 'torchscript':
            return torch.jit.freeze(torch.jit.trace(model, images))  # type: ignore[no-any-return]
        if workload.engine == 'aotinductor':
            from torch._inductor import aoti_compile_and_package, aoti_load_package  # the documented entry point

            package = aoti_compile_and_package(
                torch.export.export(model, (images,)), package_path=str(folder / f'{id(model)}.pt2'))
            return aoti_load_package(package)
        return _onnx_session(model, images, workload, folder)


def _onnx_session(
        model: nn.Module, images: torch.Tensor, workload: Workload, folder: Path) -> Callable[[torch.Tensor], object]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise BenchmarkError(f'{error.name} is missing: pip install onnx onnxruntime onnxscript.') from None
    path = folder / f'{id(model)}.onnx'
    torch.onnx.export(model, (images,), path, dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = workload.num_threads
    session = onnxruntime.InferenceSession(path, options)
    inputs = {session.get_inputs()[0].name: images.contiguous().numpy()}
    return lambda _: session.run(None, inputs)


# -- speed -------------------------------------------------------------------------------------------------------------

def measure_speed(
        names: Sequence[str], workload: Workload, repeats: int, min_seconds: float = 1.0) -> Iterator[dict[str, Any]]:
    """Images per second of each network, one repetition after the other.

    Args:
        names: The networks.
        workload: How they are run.
        repeats: Repetitions.
        min_seconds: Minimum time that each network runs in each repetition, in seconds.

    Yields:
        'model', 'repetition' and 'images_per_second' of each measurement, as soon as it is done.
    """
    workload.use_device()
    with tempfile.TemporaryDirectory() as folder:
        timers = {}
        for name in names:
            step = prepare_step(create_network(name, workload), workload, Path(folder))
            timers[name] = Timer('step()', globals={'step': step}, num_threads=workload.num_threads)
        warm = {name: timer.blocked_autorange(min_run_time=min_seconds).median for name, timer in timers.items()}
        for repetition in range(repeats):
            for name in names if repetition % 2 else reversed(names):
                number = max(1, round(min_seconds / warm[name]))
                seconds = timers[name].timeit(number).mean
                yield {'model': name, 'repetition': repetition, 'images_per_second': workload.batch_size / seconds}


# -- model creation, first call, memory --------------------------------------------------------------------------------

def measure_startup(names: Sequence[str], workload: Workload, repeats: int) -> Iterator[dict[str, Any]]:
    """Creation, first call and peak memory of each network, each measured in its own process.

    Args:
        names: The networks.
        workload: How they are run.
        repeats: Repetitions.

    Yields:
        'model', 'repetition', 'create_seconds', 'first_call_seconds' and 'peak_bytes' of each measurement, as soon as
        it is done. On a GPU the bytes are those allocated, on a CPU those by which the process grew.
    """
    context = multiprocessing.get_context('spawn')
    for repetition in range(repeats):
        for name in names if repetition % 2 else reversed(names):
            with context.Pool(1) as pool:
                yield {'model': name, 'repetition': repetition, **pool.apply(_startup, (name, workload))}


def _startup(name: str, workload: Workload) -> dict[str, float]:
    torch.set_num_threads(workload.num_threads)
    workload.use_device()
    before = reset_peak(workload)
    started = time.perf_counter()
    model = create_network(name, workload)
    created = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        step = prepare_step(model, workload, Path(folder))
        step()
        if torch.device(workload.device).type == 'cuda':
            torch.cuda.synchronize()
        called = time.perf_counter()
        step()  # momentum and workspaces exist only from the second step on
    return {'create_seconds': created - started, 'first_call_seconds': called - created,
            'peak_bytes': peak_bytes(workload) - before}


def reset_peak(workload: Workload) -> int:
    """Reset the peak memory to what is in use now, and return it in bytes."""
    if torch.device(workload.device).type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    elif PROCESS.exists():
        (PROCESS / 'clear_refs').write_text('5')
    return peak_bytes(workload)


def peak_bytes(workload: Workload) -> int:
    """Peak memory in bytes: allocated memory on a GPU, else that of the process."""
    if torch.device(workload.device).type == 'cuda':
        return torch.cuda.max_memory_allocated()
    if PROCESS.exists():  # Linux: getrusage would report the parent's peak if that was higher
        lines = (PROCESS / 'status').read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith('VmHWM')).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


# -- figures -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Spread:
    """Median and interquartile range over repetitions."""

    median: float
    low: float
    high: float

    @property
    def differs_from_one(self) -> bool:
        """Whether a ratio is further from one than its interquartile range is wide."""
        return abs(self.median - 1) > self.high - self.low


def summarize(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    points = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
    return Spread(*torch.tensor(values, dtype=torch.float64).quantile(points).tolist())


def ratios(rows: Sequence[dict[str, Any]], names: Sequence[str], quantity: str) -> dict[str, list[float]]:
    """A quantity of the first model divided by that of each other one, per repetition.

    Args:
        rows: Rows of `measure_speed` or `measure_startup`. Repetitions that only one of the two models has are ignored.
        names: The models.
        quantity: Key of the rows.
    """
    values = {(row['model'], row['repetition']): row[quantity] for row in rows}
    repetitions = sorted({row['repetition'] for row in rows})
    return {other: [values[names[0], index] / values[other, index] for index in repetitions
                    if (names[0], index) in values and (other, index) in values] for other in names[1:]}


def median_speeds(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Median images per second of each model, from the rows of `measure_speed`."""
    return {name: summarize([row['images_per_second'] for row in rows if row['model'] == name]).median
            for name in dict.fromkeys(row['model'] for row in rows)}


def describe(rows: Sequence[dict[str, Any]], names: Sequence[str], quantity: str) -> Iterator[str]:
    """Lines with a quantity of each model, and with the ratio of the first model to each other one."""
    for name in names:
        spread = summarize([row[quantity] for row in rows if row['model'] == name])
        yield f'{quantity} of {name}: {spread.median:,.4g} [{spread.low:,.4g}, {spread.high:,.4g}]'
    for other, values in ratios(rows, names, quantity).items():
        spread = summarize(values)
        verdict = '' if spread.differs_from_one else ' (closer to one than its spread is wide: no difference shown)'
        yield f'ratio to {other}: {spread.median:.3f} [{spread.low:.3f}, {spread.high:.3f}]{verdict}'


def plot_ratios(results: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw every repetition's ratio.

    Args:
        results: Quantity -> other model -> ratios.
        path: A PNG file to write.
    """
    from matplotlib.figure import Figure  # extra `train`

    figure = Figure(figsize=(3.2 * len(results) + 1, 3.6), layout='constrained')
    for index, (quantity, by_model) in enumerate(results.items()):
        axes = figure.add_subplot(1, len(results), index + 1)
        axes.axhline(1, color='0.7', linewidth=1)
        axes.boxplot(list(by_model.values()), tick_labels=list(by_model), showfliers=True)
        axes.set_title(quantity.replace('_', ' '), fontsize=10)
        axes.tick_params(axis='x', labelrotation=20, labelsize=8)
    figure.axes[0].set_ylabel('ratio')
    save_figure(path, figure, dpi=120)


def plot_speed(speeds: dict[str, dict[str, float]], path: Path) -> None:
    """Draw images per second over the number of parameters.

    Args:
        speeds: Title of a panel -> model -> images per second. GeoPrior networks have a color of their own.
        path: A PNG file to write.
    """
    from matplotlib.figure import Figure  # extra `train`

    figure = Figure(figsize=(4.6 * len(speeds), 3.8), layout='constrained')
    for index, (title, by_model) in enumerate(speeds.items()):
        axes = figure.add_subplot(1, len(speeds), index + 1)
        for name, images_per_second in by_model.items():
            parameters = sum(p.numel() for p in timm.create_model(name, device='meta').parameters()) / 1e6
            ours = name.startswith('geoprior')  # labelled below and to the left, since the plain network is close by
            axes.plot(parameters, images_per_second, 'o', color='C1' if ours else 'C0')
            axes.annotate(name, (parameters, images_per_second), xytext=(-4, -11) if ours else (4, 4), fontsize=7,
                          textcoords='offset points', horizontalalignment='right' if ours else 'left')
        axes.set_title(title, fontsize=9)
        axes.set_xlabel('parameters (millions)')
        axes.margins(x=0.45, y=0.15)
        axes.set_ylim(bottom=0)
    figure.axes[0].set_ylabel('images per second')
    save_figure(path, figure, dpi=120)


class OutputFolder:
    """The output folder. Rows are written as they are measured, so that a killed benchmark keeps them."""

    def __init__(self, folder: Path, workload: Workload, command: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.workload, self.command = folder, workload, command

    def collect(self, file: str, rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        """Write rows to a CSV file while they are measured, and return them."""
        collected: list[dict[str, Any]] = []
        with (self.folder / file).open('w', newline='', encoding='utf-8') as handle:
            for row in rows:
                writer = csv.DictWriter(handle, row)
                if not collected:
                    writer.writeheader()
                writer.writerow(row)
                handle.flush()
                collected.append(row)
        return collected

    def finish(self, results: dict[str, Any]) -> None:
        """Write results.json."""
        device = torch.device(self.workload.device)
        facts = {'command': self.command, 'setting': dataclasses.asdict(self.workload), 'hardware': hardware(device),
                 'versions': versions(), 'commit': git_commit(), **results}
        write_json(self.folder / 'results.json', facts)


QUANTITIES = {
    'speed.csv': ('images_per_second',),
    'startup.csv': ('create_seconds', 'first_call_seconds', 'peak_bytes'),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='+', metavar='MODEL', help='timm models; the first is compared with the others')
    parser.add_argument(
        '--output', type=Path, required=True, help='folder to write: CSV files, results.json, plots')
    parser.add_argument('--device', default='cpu', help='cpu, cuda or cuda:N')
    parser.add_argument('--amp', action='store_true', help='autocast to --amp-dtype')
    parser.add_argument('--amp-dtype', default='bfloat16', choices=('bfloat16', 'float16'), help='default: bfloat16')
    parser.add_argument('--channels-last', action='store_true', help='use the channels-last memory layout')
    engine = parser.add_mutually_exclusive_group()
    engine.add_argument('--compile', action='store_true', help='same as --engine compile')
    engine.add_argument('--engine', default='eager', choices=ENGINES, help='what runs the models (default: eager)')
    parser.add_argument('--train', action='store_true', help='measure training: forward, backward and an SGD step')
    parser.add_argument(
        '--reparameterize', action='store_true',
        help='fold the norms with timm.utils.reparameterize_model, where a model supports it')
    parser.add_argument('--img-size', type=int, default=224, metavar='N', help='image size in pixels (default: 224)')
    parser.add_argument('--batch-size', '-b', type=int, default=16, metavar='N', help='default: 16')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), metavar='N', help='CPU threads')
    parser.add_argument('--repeats', type=int, default=15, metavar='N', help='repetitions (default: 15)')
    parser.add_argument(
        '--min-seconds', type=float, default=1.0, metavar='X', help='minimum seconds per repetition (default: 1)')
    parser.add_argument(
        '--startup', type=int, default=0, metavar='N',
        help='also measure creation, first call and peak memory, N times each')
    parser.add_argument(
        '--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE',
        help='keyword arguments for all models')
    return parser.parse_args()


def measure(args: argparse.Namespace) -> None:
    if min(args.repeats, args.startup) < 0 or args.repeats == args.startup == 0:
        raise BenchmarkError(f'--repeats and --startup must be 0 or more, and one of them at least 1, got '
                             f'{args.repeats} and {args.startup}.')
    workload = Workload(
        args.device, args.amp_dtype if args.amp else 'float32', args.channels_last,
        'compile' if args.compile else args.engine, args.train, args.img_size, args.batch_size, args.threads,
        args.reparameterize, args.model_kwargs)
    names, reasons = usable_models(args.models)
    for remark in filter(None, [workload.check(), *reasons]):
        print(f'benchmark.py: {remark}', file=sys.stderr)
    torch.set_num_threads(args.threads)
    output = OutputFolder(args.output, workload, command_line())
    sources: dict[str, tuple[Iterator[dict[str, Any]], int]] = {
        'speed.csv': (measure_speed(names, workload, args.repeats, args.min_seconds), args.repeats),
        'startup.csv': (measure_startup(names, workload, args.startup), args.startup)}
    results: dict[str, dict[str, list[float]]] = {}
    for file, (rows, repeats) in sources.items():
        if not repeats:
            continue
        collected = output.collect(file, tqdm(rows, file, repeats * len(names), leave=False))
        for quantity in QUANTITIES[file]:
            print('\n'.join(describe(collected, names, quantity)))
            results[quantity] = ratios(collected, names, quantity)
        if file == 'speed.csv':
            plot_speed({str(workload): median_speeds(collected)}, args.output / 'speed.png')
    output.finish({'models': names, 'ratios': results})
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
