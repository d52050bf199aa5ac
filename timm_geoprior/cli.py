"""The command line: `timm-geoprior`, or `python -m timm_geoprior`.

A subcommand is a function decorated with `@_command`, which declares its arguments; the function takes the parsed
arguments and returns the exit code. torch and timm are imported only where they are needed, so that `--help` and usage
errors appear at once.

The message of a GeoPriorError is printed on stderr, with exit code 1. The exit code is 2 for wrong usage, 130 for
Ctrl-C, and 141 for a closed pipe, as in a shell.
"""
import argparse
import errno
import json
import os
import shlex
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from . import __version__
from .errors import GeoPriorError, disk_is_full, enough_memory, message_of, needs_extra

if TYPE_CHECKING:
    import torch

    from .inference.classifier import Classifier
    from .pretrained.manifest import ModelEntry

Function = Callable[[argparse.Namespace], int]
Argument = tuple[tuple[str, ...], dict[str, Any]]  # what `add_argument` takes

_COMMANDS: dict[str, tuple[Function, str, tuple[Argument, ...]]] = {}  # name -> function, description, arguments
# commands with their own parser: name -> module whose `main` takes the arguments, description
_MODULES = {
    'train': ('training.train', 'train a model with a recipe'),
    'validate': ('evaluation.validate', 'measure the accuracy of any timm model, or of a checkpoint'),
    'publish': ('release.publish', 'stage, bundle or push trained weights'),
}


def _argument(*names: str, **options: Any) -> Argument:
    return names, options


def _command(name: str, text: str, *arguments: Argument) -> Callable[[Function], Function]:
    """Register a function as the subcommand `name`; `text` describes it in the list of commands and in its own help."""
    def add(function: Function) -> Function:
        _COMMANDS[name] = function, text, arguments
        return function
    return add


def _print_table(rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print rows in columns: the first `left` are left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) if place < left else cell.rjust(width)
                 for place, (cell, width) in enumerate(zip(row, widths, strict=True))]
        print('  '.join(cells).rstrip())


def _radii(values: Sequence[float], digits: int) -> str:
    return ', '.join(f'{value:.{digits}f}' for value in values)


def _fields(value: dict[str, Any], indent: str = '') -> Iterator[str]:
    """Lines of `key: value`, nested ones indented; None, () and {} are left out."""
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield f'{indent}{key}:'
            yield from _fields(item, indent + '  ')
        elif isinstance(item, (tuple, list)) and item and isinstance(item[0], dict):
            for number, part in enumerate(item, 1):
                yield from _fields({f'{key} {number}': part}, indent)
        elif item is not None and item != () and item != {}:
            yield f'{indent}{key}: {", ".join(map(str, item)) if isinstance(item, (tuple, list)) else item}'


def _loading_code(folder: Path | str) -> str:
    return f'timm.create_model({f"local-dir:{folder}"!r}, pretrained=True)'


# -- models ------------------------------------------------------------------------------------------------------------

def _summary(entry: 'ModelEntry', title: str) -> dict[str, Any]:
    """What `list` shows for a tag; the accuracy is that of the first metric."""
    metric = entry.metrics[0] if entry.metrics else None
    return {
        'name': entry.name,
        'default': entry.default,
        'status': entry.status,
        'parameters': entry.parameters,
        'top1': metric and metric.top1,
        'dataset': metric.dataset if metric else title,
        'img_size': metric.img_size if metric else entry.input.input_size[-1],
        'bytes': entry.bytes,
        'license': entry.license,
        'source': entry.source and entry.source.name,
        'source_top1': entry.source and entry.source.top1,
    }


@_command('list', 'list every model with its status and accuracy', _argument(
    '--json', action='store_true', help='print JSON'))
