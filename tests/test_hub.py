"""Loading: verified, adapted as by timm, and despite everything that can go wrong between here and the Hub."""
import gc
import hashlib
import json
import logging
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save, save_file

from hub_server import SIGNATURE, broken_after, status, together
from programs import run
from releases import (
    NANO,
    as_mere_mortal,
    files,
    finish,
    limit_file_size,
    planned,
    put_on,
    start,
    using_manifest,
    with_entry,
)
from timm_geoprior.cli import main
from timm_geoprior.errors import WeightsError
from timm_geoprior.pretrained import cfgs
from timm_geoprior.pretrained import loading as module
from timm_geoprior.pretrained.download import download_tag
from timm_geoprior.pretrained.loading import load_golden, load_verified
from timm_geoprior.pretrained.manifest import load_manifest
from timm_geoprior.pretrained.verify import golden_error
from timm_geoprior.release.releasing import bundle
from timm_geoprior.release.staging import read_staged


@pytest.fixture
def published(hub, staged):
    """The entry of a public repository."""
    return put_on(hub, staged)


@pytest.fixture
def plain_name(tmp_path, published):
    """timm.create_model for the published tag by its plain name, with an empty cache."""
    path = tmp_path / 'manifest.json'
    path.write_text(with_entry(published).to_json(), encoding='utf-8')
    with using_manifest(path):
        yield partial(timm.create_model, NANO, pretrained=True, cache_dir=tmp_path / 'cache')


def same(tensors, others):
    assert tensors.keys() == others.keys()
    return all(tensors[key].dtype == others[key].dtype and torch.equal(tensors[key], others[key]) for key in tensors)


def digest(tensors):
    return hashlib.sha256(b''.join(tensors[key].numpy().tobytes() for key in sorted(tensors))).hexdigest()


def leftovers(cache):
    """Incomplete files among the cache's blobs, except for the one that an older huggingface_hub resumes."""
    blobs = [path for path in cache.rglob('blobs/*') if path.is_file() and len(path.name) != len(f'{"":64}.incomplete')]
    return [path.name for path in blobs if hashlib.sha256(path.read_bytes()).hexdigest() != path.name]


def test_tensors_are_safetensors_own(published, staged, tmp_path):
    assert same(load_verified(published, tmp_path), load_file(staged / 'model.safetensors'))
    assert same(load_golden(published, tmp_path), load_file(staged / 'golden/outputs.safetensors'))


def test_every_stored_type_is_read(tmp_path):
    tensors = {
        'half': torch.randn(3, 5).half(), 'brain': torch.randn(2, 2).bfloat16(), 'single': torch.randn(7),
        'double': torch.randn(1, dtype=torch.float64), 'count': torch.tensor(12), 'nothing': torch.empty(0, 4)}
    save_file(tensors, tmp_path / 'a.safetensors', {'format': 'pt'})
    assert same(module._tensors(bytearray((tmp_path / 'a.safetensors').read_bytes())), tensors)


@pytest.mark.filterwarnings('ignore:.*copying from a non-meta parameter')
@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_a_default_device_moves_no_file(plain_name, published, staged, tmp_path, device):
    """torch.set_default_device decides where new tensors go; those of a file stay on the CPU."""
    torch.set_default_device(device)
    try:
        tensors, golden = load_verified(published, tmp_path), load_golden(published, tmp_path)
        empty = module._tensors(memoryview(save({'nothing': torch.empty(0, 4, device='cpu')})))
        model = plain_name()
    finally:
        torch.set_default_device(None)  # any device, even 'cpu', would leave a mode on for later tests
    assert same(tensors, load_file(staged / 'model.safetensors'))
    assert same(golden, load_file(staged / 'golden/outputs.safetensors'))
    assert empty['nothing'].device.type == 'cpu'
    assert {parameter.device.type for parameter in model.parameters()} == {device}


def test_no_network_once_cached(hub, published, tmp_path):
    first = load_verified(published, tmp_path)
    assert hub.count('GET /objects/') == 1
    before = len(hub.requests)
    assert same(load_verified(published, tmp_path), first)
    assert len(hub.requests) == before


