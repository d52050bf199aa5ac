"""scripts/experiments/robustness.py, on real photographs and two trained networks."""
import csv
import sys

import numpy as np
import pytest
import robustness
import torch

from timm_geoprior.evaluation.metrics import Predictions
from timm_geoprior.evaluation.validate import main as validate
from timm_geoprior.training.engine import train
from timm_geoprior.training.recipe import RunConfig, make_recipe

TINY = {
    'name': 'tiny', 'model': 'geoprior_resnet14_nano', 'epochs': 2, 'batch_size': 8, 'lr': 0.05, 'img_size': 32,
    'eval_size': 48, 'in_memory': True, 'model_ema': True, 'model_ema_decay': 0.5,
}
OPTIONS = {'channels': [8, 16, 16, 16], 'stem_width': 8}


@pytest.fixture(scope='module')
def pairs(photo_folder, tmp_path_factory):
    """Checkpoints with and without the prior, for three seeds."""
    root = tmp_path_factory.mktemp('pairs')
    found = []
    for seed in range(3):
        for name, values in (('prior', [0, 8, 8, 8]), ('plain', [0, 0, 0, 0])):
            recipe = make_recipe({**TINY, 'model_kwargs': {**OPTIONS, 'value_dims': values}})
            train(recipe, RunConfig(photo_folder, root / f'{name}{seed}', seed=seed, workers=0))
        found.append([str(root / f'{name}{seed}' / 'last.pt') for name in ('prior', 'plain')])
    return found


def call(monkeypatch, photo_folder, output, *pairs):
    named = [word for pair in pairs for word in ('--pair', *pair)]
    monkeypatch.setattr(sys, 'argv', [
        'robustness.py', '--data-dir', str(photo_folder), '--output', str(output), '-j', '0', '--device', 'cpu',
        *named])
    robustness.main()


def test_images_move_in_four_directions():
    images = torch.zeros(4, 3, 16, 16)
    images[:, :, 8, 8] = 1
    moved = robustness.shift(images, 1 / 4)
    assert moved[:, 0].nonzero()[:, 1:].tolist() == [[8, 12], [12, 8], [8, 4], [4, 8]]  # rows, columns
    assert moved.unique().tolist() == [0, 1]


@pytest.mark.parametrize('area', robustness.COVERED)
def test_a_square_is_covered_wherever_the_batch_begins(area):
    images = torch.ones(4, 3, 64, 64)
    covered = robustness.cover(images, 0, area)
    assert (covered == 0).float().mean(dim=(1, 2, 3)).tolist() == [area] * 4
    assert torch.equal(robustness.cover(images[2:], 2, area), covered[2:])
    assert not torch.equal(covered[0], covered[1])
    assert images.min() == 1


def test_every_condition_changes_the_images():
    images = torch.rand(4, 3, 64, 64)
    found = {name: change(images, 0) for name, change in robustness.conditions(80, 'bilinear').items()}
    sizes = [values.shape[-1] for values in found.values()]
    assert sizes == [80, 40, 60, 100, 120, 160, 80, 80, 80, 80]
    own = found.pop('as they are')
    assert not any(torch.equal(values, own) for values in found.values())


def test_the_interval_is_that_of_paired_images():
    """Of 400 images, the first network has 40 more right than the other; apart from that they are equal."""
    rank = np.arange(400) % 2

    def answers(right):
        ranks = np.where(np.arange(400) < right, 0, rank)
        return Predictions(np.arange(400), ranks, ranks, ranks, np.full(400, 0.5, np.float32))

    figures, line = robustness.compare('some', [[answers(80), answers(0)]])
    assert figures.tolist() == [[60.0, 50.0]]
    assert line[:4] == ['some', '60.00', '50.00', '+10.00']
    low, high = map(float, line[4].split(' to '))
    expected = 1.96 * 100 * (0.1 * 0.9 / 400) ** 0.5
    assert (10 - low, high - 10) == (pytest.approx(expected, rel=0.15), pytest.approx(expected, rel=0.15))
    assert len(line) == 5
    _, same = robustness.compare('same', [[answers(0), answers(0)]] * 3, calibration=True)
    assert same == ['same', '0.00', '0.00', '+0.00', '+0.00 to +0.00', '+0.00 ± 0.00']


