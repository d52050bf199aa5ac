"""From a checkpoint to the Hub: what is staged, what reaches the manifest, and what a broken push leaves."""
import hashlib
import json
import logging
import os
import runpy
import shutil
import signal
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from hub_server import status, together
from releases import NANO, files, finish, planned, start, using_manifest, with_entry, write_results
from timm_geoprior.errors import GeoPriorError
from timm_geoprior.pretrained.loading import load_golden, load_verified
from timm_geoprior.pretrained.manifest import ManifestError, load_manifest, manifest_path
from timm_geoprior.pretrained.verify import golden_error
from timm_geoprior.release.releasing import bundle, push
from timm_geoprior.release.staging import Evidence, export_weights, read_staged, stage
from timm_geoprior.training.checkpoint import SavedModel, read_weights

ROOT = Path(__file__).parent.parent
FILES = {'model.safetensors', 'golden/outputs.safetensors', 'config.json', 'README.md', 'results.json', 'radii.png',
         'curves.png', 'train_log.csv'}


@pytest.fixture
def manifest(tmp_path):
    """A manifest for the test, in which the nano network is planned."""
    path = tmp_path / 'weights_manifest.json'
    path.write_text(with_entry(planned()).to_json(), encoding='utf-8')
    return path


@pytest.fixture
def login(monkeypatch):
    """A token that may write."""
    monkeypatch.setenv('HF_TOKEN', 'hf_writetoken')


# -- files -------------------------------------------------------------------------------------------------------------


def test_release_file(tmp_path):
    state = {'w': torch.randn(4, 6).t(), 'b': torch.randn(4).double(), 'log_radius': torch.tensor([1.23456789]),
             'count': torch.tensor(7), 'scalar': torch.tensor(0.1)}
    metadata = {'architecture': 'a', 'tag': 't', 'recipe': 'r', 'commit': 'c'}
    digests = {export_weights(dict(reversed(state.items())) if turn else state, tmp_path / 'a.safetensors', metadata)
               for turn in (0, 1)}
    content = (tmp_path / 'a.safetensors').read_bytes()
    assert digests == {hashlib.sha256(content).hexdigest()}
    released = load_file(tmp_path / 'a.safetensors')
    assert {name: tensor.dtype for name, tensor in released.items()} == {
        'w': torch.float16, 'b': torch.float32, 'log_radius': torch.float32, 'count': torch.int64,
        'scalar': torch.float32}
    for name, tensor in released.items():
        assert tensor.is_contiguous()
        assert torch.equal(tensor, state[name].to(tensor.dtype))
    with safe_open(tmp_path / 'a.safetensors', 'pt') as file:
        assert file.metadata() == {'format': 'pt', **metadata}
    assert content.index(b'"architecture"') < content.index(b'"commit"') < content.index(b'"tag"')


@pytest.mark.parametrize('recipe', ['größe', '大きさ', '🦊' * 9, 'a"b\\c\n\x07', ''])
def test_any_name_of_a_recipe_fits_into_the_file(tmp_path, recipe):
    state = {'w': torch.randn(4, 6), 'b': torch.randn(4)}
    digests = {export_weights(state, tmp_path / 'a.safetensors', {'recipe': recipe, 'tag': 't'}) for _ in range(2)}
    assert len(digests) == 1
    with safe_open(tmp_path / 'a.safetensors', 'pt') as file:
        assert file.metadata() == {'format': 'pt', 'recipe': recipe, 'tag': 't'}
        assert torch.equal(file.get_tensor('b'), state['b'])
        assert torch.equal(file.get_tensor('w'), state['w'].half())


@pytest.mark.parametrize('value', [float('nan'), float('inf'), 1e5])
def test_values_that_float16_cannot_hold_are_refused(tmp_path, value):
    with pytest.raises(GeoPriorError, match='values of w must be finite as torch.float16'):
        export_weights({'w': torch.full((2, 2), value)}, tmp_path / 'a.safetensors', {})
    assert list(tmp_path.iterdir()) == []


def test_raw_or_averaged_weights(run_folder):
    averaged, raw = (read_weights(run_folder / 'last.pt', weights).state_dict for weights in ('auto', 'raw'))
    assert torch.equal(averaged['fc.weight'], raw['fc.weight'] * 0.9)


