"""The files of a tag: where they are, how they are fetched from the Hub, and whether they match the manifest.

A file comes from the package's `weights` folder, else from the Hugging Face Hub at the manifest's revision, through
huggingface_hub and its cache. It is read once, and the size and SHA-256 of the bytes read are checked. If the
manifest does not pin a converted tag's source, there is no hash to check.
"""
import contextlib
import hashlib
import json
import os
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import save
from timm.models import create_model

from ..errors import WeightsError, disk_is_full
from ..files import is_lfs_pointer, write_atomically, write_json
from .cfgs import bundled_path, hub_config
from .manifest import ModelEntry, load_manifest

PATIENCE = 6  # seconds to wait for the Hub's answer
ATTEMPTS = 3  # at a download that the network interrupts, each with huggingface_hub's own retries
CHUNK = 1 << 20


class _DigestError(WeightsError):
    """A file exists, but does not match the manifest."""


@dataclass(frozen=True)
class Asset:
    """A file of a tag, in the package or in a repository of the Hub."""
    title: str  # its name in messages
    bundled: Path  # its path if it is in the package
    hub_id: str | None  # 'owner/name' of the repository
    revision: str | None  # commit of the repository; None for the newest
    file: str  # its name in the repository
    sha256: str | None  # its SHA-256; None if it is not checked
    size: int | None  # its size in bytes; None if the manifest does not say
    instead: str = ''  # a tag that messages suggest, which needs no network

    def cached(self, cache_dir: str | Path | None = None) -> Path | None:
        """The path of the file in the cache of huggingface_hub; None if it is not there."""
        found = try_to_load_from_cache(str(self.hub_id), self.file, cache_dir=cache_dir, revision=self.revision)
        return Path(found) if isinstance(found, str) else None

    def locate(self, cache_dir: str | Path | None, force: bool = False) -> Path:
        """The local path of the file, fetched unless it is bundled or cached; `force` fetches a cached file again."""
        if self.hub_id is None or self.bundled.exists():
            return self.bundled
        return _download(self, cache_dir, force)


def require_weights(entry: ModelEntry) -> None:
    """Raise WeightsError, naming the tags that have weights, if this one has none."""
    if not entry.has_weights:
        known = [other.name for other in load_manifest().tags.values()
                 if other.is_released
                 or (other.has_weights and other.default and other.architecture == entry.architecture)]
        raise WeightsError(
            f'{entry.name} has no weights (its status is {entry.status}). Tags with weights: '
            f'{", ".join(known) or "none in this version"}. Name one of them, or use pretrained=False.')


def weights_asset(entry: ModelEntry) -> Asset:
    """The weights of a tag. Raises WeightsError if it has none."""
    require_weights(entry)
    return Asset(f'The weights of {entry.name}', bundled_path(entry), entry.hub_id, entry.revision, str(entry.file),
                 entry.sha256, entry.bytes, _bundled_instead(entry))


def _bundled_instead(entry: ModelEntry) -> str:
    """Another bundled tag, of the same architecture if possible; '' if there is none."""
    bundled = [other for other in load_manifest().models.values()
               if other.status == 'bundled' and other.name != entry.name]
    same = [other.name for other in bundled if other.architecture == entry.architecture]
    return (same or [other.name for other in bundled] or [''])[-1]


def golden_asset(entry: ModelEntry) -> Asset:
    """The golden outputs of a tag. Raises WeightsError if it has no weights."""
    weights = weights_asset(entry)
    assert entry.golden is not None, 'the manifest checks that every tag with weights has them'
    path = bundled_path(entry).with_suffix('.golden.safetensors')
    return replace(weights, title=f'The golden outputs of {entry.name}', bundled=path, file=entry.golden.file,
                   sha256=entry.golden.sha256, size=None)


def read_asset(asset: Asset, path: Path | None = None, cache_dir: str | Path | None = None) -> memoryview:
    """Read and verify a file. A cached file that does not match the manifest is fetched again, once.

    Args:
        asset: What to read.
        path: Where `Asset.locate` found it; None locates it.
        cache_dir: The cache of huggingface_hub; None for the default one.

    Raises:
        WeightsError: The file cannot be fetched or read, or does not match the manifest.
    """
    path = path or asset.locate(cache_dir)
    try:
        return _read_verified(asset, path)
    except _DigestError as found:
        if path == asset.bundled:
            raise
        try:
            path = asset.locate(cache_dir, force=True)
        except WeightsError as error:
            raise WeightsError(f'{found} {error}') from None
    try:
        return _read_verified(asset, path)
    except _DigestError:
        for item in (path.resolve(), path):  # the blob and the link to it, so that nothing else loads it
            with contextlib.suppress(OSError):
                item.unlink(missing_ok=True)
        raise


