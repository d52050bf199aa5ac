"""timm's and the Hub's configurations of each tag, and the converted tags, which timm's registry lists.

A converted tag is a trained ResNet of timm's, converted when it is loaded: `geoprior_resnet50.from_a1_in1k`. There is
one for each tag of resnet50, resnet101 and resnet152 that timm has weights of. The manifest adds a pin (revision and
SHA-256 of the source's file) and what was measured.
"""
import csv
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

from .manifest import SOURCES, ConvertedEntry, InputConfig, Manifest, ManifestError, ModelEntry, Source, load_manifest

__all__ = [
    'PUBLISHED_RESULTS', 'bundled_path', 'converted_entries', 'describe_source', 'hub_config', 'pretrained_cfg',
    'pretrained_cfgs', 'source_keys',
]

WEIGHTS_DIR = Path(__file__).parent / 'weights'
NUM_FEATURES = 2048
# made by `python -m timm_geoprior.release.pin results-imagenet.csv`
PUBLISHED_RESULTS = Path(__file__).parent / 'source_results.csv'


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
    """timm's cfg of one tag; of a converted tag that of its source, to be loaded as safetensors from the Hub alone."""
    if entry.source:
        cfg: Any = get_pretrained_cfg(entry.source.name)
        kept = cfg.to_dict(remove_source=True).items()
        return {**source_keys(entry), **{key: value for key, value in kept if key not in ('architecture', 'tag')}}
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

    Class names are readable ones, which transformers' pipeline shows; both look ImageNet-1k's up themselves.
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


# -- converted tags ----------------------------------------------------------------------------------------------------

def converted_entries(manifest: Manifest) -> Iterator[ModelEntry]:
    """The converted tags, in timm's order, the default of each architecture first; the manifest has pins and figures.
    """
    for architecture, source in SOURCES.items():
        # a classifier of another number of classes changes the number of parameters
        counts = [entry.parameters - (NUM_FEATURES + 1) * entry.num_classes for entry in manifest.models.values()
                  if entry.architecture == architecture and entry.parameters]
        for place, cfg in enumerate(get_arch_pretrained_cfgs(source).values()):
            if cfg.hf_hub_id:
                parameters = counts[0] + (NUM_FEATURES + 1) * cfg.num_classes if counts else None
                yield _converted_entry(architecture, cfg, place == 0, parameters, manifest)


def _converted_entry(
        architecture: str, cfg: Any, default: bool, parameters: int | None, manifest: Manifest) -> ModelEntry:
    name, source = f'{architecture}.from_{cfg.tag}', f'{cfg.architecture}.{cfg.tag}'
    held = manifest.converted.get(name, ConvertedEntry())
    published = _published().get((source, cfg.input_size[-1], cfg.crop_pct), ())
    return ModelEntry(
        name=name, status='converted', default=default, license=cfg.license or 'none stated',
        data_terms=f'those of the data of {cfg.hf_hub_id}, as its model card has them',
        input=InputConfig(cfg.input_size, cfg.interpolation, cfg.crop_pct, cfg.crop_mode, cfg.mean, cfg.std),
        label_set='imagenet-1k' if cfg.num_classes else '', num_classes=cfg.num_classes, first_conv=cfg.first_conv,
        parameters=parameters, hub_id=cfg.hf_hub_id,
        file='model.safetensors',  # timm's own cfgs would fall back to pickled weights
        revision=held.revision, sha256=held.sha256, bytes=held.bytes, metrics=held.metrics,
        source=Source(source, *published))


@functools.cache
def _published() -> dict[tuple[str, int, float], tuple[float, float]]:
    """Top-1 and top-5 that timm has published, by name, size and crop; it has none of some."""
    with PUBLISHED_RESULTS.open(encoding='utf-8', newline='') as file:
        rows = csv.DictReader(line for line in file if not line.startswith('#'))
        return {(row['model'], int(row['img_size']), float(row['crop_pct'])): (float(row['top1']), float(row['top5']))
                for row in rows}


def describe_source(entry: ModelEntry) -> str:
    """What is known of the accuracy of a converted tag, in sentences."""
    assert entry.source is not None, 'the manifest checks that a converted tag has one'
    text = f"Converted from timm's {entry.source.name}"
    if entry.source.top1 is not None:
        text += (f', whose top-1 accuracy on ImageNet-1k timm gives as {entry.source.top1:.2f}% at '
                 f'{entry.input.input_size[-1]} px, crop {entry.input.crop_pct:g}')
    if not entry.num_classes:
        return f'{text}. It has no classifier.'
    return text + ('.' if entry.metrics else '. The accuracy of the converted network has not been measured.')
