"""Converted tags: timm's list and cfgs, loading with and without the Hub, pins, and recorded figures."""
import io
import json
import logging
import pickle
import shutil
import warnings
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

from hub_server import broken_after, status
from networks import randomize
from releases import using_manifest
from timm_geoprior import GeoPriorAttn2d
from timm_geoprior.cli import main
from timm_geoprior.conversion.state_dict import convert_state_dict
from timm_geoprior.errors import GeoPriorError, WeightsError
from timm_geoprior.inference.classifier import load_classifier
from timm_geoprior.pretrained.download import download_tag
from timm_geoprior.pretrained.manifest import SOURCES, ManifestError, Metric, load_manifest, manifest_path
from timm_geoprior.pretrained.verify import doctor, verify_tags
from timm_geoprior.release.pin import pin_sources, write_published_results
from timm_geoprior.release.releasing import record_results
from timm_geoprior.release.staging import stage
from timm_geoprior.training.checkpoint import SavedModel

LARGE, TAG, REPO = 'geoprior_resnet50', 'geoprior_resnet50.from_a1_in1k', 'timm/resnet50.a1_in1k'
DEFAULTS = {'resnet50': 'a1_in1k', 'resnet101': 'a1h_in1k', 'resnet152': 'a1h_in1k'}
CONVERTED = [name for name, entry in load_manifest().tags.items() if entry.status == 'converted']
BACKBONE = f'{LARGE}.from_bamboo'


def source(name: str) -> dict[str, torch.Tensor]:
    """Random weights of a plain ResNet, with random norms."""
    torch.manual_seed(0)
    return randomize(timm.create_model(name)).state_dict()


@pytest.fixture(scope='module')
def plain():
    """The source of the default tag, as a file's bytes."""
    return save(source('resnet50'), {'format': 'pt'})


@pytest.fixture
def published(hub, plain):
    """Publish the source on the Hub; the commit."""
    return hub.publish(REPO, {'model.safetensors': plain})


@pytest.fixture(scope='module')
def expected(plain, tmp_path_factory):
    path = tmp_path_factory.mktemp('plain') / 'model.safetensors'
    path.write_bytes(plain)
    return convert_state_dict(load_file(path), timm.create_model(LARGE))


@pytest.fixture
def manifest(tmp_path):
    """A copy of the manifest, which the package uses instead of its own."""
    path = Path(shutil.copy(manifest_path(), tmp_path / 'weights_manifest.json'))
    with using_manifest(path):
        yield path


def same(model, state):
    found = model.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in found)


# -- the list ----------------------------------------------------------------------------------------------------------

def test_there_is_a_tag_for_each_of_timms():
    for architecture, plain_name in SOURCES.items():
        cfgs = get_arch_pretrained_cfgs(plain_name)
        tags = [entry.tag for entry in load_manifest().tags.values()
                if entry.architecture == architecture and entry.status == 'converted']
        assert tags == [f'from_{cfg.tag}' for cfg in cfgs.values() if cfg.hf_hub_id]
        assert set(timm.list_pretrained(f'{architecture}.from_*')) == {f'{architecture}.{tag}' for tag in tags}
        default = load_manifest().get(architecture)
        assert default.tag == f'from_{get_pretrained_cfg(plain_name).tag}' == f'from_{DEFAULTS[plain_name]}'
        assert timm.list_pretrained(f'{architecture}*')
        assert get_pretrained_cfg(architecture).tag == default.tag


@pytest.mark.parametrize('name', CONVERTED)
def test_the_cfg_is_timms_but_for_its_source(name):
    entry = load_manifest().get(name)
    ours, timms = get_pretrained_cfg(name), get_pretrained_cfg(entry.source.name)
    differ = {field.name for field in fields(ours) if getattr(ours, field.name) != getattr(timms, field.name)}
    assert differ - {'url'} == {'architecture', 'tag', 'hf_hub_filename'}
    assert (ours.url, ours.hf_hub_id, ours.hf_hub_filename) == (None, timms.hf_hub_id, 'model.safetensors')
    assert (ours.architecture, ours.tag) == (entry.architecture, f'from_{timms.tag}')


def test_the_defaults_are_of_imagenet_at_224():
    for architecture in SOURCES:
        with torch.device('meta'):
            model = timm.create_model(architecture)
        assert (model.num_classes, model.pretrained_cfg['input_size']) == (1000, (3, 224, 224))


