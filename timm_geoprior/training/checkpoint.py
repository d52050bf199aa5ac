"""Checkpoints: written whole or not at all, and read as data by one function for every command."""
import argparse
import os
import re
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor

from ..errors import GeoPriorError, write_advice
from ..files import first_line, first_sentence, is_lfs_pointer, write_atomically

# timm's names first; its own loading prefers averaged weights, too
AVERAGED = ('model_ema', 'state_dict_ema', 'ema')
RAW = ('model', 'state_dict')
# what `train` saves besides; another program may save a value of another type under the same name
METADATA_TYPES: dict[str, type | tuple[type, ...]] = {
    'model_name': str, 'model_kwargs': dict, 'num_classes': int, 'class_names': (list, tuple), 'recipe': dict,
    'commit': str, 'seed': int}


@dataclass(frozen=True)
class SavedModel:
    """The weights of a file with its metadata; a bare state dict has none."""
    state_dict: dict[str, Tensor]  # weights, raw or averaged
    averaged: bool = False  # whether they are averaged
    note: str = ''  # message about which weights are used; '' if the file holds only one kind
    model_name: str = ''  # timm's name of the model, with or without a tag
    model_kwargs: dict[str, Any] = field(default_factory=dict)  # its options
    num_classes: int | None = None
    class_names: tuple[str, ...] = ()  # names of its classes, in order
    recipe: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None  # of the code that trained it
    seed: int | None = None

    @property
    def img_size(self) -> int | None:
        """Side of the images that the run was evaluated on, in pixels."""
        size = self.recipe.get('eval_size') or self.recipe.get('img_size')
        return size if isinstance(size, int) else None


def read_weights(path: Path, weights: Literal['auto', 'ema', 'raw'] = 'auto') -> SavedModel:
    """Read weights from a checkpoint of this package or of timm, a state dict, or safetensors.

    Args:
        path: The file. It is read as data: no pickled code is run.
        weights: 'ema' for averaged weights, 'raw' for those that are not averaged, 'auto' for averaged ones if there
            are any. Every command defaults to 'auto'.

    Raises:
        GeoPriorError: The file is missing, damaged or not a checkpoint, or has no averaged weights for 'ema'.
    """
    content = _read(path)
    averaged = next((key for key in AVERAGED if isinstance(content.get(key), Mapping)), None)
    raw = next((key for key in RAW if isinstance(content.get(key), Mapping)), None)
    if weights == 'ema' and averaged is None:
        raise GeoPriorError(f'{path} must hold averaged weights, got raw ones only. Leave out --use-ema.')
    key = raw if weights == 'raw' or averaged is None else averaged
    note = ''
    if averaged is not None and raw is not None:
        taken, other = ('raw', 'averaged') if key == raw else ('averaged', 'raw')
        note = f'{path}: the {taken} weights are used; it holds {other} ones too.'
    state_dict = content if key is None else content[key]
    if not state_dict or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise GeoPriorError(f'{path} must hold a state dict of tensors, got the keys '
                            f'{", ".join(map(str, list(content)[:5])) or "of an empty file"}. Name a checkpoint.')
    metadata = {name: content[name] for name, kind in METADATA_TYPES.items()
                if key and isinstance(content.get(name), kind)}
    if 'class_names' in metadata:
        metadata['class_names'] = tuple(metadata['class_names'])
    tensors = {name: value for name, value in state_dict.items() if name != 'n_averaged'}  # torch's AveragedModel's own
    return SavedModel(clean_state_dict(tensors), key is not None and key == averaged, note, **metadata)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load everything that a run saved with `save_checkpoint`, to resume it."""
    if not path.is_file():
        raise GeoPriorError(f'There is no checkpoint {path}. Start without --resume, or name another folder.')
    state = _read(path)
    if 'model' not in state:
        raise GeoPriorError(f'{path} must hold the state of a run, got the keys {", ".join(map(str, state))[:80]}. '
                            f'Name the folder of a run of `timm-geoprior train`.')
    return state


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Save tensors and plain containers with `torch.save`."""
    try:
        write_atomically(path, lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:  # torch's own error follows the file system's, and says less
        cause: BaseException = error
        while not isinstance(cause, OSError) and cause.__context__ is not None:
            cause = cause.__context__
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else first_line(cause)
        kept = '; the previous one is untouched' if os.path.exists(path) else ''
        again = 'run again with --resume' if os.path.exists(path.with_name('last.pt')) else 'run again'
        raise GeoPriorError(f'The checkpoint {path} could not be written ({reason}){kept}. {write_advice(cause)} and '
                            f'{again}.') from error


def check_exists(path: Path) -> None:
    """Refuse a checkpoint that does not exist or may not be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for a writer
            raise FileNotFoundError
        path.open('rb').close()
    except PermissionError as error:
        raise GeoPriorError(f'The checkpoint {path} cannot be read ({error.strerror}). Check its permissions and '
                            f'those of its folders.') from None
    except (OSError, ValueError):  # also a name that is too long
        raise GeoPriorError(f'The checkpoint {path} does not exist. Check its path.') from None


def _read(path: Path) -> dict[str, Any]:
    """The dictionary in a file."""
    check_exists(path)
    try:
        if is_lfs_pointer(path):
            raise GeoPriorError(f'{path} must hold weights, got a Git LFS pointer to them. Run `git lfs pull`.')
        if path.suffix == '.safetensors':
            return load_file(path, device='cpu')
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's own checkpoints contain one
            content = torch.load(path, map_location='cpu', weights_only=True)
    except GeoPriorError:
        raise
    except Exception as error:  # torch and safetensors raise half a dozen types for a damaged file
        if pickled := re.search(r'Unsupported global: GLOBAL (\S+)', str(error)):
            raise GeoPriorError(f'{path} must hold tensors and plain containers, got a pickled {pickled[1]}, whose '
                                f'code is not run. Save `model.state_dict()` instead of the model.') from None
        raise GeoPriorError(f'{path} cannot be read as a checkpoint ({first_sentence(error)}). It is '
                            f'damaged or not a checkpoint: copy it again.') from None
    if not isinstance(content, dict):
        raise GeoPriorError(f'{path} must hold a dictionary, got a {type(content).__name__}. Name a checkpoint.')
    return content


def strip_prefix(state_dict: Mapping[str, Tensor], names: Collection[str]) -> tuple[dict[str, Tensor], str]:
    """Remove a prefix from tensor names, such as the 'model.' that Lightning saves for `self.model`.

    Args:
        state_dict: Tensors by name.
        names: Names of the network's own tensors.

    Returns:
        The tensors below the prefix under which most names are known, and the prefix; all tensors and '' if none helps.
    """
    known = set(names)
    prefixes = {'': 0} | {name[:match.end()]: 0 for name in state_dict for match in re.finditer(r'\.', name)}
    for prefix in prefixes:
        prefixes[prefix] = sum(name.startswith(prefix) and name[len(prefix):] in known for name in state_dict)
    best = max(prefixes, key=lambda prefix: prefixes[prefix])
    return {name[len(best):]: value for name, value in state_dict.items() if name.startswith(best)}, best