def test_the_file_is_opened_once_and_its_bytes_are_the_tensors(published, tmp_path):
    load_verified(published, tmp_path)
    blob = os.path.realpath(next(tmp_path.rglob('model.safetensors')))
    opened, listening = [], True

    def listen(event, arguments):
        if listening and event == 'open' and os.path.realpath(str(arguments[0])) == blob:
            opened.append(arguments)
    sys.addaudithook(listen)  # cannot be removed, so a flag stops it
    tensors = load_verified(published, tmp_path)
    listening = False
    assert len(opened) == 1
    starts = [tensor.data_ptr() for tensor in tensors.values()]
    assert max(starts) - min(starts) < published.bytes


def test_golden_outputs_by_plain_name(plain_name, staged):
    assert golden_error(plain_name(), load_file(staged / 'golden/outputs.safetensors')) <= 1e-5


def test_nothing_stays_behind(plain_name):
    gc.collect()
    before = {id(item) for item in gc.get_objects() if issubclass(type(item), torch.Tensor)}
    model = plain_name()
    gc.collect()
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    assert [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and id(t) not in before | own] == []
    assert 'state_dict' not in model.pretrained_cfg
    assert model.default_cfg is model.pretrained_cfg
    assert model.pretrained_cfg['hf_hub_id'].startswith('owner/nano@')


ADAPTATIONS = [
    {}, {'num_classes': 10}, {'num_classes': 0}, {'in_chans': 1}, {'in_chans': 5}, {'global_pool': ''},
    {'features_only': True}, {'features_only': True, 'out_indices': (1, 3)},
    {'features_only': True, 'feature_cls': 'getter'}, {'features_only': True, 'feature_cls': 'hook'},
    {'dtype': torch.bfloat16}, {'drop_rate': 0.1, 'drop_path_rate': 0.1}, {'output_stride': 8},
]


@pytest.mark.parametrize('options', ADAPTATIONS, ids=str)
def test_adapts_as_timm_does(plain_name, staged, options):
    """Against the same folder through timm's own `local-dir:`."""
    torch.manual_seed(1)
    ours = plain_name(**options)
    torch.manual_seed(1)  # what is not loaded is random
    timms = timm.create_model(f'local-dir:{staged}', pretrained=True, **options)
    assert type(ours) is type(timms)
    assert same(ours.state_dict(), timms.state_dict())
    assert 'state_dict' not in ours.pretrained_cfg
    assert ours.pretrained_cfg['mean'] == tuple(timms.pretrained_cfg['mean'])


def test_weights_that_do_not_fit_are_refused_as_by_timm(plain_name):
    with pytest.raises(RuntimeError, match='size mismatch for layer2'):
        plain_name(value_dims=(0, 16, 16, 24))


def test_another_kernel_than_the_trained_one_is_told(plain_name, recwarn):
    """The weights fit, since the kernel is in no tensor."""
    plain_name(attn_kernel='gaussian')
    assert [str(warning.message) for warning in recwarn if 'kernel' in str(warning.message)] == []
    with pytest.warns(UserWarning, match="with the Gaussian kernel, .* attn_kernel='laplacian'. Leave out attn_kernel"):
        plain_name(attn_kernel='laplacian')


def test_a_cfg_of_the_manifest_is_verified_however_it_is_given(plain_name, hub):
    model = plain_name()
    for given in ({'pretrained_cfg': model.pretrained_cfg}, {'pretrained_cfg_overlay': {'mean': (0, 0, 0)}}):
        hub.requests.clear()
        (path,) = Path(str(plain_name.keywords['cache_dir'])).rglob('model.safetensors')
        path.resolve().write_bytes(b'spoilt')
        assert same(plain_name(**given).state_dict(), model.state_dict())
        assert hub.count('GET /objects/') == 1