def test_published_figures_of_the_sources():
    figures = {name: load_manifest().get(name).source for name in CONVERTED}
    assert {name for name, figure in figures.items() if figure.top1 is None} == {BACKBONE} & set(CONVERTED)
    assert [round(load_manifest().get(name).source.top1, 2) for name in SOURCES] == [80.38, 81.95, 82.82]
    assert figures[f'{LARGE}.from_tv_in1k'].top1 == 76.156


def test_the_file_of_published_figures_is_what_its_command_writes(tmp_path):
    table = tmp_path / 'results-imagenet.csv'
    table.write_text('model,img_size,top1,top1_err,top5,top5_err,param_count,crop_pct,interpolation\n'
                     'resnet50.a1_in1k,288,81.240,18.760,95.112,4.888,25.56,1.000,bicubic\n'
                     'resnet50.a1_in1k,224,80.382,19.618,94.598,5.402,25.56,0.950,bicubic\n'
                     'resnet18.a1_in1k,224,71.498,28.502,90.082,9.918,11.69,0.950,bicubic\n')
    assert write_published_results(table, tmp_path / 'out.csv') == 1
    assert (tmp_path / 'out.csv').read_text().splitlines()[2:] == [
        'model,img_size,crop_pct,top1,top5', 'resnet50.a1_in1k,224,0.950,80.382,94.598']


def test_list_and_info(capsys):
    assert main(['list', '--json']) == 0
    rows = {row['name']: row for row in json.loads(capsys.readouterr().out)}
    assert [name for name in rows if rows[name]['status'] == 'converted'] == CONVERTED
    row = rows[TAG]
    assert (row['default'], row['source'], row['source_top1'], row['top1']) == (True, 'resnet50.a1_in1k', 80.382, None)
    assert (rows[f'{LARGE}.from_tv2_in1k']['img_size'], rows[f'{LARGE}.from_tv2_in1k']['license']) == (
        176, 'bsd-3-clause')
    assert main(['list']) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith(TAG))
    assert line.split() == [TAG, '*', 'converted', 'ImageNet-1k', 'apache-2.0', '24,541,237', '-', '80.38', '224', '-']
    assert sum(' * ' in line for line in lines) == 4


# -- loading -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('plain_name', SOURCES.values())
def test_a_bare_name_loads_its_source_converted(hub, plain_name, tmp_path, caplog):
    state = source(plain_name)
    hub.publish(f'timm/{plain_name}.{DEFAULTS[plain_name]}', {'model.safetensors': save(state, {'format': 'pt'})})
    caplog.set_level(logging.INFO, logger='timm_geoprior')
    model = timm.create_model(f'geoprior_{plain_name}', pretrained=True, cache_dir=tmp_path)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith('Converted the weights of a plain ResNet')
    assert same(model, convert_state_dict(state, model))
    assert hub.count('GET /objects/') == 1
    if plain_name != 'resnet50':  # the rest would be the same for each
        return
    hub.stop()
    try:
        again = timm.create_model(f'geoprior_{plain_name}', pretrained=True, cache_dir=tmp_path)
    finally:
        hub.start()
    assert same(again, model.state_dict())


ADAPTATIONS = [{'num_classes': 7}, {'num_classes': 0}, {'in_chans': 1}, {'features_only': True, 'output_stride': 8}]


@pytest.mark.parametrize('options', ADAPTATIONS, ids=str)
def test_adapts_as_timm_does(published, expected, options, tmp_path):
    torch.manual_seed(1)
    model = timm.create_model(LARGE, pretrained=True, cache_dir=tmp_path, **options)
    torch.manual_seed(1)  # what is not loaded is random
    wanted = timm.create_model(
        LARGE, pretrained=True, pretrained_cfg_overlay={'state_dict': dict(expected)}, **options)
    assert same(model, wanted.state_dict())
    assert 'state_dict' not in model.pretrained_cfg