@pytest.mark.parametrize('name', ['none.pt', 'none.safetensors', 'text.pt', 'text.safetensors', 'trap.pt'])
def test_what_is_no_checkpoint_is_refused(tmp_path, name):
    if name.startswith('text'):
        (tmp_path / name).write_text('weights')
    if name == 'trap.pt':
        torch.save({'model': Path('sprung')}, tmp_path / name)
    with pytest.raises(GeoPriorError, match=name):
        read_weights(tmp_path / name)


def test_weights_below_a_prefix_are_released_without_it(staged, run_folder, tmp_path):
    checkpoint = read_weights(run_folder / 'last.pt')
    prefixed = replace(checkpoint, state_dict={f'model.{name}': value for name, value in checkpoint.state_dict.items()})
    entry = stage(planned(), prefixed, tmp_path / 'staged', Evidence(run=run_folder))
    assert entry.sha256 == read_staged(staged, load_manifest()).sha256


def test_staged_folder(staged, run_folder):
    entry = read_staged(staged, load_manifest())
    assert files(staged) == FILES
    assert (staged.stat().st_mode & 0o777, entry.status) == (0o755, 'staged')
    assert (entry.sha256, entry.bytes) == (
        hashlib.sha256((staged / 'model.safetensors').read_bytes()).hexdigest(),
        (staged / 'model.safetensors').stat().st_size)
    assert (entry.recipe, entry.recipe_commit, entry.seed) == ('r64_tin200', 'a' * 40, 3)
    assert (entry.train_log.epochs, entry.train_log.hours, entry.train_log.hardware) == (2, 2.0, 'a CPU')
    (metric,) = entry.metrics
    assert (metric.dataset, metric.top1, metric.img_size) == ('Tiny-ImageNet-200', 54.32, 64)
    for name, source in (('train_log.csv', 'summary.csv'), ('curves.png', 'curves.png')):
        assert (staged / name).read_bytes() == (run_folder / source).read_bytes()
    with safe_open(staged / 'model.safetensors', 'pt') as file:
        assert file.metadata() == {'format': 'pt', 'architecture': 'geoprior_resnet14_nano', 'tag': 'r64_tin200',
                                   'recipe': 'r64_tin200', 'commit': 'a' * 40}
    model = timm.create_model('geoprior_resnet14_nano', num_classes=200)
    model.load_state_dict(read_weights(run_folder / 'last.pt').state_dict)
    assert golden_error(model, load_file(staged / 'golden/outputs.safetensors')) < 0.01


def test_experiments_go_into_the_card(run_folder, tmp_path):
    checkpoint, found = read_weights(run_folder / 'last.pt'), tmp_path / 'comparison.md'
    for content, reason in ((None, 'No such file or directory'), (b'\xff\xfe', 'it is not UTF-8')):
        if content:
            found.write_bytes(content)
        with pytest.raises(GeoPriorError, match=rf'comparison.md cannot be read \({reason}\)\. Name a Markdown file'):
            stage(planned(), checkpoint, tmp_path / 'nano', Evidence(run=run_folder, experiments=[found]))
        assert not (tmp_path / 'nano').exists()
    found.write_text('| variant | mean |\n| --- | ---: |\n| prior | 12.50 |\n')
    (more := tmp_path / 'more.md').write_text('Six seeds.\n')
    stage(planned(), checkpoint, tmp_path / 'nano', Evidence(run=run_folder, experiments=[found, more]))
    assert f'## Experiments\n\n{found.read_text()}\nSix seeds.\n\n## ' in (tmp_path / 'nano' / 'README.md').read_text()


def write_baseline(path, preprocessing=(), **counts):
    """Write a results file of scripts/validate.py for the plain network."""
    prepared = {**asdict(planned().input), **dict(preprocessing)}
    row = {'precision': 'float32', 'num_images': 10_000, 'top1_correct': 5000, 'top5_correct': 7000, **counts}
    path.write_text(json.dumps({
        'model': 'resnet14t', 'parameters': 123, 'results': [{**row, 'precision': 'bfloat16', 'top1_correct': 1}, row],
        'data': {'split': 'validation'}, 'preprocessing': prepared, 'software': {}}))