def test_the_report(pairs, photo_folder, tmp_path, monkeypatch):
    call(monkeypatch, photo_folder, tmp_path / 'out', *pairs)
    with (tmp_path / 'out' / 'robustness.csv').open() as file:
        rows = list(csv.DictReader(file))
    text = (tmp_path / 'out' / 'robustness.md').read_text()
    assert len(rows) == 3 * 11
    assert {row['seed'] for row in rows} == {'0', '1', '2'}
    assert {(row['num_images'], row['size']) for row in rows} == {('20', '48')}
    own = [float(row['prior']) for row in rows if row['condition'] == 'as they are']
    assert f'| as they are | {np.mean(own):.2f} |' in text
    results = tmp_path / 'validated.csv'
    assert not validate([
        '--checkpoint', pairs[1][0], '--data-dir', str(photo_folder), '--split', 'val', '--device', 'cpu',
        '--results-file', str(results)])
    with results.open() as file:
        assert own[1] == pytest.approx(float(next(csv.DictReader(file))['top1']))
    assert text.count('±') == 12  # one in the header, and one per condition
    call(monkeypatch, photo_folder, tmp_path / 'one', pairs[0])
    assert '±' not in (tmp_path / 'one' / 'robustness.md').read_text()


def test_what_is_no_pair_is_refused(pairs, photo_folder, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match='must have the same recipe but for the network, and the same seed'):
        call(monkeypatch, photo_folder, tmp_path / 'out', [pairs[0][0], pairs[1][1]])
    longer = torch.load(pairs[1][0], weights_only=True)
    longer['recipe']['eval_size'] = 64
    torch.save(longer, tmp_path / 'longer.pt')
    with pytest.raises(SystemExit, match='All pairs must have the same recipe, got another one in .*longer.pt'):
        call(monkeypatch, photo_folder, tmp_path / 'out', pairs[0], [str(tmp_path / 'longer.pt')] * 2)
    other = tmp_path / 'other' / 'val'
    other.mkdir(parents=True)
    for name in ('astronaut', 'chelsea', 'coffee'):
        (other / name).symlink_to(photo_folder / 'val' / name)
    with pytest.raises(SystemExit, match='must be trained on the 3 classes of the images, got 4 others'):
        call(monkeypatch, other.parent, tmp_path / 'out', pairs[0])
    bare = tmp_path / 'bare.pt'
    torch.save({'state_dict': torch.load(pairs[0][0], weights_only=True)['model']}, bare)
    with pytest.raises(SystemExit, match='must be trained on the 4 classes of the images, got 0 others'):
        call(monkeypatch, photo_folder, tmp_path / 'out', [str(bare), str(bare)])
    gone = torch.load(pairs[0][0], weights_only=True)
    gone['recipe']['model'] = 'geoprior_resnet14_nano.of_another_version'
    torch.save(gone, tmp_path / 'gone.pt')
    with pytest.raises(SystemExit, match=r'gone\.pt cannot be loaded \(Invalid pretrained tag \(of_another_version\)'):
        call(monkeypatch, photo_folder, tmp_path / 'out', [str(tmp_path / 'gone.pt')] * 2)
    assert not (tmp_path / 'out').exists()


def test_each_seed_may_have_its_own_teacher(pairs, photo_folder, tmp_path, monkeypatch):
    taught = []
    for name in pairs[1]:
        state = torch.load(name, weights_only=True)
        state['recipe']['teacher_path'] = 'another.pt'
        taught.append(str(tmp_path / f'{len(taught)}.pt'))
        torch.save(state, taught[-1])
    call(monkeypatch, photo_folder, tmp_path / 'out', pairs[0], taught)
    assert 'means of 2 pairs (seeds 0, 1)' in (tmp_path / 'out' / 'robustness.md').read_text()


def test_a_control_sees_the_images_of_its_pair(photo_folder, tmp_path, monkeypatch):
    """timm uses another interpolation for resnet10t than this package for its networks."""
    saved = []
    for model in ('geoprior_resnet14_nano', 'resnet10t'):
        recipe = make_recipe({**TINY, 'model': model, 'model_ema': False, 'epochs': 1})
        train(recipe, RunConfig(photo_folder, tmp_path / model, workers=0))
        saved.append(str(tmp_path / model / 'last.pt'))
    asked = []
    conditions = robustness.conditions
    monkeypatch.setattr(robustness, 'conditions', lambda *given: asked.append(given) or conditions(*given))
    monkeypatch.setattr(robustness, 'SIZES', ())
    named = ['--pair', *saved, '--amp']
    monkeypatch.setattr(sys, 'argv', [
        'robustness.py', '--data-dir', str(photo_folder), '--output', str(tmp_path), '-j', '0', '--device', 'cpu',
        *named])
    robustness.main()
    assert asked == [(48, 'bilinear')] * 2
    assert ' in bfloat16, ' in (tmp_path / 'robustness.md').read_text()
