"""What `timm-geoprior convert` does: turn a trained ResNet into a folder that timm loads."""
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.models import save_for_hf
from torch import nn

from ..data.dataset import fingerprint
from ..distributed import find_device
from ..errors import GeoPriorError, write_advice
from ..evaluation.models import LoadedModel, load_model, with_channels
from ..files import file_sha256, first_line, first_sentence, new_folder, write_json
from ..geoprior_resnet import GeoPriorResNet
from ..progress import Progress, handled_signals, tell
from ..provenance import git_commit, hardware, versions
from ..release.staging import export_weights
from ..training.checkpoint import read_weights
from .comparison import class_indices, compare
from .images import ImageSets, PreparedImages, draw_images
from .mirror import Mirror, mirror
from .readme import readme
from .regression import PARTS, FittedLayer, activation_bytes, refine
from .state_dict import attention_blocks, checkpoint_filter_fn, fit_blocks, on_one_thread

BATCH_SIZE = 32
WEIGHTS = 'model.safetensors'
CHECKPOINTS = ('.pt', '.pth', '.bin', '.safetensors', '.tar', '.ckpt')
# entries of a pretrained_cfg that are left out: where the source's weights are, and what is at config.json's root
_LEFT_OUT = ('url', 'file', 'hf_hub_id', 'hf_hub_filename', 'source', 'state_dict', 'label_names', 'label_descriptions',
             'architecture', 'custom_load', 'tag')


@dataclass(frozen=True)
class ConvertJob:
    """What to convert, and where to write it."""
    source: str  # any model name that timm loads with weights, or the path of a checkpoint
    output: Path  # folder to write; must be new or empty
    images: Path | None = None  # folder of images to fit to; None for the closed form
    model: str | None = None  # the architecture of a checkpoint that does not name its own
    limit: int = 1000  # largest number of images to fit to
    half: bool = False  # write float16 weights; vectors stay float32
    device: str = 'cpu'  # where the networks run
    workers: int = 2  # worker processes for decoding images
    tell: Callable[[str], None] = tell  # called with each message for the user


def convert(job: ConvertJob) -> dict[str, Any]:
    """Convert a trained ResNet and write the GeoPrior ResNet to a folder.

    Args:
        job: What to convert, and where to write it.

    Returns:
        The content of results.json.

    Raises:
        GeoPriorError: The source, the images or the output folder cannot be used; the folder is not written.
    """
    output = _check_output(job.output)
    if job.workers < 0:
        raise GeoPriorError(f'--workers must be 0 or more, got {job.workers}.')
    device, _, _ = find_device(job.device)
    sets = draw_images(job.images, job.limit) if job.images else None
    started = time.perf_counter()
    loaded = _load_source(job)
    made = mirror(loaded.model, loaded.name)
    config = _data_config(loaded)
    if sets and made.in_chans not in (1, 3):
        raise GeoPriorError(f'--images must be left out for a network of {made.in_chans} channels, got '
                            f'{job.images}: images have 1 or 3.')
    model = made.create(pretrained_cfg_overlay={'input_size': config['input_size']}).eval()
    model.load_state_dict(checkpoint_filter_fn(loaded.model.state_dict(), model))
    for network in (loaded.model, model):
        network.to(device).to(memory_format=torch.channels_last)
    layers = ([asdict(layer) for layer in _fit(job, sets, loaded.model, model, config)] if sets
              else _closed_form_layers(loaded.model, model))
    results = {
        'source': _origin(loaded), 'architecture': made.architecture, 'model_args': made.model_args,
        'parameters': sum(p.numel() for p in model.parameters()), 'half': job.half, 'layers': layers,
        'commit': git_commit(), 'software': versions(), 'hardware': hardware(device)}
    with _new_folder(job.output, output) as folder:
        _write_model(job, loaded, made, model, config, folder)
        if sets:
            results['measured'] = _measure(job, sets, loaded, folder, config)
            results['images'] = _images(job, sets)
        results['seconds'] = round(time.perf_counter() - started, 1)
        write_json(folder / 'results.json', results)
        text = readme(results, output.name)
        (folder / 'README.md').write_text(text, encoding='utf-8', errors='backslashreplace')
    return results


# -- input -------------------------------------------------------------------------------------------------------------

