"""timm's and the Hub's configurations of each tag, from the manifest."""
from pathlib import Path
from typing import Any

from .converted import converted_cfg
from .manifest import ManifestError, ModelEntry, load_manifest

__all__ = ['bundled_path', 'hub_config', 'pretrained_cfg', 'pretrained_cfgs', 'source_keys']

WEIGHTS_DIR = Path(__file__).parent / 'weights'


def bundled_path(entry: ModelEntry) -> Path:
    """The path of a tag's weights in the package, whether they are there or not."""
    return WEIGHTS_DIR / f'{entry.name}.safetensors'


def pretrained_cfgs() -> dict[str, Any]:
    """timm's cfgs from the manifest, for `generate_default_cfgs`; a star marks the default tags.

    A planned tag has no source, so timm lists it among the models but not among the pretrained ones. With a malformed
    manifest there are none: the import still succeeds, and the error comes with the first request for weights.
    """
    try:
        tags = load_manifest().tags.values()
    except ManifestError:
        return {}
    return {entry.name + '*' * entry.default: pretrained_cfg(entry) for entry in tags}


def pretrained_cfg(entry: ModelEntry) -> dict[str, Any]:
    """timm's cfg of one tag."""
    if entry.status == 'converted':
        return {**source_keys(entry), **converted_cfg(entry)}
    label_set = load_manifest().label_sets[entry.label_set]
    height, width = entry.input.input_size[1:]
    return {
        **source_keys(entry),
        'input_size': entry.input.input_size,
        'pool_size': (-(-height // 32), -(-width // 32)),
        'interpolation': entry.input.interpolation,
        'crop_pct': entry.input.crop_pct,
        'crop_mode': entry.input.crop_mode,
        'mean': entry.input.mean,
        'std': entry.input.std,
        'num_classes': entry.num_classes,
        # timm looks ImageNet's up by the number of classes
        'label_names': tuple(label_set.classes) or None,
        'label_descriptions': label_set.classes or None,
        'first_conv': entry.first_conv,
        'classifier': 'fc',
        'license': entry.license,
        'paper_name': 'Explicitly Modeled Attention Maps for Image Classification',
        'paper_ids': 'arXiv:2006.07872',
    }


def source_keys(entry: ModelEntry) -> dict[str, str]:
    """timm's keys that say where the weights are; none for a tag without weights."""
    if not entry.has_weights:
        return {}
    if entry.status == 'bundled':
        return {'file': str(bundled_path(entry))}
    hub_id = f'{entry.hub_id}@{entry.revision}' if entry.revision else str(entry.hub_id)
    # timm would look for pickled weights too, but for a name of safetensors
    needs_name = entry.status == 'converted' or entry.file != 'model.safetensors'
    return {'hf_hub_id': hub_id, **({'hf_hub_filename': str(entry.file)} if needs_name else {})}


def hub_config(entry: ModelEntry) -> dict[str, Any]:
    """The repository's config.json, as timm (`local-dir:`, `hf-hub:`) and transformers (TimmWrapper) read it.

    Args:
        entry: The manifest's entry.

    Returns:
        A dictionary of JSON's types. Class names are readable ones, which transformers' pipeline shows; timm and
        transformers look ImageNet-1k's up themselves.
    """
    label_set = load_manifest().label_sets.get(entry.label_set)
    names = label_set.classes.values() if label_set else ()
    sources = ('url', 'file', 'hf_hub_id', 'hf_hub_filename', 'label_names', 'label_descriptions')
    cfg = {key: value for key, value in pretrained_cfg(entry).items() if key not in sources}
    return {
        'architecture': entry.architecture,
        'num_classes': entry.num_classes,
        **({'label_names': list(names)} if names else {}),
        'pretrained_cfg': {'tag': entry.tag, 'custom_load': False, **cfg},
        'model_args': {},  # without it transformers' save_pretrained writes null, which timm cannot load
    }