def test_the_baseline_is_the_figure_of_the_same_precision(staged, run_folder, tmp_path):
    write_baseline(tmp_path / 'plain.json')
    entry = stage(planned(), read_weights(run_folder / 'last.pt'), tmp_path / 'nano',
                  Evidence(run_folder / 'val.json', tmp_path / 'plain.json', run_folder))
    assert (entry.baseline.architecture, entry.baseline.parameters) == ('resnet14t', 123)
    assert (entry.baseline.metric.top1_correct, entry.baseline.metric.img_size) == (5000, 64)
    card = (tmp_path / 'nano' / 'README.md').read_text(encoding='utf-8')
    assert 'The plain `resnet14t`, trained by the same recipe, reaches' in card
    assert 'It has 123 parameters, this model' in card


@pytest.mark.parametrize(('preprocessing', 'counts', 'message'), [
    ({'crop_pct': 0.95}, {}, r'crop_pct in .* must be that of .*, 1.0, got 0.95. Measure .* with --crop-pct 1.0\.'),
    ({'interpolation': 'bicubic'}, {}, 'with --interpolation bilinear'),
    ({'input_size': (3, 224, 224)}, {}, r'got \[3, 224, 224\]\. .* with --input-size 3 64 64'),
    ({}, {'num_images': 9_999}, 'must have a figure of 10,000 images of validation in float32'),
])
def test_a_baseline_measured_otherwise_is_refused(staged, run_folder, tmp_path, preprocessing, counts, message):
    write_baseline(tmp_path / 'plain.json', preprocessing, **counts)
    with pytest.raises(GeoPriorError, match=message):
        stage(planned(), read_weights(run_folder / 'last.pt'), tmp_path / 'nano',
              Evidence(run_folder / 'val.json', tmp_path / 'plain.json', run_folder))
    assert not (tmp_path / 'nano').exists()


def test_staging_again_gives_the_same_bytes(staged, run_folder, tmp_path):
    shutil.copytree(staged, tmp_path / 'nano')
    (tmp_path / 'nano' / 'config.json').write_text('changed')
    checkpoint = read_weights(run_folder / 'last.pt')
    named = altered(checkpoint, model_name=f'{checkpoint.model_name}.of_any_tag')  # as in the recipes for ImageNet
    stage(planned(), named, tmp_path / 'nano', Evidence(run_folder / 'val.json', run=run_folder))
    assert files(tmp_path / 'nano') == files(staged)
    assert all((tmp_path / 'nano' / name).read_bytes() == (staged / name).read_bytes() for name in files(staged))


def altered(checkpoint, **changes):
    return SavedModel(**{**vars(checkpoint), **changes})