def test_segmentation_models_and_transformers(published, expected, tmp_path, monkeypatch):
    smp, transformers = pytest.importorskip('segmentation_models_pytorch'), pytest.importorskip('transformers')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'cache'))
    unet = smp.Unet(f'tu-{LARGE}', encoder_weights=True, classes=1)
    assert same(unet.encoder.model, {key: value for key, value in expected.items() if not key.startswith('fc.')})
    folder = download_tag(LARGE, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ['config.json', 'model.safetensors']
    wrapped = transformers.TimmWrapperForImageClassification.from_pretrained(folder)
    assert same(wrapped.timm_model, expected)
    assert wrapped.config.id2label[0] == 'tench, Tinca tinca'
    assert same(timm.create_model(f'local-dir:{folder}', pretrained=True), expected)
    backbone = transformers.TimmBackbone.from_pretrained(LARGE)
    kept = {key: value for key, value in backbone._backbone.state_dict().items() if key.endswith(('weight', 'radius'))}
    assert kept
    assert [key for key, value in kept.items() if not torch.equal(value, expected[key])] == []


def test_a_model_of_other_options_is_converted_for_them(published, tmp_path):
    options = {'value_dims': (8, 16, 32, 64), 'attn_heads': 4, 'attn_kernel': 'laplacian'}
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)  # no warning about the kernel, for which the weights are fitted
        model = timm.create_model(LARGE, pretrained=True, cache_dir=tmp_path, **options)
    radii = [layer.radius() for layer in model.modules() if isinstance(layer, GeoPriorAttn2d)]
    assert len(radii) == 16
    assert all(len(values) == 4 and (values != 3).all() for values in radii)


