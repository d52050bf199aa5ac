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
from io import TextIOWrapper
from pathlib import Path
from typing import Any, cast

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from . import __version__
from .hub import WeightsError, download_tag
from .images import ImageError, read_image, sample_image
from .manifest import Manifest, ManifestError, ModelEntry, load_manifest
from .radii import learned_radii
from .verify import doctor, verify_tags

__all__ = ['default_model', 'main']

TOP_K = 5


class UsageError(RuntimeError):
    """What was asked for cannot be done."""


def default_model(manifest: Manifest) -> ModelEntry:
    """The model that `classify` takes where none is named: the first default tag that is bundled, else published.

    Args:
        manifest: The manifest.

    Returns:
        Its entry.

    Raises:
        ManifestError: No default tag has weights.
    """
    for status in ('bundled', 'published'):
        for entry in manifest.models.values():
            if entry.default and entry.status == status:
                return entry
    raise ManifestError('No default tag in the manifest has weights, expected one: train one, or name one by --model.')


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


def _classifier(entry: ModelEntry, labels: dict[str, str]) -> Callable[[Image.Image], list[dict[str, Any]]]:
    """A function from a picture to its most probable classes, best first."""
    model = timm.create_model(entry.name, pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    classes = list(labels.items())

    @torch.inference_mode()
    def classify(image: Image.Image) -> list[dict[str, Any]]:
        probabilities, indices = model(transform(image)[None]).softmax(-1)[0].topk(TOP_K)
        return [
            {'label': classes[index][0], 'name': classes[index][1], 'probability': probability}
            for index, probability in zip(indices.tolist(), probabilities.tolist(), strict=True)]

    return classify


def _classify(args: argparse.Namespace) -> int:
    manifest = load_manifest()
    entry = manifest.get(args.model) if args.model else default_model(manifest)
    label_set = manifest.label_sets[entry.label_set]
    paths: list[str | None] = args.images or [None]
    sample = None if args.images else sample_image()  # a missing extra is told before a network is loaded
    classify = _classifier(entry, dict(zip(label_set.wnids, label_set.names, strict=True)))
    results = []
    for path in paths:
        result: dict[str, Any] = {'image': path or 'the sample photograph of a cat', 'model': entry.name}
        results.append(result)
        try:
            result['predictions'] = classify(sample or read_image(cast(str, path)))
        except ImageError as error:
            result['error'] = str(error)
            _complain(error)
        if not args.json and 'predictions' in result:
            print(f'{result["image"]} ({entry.name})')
            for guess in result['predictions']:
                print(f'{guess["probability"]:7.1%}  {guess["name"]}')
    if args.json:
        print(json.dumps(results, indent=2))
    return 1 if any('error' in result for result in results) else 0


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
    except (ImageError, ManifestError, UsageError, WeightsError) as error:
        _complain(error)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at its end
        return 141
