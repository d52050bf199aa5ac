"""scripts/experiments/train_in_time.py: epochs scaled to a time, a run that takes too long, the release file."""
import signal
import time
from argparse import Namespace

import pytest
import torch
import train_in_time as script
import yaml

from timm_geoprior.data.memory import decode_images
from timm_geoprior.errors import GeoPriorError
from timm_geoprior.release.staging import release_tensors
from timm_geoprior.training.checkpoint import load_checkpoint, read_weights
from timm_geoprior.training.loaders import open_images
from timm_geoprior.training.recipe import RunConfig, make_recipe

TINY = {
    'name': 'tiny', 'model': 'geoprior_resnet14_nano', 'epochs': 14, 'batch_size': 8, 'lr': 0.05, 'img_size': 48,
    'model_kwargs': {'channels': [8, 16, 16, 16], 'value_dims': [0, 8, 8, 8], 'stem_width': 8},
    'progressive': [[0, 32], [9, 40], [13, 48]], 'warmup_epochs': 2, 'mixup': 0.2, 'mixup_off_epoch': 13,
    'in_memory': True, 'model_ema': True, 'model_ema_decay': 0.9,
}


def tiny(**changes):
    return make_recipe({**TINY, **changes})


def arguments(folder, output, recipe, **changes):
    output.mkdir(exist_ok=True)
    path = output.parent / 'tiny.yaml'
    path.write_text(yaml.safe_dump({**TINY, **recipe}))
    return Namespace(**{
        'recipe': str(path), 'data_dir': folder, 'output': output, 'minutes': 1, 'model': [], 'set': [], 'seed': 0,
        'device': 'cpu', 'workers': 0,
        **changes})


@pytest.mark.parametrize(('factor', 'epochs', 'progressive', 'warmup', 'off'), [
    (2.0, 28, ((0, 32), (18, 40), (26, 48)), 4, 26),
    (0.5, 7, ((0, 32), (4, 40), (6, 48)), 1, 6),
    (0.01, 3, ((0, 32), (1, 40), (2, 48)), 1, 3),
])
def test_all_that_a_recipe_counts_in_epochs_is_scaled(factor, epochs, progressive, warmup, off):
    found = script.scale(tiny(), factor)
    assert (found.epochs, found.progressive) == (epochs, progressive)
    assert (found.warmup_epochs, found.mixup_off_epoch) == (warmup, off)


def test_what_is_never_reached_is_left_out():
    found = script.scale(tiny(epochs=5, decay_epochs=4), 3)
    assert (found.epochs, found.progressive, found.decay_epochs) == (15, ((0, 32),), 12)


def test_mixup_that_ends_early_still_ends():
    assert script.scale(tiny(mixup_off_epoch=1), 0.2).mixup_off_epoch == 1
    assert script.scale(tiny(mixup_off_epoch=0, warmup_epochs=0), 0.2).mixup_off_epoch == 0


def test_one_size_is_scaled_too():
    found = script.scale(tiny(progressive=[]), 3.5)
    assert (found.epochs, found.progressive) == (49, ((0, 48),))


def test_an_epoch_at_each_size_has_its_time():
    speed = script.Speed(update={32: 1.0, 40: 2.0, 48: 4.0}, epoch=10.0, once=0.0)
    assert speed.of(tiny(), updates_per_epoch=3) == 14 * 10 + 3 * (9 * 1 + 4 * 2 + 1 * 4)


