"""The command line: `timm-geoprior`, or `python -m timm_geoprior`.

A subcommand is one function that takes the parsed arguments and returns the exit code; `_build_parser` names its
arguments. An error of ours is one sentence on stderr and exit code 1; a wrong use of the command line is 2, Ctrl-C 130,
a pipe that its reader closed 141, as shells have it.
"""
import argparse
import dataclasses
import importlib.util
import json
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data import resolve_model_data_config

from . import __version__
from .errors import GeoPriorError
from .inference.classifier import ClassifierError, load_classifier
from .inference.images import ImageError, read_image, sample_image
from .pretrained.loading import WeightsError, download_tag
from .pretrained.manifest import ManifestError, ModelEntry, default_architecture, default_model, load_manifest
from .pretrained.verify import doctor, verify_tags
from .radii import learned_radii

__all__ = ['main']


class UsageError(GeoPriorError):
    """What was asked for cannot be done."""


def _table(rows: Sequence[Sequence[str]], left: int) -> Iterator[str]:
    """Align columns, the first `left` of them to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:left], widths[:left], strict=True)]
        cells += [cell.rjust(width) for cell, width in zip(row[left:], widths[left:], strict=True)]
        yield '  '.join(cells).rstrip()


def _summary(entry: ModelEntry) -> dict[str, Any]:
    """What `list` says of a tag; the accuracy is that of the first metric."""
    metric = entry.metrics[0] if entry.metrics else None
    return {
        'name': entry.name,
        'status': entry.status,
        'parameters': entry.parameters,
        'top1': metric and metric.top1,
        'dataset': metric.dataset if metric else entry.label_set,
        'img_size': metric.img_size if metric else entry.input.input_size[-1],
        'bytes': entry.bytes,
    }


def _list(args: argparse.Namespace) -> int:
    summaries = [_summary(entry) for entry in load_manifest().models.values()]
    if args.json:
        print(json.dumps(summaries, indent=2))
        return 0
    rows = [('model', 'status', 'data set', 'parameters', 'top-1 %', 'input px', 'file MB')]
    for tag in summaries:
        rows.append((
            tag['name'], tag['status'], tag['dataset'],
            f'{tag["parameters"]:,}' if tag['parameters'] else '-',
            '-' if tag['top1'] is None else f'{tag["top1"]:.2f}',
            str(tag['img_size']),
            f'{tag["bytes"] / 1e6:.1f}' if tag['bytes'] else '-',
        ))
    print('\n'.join(_table(rows, left=3)))
    return 0


def _fields(value: dict[str, Any], indent: str = '') -> Iterator[str]:
    """Lines of `key: value`, deeper ones indented; what is not known yet is left out."""
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield f'{indent}{key}:'
            yield from _fields(item, indent + '  ')
        elif isinstance(item, (tuple, list)) and item and isinstance(item[0], dict):
            for number, part in enumerate(item, 1):
                yield from _fields({f'{key} {number}': part}, indent)
        elif item is not None and item != () and item != {}:
            yield f'{indent}{key}: {", ".join(map(str, item)) if isinstance(item, (tuple, list)) else item}'


def _info(args: argparse.Namespace) -> int:
    entry = load_manifest().get(args.tag)
    print('\n'.join(_fields({'name': entry.name, **dataclasses.asdict(entry)})))
    if not entry.has_weights:
        print(f'\nNo learned radii: {entry.name} has no weights yet.')
        return 0
    model = timm.create_model(entry.name, pretrained=True)
    rows = [('attention layer', 'map', 'radius in cells', 'relative to the map')]
    for layer in learned_radii(model, entry.input.input_size):
        rows.append((
            layer.name, f'{layer.height} x {layer.width}',
            ', '.join(f'{radius:.3f}' for radius in layer.cells),
            ', '.join(f'{radius:.3f}' for radius in layer.relative),
        ))
    print('\n' + '\n'.join(_table(rows, left=1)))
    return 0


def _classify(args: argparse.Namespace) -> int:
    paths: list[str | None] = args.images or [None]
    sample = None if args.images else sample_image()  # a missing extra is told before a network is loaded
    classify = load_classifier(args.model or default_model(load_manifest()).name)
    results = []
    for path in paths:
        result: dict[str, Any] = {'image': path or 'the sample photograph of a cat', 'model': classify.name}
        results.append(result)
        try:
            result['predictions'] = classify(sample or read_image(cast(str, path)))
        except ImageError as error:
            result['error'] = str(error)
            _complain(error)
        if not args.json and 'predictions' in result:
            print(f'{result["image"]} ({classify.name})')
            for guess in result['predictions']:
                print(f'{guess["probability"]:7.1%}  {guess["name"]}')
    if args.json:
        print(json.dumps(results, indent=2))
    return 1 if any('error' in result for result in results) else 0


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Say which extra a missing package belongs to."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{error.name} is not installed, expected it for this command: pip install 'timm-geoprior[{name}]'."
        ) from error


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(','))
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is no point, expected X,Y in pixels, as in 120,80') from None
    return x, y


def _explain(args: argparse.Namespace) -> int:
    model = args.model or default_model(load_manifest()).name
    if args.layers:
        return _print_layers(model)
    with _extra('explain'):
        from .inference.explain import ExplainError, explain
        from .inference.windows import WindowsError
    image = read_image(args.image) if args.image else sample_image()
    try:
        explain(load_classifier(model), image, args.output, args.point)
    except (ExplainError, WindowsError) as error:
        raise UsageError(str(error)) from error
    print(f'Wrote {args.output}.')
    return 0


def _print_layers(name: str) -> int:
    model = load_classifier(name).model
    _, height, width = size = resolve_model_data_config(model)['input_size']
    rows = [('attention layer', 'map', 'a cell in px', 'radius in cells', 'radius in px')]
    for layer in learned_radii(model, size):
        pixels = height / layer.height
        rows.append((
            layer.name, f'{layer.height} x {layer.width}', f'{pixels:g}',
            ', '.join(f'{radius:.2f}' for radius in layer.cells),
            ', '.join(f'{radius * pixels:.1f}' for radius in layer.cells),
        ))
    print(f'{name} at {width} x {height} px')
    print('\n'.join(_table(rows, left=1)))
    return 0


def _demo(args: argparse.Namespace) -> int:
    with _extra('demo'):
        from .inference.demo import DemoError, serve, write_space
    try:
        if args.space is None:
            serve(args.model, args.port)
        else:
            write_space(args.space, args.model)
            print(f'Wrote {args.space}: push it to a Space of the Hugging Face Hub, or run its app.py.')
    except DemoError as error:
        raise UsageError(str(error)) from error
    return 0


def _finetune(args: argparse.Namespace) -> int:
    with _extra('train'):
        from .training.finetune import ERRORS, Job, finetune
    output = args.output or Path(f'{args.folder.resolve().name}-finetuned')
    manifest = load_manifest()
    model = args.model or (default_architecture(manifest) if args.from_scratch else default_model(manifest).name)
    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        results = finetune(Job(
            args.folder, output, model, args.from_scratch, tuple(args.set), args.patience, args.seed, device,
            args.workers, args.resume))
    except ERRORS as error:
        raise UsageError(str(error)) from error
    measured = results['measured']
    print(f'{measured["split"]}: {measured["top1_correct"]:,} of {measured["num_images"]:,} images right, '
          f'{measured["top1"]:.2f}% (95% interval {", ".join(f"{end:.2f}" for end in measured["top1_interval"])})')
    for pair in measured['confused']:
        print(f'  {pair["class"]} taken for {pair["taken_for"]}: {pair["count"]}')
    print(f"timm.create_model('local-dir:{output}', pretrained=True)\n"
          f'timm-geoprior classify --model local-dir:{output} IMAGE')
    return 0


def _verify(args: argparse.Namespace) -> int:
    checks = verify_tags(args.tags)
    if not checks:
        print('No tag in the manifest has weights.')
    for check in checks:
        verdict = {True: 'ok', False: 'FAILED', None: 'not checked'}[check.ok]
        print(f'{check.name}  {check.what}: {verdict}. {check.detail}')
    return 1 if any(check.ok is False for check in checks) else 0


def _download(args: argparse.Namespace) -> int:
    *tags, folder = args.names
    if bool(tags) == args.all:
        got = 'both tags and --all' if tags else 'a folder alone'
        raise UsageError(f'Got {got}, expected tags and then a folder, or --all and a folder: name what to fetch.')
    for name in tags or [entry.name for entry in load_manifest().models.values() if entry.has_weights]:
        place = download_tag(name, folder)
        print(f"{place}\n  timm.create_model('local-dir:{place}', pretrained=True)")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    print('\n'.join(_fields(doctor())))
    return 0


def _is_runnable(module: str) -> bool:
    """Whether `python -m MODULE` would find something to run."""
    try:
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f'{module}.__main__')
    except ModuleNotFoundError:
        return False
    return spec is not None


def _run(args: argparse.Namespace) -> int:
    target = args.target
    sys.path.insert(0, os.getcwd() if args.module else str(Path(target).resolve().parent))
    if args.module and not _is_runnable(target):
        raise UsageError(f'{target} is no module that can be run, expected what `python -m` takes: install it.')
    if not args.module and not os.path.exists(target):
        raise UsageError(f'{target} does not exist, expected a Python script: check its name, or use -m for a module.')
    sys.argv[:] = [target, *args.args]
    try:
        if args.module:
            runpy.run_module(target, run_name='__main__', alter_sys=True)
        else:
            runpy.run_path(target, run_name='__main__')
    except BrokenPipeError:  # not ours to hush: a data loader's workers may have died
        traceback.print_exc()
        return 1
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='timm-geoprior', description='GeoPrior ResNets for timm.')
    parser.add_argument('--version', action='version', version=f'timm-geoprior {__version__}')
    commands = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)

    def add(name: str, function: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + '.')
        command.set_defaults(function=function)
        return command

    command = add('list', _list, 'list every model with its status and accuracy')
    command.add_argument('--json', action='store_true', help='print JSON')

    command = add('classify', _classify, 'name the five most probable classes of each image')
    command.add_argument(
        'images', nargs='*', metavar='IMAGE', help="image files (with none, scikit-image's photograph of a cat)")
    command.add_argument('--model', help='model to take (default: the first in the list that is bundled)')
    command.add_argument('--json', action='store_true', help='print JSON')

    command = add('explain', _explain, 'draw what a model attends to in an image: windows, Grad-CAM, receptive field')
    command.add_argument(
        'image', nargs='?', metavar='IMAGE', help="an image file (with none, scikit-image's photograph of a cat)")
    command.add_argument('-o', '--output', type=Path, default=Path('explain.png'), help='default: explain.png')
    command.add_argument('--model', help='model to take (default: the first in the list that is bundled)')
    command.add_argument(
        '--point', type=_point, metavar='X,Y', help='where it looks from, in pixels of the image (default: the middle)')
    command.add_argument('--layers', action='store_true', help="print each layer's radius in cells and pixels, only")

    command = add('demo', _demo, 'serve a page to try the models on, or write the folder of a Hugging Face Space')
    command.add_argument('--model', help='model that is chosen at first (default: as for classify)')
    command.add_argument('--port', type=int, default=7860, help='port of this machine (default: 7860)')
    command.add_argument('--space', type=Path, metavar='DIR', help='write the folder of a Space instead')

    command = add('finetune', _finetune, 'fine-tune a model on a folder of images, and leave a folder that timm loads')
    command.add_argument(
        'folder', type=Path, metavar='DIR', help='holds one folder of images a class, or such folders train, val, test')
    command.add_argument('--output', type=Path, help='folder to write (default: DIR-finetuned, here)')
    command.add_argument('--model', help='what to start from: a tag, any model of timm, or local-dir: and a folder')
    command.add_argument('--from-scratch', action='store_true', help='start from random weights, to compare')
    command.add_argument(
        '--set', action='append', default=[], metavar='KEY=VALUE', help='another value for a key of the recipe')
    command.add_argument(
        '--patience', type=int, default=5, help='epochs without a better accuracy before it ends (default: 5)')
    command.add_argument('--seed', type=int, default=0)
    command.add_argument('--device', help='cpu, cuda or cuda:N (default: cuda where there is one)')
    command.add_argument('-j', '--workers', type=int, default=2, help='processes that decode images (default: 2)')
    command.add_argument('--resume', action='store_true', help='go on with the run in --output')

    command = add('info', _info, "print a model's manifest entry and its learned radii")
    command.add_argument('tag', metavar='TAG', help='architecture.tag, or an architecture for its default tag')

    command = add('verify', _verify, 'hold bundled, cached and Hub files and golden outputs against the manifest')
    command.add_argument('tags', nargs='*', metavar='TAG', help='default: all that have weights')

    command = add('download', _download, 'make folders that `local-dir:` loads where there is no network')
    command.add_argument('names', nargs='+', metavar='TAG... DIR', help='tags, and the folder that theirs go into')
    command.add_argument('--all', action='store_true', help='all tags that have weights; then name the folder alone')

    add('doctor', _doctor, 'print what a report of a problem needs: versions, cache, endpoint, which tags load')

    command = add('run', _run, 'run a Python script or module that uses timm, with these models registered')
    command.add_argument('-m', dest='module', action='store_true', help='the target is a module, as for `python -m`')
    command.add_argument('target', metavar='SCRIPT_OR_MODULE')
    command.add_argument('args', nargs=argparse.REMAINDER, metavar='ARGS', help='its arguments')
    return parser


def _complain(error: Exception) -> None:
    print(f'timm-geoprior: {error}', file=sys.stderr)


def _dispatch(argv: Sequence[str] | None) -> int:
    try:
        args = _build_parser().parse_args(argv)
        return cast(int, args.function(args))
    finally:
        sys.stdout.flush()  # a closed pipe shows here, where it is dealt with, not at the interpreter's end


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments, those of the process where it is None.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):  # a file's name may have what no terminal can print
        cast(TextIOWrapper, stream).reconfigure(errors='backslashreplace')
    try:
        return _dispatch(argv)
    except (ClassifierError, ImageError, ManifestError, UsageError, WeightsError) as error:
        _complain(error)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at its end
        return 141