def _check_output(output: Path) -> Path:
    """Check that the folder can be made; returns its path with links resolved."""
    try:
        place = output.resolve()
        if str(place).encode(errors='replace') != os.fsencode(place):
            raise GeoPriorError(f'{output} must be a path in UTF-8, since safetensors cannot open any other. Name '
                                f'another with --output.')
        if got := _obstacle(place):
            raise GeoPriorError(f'{output} must be a new or an empty folder, got {got}. Name another with --output.')
        parent = next(parent for parent in place.parents if parent.exists())
    except OSError as error:
        raise GeoPriorError(f'{output} must be a folder that can be made, got an error ({first_line(error)}). Name '
                            f'another with --output.') from None
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise GeoPriorError(f'{output} must be a folder that can be made, got {parent} above it, which is '
                            f'{"not writable" if parent.is_dir() else "a file"}. Name another with --output.')
    return place


def _obstacle(place: Path) -> str:
    """What is in the way of the new folder, in words; '' if nothing is."""
    if not place.exists():
        return ''
    if not place.is_dir():
        return 'a file'
    if any(place.iterdir()):
        return 'one that is not empty'
    # neither can be replaced by another folder
    return 'the current one' if place == Path.cwd() else 'a mount point' if os.path.ismount(place) else ''


def _load_source(job: ConvertJob) -> LoadedModel:
    if not job.source:
        raise GeoPriorError('SOURCE must be a name that timm loads, or a checkpoint, got an empty one.')
    path = Path(job.source)
    named = ':' not in job.source and (path.suffix in CHECKPOINTS or len(path.parts) > 1)
    if job.model or named or os.path.isfile(path):
        loaded = load_model(job.model, path, num_classes=_num_classes(path))
    else:
        loaded = load_model(job.source)
    for note in loaded.notes:
        job.tell(note)
    return loaded


def _num_classes(path: Path) -> int:
    """Number of classes that a checkpoint states, else that of its classifier, 0 without one."""
    saved = read_weights(path)
    heads = [len(tensor) for name, tensor in saved.state_dict.items() if name.split('.')[-2:] == ['fc', 'weight']]
    return saved.num_classes or (heads[0] if heads else 0)


def _cfg(loaded: LoadedModel) -> dict[str, Any]:
    cfg: Any = loaded.model.pretrained_cfg
    # these describe other weights than the checkpoint's
    left_out = ('hf_hub_id', 'hf_hub_filename', 'license', 'tag') if 'checkpoint' in loaded.weights else ()
    return {key: value for key, value in cfg.items() if key not in left_out}


def _data_config(loaded: LoadedModel) -> dict[str, Any]:
    """timm's data config for the source, with the image size that a training checkpoint was evaluated at."""
    config: dict[str, Any] = resolve_data_config(pretrained_cfg=_cfg(loaded))
    model: Any = loaded.model
    size = (loaded.img_size,) * 2 if loaded.img_size else config['input_size'][1:]
    config['input_size'] = (model.in_chans, *size)
    return with_channels(config, model.in_chans)


def _origin(loaded: LoadedModel) -> dict[str, Any]:
    """Where the weights come from; for a file from the Hub, with its revision and SHA-256."""
    cfg = _cfg(loaded)
    found: dict[str, Any] = {
        'name': loaded.name, 'parameters': sum(p.numel() for p in loaded.model.parameters()),
        'license': cfg.get('license'), **loaded.weights}
    repository, _, revision = str(cfg.get('hf_hub_id') or '').partition('@')
    names = [cfg['hf_hub_filename']] if cfg.get('hf_hub_filename') else ['model.safetensors', 'pytorch_model.bin']
    for name in names if repository else ():
        file = try_to_load_from_cache(repository, name, revision=revision or None)
        if isinstance(file, str):
            return {**found, 'hub_id': repository, 'file': name, 'revision': Path(file).parent.name,
                    'sha256': file_sha256(Path(file))}
    return found


# -- fitting -----------------------------------------------------------------------------------------------------------

