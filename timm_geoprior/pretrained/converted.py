"""Tags whose weights are a trained ResNet of timm's, converted when they are loaded: `geoprior_resnet50.from_a1_in1k`.

There is one for each tag of resnet50, resnet101 and resnet152 that timm has weights of. timm's registry is the list;
the manifest adds a pin (revision and SHA-256 of the source's file) and what was measured.
"""
import csv
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

from .manifest import SOURCES, ConvertedEntry, InputConfig, Manifest, ModelEntry, Source

__all__ = ['RESULTS_FILE', 'converted_cfg', 'converted_entries', 'describe_source']

FILE = 'model.safetensors'  # timm's own cfgs would fall back to pickled weights
LABEL_SET = 'imagenet-1k'
NUM_FEATURES = 2048
# made by `python -m timm_geoprior.release.pin results`
RESULTS_FILE = Path(__file__).parent / 'source_results.csv'


def converted_entries(manifest: Manifest) -> Iterator[ModelEntry]:
    """The converted tags, those of timm's order, the default first.

    Args:
        manifest: The manifest, for pins and figures.
    """
    for architecture, source in SOURCES.items():
        for place, cfg in enumerate(get_arch_pretrained_cfgs(source).values()):  # the default first
            if cfg.hf_hub_id:
                yield _entry(architecture, cfg, place == 0, manifest)


def _entry(architecture: str, cfg: Any, default: bool, manifest: Manifest) -> ModelEntry:
    name = f'{architecture}.from_{cfg.tag}'
    held = manifest.converted.get(name, ConvertedEntry())
    return ModelEntry(
        name=name, status='converted', default=default, license=cfg.license or 'none stated',
        data_terms=f'those of the data of {cfg.hf_hub_id}, as its model card has them',
        input=InputConfig(cfg.input_size, cfg.interpolation, cfg.crop_pct, cfg.crop_mode, cfg.mean, cfg.std),
        label_set=LABEL_SET if cfg.num_classes else '', num_classes=cfg.num_classes, first_conv=cfg.first_conv,
        parameters=_parameters(architecture, cfg.num_classes, manifest), hub_id=cfg.hf_hub_id, file=FILE,
        revision=held.revision, sha256=held.sha256, bytes=held.bytes, metrics=held.metrics,
        source=_source(f'{cfg.architecture}.{cfg.tag}', cfg.input_size[-1], cfg.crop_pct))


def _parameters(architecture: str, num_classes: int, manifest: Manifest) -> int | None:
    """Number of parameters, from that of another tag of the architecture: the classifiers differ."""
    for entry in manifest.models.values():
        if entry.architecture == architecture and entry.parameters:
            return entry.parameters + (NUM_FEATURES + 1) * (num_classes - entry.num_classes)
    return None


def _source(name: str, img_size: int, crop_pct: float) -> Source:
    """A source with timm's figures of it at the size and crop of its cfg; timm has none of some."""
    return Source(name, *_published().get((name, img_size, crop_pct), ()))


@functools.cache
def _published() -> dict[tuple[str, int, float], tuple[float, float]]:
    with RESULTS_FILE.open(encoding='utf-8', newline='') as file:
        rows = csv.DictReader(line for line in file if not line.startswith('#'))
        return {(row['model'], int(row['img_size']), float(row['crop_pct'])): (float(row['top1']), float(row['top5']))
                for row in rows}


def describe_source(entry: ModelEntry) -> str:
    """What is known of the accuracy of a converted tag, in sentences.

    Args:
        entry: The converted tag.
    """
    assert entry.source is not None, 'the manifest checks that a converted tag has one'
    text = f"Converted from timm's {entry.source.name}"
    if entry.source.top1 is not None:
        text += (f', whose top-1 accuracy on ImageNet-1k timm gives as {entry.source.top1:.2f}% at '
                 f'{entry.input.input_size[-1]} px, crop {entry.input.crop_pct:g}')
    if not entry.num_classes:
        return f'{text}. It has no classifier.'
    return text + ('.' if entry.metrics else '. The accuracy of the converted network has not been measured.')


def converted_cfg(entry: ModelEntry) -> dict[str, Any]:
    """timm's own cfg of a converted tag's source, to be loaded as safetensors from the Hub alone.

    Args:
        entry: The converted tag.
    """
    assert entry.source is not None, 'the manifest checks that a converted tag has one'
    cfg: Any = get_pretrained_cfg(entry.source.name)
    kept = cfg.to_dict(remove_source=True).items()
    return {key: value for key, value in kept if key not in ('architecture', 'tag')}
