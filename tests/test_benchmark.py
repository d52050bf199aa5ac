"""scripts/experiments/benchmark.py and its parts. Actual speeds do not matter here."""
import csv
import json
import signal
from pathlib import Path

import pytest
import torch
from benchmark_layer import contestants

from benchmark import (
    ENGINES,
    BenchmarkError,
    Workload,
    create_network,
    describe,
    measure_speed,
    measure_startup,
    prepare_step,
    ratios,
    summarize,
    usable_models,
)
from programs import Program, run
from timm_geoprior import GeoPriorConv2d

NANO = 'geoprior_resnet14_nano'
TINY = {'channels': (8, 16, 16, 16), 'value_dims': (0, 8, 8, 8), 'stem_width': 8}
SCRIPT = Path(__file__).parents[1] / 'scripts' / 'experiments' / 'benchmark.py'


def setting(**changes):
    return Workload(**{'img_size': 32, 'batch_size': 2, 'model_kwargs': TINY, **changes})


@pytest.mark.parametrize('engine', ENGINES)
def test_every_engine_runs_the_same_network(engine, tmp_path):
    if engine == 'onnxruntime':
        pytest.importorskip('onnxruntime')
        pytest.importorskip('onnxscript')
    model = torch.nn.Sequential(GeoPriorConv2d(3, 8, 2, stride=2), GeoPriorConv2d(8, 8, 2), torch.nn.ReLU()).eval()
    result = prepare_step(model, setting(engine=engine), tmp_path)()
    expected = prepare_step(model, setting(channels_last=True), tmp_path)()
    (result,) = result if engine == 'onnxruntime' else (result,)
    torch.testing.assert_close(torch.as_tensor(result).clone(), expected.clone(), atol=1e-5, rtol=1e-4)


def test_a_training_step_trains(tmp_path):
    model = create_network(NANO, setting(train=True))
    before = model.conv1[0].weight.detach().clone()
    prepare_step(model, setting(train=True, precision='bfloat16'), tmp_path)()
    assert not torch.equal(model.conv1[0].weight, before)
    assert model.conv1[0].weight.grad is None


def test_a_network_with_five_axes_in_channels_last():
    network = create_network('lambda_resnet26t', setting(channels_last=True, model_kwargs={}))
    axes = {parameter.dim() for parameter in network.parameters()}
    assert axes == {1, 2, 4, 5}
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in network.parameters() if p.dim() == 4)


def test_a_reparameterized_network():
    networks = [create_network(NANO, setting(reparameterize=flag)) for flag in (False, True)]
    norms = [sum(isinstance(m, torch.nn.BatchNorm2d) for m in network.modules()) for network in networks]
    assert norms == [19, 3]  # those of the deep stem stay


def test_repetitions_are_interleaved():
    rows = list(measure_speed([NANO, 'resnet10t'], setting(model_kwargs={}), repeats=2, min_seconds=0.01))
    assert [(row['model'], row['repetition']) for row in rows] == [
        ('resnet10t', 0), (NANO, 0), (NANO, 1), ('resnet10t', 1)]
    assert all(row['images_per_second'] > 0 for row in rows)


def test_memory_is_that_of_the_network():
    """Larger batches of larger images take more; the memory of the parent process does not count."""
    ballast = torch.ones(100_000_000)
    small, = measure_startup([NANO], setting(), 1)
    large, = measure_startup([NANO], setting(img_size=256, batch_size=16), 1)
    assert 0 < small['peak_bytes'] < large['peak_bytes'] < 4 * len(ballast)
    assert small['create_seconds'] > 0
    assert small['first_call_seconds'] > 0


def test_ratios_are_of_the_same_repetition():
    rows = [{'model': name, 'repetition': index, 'images_per_second': value}
            for name, values in {'a': [10.0, 22.0, 30.0], 'b': [10.0, 20.0]}.items()
            for index, value in enumerate(values)]
    assert ratios(rows, ['a', 'b'], 'images_per_second') == {'b': [1.0, 1.1]}
    assert list(describe(rows, ['a', 'b'], 'images_per_second')) == [
        'images_per_second of a: 22 [16, 26]', 'images_per_second of b: 15 [12.5, 17.5]',
        'ratio to b: 1.050 [1.025, 1.075] (closer to one than its spread is wide: no difference shown)']


@pytest.mark.parametrize(('values', 'differs'), [
    ([1.1], True), ([1.2, 1.21, 1.19], True), ([0.9, 0.91, 0.92], True), ([0.9, 1.1, 1.05], False), ([1.0], False)])