def _read_verified(asset: Asset, path: Path) -> memoryview:
    """Read a file once, and check the size and hash of what is read."""
    advice = 'Install timm_geoprior again.' if path == asset.bundled else 'Try again; if it recurs, report it.'
    where, digest = f'{asset.title} in {path}', hashlib.sha256()
    try:
        with path.open('rb') as file:
            size = os.fstat(file.fileno()).st_size
            if asset.size not in (size, None):
                if is_lfs_pointer(path):
                    raise _DigestError(f'{where} must be the file, got a Git LFS pointer to it. Run `git lfs pull`.')
                raise _DigestError(f'{where} must be {asset.size} bytes, got {size}. {advice}')
            # not a bytearray: filling it with zeros, while the model is built, would take as long as reading;
            # the device is named because torch.set_default_device may have set another
            content, position = torch.empty(size, dtype=torch.uint8, device='cpu').numpy().data, 0
            while count := file.readinto(content[position:position + CHUNK]):
                digest.update(content[position:position + count])
                position += count
    except OSError as error:
        raise WeightsError(f'{where} cannot be read ({error.strerror}). {advice}') from None
    if digest.hexdigest() != asset.sha256:
        raise _DigestError(f'{where} must have the SHA-256 {asset.sha256}, got {digest.hexdigest()}. {advice}')
    return content


def check_file(entry: ModelEntry, path: Path) -> None:
    """Raise WeightsError unless a file has the size and the SHA-256 of a tag."""
    _read_verified(weights_asset(entry), path)


def download_tag(name: str, folder: str | Path) -> Path:
    """Make a folder that `local-dir:` loads without a network. Existing files that match the manifest are kept.

    Args:
        name: 'architecture.tag', or an architecture for its default tag.
        folder: Where the folder of the tag goes.

    Returns:
        The folder of the tag, with model.safetensors and config.json. A converted tag's weights are saved converted;
        other tags also have golden/outputs.safetensors.

    Raises:
        ManifestError: There is no such tag.
        WeightsError: It has no weights, they cannot be fetched or written, or the folder holds another network.
    """
    entry = load_manifest().get(name)
    target = Path(folder) / entry.name
    require_weights(entry)
    try:
        if _holds_another(target, entry):
            raise WeightsError(f'{target} must be new or an earlier download of {entry.name}, got a folder with other '
                               f'weights. Name another folder.')
        target.mkdir(parents=True, exist_ok=True)
        if entry.status == 'converted':
            state_dict = create_model(entry.name, pretrained=True).state_dict()
            write_atomically(target / 'model.safetensors', save(state_dict, {'format': 'pt'}))
        else:
            _copy_files(entry, target)
        write_json(target / 'config.json', hub_config(entry))
    except OSError as error:
        raise WeightsError(f'{target} cannot be written ({error.strerror}). Name another folder.') from None
    return target


def _holds_another(target: Path, entry: ModelEntry) -> bool:
    """Whether a folder holds weights other than an earlier download of this tag."""
    weights = target / 'model.safetensors'
    if (target / 'last.pt').exists():  # of a training run
        return True
    if not weights.exists():
        return False
    # config.json is written last: an interrupted download has none
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        config = json.loads((target / 'config.json').read_text(encoding='utf-8'))
        return bool((config['architecture'], config['pretrained_cfg'].get('tag')) != (entry.architecture, entry.tag))
    if entry.sha256 is not None:
        try:
            check_file(entry, weights)
        except WeightsError:
            return True
    return False


def _copy_files(entry: ModelEntry, target: Path) -> None:
    (target / 'golden').mkdir(exist_ok=True)
    assets = {'model.safetensors': weights_asset(entry), 'golden/outputs.safetensors': golden_asset(entry)}
    for file, asset in assets.items():
        try:
            _read_verified(asset, target / file)
        except WeightsError:
            write_atomically(target / file, bytes(read_asset(asset)))


def _download(asset: Asset, cache_dir: str | Path | None, force: bool) -> Path:
    """The path of the file in huggingface_hub's cache, fetched if it is not there."""
    started = time.time() - 1  # file systems' clocks are coarse
    if path := _cached_without_hub(asset, cache_dir):
        return path
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
                raise _not_fetched(asset, error, cache_dir) from None
            force = force or type(error) is OSError  # a partial file of the wrong size must not be resumed
        time.sleep(2 ** attempt)
    raise AssertionError('unreachable')


