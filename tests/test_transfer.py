"""scripts/experiments/transfer.py and its parts, on real photographs."""
import csv
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import transfer as module
from programs import run
from timm_geoprior.data.dataset import open_split
from timm_geoprior.errors import EvaluationError, GeoPriorError
from transfer import Transfer, choose_penalty, draw_labels, fit_linear, knn, transfer, write_transfer

SCRIPT = Path(__file__).parents[1] / 'scripts' / 'experiments' / 'transfer.py'
NANO = 'geoprior_resnet14_nano'


def job(photo_folder, output, **changes):
    return Transfer(**{'data_dir': photo_folder, 'output': output, 'model': NANO, 'seeds': (0,), 'img_size': 32,
                       'overrides': ('epochs=2',), 'workers': 0, **changes})


def arguments(data, output, *more):
    return [str(SCRIPT), NANO, '--data-dir', str(data), '--output', str(output), '--device', 'cpu', '-j', '0',
            '--img-size', '32', '--seeds', '0', '--set', 'epochs=2', *map(str, more)]


@pytest.fixture
def script(monkeypatch):
    """Run the script in this process."""
    def run(*given):
        monkeypatch.setattr(sys, 'argv', arguments(*given))
        runpy.run_path(str(SCRIPT), run_name='__main__')

    return run


# ends the process, as SIGKILL would, after the first epoch of the first fine-tuning
KILLED = (
    'import os, runpy, sys\n'
    'from timm_geoprior.training import engine\n'
    'end = engine.Trainer._end_epoch\n'
    'def killed(self):\n'
    '    end(self)\n'
    '    os._exit(9)\n'
    'engine.Trainer._end_epoch = killed\n'
    f'sys.argv[0] = {str(SCRIPT)!r}\n'
    f'sys.path.insert(0, {str(SCRIPT.parent)!r})\n'
    'runpy.run_path(sys.argv[0], run_name="__main__")\n')


def test_killed_and_gone_on(photo_folder, tmp_path, script, capsys, monkeypatch):
    given = (photo_folder, tmp_path, '--per-class', 6)
    assert run(['-c', KILLED, *arguments(*given)[1:]]).returncode == 9
    folder = tmp_path / photo_folder.name
    features = {path.name: path.stat().st_mtime_ns for path in folder.glob('features/*')}
    assert set(features) == {'train-pretrained.pt', 'train-random0.pt', 'test-pretrained.pt', 'test-random0.pt'}
    assert (folder / 'runs' / '0-6-pretrained' / 'last.pt').exists()
    script(*given)
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob('features/*')} == features
    rows = list(csv.DictReader((tmp_path / 'transfer.csv').open()))
    by_case = {(row['method'], row['start']): float(row['top1']) for row in rows}
    assert len(by_case) == len(rows) == 6
    assert by_case['linear', 'pretrained'] > 50  # chance is one in four
    assert all(row['labels'] == '24' and row['test_images'] == '20' for row in rows)
    left = [path.name for path in (folder / 'runs' / '0-6-pretrained').iterdir()]
    assert 'results.json' in left
    assert not {'last.pt', 'best.pt', 'model.safetensors', 'images'} & set(left)
    assert json.loads((folder / 'runs' / '0-6-random' / 'results.json').read_text())['epochs'] == 2
    text = (tmp_path / 'transfer.md').read_text()
    assert text in capsys.readouterr().out
    assert f'| 6 | 24 | linear probe | {by_case["linear", "pretrained"]:.2f} |' in text
    assert Image.open(tmp_path / 'transfer.png').size[0] > 500
    monkeypatch.setattr(module, '_open_splits', None)  # nothing is left to do
    assert list(transfer(job(photo_folder, tmp_path, per_class=(6,)))) == [module._rows(tmp_path)]
    with pytest.raises(GeoPriorError, match='must have been made with --img-size 64, got --img-size 32. Name another'):
        next(transfer(job(photo_folder, tmp_path, img_size=64)))
    with pytest.raises(GeoPriorError, match='been made with --set epochs=3, got --set epochs=2. Name'):
        next(transfer(job(photo_folder, tmp_path, overrides=('epochs=3',))))
    next(transfer(job(photo_folder, tmp_path, overrides=(), methods=('knn',))))  # overrides are for fine-tuning
    monkeypatch.undo()
    other = shutil.copytree(photo_folder, tmp_path / 'elsewhere' / photo_folder.name)
    (other / 'val' / 'rocket' / '00.jpg').unlink()
    with pytest.raises(GeoPriorError, match='been made with the 19 others of .*elsewhere.*, got 20 test images'):
        list(transfer(job(other, tmp_path, per_class=(7,))))