def _list(args: argparse.Namespace) -> int:
    from .pretrained.manifest import load_manifest
    manifest = load_manifest()
    titles = {name: label_set.title for name, label_set in manifest.label_sets.items()}
    summaries = [_summary(entry, titles.get(entry.label_set, '-')) for entry in manifest.tags.values()]
    if args.json:
        print(json.dumps(summaries, indent=2))
        return 0
    rows = [('model', 'status', 'data set', 'licence', 'parameters', 'top-1 %', 'source %', 'input px', 'file MB')]
    for tag in summaries:
        rows.append((
            tag['name'] + ' *' * tag['default'], tag['status'], tag['dataset'], tag['license'],
            f'{tag["parameters"]:,}' if tag['parameters'] else '-',
            *('-' if tag[key] is None else f'{tag[key]:.2f}' for key in ('top1', 'source_top1')),
            str(tag['img_size']),
            f'{tag["bytes"] / 1e6:.1f}' if tag['bytes'] else '-',
        ))
    _print_table(rows, left=4)
    print('\n*: the default tag of its architecture. converted: weights of a timm ResNet, converted when they load.\n'
          "source %: top-1 of that ResNet, published by timm for this size. top-1 %: the model's own, if measured.")
    return 0


@_command('info', "print a model's manifest entry and its learned radii", _argument(
    'tag', metavar='TAG', help='architecture.tag, or an architecture for its default tag'))
def _info(args: argparse.Namespace) -> int:
    import dataclasses

    from .pretrained.manifest import load_manifest
    manifest = load_manifest()
    entry = manifest.get(args.tag)
    labels = manifest.label_sets.get(entry.label_set)  # a backbone has none
    title = labels.title if labels else None
    print('\n'.join(_fields({'name': entry.name, **dataclasses.asdict(entry), 'label_set': title})))
    if not entry.has_weights:
        print(f'\nNo learned radii: {entry.name} has no weights yet.')
        return 0
    import timm

    from .pretrained.cfgs import describe_source
    from .radii import learned_radii
    if entry.source:
        print(f'\n{describe_source(entry)}')
    model = timm.create_model(entry.name, pretrained=True)
    rows = [('attention layer', 'map', 'radius in cells', 'relative to the map')]
    for layer in learned_radii(model, entry.input.input_size):
        rows.append((layer.name, f'{layer.height} x {layer.width}', _radii(layer.cells, 3), _radii(layer.relative, 3)))
    print()
    _print_table(rows)
    return 0


@_command('verify', 'check bundled, cached and Hub files and golden outputs against the manifest', _argument(
    'tags', nargs='*', metavar='TAG', help='default: all tags with a hash in the manifest'))
def _verify(args: argparse.Namespace) -> int:
    from .pretrained.verify import verify_tags
    checks = verify_tags(args.tags)
    if not checks:
        print('No tag in the manifest has weights.')
    for check in checks:
        verdict = {True: 'ok', False: 'FAILED', None: 'not checked'}[check.ok]
        print(f'{check.name}  {check.what}: {verdict}. {check.detail}')
    return 1 if any(check.ok is False for check in checks) else 0


@_command(
    'download', 'save models as folders that `local-dir:` loads without a network',
    _argument('names', nargs='+', metavar='TAG... DIR', help='tags, and the folder to write them to'),
    _argument('--all', action='store_true', help='download all tags except converted ones; give only the folder'))
def _download(args: argparse.Namespace) -> int:
    *tags, folder = args.names
    if bool(tags) == args.all:
        got = 'both tags and --all' if tags else 'a folder alone'
        raise GeoPriorError(f'The arguments must be tags and a folder, or --all and a folder, got {got}.')
    from .pretrained.download import download_tag
    from .pretrained.manifest import load_manifest
    for name in tags or [entry.name for entry in load_manifest().models.values() if entry.is_released]:
        place = download_tag(name, folder)
        print(f'{place}\n  {_loading_code(place)}')
    return 0


@_command('pin', "write revision and SHA-256 of the converted tags' sources into the manifest", _argument(
    'tags', nargs='*', metavar='TAG', help='default: all converted tags'))
def _pin(args: argparse.Namespace) -> int:
    from .release.pin import pin_sources
    for line in pin_sources(args.tags):
        print(line, flush=True)
    return 0


@_command('doctor', 'print what a bug report needs: versions, cache, endpoint, which tags load')
def _doctor(args: argparse.Namespace) -> int:
    from .pretrained.verify import doctor
    print('\n'.join(_fields(doctor())))
    return 0


# -- images ------------------------------------------------------------------------------------------------------------

