"""The network to evaluate: a tag of the manifest, any model of timm, or a checkpoint."""
import argparse
import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import clean_state_dict, list_models, load_state_dict
from torch import Tensor, nn

from ..errors import EvaluationError
from ..pretrained.loading import WeightsError
from ..pretrained.manifest import LabelSet, ModelEntry, load_manifest

__all__ = ['Checkpoint', 'LoadedModel', 'load_model', 'read_checkpoint', 'state_dict_sha256']


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights.

    Attributes:
        model: In eval mode, on the CPU, float32.
        name: timm's name of it.
        wnids: WordNet ids (or folder names) of its classes, in order; empty where not known.
        names: Readable names of its classes, in order; empty where not known.
        entry: The manifest's entry, if the name is one of its tags.
        weights: Where the weights came from and their hashes.
        img_size: Side of the images that a training checkpoint was measured with, in pixels.
        notes: What a person should know about it, a sentence each.
    """
    model: nn.Module
    name: str
    wnids: tuple[str, ...]
    names: tuple[str, ...]
    entry: ModelEntry | None
    weights: dict[str, Any]
    img_size: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file says beside its tensors; all of it is empty in a bare state dict."""
    state_dict: dict[str, Tensor]
    name: str | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    wnids: tuple[str, ...] = ()
    img_size: int | None = None
    has_unused_average: bool = False