def alter_results(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(('change', 'message'), [
    (lambda c, run: altered(c, model_name='geoprior_resnet50'), 'must be of geoprior_resnet14_nano, got one of'),
    (lambda c, run: altered(c, model_kwargs={'attn_kernel': 'laplacian'}), 'trained with attn_kernel'),
    (lambda c, run: altered(c, state_dict={'fc.weight': torch.ones(2, 2)}), 'does not fit .*Missing key'),
    (lambda c, run: altered(c, state_dict={**c.state_dict, 'more': torch.ones(1)}), 'does not fit .*more'),
    (lambda c, run: altered(c, model_name='', state_dict=timm.create_model(
        planned().architecture, num_classes=200, value_dims=(0, 0, 0, 0)).state_dict()), 'got a plain ResNet'),
    (lambda c, run: altered(c, state_dict={k: v * 1e30 for k, v in c.state_dict.items()}), 'must be finite'),
    (lambda c, run: write_results(run / 'val.json', '0' * 64), 'must have figures of the weights with sha256'),
    (lambda c, run: alter_results(run / 'val.json', preprocessing={**asdict(planned().input), 'crop_pct': 0.875}),
     r'crop_pct in .* got 0.875. Measure the staged model.safetensors again with --crop-pct 1\.0'),
    (lambda c, run: alter_results(run / 'val.json', problems=['3 of 10,000 images were left out.']),
     r'must be of all classes and images of the set, got a part \(3 of 10,000 images were left out\)\.'),
    (lambda c, run: alter_results(run / 'val.json', classes={'competing': [0, 1]}), '2 classes competed, not 200'),
    (lambda c, run: alter_results(run / 'val.json', classes={'with_images': 3}), '3 of 200 classes have images'),
    (lambda c, run: alter_results(run / 'val.json', model_kwargs={'attn_kernel': 'laplacian'}),
     r'as it is, got figures of it with attn_kernel\. Measure the staged model.safetensors again without'),
    (lambda c, run: alter_results(run / 'val.json', results=[]), 'a results file .*ValueError: it has no figures'),
    (lambda c, run: (run / 'val.json').write_text('[]'), 'must be a results file .*ValueError: it has no figures'),
    (lambda c, run: (run / 'val.json').write_text('{}'), 'must be a results file .*KeyError'),
    (lambda c, run: (run / 'val.json').unlink(), 'must be a results file .*FileNotFoundError'),
    (lambda c, run: (run / 'results.json').unlink(), 'must hold the results.json of a finished run'),
])
def test_what_cannot_be_staged_leaves_nothing(staged, run_folder, tmp_path, change, message):
    # the fixture `staged` has written the figures to val.json
    run = tmp_path / 'run'
    shutil.copytree(run_folder, run)
    checkpoint = read_weights(run / 'last.pt')
    changed = change(checkpoint, run)
    (tmp_path / 'out').mkdir()
    with pytest.raises(GeoPriorError, match=message):
        stage(planned(), changed if isinstance(changed, SavedModel) else checkpoint, tmp_path / 'out' / 'nano',
              Evidence(run / 'val.json', run=run))
    assert list((tmp_path / 'out').iterdir()) == []


def test_a_folder_of_something_else_is_left_alone(run_folder, tmp_path):
    (tmp_path / 'photos').mkdir()
    with pytest.raises(GeoPriorError, match='which is not a staged folder'):
        stage(planned(), read_weights(run_folder / 'last.pt'), tmp_path / 'photos')
    assert list(tmp_path.iterdir()) == [tmp_path / 'photos']


def test_a_run_is_no_staged_folder(run_folder):
    """Its results have the same file name as a staged folder's, and `--output RUN` is easily typed."""
    before = sorted(run_folder.iterdir())
    assert run_folder / 'results.json' in before
    with pytest.raises(GeoPriorError, match='which is not a staged folder'):
        stage(planned(), read_weights(run_folder / 'last.pt'), run_folder)
    assert sorted(run_folder.iterdir()) == before


def test_a_staged_folder_that_holds_more_is_left_alone(staged, run_folder, tmp_path):
    """Such as a run that was trained into it, or figures for `--results`."""
    folder = Path(shutil.copytree(staged, tmp_path / 'staged'))
    (folder / 'val.json').write_text('{}')
    with pytest.raises(GeoPriorError, match=r'which is one with val.json in it\. Name another'):
        stage(planned(), read_weights(run_folder / 'last.pt'), folder)
    assert (folder / 'val.json').exists()


def test_the_current_folder_cannot_be_staged_again(staged, run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(staged, tmp_path / 'staged'))
    with pytest.raises(GeoPriorError, match='which is the current one'):
        stage(planned(), read_weights(run_folder / 'last.pt'), Path())


def test_a_link_to_a_new_folder_is_staged_into(run_folder, tmp_path):
    (tmp_path / 'link').symlink_to('new')
    for _ in range(2):
        stage(planned(), read_weights(run_folder / 'last.pt'), tmp_path / 'link')
        assert (tmp_path / 'new' / 'model.safetensors').is_file()


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('model.safetensors', b'changed', r'must have the sha256 \w+, got'),
    ('golden/outputs.safetensors', b'changed', 'sha256'),
    ('results.json', b'{}', 'must be a staged folder'), ('results.json', None, 'must be a staged folder'),
    ('model.safetensors', None, 'must be a staged folder'),
])
def test_a_changed_folder_is_not_released(staged, tmp_path, manifest, name, content, message):
    folder = tmp_path / 'nano'
    shutil.copytree(staged, folder)
    (folder / name).write_bytes(content) if content else (folder / name).unlink()
    with pytest.raises(GeoPriorError, match=message):
        bundle(folder, manifest)
    assert load_manifest(manifest).get(NANO).status == 'planned'


# -- the package -------------------------------------------------------------------------------------------------------


def test_bundle(staged, manifest, weights_dir):
    entry = bundle(staged, manifest)
    assert load_manifest(manifest).get(NANO) == entry
    assert entry.status == 'bundled'
    assert {path.name for path in weights_dir.iterdir()} == {
        f'{NANO}.safetensors', f'{NANO}.golden.safetensors', f'{NANO}.train_log.csv'}
    with using_manifest(manifest):
        model = timm.create_model('geoprior_resnet14_nano', pretrained=True)
        assert golden_error(model, load_golden(entry)) <= 1e-5
        assert timm.is_model_pretrained(NANO)