_MODEL = _argument('--model', help='model to use (default: the bundled one with the best accuracy)')
_DEVICE = _argument('--device', help='cpu, cuda or cuda:N (default: cuda if there is one)')
_WORKERS = _argument('-j', '--workers', type=int, default=2, help='processes that decode images (default: 2)')
_SAMPLE = 'the sample photograph of a cup of coffee'


def _default_model(args: argparse.Namespace) -> str:
    from .pretrained.manifest import default_model, load_manifest
    return args.model or default_model(load_manifest()).name


def _device(args: argparse.Namespace) -> str:
    from .distributed import default_device
    return args.device or default_device()


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be an integer of at least 1, got {text!r}')
    return int(text)


@_command(
    'classify', 'print the most probable classes of each image',
    _argument('images', nargs='*', metavar='IMAGE',
              help='image files, folders, or patterns like "photos/*.jpg" (default: a photograph of a cup of coffee)'),
    _argument('--model', help='any timm model with class names, or local-dir: and a folder (default: the '
                              'bundled model with the best accuracy)'),
    _argument('--top', type=_count, default=5, metavar='N', help='number of classes to print per image (default: 5)'),
    _DEVICE,
    _argument('--compact', action='store_true', help='print one line per image'),
    _argument('--json', action='store_true', help='print JSON lines, one object per image'))
def _classify(args: argparse.Namespace) -> int:
    from .inference.inputs import sample_image
    sample = None if args.images else sample_image()
    faults = _find_images(args.images)
    if faults and all(faults.values()):  # nothing to classify: load no model
        for path, fault in faults.items():
            _print_result(args, {'image': path, 'error': str(fault)})
        return 1
    from .distributed import find_device
    from .progress import Progress, tell_on_stderr
    classify = _load_classifier(args, find_device(_device(args))[0])
    if sample:
        _print_result(args, {'image': _SAMPLE, 'model': classify.name, 'predictions': classify(sample, args.top)})
        return 0
    failed = False
    guesses = classify.files([path for path, fault in faults.items() if not fault], args.top)
    quiet = len(faults) == 1 or sys.stdout.isatty()  # the results themselves show the progress
    with Progress('classifying', len(faults), tell=None if quiet else tell_on_stderr) as progress:
        for path, fault in faults.items():
            found = fault or next(guesses)
            failed |= isinstance(found, Exception)
            answer = {'error': str(found)} if isinstance(found, Exception) else {'predictions': found}
            _print_result(args, {'image': path, 'model': classify.name, **answer})
            progress.update()
    return 1 if failed else 0


def _load_classifier(args: argparse.Namespace, device: 'torch.device | str' = 'cpu') -> 'Classifier':
    from .inference.classifier import load_classifier
    classifier = load_classifier(_default_model(args), device)
    for note in classifier.notes:
        _complain(note)
    return classifier


def _find_images(names: Sequence[str]) -> dict[str, GeoPriorError | None]:
    """Map the path of each image that the names stand for to what is wrong with it, or None."""
    from .errors import ImageError
    from .inference.inputs import check_header, find_images
    faults: dict[str, GeoPriorError | None] = {}
    left_out: list[str] = []
    for name in names:
        try:
            found, others = find_images(name)
            if found == [name]:
                check_header(name)
            faults.update(dict.fromkeys(found))
            left_out += others
        except ImageError as error:
            faults[name] = error
    if left_out:
        more = f' and {len(left_out) - 3} more' if len(left_out) > 3 else ''
        print(f'timm-geoprior: skipped files that are not images: {", ".join(left_out[:3])}{more}.',
              file=sys.stderr)
    return faults


def _print_result(args: argparse.Namespace, result: dict[str, Any]) -> None:
    if 'error' in result:
        _complain(result['error'])
    guesses = [f'{guess["probability"]:.1%} {guess["name"]}' for guess in result.get('predictions', ())]
    if args.json:
        print(json.dumps(result), flush=True)
    elif guesses and args.compact:
        image = result['image'].replace('\n', r'\n').replace('\r', r'\r')
        print(f'{image}: {"; ".join(guesses)}', flush=True)
    elif guesses:
        print(f'{result["image"]} ({result["model"]})')
        for guess in guesses:
            share, _, name = guess.partition(' ')
            print(f'{share:>7}  {name}', flush=True)


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(','))
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be X,Y in pixels, such as 120,80, got {text!r}') from None
    return x, y