def load_model(
        name: str | None = None,
        checkpoint: Path | None = None,
        use_ema: bool = False,
        num_classes: int | None = None,
        in_chans: int = 3,
        model_kwargs: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Make a model and load its weights.

    Args:
        name: A model of timm, with or without a tag; None takes what the checkpoint names.
        checkpoint: Weights, read as data: a checkpoint of scripts/train.py or of timm, a state dict, or safetensors.
            None takes the model's pretrained ones.
        use_ema: Take the checkpoint's averaged weights.
        num_classes: Number of classes, where it is not the model's or the checkpoint's own.
        in_chans: Channels of the images.
        model_kwargs: Keyword options of the model.

    Returns:
        The model.

    Raises:
        EvaluationError: The model is unknown, has no weights, or they do not fit it.
        WeightsError: A tag's weights cannot be had as the manifest has them.
    """
    saved = read_checkpoint(checkpoint, use_ema) if checkpoint is not None else None
    name = name or (saved.name if saved else None)
    if name is None:
        raise EvaluationError(f'{checkpoint} does not name its architecture, expected one: name it by --model.')
    if num_classes is None and saved:
        num_classes = saved.num_classes
    kwargs = {**(saved.model_kwargs if saved and saved.name else {}), **(model_kwargs or {})}
    if num_classes is not None:
        kwargs['num_classes'] = num_classes
    if in_chans != 3:
        kwargs['in_chans'] = in_chans
    model = _create(name, pretrained=saved is None, **kwargs)
    entry = _manifest_entry(name)
    weights: dict[str, Any] = {'checkpoint': str(checkpoint), 'sha256': _file_sha256(checkpoint)} if checkpoint else {
        'pretrained': entry.name if entry else name, **({'sha256': entry.sha256} if entry else {})}
    if saved:
        _load_into(model, saved.state_dict, name, str(checkpoint))
    weights['state_dict_sha256'] = state_dict_sha256(model)
    wnids, names = _class_names(model, entry, saved)
    notes = (f'{checkpoint} also holds averaged weights, which are not measured: --use-ema takes them.',)
    return LoadedModel(model.eval(), name, wnids, names, entry, weights, saved.img_size if saved else None,
                       notes if saved and saved.has_unused_average else ())


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
    except WeightsError:
        raise
    except Exception as error:  # timm raises whatever the model's own constructor does
        close = difflib.get_close_matches(name.split('.')[0], list_models(), 1)
        hint = f', like {close[0]}' if 'Unknown model' in str(error) and close else ''
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EvaluationError(f'The model {name} cannot be made ({reason}), expected a model of timm{hint}'
                              f'{" that has weights" if pretrained else ""}: check --model.') from error
    return model


def read_checkpoint(path: Path, use_ema: bool = False) -> Checkpoint:
    """Read a checkpoint of scripts/train.py or of timm, a state dict, or safetensors, as data: no pickled code is run.

    Raises:
        EvaluationError: There is none, it is damaged, or it holds no averaged weights where they are asked for.
    """
    if not path.is_file():
        raise EvaluationError(f'{path} does not exist, expected a checkpoint file: check its path.')
    try:
        if path.suffix == '.safetensors':
            content = load_state_dict(str(path))
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # what timm's own checkpoints hold
                content = torch.load(path, map_location='cpu', weights_only=True)
        averaged = any(content.get(key) is not None for key in ('ema', 'state_dict_ema', 'model_ema'))
        if use_ema and not averaged:
            raise EvaluationError(f'{path} holds no averaged weights, expected some for --use-ema: leave it out.')
        if 'model_name' in content:
            return _own_checkpoint(content, use_ema)
        state_dict = load_state_dict(str(path), use_ema=use_ema, weights_only=True)
    except EvaluationError:
        raise
    except Exception as error:  # torch and safetensors raise half a dozen types for a damaged file
        reason = str(error).splitlines()[0].split('. ')[0] if str(error) else type(error).__name__
        raise EvaluationError(f'{path} cannot be read as a checkpoint ({reason}), expected tensors and plain '
                              f'containers: it is damaged or of another kind.') from None
    return Checkpoint(state_dict, has_unused_average=averaged and not use_ema)


def _own_checkpoint(content: Mapping[str, Any], use_ema: bool) -> Checkpoint:
    """What scripts/train.py has saved."""
    averaged = content.get('ema') is not None
    recipe = content.get('recipe') or {}
    return Checkpoint(
        clean_state_dict(content['ema' if use_ema else 'model']), content['model_name'],
        dict(content.get('model_kwargs') or {}), content.get('num_classes'), tuple(content.get('class_names') or ()),
        recipe.get('eval_size') or recipe.get('img_size'), averaged and not use_ema)


def _load_into(model: nn.Module, state_dict: dict[str, Tensor], name: str, source: str) -> None:
    try:
        model.load_state_dict(state_dict)
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise EvaluationError(f'The weights in {source} do not fit {name} ({" ".join(lines[:2])[:300]}), expected its '
                              f'own: check --model, --num-classes and --model-kwargs.') from None


def _manifest_entry(name: str) -> ModelEntry | None:
    models = load_manifest().models
    return next((entry for entry in models.values()
                 if name == entry.name or (name == entry.architecture and entry.default)), None)


def _class_names(
        model: nn.Module,
        entry: ModelEntry | None,
        saved: Checkpoint | None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """WordNet ids and readable names of a model's classes, as far as anything tells them."""
    num_classes = int(getattr(model, 'num_classes', 0))
    label_sets = load_manifest().label_sets
    if saved and saved.wnids:
        same = [labels for labels in label_sets.values() if labels.wnids == saved.wnids]
        return saved.wnids, same[0].names if same else ()
    labels: LabelSet | None = label_sets[entry.label_set] if entry else None
    if labels and labels.num_classes == num_classes:
        return labels.wnids, labels.names
    cfg = getattr(model, 'pretrained_cfg', {})
    if len(cfg.get('label_names') or ()) == num_classes:
        names = tuple(cfg['label_names'])
        described = cfg.get('label_descriptions') or {}
        return names, tuple(described.get(name, name) for name in names) if isinstance(described, dict) else ()
    subset = infer_imagenet_subset({'num_classes': num_classes})
    if subset is None:
        return (), ()
    info = ImageNetInfo(subset)
    return tuple(info.label_names()), tuple(info.label_descriptions())


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(2 ** 20):
            digest.update(chunk)
    return digest.hexdigest()


def state_dict_sha256(model: nn.Module) -> str:
    """A hash of a model's weights wherever they came from: names, types, shapes and values, in the model's order."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
