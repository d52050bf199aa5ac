"""The manifest: what it holds, what it rejects, and that two writers lose nothing."""
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from timm.data import ImageNetInfo

import timm_geoprior  # noqa: F401
from timm_geoprior.pretrained.manifest import (
    Golden,
    ManifestError,
    Metric,
    load_manifest,
    manifest_path,
    parse_manifest,
    update_converted,
    update_manifest,
)

TEXT = manifest_path().read_text(encoding='utf-8')
MANIFEST = load_manifest()
NANO = 'geoprior_resnet14_nano.r64_tin200'

RELEASED = {
    'status': 'published', 'hub_id': 'owner/name', 'revision': '0' * 40, 'file': 'model.safetensors',
    'sha256': '1' * 64, 'bytes': 100, 'dtype': 'float16', 'golden': {'file': 'golden.safetensors', 'sha256': '2' * 64},
    'parameters': 50, 'seed': 0, 'recipe_commit': '3' * 40, 'base_model': 'owner/other',
    'metrics': [{'dataset': 'd', 'split': 's', 'num_images': 10, 'top1_correct': 5, 'top5_correct': 7,
                 'precision': 'float32', 'img_size': 64, 'software': {'torch': '2'}}],
    'train_log': {'epochs': 3, 'hours': 0.5, 'hardware': 'a CPU', 'software': {}},
}
RELEASED['baseline'] = {'architecture': 'resnet50', 'parameters': 60, 'metric': RELEASED['metrics'][0]}


def document(**changes):
    """A manifest whose nano entry has every key, with changes: 'a__b' is key b of key a, and None removes it."""
    data = json.loads(TEXT)
    entry = data['models'][NANO]
    entry.update(json.loads(json.dumps(RELEASED)))
    for path, value in changes.items():
        *parents, key = path.split('__')
        target = entry
        for parent in parents:
            target = target[int(parent) if parent.isdigit() else parent]
        if value is None:
            del target[key]
        else:
            target[key] = value
    return data


def test_file_is_as_the_writer_writes_it():
    assert MANIFEST.to_json() == TEXT


def test_every_key_survives_the_round_trip():
    data = document()
    assert json.loads(parse_manifest(json.dumps(data)).to_json()) == {
        **data, 'models': {**data['models'], NANO: _without_empty(data['models'][NANO])}}


def _without_empty(data):
    if isinstance(data, dict):
        return {key: _without_empty(value) for key, value in data.items() if value != {}}
    return [_without_empty(value) for value in data] if isinstance(data, list) else data


@pytest.mark.parametrize(('path', 'value'), [
    ('status', 'released'), ('status', 3), ('default', 1), ('license', None), ('data_terms', ['x']),
    ('label_set', None), ('label_set', ['tin200']), ('sha256', '1' * 63), ('sha256', 'A' * 64), ('sha256', None),
    ('revision', 'main'), ('revision', None), ('hub_id', 'name'), ('hub_id', None), ('bytes', 0), ('bytes', 1.5),
    ('bytes', True), ('bytes', None), ('parameters', -1), ('dtype', 'int8'), ('file', 'pytorch_model.bin'),
    ('file', '../model.safetensors'), ('file', None), ('golden', None), ('golden__sha256', 'x'),
    ('golden__file', 'a/b.safetensors'), ('seed', -1), ('colour', 'red'), ('input__input_size', [3, 64]),
    ('input__input_size', [3, 0, 64]), ('input__crop_pct', 0), ('input__crop_pct', 1.5), ('input__std', [1, 0, 1]),
    ('input__mean', '0.5'), ('input__mean', None), ('metrics', {}), ('metrics__0__num_images', 0),
    ('metrics__0__top1_correct', -1), ('metrics__0__top1_correct', 0.5), ('metrics__0__top1', 50.0),
    ('metrics__0__img_size', '64'), ('metrics__0__software__torch', 2), ('train_log__epochs', -1),
    ('train_log__hours', 'two'), ('baseline__parameters', 0), ('baseline__metric', None),
], ids=lambda value: json.dumps(value)[:30])
def test_malformed_entries_are_refused(path, value):
    data = document(**{path: value})
    with pytest.raises(ManifestError, match='must be') as caught:
        parse_manifest(json.dumps(data))
    assert path.split('__')[-1] in str(caught.value) or NANO in str(caught.value)


