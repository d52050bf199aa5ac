"""The network to evaluate: a tag of the manifest, any model of timm, or a checkpoint."""
import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import list_models
from torch import Tensor, nn

from ..errors import EvaluationError, WeightsError
from ..files import file_sha256, first_line
from ..pretrained.manifest import LabelSet, ModelEntry, load_manifest
from ..training.checkpoint import SavedModel, read_weights, strip_prefix


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights."""
    model: nn.Module  # in eval mode, on the CPU, float32
    name: str  # its name in timm
    wnids: tuple[str, ...]  # WordNet ids (or folder names) of its classes, in order; empty if unknown
    names: tuple[str, ...]  # readable names of its classes, in order; empty if unknown
    entry: ModelEntry | None  # the manifest's, if the name is one of its tags
    weights: dict[str, Any]  # where the weights came from, and their hashes
    img_size: int | None = None  # side of the images that a training run was evaluated on, in pixels
    notes: tuple[str, ...] = ()  # messages for the user, one sentence each
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)  # its options


def load_model(
        name: str | None = None,
        checkpoint: Path | None = None,
        weights: Literal['auto', 'ema', 'raw'] = 'auto',
        num_classes: int | None = None,
        in_chans: int = 3,
        model_kwargs: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Make a model and load its weights.

    Args:
        name: A model of timm, with or without a tag; None takes the one that the checkpoint names.
        checkpoint: Weights, read as data: a checkpoint of scripts/train.py or of timm, a state dict, or safetensors.
            None takes the model's pretrained ones.
        weights: Which weights of the checkpoint to take, as for `read_weights`.
        num_classes: Number of classes; None takes the checkpoint's or the model's own.
        in_chans: Channels of the images.
        model_kwargs: Keyword options of the model.

    Raises:
        EvaluationError: The model is unknown, has no weights, or they do not fit it.
        GeoPriorError: The checkpoint cannot be read.
        WeightsError: A tag's weights are unavailable, or are not those of the manifest.
    """
    saved = read_weights(checkpoint, weights) if checkpoint is not None else None
    name = name or (saved.model_name if saved else None)
    if not name:
        raise EvaluationError(f'{checkpoint} does not name its architecture. Name it with --model.')
    if num_classes is None and saved:
        num_classes = saved.num_classes or len(saved.class_names) or None
    options = {**(saved.model_kwargs if saved else {}), **(model_kwargs or {})}
    kwargs = {str(key): value for key, value in options.items()}  # a checkpoint may hold any keys
    if num_classes is not None:
        kwargs['num_classes'] = num_classes
    if in_chans != 3:
        kwargs['in_chans'] = in_chans
    model = _create(name, pretrained=saved is None, **kwargs)
    entry = load_manifest().find(name)
    source: dict[str, Any] = {'pretrained': entry.name if entry else name}
    if entry:
        source['sha256'] = entry.sha256
    notes: list[str] = []
    if saved and checkpoint:
        source = {'checkpoint': str(checkpoint), 'sha256': file_sha256(checkpoint), 'averaged': saved.averaged}
        notes += [saved.note] if saved.note else []
        state_dict, prefix = strip_prefix(saved.state_dict, model.state_dict().keys())
        notes += [f'{checkpoint}: the weights below {prefix!r} are used.'] if prefix else []
        _load_into(model, state_dict, name, str(checkpoint))
    source['state_dict_sha256'] = state_dict_sha256(model)
    wnids, names = _class_names(model, entry, saved)
    if not wnids:
        wnids, names = _imagenet_names(model)
        if wnids and (saved or ':' in name):  # timm's own tags are for ImageNet
            notes.append(f'{checkpoint or name} does not name its {len(wnids):,} classes: they are assumed to be '
                         f'those of ImageNet.')
    return LoadedModel(
        model.eval(), name, wnids, names, entry, source, saved.img_size if saved else None, tuple(notes),
        options)