@_command(
    'explain', 'draw what a model attends to in an image: windows, Grad-CAM, receptive field',
    _argument('image', nargs='?', metavar='IMAGE', help='an image file (default: a photograph of a cup of coffee)'),
    _argument('-o', '--output', type=Path, default=Path('explain.png'),
              help='file to write: PNG, JPEG, PDF or SVG (default: explain.png)'),
    _MODEL,
    _argument('--point', type=_point, metavar='X,Y',
              help='point to look from, in pixels of the image (default: the centre)'),
    _argument('--layers', action='store_true', help='only print the radius of each layer, in cells and pixels'))
def _explain(args: argparse.Namespace) -> int:
    if args.layers:
        return _print_layers(_default_model(args))
    from .data.reading import read_image
    from .inference.inputs import sample_image
    image = read_image(args.image) if args.image else sample_image()
    with needs_extra('explain'):
        from .inference.explain import check_output, save_explanation
    check_output(args.output)
    if args.image and args.output.exists() and args.output.samefile(args.image):
        raise GeoPriorError(f'The output must be a file other than the image, got {args.output}. Name one '
                            f'with --output.')
    save_explanation(_load_classifier(args), image, args.output, args.point)
    print(f'Wrote {args.output}.')
    return 0


def _print_layers(name: str) -> int:
    from timm.data import resolve_model_data_config

    from .evaluation.models import load_model
    from .radii import cell_size, learned_radii
    model = load_model(name).model
    _, height, width = size = resolve_model_data_config(model)['input_size']
    rows = [('attention layer', 'map', 'a cell in px', 'radius in cells', 'radius in px')]
    for layer in learned_radii(model, size):
        pixels = cell_size(height, layer.height)
        rows.append((layer.name, f'{layer.height} x {layer.width}', f'{pixels:g}', _radii(layer.cells, 2),
                     _radii([radius * pixels for radius in layer.cells], 1)))
    if len(rows) == 1:
        raise GeoPriorError(f'The model must be a GeoPrior ResNet, got {name}, which has no attention layers. '
                            f'Choose another with --model.')
    print(f'{name} at {width} x {height} px')
    _print_table(rows)
    return 0


@_command(
    'demo', 'serve a web page for trying out the models, or write the folder of a Hugging Face Space',
    _argument('--model', help='model to select at the start (default: the bundled one with the best accuracy)'),
    _argument('--port', type=int, default=7860, help='port to serve on (default: 7860)'),
    _argument('--space', type=Path, metavar='DIR', help='write the folder of a Space instead'))
def _demo(args: argparse.Namespace) -> int:
    with needs_extra('demo'):
        from .inference.demo import serve, write_space
    if args.space is None:
        serve(args.model, args.port)
    else:
        write_space(args.space, args.model)
        print(f'Wrote {args.space}: push it to a Space of the Hugging Face Hub, or run its app.py.')
    return 0


# -- conversion --------------------------------------------------------------------------------------------------------

@_command(
    'convert', 'convert a trained ResNet to a GeoPrior ResNet, and write a folder that timm loads',
    _argument('source', metavar='SOURCE', help='name of a pretrained timm model, or a checkpoint file'),
    _argument('-o', '--output', type=Path, required=True, metavar='DIR', help='folder to write, which must be new'),
    _argument('--images', type=Path, metavar='DIR',
              help='fit to the images in this folder; labels are not needed (default: closed form, without images)'),
    _argument('--limit', type=int, default=1000, help='maximum number of images to fit to (default: 1000)'),
    _argument('--model', help='architecture of a checkpoint that does not name it'),
    _argument('--half', action='store_true', help='write float16 weights'),
    _DEVICE,
    _WORKERS)
def _convert(args: argparse.Namespace) -> int:
    with needs_extra('train'):
        from .conversion.job import ConvertJob, convert
    from .conversion.readme import layer_rows, lines
    results = convert(ConvertJob(
        args.source, args.output, args.images, args.model, args.limit, args.half, _device(args), args.workers))
    _print_table(layer_rows(results))
    print('\n'.join(['', *lines(results)]))
    print(_loading_code(args.output))
    return 0