def test_released_bytes_do_not_change(staged, run_folder, manifest, weights_dir, tmp_path):
    entry = bundle(staged, manifest)
    raw = read_weights(run_folder / 'last.pt', 'raw')
    before = {path: path.read_bytes() for path in (*weights_dir.iterdir(), manifest)}
    other = stage(entry, raw, tmp_path / 'other')
    assert other.metrics == ()
    for release in (bundle, lambda folder, manifest: push(folder, 'owner/nano', manifest_file=manifest)):
        with pytest.raises(ManifestError, match="a tag's bytes never change"):
            release(tmp_path / 'other', manifest)
    assert {path: path.read_bytes() for path in before} == before
    assert bundle(tmp_path / 'other', manifest, replace_weights=True).sha256 == other.sha256


def test_a_bundled_tag_is_staged_from_its_own_file(staged, manifest, weights_dir, tmp_path):
    entry = bundle(staged, manifest)
    again = stage(entry, read_weights(weights_dir / f'{NANO}.safetensors'), tmp_path / 'again')
    for name in ('model.safetensors', 'golden/outputs.safetensors', 'train_log.csv', 'results.json', 'config.json'):
        assert (tmp_path / 'again' / name).read_bytes() == (staged / name).read_bytes()
    assert again.metrics == entry.metrics


def test_other_weights_keep_nothing_of_the_old_ones(staged, manifest, weights_dir, run_folder, tmp_path):
    """Neither figures nor their origin, if the file itself does not state it."""
    write_baseline(tmp_path / 'plain.json')
    first = stage(planned(), read_weights(run_folder / 'last.pt'), tmp_path / 'first',
                  Evidence(run_folder / 'val.json', tmp_path / 'plain.json', run_folder))
    entry = bundle(tmp_path / 'first', manifest)
    assert first.baseline
    assert entry.train_log
    trained = read_weights(weights_dir / f'{NANO}.safetensors')
    other = SavedModel({key: value * 1.25 if value.ndim > 1 else value for key, value in trained.state_dict.items()})
    again = stage(entry, other, tmp_path / 'other')
    assert again.metrics == ()
    assert again.baseline is again.train_log is again.recipe_commit is again.seed is None
    assert not (tmp_path / 'other' / 'train_log.csv').exists()
    with safe_open(tmp_path / 'other' / 'model.safetensors', 'pt') as file:
        assert 'commit' not in file.metadata()
    retrained = stage(entry, altered(read_weights(run_folder / 'last.pt', 'raw'), seed=4), tmp_path / 'retrained')
    assert (retrained.metrics, retrained.baseline, retrained.seed) == ((), None, 4)
    assert retrained.recipe_commit == entry.recipe_commit  # this checkpoint's


def test_what_the_manifest_refuses_changes_no_weights(staged, manifest, weights_dir, run_folder, tmp_path):
    entry = bundle(staged, manifest)
    before = {path: path.read_bytes() for path in (*weights_dir.iterdir(), manifest)}
    second = replace(entry, name='geoprior_resnet14_nano.other')  # a second default of its architecture
    raw = read_weights(run_folder / 'last.pt', 'raw')
    stage(second, raw, tmp_path / 'other')
    with pytest.raises(ManifestError, match='default'):
        bundle(tmp_path / 'other', manifest)
    assert {path: path.read_bytes() for path in (*weights_dir.iterdir(), manifest)} == before


# -- the Hub -----------------------------------------------------------------------------------------------------------


def _load_by_plain_name(manifest, cache):
    time.sleep = lambda seconds: None  # huggingface_hub's retries wait; this process does nothing else
    os.environ['HF_TOKEN'] = 'hf_writetoken'  # the parent of this process may be older than the login
    with using_manifest(manifest):
        model = timm.create_model('geoprior_resnet14_nano', pretrained=True, cache_dir=cache)
        return golden_error(model, load_golden(load_manifest().get(NANO), cache))


