"""verify, download and doctor, as functions and as commands."""
import json
from contextlib import ExitStack
from dataclasses import replace

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from hub_server import status
from releases import NANO, planned, put_on, using_manifest, with_entry
from timm_geoprior.cli import main
from timm_geoprior.pretrained import cfgs
from timm_geoprior.pretrained.cfgs import bundled_path
from timm_geoprior.pretrained.loading import load_golden, load_verified
from timm_geoprior.pretrained.manifest import load_manifest
from timm_geoprior.pretrained.verify import GOLDEN_TOLERANCES, doctor, golden_error, verify_tags
from timm_geoprior.release.releasing import bundle


@pytest.fixture
def use(tmp_path, monkeypatch):
    """Make the package use a manifest with one other entry, and an empty cache and weights folder."""
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(cfgs, 'WEIGHTS_DIR', tmp_path / 'weights')
    path = tmp_path / 'weights_manifest.json'
    with ExitStack() as stack:
        def enter(entry):
            path.write_text(with_entry(entry).to_json(), encoding='utf-8')
            stack.enter_context(using_manifest(path))
            return path
        yield enter


@pytest.fixture
def published(hub, staged, use):
    """A published tag, not yet in the cache."""
    entry = put_on(hub, staged)
    use(entry)
    return entry


@pytest.fixture
def bundled(staged, use, tmp_path):
    """A tag in the package."""
    entry = bundle(staged, use(planned()))
    use(entry)
    return entry


def verdicts(*names):
    return {check.what: check.ok for check in verify_tags(names)}


def test_this_package_is_as_its_manifest_says():
    """Every bundled tag, with its golden outputs."""
    names = [entry.name for entry in load_manifest().models.values() if entry.status == 'bundled']
    assert NANO in names
    assert [check for check in verify_tags(names) if not check.ok] == []


@pytest.mark.filterwarnings('ignore:TF32')  # from torch's own switch
@pytest.mark.parametrize('precision', GOLDEN_TOLERANCES)
def test_golden_outputs_hold_however_they_are_computed(precision):
    golden = load_golden(load_manifest().get(NANO))
    model = timm.create_model(NANO, pretrained=True, dtype=getattr(torch, precision))
    first = {key: tensor[:1] for key, tensor in golden.items()}
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout)
        assert golden_error(model, golden) <= GOLDEN_TOLERANCES[precision]
        assert golden_error(model, first) <= GOLDEN_TOLERANCES[precision]
    with torch.backends.mkldnn.flags(enabled=False):
        assert golden_error(model, golden) <= GOLDEN_TOLERANCES[precision]


@pytest.mark.parametrize('precision', GOLDEN_TOLERANCES)
def test_verify_holds_each_precision(bundled, monkeypatch, precision):
    monkeypatch.setitem(GOLDEN_TOLERANCES, precision, -1.0)
    assert verdicts() == {'bundled file': True, 'golden outputs': False}


def test_bundled_tag(bundled, hub):
    assert verdicts() == verdicts(NANO) == {'bundled file': True, 'golden outputs': True}
    assert hub.requests == []
    path = bundled_path(bundled)
    path.write_bytes(path.read_bytes()[:-1] + b'?')
    assert verdicts() == {'bundled file': False, 'golden outputs': False}
    path.unlink()
    assert verdicts() == {'bundled file': False, 'golden outputs': False}


def test_published_tag(published, hub):
    assert verdicts() == {'cached file': None, 'file on the Hub': True, 'golden outputs': True}
    assert verdicts() == {'cached file': True, 'file on the Hub': True, 'golden outputs': True}
    hub.repos['owner/nano'].find(published.revision).files['model.safetensors'] = hub.store(b'other')
    assert verdicts() == {'cached file': True, 'file on the Hub': False, 'golden outputs': True}
    hub.fault('HEAD', status(503), times=1000)
    (found,) = (check for check in verify_tags() if check.what == 'file on the Hub')
    assert (found.ok, 'answered 503' in found.detail) == (False, True)


def test_spoilt_cache_is_told_and_then_mended(published, tmp_path):
    load_verified(published)
    next((tmp_path / 'cache').rglob('model.safetensors')).resolve().write_bytes(b'spoilt')
    assert verdicts() == {'cached file': False, 'file on the Hub': True, 'golden outputs': True}
    assert verdicts() == {'cached file': True, 'file on the Hub': True, 'golden outputs': True}


def test_offline_the_hub_is_not_asked(published, hub, monkeypatch):
    assert verdicts()['golden outputs']
    hub.requests.clear()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert verdicts() == {'cached file': True, 'file on the Hub': None, 'golden outputs': True}
    assert hub.requests == []