def test_features_are_those_of_the_drawn_images(photo_folder, tmp_path):
    """More seeds and labels need new features; each row uses those of its own images."""
    few = job(photo_folder, tmp_path, methods=('knn',), per_class=(3,), img_size=64)
    more = job(photo_folder, tmp_path, methods=('knn',), per_class=(3, 5), seeds=(1, 0), img_size=64)
    *_, first = transfer(few)
    *_, rows = transfer(more)
    assert len(rows) == 8
    assert all(row in rows for row in first)
    train, test = (open_split(photo_folder, split=split) for split in ('train', 'val'))
    everything = torch.arange(len(train.labels)), torch.arange(len(test.labels))
    full = [module._forward(more, data, indices, module._frozen(more, 'pretrained', 1, train), '')
            for data, indices in zip((train, test), everything, strict=True)]
    drawn = draw_labels(train, 5, 1)
    answers = knn(full[0][drawn], torch.from_numpy(train.labels)[drawn], full[1])
    right = (answers == torch.from_numpy(test.labels)).double().mean().item()
    (row,) = (row for row in rows if (row['seed'], row['per_class'], row['start']) == (1, 5, 'pretrained'))
    assert row['top1'] == pytest.approx(100 * right)


def test_a_random_network_is_probed_with_the_images_statistics(photo_folder, tmp_path):
    train = open_split(photo_folder, split='train')
    given = job(photo_folder, tmp_path)
    network = module._frozen(given, 'random', 0, train)
    images = torch.stack([images for batch, _ in module._loader(given, train, torch.arange(48)) for images in batch])
    with torch.inference_mode():
        normed = network.bn1.eval()(network.conv1(images))
        torch.testing.assert_close(normed.mean((0, 2, 3)), torch.zeros(normed.shape[1]), atol=1e-3, rtol=0)
        torch.testing.assert_close(module._frozen(given, 'random', 0, train)(images), network(images))


def test_draws(photo_folder):
    train = open_split(photo_folder, split='train')
    few, more, other = (draw_labels(train, *given).tolist() for given in ((3, 0), (7, 0), (7, 1)))
    assert set(few) < set(more) != set(other)
    assert torch.from_numpy(train.labels)[few].bincount().tolist() == [3, 3, 3, 3]
    assert draw_labels(train, 0, 5).tolist() == list(range(48))


def test_knn_votes_by_similarity():
    """Three slightly similar neighbours count less than one that is nearly the same."""
    features = torch.tensor([[1.0, 0.05], [0.6, 1.0], [0.6, 1.1], [0.6, 1.2]])
    labels = torch.tensor([0, 1, 1, 1])
    assert knn(features, labels, torch.tensor([[9.0, 0.0], [0.1, 0.2]])).tolist() == [0, 1]


def two_inputs(features):
    std = features.std(0, correction=0)
    return ((features - features.mean(0)) / torch.where(std > 1e-6, std, 1.0)).double()