def test_publish_load_and_never_change(hub, staged, manifest, login, tmp_path, forkserver):
    """Publish, load by plain name, load with the server down, overwrite main and still get the pinned bytes."""
    def load(cache):
        return finish(*start(forkserver, _load_by_plain_name, manifest, tmp_path / cache))

    entry = push(staged, 'owner/nano', manifest_file=manifest)
    assert hub.repos['owner/nano'].private
    assert (entry.status, entry.hub_id) == ('published', 'owner/nano')
    assert entry.revision == hub.repos['owner/nano'].commits[-1].oid
    assert load_manifest(manifest).get(NANO) == entry
    assert set(hub.repos['owner/nano'].find(entry.revision).files) == {*FILES, '.gitattributes'}
    for path in (manifest, *staged.rglob('*.*')):
        assert b'hf_writetoken' not in path.read_bytes()

    before = len(hub.requests)
    error, problem = load('first')
    assert problem == ''
    assert error <= 1e-5
    assert [request for request in hub.requests[before:] if 'pytorch_model' in request] == []

    hub.stop()
    try:
        assert load('first') == (error, '')
        assert 'WeightsError' in load('empty')[1]
    finally:
        hub.start()

    hub.publish('owner/nano', {'model.safetensors': b'something else', 'config.json': b'{}'})
    assert load('second') == (error, '')


def test_the_same_repository_in_timm_and_transformers(hub, staged, manifest, login, tmp_path, monkeypatch):
    transformers = pytest.importorskip('transformers')
    push(staged, 'owner/nano', public=True, manifest_file=manifest)
    assert not hub.repos['owner/nano'].private
    golden = load_file(staged / 'golden/outputs.safetensors')
    images = golden['input'].float()
    photo = Image.effect_mandelbrot((90, 70), (-2, -1, 1, 1), 20).convert('RGB')
    names = load_manifest().label_sets['tin200'].names
    for place, timms in ((str(staged), f'local-dir:{staged}'), ('owner/nano', 'hf-hub:owner/nano')):
        model = timm.create_model(timms, pretrained=True, cache_dir=tmp_path).eval()
        assert golden_error(model, golden) <= 1e-5

        wrapped = transformers.TimmWrapperForImageClassification.from_pretrained(place, cache_dir=tmp_path).eval()
        assert golden_error(_Logits(wrapped), golden) <= 1e-5
        assert tuple(wrapped.config.id2label.values()) == names

        classify = transformers.pipeline('image-classification', place)
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        best = model(transform(photo)[None]).softmax(-1).topk(5)
        given = classify(photo, top_k=5)
        assert [answer['label'] for answer in given] == [names[index] for index in best.indices[0]]
        assert [answer['score'] for answer in given] == pytest.approx(best.values[0].tolist(), rel=1e-4)

        backbone = transformers.TimmBackbone.from_pretrained(timms, out_indices=(1, 2, 3, 4)).eval()
        features = timm.create_model(timms, pretrained=True, features_only=True, out_indices=(1, 2, 3, 4)).eval()
        # transformers 5.23 resets the running statistics of every timm network (also resnet50's)
        backbone._backbone.load_state_dict(dict(features.named_buffers()), strict=False)
        with torch.no_grad():
            for ours, theirs in zip(features(images), backbone(images).feature_maps, strict=True):
                torch.testing.assert_close(theirs, ours)


class _Logits(torch.nn.Module):
    """A transformers wrapper as a plain network."""
    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped

    def forward(self, images):
        return self.wrapped(images).logits


def test_nothing_is_sent_twice(hub, staged, manifest, login):
    first = push(staged, 'owner/nano', manifest_file=manifest)
    hub.requests.clear()
    assert push(staged, 'owner/nano', manifest_file=manifest) == first
    assert hub.count('PUT|commit/main') == 0
    assert len(hub.repos['owner/nano'].commits) == 2


STEPS = ['POST /api/repos/create', 'GET /api/models/owner/nano$', 'POST /api/validate-yaml', 'preupload', 'lfs/objects',
         'PUT /objects', 'commit/main', 'HEAD /owner/nano/resolve', 'GET /objects']


def _push(folder, manifest, *preparations):
    os.environ['HF_TOKEN'] = 'hf_writetoken'
    for prepare in preparations:
        prepare()
    return push(folder, 'owner/nano', manifest_file=manifest).revision


def _die_at_rename():
    """Kill this process when the new manifest is written but has not yet replaced the old one."""
    rename = os.replace

    def replace(source, target):
        if Path(target).name == 'weights_manifest.json':
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)
    os.replace = replace


def test_push_killed_while_it_writes_the_manifest(hub, staged, manifest, login, forkserver):
    before = manifest.read_bytes()
    assert finish(*start(forkserver, _push, staged, manifest, _die_at_rename)) == (None, '')
    assert manifest.read_bytes() == before
    (left,) = manifest.parent.glob('*.tmp')
    hub.requests.clear()
    assert push(staged, 'owner/nano', manifest_file=manifest) == load_manifest(manifest).get(NANO)
    assert hub.count('PUT|commit/main') == 0
    assert not left.exists()


