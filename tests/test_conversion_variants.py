"""scripts/experiments/conversion_variants.py: it converts as the package does, and reads Keras' network."""
import json
import sys

import pytest
import timm
import torch
from torch import nn

import conversion_variants as script
from networks import randomize
from timm_geoprior.conversion.state_dict import convert_state_dict

NANO, VALUE_DIMS = 'geoprior_resnet14_nano', (0, 8, 16, 24)


@pytest.fixture(scope='module')
def source():
    torch.manual_seed(0)
    return randomize(timm.create_model(NANO, value_dims=(0, 0, 0, 0))).eval()


def test_without_options_it_is_the_packages_conversion(source):
    converted = timm.create_model(NANO).eval()
    converted.load_state_dict(convert_state_dict(source.state_dict(), converted))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = script.variant(source, VALUE_DIMS, 64)(images)
        torch.testing.assert_close(found, converted(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', script.VARIANTS)
def test_each_variant_runs(source, name):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answers = script.variant(source, VALUE_DIMS, 64, **script.VARIANTS[name])(images)
    assert answers.isfinite().all()
    assert not torch.equal(answers, source(images))


@pytest.mark.parametrize('limit', ['100', '0'])
def test_no_images_are_refused(limit, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, 'load_source', lambda name: (nn.Identity(), script.KERAS_CONFIG))
    monkeypatch.setattr(sys, 'argv', ['conversion_variants.py', 'any', '--images', str(tmp_path), '--limit', limit])
    with pytest.raises(SystemExit, match='2'):
        script.main()
    assert f'got 0 files in {tmp_path} and {limit}' in capsys.readouterr().err


def test_a_network_of_tensorflow_js_is_read(tmp_path):
    values = torch.arange(10, dtype=torch.float32).numpy().tobytes()
    (tmp_path / 'one').write_bytes(values[:24])
    (tmp_path / 'two').write_bytes(values[24:])
    weights = [{'name': 'a', 'shape': [2, 3]}, {'name': 'b', 'shape': [4]}]
    manifest = [{'paths': ['one', 'two'], 'weights': weights}]
    (tmp_path / 'model.json').write_text(json.dumps({'weightsManifest': manifest}))
    found = script.read_tfjs(tmp_path)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {'a': [[0, 1, 2], [3, 4, 5]], 'b': [6, 7, 8, 9]}


@torch.no_grad()
def test_keras_network_gives_keras_answers(tmp_path, monkeypatch):
    """As Keras computes it: BGR, a bias in every convolution, norms with eps=1e-3."""
    model = script.stride_first(timm.create_model('resnet50')).eval()
    assert [layer.stride for layer in (model.layer2[0].conv1, model.layer2[0].conv2)] == [(2, 2), (1, 1)]
    draw, weights = torch.Generator().manual_seed(0), {}

    def keep(conv, norm, place, norm_place):
        conv.bias = nn.Parameter(torch.rand(conv.out_channels, generator=draw))
        norm.eps = 1e-3
        parts = {'gamma': norm.weight, 'beta': norm.bias, 'moving_mean': norm.running_mean,
                 'moving_variance': norm.running_var}
        for name, tensor in parts.items():
            tensor.copy_(torch.rand(len(tensor), generator=draw) + (name == 'moving_variance'))
            weights[f'{norm_place}/{name}'] = tensor
        weights.update({f'{place}/kernel': conv.weight.permute(2, 3, 1, 0), f'{place}/bias': conv.bias})

    keep(model.conv1, model.bn1, 'conv1', 'bn_conv1')
    for stage, letters in ((1, 'abc'), (2, 'abcd'), (3, 'abcdef'), (4, 'abc')):
        for letter, block in zip(letters, getattr(model, f'layer{stage}'), strict=True):
            for part, number in zip('abc', (1, 2, 3), strict=True):
                name = f'{stage + 1}{letter}_branch2{part}'
                keep(getattr(block, f'conv{number}'), getattr(block, f'bn{number}'), f'res{name}', f'bn{name}')
            if block.downsample is not None:
                name = f'{stage + 1}{letter}_branch1'
                keep(*block.downsample[:2], f'res{name}', f'bn{name}')
    weights.update({'fc1000/kernel': model.fc.weight.T, 'fc1000/bias': model.fc.bias})
    monkeypatch.setattr(script, 'read_tfjs', lambda folder: weights)
    images = torch.randn(2, 3, 64, 64, generator=draw)
    found, expected = script.keras_resnet50(tmp_path)(images / script.KERAS_SCALE), model(images.flip(1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