def fit_softmax(inputs, labels, penalty):
    """The weights of a softmax regression with a weight vector for each class, fitted by torch."""
    weight = torch.zeros(inputs.shape[1], 2, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn='strong_wolfe')

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(inputs @ weight + bias, labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def test_linear_probe_is_at_its_optimum():
    """The gradient of the penalized loss vanishes; a penalty is chosen that generalizes."""
    noise = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = torch.randn(60, 40, generator=noise) + 2 * torch.nn.functional.one_hot(labels, 40)
    features[:, 39] = 5.0  # constant
    probe = fit_linear(features, labels, 0.1)
    inputs = torch.from_numpy(probe[0].transform(features.numpy()))
    weight = torch.from_numpy(probe[1].coef_.T)
    error = (torch.from_numpy(probe.predict_proba(features.numpy())) - torch.nn.functional.one_hot(labels, 3)) / 60
    torch.testing.assert_close(inputs.double().T @ error.double(), -0.1 * weight.double(), atol=1e-4, rtol=1e-3)
    two = fit_linear(features[labels < 2], labels[labels < 2], 0.1)[1].coef_
    softmax = fit_softmax(two_inputs(features[labels < 2]), labels[labels < 2], 0.1)
    torch.testing.assert_close(torch.from_numpy(two[0]).double(), softmax[:, 1] - softmax[:, 0], atol=1e-3, rtol=1e-2)
    assert choose_penalty(features, labels) > module.PENALTIES[0]


def test_the_report(tmp_path):
    rows = [{'data': 'cats', 'per_class': per_class, 'labels': 40, 'method': method, 'start': start, 'seed': seed,
             'top1': top1 + seed, 'test_images': 1000, 'model': NANO,
             'command': 'python scripts/experiments/transfer.py', 'commit': None, 'hardware': 'a CPU', 'torch': '2.14'}
            for per_class in ('all', 10) for method in ('knn', 'finetune')
            for start, top1 in (('pretrained', 40.0), ('random', 30.0)) for seed in range(3)]
    lines = write_transfer(rows, tmp_path).splitlines()
    table = [line for line in lines if line.startswith('| ')]
    assert table[2] == '| 10 | 40 | k-NN | 41.00 (40.00 to 42.00) | 31.00 (30.00 to 32.00) | +10.00 ± 0.00 | 3 |'
    assert [line.split(' | ')[0] for line in table[2:]] == ['| 10', '| 10', '| all', '| all']
    assert lines[-3:] == ['`python scripts/experiments/transfer.py`', '', 'Commit unknown; a CPU; torch 2.14.']
    # the mean of three equal figures may differ from them in its last digit
    for right in (1245, 1243):
        write_transfer([{**row, 'top1': 100 * right / 2893} for row in rows], tmp_path)


@pytest.mark.parametrize(('given', 'words'), [
    (['--per-class', '13'], r'--per-class must be from 2 .* to the 12 images of the class astronaut, got 13'),
    (['--per-class', '1'], r'--per-class must be from 2 .* of the class astronaut, got 1'),
    (['--img-size', '-1'], r'--img-size must be in pixels, got -1'),
    (['--device', 'gpu'], r'--device gpu cannot be used \(.*\)\. Use cuda, cpu or another device'),
    (['--output', __file__], r'--output must be a folder, got the file .*test_transfer.py'),
    (['--data-dir', 'nowhere'], 'nowhere must be a folder'),
    (['--set', 'epoch=2'], "did you mean 'epochs'"),
])
def test_bad_arguments(photo_folder, tmp_path, script, given, words):
    with pytest.raises(SystemExit, match=f'^transfer.py: .*{words}.*$'):
        script(photo_folder, tmp_path / 'out', *given)
    assert not (tmp_path / 'out').exists()


def test_bad_folders_and_models(photo_folder, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(photo_folder, data)
    shutil.rmtree(data / 'val' / 'coffee')
    with pytest.raises(GeoPriorError, match='must have the same class folders in train and val, got coffee in one'):
        list(transfer(job(data, tmp_path / 'out')))
    shutil.copytree(photo_folder / 'val' / 'coffee', data / 'val' / 'coffee')
    (data / 'val' / 'coffee' / '01.jpg').write_bytes(b'no image')
    with pytest.raises(EvaluationError, match=r'1 of 20 images cannot be read(.|\n)*coffee/01.jpg'):
        list(transfer(job(data, tmp_path / 'out')))
    (data / 'val' / 'coffee' / '01.jpg').unlink()
    for path in sorted((data / 'train' / 'coffee').iterdir())[1:]:
        path.unlink()
    with pytest.raises(GeoPriorError, match='The class coffee must have at least 2 training images, .* got 1'):
        list(transfer(job(data, tmp_path / 'out')))
    shutil.rmtree(data / 'val')
    with pytest.raises(GeoPriorError, match=r'must have class folders in train/ and in test/ or val/'):
        list(transfer(job(data, tmp_path / 'out')))
    with pytest.raises(GeoPriorError, match=r'resnet51 must be a model with trained weights, got .* \(Unknown model'):
        list(transfer(job(photo_folder, tmp_path / 'out', model='resnet51')))
    assert not (tmp_path / 'out').exists()