@pytest.mark.parametrize(('step', 'served'), [
    *((step, False) for step in STEPS), ('/api/repos/create', True), ('PUT /objects', True), ('commit/main', True)])
def test_push_killed_at_a_step(hub, staged, manifest, login, forkserver, step, served):
    child, started, before = [], threading.Event(), manifest.read_bytes()

    def kill(handler):
        started.wait()
        if served:
            handler.route()
        os.kill(child[0].pid, signal.SIGKILL)
        return True
    hub.fault(step, kill)
    child += start(forkserver, _push, staged, manifest)
    started.set()
    assert finish(*child) == (None, '')
    assert child[0].exitcode == -signal.SIGKILL
    assert manifest.read_bytes() == before
    entry = push(staged, 'owner/nano', manifest_file=manifest)
    assert load_manifest(manifest).get(NANO) == entry
    assert len(hub.repos['owner/nano'].commits) == 2
    assert load_verified(entry).keys() == load_file(staged / 'model.safetensors').keys()


@pytest.mark.parametrize(('step', 'action', 'message'), [
    ('repos/create', status(401), 'answered 401: the token must have write access'),
    ('preupload', status(403), 'answered 403: the token must have write access'),
    ('lfs/objects', status(500), 'answered 500. Try again later'),
    ('PUT /objects', status(503), 'answered 503. Try again later'),
    ('commit/main', status(412), 'another commit came in between'),
    ('commit/main', status(502), 'answered 502. Try again later'),
    ('HEAD /owner/nano/resolve', status(503), 'answered 503. Try again later'),
    ('GET /objects', status(404), 'answered 404. Try again later'),
])
def test_a_push_that_fails(hub, staged, manifest, login, waits, caplog, capfd, step, action, message):
    before = manifest.read_bytes()
    caplog.set_level(logging.DEBUG)
    hub.fault(step, action, times=1000)
    with pytest.raises(GeoPriorError, match=message) as caught:
        push(staged, 'owner/nano', manifest_file=manifest)
    assert f'{NANO} could not be pushed to owner/nano' in str(caught.value)
    assert 'run the command again' in str(caught.value)
    assert manifest.read_bytes() == before
    assert 'hf_writetoken' not in ''.join((str(caught.value), caplog.text, *capfd.readouterr()))
    hub.faults.clear()
    assert push(staged, 'owner/nano', manifest_file=manifest).status == 'published'


def test_other_bytes_that_come_back(hub, staged, manifest, login):
    def spoil(handler):
        for content in list(hub.objects):
            hub.objects[content] = hub.objects[content][:-1] + b'?'
        return False
    hub.fault('HEAD /owner/nano/resolve', spoil)
    with pytest.raises(GeoPriorError, match=r'curves.png of owner/nano at \w{40} came back with other'):
        push(staged, 'owner/nano', manifest_file=manifest)
    assert load_manifest(manifest).get(NANO).status == 'planned'


def test_a_push_needs_a_token_that_may_write(hub, staged, manifest, monkeypatch):
    with pytest.raises(GeoPriorError, match='No Hub token found. Run `hf auth login`'):
        push(staged, 'owner/nano', manifest_file=manifest)
    assert hub.requests == []
    monkeypatch.setenv('HF_TOKEN', 'hf_readtoken')
    with pytest.raises(GeoPriorError, match='answered 403: the token must have write access') as caught:
        push(staged, 'owner/nano', manifest_file=manifest)
    assert 'readtoken' not in str(caught.value)
    assert load_manifest(manifest).get(NANO).status == 'planned'


def test_two_pushes_at_once(hub, staged, manifest, login, forkserver):
    hub.fault('commit/main', together(2), times=2)
    running = [start(forkserver, _push, staged, manifest) for _ in range(2)]
    (won, no_problem), (lost, problem) = sorted((finish(*child) for child in running), key=lambda outcome: outcome[1])
    assert (no_problem, lost) == ('', None)
    assert 'GeoPriorError' in problem
    assert 'another commit came in between. The manifest is unchanged; run the command again' in problem
    assert len(hub.repos['owner/nano'].commits) == 2
    entry = load_manifest(manifest).get(NANO)
    assert entry.revision == won == push(staged, 'owner/nano', manifest_file=manifest).revision
    assert load_verified(entry).keys() == load_file(staged / 'model.safetensors').keys()