def test_a_ratio_within_its_spread_is_no_difference(values, differs):
    assert summarize(values).differs_from_one is differs


def test_what_cannot_be_measured_is_refused():
    count = torch.cuda.device_count()
    with pytest.raises(BenchmarkError, match=f'this machine has {count} CUDA devices: use --device cpu'):
        setting(device=f'cuda:{count}').check()
    with pytest.raises(BenchmarkError, match='The engine onnxruntime must run inference in float32, got bfloat16'):
        setting(engine='onnxruntime', precision='bfloat16').check()
    with pytest.raises(BenchmarkError, match='must be measured in inference, got training'):
        setting(train=True, reparameterize=True).check()
    with pytest.raises(BenchmarkError, match='nonesuch is skipped: timm .* has no such model. Name one of'):
        usable_models(['nonesuch', NANO])
    assert usable_models([NANO, 'nonesuch'])[0] == [NANO]


def test_another_gpu_is_torchs_current_device(monkeypatch):
    """torch.cuda.synchronize and torch's timers refer to the current device."""
    used = []
    monkeypatch.setattr(torch.cuda, 'set_device', used.append)
    for device in ('cpu', 'cuda', 'cuda:1'):
        setting(device=device).use_device()
    assert used == [0, 1]


def test_the_script(tmp_path):
    done = run([SCRIPT, NANO, 'resnet10t', 'nonesuch', '--img-size', '32', '--batch-size', '2', '--repeats', '2',
                '--min-seconds', '0.01', '--threads', '1', '--output', tmp_path / 'out'], check=True)
    assert 'ratio to resnet10t: ' in done.stdout
    assert 'benchmark.py: nonesuch is skipped' in done.stderr
    rows = list(csv.DictReader((tmp_path / 'out' / 'speed.csv').open()))
    assert len(rows) == 4
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert results['ratios']['images_per_second']['resnet10t'] == pytest.approx([
        float(rows[1]['images_per_second']) / float(rows[0]['images_per_second']),
        float(rows[2]['images_per_second']) / float(rows[3]['images_per_second'])])
    for picture in ('ratios.png', 'speed.png'):
        assert (tmp_path / 'out' / picture).stat().st_size > 5000


def test_a_killed_benchmark_keeps_its_rows(tmp_path):
    arguments = [SCRIPT, NANO, '--img-size', '32', '--batch-size', '2', '--repeats', '1000000', '--min-seconds',
                 '0.001', '--threads', '1', '--output', tmp_path]
    with Program(arguments) as process:
        while not (tmp_path / 'speed.csv').exists() or (tmp_path / 'speed.csv').read_text().count('\n') < 4:
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert len(list(csv.DictReader((tmp_path / 'speed.csv').open()))) >= 3


def test_the_script_says_what_is_wrong_in_one_line(tmp_path):
    done = run([SCRIPT, 'nonesuch', '--output', tmp_path / 'out'])
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith('benchmark.py: nonesuch is skipped')
    done = run([SCRIPT, 'resnet10t', 'resnet14t', '--repeats', '0', '--output', tmp_path / 'out'])
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith('must be 0 or more, and one of them at least 1, got 0 and 0.')
    assert not (tmp_path / 'out').exists()


def test_the_layer_alone(tmp_path):
    script = SCRIPT.with_name('benchmark_layer.py')
    arguments = ['--output', str(tmp_path), '--sizes', '4', '12', '--dim', '8', '--value-dim', '2', '--repeats', '1',
                 '--min-seconds', '0.001', '--max-gigabytes', '0.00001']
    done = run([script, *arguments], check=True)
    rows = list(csv.DictReader((tmp_path / 'layer.csv').open()))
    assert [(row['layer'], row['size'], row['map_bytes']) for row in rows] == [
        ('GeoPriorAttn2d', '4', '128'), ('dense map', '4', '1024'), ('scaled_dot_product_attention', '4', ''),
        ('GeoPriorAttn2d', '12', '1152'), ('scaled_dot_product_attention', '12', '')]
    assert 'dense map at 12 x 12 is left out' in done.stderr
    assert (tmp_path / 'layer.png').stat().st_size > 5000


def test_the_layers_beside_it_compute_the_same():
    layers = contestants(dim=4, value_dim=2, size=5, max_bytes=1e9)
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(layers['dense map'](x), layers['GeoPriorAttn2d'](x))
