"""From a checkpoint to a staged folder, which has the content of the Hub repository to be.

It holds the weights as released, golden outputs, config.json, the manifest's entry in results.json, a model
card and the run's log.
"""
import copy
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..conversion.state_dict import is_plain_resnet
from ..errors import GeoPriorError
from ..files import file_sha256, new_folder, write_atomically, write_json
from ..pretrained.cfgs import bundled_path, hub_config
from ..pretrained.loading import load_golden
from ..pretrained.manifest import (
    Baseline,
    Golden,
    Manifest,
    Metric,
    ModelEntry,
    TrainLog,
    load_manifest,
    parse_entry,
    to_json,
)
from ..pretrained.verify import GOLDEN_TOLERANCES, golden_error
from ..radii import learned_radii
from ..training.checkpoint import SavedModel, strip_prefix
from .cards import model_card, plot_radii

WEIGHTS, RESULTS, TRAIN_LOG, CURVES = 'model.safetensors', 'results.json', 'train_log.csv', 'curves.png'
STAGED = {WEIGHTS, RESULTS, TRAIN_LOG, CURVES, 'golden', 'config.json', 'README.md', 'radii.png'}
GOLDEN = 'golden/outputs.safetensors'  # a second such file next to the weights confuses timm up to 1.0.27

ROUNDING_TOLERANCE = 2e-2  # of the largest logit, for weights rounded to float16

# options that may be set in training without changing the architecture
TRAINING_OPTIONS = {'drop_rate', 'drop_path_rate', 'drop_block_rate', 'attn_radius', 'zero_init_last', 'num_classes'}


@dataclass(frozen=True)
class Evidence:
    """What a staged folder documents besides the weights."""
    # what `timm-geoprior validate` measured with the staged weights; None keeps the entry's figures
    results: Path | None = None
    # what it measured with the plain network of the same recipe; None keeps the entry's
    baseline: Path | None = None
    run: Path | None = None  # folder of the training run, for its log, its summary and its curves
    experiments: Sequence[Path] = ()  # Markdown files with further results for this architecture, for the model card


