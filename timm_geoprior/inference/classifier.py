"""A trained network as a user of pictures wants it: a picture in, names and probabilities out."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from ..errors import GeoPriorError
from ..pretrained.manifest import load_manifest

__all__ = ['Classifier', 'load_classifier']


@dataclass(frozen=True)
class Classifier:
    """A network with what it needs to name what is in a picture.

    Attributes:
        name: Its name, as it was loaded by.
        model: In eval mode.
        transform: Makes a picture in mode 'RGB' what the network takes, (3, height, width).
        classes: Label and readable name of each class.
    """
    name: str
    model: nn.Module
    transform: Callable[[Image.Image], Tensor]
    classes: tuple[tuple[str, str], ...]

    @torch.inference_mode()
    def __call__(self, image: Image.Image, top_k: int = 5) -> list[dict[str, Any]]:
        """The most probable classes of a picture, best first, each with `label`, `name` and `probability`."""
        logits = self.model(self.transform(image)[None])[0]
        probabilities, indices = logits.softmax(-1).topk(min(top_k, len(self.classes)))
        return [
            {'label': self.classes[index][0], 'name': self.classes[index][1], 'probability': probability}
            for index, probability in zip(indices.tolist(), probabilities.tolist(), strict=True)]


def load_classifier(name: str) -> Classifier:
    """Load a tag of the manifest, or a folder that was fine-tuned, staged or downloaded.

    Args:
        name: A tag, an architecture for its default tag, or `local-dir:` and a folder.

    Returns:
        The classifier.

    Raises:
        GeoPriorError: The folder holds no model that timm can load.
        ManifestError: No such tag.
        WeightsError: The tag has no weights, or they cannot be had.
    """
    if name.startswith('local-dir:'):
        return _load_folder(name)
    manifest = load_manifest()
    entry = manifest.get(name)
    label_set = manifest.label_sets[entry.label_set]
    model = timm.create_model(entry.name, pretrained=True).eval()
    return Classifier(
        entry.name, model, create_transform(**resolve_model_data_config(model)),
        tuple(zip(label_set.wnids, label_set.names, strict=True)))


def _load_folder(name: str) -> Classifier:
    try:
        model: Any = timm.create_model(name, pretrained=True).eval()
    except Exception as error:  # timm, json and safetensors raise half a dozen types for a wrong folder
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise GeoPriorError(
            f'{name} cannot be loaded ({reason}), expected a folder with config.json and model.safetensors, as '
            f'`finetune` and `download` make them.') from error
    labels = model.pretrained_cfg.get('label_names') or [str(index) for index in range(model.num_classes)]
    described = model.pretrained_cfg.get('label_descriptions') or {}
    return Classifier(
        name, model, create_transform(**resolve_model_data_config(model)),
        tuple((label, described.get(label, label)) for label in labels))