def test_a_source_of_the_users_own_stays_timms(plain_name, hub, staged, tmp_path):
    state = {key: value.float() * 0.5 for key, value in load_file(staged / 'model.safetensors').items()}
    state = {key: value.long() if 'num_batches' in key else value for key, value in state.items()}
    save_file(state, tmp_path / 'mine.safetensors', {'format': 'pt'})
    torch.save(state, tmp_path / 'mine.pth')
    mine = str(tmp_path / 'mine.safetensors')
    models = [
        plain_name(pretrained_cfg_overlay={'file': mine}),
        plain_name(pretrained_cfg_overlay={'state_dict': state}),
        timm.create_model(NANO, checkpoint_path=str(tmp_path / 'mine.pth')),
        timm.create_model(NANO, pretrained=True, pretrained_cfg={'file': mine, 'num_classes': 200}),
    ]
    assert all(same(model.state_dict(), state) for model in models)
    assert hub.requests == []


def test_unchecked_names_of_the_users_own(published, hub, staged, tmp_path):
    for name in (f'local-dir:{staged}', 'hf-hub:owner/nano', f'hf-hub:owner/nano@{published.revision}'):
        model = timm.create_model(name, pretrained=True, cache_dir=tmp_path)
        assert golden_error(model, load_file(staged / 'golden/outputs.safetensors')) <= 1e-5
        assert model.pretrained_cfg['label_names'][0] == 'goldfish, Carassius auratus'


def test_planned_tag_names_those_that_have_weights(plain_name):
    with pytest.raises(WeightsError, match=f'geoprior_resnet101.paper_in1k has no weights.*planned.*{NANO}') as caught:
        timm.create_model('geoprior_resnet101.paper_in1k', pretrained=True)
    assert isinstance(caught.value, RuntimeError)
    assert NANO in timm.list_pretrained('*geoprior*')


def test_a_default_tag_without_weights_is_not_named(tmp_path):
    path = tmp_path / 'manifest.json'
    path.write_text(with_entry(planned()).to_json(), encoding='utf-8')
    with using_manifest(path), pytest.raises(WeightsError, match='Tags with weights: none in this version'):
        timm.create_model(NANO, pretrained=True)


@pytest.fixture
def bundled(staged, tmp_path, weights_dir):
    """The entry of a tag in a package's weights folder."""
    path = tmp_path / 'manifest.json'
    path.write_text(with_entry(planned()).to_json(), encoding='utf-8')
    return bundle(staged, path)


def test_bundled_file_needs_no_hub(bundled, hub, staged):
    assert same(load_verified(bundled), load_file(staged / 'model.safetensors'))
    assert same(load_golden(bundled), load_file(staged / 'golden/outputs.safetensors'))
    moved = replace(bundled, status='published', hub_id='owner/nano', revision='0' * 40, file='model.safetensors')
    assert same(load_verified(moved), load_verified(bundled))
    assert hub.requests == []