@pytest.mark.parametrize(('text', 'message'), [
    ('', 'is not valid JSON'), ('{"schema_version": 1,', 'is not valid JSON'), ('[]', 'an object'),
    ('{}', 'schema_version'),
    (json.dumps({**json.loads(TEXT), 'schema_version': 2}), 'update timm_geoprior'),
    (json.dumps({**json.loads(TEXT), 'extra': 1}), 'A key of .* must be one of schema_version, .*, got .extra.'),
    (json.dumps({**json.loads(TEXT), 'models': []}), 'models'),
    (json.dumps({**json.loads(TEXT), 'models': {'no_tag': document()['models'][NANO]}}), 'architecture.tag'),
    (json.dumps(document(label_set='imagenet-9')), 'imagenet-1k'),
    (json.dumps(document(default=False)), 'default of geoprior_resnet14_nano'),
    (json.dumps(document(metrics__0__top1_correct=8)), 'counts in this order'),
])
def test_malformed_files_are_refused(text, message):
    with pytest.raises(ManifestError, match=message):
        parse_manifest(text)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(ManifestError, match='cannot be read .No such file'):
        load_manifest(tmp_path / 'none.json')


def test_names_are_looked_up_with_and_without_tag():
    for entry in MANIFEST.tags.values():
        assert MANIFEST.get(entry.name) is entry
        if entry.default:
            assert MANIFEST.get(entry.architecture) is entry
    with pytest.raises(ManifestError, match=f"must be one of .*{NANO}.*got 'resnet50'"):
        MANIFEST.get('resnet50')
    with pytest.raises(ManifestError, match="one of geoprior_resnet152.*from_a1h_in1k.*got 'geoprior_resnet152.x'"):
        MANIFEST.get('geoprior_resnet152.x')


def test_label_sets_are_timms():
    timms = ImageNetInfo('imagenet-1k')
    names = dict(zip(timms.label_names(), timms.label_descriptions(), strict=True))
    for name, size in (('imagenet-1k', 1000), ('tin200', 200)):
        label_set = MANIFEST.label_sets[name]
        assert len(label_set.wnids) == len(set(label_set.wnids)) == label_set.num_classes == size
        assert list(label_set.wnids) == sorted(label_set.wnids)
        assert label_set.names == tuple(names[wnid] for wnid in label_set.wnids)


def test_metrics_give_percent():
    metric = Metric('d', 'validation', 50_000, 38_065, 46_430, 'float32', 224)
    assert (metric.top1, metric.top5) == (76.13, 92.86)


@pytest.mark.parametrize('name', MANIFEST.tags)
def test_timm_knows_what_the_manifest_says(name):
    entry = MANIFEST.tags[name]
    cfg = timm.models.get_pretrained_cfg(name)
    assert (cfg.architecture, cfg.tag) == (entry.architecture, entry.tag)
    for key in ('input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std'):
        assert getattr(cfg, key) == getattr(entry.input, key)
    assert (cfg.num_classes, cfg.first_conv) == (entry.num_classes, entry.first_conv)
    assert (cfg.license or 'none stated') == entry.license
    assert cfg.label_names is None or cfg.label_names == MANIFEST.label_sets[entry.label_set].wnids
    assert (name in timm.list_pretrained('*geoprior*')) == entry.has_weights == bool(cfg.has_weights)
    if entry.default:
        assert timm.models.get_pretrained_cfg(entry.architecture) == cfg


@pytest.mark.parametrize('name', [name for name, entry in MANIFEST.tags.items()
                                  if entry.default or entry.status != 'converted' or not entry.num_classes])
def test_parameters_and_first_convolution_are_the_networks(name):
    entry = MANIFEST.tags[name]
    with torch.device('meta'):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == entry.parameters
    convolutions = (key for key, layer in model.named_modules() if isinstance(layer, torch.nn.Conv2d))
    assert next(convolutions) == entry.first_conv


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copy(manifest_path(), tmp_path))