class TestRun:
    def test_it_is_late_saves_and_resumes_to_the_end(self, photo_folder, tmp_path, monkeypatch):
        args = arguments(photo_folder, tmp_path / 'run', {})
        run = args.output / TINY['model']
        planned = []

        def too_many(recipes, config, decoded, end):
            speed = script.measure(recipes[0], config, decoded)
            assert set(speed.update) == {32, 40, 48}
            assert min(speed.update.values()) > 0
            planned.extend(script.scale(recipe, 1000) for recipe in recipes)
            return planned

        monkeypatch.setattr(script, 'fit_to_time', too_many)
        previous = signal.getsignal(signal.SIGALRM)
        with pytest.raises(SystemExit) as left:
            script.run(args, time.monotonic() + script.RESERVE)
        assert left.value.code == 143
        state = load_checkpoint(run / 'last.pt')
        assert 0 < state['epoch'] < planned[0].epochs

        state.update(epoch=planned[0].epochs - 1, update=0)  # there is one epoch left
        torch.save(state, run / 'last.pt')
        script.run(args, time.monotonic() + 600)
        assert len(planned) == 1  # a resumed run is not timed again
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
        signal.signal(signal.SIGALRM, previous)

        last, release = run / 'last.pt', run / 'release.pt'
        assert load_checkpoint(last)['epoch'] == planned[0].epochs
        expected = release_tensors(load_checkpoint(last)['model_ema'])
        found = read_weights(release)
        assert found.recipe == read_weights(last).recipe
        assert found.commit == read_weights(last).commit
        assert {key: value.dtype for key, value in found.state_dict.items()} == {
            key: value.dtype for key, value in expected.items()}
        assert all(torch.equal(found.state_dict[key], value) for key, value in expected.items())

    def test_more_time_is_more_epochs(self, photo_folder, tmp_path, capsys):
        config = RunConfig(photo_folder, tmp_path / 'run', workers=0)
        decoded = decode_images(open_images(config, 'train').dataset, 64, 0)
        # with a learning rate as high as this one, no probe would be finite
        found = script.fit_to_time([tiny(lr=1e4)], config, decoded, time.monotonic() + 3600)
        assert found[0].epochs > 14
        assert found[0].progressive[0] == (0, 32)
        assert found[0].lr == 1e4
        assert f'Epochs: {found[0].epochs} instead of 14' in capsys.readouterr().out
        with pytest.raises(GeoPriorError, match=r'One epoch at each size takes \d+ s, and 0 s are left\. Raise --min'):
            script.fit_to_time([tiny()], config, decoded, time.monotonic())
        assert not config.output.exists()

    def test_a_control_has_the_same_epochs_also_when_it_resumes(self, photo_folder, tmp_path, monkeypatch):
        models = ['geoprior_resnet14_nano', 'resnet10t']
        args = arguments(photo_folder, tmp_path / 'run', {'model_kwargs': {}, 'model_ema': False}, model=models)
        timed = []

        def three(recipes, config, decoded, end):
            timed.append([recipe.model for recipe in recipes])
            return [script.scale(recipe, 0.01) for recipe in recipes]

        monkeypatch.setattr(script, 'fit_to_time', three)
        script.run(args, time.monotonic() + 600)
        (args.output / 'resnet10t' / 'last.pt').unlink()
        script.run(args, time.monotonic() + 600)
        assert timed == [models]
        for model in models:
            found = read_weights(args.output / model / 'release.pt')
            assert found.model_name == model
            assert found.recipe['epochs'] == 3

    @pytest.mark.parametrize('changes', [
        {'in_memory': False}, {'holdout': 2}, {'grad_accum_steps': 2}, {'torchcompile': True}])
    def test_what_it_cannot_do_is_refused(self, changes, photo_folder, tmp_path):
        (key, value), = changes.items()
        wanted = str(getattr(tiny(), key)).lower()
        with pytest.raises(GeoPriorError, match=f"'{key}' must be {wanted} here, got {str(value).lower()}. Add --set "):
            script.run(arguments(photo_folder, tmp_path / 'run', changes), time.monotonic() + 60)

    @pytest.mark.parametrize(('changes', 'words'), [
        ({'model': ['resnet10t', 'resnt10t']}, 'resnt10t'), ({'minutes': float('nan')}, '--minutes must be a number'),
        ({'device': 'cuda:99'}, 'cuda:99'), ({'device': 'foo'}, 'foo')])
    def test_nothing_is_trained_before_all_is_known(self, changes, words, photo_folder, tmp_path):
        args = arguments(photo_folder, tmp_path / 'run', {'model_kwargs': {}}, **changes)
        with pytest.raises(GeoPriorError, match=words):
            script.run(args, time.monotonic() + 60)
        assert not list(args.output.iterdir())

    def test_a_model_named_twice_is_refused(self, photo_folder, tmp_path):
        args = arguments(photo_folder, tmp_path / 'run', {}, model=['resnet10t', 'resnet10t'])
        with pytest.raises(GeoPriorError, match='--model must name each model once, got resnet10t, resnet10t'):
            script.run(args, time.monotonic() + 60)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='CUDA graphs need a GPU')
@pytest.mark.parametrize('amp', [False, True])
def test_graphs_take_the_same_steps(photo_folder, tmp_path, amp):
    recipe = tiny(epochs=3, progressive=[[0, 32], [2, 48]], mixup_off_epoch=0, warmup_epochs=0, amp=amp)
    losses = []
    for kind in (script.Trainer, script.GraphedTrainer):
        trainer = kind(recipe, RunConfig(photo_folder, tmp_path / kind.__name__, workers=0, device='cuda'))
        trainer.fit()
        losses.append([row['train_loss'] for row in trainer.history])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