# -- training ----------------------------------------------------------------------------------------------------------

@_command(
    'finetune', 'fine-tune a model on a folder of images, and write a folder that timm loads',
    _argument('folder', type=Path, metavar='DIR',
              help='folder with one folder of images per class, or with such folders in train, val and test'),
    _argument('--output', type=Path, help='folder to write (default: DIR-finetuned in the current folder)'),
    _argument('--model', help='model to start from: a tag, any timm model, or local-dir: and a folder (default: the '
                              'bundled model with the best accuracy)'),
    _argument('--from-scratch', action='store_true', help='start from random weights, for comparison'),
    _argument('--set', action='append', default=[], metavar='KEY=VALUE', help='override a key of the recipe'),
    _argument('--patience', type=_count, default=5, metavar='N',
              help='stop after this many epochs without improvement (default: 5)'),
    _argument('--seed', type=int, default=0, help='seed of weights, order and augmentation (default: 0)'),
    _DEVICE,
    _WORKERS,
    _argument('--resume', action='store_true', help='continue the run in --output'))
def _finetune(args: argparse.Namespace) -> int:
    with needs_extra('train', 'scipy'):
        from .training.finetune import FinetuneJob, finetune
    output = args.output or Path(f'{args.folder.resolve().name}-finetuned')
    model = _default_model(args)
    if args.from_scratch and not args.model:  # random weights have no tag
        model = model.partition('.')[0]
    results = finetune(FinetuneJob(
        args.folder, output, model=model, overrides=tuple(args.set), patience=args.patience, seed=args.seed,
        device=_device(args), workers=args.workers, resume=args.resume,
        finetune='' if args.from_scratch else 'pretrained'))
    measured = results['measured']
    print(f'{measured["split"]}: {measured["top1_correct"]:,} of {measured["num_images"]:,} images correct, '
          f'{measured["top1"]:.2f}% (95% interval {", ".join(f"{end:.2f}" for end in measured["top1_interval"])})')
    for pair in measured['confused']:
        print(f'  {pair["class"]} mistaken for {pair["taken_for"]}: {pair["count"]}')
    print(f'{_loading_code(output)}\ntimm-geoprior classify --model {shlex.quote(f"local-dir:{output}")} IMAGE')
    return 0


# -- other people's scripts --------------------------------------------------------------------------------------------

def _is_runnable(module: str) -> bool:
    """Whether `python -m MODULE` would find something to run."""
    from importlib.util import find_spec
    try:
        spec = find_spec(module)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f'{module}.__main__')
    except (ImportError, ValueError):  # also for a relative or an empty name
        return False
    return spec is not None


def _check_script(path: str) -> None:
    """Refuse a script that does not exist. One that may not be read raises a PermissionError, as `main` expects."""
    folder = os.path.isdir(path)
    try:
        kind = os.stat(os.path.join(path, '__main__.py') if folder else path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if folder:
            raise GeoPriorError(
                f'A folder to run must have a __main__.py, got {path}. Name the script in it.') from None
        raise GeoPriorError(
            f'{path} does not exist. Check the name of the script, or use -m for a module.') from None
    if stat.S_ISREG(kind) and not folder:  # a pipe has only one reader
        open(path, 'rb').close()


def _reach_children() -> None:
    """Also register the models in Python processes that this one starts: see startup/sitecustomize.py."""
    folder = str(Path(__file__).absolute().with_name('startup'))
    inherited = os.environ.get('PYTHONPATH')  # an empty entry in it means the current folder
    others = [entry for entry in inherited.split(os.pathsep) if entry != folder] if inherited else []
    os.environ['PYTHONPATH'] = os.pathsep.join([folder, *others])


@_command(
    'run', 'run a Python script or module that uses timm, with these models registered in it and its child processes',
    _argument('-m', dest='module', action='store_true', help='run a module, as `python -m` does'),
    _argument('target', metavar='SCRIPT_OR_MODULE'),
    _argument('args', nargs=argparse.REMAINDER, metavar='ARGS', help='arguments of the script or module'))
def _run(args: argparse.Namespace) -> int:
    import runpy
    target = args.target
    sys.path.insert(0, os.getcwd() if args.module else str(Path(target).resolve().parent))
    if args.module and not _is_runnable(target):
        raise GeoPriorError(f'The module to run must be one that `python -m` takes, got {target}. Install it.')
    if not args.module:
        _check_script(target)
    _reach_children()
    sys.argv[:] = [target, *args.args]
    try:
        if args.module:
            runpy.run_module(target, run_name='__main__', alter_sys=True)
        else:
            runpy.run_path(target, run_name='__main__')
    except OSError:  # the script's own, which `main` would misreport: a pipe to a worker broke, or its disk is full
        sys.excepthook(*cast(Any, sys.exc_info()))
        return 1
    return 0


# -- the parser --------------------------------------------------------------------------------------------------------

def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='timm-geoprior', description='GeoPrior ResNets for timm.')
    parser.add_argument('--version', action='version', version=f'timm-geoprior {__version__}')
    commands = parser.add_subparsers(title='commands', metavar='COMMAND')
    for name, (function, text, arguments) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + '.')
        command.set_defaults(function=function, parser=command)
        for names, options in arguments:
            command.add_argument(*names, **options)
    for name, (_, text) in _MODULES.items():
        commands.add_parser(name, help=text)
    return parser