def released(entry, sha256='1' * 64):
    return replace(entry, status='bundled', file='a.safetensors', sha256=sha256, bytes=10, dtype='float16',
                   parameters=5, golden=Golden('g.safetensors', '2' * 64))


def test_update_writes_one_entry_and_leaves_the_rest(copy):
    entry = released(MANIFEST.get('geoprior_resnet101.paper_in1k'))
    update_manifest(copy, entry)
    assert load_manifest(copy).models == {**MANIFEST.models, entry.name: entry}
    new = replace(entry, name='geoprior_resnet101.a1_in1k')
    assert list(update_manifest(copy, new).models) == [*MANIFEST.models, new.name]


def test_what_the_file_holds_of_converted_tags(copy):
    name, pin = 'geoprior_resnet101.from_a1h_in1k', {'revision': '0' * 40, 'sha256': '1' * 64, 'bytes': 178_000_000}
    assert (MANIFEST.tags[name].revision, MANIFEST.tags[name].metrics) == (None, ())
    update_converted(copy, name, **pin)
    metric = Metric('ImageNet-1k', 'val', 50_000, 40_000, 47_000, 'float32', 224)
    entry = update_converted(copy, name, metrics=(metric,)).tags[name]
    assert (entry.revision, entry.sha256, entry.bytes, entry.metrics) == ('0' * 40, '1' * 64, 178_000_000, (metric,))
    assert load_manifest(copy).models == MANIFEST.models
    assert load_manifest(copy).to_json() == copy.read_text(encoding='utf-8')
    for changes in ({'sha256': None}, {'revision': 'main'}, {'sha256': 'A' * 64}, {'bytes': 0}):
        with pytest.raises(ManifestError, match='must be'):
            update_converted(copy, name, **changes)


def test_update_keeps_released_bytes(copy):
    entry = released(MANIFEST.get('geoprior_resnet101.paper_in1k'))
    update_manifest(copy, entry)
    update_manifest(copy, replace(entry, license='mit'))
    before = copy.read_bytes()
    with pytest.raises(ManifestError, match="a tag's bytes never change"):
        update_manifest(copy, released(entry, '4' * 64))
    assert copy.read_bytes() == before
    update_manifest(copy, released(entry, '4' * 64), replace_weights=True)
    assert load_manifest(copy).get('geoprior_resnet101.paper_in1k').sha256 == '4' * 64


def test_update_refuses_what_does_not_fit(copy):
    for name, default in ((NANO, False), ('geoprior_resnet101.paper_in1k', True)):
        with pytest.raises(ManifestError, match=f'default of {name.split(".")[0]}'):
            update_manifest(copy, replace(MANIFEST.get(name), default=default))
    assert copy.read_text(encoding='utf-8') == TEXT


def test_failed_write_leaves_the_old_file_and_nothing_else(copy, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(ManifestError, match=r'could not be written \(.*No space left on device\) and is unchanged'):
        update_manifest(copy, released(MANIFEST.get('geoprior_resnet101.paper_in1k')))
    assert copy.read_text(encoding='utf-8') == TEXT
    assert {path.name for path in copy.parent.iterdir()} <= {copy.name, f'.{copy.name}.lock'}


def _add_tags(path, worker, barrier):
    barrier.wait()
    for number in range(5):
        name = f'geoprior_resnet101.w{worker}_{number}'
        update_manifest(path, replace(load_manifest().get('geoprior_resnet101.paper_in1k'), name=name))
        update_converted(path, name.replace('.', '.from_'), revision='0' * 40, sha256='1' * 64, bytes=1)


def test_two_writers_at_once_lose_nothing(copy, forkserver):
    barrier = forkserver.Barrier(2)
    workers = [forkserver.Process(target=_add_tags, args=(copy, worker, barrier)) for worker in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    added = {f'geoprior_resnet101.w{worker}_{number}' for worker in range(2) for number in range(5)}
    assert set(load_manifest(copy).models) == {*MANIFEST.models, *added}
    assert set(load_manifest(copy).converted) == {name.replace('.', '.from_') for name in added}