def test_classify_names_imagenets_classes(published, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'cache'))
    image = Image.fromarray(torch.randint(256, (64, 64, 3), dtype=torch.uint8).numpy())
    image.save(tmp_path / 'noise.png')
    assert main(['classify', '--model', LARGE, '--json', str(tmp_path / 'noise.png')]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result['model'] == TAG
    assert len(result['predictions']) == 5
    labels = load_manifest().label_sets['imagenet-1k'].wnids
    assert all(guess['label'] in labels for guess in result['predictions'])


def test_a_users_own_source_is_converted_by_timms_loading(published, hub, expected, plain, tmp_path):
    hub.publish('owner/mine', {'model.safetensors': plain})
    model = timm.create_model(LARGE, pretrained=True, cache_dir=tmp_path, pretrained_cfg_overlay={
        'hf_hub_id': 'owner/mine', 'hf_hub_filename': 'model.safetensors'})
    assert same(model, expected)
    assert hub.count('GET /timm') == 0


def test_without_a_network_one_sentence_says_so(hub, tmp_path, waits, caplog, capfd):
    hub.stop()
    try:
        with pytest.raises(WeightsError) as caught:
            timm.create_model(LARGE, pretrained=True, cache_dir=tmp_path)
    finally:
        hub.start()
    text = str(caught.value)
    assert text.startswith(f'The weights of {TAG} (model.safetensors of {REPO}) could not be fetched: http://127.0.0.1')
    assert text.endswith(
        'Check the network, the proxy and HF_ENDPOINT, or use geoprior_resnet50.r192_tin200, which needs no network.')
    assert '\n' not in text
    assert sum(waits) == 0
    assert caplog.text + ''.join(capfd.readouterr()) == ''


def test_offline_by_its_variable(published, hub, expected, tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(WeightsError, match=f'{REPO}.*HF_HUB_OFFLINE is set.*use geoprior_resnet50.r192_tin200'):
        timm.create_model(LARGE, pretrained=True, cache_dir=tmp_path)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    timm.create_model(LARGE, pretrained=True, cache_dir=tmp_path)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    hub.requests.clear()
    assert same(timm.create_model(LARGE, pretrained=True, cache_dir=tmp_path), expected)
    assert hub.requests == []


def pickled(state: dict[str, torch.Tensor]) -> bytes:
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


WRONG = {
    'a pickle': (pickle.dumps({'fc.weight': 1}), 'must be a safetensors file, got another in .* Delete it'),
    'a checkpoint of torch': (pickled({'fc.weight': torch.zeros(1)}), 'must be a safetensors file, got another in .*'),
    'nothing': (b'', 'must be a safetensors file, got another in'),
    'a cut file': (save({'fc.weight': torch.zeros(9)})[:-3], 'must be a safetensors file, got another in'),
    'another width': (save({'conv1.weight': torch.zeros(32, 3, 7, 7)}),
                      'cannot be made from timm/resnet50.a1_in1k: .* conv1.weight of the shape 64 x any x 7 x 7'),
    'a deeper one': (save({'layer3.6.bn1.weight': torch.zeros(1)}), 'cannot be made from .* got layer3.6.bn1.weight'),
}


@pytest.mark.parametrize('name', WRONG)
def test_a_wrong_source_is_one_sentence(hub, name, tmp_path):
    content, message = WRONG[name]
    hub.publish(REPO, {'model.safetensors': content})
    for options in ({}, {'num_classes': 7}):
        with pytest.raises(WeightsError, match=f'The weights of {TAG} {message}') as caught:
            timm.create_model(LARGE, pretrained=True, cache_dir=tmp_path, **options)
        assert '\n' not in str(caught.value)


def test_pickled_weights_are_never_taken(hub, tmp_path, waits):
    hub.publish(REPO, {'pytorch_model.bin': pickled({}), 'config.json': b'{}'})
    with pytest.raises(WeightsError, match='model.safetensors of timm/resnet50.a1_in1k.*no such file'):
        timm.create_model(LARGE, pretrained=True, cache_dir=tmp_path)
    assert hub.count(r'pytorch_model\.bin') == 0


@pytest.mark.parametrize(
    'action', [broken_after(100_000, reset=False), broken_after(100_000, reset=True), status(503)])
def test_a_broken_download(published, hub, expected, tmp_path, waits, action):
    hub.fault('GET /objects/', action, times=1000)
    with pytest.raises(WeightsError, match=r'could not be fetched: .*(broke off|answered 503).*, or use geoprior'):
        timm.create_model(LARGE, pretrained=True, cache_dir=tmp_path)
    hub.faults.clear()
    hub.fault('GET /objects/', action)
    assert same(timm.create_model(LARGE, pretrained=True, cache_dir=tmp_path), expected)


@pytest.mark.parametrize(('answer', 'message'), [
    (status(401), 'answered 401'), (status(404, X_Error_Code='RepoNotFound'), 'answered 404'),
    (status(429), 'answered 429')])
def test_answers_of_the_hub(hub, tmp_path, waits, answer, message):
    hub.fault('HEAD', answer, times=1000)
    with pytest.raises(WeightsError, match=f'{REPO}.*{message}'):
        timm.create_model(LARGE, pretrained=True, cache_dir=tmp_path)


# -- pins --------------------------------------------------------------------------------------------------------------

def test_a_pinned_source_is_verified(published, hub, manifest, plain, expected, tmp_path, capsys):
    assert main(['pin', LARGE]) == 0
    assert capsys.readouterr().out.startswith(f'{TAG}: {REPO} at {published}, sha256 ')
    entry = load_manifest().get(LARGE)
    assert (entry.revision, entry.bytes) == (published, len(plain))
    assert load_manifest(manifest).converted.keys() == {TAG}
    with using_manifest(manifest):
        assert get_pretrained_cfg(LARGE).hf_hub_id == f'{REPO}@{published}'
        hub.publish(REPO, {'model.safetensors': b'something newer'})
        assert same(timm.create_model(LARGE, pretrained=True, cache_dir=tmp_path), expected)
        hub.requests.clear()
        timm.create_model(LARGE, pretrained=True, cache_dir=tmp_path)
        assert hub.requests == []
        (blob,) = {path.resolve() for path in tmp_path.rglob('model.safetensors')}
        blob.write_bytes(b'x' + blob.read_bytes()[1:])
        assert same(timm.create_model(LARGE, pretrained=True, cache_dir=tmp_path), expected)
        assert hub.count('GET /objects/') == 1
        hub.objects[entry.sha256] = plain[:-1] + b'x'
        blob.write_bytes(b'x' + blob.read_bytes()[1:])
        with pytest.raises(WeightsError, match=f'The weights of {TAG} in .* must have the SHA-256 {entry.sha256}'):
            timm.create_model(LARGE, pretrained=True, cache_dir=tmp_path)


def test_verify_and_doctor(published, hub, manifest, tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'cache'))
    (check,) = verify_tags([LARGE])
    assert (check.ok, check.detail) == (None, f'{REPO} is not pinned: the manifest has no hash of it')
    assert TAG not in doctor()['tags']
    list(pin_sources([TAG], manifest))
    assert [(check.what, check.ok) for check in verify_tags([TAG])] == [
        ('cached file', None), ('file on the Hub', True)]
    assert {check.name for check in verify_tags() if check.what == 'file on the Hub'} == {TAG}
    timm.create_model(TAG, pretrained=True)
    assert [(check.what, check.ok) for check in verify_tags([TAG])] == [
        ('cached file', True), ('file on the Hub', True)]
    assert doctor()['tags'][TAG] == 'converted, loads'


def test_pins_of_all_sources(hub, manifest):
    for name in CONVERTED:
        hub.publish(load_manifest().get(name).hub_id, {'model.safetensors': name.encode()})
    assert len(list(pin_sources((), manifest))) == len(CONVERTED)
    held = load_manifest(manifest).converted
    assert held.keys() == set(CONVERTED)
    assert all(held[name].sha256 in hub.objects for name in CONVERTED)


@pytest.mark.parametrize(('names', 'error', 'message'), [
    (['geoprior_resnet14_nano'], GeoPriorError,
     'The tags to pin must be converted ones, got geoprior_resnet14_nano.r64'),
    ([f'{LARGE}.from_nowhere'], ManifestError, f'must be one of {LARGE}'),
    ([LARGE], GeoPriorError, f'{TAG} could not be pinned to {REPO}: the Hub answered 40[14]')])
def test_what_cannot_be_pinned(hub, manifest, names, error, message):
    before = manifest.read_bytes()
    with pytest.raises(error, match=message):
        list(pin_sources(names, manifest))
    assert manifest.read_bytes() == before


# -- figures -----------------------------------------------------------------------------------------------------------

def results(path: Path, sha256: str, **changes) -> Path:
    preprocessing = {**asdict(load_manifest().get(TAG).input), **changes}
    path.write_text(json.dumps({
        'results': [{'precision': 'float32', 'num_images': 50_000, 'top1_correct': 40_000, 'top5_correct': 47_000}],
        'data': {'split': 'val'}, 'weights': {'pretrained': TAG, 'sha256': sha256}, 'preprocessing': preprocessing,
        'software': {'timm': timm.__version__}}))
    return path


def test_measured_figures_are_recorded_until_the_bytes_change(published, hub, manifest, plain, tmp_path, capsys):
    with pytest.raises(GeoPriorError, match=f'{TAG} must be pinned before its figures are recorded'):
        record_results(load_manifest().get(TAG), results(tmp_path / 'a.json', '0' * 64), manifest)
    list(pin_sources([TAG], manifest))
    entry = load_manifest().get(TAG)
    with pytest.raises(GeoPriorError, match=f'must have figures of the weights with sha256 {entry.sha256}'):
        record_results(entry, results(tmp_path / 'a.json', '0' * 64), manifest)
    with pytest.raises(GeoPriorError, match='crop_pct in .* must be that of .*, got 0.875'):
        record_results(entry, results(tmp_path / 'a.json', entry.sha256, crop_pct=0.875), manifest)
    for change in ({'weights': None}, {'classes': 3}, {'preprocessing': {'input_size': []}}, {'data': None}):
        spoilt = tmp_path / 'spoilt.json'
        spoilt.write_text(json.dumps({**json.loads((tmp_path / 'a.json').read_text()), **change}))
        with pytest.raises(GeoPriorError, match=r'spoilt\.json must be a results file of `timm-geoprior validate` \('):
            record_results(entry, spoilt, manifest)
    with pytest.raises(GeoPriorError, match='--results alone must be figures of a converted tag'):
        record_results(load_manifest().get('geoprior_resnet14_nano'), tmp_path / 'a.json', manifest)
    entry = record_results(entry, results(tmp_path / 'a.json', entry.sha256), manifest)
    assert entry.metrics == (
        Metric('ImageNet-1k', 'val', 50_000, 40_000, 47_000, 'float32', 224, {'timm': timm.__version__}),)
    assert load_manifest(manifest).get(TAG) == entry
    list(pin_sources([TAG], manifest))
    assert load_manifest(manifest).get(TAG).metrics == entry.metrics
    hub.publish(REPO, {'model.safetensors': b'newer'})
    (line,) = pin_sources([TAG], manifest)
    assert line.endswith('its figures, measured with other bytes, were removed')
    assert load_manifest(manifest).get(TAG).metrics == ()


def test_nothing_of_a_converted_tag_is_published(tmp_path):
    with pytest.raises(GeoPriorError, match="must be a tag of the manifest's own, got one that is converted"):
        stage(load_manifest().get(LARGE), SavedModel({}), tmp_path / 'staged')


# -- without a classifier ----------------------------------------------------------------------------------------------

@pytest.mark.skipif(BACKBONE not in CONVERTED, reason='timm has the weights from 1.0.31 on')
def test_a_backbone_is_no_classifier(hub, tmp_path, capsys):
    name = BACKBONE
    with pytest.raises(GeoPriorError, match=f'must have a classifier, got {name}, which has none.*finetune'):
        load_classifier(name)
    assert main(['classify', '--model', name]) == 1
    assert 'must have a classifier' in capsys.readouterr().err
    assert hub.requests == []
    state = {key: value for key, value in source('resnet50').items() if not key.startswith('fc.')}
    hub.publish('timm/resnet50.bamboo', {'model.safetensors': save(state, {'format': 'pt'})})
    model = timm.create_model(name, pretrained=True, cache_dir=tmp_path).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 2048)
    assert same(model, convert_state_dict(state, model))
    assert timm.create_model(name, pretrained=True, cache_dir=tmp_path, num_classes=3).fc.out_features == 3