def release_tensors(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as released: float16, but float32 below two dimensions, so that radii and variances keep their digits."""
    released = {}
    for name, tensor in state_dict.items():
        dtype = torch.float32 if tensor.ndim < 2 else torch.float16
        copied = tensor.detach().cpu().to(dtype if tensor.is_floating_point() else tensor.dtype)
        if not copied.isfinite().all():
            raise GeoPriorError(f'The values of {name} must be finite as {dtype}, got some that are not. The training '
                                f'has diverged: take an earlier checkpoint, or train with a lower lr.')
        released[name] = copied.contiguous().clone()
    return released


def export_weights(state_dict: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> str:
    """Write weights as released, the same weights as the same bytes, and return the file's SHA-256."""
    content = save(release_tensors(state_dict), {'format': 'pt', **metadata})
    size = int.from_bytes(content[:8], 'little')
    header = json.loads(content[8:8 + size])
    # safetensors writes its metadata in random order
    header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
    # escapes would make a name like größe longer than it is in the file
    text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # the tensors begin at a multiple of eight bytes
    content = len(text).to_bytes(8, 'little') + text + content[8 + size:]
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


@torch.no_grad()
def golden_tensors(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, Tensor]:
    """A fixed input, smooth like a photograph, and the model's logits for it in float32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(2, input_size[0], 8, 8, generator=generator)
    smooth = nn.functional.interpolate(coarse, input_size[1:], mode='bicubic')
    noise = 0.2 * torch.randn(2, *input_size, generator=generator)
    images = (smooth + noise).half()  # halves the file, and every value is exact in float32 too
    return {'input': images, 'logits': model.eval()(images.float())}


def stage(entry: ModelEntry, checkpoint: SavedModel, folder: Path, evidence: Evidence | None = None) -> ModelEntry:
    """Write the folder that becomes the Hub repository.

    Args:
        entry: The manifest's entry: input, label set, licence, terms, recipe.
        checkpoint: The weights.
        folder: Where to write it; a folder staged there before is replaced, anything else is refused.
        evidence: Figures, the run's log, experiments.

    Returns:
        The entry with status 'staged', as in the folder's results.json.

    Raises:
        GeoPriorError: The tag is a converted one, the checkpoint is not of this architecture, the results are of other
            weights, the baseline is of other images or other preprocessing, the experiments cannot be read, or the
            folder is something else.
    """
    evidence = evidence or Evidence()
    run = evidence.run
    if entry.status == 'converted':
        raise GeoPriorError(f"{entry.name} must be a tag of the manifest's own, got one that is converted from "
                            f"timm's weights. Give yours a tag in weights_manifest.json.")
    folder = folder.resolve()
    _check_replaceable(folder)
    found = '\n\n'.join(map(_read_markdown, evidence.experiments))
    model = timm.create_model(entry.architecture, num_classes=entry.num_classes).eval()
    tensors, _ = strip_prefix(checkpoint.state_dict, model.state_dict().keys())
    checkpoint = replace(checkpoint, state_dict=tensors)
    _load_released(model, entry, checkpoint)
    described = _described(entry, checkpoint, run)
    with new_folder(folder) as new:
        staged = _write_weights(described, checkpoint, model, new)
        if entry.sha256 not in (None, staged.sha256):  # keep nothing that was measured or recorded of other weights
            described = replace(
                described, recipe_commit=checkpoint.commit, seed=checkpoint.seed, metrics=(), baseline=None,
                train_log=described.train_log if run else None)
            staged = _write_weights(described, checkpoint, model, new)
        if evidence.results:
            staged = replace(staged, metrics=read_metrics(evidence.results, staged))
        if evidence.baseline:
            staged = replace(staged, baseline=_read_baseline(evidence.baseline, staged))
        copied = _copy_logs(staged, run, new)
        write_json(new / 'config.json', hub_config(staged))
        (new / RESULTS).write_text(to_json({'name': staged.name, 'entry': staged}), encoding='utf-8')
        model_card(staged, load_manifest(), _recipe_text(staged, checkpoint), copied, found).save(new / 'README.md')
        plot_radii(learned_radii(model, staged.input.input_size), new / 'radii.png')
        check_loads(staged, new)
        shutil.rmtree(folder, ignore_errors=True)
    return staged


def _check_replaceable(folder: Path) -> None:
    """Check that there is nothing, or only what `stage` made: all of it will be deleted."""
    if folder.exists():
        try:
            is_staged = {'name', 'entry'} <= json.loads((folder / RESULTS).read_bytes()).keys()
        except (OSError, ValueError, AttributeError):
            is_staged = False
        others = sorted({path.name for path in folder.iterdir()} - STAGED) if is_staged else []
        if not is_staged or others or folder == Path.cwd():
            what = (f'one with {others[0]} in it' if others else 'the current one' if is_staged else
                    'not a staged folder')
            raise GeoPriorError(f'The output must be a new folder or one that was staged, got {folder}, which is '
                                f'{what}. Name another.')


def _described(entry: ModelEntry, checkpoint: SavedModel, run: Path | None) -> ModelEntry:
    """The entry with what the checkpoint and the run say about the training."""
    return replace(
        entry, recipe=checkpoint.recipe.get('name', entry.recipe),
        recipe_commit=checkpoint.commit or entry.recipe_commit,
        seed=checkpoint.seed if checkpoint.seed is not None else entry.seed,
        train_log=_train_log(run) if run else entry.train_log)


def _read_markdown(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8').strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'it is not UTF-8'
        raise GeoPriorError(f'{path} cannot be read ({reason}). Name a Markdown file.') from None


def _load_released(model: nn.Module, entry: ModelEntry, checkpoint: SavedModel) -> None:
    """Load the weights as released."""
    if checkpoint.model_name.partition('.')[0] not in ('', entry.architecture):
        raise GeoPriorError(f'The checkpoint for {entry.name} must be of {entry.architecture}, got one of '
                            f'{checkpoint.model_name}. Name another checkpoint or tag.')
    if options := set(checkpoint.model_kwargs) - TRAINING_OPTIONS:
        raise GeoPriorError(f"The checkpoint must be of {entry.architecture} as it is, since a tag's weights must fit "
                            f'the plain name, got one trained with {", ".join(sorted(options))}. Train without them.')
    if is_plain_resnet(checkpoint.state_dict, model):  # loading would convert it each time
        raise GeoPriorError(f"The checkpoint must be of {entry.architecture}, got a plain ResNet's weights. Convert "
                            f'them first: timm-geoprior convert CHECKPOINT --model NAME --output OUT.')
    tensors = release_tensors(checkpoint.state_dict)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise GeoPriorError(f'The checkpoint does not fit {entry.name}: {" ".join(str(error).split())}') from None


def _write_weights(entry: ModelEntry, checkpoint: SavedModel, model: nn.Module, folder: Path) -> ModelEntry:
    """Write weights and golden outputs; returns the entry that describes them."""
    metadata = {'architecture': entry.architecture, 'tag': entry.tag}
    metadata |= {key: value for key, value in (('recipe', entry.recipe), ('commit', entry.recipe_commit)) if value}
    sha256 = export_weights(checkpoint.state_dict, folder / WEIGHTS, metadata)
    released = entry.has_weights and entry.sha256 == sha256
    tensors = load_golden(entry) if released else golden_tensors(model, entry.input.input_size)
    trained = copy.deepcopy(model)
    trained.load_state_dict(checkpoint.state_dict)
    error = golden_error(trained, tensors)
    if not error <= ROUNDING_TOLERANCE:  # nan too
        raise GeoPriorError(f'float16 must change the logits by at most {ROUNDING_TOLERANCE:.0e} of the largest, got '
                            f'{error:.1e}. Train again with weight decay, or a lower lr.')
    golden = save(tensors)
    (folder / GOLDEN).parent.mkdir(exist_ok=True)
    write_atomically(folder / GOLDEN, golden)
    return replace(
        entry, status='staged', hub_id=None, revision=None, file=WEIGHTS, sha256=sha256,
        bytes=(folder / WEIGHTS).stat().st_size, dtype='float16',
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        golden=Golden(GOLDEN, hashlib.sha256(golden).hexdigest()))


def _copy_logs(entry: ModelEntry, run: Path | None, folder: Path) -> list[str]:
    """Copy the run's log and curves, or the log of the package's own weights; returns the names of those found."""
    logs = {}
    if run:
        logs = {TRAIN_LOG: run / 'summary.csv', CURVES: run / CURVES}
    elif entry.train_log:
        logs = {TRAIN_LOG: bundled_path(entry).with_suffix('.train_log.csv')}
    copied = [name for name, path in logs.items() if path.exists()]
    for name in copied:
        shutil.copyfile(logs[name], folder / name)
    return copied


def _recipe_text(entry: ModelEntry, checkpoint: SavedModel) -> str:
    """The recipe as it was run, else as the package ships it."""
    if checkpoint.recipe:
        return yaml.safe_dump(checkpoint.recipe, sort_keys=False, default_flow_style=None)
    shipped = Path(__file__).parents[1] / 'training' / 'recipes' / f'{entry.recipe}.yaml'
    return shipped.read_text(encoding='utf-8') if shipped.exists() else ''


def check_loads(entry: ModelEntry, folder: Path) -> None:
    """Raise GeoPriorError unless the folder, as timm opens it, gives the golden logits."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    error = golden_error(model, load_file(folder / GOLDEN))
    if not error <= GOLDEN_TOLERANCES['float32']:
        raise GeoPriorError(f'The logits of {entry.name} from {folder} must be within '
                            f'{GOLDEN_TOLERANCES["float32"]:.0e} of the golden ones, as a share of the largest, got '
                            f'{error:.1e}. Stage it again.')


def _measurements(path: Path, entry: ModelEntry) -> list[tuple[dict[str, Any], tuple[Metric, ...]]]:
    """What `timm-geoprior validate` measured: the description and the figures of each network."""
    dataset = load_manifest().label_sets[entry.label_set].title
    try:
        data = json.loads(path.read_text(encoding='utf-8'))
        measured = [(item, tuple(
            Metric(dataset, item['data']['split'], row['num_images'], row['top1_correct'], row['top5_correct'],
                   row['precision'], item['preprocessing']['input_size'][-1], item['software'])
            for row in item['results'])) for item in (data if isinstance(data, list) else [data])]
        if not measured or not all(metrics for _, metrics in measured):
            raise ValueError('it has no figures')
        if not all(isinstance(item.get(key, {}), dict) for item, _ in measured for key in ('weights', 'classes')):
            raise ValueError('its weights or classes are not described')
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise GeoPriorError(f'{path} must be a results file of `timm-geoprior validate` '
                            f'({type(error).__name__}: {error}). Write one with --results-file.') from None
    return measured


def read_metrics(path: Path, entry: ModelEntry, network: str = f'the staged {WEIGHTS}') -> tuple[Metric, ...]:
    """Read what `timm-geoprior validate` measured with an entry's weights, which messages call `network`."""
    for item, metrics in _measurements(path, entry):
        if item.get('weights', {}).get('sha256') == entry.sha256:
            if options := set(item.get('model_kwargs') or {}) - TRAINING_OPTIONS:
                raise GeoPriorError(f'{path} must be of {entry.name} as it is, got figures of it with '
                                    f'{", ".join(sorted(options))}. Measure {network} again without --model-kwargs.')
            _check_measured(path, item, entry, metrics[0].img_size, network)
            return metrics
    raise GeoPriorError(f'{path} must have figures of the weights with sha256 {entry.sha256}, got none. Measure '
                        f'{network} with `timm-geoprior validate`, then name its results.')


def _check_measured(path: Path, item: Mapping[str, Any], entry: ModelEntry, img_size: int, network: str) -> None:
    """Refuse figures of a part of the set, or of images that were preprocessed differently from the entry's.

    The size may differ: the figure records it.
    """
    part = list(item.get('problems', ()))
    if competing := item.get('classes', {}).get('competing'):
        part.append(f'{len(competing)} classes competed, not {entry.num_classes}')
    with_images = item.get('classes', {}).get('with_images')
    if with_images is not None and with_images < entry.num_classes:
        part.append(f'{with_images} of {entry.num_classes} classes have images')
    if part:
        raise GeoPriorError(f'{path} must be of all classes and images of the set, got a part '
                            f'({"; ".join(part).rstrip(".")}). Measure {network} again on all of them.')
    size = (entry.input.input_size[0], img_size, img_size)
    for key, value in json.loads(to_json(replace(entry.input, input_size=size))).items():
        got = item['preprocessing'].get(key)
        if got != value:
            words = ' '.join(map(str, value)) if isinstance(value, list) else value
            raise GeoPriorError(f'{key} in {path} must be that of {entry.name}, {words}, got {got}. Measure {network} '
                                f'again with --{key.replace("_", "-")} {words}.')


def _read_baseline(path: Path, entry: ModelEntry) -> Baseline:
    """The plain network's figure, on the same images as the entry's own, with the same preprocessing.

    timm's plain networks have other default crops and interpolations, which change figures as well.
    """
    (item, metrics), *_ = _measurements(path, entry)
    own = entry.metrics[0] if entry.metrics else None
    size = own.img_size if own else entry.input.input_size[-1]
    _check_measured(path, item, entry, size, 'the plain network')
    for metric in metrics:
        if not own or (metric.split, metric.num_images, metric.precision) == (
                own.split, own.num_images, own.precision):
            return Baseline(item['model'], item['parameters'], metric)
    measured = f'{own.num_images:,} images of {own.split} in {own.precision}' if own else 'any images'
    raise GeoPriorError(f'{path} must have a figure of {measured}, as {entry.name} has, got others. Measure the plain '
                        f'network by the same command.')


def _train_log(run: Path) -> TrainLog:
    try:
        results = json.loads((run / 'results.json').read_text(encoding='utf-8'))
        return TrainLog(results['epochs'], float(results['hours']), results['hardware'], results['versions'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GeoPriorError(f'{run} must hold the results.json of a finished run ({type(error).__name__}: {error}). '
                            f'Name a checkpoint in a folder that `timm-geoprior train` wrote.') from None


def read_staged(folder: Path, manifest: Manifest) -> ModelEntry:
    """Read the entry of a staged folder, and check its files against it."""
    try:
        data = json.loads((folder / RESULTS).read_text(encoding='utf-8'))
        entry = parse_entry(data['name'], data['entry'], manifest.label_sets)
        hashes = {WEIGHTS: entry.sha256, GOLDEN: entry.golden.sha256 if entry.golden else None}
        for name, wanted in hashes.items():
            if (got := file_sha256(folder / name)) != wanted:
                raise GeoPriorError(f'{folder / name} must have the sha256 {wanted}, got {got}. Stage it again.')
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GeoPriorError(f'{folder} must be a staged folder ({type(error).__name__}: {error}). Stage a checkpoint '
                            f'there first.') from None
    return entry