@pytest.mark.parametrize(('spoil', 'message'), [
    (lambda content: content[:-1], r'must be \d+ bytes, got \d+'),
    (lambda content: content[:-1] + bytes([content[-1] ^ 1]), r'must have the SHA-256 \w{64}, got \w{64}'),
    (lambda content: b'', 'got 0'),
    (lambda content: b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n', 'got a Git LFS pointer'),
    (None, 'No such file'),
])
def test_spoilt_bundled_file_is_refused(bundled, spoil, message):
    path = cfgs.bundled_path(bundled)
    path.write_bytes(spoil(path.read_bytes())) if spoil else path.unlink()
    with pytest.raises(WeightsError, match=message) as caught:
        load_verified(bundled)
    assert str(path) in str(caught.value)
    assert re.search('Install timm_geoprior again|git lfs pull', str(caught.value))


def test_a_folder_whose_weights_are_a_git_lfs_pointer(staged, photo_folder, tmp_path, capsys):
    """As in a clone of the Hub's repository without git-lfs; in every command that loads a model."""
    folder = tmp_path / 'clone'
    shutil.copytree(staged, folder)
    (folder / 'model.safetensors').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n')
    photo = photo_folder / 'val' / 'coffee' / '00.jpg'
    for command in (['classify', photo], ['validate', '--data-dir', photo_folder, '--split', 'val', '--device', 'cpu']):
        assert main([*map(str, command), '--model', f'local-dir:{folder}']) == 1
        assert 'if the file is a Git LFS pointer, run `git lfs pull`' in capsys.readouterr().err


# -- the network -------------------------------------------------------------------------------------------------------


def other_bytes(content):
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(('pattern', 'action', 'fetches'), [
    ('GET /objects/', broken_after(100_000, reset=False), 2),
    ('GET /objects/', broken_after(100_000, reset=True), 2),
    ('GET /objects/', broken_after(0, reset=True), 2),
    ('GET /objects/', status(429, Retry_After='1'), 2),
    ('GET /objects/', status(503), 2),
    ('HEAD /owner/nano/resolve', status(429), 1),
    ('HEAD /owner/nano/resolve', status(503), 1),
    ('HEAD /owner/nano/resolve', status(500), 1),
])
def test_passing_trouble_is_survived(hub, published, tmp_path, staged, waits, pattern, action, fetches):
    hub.fault(pattern, action, times=2 if 'HEAD' in pattern else 1)  # the first HEAD only checks that the Hub is up
    assert same(load_verified(published, tmp_path), load_file(staged / 'model.safetensors'))
    assert hub.count('GET /objects/') == fetches
    assert leftovers(tmp_path) == []
    assert sum(waits) < 5


@pytest.fixture
def large(hub, staged):
    """The entry of a file of 24 MB, since huggingface_hub writes, and therefore resumes, in chunks of 10 MB."""
    tensors = {f'w{number}': torch.full((1000, 3000), float(number), dtype=torch.float16) for number in range(4)}
    content = save(tensors, {'format': 'pt'})
    revision = hub.publish('owner/large', {'model.safetensors': content})
    return replace(read_staged(staged, load_manifest()), status='published', hub_id='owner/large', revision=revision,
                   sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))


@pytest.mark.parametrize('reset', [False, True])
def test_a_broken_download_is_resumed(hub, large, tmp_path, waits, reset):
    hub.fault('GET /objects/', broken_after(15_000_000, reset))
    assert sum(tensor.nbytes for tensor in load_verified(large, tmp_path).values()) == 24_000_000
    assert hub.count('GET /objects/') == 2
    # huggingface_hub resumes a closed connection; it does not retry after a reset, so that our own retry starts over
    assert hub.requests[-1].endswith(f'bytes={10 << 20}-') != reset