# -- the script --------------------------------------------------------------------------------------------------------


def script(monkeypatch, *arguments):
    """Run scripts/publish.py in this process, and return its exit code."""
    monkeypatch.setattr(sys, 'argv', ['publish.py', *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / 'scripts' / 'publish.py'), run_name='__main__')
    return exit.value.code


def test_script_stages_bundles_and_pushes(
        hub, run_folder, manifest, weights_dir, login, tmp_path, monkeypatch, capsys, staged):
    shutil.copy(ROOT / 'README.md', tmp_path)
    real_readme = (ROOT / 'README.md').read_bytes()
    out, val = tmp_path / 'out', run_folder / 'val.json'
    with using_manifest(manifest):
        assert script(monkeypatch, NANO, run_folder / 'last.pt', '--results', val, '--output', out, '--bundle') == 0
        assert f'{NANO} is bundled' in capsys.readouterr().out
        assert (out / 'model.safetensors').read_bytes() == (staged / 'model.safetensors').read_bytes()
        assert f'| `{NANO}` | bundled |' in (tmp_path / 'README.md').read_text(encoding='utf-8')

        assert script(monkeypatch, NANO, '--output', out, '--push', 'owner/nano', '--dry-run') == 0
        said = capsys.readouterr().out
        assert 'would push' in said
        assert 'private' in said
        assert f'model.safetensors, {(out / "model.safetensors").stat().st_size:,} bytes' in said
        assert hub.requests == []

        assert script(monkeypatch, NANO, '--output', out, '--push', 'owner/nano', '--public') == 0
        said = capsys.readouterr().out
        assert f'published: owner/nano at {hub.repos["owner/nano"].commits[-1].oid}' in said
        assert 'writetoken' not in said
        assert script(monkeypatch, 'geoprior_resnet50.r192_tin200', '--output', out, '--push', 'owner/nano') == 1
        assert capsys.readouterr().err == (
            f'publish.py: {out} must hold geoprior_resnet50.r192_tin200, got {NANO}. Name that tag, or another '
            'folder.\n')
    assert load_manifest(manifest).get(NANO).status == 'published'
    assert (ROOT / 'README.md').read_bytes() == real_readme


def test_script_says_what_is_wrong(manifest, tmp_path, monkeypatch, capsys):
    with using_manifest(manifest):
        for arguments, message in (
                ((NANO, tmp_path / 'no.pt', '--output', tmp_path / 'out'), 'no.pt'),
                (('resnet50', tmp_path / 'no.pt', '--output', tmp_path / 'out'), "got 'resnet50'"),
                ((NANO, '--output', tmp_path / 'out', '--push', 'owner/nano'), 'must be a staged folder')):
            assert script(monkeypatch, *arguments) == 1
            said = capsys.readouterr().err
            assert said.startswith('publish.py: ')
            assert message in said
            assert said.count('\n') == 1
    assert list(tmp_path.iterdir()) == [manifest]


def test_script_refuses_what_it_would_not_use(tmp_path, monkeypatch, capsys):
    for arguments, message in (
            (('--bundle', '--experiments', 'comparison.md'), '--experiments is for staging: name the checkpoint'),
            (('--push', 'owner/nano', '--raw'), '--raw is for staging: name the checkpoint after the tag'),
            (('--bundle', '--dry-run'), '--dry-run prints what --push would do: name the repository with --push'),
            (('--bundle', '--push', 'owner/nano', '--dry-run'), '--dry-run is for --push only: leave out --bundle'),
            ((), 'nothing to do: name a checkpoint to stage, or add --bundle or --push')):
        assert script(monkeypatch, NANO, '--output', tmp_path / 'out', *arguments) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_results_file_is_what_validation_writes():
    """It has the keys that a release reads from the JSON of scripts/validate.py."""
    from timm_geoprior.evaluation import results, validate
    source = ''.join(Path(module.__file__).read_text(encoding='utf-8') for module in (results, validate))
    assert all(f"'{key}'" in source for key in ('results', 'data', 'preprocessing', 'software', 'weights', 'model'))


def test_real_manifest_is_untouched(manifest):
    assert manifest_path().parent == ROOT
    assert json.loads(manifest_path().read_text(encoding='utf-8'))['models'].keys() == load_manifest().models.keys()