def test_golden_outputs_notice_a_radius(staged):
    model = timm.create_model(f'local-dir:{staged}', pretrained=True)
    golden = load_file(staged / 'golden/outputs.safetensors')
    tolerance = GOLDEN_TOLERANCES['float32']
    assert golden_error(model, golden) <= tolerance
    with torch.no_grad():
        model.layer2[0].conv2.attn.log_radius += 0.1
    assert golden_error(model, golden) > tolerance
    with torch.no_grad():
        model.layer2[0].conv2.attn.log_radius *= float('nan')
    assert not golden_error(model, golden) <= tolerance


def test_wrong_golden_outputs_are_told(bundled, tmp_path):
    path = bundled_path(bundled).with_suffix('.golden.safetensors')
    golden = load_file(path)
    save_file({**golden, 'logits': golden['logits'] + 1}, path)
    (check,) = (check for check in verify_tags() if check.what == 'golden outputs')
    assert check.ok is False
    assert 'must have the SHA-256' in check.detail


def test_verify_command(bundled, capsys):
    assert main(['verify']) == 0
    said = capsys.readouterr().out
    assert f'{NANO}  golden outputs: ok. logits differ' in said
    assert all(f' in {name} (tolerance {tolerance:.0e})' in said for name, tolerance in GOLDEN_TOLERANCES.items())
    bundled_path(bundled).unlink()
    assert main(['verify', 'geoprior_resnet14_nano']) == 1
    assert f'{NANO}  bundled file: FAILED. The weights of {NANO}' in capsys.readouterr().out
    for name, message in (('geoprior_resnet101.paper_in1k', 'has no weights'), ('resnet50', 'must be one of')):
        assert main(['verify', name]) == 1
        assert message in capsys.readouterr().err


def test_verify_command_without_any_weights(use, capsys):
    use(planned())
    assert main(['verify']) == 0
    assert capsys.readouterr().out == 'No tag in the manifest has weights.\n'


def test_download_command(published, hub, capsys, tmp_path):
    assert main(['download', '--all', str(tmp_path / 'offline')]) == 0
    place = tmp_path / 'offline' / NANO
    assert capsys.readouterr().out.splitlines()[0] == str(place)
    assert golden_error(timm.create_model(f'local-dir:{place}', pretrained=True),
                        load_file(place / 'golden/outputs.safetensors')) <= 1e-5
    hub.requests.clear()
    assert main(['download', NANO, str(tmp_path / 'offline')]) == 0
    assert hub.requests == []
    capsys.readouterr()
    for arguments, message in (([str(tmp_path / 'x')], 'a folder alone'), ([NANO, 'x', '--all'], 'both tags and --all'),
                               (['geoprior_resnet101.paper_in1k', str(tmp_path / 'x')], 'has no weights')):
        assert main(['download', *arguments]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / 'x').exists()


def test_doctor_says_which_tags_load(published, hub):
    assert doctor()['tags'][NANO].startswith('published, not in the cache; the file on the Hub: owner/nano at')
    assert hub.count('GET /objects') == 0
    load_verified(published)
    assert doctor()['tags'][NANO] == 'published, loads'
    assert doctor()['tags']['geoprior_resnet101.paper_in1k'] == 'planned, no weights'


def test_doctor_says_what_is_wrong(bundled):
    bundled_path(bundled).write_bytes(b'cut off')
    assert doctor()['tags'][NANO].startswith(f'bundled, does not load: The weights of {NANO} in')


def test_doctor_reports_despite_a_token_that_cannot_be_read(use, tmp_path, monkeypatch):
    use(planned())
    monkeypatch.delenv('HF_TOKEN', raising=False)
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path))
    assert doctor()['logged_in'].startswith('not known ([Errno 21] Is a directory')


def test_doctor_tells_no_secrets(use, capsys, monkeypatch, hub):
    use(replace(planned()))
    monkeypatch.setenv('HF_TOKEN', 'hf_writetoken')
    monkeypatch.setenv('HF_ENDPOINT', 'https://user:password@hub.example/?signature=abc')
    monkeypatch.setattr(constants, 'ENDPOINT', 'https://user:password@hub.example')
    report = doctor()
    assert main(['doctor']) == 0
    for text in (json.dumps(report), capsys.readouterr().out):
        assert not any(secret in text for secret in ('writetoken', 'password', 'user', 'signature'))
    assert (report['logged_in'], report['endpoint']) == (True, 'https://***@hub.example')
    assert report['packages']['timm'] == timm.__version__
    assert report['cache_writable'] is True