def check_source(name: str) -> None:
    """Refuse a model that does not exist or has no pretrained weights, before any image is read."""
    if ':' in name:  # reported when local-dir: and hf-hub: are loaded
        return
    if not timm.is_model(name.split('.')[0]):
        raise EvaluationError(f'Unknown model {name}.{_similar(name)} Check the name.')
    entry, cfg = load_manifest().find(name), find_cfg(name)
    if entry is not None and not entry.has_weights or cfg is not None and not cfg.has_weights:
        raise EvaluationError(f'{name} has no weights yet. Name a file of weights with --checkpoint, or another model: '
                              f'`timm-geoprior list` shows those that have some.')


def find_cfg(name: str) -> Any:
    """timm's configuration of a model's weights, None if it has none.

    Raises:
        EvaluationError: The model has no such tag.
    """
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise EvaluationError(f'The model must have a tag that timm knows, got {name} ({first_line(error)}). '
                              f'timm.list_pretrained({name.split(".")[0] + "*"!r}) lists the known ones.') from None


def _similar(name: str) -> str:
    close = difflib.get_close_matches(name.split('.')[0], list_models(), 1)
    return f' Did you mean {close[0]}?' if close else ''


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
    except WeightsError:  # its message says what to do
        raise
    except Exception as error:  # timm raises whatever the model's constructor does
        hint = _similar(name) if 'Unknown model' in str(error) else ''
        options = ' and its options' if kwargs else ''
        raise EvaluationError(
            f'The model {name} cannot be created ({first_line(error)}).{hint} Check the name{options}.') from error
    return model


def _load_into(model: nn.Module, state_dict: dict[str, Tensor], name: str, source: str) -> None:
    for key, own in model.state_dict().items():
        kind = state_dict[key].dtype if key in state_dict else own.dtype
        if own.dtype.is_floating_point and not kind.is_floating_point:
            raise EvaluationError(f'The weights in {source} must be floating-point numbers, got {kind} in {key}. Save '
                                  f'them as float32.')
    try:
        model.load_state_dict(state_dict)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise EvaluationError(f"The weights in {source} do not fit {name} ({first_line(error)}). Check the model's "
                              f'name, its number of classes and its options.') from None


def _class_names(
        model: nn.Module,
        entry: ModelEntry | None,
        saved: SavedModel | None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """WordNet ids and readable names of a model's classes, as far as they are known."""
    num_classes = int(getattr(model, 'num_classes', 0))
    label_sets = load_manifest().label_sets
    # the checkpoint comes first: its classes may differ from those of the tag that names its architecture
    if saved and saved.class_names:
        same = [labels for labels in label_sets.values() if labels.wnids == saved.class_names]
        return saved.class_names, same[0].names if same else ()
    labels: LabelSet | None = label_sets.get(entry.label_set) if entry else None
    if labels and labels.num_classes == num_classes:
        return labels.wnids, labels.names
    cfg = getattr(model, 'pretrained_cfg', {})
    if num_classes and len(cfg.get('label_names') or ()) == num_classes:
        names = tuple(cfg['label_names'])
        for known in label_sets.values():  # a downloaded folder has only readable names
            if known.names == names:
                return known.wnids, names
        described = cfg.get('label_descriptions') or {}
        return names, tuple(described.get(name, name) for name in names) if isinstance(described, dict) else ()
    return (), ()


def _imagenet_names(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the subset of ImageNet with as many classes; most of timm's configurations have no names."""
    subset = infer_imagenet_subset({'num_classes': int(getattr(model, 'num_classes', 0))})
    if subset is None:
        return (), ()
    info = ImageNetInfo(subset)
    return tuple(info.label_names()), tuple(info.label_descriptions())


def with_channels(config: dict[str, Any], channels: int) -> dict[str, Any]:
    """timm's preprocessing for this many channels: a mean or std that does not fit is averaged over the colours."""
    fitting = {key: config[key] if len(config[key]) in (1, channels) else (sum(config[key]) / len(config[key]),)
               for key in ('mean', 'std')}
    return {**config, **fitting}


def state_dict_sha256(model: nn.Module) -> str:
    """A hash of a model's weights, whatever file they are from: names, types, shapes and values, in the model's order.

    The same weights as .pt and as .safetensors are different files, but have the same hash.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
