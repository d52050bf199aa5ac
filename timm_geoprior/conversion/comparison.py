"""Comparison of a converted network with its source, on images held out from the conversion."""
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.dataset import DataSplit
from ..errors import ClassMismatchError
from ..evaluation.classes import match_classes
from ..evaluation.metrics import target_ranks
from ..evaluation.models import LoadedModel


def class_indices(data: DataSplit, loaded: LoadedModel) -> Tensor:
    """The network's class for each label of the data, matched by WordNet id or else by readable name.

    Args:
        data: The data set.
        loaded: The network.

    Returns:
        Class indices, shape (labels,), -1 for a class that the network does not have.
    """
    try:
        match = match_classes(data.classes, loaded.wnids, loaded.names, len(loaded.wnids), subset=True)
    except ClassMismatchError:  # they have none in common
        return torch.full((max(len(data.classes), 1),), -1)
    return torch.from_numpy(match.to_model)


@torch.inference_mode()
def compare(source: Any, converted: Any, batches: Iterable[tuple[Tensor, Tensor]], answers: Tensor) -> dict[str, Any]:
    """Compare two timm ResNets.

    Args:
        source: The first network, in eval mode.
        converted: The other one, on the same device.
        batches: Images, (N, C, H, W), and labels, (N,), -1 for none.
        answers: Class index of each label, -1 for none.

    Returns:
        `images`, their number; `feature_error`, the distance between the pooled features as a share of the source's
        norm; with a classifier, `agree`, the number of images with the same top-1 prediction, and `divergence`, the
        mean Kullback-Leibler divergence from the source's probabilities in nats; if any images have a known class,
        `labelled`, their number, and `source_correct` and `correct`, how many of these each network classifies
        correctly.
    """
    device = next(source.parameters()).device
    sums: dict[str, float] = dict.fromkeys(
        ('images', 'missed', 'energy', 'agree', 'divergence', 'labelled', 'source_correct', 'correct'), 0)
    for batch, labels in batches:
        batch = batch.to(device, memory_format=torch.channels_last)
        old, new = (network.forward_head(network.forward_features(batch), pre_logits=True)
                    for network in (source, converted))
        _add(sums, images=len(batch), missed=(new - old).square().sum(), energy=old.square().sum())
        if source.num_classes:
            old, new = source.fc(old).float(), converted.fc(new).float()
            targets = torch.where(labels < 0, -1, answers[labels]).to(device)
            known = targets >= 0
            _add(sums, agree=(old.argmax(1) == new.argmax(1)).sum(), labelled=known.sum(),
                 divergence=F.kl_div(new.log_softmax(1), old.log_softmax(1), reduction='sum', log_target=True),
                 source_correct=(target_ranks(old[known], targets[known]) < 1).sum(),
                 correct=(target_ranks(new[known], targets[known]) < 1).sum())
    images = int(sums['images'])
    found: dict[str, Any] = {
        'images': images, 'feature_error': (sums['missed'] / sums['energy']) ** 0.5 if sums['energy'] else 0.0}
    if source.num_classes and images:
        found.update(agree=int(sums['agree']), divergence=max(sums['divergence'], 0) / images)
        if sums['labelled']:
            found.update({key: int(sums[key]) for key in ('labelled', 'source_correct', 'correct')})
    return found


def _add(sums: dict[str, float], **values: Tensor | int) -> None:
    for name, value in values.items():
        sums[name] += float(value)