def _cached_without_hub(asset: Asset, cache_dir: str | Path | None) -> Path | None:
    """The cached file if the Hub does not answer; None if it does or need not be asked.

    huggingface_hub itself tries five times in half a minute, with a log line for each, before it looks into the cache
    or gives up.
    """
    known = asset.cached(cache_dir)
    if constants.HF_HUB_OFFLINE or (known and asset.revision):
        return None
    try:
        get_hf_file_metadata(hf_hub_url(str(asset.hub_id), asset.file, revision=asset.revision), timeout=PATIENCE)
    except HfHubHTTPError:
        return None  # an answer, which hf_hub_download handles
    except Exception as error:
        if known is None:
            raise _not_fetched(asset, error, cache_dir) from None
        return known
    return None


def _not_fetched(asset: Asset, error: Exception, cache_dir: str | Path | None) -> WeightsError:
    place = f'{asset.file} of {asset.hub_id}' + (f' at {asset.revision}' if asset.revision else '')
    instead = f', or use {asset.instead}, which needs no network' if asset.instead else ''
    reason = describe_hub_error(error, cache_dir)
    return WeightsError(f'{asset.title} ({place}) could not be fetched: {reason}{instead}.')


def _sweep(path: Path, started: float) -> None:
    """Once a file is complete, remove the partial ones that killed processes left; nothing else does."""
    blob = path.resolve()
    with contextlib.suppress(OSError):
        if blob.stat().st_mtime >= started:
            for part in blob.parent.glob(f'{blob.name}*.incomplete'):
                part.unlink()


def _is_transient(error: Exception, seconds: float) -> bool:
    """Whether to retry after an attempt that took so many seconds: huggingface_hub retries some failures itself."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        return http_status(error.__cause__) >= 500 and seconds < 5  # older versions give up at once
    if isinstance(error, HfHubHTTPError):
        return http_status(error) >= 500
    local = isinstance(error, OSError) and error.errno is not None
    return not local and not isinstance(error, (LocalEntryNotFoundError, ValueError))


def http_status(error: BaseException) -> int:
    """The HTTP status of the Hub's answer; 0 if there was none."""
    return getattr(getattr(error, 'response', None), 'status_code', None) or 0


def describe_hub_error(error: Exception, cache_dir: str | Path | None = None) -> str:
    """Say in a sentence or two why huggingface_hub failed and what to do about it, without the final full stop.

    The text contains no token. `cache_dir` is the cache that was used; None is the default one.
    """
    cause = error.__cause__ if isinstance(error, (LocalEntryNotFoundError, ValueError)) and error.__cause__ else error
    status = http_status(cause)
    if constants.HF_HUB_OFFLINE:
        return 'it is not in the cache and HF_HUB_OFFLINE is set. Unset it, or fetch the file where there is a network'
    if isinstance(cause, RevisionNotFoundError):
        return 'the Hub no longer has the pinned revision. Update timm_geoprior'
    if isinstance(cause, EntryNotFoundError):
        return 'the Hub has no such file at the pinned revision. Update timm_geoprior'
    if isinstance(cause, (GatedRepoError, RepositoryNotFoundError)) or status in (401, 403):
        return (f'the Hub answered {status}: the repository is private, gated or gone, or the token lacks a '
                f'permission. Check the name, log in with `hf auth login`, or set HF_TOKEN')
    if status == 429:
        return 'the Hub answered 429, too many requests. Wait some minutes, or log in for a higher limit'
    if status:
        return f'the Hub answered {status}. Try again later'
    if isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, ConnectionError):
        place = cache_dir or constants.HF_HUB_CACHE
        hint = 'Free some space' if disk_is_full(cause) else 'Make it writable'
        return f'the cache {place} cannot be written ({cause.strerror}). {hint}, or set HF_HOME or cache_dir'
    return (f'{endpoint()} could not be reached, or the connection broke off ({type(cause).__name__}: '
            f'{redact(str(cause))}). Check the network, the proxy and HF_ENDPOINT')


def endpoint() -> str:
    """The address of the Hub in use, without a password."""
    return redact(constants.ENDPOINT)


def redact(text: str) -> str:
    """Remove tokens, passwords and signatures from a text, for messages and reports."""
    text = re.sub(r'hf_\w+', 'hf_***', ' '.join(text.split()))
    text = re.sub(r'(?<=//)[^/@\s]+@', '***@', text)
    return re.sub(r'(?<=://)(\S*?)\?[^\s\'")]*', r'\1', text).strip().rstrip('.')
