"""Layer, networks, training and validation on a GPU, against the CPU. Without a GPU, the CPU is used instead."""
import csv
import json
import os
import signal

import pytest
import timm
import torch
from timm.utils import reparameterize_model

from networks import randomize
from releases import NANO
from timm_geoprior import GeoPriorConv2d
from timm_geoprior.cli import main
from timm_geoprior.pretrained.loading import load_golden
from timm_geoprior.pretrained.manifest import load_manifest
from timm_geoprior.pretrained.verify import GOLDEN_TOLERANCES, golden_error
from timm_geoprior.training.checkpoint import load_checkpoint
from timm_geoprior.training.engine import train
from timm_geoprior.training.recipe import RunConfig, load_recipe

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
SHAPE = {'channels': (8, 16, 16, 16), 'value_dims': (0, 8, 8, 8), 'stem_width': 8}


@pytest.fixture(autouse=True)
def no_tf32():
    modules = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [module.allow_tf32 for module in modules]
    for module in modules:
        module.allow_tf32 = False
    yield
    for module, allowed in zip(modules, before, strict=True):
        module.allow_tf32 = allowed


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('heads', [1, 2])
def test_outputs_and_gradients_of_the_layer(heads, stride):
    torch.manual_seed(0)
    layer = GeoPriorConv2d(16, 24, 8, stride=stride, num_heads=heads)
    x = torch.randn(2, 16, 15, 20)
    found = []
    for device, dtype in (('cpu', torch.float64), (DEVICE, torch.float32)):
        layer = layer.to(device, dtype)
        layer.zero_grad()
        inputs = x.to(device, dtype).requires_grad_()
        out = layer(inputs)
        (out * out).mean().backward()
        found.append([tensor.detach().cpu().double() for tensor in (
            out, inputs.grad, *(parameter.grad for parameter in layer.parameters()))])
    for expected, value in zip(*found, strict=True):
        assert (value - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('precision', GOLDEN_TOLERANCES)
def test_golden_outputs(precision, layout):
    model = timm.create_model(NANO, pretrained=True).to(DEVICE, getattr(torch, precision), memory_format=layout)
    assert golden_error(model, load_golden(load_manifest().get(NANO))) <= GOLDEN_TOLERANCES[precision]


def test_a_reparameterized_network():
    model = randomize(timm.create_model('geoprior_resnet14_nano')).eval().to(DEVICE)
    x = torch.randn(2, 3, 64, 64, device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(reparameterize_model(model)(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_network_made_on_the_default_device():
    before = torch.get_default_device()
    torch.set_default_device(DEVICE)
    try:
        model = timm.create_model(NANO, pretrained=True)
    finally:
        torch.set_default_device(before)
    assert golden_error(model, load_golden(load_manifest().get(NANO))) <= GOLDEN_TOLERANCES['float32']


@torch.no_grad()
def test_a_plain_network_is_converted_there_as_on_the_cpu():
    torch.manual_seed(0)
    plain = randomize(timm.create_model('geoprior_resnet14_nano', value_dims=(0, 0, 0, 0))).state_dict()
    outputs = []
    for device in ('cpu', DEVICE):
        model = timm.create_model('geoprior_resnet14_nano').to(device).eval()
        model.load_state_dict({key: value.to(device) for key, value in plain.items()})
        outputs.append(model(torch.ones(1, 3, 64, 64, device=device)).cpu())
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('amp', ['', 'bfloat16', 'float16'])
def test_training_is_resumed(amp, photo_folder, tmp_path):
    changes = [f'model_kwargs={json.dumps(SHAPE)}', 'epochs=2', 'batch_size=8', 'model_ema=true', 'channels_last=true']
    recipe = load_recipe('finetune', [
        'model=geoprior_resnet14_nano', *changes, *(['amp=true', f'amp_dtype={amp}'] if amp else [])])
    config = {'val_split': 'val', 'workers': 0, 'device': DEVICE}
    with pytest.raises(SystemExit):
        train(recipe, RunConfig(photo_folder, tmp_path, tell=_interrupt_after_an_epoch, **config))
    results = train(recipe, RunConfig(photo_folder, tmp_path, resume=True, **config))
    rows = list(csv.DictReader((tmp_path / 'summary.csv').open()))
    assert [row['epoch'] for row in rows] == ['0', '1']
    assert results['epochs'] == 2
    assert all(torch.isfinite(torch.tensor(float(row['train_loss']))) for row in rows)
    assert {value.device.type for value in load_checkpoint(tmp_path / 'last.pt')['model'].values()} == {'cpu'}


def _interrupt_after_an_epoch(sentence):
    if sentence.startswith('epoch 1:'):
        os.kill(os.getpid(), signal.SIGTERM)


def test_accuracy_is_that_of_the_cpu(checkpoint, photo_folder, tmp_path):
    found = []
    for device in ('cpu', DEVICE):
        path = tmp_path / f'{device}.json'
        assert main(['validate', '--checkpoint', str(checkpoint), '--data-dir', str(photo_folder), '--split', 'val',
                     '--device', device, '--workers', '0', '--results-file', str(path)]) == 0
        found.append(json.loads(path.read_text())['results'][0]['top1_correct'])
    assert found[0] == found[1]


def test_classify(photo_folder, capsys):
    photo = next((photo_folder / 'val').rglob('*.jpg'))
    answers = []
    for device in ('cpu', DEVICE):
        assert main(['classify', '--device', device, '--json', str(photo)]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    labels = [[found['label'] for found in answer['predictions']] for answer in answers]
    assert labels[0] == labels[1]