FAULTS = {
    'unauthorized': ('HEAD', status(401), 'answered 401.*log in'),
    'forbidden': ('HEAD', status(403), 'answered 403.*log in'),
    'gated': ('HEAD', status(403, X_Error_Code='GatedRepo'), 'answered 403.*log in'),
    'no repository': ('HEAD', status(404, X_Error_Code='RepoNotFound'), 'answered 404.*Check the name'),
    'no file': ('HEAD', status(404, X_Error_Code='EntryNotFound'), 'no such file at the pinned revision. Update'),
    'no revision': ('HEAD', status(404, X_Error_Code='RevisionNotFound'), 'no longer has the pinned revision. Update'),
    'no object': ('GET /objects', status(404), 'answered 404'),
    'too many requests': ('HEAD', status(429), 'answered 429.*Wait'),
    'too many objects': ('GET /objects', status(429), 'answered 429.*Wait'),
    'down': ('HEAD', status(503), 'answered 503. Try again later'),
    'store down': ('GET /objects', status(503), 'answered 503. Try again later'),
    'always cut': ('GET /objects', broken_after(0, reset=False), 'broke off.*Check the network'),
    'always reset': ('GET /objects', broken_after(100_000, reset=True), 'broke off.*Check the network'),
    'no Hub at all': ('HEAD', status(200), 'could not be reached, or the connection broke off.*HF_ENDPOINT'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_lasting_trouble_is_one_clear_error(hub, published, tmp_path, waits, monkeypatch, caplog, capfd, fault):
    pattern, action, message = FAULTS[fault]
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv('HF_TOKEN', 'hf_readtoken')
    hub.fault(pattern, action, times=1000)
    with pytest.raises(WeightsError, match=message) as caught:
        load_verified(published, tmp_path)
    text = str(caught.value)
    assert text.startswith(f'The weights of {NANO} (model.safetensors of owner/nano at {published.revision}) could not')
    assert '\n' not in text
    assert len(hub.requests) < 50
    assert leftovers(tmp_path) == []
    assert SIGNATURE.split('=')[1] not in text
    assert 'hf_readtoken' not in ''.join((text, caplog.text, *capfd.readouterr()))
    hub.faults.clear()
    load_verified(published, tmp_path)


def test_connection_refused(hub, published, tmp_path, waits):
    hub.stop()
    try:
        with pytest.raises(WeightsError, match=r'http://127\S* could not be reached.*Check the network'):
            load_verified(published, tmp_path)
    finally:
        hub.start()
    load_verified(published, tmp_path)


def test_private_repository_needs_a_token(hub, staged, tmp_path, monkeypatch, waits):
    entry = put_on(hub, staged, 'owner/private', private=True)
    with pytest.raises(WeightsError, match='answered 401.*HF_TOKEN'):
        load_verified(entry, tmp_path)
    monkeypatch.setenv('HF_TOKEN', 'hf_readtoken')
    load_verified(entry, tmp_path)
    assert not any(b'hf_readtoken' in path.read_bytes() for path in tmp_path.rglob('*') if path.is_file())


@pytest.mark.parametrize(('serve', 'message'), [
    (other_bytes, r'must have the SHA-256 {sha256}, got \w{64}'),
    (lambda content: content[:-100], 'broke off'),  # shorter than its own metadata says
    (lambda content: content + b'more', 'broke off'),
    (lambda content: pickle.dumps({'a': 1}), 'broke off'),
])
def test_wrong_bytes_are_fetched_afresh_once_and_then_refused(hub, published, tmp_path, waits, serve, message):
    right = hub.objects[published.sha256]
    hub.objects[published.sha256] = serve(right)
    with pytest.raises(WeightsError, match=message.replace('{sha256}', published.sha256)):
        load_verified(published, tmp_path)
    assert 2 <= hub.count('GET /objects/') <= 3
    assert list(tmp_path.rglob('model.safetensors')) == []
    assert leftovers(tmp_path) == []
    hub.objects[published.sha256] = right
    load_verified(published, tmp_path)


@pytest.mark.parametrize(('content', 'message'), [
    (b'0' * 1000, r'must be \d+ bytes, got 1000'),
    (pickle.dumps({'model': 1}), r'must be \d+ bytes, got \d+'),
])
def test_another_file_at_the_pinned_revision_is_refused(hub, published, tmp_path, content, message):
    """The Hub's metadata match what it serves, but not the manifest."""
    commit = hub.repos['owner/nano'].find(published.revision)
    commit.files['model.safetensors'] = hub.store(content)
    with pytest.raises(WeightsError, match=message):
        load_verified(published, tmp_path)
    assert hub.count('GET /objects/') == 2
    assert list(tmp_path.rglob('model.safetensors')) == []


class Trap:
    """Creates a file when it is unpickled."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_never_loaded(hub, published, plain_name, tmp_path):
    commit = hub.repos['owner/nano'].find(published.revision)
    pickled = pickle.dumps(Trap(tmp_path / 'sprung'))
    pickle.loads(pickled)
    (tmp_path / 'sprung').unlink()  # it works
    del commit.files['model.safetensors']
    commit.files['pytorch_model.bin'] = hub.store(pickled)
    with pytest.raises(WeightsError, match='no such file'):
        plain_name()
    assert hub.count(r'pytorch_model\.bin') == 0
    for content in (pickled, pickled.ljust(published.bytes)):  # of the expected size too
        commit.files['model.safetensors'] = hub.store(content)
        with pytest.raises(WeightsError, match='must'):
            plain_name()
    assert hub.count('GET /objects/') == 4
    assert not (tmp_path / 'sprung').exists()


def test_corrupt_cached_file_is_fetched_afresh(hub, published, tmp_path, staged):
    load_verified(published, tmp_path)
    (path,) = tmp_path.rglob('model.safetensors')
    for spoilt in (other_bytes(path.read_bytes()), b''):
        path.resolve().write_bytes(spoilt)
        assert same(load_verified(published, tmp_path), load_file(staged / 'model.safetensors'))
        assert leftovers(tmp_path) == []
    assert hub.count('GET /objects/') == 3


def test_a_revision_that_is_gone(hub, published, tmp_path):
    hub.repos['owner/nano'].commits.clear()
    hub.publish('owner/nano', {'model.safetensors': b'new history'})
    with pytest.raises(WeightsError, match='no longer has the pinned revision. Update timm_geoprior'):
        load_verified(published, tmp_path)


def test_pinned_bytes_stay_when_main_moves_on(hub, published, tmp_path, staged):
    hub.publish('owner/nano', {'model.safetensors': b'something else'})
    assert same(load_verified(published, tmp_path), load_file(staged / 'model.safetensors'))


# -- processes ---------------------------------------------------------------------------------------------------------


def _load(entry, cache, *preparations):
    for prepare in preparations:
        prepare()
    return digest(load_verified(entry, cache))


def test_four_processes_fetch_one_file(hub, published, tmp_path, staged, forkserver):
    hub.fault('HEAD /owner/nano/resolve', together(4), times=4)  # all have found the cache empty
    running = [start(forkserver, _load, published, tmp_path) for _ in range(4)]
    outcomes = [finish(*child) for child in running]
    assert outcomes == [(digest(load_file(staged / 'model.safetensors')), '')] * 4
    assert hub.count('GET /objects/') == 1


def test_killed_while_downloading_then_loading_again(hub, published, tmp_path, staged, forkserver):
    child, started = [], threading.Event()

    def kill(handler):
        broken_after(1_000_000, reset=False)(handler)
        started.wait()
        os.kill(child[0].pid, signal.SIGKILL)
        return True
    hub.fault('GET /objects/', kill)
    child += start(forkserver, _load, published, tmp_path)
    started.set()
    assert finish(*child) == (None, '')
    assert child[0].exitcode == -signal.SIGKILL
    assert list(tmp_path.rglob('*.incomplete')) != []
    assert same(load_verified(published, tmp_path), load_file(staged / 'model.safetensors'))
    assert list(tmp_path.rglob('*.incomplete')) == []


@pytest.mark.skipif(sys.platform != 'linux', reason='drops Linux capabilities')
def test_cache_that_cannot_be_written(hub, published, tmp_path, staged, forkserver):
    load_verified(published, tmp_path / 'filled')
    (tmp_path / 'empty').mkdir()
    for folder in (tmp_path, *tmp_path.rglob('*')):
        if folder.is_dir():
            folder.chmod(0o555)
    try:
        value, problem = finish(*start(forkserver, _load, published, tmp_path / 'empty', as_mere_mortal))
        assert value is None
        assert f'WeightsError: The weights of {NANO}' in problem
        assert 'cannot be written (Permission denied). Make it writable, or set HF_HOME or cache_dir' in problem
        assert finish(*start(forkserver, _load, published, tmp_path / 'filled', as_mere_mortal)) == (
            digest(load_file(staged / 'model.safetensors')), '')
    finally:
        for folder in (tmp_path, *tmp_path.rglob('*')):
            if folder.is_dir():
                folder.chmod(0o755)


def test_full_disk(hub, published, tmp_path, forkserver):
    value, problem = finish(*start(forkserver, _load, published, tmp_path, partial(limit_file_size, 1_000_000)))
    assert value is None
    assert 'cannot be written (File too large). Free some space, or set HF_HOME or cache_dir' in problem
    assert leftovers(tmp_path) == []
    load_verified(published, tmp_path)


OFFLINE = """
import pickle, sys, timm_geoprior
from timm_geoprior.pretrained import cfgs
from timm_geoprior.errors import WeightsError
from timm_geoprior.pretrained.loading import load_verified
entry, filled, empty, cfgs.WEIGHTS_DIR = pickle.load(open(sys.argv[1], 'rb'))
print(len(load_verified(entry, filled)))
try:
    load_verified(entry, empty)
except WeightsError as error:
    print(error)
blob = next(filled.rglob('model.safetensors')).resolve()
blob.write_bytes(b'spoilt')
try:
    load_verified(entry, filled)
except WeightsError as error:
    print(error)
"""


def test_offline_with_and_without_the_file(hub, published, tmp_path):
    tensors = load_verified(published, tmp_path / 'filled')
    (tmp_path / 'arguments').write_bytes(pickle.dumps(
        (published, tmp_path / 'filled', tmp_path / 'empty', cfgs.WEIGHTS_DIR)))
    hub.requests.clear()
    done = subprocess.run(
        [sys.executable, '-c', OFFLINE, str(tmp_path / 'arguments')], env={**os.environ, 'HF_HUB_OFFLINE': '1'},
        capture_output=True, text=True, check=True)
    count, absent, spoilt = done.stdout.splitlines()
    assert int(count) == len(tensors)
    assert 'not in the cache and HF_HUB_OFFLINE is set. Unset it' in absent
    assert 'got 6.' in spoilt
    assert 'HF_HUB_OFFLINE is set' in spoilt
    assert hub.requests == []


def _peak(entry, cache):
    """Peak resident memory of a load minus that before it, in bytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tensors = load_verified(entry, cache)
    assert tensors
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1024 if sys.platform == 'linux' else 1)


def test_peak_memory_is_under_twice_the_file(large, tmp_path, forkserver):
    load_verified(large, tmp_path)
    peak, problem = finish(*start(forkserver, _peak, large, tmp_path))
    assert problem == ''
    assert 0.5 * large.bytes < peak < 1.5 * large.bytes


def test_download_makes_what_local_dir_loads(hub, published, plain_name, tmp_path, staged, monkeypatch):
    folder = download_tag('geoprior_resnet14_nano', tmp_path / 'offline')
    assert folder == tmp_path / 'offline' / NANO
    assert files(folder) == {'model.safetensors', 'golden/outputs.safetensors', 'config.json'}
    hub.requests.clear()
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert golden_error(model, load_file(folder / 'golden/outputs.safetensors')) <= 1e-5
    (folder / 'model.safetensors').write_bytes(b'cut off')
    written = (folder / 'golden/outputs.safetensors').stat().st_mtime_ns
    download_tag(NANO, tmp_path / 'offline')
    assert (folder / 'model.safetensors').read_bytes() == (staged / 'model.safetensors').read_bytes()
    assert (folder / 'golden/outputs.safetensors').stat().st_mtime_ns == written
    (folder / 'config.json').unlink()  # as after an interrupted download
    download_tag(NANO, tmp_path / 'offline')
    assert (folder / 'config.json').exists()
    assert hub.requests == []
    with pytest.raises(WeightsError, match='has no weights'):
        download_tag('geoprior_resnet101.paper_in1k', tmp_path / 'offline')
    assert not (tmp_path / 'offline' / 'geoprior_resnet101.paper_in1k').exists()
    (tmp_path / 'file').touch()
    with pytest.raises(WeightsError, match='cannot be written .Not a directory'):
        download_tag(NANO, tmp_path / 'file')


@pytest.mark.parametrize('name', ['model.safetensors', 'last.pt'])
def test_a_download_replaces_no_other_network(name, tmp_path, staged):
    folder = tmp_path / NANO
    folder.mkdir()
    (folder / name).write_bytes(b'mine')
    config = {'architecture': 'geoprior_resnet14_nano', 'pretrained_cfg': {'tag': 'tuned'}}
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=f'{NANO} must be new or an earlier download of {NANO}, got'):
        download_tag(NANO, tmp_path)
    assert files(folder) == {name, 'config.json'}
    assert (folder / name).read_bytes() == b'mine'


def test_loading_benchmark_runs():
    script = Path(__file__).parent.parent / 'scripts' / 'experiments' / 'benchmark_loading.py'
    done = run([script, NANO, '--repeats', '1'], check=True)
    assert [line.split(':')[0] for line in done.stdout.splitlines()] == ['verified', 'unchecked', 'ratio']
    assert 'of 1 pairs, 2,244,' in done.stdout