def _fit(
        job: ConvertJob, sets: ImageSets, source: nn.Module, model: GeoPriorResNet, config: dict[str, Any],
) -> list[FittedLayer]:
    """Fit the network to the images, with a progress bar over the layers."""
    size = min(BATCH_SIZE, max(len(sets.fit) // PARTS, 1))
    images = PreparedImages(sets, sets.fit, config, size, job.workers)
    disk = len(sets.fit) * activation_bytes(model, config['input_size'])
    job.tell(f'Fitting to {len(sets.fit):,} images at {config["input_size"][-1]} px, with temporary files of '
             f'{disk / 1e6:,.0f} MB in {tempfile.gettempdir()}; {len(sets.held_out):,} further images are held out.')
    with Progress('converting', len(list(attention_blocks(model))), 'layers') as progress:
        return refine(source, model, (batch for batch, _ in images), len(images), size, lambda _: progress.update())


@on_one_thread
def _closed_form_layers(source: nn.Module, model: GeoPriorResNet) -> list[dict[str, Any]]:
    """What the closed form chose, and what it loses under its model of the inputs."""
    return [{'name': item.prefix.rstrip('.'), 'value_dim': item.value_dim, 'radius': fit.radii[0],
             'lost': float(fit.errors.mean())} for item, _, fit in fit_blocks(source.state_dict(), model)]


def _images(job: ConvertJob, sets: ImageSets) -> dict[str, Any]:
    """Counts and fingerprints of the images, for others to compare theirs with."""
    if sets.unreadable:
        job.tell(f'{len(sets.unreadable)} of {len(sets.fit) + len(sets.held_out):,} images could not be read and were '
                 f'left out, such as {min(sets.unreadable)}.')
    found: dict[str, Any] = {}
    for name, indices in (('fit', sets.fit), ('held_out', sets.held_out)):
        read = sum(sets.data.name_of(index) not in sets.unreadable for index in indices.tolist())
        found[name] = {'images': read, **fingerprint(sets.data, indices)}
    return {**found, 'unreadable': sorted(sets.unreadable)}


# -- output ------------------------------------------------------------------------------------------------------------

@contextmanager
def _new_folder(output: Path, place: Path) -> Iterator[Path]:
    """A folder that is moved into place only when complete; SIGTERM and Ctrl-C leave no part of it."""
    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    try:
        with handled_signals(leave, signal.SIGTERM), new_folder(place) as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        raise GeoPriorError(f'{output} could not be written ({first_line(error)}). {write_advice(error)}, or name '
                            f'another folder with --output.') from error


def _write_model(
        job: ConvertJob, loaded: LoadedModel, made: Mirror, model: GeoPriorResNet, config: dict[str, Any], folder: Path,
) -> None:
    """Write model.safetensors and config.json."""
    cfg = _cfg(loaded)
    tag = cfg.get('tag')
    model.pretrained_cfg = {  # type: ignore[assignment]
        **{key: value for key, value in cfg.items() if key not in _LEFT_OUT},
        **{key: config[key] for key in ('input_size', 'mean', 'std')}, 'architecture': made.architecture,
        'custom_load': False, 'tag': f'from_{tag}' if tag else 'converted'}
    labels: dict[str, Any] = {'label_names': list(loaded.wnids)} if loaded.wnids else {}
    if loaded.names:
        labels['label_descriptions'] = dict(zip(loaded.wnids, loaded.names, strict=True))
    model.cpu().to(memory_format=torch.contiguous_format)  # safetensors requires it
    save_for_hf(model, str(folder), model_config=labels, safe_serialization=True)
    if job.half:
        try:
            export_weights(model.state_dict(), folder / WEIGHTS, {})
        except GeoPriorError as error:  # without its advice, which is about training
            raise GeoPriorError(f'{first_sentence(error)}. Leave out --half.') from None
    (folder / WEIGHTS).chmod(0o644)  # safetensors makes it readable by its owner only
    config_file = folder / 'config.json'
    # without the root entries that timm repeats here, which transformers rejects among the options
    options = {**made.model_args, **({'in_chans': made.in_chans} if made.in_chans != 3 else {}),
               **({'global_pool': made.global_pool} if made.global_pool != 'avg' else {})}
    write_json(config_file, {**json.loads(config_file.read_text()), 'model_args': options})


def _measure(
        job: ConvertJob, sets: ImageSets, loaded: LoadedModel, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Compare the written folder, as timm loads it, with the source on the held-out images."""
    converted: nn.Module = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    converted.to(next(loaded.model.parameters()).device).to(memory_format=torch.channels_last)
    batches = PreparedImages(sets, sets.held_out, config, BATCH_SIZE, job.workers)
    return compare(loaded.model, converted, batches, class_indices(sets.data, loaded))