def _complain(error: Exception | str, prog: str = 'timm-geoprior') -> None:
    print(f'{prog}: {error}', file=sys.stderr)


def _split_off_arguments(argv: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Split the words up to the target of `run` from the target's arguments: argparse would drop their first `--`."""
    if not argv or argv[0] != 'run':
        return argv, ()
    target = next((place for place, word in enumerate(argv) if place and not word.startswith('-')), len(argv))
    return argv[:target + 1], argv[target + 1:]


def _dispatch(argv: Sequence[str], prog: str) -> int:
    argv, own = _split_off_arguments(argv)
    for place, word in enumerate(argv):
        if not word or word.startswith('--') and word.partition('=')[1:] == ('=', ''):
            after = f' after {argv[place - 1]}' if not word and place else f', {word}' if word else ''
            _complain(f'An argument must not be empty, got one{after}. Is a shell variable not set?', prog)
            return 2
    if argv and argv[0] in _MODULES:
        with needs_extra('train'):
            module = import_module(f'.{_MODULES[argv[0]][0]}', __package__)
        return cast(int, module.main(argv[1:], prog=prog))
    parser = _build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # reported by the subcommand, with its own usage
        getattr(args, 'parser', parser).error(f'unrecognized arguments: {" ".join(unknown)}')
    if 'function' not in args:
        parser.print_help()
        return 0
    if args.function is _run:
        args.args = own
    return cast(int, args.function(args))


def main(argv: Sequence[str] | None = None, script: str = '') -> int:
    """Run the command line.

    Args:
        argv: The command and its arguments; None for those of the process.
        script: Name of the script that runs this, such as train.py, for messages; '' for the command line.

    Returns:
        The exit code.
    """
    words = sys.argv[1:] if argv is None else argv
    prog = script or ' '.join(['timm-geoprior', *(word for word in words[:1] if word in _MODULES)])
    for stream in (sys.stdout, sys.stderr):  # a file name may have characters that it cannot encode
        cast(TextIOWrapper, stream).reconfigure(errors='backslashreplace')
    try:
        try:
            with enough_memory('Use smaller images, a smaller batch, or another device.'):
                return _dispatch(words, prog)
        finally:
            sys.stdout.flush()  # a closed pipe raises here, where it is handled, and not at exit
    except GeoPriorError as error:
        _complain(message_of(error), prog)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _drop_output()
        return 141
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            _complain(f'A file name must be shorter, got {error.filename}. Shorten it.', prog)
            return 1
        if isinstance(error, PermissionError) and error.filename is not None:
            _complain(f'{error.filename} cannot be accessed ({error.strerror}). Check its permissions and those of its '
                      f'folders.', prog)
            return 1
        if not disk_is_full(error):
            raise
        _drop_output()
        _complain(f'The output cannot be written ({error.strerror}). Free some space.', prog)
        return 1


def _drop_output() -> None:
    """Discard what could not be printed, since Python would complain when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
