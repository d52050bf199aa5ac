"""Verified loading: the bytes that the manifest names become a model's tensors, or an error says why not.

If the manifest does not pin a converted tag's source, the newest one on the Hub is loaded, unchecked.
"""
import json
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import Tensor, nn

from ..errors import GeoPriorError, WeightsError
from .cfgs import source_keys
from .download import Asset, golden_asset, read_asset, redact, weights_asset
from .manifest import ModelEntry, load_manifest

_DTYPES = {
    'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16, 'I64': torch.int64}
_SOURCE_KEYS = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source')

_Model = TypeVar('_Model', bound=nn.Module)


def build_with_verified_weights(
        model_cls: type[_Model],
        variant: str,
        pretrained: bool = False,
        *,
        pretrained_filter_fn: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]],
        **kwargs: Any,
) -> _Model:
    """timm's `build_model_with_cfg`, with verified weights if the manifest describes them.

    The file is read and hashed in a thread while timm builds the model; then timm's own `load_pretrained` takes the
    tensors, so that heads, input channels, strictness and feature extraction work as for any of its models. timm loads
    a source that the user names (`pretrained_cfg_overlay`, `hf-hub:`, `local-dir:`), without verification.

    Raises:
        WeightsError: The tag has no weights, or they cannot be fetched, read or converted, or do not match.
    """
    entry = _own_entry(variant, kwargs) if pretrained else None
    if entry is None:
        return build_model_with_cfg(
            model_cls, variant, pretrained, pretrained_filter_fn=pretrained_filter_fn, **kwargs)
    asset = weights_asset(entry)
    kernel = kwargs.get('attn_kernel', 'gaussian')
    if not entry.source and kernel != 'gaussian':  # no tensor shows it; a conversion fits either kernel
        warnings.warn(f'{entry.name} was trained with the Gaussian kernel, and computes something else with '
                      f'attn_kernel={kernel!r}. Leave out attn_kernel, or train the network further.', stacklevel=5)
    cache_dir = kwargs.get('cache_dir')
    path = asset.locate(cache_dir)
    with ThreadPoolExecutor(1) as thread:
        tensors = thread.submit(_load, asset, path, cache_dir)

        # timm calls this where it would convert a state dict that it has read itself
        def take_verified(placeholder: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
            model.pretrained_cfg.pop('state_dict')  # type: ignore[operator,union-attr]
            try:
                return pretrained_filter_fn(tensors.result(), model)
            except WeightsError:
                raise
            except GeoPriorError as error:
                source = f'made from {asset.hub_id}' if asset.hub_id else 'loaded'
                raise WeightsError(f'{asset.title} cannot be {source}: {error}') from error

        # timm deep-copies its cfg, so the tensors are not in it: a placeholder keeps timm from looking for a file
        overlay = {**(kwargs.pop('pretrained_cfg_overlay', None) or {}), 'state_dict': {'verified': True}}
        return build_model_with_cfg(
            model_cls, variant, pretrained, pretrained_cfg_overlay=overlay, pretrained_filter_fn=take_verified,
            **kwargs)


def _own_entry(variant: str, kwargs: dict[str, Any]) -> ModelEntry | None:
    """The manifest's entry that timm would load, or None if the source is not the manifest's."""
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    entry = load_manifest().tags.get(f'{variant}.{cfg.tag}')
    if entry is None:
        return None
    # a user who names another file for a known tag wants that file, and the manifest has no hash of it
    source = {key: value for key in _SOURCE_KEYS if (value := getattr(cfg, key))}
    return entry if source == source_keys(entry) else None


def load_verified(entry: ModelEntry, cache_dir: str | Path | None = None) -> dict[str, Tensor]:
    """Load a tag's tensors: the package's file, else the Hub's at the pinned revision.

    A cached file that does not match the manifest is fetched again once. A pinned file that is cached needs no network.

    Args:
        entry: The manifest's entry.
        cache_dir: The cache of huggingface_hub; None for the default one.

    Returns:
        Name -> tensor on the CPU, in the file's dtypes; all share one block of memory.

    Raises:
        WeightsError: The tag has no weights, they cannot be fetched, or size or SHA-256 do not match.
    """
    asset = weights_asset(entry)
    return _load(asset, asset.locate(cache_dir), cache_dir)


def load_golden(entry: ModelEntry, cache_dir: str | Path | None = None) -> dict[str, Tensor]:
    """Load a tag's golden 'input' (N, C, H, W) and 'logits' (N, classes), as `load_verified` loads its weights."""
    return _tensors(read_asset(golden_asset(entry), None, cache_dir))


def _load(asset: Asset, path: Path, cache_dir: str | Path | None) -> dict[str, Tensor]:
    if asset.sha256 is not None:
        return _tensors(read_asset(asset, path, cache_dir))
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f'{asset.title} must be a safetensors file, got another in {path} ({redact(str(error))}). '
                           f'Delete it, and try again.') from None


def _tensors(content: memoryview) -> dict[str, Tensor]:
    """Tensors that share the bytes of a safetensors file.

    `safetensors.torch.load` would copy them twice, which nearly doubles both the time and the memory of loading.
    """
    start = 8 + int.from_bytes(content[:8], 'little')
    header = json.loads(bytes(content[8:start]))
    header.pop('__metadata__', None)
    return {name: _tensor(content, start, info) for name, info in header.items()}


def _tensor(content: memoryview, start: int, info: dict[str, Any]) -> Tensor:
    dtype, (begin, end) = _DTYPES[info['dtype']], info['data_offsets']
    if begin == end:
        return torch.empty(info['shape'], dtype=dtype, device='cpu')
    flat = torch.frombuffer(content, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=start + begin)
    return flat.view(info['shape'])
