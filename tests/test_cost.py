"""scripts/experiments/cost.py, against figures computed by hand."""
import json
from pathlib import Path

import pytest

from programs import run

SCRIPT = Path(__file__).parents[1] / 'scripts' / 'experiments' / 'cost.py'


@pytest.fixture
def measured(tmp_path):
    rows = [f'geoprior_resnet50,{index},{speed}' for index, speed in enumerate([9, 10, 12])]
    (tmp_path / 'speed.csv').write_text('\n'.join(['model,repetition,images_per_second', *rows]))
    setting = {'train': True, 'img_size': 224, 'precision': 'float32'}
    (tmp_path / 'results.json').write_text(json.dumps(
        {'models': ['geoprior_resnet50'], 'setting': setting, 'hardware': 'a device'}))
    return tmp_path


def test_the_table(measured):
    done = run([SCRIPT, measured], check=True)
    rows = {cells[1]: cells for line in done.stdout.splitlines()[4:] if (cells := [c.strip() for c in line.split('|')])}
    assert set(rows) == {'paper_in1k', 'sgd100', 'a1', 'a2', 'a3', 'torchvision_v2', 'warm_in1k'}
    _, _, model, epochs, batch, one, eight, many, *speeds, sent, network, disk, _ = rows['sgd100']
    assert (model, epochs, speeds) == ('geoprior_resnet50', '100', ['10.0', '80.0', '640.0'])
    assert float(one.replace(',', '')) == pytest.approx(1_281_167 * 100 / 10 / 3600, abs=0.1)
    assert float(eight.replace(',', '')) == pytest.approx(1_281_167 * 100 / 80 / 3600, abs=0.1)
    assert float(many.replace(',', '')) == pytest.approx(1_281_167 * 100 / 640 / 3600, abs=0.1)
    gradients = {n: 2 * (n - 1) / n * 4 * 24_541_237 / 1e9 for n in (8, 64)}
    assert [float(x) for x in sent.split(',')] == pytest.approx([*gradients.values()], abs=0.001)
    assert [float(x) for x in network.split(',')] == pytest.approx(
        [gradients[n] * 10 * n / int(batch) for n in (8, 64)], rel=0.01)
    assert [float(x) for x in disk.split(';')] == pytest.approx(
        [n * 10 * 147_897_477_120 / 1_281_167 / 1e6 for n in (1, 8, 64)], abs=0.1)
    assert float(rows['warm_in1k'][5].replace(',', '')) == pytest.approx(1_281_167 * 3 / (10 * 3 / 4) / 3600, abs=0.1)
    assert float(rows['a3'][8]) == pytest.approx(10 * (224 / 160) ** 2, abs=0.1)  # trained at 160 px


def test_speed_of_inference_is_refused(measured):
    (measured / 'results.json').write_text((measured / 'results.json').read_text().replace('true', 'false'))
    done = run([SCRIPT, measured])
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f'cost.py: {measured} must hold training speeds, got')
    assert run([SCRIPT, measured / 'nowhere']).returncode == 1
