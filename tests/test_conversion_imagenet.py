"""scripts/experiments/conversion_imagenet.py: conversions of a network with strides in its 1x1 layers."""
import copy
import json
import re
import sys

import pytest
import timm
import torch
from timm.data import ImageNetInfo
from torch import nn

import conversion_imagenet as script
from conversion_variants import KERAS_CONFIG, stride_first
from timm_geoprior.training import parts
from timm_geoprior.training.checkpoint import load_checkpoint
from timm_geoprior.training.recipe import make_recipe


@pytest.fixture(scope='module')
def source():
    torch.manual_seed(0)
    model = timm.create_model('resnet50')
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 0.4)
    return stride_first(model).eval()


def test_maps_and_strides_are_those_of_the_network(source):
    """Those that the attention layers see in a forward pass."""
    model, seen = stride_first(timm.create_model('geoprior_resnet50', num_classes=1000).eval()), []
    blocks = list(script.attention_blocks(model))
    for item in blocks:
        item.attn.register_forward_hook(lambda module, args, output: seen.append(
            (tuple(args[0].shape[2:]), args[0].shape[2] // output.shape[2])))
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    assert [(item.map_size, item.stride) for item in blocks] == seen


def test_the_table(source, photo_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(KERAS_CONFIG, 'input_size', (3, 32, 32))
    monkeypatch.setattr(script, 'keras_resnet50', lambda folder: source)
    wnids = ImageNetInfo().label_names()
    data = tmp_path / 'data'
    (tmp_path / 'model.json').touch()
    for table in ('_model_entrypoints', '_module_to_models'):  # restored, since other tests list the models
        monkeypatch.setattr(timm.models._registry, table, copy.copy(getattr(timm.models._registry, table)))
    for name, wnid in zip(('coffee', 'rocket'), (wnids[967], wnids[657]), strict=True):
        (data / wnid).mkdir(parents=True)
        for path in (photo_folder / 'val' / name).iterdir():
            (data / wnid / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(sys, 'argv', [
        'conversion_imagenet.py', str(tmp_path), '--images', str(photo_folder / 'train'), '--data-dir', str(data),
        '--limit', '16', '--recover', str(photo_folder / 'train'), '--set', 'img_size=32', '--set', 'batch_size=16',
        '--set', 'epochs=1', '--set', 'freeze_norms=false', '--output', str(tmp_path / 'out')])
    script.main()
    rows = json.loads((tmp_path / 'out' / 'imagenet.json').read_text())['rows']
    assert [(row['network'], row['fitted_to']) for row in rows] == [
        ('source', None), ('converted', 0), ('channels left out', 0), ('converted', 16), ('channels left out', 16),
        ('converted, recovered', 16), ('channels left out, recovered', 16)]
    assert {row['labelled'] for row in rows} == {10}
    assert all(row['feature_error'] > 0 for row in rows[1:])
    assert [len(row['radii']) for row in rows] == [0] + 6 * [13]
    assert rows[5]['radii'] != rows[3]['radii']
    assert rows[6]['radii'] == rows[4]['radii']  # frozen
    assert rows[5]['divergence'] != rows[3]['divergence']
    # source and network see the same pixels
    saved = load_checkpoint(tmp_path / 'out' / 'converted' / 'run' / 'last.pt')
    again = parts.build_teacher(make_recipe({**saved['recipe']}), 1000)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(again(images), source(images))
    assert again.pretrained_cfg['std'] == KERAS_CONFIG['std']
    assert (tmp_path / 'out' / 'imagenet.md').read_text().splitlines()[-1] in capsys.readouterr().out


@pytest.mark.parametrize(('data', 'changed', 'message'), [
    ('val', [], "--data-dir must have folders named by ImageNet's WordNet ids, got astronaut. Rename it."),
    ('wnid', ['--limit', '1000'], '--images must hold 1,000 images, got 48. Lower --limit.'),
    ('wnid', ['--recover', 'nowhere'], 'nowhere'),
    ('wnid', ['--set', 'epoch=1'], "Unknown key 'epoch' in recipe warm_in1k: did you mean 'epochs'?"),
    ('wnid', ['--set', 'opt=sgdd'], "did you mean 'sgd'?"),
    ('wnid', ['--recover', 'DATA'], '--recover must hold 256 images, one batch, got'),
    ('wnid', [], 'SOURCE must be a folder that holds model.json, got'),
])
def test_bad_input_is_one_sentence(data, changed, message, photo_folder, tmp_path, monkeypatch):
    """Before anything is measured."""
    (tmp_path / 'wnid').mkdir()
    (tmp_path / 'wnid' / ImageNetInfo().label_names()[967]).symlink_to(photo_folder / 'val' / 'coffee')
    data_dir = tmp_path / 'wnid' if data == 'wnid' else photo_folder / 'val'
    monkeypatch.setattr(sys, 'argv', ['conversion_imagenet.py', str(tmp_path), '--images', str(photo_folder / 'train'),
                                      '--data-dir', str(data_dir), '--limit', '16',
                                      *(str(data_dir) if part == 'DATA' else part for part in changed),
                                      '--output', str(tmp_path / 'out')])
    with pytest.raises(SystemExit, match=re.escape(message)) as caught:
        script.main()
    assert str(caught.value).startswith('conversion_imagenet.py: ')
    assert not (tmp_path / 'out').exists()
