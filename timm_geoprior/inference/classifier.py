"""Classification of pictures with a trained network: names and probabilities of their classes."""
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms import Compose, Grayscale

from ..data.reading import read_image
from ..errors import GeoPriorError, ImageError
from ..evaluation.models import find_cfg, load_model, with_channels

BATCH_SIZE = 32

Guesses = list[dict[str, Any]]


@dataclass(frozen=True)
class Classifier:
    """A network with everything that is needed to classify pictures."""
    name: str  # the name that it was loaded by
    model: nn.Module  # in eval mode
    # turns a picture in mode 'RGB' into the network's input, shape (3 or 1, height, width)
    transform: Callable[[Image.Image], Tensor]
    classes: tuple[tuple[str, str], ...]  # label and readable name of each class
    device: torch.device = torch.device('cpu')  # where the model runs
    notes: tuple[str, ...] = ()  # what the user should know about it, one sentence each

    def __call__(self, image: Image.Image, top_k: int = 5) -> Guesses:
        """The most probable classes of a picture, best first.

        Args:
            image: The picture, in mode 'RGB'.
            top_k: How many classes; all of them if there are fewer.

        Returns:
            For each class its `label`, its readable `name` and its `probability`.

        Examples:
            >>> from timm_geoprior.inference.classifier import load_classifier
            >>> from timm_geoprior.inference.inputs import sample_image
            >>> load_classifier('geoprior_resnet14_nano')(sample_image())[0]['name']
            'espresso'
        """
        return self._classify([self.transform(image)], top_k)[0]

    def files(self, paths: Sequence[str], top_k: int = 5) -> Iterator[Guesses | ImageError]:
        """Classify image files in batches; threads read ahead.

        Yields:
            For each file in turn, what `__call__` returns, or the error if the file cannot be read.
        """
        batches: deque[list[Future[Tensor | ImageError]]] = deque()
        with ThreadPoolExecutor() as threads:
            for start in range(0, len(paths), BATCH_SIZE):
                batches.append([threads.submit(self._read, path) for path in paths[start:start + BATCH_SIZE]])
                if len(batches) > 1:
                    yield from self._finish(batches.popleft(), top_k)
            while batches:
                yield from self._finish(batches.popleft(), top_k)

    def _read(self, path: str) -> Tensor | ImageError:
        try:
            return self.transform(read_image(path))
        except ImageError as error:
            return error

    def _finish(self, batch: list[Future[Tensor | ImageError]], top_k: int) -> Iterator[Guesses | ImageError]:
        results = [future.result() for future in batch]
        guesses = iter(self._classify([result for result in results if isinstance(result, Tensor)], top_k))
        for result in results:
            yield next(guesses) if isinstance(result, Tensor) else result

    @torch.inference_mode()
    def _classify(self, inputs: list[Tensor], top_k: int) -> list[Guesses]:
        if not inputs:
            return []
        logits = self.model(torch.stack(inputs).to(self.device))
        found = logits.float().softmax(-1).topk(min(top_k, len(self.classes)))
        return [
            [{'label': self.classes[index][0], 'name': self.classes[index][1], 'probability': probability}
             for index, probability in zip(indices, probabilities, strict=True)]
            for indices, probabilities in zip(found.indices.tolist(), found.values.tolist(), strict=True)]


def load_classifier(name: str, device: torch.device | str = 'cpu') -> Classifier:
    """Load any timm model whose classes have names.

    Args:
        name: A timm model, with or without a tag, `local-dir:` and the folder of a fine-tuned, staged or downloaded
            model, or `hf-hub:` and a repository.
        device: Where the model runs.

    Returns:
        The classifier.

    Raises:
        GeoPriorError: There is no such model, it cannot be loaded, it has no classifier, or nothing names its
            classes.
        WeightsError: It is a tag of this package without weights, or they cannot be obtained.

    Examples:
        >>> len(load_classifier('geoprior_resnet14_nano').classes)
        200
    """
    cfg = find_cfg(name)
    if cfg and cfg.num_classes == 0:  # reported before the weights are fetched
        raise GeoPriorError(f'The model must have a classifier, got {name}, which has none. Choose another, or '
                            f'fine-tune it: timm-geoprior finetune DIR --model {name}.')
    loaded = load_model(name)
    if not loaded.wnids:
        raise GeoPriorError(f'The model must have class names, got {name}, which has none. Use it from Python, or '
                            f'choose a model whose pretrained_cfg has label_names.')
    config = resolve_model_data_config(loaded.model)
    channels = getattr(loaded.model, 'in_chans', config['input_size'][0])
    if channels == 1:
        transform = Compose([Grayscale(), create_transform(**with_channels(config, 1))])
    elif channels == 3:
        transform = create_transform(**config)
    else:
        raise GeoPriorError(f'The model must take images of one or three channels, got {name}, which takes {channels}. '
                            f'Use it from Python.')
    return Classifier(
        loaded.entry.name if loaded.entry else name, loaded.model.to(device), transform,
        tuple(zip(loaded.wnids, loaded.names or loaded.wnids, strict=True)), torch.device(device), loaded.notes)
