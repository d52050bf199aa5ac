"""Checks of the weights against the manifest, and a report on this installation."""
import copy
import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants, get_hf_file_metadata, get_token, hf_hub_url
from torch import Tensor, nn

from ..errors import WeightsError
from ..files import first_line
from ..provenance import versions
from .cfgs import bundled_path
from .download import check_file, describe_hub_error, endpoint, redact, require_weights, weights_asset
from .loading import load_golden, load_verified
from .manifest import ModelEntry, load_manifest, manifest_path

# relative to the largest logit, on a CPU, by the dtype of the weights: several times what `timm-geoprior verify` prints
# for the bundled network with AVX-512; not measured on a GPU
GOLDEN_TOLERANCES = {'float32': 1e-5, 'float16': 1e-2, 'bfloat16': 5e-2}

PACKAGES = ('timm', 'torch', 'torchvision', 'huggingface_hub', 'safetensors', 'transformers')
VARIABLES = ('HF_ENDPOINT', 'HF_HOME', 'HF_HUB_CACHE', 'HF_HUB_OFFLINE', 'HF_HUB_DISABLE_XET')


@dataclass(frozen=True)
class Check:
    """The result of one check of one tag."""
    name: str
    what: str  # 'source', 'bundled file', 'cached file', 'file on the Hub' or 'golden outputs'
    ok: bool | None  # whether it matches the manifest; None if it was not checked
    detail: str


@torch.no_grad()
def golden_error(model: nn.Module, golden: dict[str, Tensor]) -> float:
    """How far a model's logits are from the golden ones: the largest difference over the largest logit, or NaN.

    The model runs in its own dtype and on its own device. `golden` has 'input' (N, C, H, W) and 'logits' (N, classes).
    """
    parameter = next(model.parameters())
    logits = model.eval()(golden['input'].to(parameter)).float().cpu()
    return float((logits - golden['logits']).abs().max() / golden['logits'].abs().max())


def verify_tags(names: Iterable[str] = ()) -> list[Check]:
    """Check bundled, cached and Hub files and golden outputs against the manifest.

    Args:
        names: Tags, or architectures for their default tags; if empty, all tags with a hash in the manifest.

    Returns:
        The checks, in order; a failed one raises no exception.

    Raises:
        ManifestError: A name is unknown.
        WeightsError: A named tag has no weights.
    """
    manifest = load_manifest()
    entries = [manifest.get(name) for name in names] or [
        entry for entry in manifest.tags.values() if entry.has_weights and entry.sha256]
    for entry in entries:
        require_weights(entry)
    return [Check(entry.name, *found) for entry in entries for found in _checks(entry)]


def _checks(entry: ModelEntry) -> Iterator[tuple[str, bool | None, str]]:
    """Check a tag, and yield the fields of each `Check` except its name."""
    path = bundled_path(entry)
    if entry.status == 'converted' and entry.sha256 is None:
        yield 'source', None, f'{entry.hub_id} is not pinned: the manifest has no hash of it'
        return
    if entry.status == 'bundled' or path.exists():
        yield 'bundled file', *_check_file(entry, path)
    if entry.hub_id:
        cached = weights_asset(entry).cached()
        yield 'cached file', *(_check_file(entry, cached) if cached else (None, 'not in the cache'))
        yield 'file on the Hub', *_check_hub(entry)
    if entry.golden:
        yield 'golden outputs', *_check_golden(entry)


def _check_file(entry: ModelEntry, path: Path) -> tuple[bool, str]:
    try:
        check_file(entry, path)
    except WeightsError as error:
        return False, str(error)
    return True, f'{entry.bytes:,} bytes, sha256 {entry.sha256}'


def _check_hub(entry: ModelEntry) -> tuple[bool | None, str]:
    """Compare what the Hub says it would send with the manifest, without fetching it."""
    if constants.HF_HUB_OFFLINE:
        return None, 'HF_HUB_OFFLINE is set'
    place = f'{entry.hub_id} at {entry.revision}'
    try:
        found = get_hf_file_metadata(hf_hub_url(str(entry.hub_id), str(entry.file), revision=entry.revision))
    except Exception as error:
        return False, f'{place}: {describe_hub_error(error)}.'
    if (found.etag, found.size) != (entry.sha256, entry.bytes):
        return False, (f'{place} must have {entry.bytes} bytes and the sha256 {entry.sha256}, got {found.size} and '
                       f'{found.etag}.')
    return True, place


def _check_golden(entry: ModelEntry) -> tuple[bool, str]:
    """Load the model as a user does, through timm's own call, and run the fixed input on the CPU in each precision."""
    try:
        golden = load_golden(entry)
        model = timm.create_model(entry.name, pretrained=True)
    except WeightsError as problem:
        return False, str(problem)
    # each from the weights as loaded: a bfloat16 model made from the float16 one would be rounded twice
    errors = {name: golden_error(copy.deepcopy(model).to(getattr(torch, name)), golden) for name in GOLDEN_TOLERANCES}
    found = ', '.join(f'{errors[name]:.1e} in {name} (tolerance {at_most:.0e})'
                      for name, at_most in GOLDEN_TOLERANCES.items())
    return (all(errors[name] <= at_most for name, at_most in GOLDEN_TOLERANCES.items()),
            f'logits differ, relative to the largest, by {found}')


def doctor() -> dict[str, Any]:
    """What a bug report needs: versions, locations, and which tags load. It contains no token or password."""
    cache = Path(constants.HF_HUB_CACHE)  # if it does not exist, the nearest folder above it must be writable
    return {
        'platform': platform.platform(),
        'packages': versions(PACKAGES),
        'devices': ['cpu'] + [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        'manifest': str(manifest_path()),
        'endpoint': endpoint(),
        'cache': constants.HF_HUB_CACHE,
        'cache_writable': os.access(next(filter(os.path.exists, (cache, *cache.parents))), os.W_OK),
        'logged_in': _logged_in(),
        'environment': {name: redact(os.environ[name]) for name in VARIABLES if name in os.environ},
        # only cached converted tags: each other one would need a request to the Hub
        'tags': {entry.name: _load_report(entry) for entry in load_manifest().tags.values()
                 if entry.status != 'converted' or weights_asset(entry).cached()},
    }


def _logged_in() -> bool | str:
    try:
        return get_token() is not None
    except Exception as error:  # an unreadable token file, or no answer to a request for a token
        return f'not known ({redact(first_line(error))})'


def _load_report(entry: ModelEntry) -> str:
    """Whether a tag loads; weights that are not cached are not downloaded."""
    if not entry.has_weights:
        return f'{entry.status}, no weights'
    if not bundled_path(entry).exists() and entry.hub_id and not weights_asset(entry).cached():
        return f'{entry.status}, not in the cache; the file on the Hub: {_check_hub(entry)[1]}'
    try:
        load_verified(entry)
    except WeightsError as error:
        return f'{entry.status}, does not load: {error}'
    return f'{entry.status}, loads'
