"""Verified loading: the bytes that the manifest names, or an error that says why not.

A tag's file comes from the package's `weights` folder, else from the Hugging Face Hub at the manifest's revision,
through huggingface_hub and its cache. It is read once; size and SHA-256 are checked on the very bytes that become the
tensors.
"""
import contextlib
import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import Tensor, nn

from ..errors import GeoPriorError
from ..files import write_atomically
from .cfgs import bundled_path, hub_config, source_keys
from .manifest import ModelEntry, load_manifest

__all__ = [
    'WeightsError', 'build_with_verified_weights', 'download_tag', 'explain', 'load_golden', 'load_verified',
    'read_verified', 'require_weights',
]

ATTEMPTS = 3  # of a download that the network broke; huggingface_hub's own retries come before
CHUNK = 1 << 20

_DTYPES = {
    'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16, 'I64': torch.int64}
_SOURCE_KEYS = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source')

_Model = TypeVar('_Model', bound=nn.Module)


class WeightsError(GeoPriorError):
    """Weights cannot be had: none exist, they cannot be fetched, or they are not the bytes that they should be."""


class _DigestError(WeightsError):
    """A file is there, but not as the manifest has it."""


def build_with_verified_weights(
        model_cls: type[_Model],
        variant: str,
        pretrained: bool = False,
        *,
        pretrained_filter_fn: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]],
        **kwargs: Any,
) -> _Model:
    """timm's `build_model_with_cfg`, with verified weights where they are the manifest's own.

    The file is read and hashed in a thread while timm makes the model; then timm's own `load_pretrained` takes the
    tensors, so that heads, input channels, strictness and feature extraction adapt as for any of its models. A source
    of the user's own (`pretrained_cfg_overlay`, `hf-hub:`, `local-dir:`) stays timm's business.

    Args:
        model_cls: Class of the model.
        variant: Name of the architecture.
        pretrained: Load weights.
        pretrained_filter_fn: What makes the model's state dict of one that was read, as timm calls it.
        **kwargs: As `build_model_with_cfg` takes them.

    Returns:
        The model.

    Raises:
        WeightsError: The tag has no weights, or they cannot be had as the manifest has them.
    """
    entry = _own_entry(variant, kwargs) if pretrained else None
    if entry is None:
        return build_model_with_cfg(
            model_cls, variant, pretrained, pretrained_filter_fn=pretrained_filter_fn, **kwargs)
    cache_dir = kwargs.get('cache_dir')
    asset = _weights(entry)
    path = asset.locate(cache_dir)
    with ThreadPoolExecutor(1) as thread:
        content = thread.submit(_read, asset, path, cache_dir)

        def take_verified(placeholder: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
            model.pretrained_cfg.pop('state_dict')  # type: ignore[operator,union-attr]
            return pretrained_filter_fn(_tensors(content.result()), model)

        # timm deep-copies its cfg, so the tensors cannot go that way: a placeholder keeps it from looking for a file
        overlay = {**(kwargs.pop('pretrained_cfg_overlay', None) or {}), 'state_dict': {'verified': True}}
        return build_model_with_cfg(
            model_cls, variant, pretrained, pretrained_cfg_overlay=overlay, pretrained_filter_fn=take_verified,
            **kwargs)


def _own_entry(variant: str, kwargs: dict[str, Any]) -> ModelEntry | None:
    """The manifest's entry that timm would load from, or None where the source is not the manifest's."""
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    entry = load_manifest().models.get(f'{variant}.{cfg.tag}')
    if entry is None:
        return None
    source = {key: value for key in _SOURCE_KEYS if (value := getattr(cfg, key))}
    return entry if source == source_keys(entry) else None


@dataclass(frozen=True)
class _Asset:
    """A file of a tag: in the package, else in a repository."""
    title: str
    bundled: Path
    hub_id: str | None
    revision: str | None
    file: str
    sha256: str
    size: int | None

    def locate(self, cache_dir: str | Path | None, force: bool = False) -> Path:
        """The file on this machine, fetched if need be."""
        if self.hub_id is None or self.bundled.exists():
            return self.bundled
        return _download(self, cache_dir, force)


def require_weights(entry: ModelEntry) -> None:
    """Refuse a tag that has no weights.

    Args:
        entry: The manifest's entry.

    Raises:
        WeightsError: It has none; the message names the tags that have.
    """
    if not entry.has_weights:
        known = [other.name for other in load_manifest().models.values() if other.has_weights]
        raise WeightsError(
            f'{entry.name} has no weights (its status is {entry.status}), expected a tag that has: '
            f'{", ".join(known) or "none in this version"}. Take one of those, or pretrained=False.')


def _weights(entry: ModelEntry) -> _Asset:
    require_weights(entry)
    return _Asset(f'The weights of {entry.name}', bundled_path(entry), entry.hub_id, entry.revision, str(entry.file),
                  str(entry.sha256), entry.bytes)


def _golden(entry: ModelEntry) -> _Asset:
    weights = _weights(entry)
    assert entry.golden is not None, 'the manifest checks that every tag with weights has them'
    path = bundled_path(entry).with_suffix('.golden.safetensors')
    return replace(weights, title=f'The golden outputs of {entry.name}', bundled=path, file=entry.golden.file,
                   sha256=entry.golden.sha256, size=None)


def load_verified(entry: ModelEntry, cache_dir: str | Path | None = None) -> dict[str, Tensor]:
    """Load a tag's tensors: the package's file, else the Hub's at the pinned revision.

    A cached file that is not as the manifest has it is fetched afresh once. No network is used once it is cached.

    Args:
        entry: The manifest's entry.
        cache_dir: Cache of huggingface_hub, where it is not to be the user's own.

    Returns:
        Name -> tensor on the CPU, in the file's types; all share one block of memory.

    Raises:
        WeightsError: The tag has no weights, they cannot be fetched, or size or SHA-256 are not the manifest's.
    """
    return _tensors(_content(_weights(entry), cache_dir))


def load_golden(entry: ModelEntry, cache_dir: str | Path | None = None) -> dict[str, Tensor]:
    """Load a tag's golden tensors, 'input' (N, C, H, W) and 'logits' (N, classes), as `load_verified` does its weights.

    Args:
        entry: The manifest's entry.
        cache_dir: Cache of huggingface_hub, where it is not to be the user's own.

    Returns:
        The two tensors.

    Raises:
        WeightsError: As `load_verified`.
    """
    return _tensors(_content(_golden(entry), cache_dir))


def download_tag(name: str, folder: str | Path) -> Path:
    """Make an offline bundle: a folder of the tag's name that `local-dir:` loads. What is there and right stays.

    Args:
        name: 'architecture.tag', or an architecture for its default tag.
        folder: Where the tag's folder goes.

    Returns:
        The tag's folder, with model.safetensors, golden/outputs.safetensors and config.json.

    Raises:
        ManifestError: There is no such tag.
        WeightsError: It has no weights, or they cannot be had.
    """
    entry = load_manifest().get(name)
    target = Path(folder) / entry.name
    assets = {'model.safetensors': _weights(entry), 'golden/outputs.safetensors': _golden(entry)}
    try:
        (target / 'golden').mkdir(parents=True, exist_ok=True)
        for file, asset in assets.items():
            if not _is_right(asset, target / file):
                write_atomically(target / file, bytes(_content(asset, None)))
        config = json.dumps(hub_config(entry), indent=2, ensure_ascii=False)
        write_atomically(target / 'config.json', config.encode('utf-8'))
    except OSError as error:
        raise WeightsError(f'{target} cannot be written ({error.strerror}): name a folder that can.') from None
    return target


def _is_right(asset: _Asset, path: Path) -> bool:
    try:
        _read_verified(asset, path)
    except WeightsError:
        return False
    return True


def read_verified(entry: ModelEntry, path: Path) -> None:
    """Hold a file against a tag's size and SHA-256.

    Args:
        entry: The manifest's entry.
        path: The file.

    Raises:
        WeightsError: The tag has no weights, or the file is missing or another.
    """
    _read_verified(_weights(entry), path)


def _content(asset: _Asset, cache_dir: str | Path | None) -> memoryview:
    return _read(asset, asset.locate(cache_dir), cache_dir)


def _read(asset: _Asset, path: Path, cache_dir: str | Path | None) -> memoryview:
    """A file's verified bytes; a wrong one of the cache is fetched afresh once."""
    try:
        return _read_verified(asset, path)
    except _DigestError as wrong:
        if path == asset.bundled:
            raise
        found = wrong
    try:
        path = asset.locate(cache_dir, force=True)
    except WeightsError as error:
        raise WeightsError(f'{found} {error}') from None
    try:
        return _read_verified(asset, path)
    except _DigestError:
        _discard(path)
        raise


def _read_verified(asset: _Asset, path: Path) -> memoryview:
    """Read a file once, and check size and hash on what was read."""
    advice = 'install timm_geoprior again' if path == asset.bundled else 'try again, and report it if it stays so'
    where, digest = f'{asset.title} in {path}', hashlib.sha256()
    try:
        with path.open('rb') as file:
            size = os.fstat(file.fileno()).st_size
            if asset.size not in (size, None):
                raise _DigestError(f'{where} are {size} bytes, expected {asset.size}: {advice}.')
            # not a bytearray, whose zeros take as long as the reading, from the model's creation beside it
            content, position = torch.empty(size, dtype=torch.uint8).numpy().data, 0
            while count := file.readinto(content[position:position + CHUNK]):
                digest.update(content[position:position + count])
                position += count
    except OSError as error:
        raise WeightsError(f'{where} cannot be read ({error.strerror}), expected a file: {advice}.') from None
    if digest.hexdigest() != asset.sha256:
        raise _DigestError(f'{where} have the sha256 {digest.hexdigest()}, expected {asset.sha256}: {advice}.')
    return content


def _tensors(content: memoryview) -> dict[str, Tensor]:
    """Tensors on a safetensors file's own bytes: safetensors' reader would copy them, and so hold the file twice."""
    start = 8 + int.from_bytes(content[:8], 'little')
    header = json.loads(bytes(content[8:start]))
    header.pop('__metadata__', None)
    return {name: _tensor(content, start, info) for name, info in header.items()}


def _tensor(content: memoryview, start: int, info: dict[str, Any]) -> Tensor:
    dtype, (begin, end) = _DTYPES[info['dtype']], info['data_offsets']
    if begin == end:
        return torch.empty(info['shape'], dtype=dtype)
    flat = torch.frombuffer(content, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=start + begin)
    return flat.view(info['shape'])


def _discard(path: Path) -> None:
    """Remove a wrong file from the cache, so that nothing else loads it: the name and the blob behind it."""
    for item in (path.resolve(), path):
        with contextlib.suppress(OSError):
            item.unlink(missing_ok=True)


def _download(asset: _Asset, cache_dir: str | Path | None, force: bool) -> Path:
    """The file's path in huggingface_hub's cache, from there or from the network."""
    started = time.time() - 1  # file systems' clocks are coarse
    for attempt in range(ATTEMPTS):
        begun = time.monotonic()
        try:
            path = Path(hf_hub_download(
                str(asset.hub_id), asset.file, revision=asset.revision, cache_dir=cache_dir, force_download=force,
                library_name='timm_geoprior'))
            _sweep(path, started)
            return path
        except Exception as error:
            if attempt + 1 == ATTEMPTS or not _is_transient(error, time.monotonic() - begun):
                raise WeightsError(
                    f'{asset.title} ({asset.file} of {asset.hub_id} at {asset.revision}) could not be fetched: '
                    f'{explain(error, cache_dir)}.') from None
            force = force or type(error) is OSError  # a part of the wrong size: not to be resumed
        time.sleep(2 ** attempt)
    raise AssertionError('unreachable')


def _sweep(path: Path, started: float) -> None:
    """Remove what a killed process left of the same file, once the whole file has come: nobody else does."""
    blob = path.resolve()
    with contextlib.suppress(OSError):
        if blob.stat().st_mtime >= started:
            for part in blob.parent.glob(f'{blob.name}*.incomplete'):
                part.unlink()


def _is_transient(error: Exception, seconds: float) -> bool:
    """Whether another attempt may help, after one of so many seconds: huggingface_hub retries some trouble itself."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        return http_status(error.__cause__) >= 500 and seconds < 5  # it had no patience: older ones have none
    if isinstance(error, HfHubHTTPError):
        return http_status(error) >= 500
    local = isinstance(error, OSError) and error.errno is not None
    return not local and not isinstance(error, (LocalEntryNotFoundError, ValueError))


def http_status(error: BaseException) -> int:
    """The status that the Hub answered with, 0 where it did not answer."""
    return getattr(getattr(error, 'response', None), 'status_code', None) or 0


def explain(error: Exception, cache_dir: str | Path | None = None) -> str:
    """Say in one clause what a failure of huggingface_hub means and what to do about it; no token is in it.

    Args:
        error: What it raised.
        cache_dir: The cache it was told to use.

    Returns:
        A clause without a full stop.
    """
    cause = error.__cause__ if isinstance(error, (LocalEntryNotFoundError, ValueError)) and error.__cause__ else error
    status = http_status(cause)
    if constants.HF_HUB_OFFLINE:
        return ('it is not in the cache and HF_HUB_OFFLINE is set, expected a network: unset it, or fetch the file '
                'first where there is one')
    if isinstance(cause, RevisionNotFoundError):
        return 'the Hub has no such revision any more, expected the pinned one: update timm_geoprior'
    if isinstance(cause, EntryNotFoundError):
        return 'the Hub has no such file at this revision, expected one: update timm_geoprior'
    if isinstance(cause, (GatedRepoError, RepositoryNotFoundError)) or status in (401, 403):
        return (f'the Hub answered {status}, so the repository is private, gated or gone, or the token lacks a right: '
                f'check the name, log in with `hf auth login` or set HF_TOKEN')
    if status == 429:
        return 'the Hub answered 429, too many requests: wait some minutes, or log in for a higher limit'
    if status:
        return f'the Hub answered {status}: try again later'
    if isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, ConnectionError):
        place = cache_dir or constants.HF_HUB_CACHE
        hint = 'free some space' if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else 'make it writable'
        return f'the cache {place} cannot be written ({cause.strerror}): {hint}, or set HF_HOME or cache_dir'
    return (f'{endpoint()} could not be reached or broke off ({type(cause).__name__}: {redact(str(cause))}): '
            f'check the network, the proxy and HF_ENDPOINT')


def endpoint() -> str:
    """Address of the Hub in use, without a password."""
    return redact(constants.ENDPOINT)


def redact(text: str) -> str:
    """Take tokens, passwords and signatures out of a text: for messages and reports."""
    text = re.sub(r'hf_\w+', 'hf_***', ' '.join(text.split()))
    text = re.sub(r'(?<=//)[^/@\s]+@', '***@', text)
    return re.sub(r'(?<=://)(\S*?)\?[^\s\'")]*', r'\1', text).strip().rstrip('.')
