"""Runs of scripts/train.py and of the engine behind it, on real photographs."""
import contextlib
import csv
import functools
import io
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from programs import Program, run, run_ranks
from timm_geoprior import progress
from timm_geoprior.cli import main
from timm_geoprior.errors import CorruptImagesError, EvaluationError, GeoPriorError
from timm_geoprior.training import engine
from timm_geoprior.training.checkpoint import load_checkpoint, save_checkpoint
from timm_geoprior.training.engine import Trainer, train
from timm_geoprior.training.recipe import RunConfig, load_recipe, make_recipe

TIMES = ('seconds', 'images_per_second')
SCRIPT = Path(__file__).parents[1] / 'scripts' / 'train.py'
TORCHRUN = ['-m', 'torch.distributed.run']
TINY = {
    'name': 'tiny', 'model': 'geoprior_resnet14_nano', 'epochs': 3, 'batch_size': 8, 'lr': 0.05, 'img_size': 32,
    'model_kwargs': {'channels': [8, 16, 16, 16], 'value_dims': [0, 8, 8, 8], 'stem_width': 8},
    'warmup_epochs': 1, 'smoothing': 0.1, 'weight_decay': 1e-4, 'radius_lr': 0.1, 'model_ema': True,
    'model_ema_decay': 0.9, 'drop_path': 0.1, 'holdout': 2,
}

PLAIN = {'epochs': 1, 'in_memory': True, 'holdout': 0, 'model_ema': False, 'drop_path': 0, 'lr': 0.01}


def tiny(**changes):
    return make_recipe({**TINY, **changes})


def config(folder, output, **changes):
    return RunConfig(**{'data_dir': folder, 'output': output, 'workers': 0, **changes})


def command(folder: Path, output: Path, recipe: Path, *more: str) -> list[str]:
    return [str(SCRIPT), str(recipe), '--data-dir', str(folder), '--output', str(output), *more]


def turned(path: Path) -> Path:
    """Add an EXIF rotation to an image file."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(path) as image:
        image.load()
        image.save(path, exif=exif)
    return path


def counted(function, calls, name):
    def call(*args, **options):
        calls.append(name)
        return function(*args, **options)
    return call


def weights(output: Path) -> dict[str, torch.Tensor]:
    state = load_checkpoint(output / 'last.pt')
    momenta = {f'optimizer.{i}': s['momentum_buffer'] for i, s in state['optimizer']['state'].items()}
    averages = {f'ema.{name}': value for name, value in state['model_ema'].items()}
    return {**state['model'], **averages, **momenta}


def assert_same_run(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    rows = [list(csv.DictReader((run / 'summary.csv').open())) for run in (a, b)]
    for one, other in zip(*rows, strict=True):
        assert {k: v for k, v in one.items() if k not in TIMES} == {k: v for k, v in other.items() if k not in TIMES}


def at_update(condition: str, number: signal.Signals) -> str:
    """A program that runs the script named by its first argument and sends itself a signal in mid-run."""
    return (
        'import os, runpy, sys\n'
        'from timm_geoprior.training import engine\n'
        'step = engine.Trainer._step\n'
        'def interrupted(self, batches):\n'
        '    loss = step(self, batches)\n'
        f'    if {condition}: os.kill(os.getpid(), {int(number)})\n'
        '    return loss\n'
        'engine.Trainer._step = interrupted\n'
        'sys.argv = sys.argv[1:]\n'
        'runpy.run_path(sys.argv[0], run_name="__main__")\n')


@pytest.fixture(scope='module')
def recipe_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('recipe') / 'tiny.yaml'
    path.write_text(yaml.safe_dump({**TINY, 'mixup': 0.2, 'cutmix': 1.0, 'aa': 'rand-m5', 'reprob': 0.2}))
    return path


@pytest.fixture(scope='module')
def whole_run(photo_folder, recipe_file, tmp_path_factory) -> Path:
    """A run from beginning to end, on files, with workers."""
    output = tmp_path_factory.mktemp('whole') / 'run'
    run(command(photo_folder, output, recipe_file, '-j', '2'), check=True)
    return output


@pytest.fixture(scope='module')
def ddp_recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp('ddp') / 'ddp.yaml'
    path.write_text(yaml.safe_dump({
        **TINY, 'epochs': 2, 'drop_path': 0, 'in_memory': True, 'holdout': 0, 'lr': 0.01,
        'model_kwargs': {**TINY['model_kwargs'], 'norm_layer': 'groupnorm1'}}))
    return path


@pytest.fixture(scope='module')
def ddp_folder(photo_folder, tmp_path_factory):
    """Photographs about which there is something to report."""
    folder = Path(shutil.copytree(photo_folder, tmp_path_factory.mktemp('ddp') / 'photos'))
    (folder / 'train' / 'coffee' / 'notes.txt').write_text('of the journey')
    (folder / 'train' / 'rocket' / '07.jpg').write_bytes(b'no photograph')
    shutil.copy(turned(folder / 'train' / 'rocket' / '08.jpg'), folder / 'train' / 'rocket' / 'n00000001_1.jpg')
    return folder


@pytest.fixture(scope='module')
def two_processes(ddp_folder, ddp_recipe, tmp_path_factory):
    """The folder of a run, and what its two processes printed."""
    output = tmp_path_factory.mktemp('two') / 'run'
    done = run_ranks(2, command(ddp_folder, output, ddp_recipe))
    assert [process.returncode for process in done] == [0, 0], done
    return output, done


@pytest.fixture(scope='module')
def first_run(photo_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp('first') / 'run'
    train(tiny(in_memory=True, epochs=2), config(photo_folder, output))
    return output


class TestRun:
    def test_what_a_run_leaves(self, whole_run):
        rows = list(csv.DictReader((whole_run / 'summary.csv').open()))
        assert [row['epoch'] for row in rows] == ['0', '1', '2']
        assert float(rows[0]['radius.layer2.0.conv2.attn']) > 0
        results = json.loads((whole_run / 'results.json').read_text())
        assert results['epochs'] == 3
        assert results['last']['ema_top1'] == float(rows[-1]['ema_top1'])
        assert results['versions']['torch'] == metadata.version('torch')
        echoed = (whole_run / 'recipe.yaml').read_text()
        assert f'torch {metadata.version("torch")}' in echoed.splitlines()[0]
        assert make_recipe(yaml.safe_load(echoed)).mixup == 0.2
        state = load_checkpoint(whole_run / 'best.pt')
        assert state['class_names'] == ['astronaut', 'chelsea', 'coffee', 'rocket']
        assert not {'optimizer', 'scaler'} & state.keys()  # only weights, a third of a checkpoint to resume from
        assert {path.name for path in whole_run.glob('*.png')} == {'curves.png', 'radii.png'}
        events = EventAccumulator(str(whole_run / 'tensorboard')).Reload()
        for key in ('train_loss', 'ema_top1', 'lr', 'images_per_second', 'radius.layer2.0.conv2.attn'):
            logged = [(event.step, event.value) for event in events.Scalars(key.replace('.', '/', 1))]
            assert logged == [(int(row['epoch']), pytest.approx(float(row[key]))) for row in rows]
        assert {path.name for path in whole_run.iterdir()} == {
            'last.pt', 'best.pt', 'recipe.yaml', 'summary.csv', 'tensorboard', 'results.json', 'curves.png',
            'radii.png'}

    def test_it_learns(self, photo_folder, tmp_path):
        """Four photographs are told apart after a few epochs in memory, as measured on held-out images."""
        recipe = tiny(epochs=12, in_memory=True, lr=0.1, smoothing=0, drop_path=0, model_ema=False, scale=[0.6, 1])
        results = train(recipe, config(photo_folder, tmp_path / 'run'))
        assert results['best'] >= 75
        assert results['last']['train_loss'] < 1.2  # chance is ln 4 = 1.39

    def test_progressive_sizes(self, photo_folder, tmp_path):
        recipe = tiny(progressive=[[0, 32], [1, 40], [2, 48]], img_size=48, in_memory=True)
        train(recipe, config(photo_folder, tmp_path / 'run'))
        rows = csv.DictReader((tmp_path / 'run/summary.csv').open())
        assert [row['img_size'] for row in rows] == ['32', '40', '48']

    @pytest.mark.parametrize(('changes', 'tolerance'), [
        ({'channels_last': True}, 1e-4), ({'amp': True}, 0.03), ({'amp': True, 'amp_dtype': 'float16'}, 0.03),
        ({'torchcompile': True, 'model': 'test_resnet', 'model_kwargs': {}}, 0)])
    def test_every_engine_has_the_loss_of_plain_float32(self, changes, tolerance, photo_folder, tmp_path, monkeypatch):
        if 'torchcompile' in changes:  # traced, without the minute that generating kernels takes
            monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='eager'))
        seen = []
        def note(module, inputs, output):
            seen.append((output.dtype, inputs[0].is_contiguous(memory_format=torch.channels_last)))
        losses, weights = [], []
        network = {key: value for key, value in changes.items() if key.startswith('model')}
        for number, recipe in enumerate((network, changes)):
            trainer = Trainer(tiny(**PLAIN, **recipe), config(photo_folder, tmp_path / str(number), val_split='val'))
            trainer.model.layer2.register_forward_hook(note)
            losses.append(trainer.fit()['last']['train_loss'])
            weights.append(torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()]))
        assert losses[0] == pytest.approx(losses[1], rel=tolerance)
        # a loss is one number, which two engines may round alike
        assert torch.equal(*weights) == ('torchcompile' in changes)
        dtype = getattr(torch, changes.get('amp_dtype', 'bfloat16')) if 'amp' in changes else torch.float32
        assert seen[0] == (torch.float32, False)
        assert seen[-1] == (dtype, 'channels_last' in changes)
        assert bool(trainer.state()['scaler']) == (dtype == torch.float16)
        assert ('OptimizedModule' in type(trainer.network).__name__) == ('torchcompile' in changes)

    def test_the_progress_bar(self, photo_folder, tmp_path, monkeypatch):
        terminal = io.StringIO()
        terminal.isatty = lambda: True
        monkeypatch.setattr(sys, 'stderr', terminal)
        every_step = {'mininterval': 0, 'miniters': 1}
        monkeypatch.setattr(progress, 'tqdm', lambda **options: tqdm(**{**options, **every_step}))
        train(tiny(epochs=1, in_memory=True), config(photo_folder, tmp_path / 'run'))
        assert re.search(r'epoch 1/1: +\d+%.*/40 \[\d\d:\d\d<\d\d:\d\d, .*images/s, loss \d', terminal.getvalue())

    def test_progress_in_a_log_file(self, photo_folder, tmp_path, monkeypatch):
        """No bar: a line each minute, here for each update, and one for each epoch."""
        monkeypatch.setattr(progress, 'LOG_SECONDS', 0)
        said = []
        train(tiny(epochs=2, in_memory=True), config(photo_folder, tmp_path / 'run', tell=said.append))
        lines = [line for line in said if line.startswith('epoch 1/2: ')]
        assert len(lines) == 5
        assert re.fullmatch(r'epoch 1/2: 24 of 40 images, loss \d\.\d{3}, [\d,]+ images/s', lines[2])
        assert re.fullmatch(
            r'epoch 2: training loss \d\.\d{3}, held-out top-1 \d+\.\d\d%( \(best\))?, [\d,]+ images/s', said[-1])

    def test_accumulation_is_the_same_update(self, photo_folder, tmp_path):
        """Two halves of a batch equal the whole batch if no norm depends on the batch."""
        for steps in (1, 2):
            recipe = tiny(epochs=1, grad_accum_steps=steps, drop_path=0, in_memory=True, lr=1e-3,
                          model_kwargs={**TINY['model_kwargs'], 'norm_layer': 'groupnorm1'})
            train(recipe, config(photo_folder, tmp_path / str(steps)))
        one, two = (weights(tmp_path / str(steps)) for steps in (1, 2))
        for name in one:
            torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4)


    def test_mixup_ends_when_the_recipe_says(self, photo_folder, tmp_path):
        trainer = Trainer(tiny(in_memory=True, mixup=0.2, mixup_off_epoch=2), config(photo_folder, tmp_path / 'run'))
        batch = torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.int64)
        shapes = []
        for trainer.epoch in range(3):
            shapes.append(trainer._augment(*batch)[1].shape)
        assert shapes == [(8, 4), (8, 4), (8,)]

    def test_gradients_are_clipped(self, photo_folder, tmp_path):
        """Plain SGD with learning rate 1 moves the weights by the gradient, whose norm is clipped."""
        trainer = Trainer(
            tiny(in_memory=True, opt='momentum', momentum=0, lr=1, warmup_epochs=0, weight_decay=0, radius_lr=1,
                 clip_grad=0.01),
            config(photo_folder, tmp_path / 'run'))
        before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        trainer._step(trainer.data.train.epoch(0, 32))
        moved = [after.detach() - was for after, was in zip(trainer.model.parameters(), before, strict=True)]
        assert torch.cat([part.flatten() for part in moved]).norm() == pytest.approx(0.01, rel=1e-3)

    def test_the_moving_average(self, photo_folder, tmp_path):
        trainer = Trainer(tiny(in_memory=True, model_ema_decay=0.75), config(photo_folder, tmp_path / 'run'))
        batches, expected = trainer.data.train.epoch(0, 32), torch.zeros(())
        for trainer.update in range(4):  # timm's average begins with the weights of the second step
            trainer._step(batches)
            old = 0 if trainer.update < 2 else 0.75
            expected = old * expected + (1 - old) * trainer.model.fc.weight.detach()
        torch.testing.assert_close(trainer.ema.module.fc.weight, expected)

    def test_repeated_augmentation_and_workers_arrive(self, photo_folder, tmp_path):
        recipe = tiny(aug_repeats=2, hflip=0, scale=[0.2, 0.3])
        images, targets = next(Trainer(recipe, config(photo_folder, tmp_path / 'run')).data.train.epoch(0, 32))
        assert (targets[::2] == targets[1::2]).all()
        assert not torch.equal(images[0], images[1])


class TestResume:
    @pytest.mark.parametrize('updates', [1, 6, 12])
    def test_killed_anywhere_the_run_ends_with_the_same_bits(
            self, whole_run, photo_folder, recipe_file, tmp_path, updates):
        """SIGKILL from inside, right after a step: no handler runs, and workers are busy."""
        killer = at_update(f'self.epoch * self.updates_per_epoch + self.update == {updates}', signal.SIGKILL)
        output = tmp_path / 'run'
        arguments = command(photo_folder, output, recipe_file, '-j', '2', '--save-every', '2')
        killed = run(['-c', killer, *arguments])
        assert killed.returncode == -signal.SIGKILL
        assert (output / 'recipe.yaml').read_text() == (whole_run / 'recipe.yaml').read_text()
        more = ['--resume'] if (output / 'last.pt').exists() else []
        run([*arguments, *more], check=True)
        assert_same_run(whole_run, output)

    @pytest.mark.parametrize(('number', 'code'), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_asked_to_stop_it_saves_and_leaves(self, whole_run, photo_folder, recipe_file, tmp_path, number, code):
        """The signal goes to the whole process group, including workers, as SLURM, systemd and a terminal send it."""
        output = tmp_path / 'run'
        arguments = command(photo_folder, output, recipe_file, '-j', '2')
        stopper = at_update('self.update == 2', number).replace('os.kill(os.getpid(), ', 'os.killpg(os.getpgrp(), ')
        stopped = run(['-c', stopper, *arguments], start_new_session=True)
        assert stopped.returncode == code
        assert 'Traceback' not in stopped.stderr
        at_once, _, at_the_end = stopped.stderr.partition(
            f'{number.name}: stopping as soon as a checkpoint is saved.\n')
        assert 'Saved' not in at_once
        saved, resume = at_the_end.strip().split('. Resume with: ')
        assert saved == f'Saved {output / "last.pt"}'
        assert load_checkpoint(output / 'last.pt')['update'] == 3
        program, *words = shlex.split(resume)
        assert (program, words[-1]) == ('python', '--resume')
        run(words, check=True)
        assert_same_run(whole_run, output)

    @pytest.mark.parametrize('name', ['train', 'compare', 'transfer'])
    def test_ctrl_c_while_images_are_read(self, photo_folder, tmp_path, name):
        """No run has begun that could be saved: the script exits silently, without a traceback."""
        script = SCRIPT if name == 'train' else SCRIPT.parent / 'experiments' / f'{name}.py'
        stopper = (
            'import os, runpy, signal, sys\n'
            'from torch.utils import data\n'
            'data.DataLoader.__iter__ = lambda loader: os.kill(os.getpid(), signal.SIGINT)\n'
            f'sys.argv[0] = {str(script)!r}\n'
            'sys.path.insert(0, os.path.dirname(sys.argv[0]))\n'
            'runpy.run_path(sys.argv[0], run_name="__main__")\n')
        source = 'geoprior_resnet14_nano' if name == 'transfer' else 'r64_tin200'
        more = {'train': [], 'compare': ['--set', 'holdout=2', '--variant', 'a: {}', '--variant', 'b: {lr: 0.1}'],
                'transfer': []}[name]
        stopped = run(['-c', stopper, source, '--data-dir', photo_folder, '--output', tmp_path / 'out', *more])
        assert stopped.returncode == 130, stopped.stderr
        assert 'Traceback' not in stopped.stderr

    def test_asked_to_stop_while_the_last_epoch_is_measured(self, photo_folder, tmp_path, monkeypatch):
        """It exits with the signal's code; only the results remain to be written."""
        end = Trainer._end_epoch

        def stopped(trainer):
            end(trainer)
            if trainer.epoch == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Trainer, '_end_epoch', stopped)
        recipe, place = tiny(in_memory=True, epochs=2), config(photo_folder, tmp_path / 'run')
        with pytest.raises(SystemExit) as left:
            train(recipe, place)
        assert left.value.code == 143
        assert not (place.output / 'results.json').exists()
        assert train(recipe, replace(place, resume=True))['epochs'] == 2
        assert (place.output / 'results.json').exists()

    def test_another_recipe_or_seed_is_refused(self, whole_run, photo_folder, recipe_file):
        recipe = make_recipe(yaml.safe_load(recipe_file.read_text()))
        changed = make_recipe({**recipe.to_dict(), 'lr': 0.3})
        with pytest.raises(GeoPriorError, match='was trained with lr = 0.05, this run has 0.3'):
            Trainer(changed, config(photo_folder, whole_run, resume=True))
        with pytest.raises(GeoPriorError, match='was trained with seed 0, this run has 5. Add --seed 0'):
            Trainer(recipe, config(photo_folder, whole_run, resume=True, seed=5))

    def test_other_data_or_another_checkpoint_is_refused(self, whole_run, photo_folder, recipe_file, tmp_path):
        recipe = make_recipe(yaml.safe_load(recipe_file.read_text()))
        shutil.copytree(photo_folder, tmp_path / 'data')
        (tmp_path / 'data/train/rocket').rename(tmp_path / 'data/train/robot')
        with pytest.raises(GeoPriorError, match=r'trained on 4 classes that differ from the 4 in .*data\. Check'):
            Trainer(recipe, config(tmp_path / 'data', whole_run, resume=True))
        (tmp_path / 'run').mkdir()
        torch.save({'model': {}}, tmp_path / 'run' / 'last.pt')
        with pytest.raises(GeoPriorError, match='must be a checkpoint of this .*, got one without best, class_names, '):
            Trainer(recipe, config(photo_folder, tmp_path / 'run', resume=True))

    def test_a_run_is_not_overwritten(self, whole_run, photo_folder):
        with pytest.raises(GeoPriorError, match='already holds a run. Add --resume'):
            Trainer(tiny(), config(photo_folder, whole_run))

    def test_other_images_are_refused(self, whole_run, photo_folder, recipe_file, tmp_path):
        """One more changes what is held out; a renamed one might now be held out."""
        recipe = make_recipe(yaml.safe_load(recipe_file.read_text()))
        state = load_checkpoint(whole_run / 'last.pt')
        assert len(state['held_names']) == 8
        for number, change in enumerate((
                lambda path: shutil.copy(path, path.with_name('99.jpg')), lambda path: path.unlink(),
                lambda path: path.rename(path.with_name('99.jpg')))):
            data = Path(shutil.copytree(photo_folder, tmp_path / str(number)))
            change(data / 'train' / state['held_names'][0])
            with pytest.raises(GeoPriorError, match=r'last\.pt was trained or measured on other images than those in'):
                Trainer(recipe, config(data, whole_run, resume=True))

    def test_other_validation_images_are_refused(self, photo_folder, tmp_path):
        data, options = Path(shutil.copytree(photo_folder, tmp_path / 'data')), {'val_split': 'val'}
        Trainer(tiny(holdout=0), config(data, tmp_path / 'run', **options)).fit()
        Trainer(tiny(holdout=0), config(data, tmp_path / 'run', **options, resume=True))
        Trainer(tiny(holdout=0), config(data, tmp_path / 'bare')).fit()
        Trainer(tiny(holdout=0), config(data, tmp_path / 'bare', **options, resume=True))  # measured from now on
        shutil.copy(data / 'val/coffee/00.jpg', data / 'val/coffee/99.jpg')
        with pytest.raises(GeoPriorError, match=r'last\.pt was trained or measured on other images than those in'):
            Trainer(tiny(holdout=0), config(data, tmp_path / 'run', **options, resume=True))

    def test_another_val_split_is_told_as_such(self, photo_folder, tmp_path):
        Trainer(tiny(holdout=0), config(photo_folder, tmp_path / 'run', val_split='val')).fit()
        with pytest.raises(GeoPriorError, match='was measured on 20 images, and this run would measure none. Add the'):
            Trainer(tiny(holdout=0), config(photo_folder, tmp_path / 'run', resume=True))

    @pytest.mark.parametrize('place', ['train', 'train/coffee/run', 'val', 'test/run', 'mine/run'])
    def test_an_output_among_the_images(self, photo_folder, tmp_path, place):
        data = Path(shutil.copytree(photo_folder, tmp_path / 'data'))
        (data / 'test').mkdir()
        (data / 'mine').mkdir()
        before = sorted(data.rglob('*'))
        with pytest.raises(GeoPriorError, match='The output must lie outside the folders of the images'):
            Trainer(tiny(), config(data, data / place, val_split='mine'))
        assert sorted(data.rglob('*')) == before
        Trainer(tiny(), config(data, data / 'run'))  # a folder next to the splits is none of them

    def test_an_output_whose_name_is_not_utf_8(self, photo_folder, tmp_path):
        output = tmp_path / os.fsdecode(b'caf\xe9')
        with pytest.raises(GeoPriorError, match='must be UTF-8, since TensorBoard cannot write to any other'):
            Trainer(tiny(), config(photo_folder, output))
        assert not list(tmp_path.iterdir())

    def test_nothing_to_resume(self, photo_folder, tmp_path):
        with pytest.raises(GeoPriorError, match='There is no checkpoint'):
            Trainer(tiny(), config(photo_folder, tmp_path / 'new', resume=True))
        assert not (tmp_path / 'new').exists()


class TestProcesses:
    def test_two_processes_train_as_one(self, ddp_folder, ddp_recipe, two_processes, tmp_path):
        """The same global batches give the same loss curve, to 1e-4, with a norm that does not depend on the batch."""
        train(load_recipe(ddp_recipe), config(ddp_folder, tmp_path / 'one'))
        losses = [[float(row['train_loss']) for row in csv.DictReader((output / 'summary.csv').open())]
                  for output in (tmp_path / 'one', two_processes[0])]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    def test_one_of_two_processes_speaks(self, two_processes):
        first, second = two_processes[1]
        assert json.loads(first.stdout).keys() == {'last', 'best', 'hours'}
        for words in ('without an image extension: .txt', '07.jpg cannot be read',
                      "1 of ILSVRC's files state a rotation", 'No images are held out'):
            assert first.stderr.count(words) == 1, first.stderr
        assert (second.stdout, second.stderr) == ('', '')

    @pytest.mark.parametrize(('arguments', 'words'), [
        (['--set', 'batch_size=7'], 'batch_size must be a multiple of 2 processes'),
        # what only the first process looks at
        ([], '{} already holds a run'),
        (['--resume'], '{}/last.pt must be a checkpoint of this version of train'),
    ])
    def test_one_of_two_processes_tells_their_common_fault(self, photo_folder, ddp_recipe, tmp_path, arguments, words):
        if '{}' in words:
            save_checkpoint({'model': {}}, tmp_path / 'last.pt')
        first, second = run_ranks(2, command(photo_folder, tmp_path, ddp_recipe, *arguments))
        assert (first.returncode, second.returncode) == (1, 1)
        assert first.stderr.splitlines()[-1].startswith(f'train.py: {words.format(tmp_path)}')
        assert ('Traceback' in first.stderr, second.stderr) == (False, '')

    def test_a_name_that_only_the_first_process_tries_is_told_too(self, photo_folder, ddp_recipe, tmp_path):
        for done in run_ranks(2, command(photo_folder, tmp_path / ('x' * 300), ddp_recipe)):
            assert (done.returncode, 'Traceback' in done.stderr) == (1, False)
            assert 'A file name must be shorter' in done.stderr

    def test_a_killed_process_comes_back(self, ddp_folder, ddp_recipe, two_processes, tmp_path):
        """The second process is killed in the second epoch; `torchrun --max-restarts` restarts both."""
        mark, output, script = tmp_path / 'was_killed', tmp_path / 'run', tmp_path / 'killed.py'
        script.write_text(at_update(
            'os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and self.epoch == 1'
            f' and open({str(mark)!r}, "w")', signal.SIGKILL))
        arguments = command(ddp_folder, output, ddp_recipe, '--save-every', '2')
        done = run([*TORCHRUN, '--standalone', '--nproc-per-node=2', '--max-restarts=1', str(script), *arguments],
                   env={**os.environ, 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'})
        assert done.returncode == 0, done.stderr
        assert mark.exists()
        assert_same_run(two_processes[0], output)

    def test_a_signal_to_one_process_stops_both_at_the_same_step(self, photo_folder, ddp_recipe, tmp_path):
        """With norms that depend on the batch, every process measures with the statistics that the first one saves."""
        output, script = tmp_path / 'run', tmp_path / 'stopped.py'
        script.write_text(at_update(
            'os.environ["RANK"] == "1" and (self.epoch, self.update) == (1, 2)', signal.SIGTERM).replace(
            'sys.argv =', f"""measure = engine.Trainer._measure
def saving(self):
    measured = measure(self)
    torch.save(dict(self.model.named_buffers(), **dict(self.ema.module.named_buffers(prefix='ema'))),
               f'{tmp_path}/{{self.rank}}.pt')
    return measured
engine.Trainer._measure = saving
sys.argv =""", 1).replace('import os', 'import torch, os', 1))
        arguments = command(photo_folder, output, ddp_recipe, '--val-split', 'val', '--set', 'model_kwargs='
                            + json.dumps(TINY['model_kwargs']))
        done = run_ranks(2, [str(script), *arguments])
        assert [process.returncode for process in done] == [143, 143], done
        assert load_checkpoint(output / 'last.pt')['update'] == 4
        first, second = (torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1))
        assert all(torch.equal(first[name], second[name]) for name in first if 'running' in name)
        assert any('running' in name for name in first)

    def test_two_machines_train_as_one(self, ddp_folder, ddp_recipe, two_processes, tmp_path):
        """Two torchruns that meet on the loopback; only the first process's machine writes the run's folder."""
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        with contextlib.ExitStack() as stack:
            machines = [stack.enter_context(Program(
                [*TORCHRUN, '--nnodes=2', '--nproc-per-node=1', '--rdzv-backend=c10d',
                 f'--rdzv-endpoint=127.0.0.1:{port}', '--local-addr=127.0.0.1',
                 *command(ddp_folder, tmp_path / str(number), ddp_recipe)])) for number in (0, 1)]
            assert [machine.wait() for machine in machines] == [0, 0]
        written, = (tmp_path / number for number in '01' if (tmp_path / number).exists())
        assert_same_run(two_processes[0], written)

    def test_a_batch_that_does_not_divide(self, photo_folder, tmp_path):
        with pytest.raises(GeoPriorError, match='must be a multiple of 1 processes times 3 accumulation steps, got 8'):
            Trainer(tiny(grad_accum_steps=3), config(photo_folder, tmp_path))

    def test_mixup_of_an_odd_batch(self, photo_folder, tmp_path):
        with pytest.raises(GeoPriorError, match='an even number of images for mixup and cutmix, got 7, which gives 7'):
            Trainer(tiny(batch_size=7, mixup=0.2), config(photo_folder, tmp_path))

    def test_batches_of_one_image(self, photo_folder, tmp_path):
        """If the last map has one cell, there is no variance; if it has four, there is."""
        network = {'model_kwargs': {'channels': [8, 16, 16, 16], 'value_dims': [0, 0, 0, 0], 'stem_width': 8}}
        for batch, steps in ((1, 1), (2, 2)):
            with pytest.raises(GeoPriorError, match=r'at least 2 images at 16 px, got 1, for which .*Raise batch_size'):
                Trainer(tiny(batch_size=batch, grad_accum_steps=steps, img_size=16, **network),
                        config(photo_folder, tmp_path))
        Trainer(tiny(batch_size=1, img_size=64), config(photo_folder, tmp_path / 'larger'))

    def test_fewer_images_than_a_batch(self, photo_folder, tmp_path):
        with pytest.raises(GeoPriorError, match='fewer training images than one batch of 64'):
            Trainer(tiny(batch_size=64), config(photo_folder, tmp_path))


class TestStartingPoint:
    def test_finetuning_starts_from_a_checkpoint_with_a_new_head(self, photo_folder, first_run, tmp_path):
        root = tmp_path / 'two'
        for name in ('coffee', 'rocket'):
            shutil.copytree(photo_folder / 'train' / name, root / 'train' / name)
        trainer = Trainer(
            tiny(in_memory=True), config(root, tmp_path / 'run', finetune=str(first_run / 'last.pt')))
        start = trainer.model.state_dict()
        source = load_checkpoint(first_run / 'last.pt')['model_ema']
        assert start['fc.weight'].shape[0] == 2
        assert all(torch.equal(start[name], source[name]) for name in source if not name.startswith('fc.'))
        assert trainer.fit()['epochs'] == 3

    @pytest.mark.parametrize('kind', ['pretrained', 'timm', 'safetensors'])
    def test_finetuning_starts_from_any_weights(self, kind, photo_folder, tmp_path, monkeypatch):
        (tmp_path / 'pretrained').mkdir()  # must not be mistaken for the keyword
        monkeypatch.chdir(tmp_path)
        path = tmp_path / f'weights.{"safetensors" if kind == "safetensors" else "pth"}'
        source = timm.create_model('geoprior_resnet14_nano', pretrained=kind == 'pretrained').state_dict()
        if kind == 'timm':
            torch.save({'state_dict': {f'module.{name}': value for name, value in source.items()}}, path)
        elif kind == 'safetensors':
            save_file(source, path)
        trainer = Trainer(
            tiny(in_memory=True, model_kwargs={}),
            config(photo_folder, tmp_path / 'run', finetune='pretrained' if kind == 'pretrained' else str(path)))
        start = trainer.model.state_dict()
        assert start['fc.weight'].shape[0] == 4
        assert all(torch.equal(start[name], source[name]) for name in source if not name.startswith('fc.'))

    @pytest.mark.parametrize(('changes', 'finetune', 'message'), [
        ({}, 'no.pt', 'no.pt does not exist'),
        ({}, str(SCRIPT), r'cannot be read as a checkpoint \([^.]*\)\. It is damaged'),
        ({'model': 'test_resnet', 'model_kwargs': {}}, 'bare.pt', '--finetune .*bare.pt cannot be loaded'),
    ])
    def test_weights_that_cannot_be_had(self, changes, finetune, message, photo_folder, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        torch.save({'x': torch.ones(1)}, 'bare.pt')
        with pytest.raises(GeoPriorError, match=message):
            Trainer(tiny(**changes), config(photo_folder, tmp_path / 'run', finetune=finetune))

    def test_a_teacher_of_other_classes_is_refused(self, photo_folder, tmp_path):
        """timm would give it a new, random head."""
        recipe = tiny(in_memory=True, teacher='geoprior_resnet14_nano')
        with pytest.raises(GeoPriorError, match='must know the 4 classes of the images, got weights for 200'):
            Trainer(recipe, config(photo_folder, tmp_path / 'run'))

    def test_a_teacher_has_the_averaged_weights(self, photo_folder, first_run, tmp_path):
        recipe = tiny(in_memory=True, teacher='test_resnet', teacher_path=str(tmp_path / 'teacher.pt'))
        weights = timm.create_model('test_resnet', num_classes=4).state_dict()
        torch.save({'model': {name: 0 * value for name, value in weights.items()}, 'model_ema': weights},
                   tmp_path / 'teacher.pt')
        told: list[str] = []
        trainer = Trainer(recipe, config(photo_folder, tmp_path / 'run', tell=told.append))
        assert f'{tmp_path}/teacher.pt: the averaged weights are used; it holds raw ones too.' in told
        teacher = trainer.task.teacher.model.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in teacher.items())

    def test_distillation_from_a_checkpoint(self, photo_folder, first_run, tmp_path):
        teacher = {'teacher': 'geoprior_resnet14_nano', 'teacher_path': str(tmp_path / 'teacher.pt')}
        torch.save(timm.create_model('geoprior_resnet14_nano', num_classes=4).state_dict(), tmp_path / 'teacher.pt')
        trainer = Trainer(
            tiny(in_memory=True, distill_alpha=1.0, distill_temperature=2.0, **teacher),
            config(photo_folder, tmp_path / 'run'))
        images, targets = torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64)
        assert not any(parameter.requires_grad for parameter in trainer.task.teacher.parameters())
        found = trainer.task(images, targets)
        expected = trainer.task.teacher(images).detach()
        divergence = torch.nn.functional.kl_div(
            (found['output'].detach() / 2).log_softmax(1), (expected / 2).softmax(1), reduction='batchmean')
        assert found['loss'].item() == pytest.approx(4 * divergence.item(), rel=1e-4)
        assert trainer.fit()['last']['train_loss'] > 0

    @pytest.mark.parametrize('alpha', [1.0, 0.5])
    def test_the_share_of_the_teacher(self, alpha, photo_folder, tmp_path):
        """If it is 1, the labels make no difference."""
        losses, path = [], tmp_path / 'teacher.pt'
        torch.save(timm.create_model('test_resnet', num_classes=4).state_dict(), path)
        for label in (0, 1):
            trainer = Trainer(
                tiny(in_memory=True, teacher='test_resnet', teacher_path=str(path), distill_alpha=alpha, drop_path=0),
                config(photo_folder, tmp_path / 'run'))
            torch.manual_seed(0)
            trainer._step(iter([(torch.randn(8, 3, 32, 32), torch.full((8,), label))]))
            losses.append(trainer.loss_sum.item())
        assert (losses[0] == losses[1]) == (alpha == 1)


class TestData:
    @pytest.mark.parametrize('in_memory', [False, True])
    def test_measured_classes_are_the_training_ones_by_name(self, in_memory, photo_folder, tmp_path):
        """ILSVRC's validation images as they are downloaded, without class folders, of two of three classes."""
        for wnid, name in (('n01440764', 'chelsea'), ('n02102040', 'coffee'), ('n02979186', 'rocket')):
            shutil.copytree(photo_folder / 'train' / name, tmp_path / 'train' / wnid)
        (tmp_path / 'val').mkdir()
        for number, name in ((557, 'rocket'), (665, 'coffee')):
            shutil.copy(photo_folder / f'val/{name}/00.jpg', tmp_path / f'val/ILSVRC2012_val_{number:08}.JPEG')
        data = Trainer(tiny(in_memory=in_memory, holdout=0), config(tmp_path, tmp_path / 'run', val_split='val')).data
        (images, targets), = data.held_out()
        assert targets.tolist() == [2, 1]
        assert images.shape == (2, 3, 32, 32)

    @pytest.mark.parametrize(('changes', 'message'), [
        ({'data_dir': Path('nowhere')}, 'nowhere must be a folder with a folder train in it'),
        ({'train_split': 'tain'}, 'must have a folder of the split tain, got train, val only'),
        ({'val_split': 'test'}, 'must have a folder of the split test, got none. Check --val-split, or set holdout'),
        ({'val_split': 'more'}, 'split more must be among those of train, got 1 others, such as dog'),
    ])
    def test_what_is_no_training_set(self, changes, message, photo_folder, tmp_path):
        shutil.copytree(photo_folder, tmp_path / 'data')
        shutil.copytree(photo_folder / 'val' / 'coffee', tmp_path / 'data' / 'more' / 'dog')
        if 'train_split' in changes:
            shutil.rmtree(tmp_path / 'data' / 'more')
        with pytest.raises(GeoPriorError, match=message):
            Trainer(tiny(holdout=0), config(**{'folder': tmp_path / 'data', 'output': tmp_path / 'run', **changes}))

    def test_the_archive_of_validation_images_is_no_other_split(self, photo_folder, tmp_path):
        data = Path(shutil.copytree(photo_folder / 'train', tmp_path / 'data'))
        (data / 'ILSVRC2012_img_val.tar').touch()
        with pytest.raises(GeoPriorError, match='must have a folder of the split vla, got none'):
            Trainer(tiny(holdout=0), config(data, tmp_path / 'run', val_split='vla'))

    def test_what_cannot_be_read_in_memory_takes_no_part(self, photo_folder, tmp_path):
        shutil.copytree(photo_folder, tmp_path / 'data')
        for name in ('train/coffee/01.jpg', 'val/rocket/04.jpg'):
            (tmp_path / 'data' / name).write_bytes(b'no photograph')
        said = []
        data = Trainer(tiny(holdout=0, in_memory=True),
                       config(tmp_path / 'data', tmp_path / 'run', val_split='val', tell=said.append)).data
        assert said == [f'{name} cannot be read as an image and is skipped.'
                        for name in ('coffee/01.jpg', 'rocket/04.jpg')]
        assert data.train.data.targets.bincount().tolist() == [12, 12, 11, 12]
        assert torch.cat([targets for _, targets in data.held_out()]).bincount().tolist() == [5, 5, 5, 4]
        data = Trainer(tiny(holdout=3, in_memory=True),
                       config(tmp_path / 'data', tmp_path / 'again', tell=said.append)).data
        assert said[2:] == said[:1]
        trained, measured = data.train.data.targets, torch.cat([targets for _, targets in data.held_out()])
        assert (torch.cat([trained, measured]).bincount().tolist()) == [12, 12, 11, 12]

    def test_what_cannot_be_read_is_not_measured(self, photo_folder, tmp_path):
        shutil.copytree(photo_folder, tmp_path / 'data')
        for name in ('coffee/01.jpg', 'rocket/04.jpg'):
            (tmp_path / 'data/val' / name).write_bytes(b'no photograph')
        said = []
        options = {'folder': tmp_path / 'data', 'output': tmp_path / 'run', 'val_split': 'val', 'tell': said.append}
        held_out = Trainer(tiny(holdout=0), config(**options)).data.held_out
        (images, targets), = held_out()
        assert sorted(said) == [f'{name} cannot be read as an image and is skipped.'
                                for name in ('coffee/01.jpg', 'rocket/04.jpg')]
        assert (len(images), targets.bincount().tolist()) == (18, [5, 5, 4, 4])
        with pytest.raises(CorruptImagesError, match='The number of unreadable images must be at most 1, got 2'):
            list(Trainer(tiny(holdout=0), config(**options, max_corrupt=1)).data.held_out())

    def test_nothing_can_be_measured(self, photo_folder, tmp_path):
        shutil.copytree(photo_folder / 'train', tmp_path / 'data/train')
        (tmp_path / 'data/val/coffee').mkdir(parents=True)
        (tmp_path / 'data/val/coffee/00.jpg').write_bytes(b'no photograph')
        with pytest.raises(GeoPriorError, match='None of the held-out images can be read'):
            train(tiny(holdout=0, epochs=1), config(tmp_path / 'data', tmp_path / 'run', val_split='val'))

    def test_more_held_out_than_there_is(self, photo_folder, tmp_path):
        with pytest.raises(GeoPriorError, match='Class 0 must have more than 12 images to hold out 12, got 12'):
            Trainer(tiny(holdout=12), config(photo_folder, tmp_path / 'run'))


class TestFaults:
    def test_a_skipped_step_leaves_no_trace(self, photo_folder, tmp_path):
        trainer = Trainer(tiny(in_memory=True), config(photo_folder, tmp_path / 'run'))
        before = {name: value.clone() for name, value in trainer.state()['model'].items()}
        trainer.model.train()
        trainer._step(iter([(torch.full((8, 3, 32, 32), torch.inf), torch.zeros(8, dtype=torch.int64))]))
        assert trainer.skipped == 1
        assert all(torch.equal(value, before[name]) for name, value in trainer.state()['model'].items())
        assert trainer.loss_sum == 0

    def test_the_training_loss_is_that_of_the_updates_that_count(self, photo_folder, tmp_path, monkeypatch):
        """Wherever in an epoch an update was skipped."""
        told = []
        for number, bad in enumerate(((), (0, 1), (4,))):
            trainer = Trainer(tiny(**PLAIN), config(photo_folder, tmp_path / str(number)))
            answers = iter(range(trainer.updates_per_epoch))
            monkeypatch.setattr(
                engine._Answer, '__init__', lambda answer, facts: setattr(answer, 'mean', torch.full_like(facts[0], 2)))
            monkeypatch.setattr(
                engine._Answer, 'wait', lambda answer, answers=answers, bad=bad: (next(answers) not in bad, 0))
            assert trainer.updates_per_epoch == 6
            told.append(trainer.fit()['last']['train_loss'])
        assert told == [2, 2, 2]

    def test_an_epoch_without_any_finite_loss_stops_the_run(self, photo_folder, tmp_path, monkeypatch):
        monkeypatch.setattr(engine._Answer, 'wait', lambda answer: (False, 0))
        with pytest.raises(GeoPriorError, match='The loss was not finite for any step of epoch 1, up to step'):
            train(tiny(in_memory=True, max_skipped_steps=100), config(photo_folder, tmp_path / 'run'))

    def test_an_update_asks_the_device_once(self, photo_folder, tmp_path, monkeypatch):
        """For the loss and a signal together, before the last backward pass; buffers are copied together too."""
        trainer = Trainer(tiny(in_memory=True, grad_accum_steps=2), config(photo_folder, tmp_path / 'run'))
        order, clones = [], []
        monkeypatch.setattr(torch.Tensor, 'item', lambda tensor: order.append('item'))
        monkeypatch.setattr(torch.Tensor, 'backward', counted(torch.Tensor.backward, order, 'backward'))
        monkeypatch.setattr(engine._Answer, '__init__', counted(engine._Answer.__init__, order, 'asked'))
        monkeypatch.setattr(engine._Answer, 'wait', counted(engine._Answer.wait, order, 'answered'))
        buffers = {id(buffer) for buffer in trainer.model.buffers()}
        clone = torch.Tensor.clone
        monkeypatch.setattr(torch.Tensor, 'clone', lambda tensor, **options: (
            clones.append(id(tensor)), clone(tensor, **options))[1])
        trainer.model.train()
        trainer._step(trainer.data.train.epoch(0, 32))
        assert order == ['backward', 'asked', 'backward', 'answered']
        assert not buffers & set(clones)

    def test_too_little_memory_is_one_sentence(self, photo_folder, recipe_file, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(Trainer, '_step', lambda self, data: torch.empty(2 ** 60, dtype=torch.uint8))
        arguments = command(photo_folder, tmp_path / 'run', recipe_file)
        assert main(['train', *arguments[1:]]) == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith(
            'timm-geoprior train: There is not enough memory. Use a smaller batch_size')

    def test_a_loss_that_is_not_finite_stops_the_run(self, photo_folder, tmp_path):
        recipe = tiny(lr=1e30, warmup_epochs=0, max_skipped_steps=3, epochs=20, in_memory=True)
        for number, (every, good) in enumerate(((1, r'the last good checkpoint is \S*last\.pt'), (99, 'there is no'))):
            expected = rf'not finite for 3 steps in a row, up to step \d+ with a learning rate of \S+e\+\d+; {good}'
            with pytest.raises(GeoPriorError, match=expected):
                train(recipe, config(photo_folder, tmp_path / str(number), save_every=every))
        saved = load_checkpoint(tmp_path / '0' / 'last.pt')['model']
        assert all(value.isfinite().all() for value in saved.values())

    def test_weights_that_are_not_finite_replace_no_good_ones(self, photo_folder, tmp_path):
        trainer = Trainer(tiny(in_memory=True), config(photo_folder, tmp_path / 'run'))
        trainer.save(trainer.last)
        before = trainer.last.read_bytes()
        with torch.no_grad():
            trainer.model.fc.weight[0, 0] = torch.inf
        trainer.save(trainer.last)
        assert trainer.last.read_bytes() == before

    @pytest.mark.parametrize(('changes', 'error', 'message'), [
        ({'save_every': 0}, GeoPriorError, '--save-every must be 1 or more, got 0'),
        ({'workers': -1}, GeoPriorError, '--workers must be 0 or more, got -1'),
        ({'max_corrupt': -1}, GeoPriorError, '--max-corrupt must be 0 or more, got -1'),
        ({'device': 'gpu'}, EvaluationError, r'--device gpu cannot be used \(.*\)\. Use cuda, cpu'),
    ])
    def test_a_wrong_command(self, changes, error, message, photo_folder, tmp_path):
        with pytest.raises(error, match=message):
            Trainer(tiny(), config(photo_folder, tmp_path / 'run', **changes))
        assert not (tmp_path / 'run').exists()

    def test_a_disk_that_fills_up_in_mid_run(self, whole_run, photo_folder, recipe_file, tmp_path):
        """From the middle of the second epoch, no file may exceed 20,000 bytes; with space again, the run resumes."""
        output = tmp_path / 'run'
        arguments = command(photo_folder, output, recipe_file, '-j', '0')
        fill = at_update('(self.epoch, self.update) == (1, 2)', signal.SIGTERM).replace(
            f'os.kill(os.getpid(), {int(signal.SIGTERM)})',
            'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))')
        filled = run(['-c', fill, *arguments])
        assert filled.returncode == 1, filled.stderr
        assert re.fullmatch(
            r'train\.py: The checkpoint \S*(best|last)\.pt could not be written \(File too large\); the previous one '
            r'is untouched\. Free some space and run again with --resume\.', filled.stderr.splitlines()[-1])
        assert load_checkpoint(output / 'last.pt')['epoch'] == 1
        run([*arguments, '--resume'], check=True)
        assert_same_run(whole_run, output)

    def test_a_full_disk_leaves_the_old_checkpoint(self, tmp_path):
        path = tmp_path / 'last.pt'
        save_checkpoint({'model': {'w': torch.zeros(8)}}, path)
        before = path.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            with pytest.raises(GeoPriorError, match='the previous one is untouched'):
                save_checkpoint({'model': {'w': torch.zeros(100_000)}}, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, ignored)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_a_first_checkpoint_that_cannot_be_written_speaks_of_no_other(self, tmp_path):
        with pytest.raises(GeoPriorError, match=r'directory\)\. Check its path and permissions and run again\.$'):
            save_checkpoint({'model': {}}, tmp_path / 'missing' / 'last.pt')

    def test_a_pickle_is_not_run(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / 'was_here'),)

        path = tmp_path / 'last.pt'
        for write in (lambda file: pickle.dump(Evil(), file), lambda file: torch.save({'model': Evil()}, file)):
            with path.open('wb') as file:
                write(file)
            with pytest.raises(GeoPriorError, match='cannot be read as a checkpoint|got a pickled'):
                load_checkpoint(path)
        assert not (tmp_path / 'was_here').exists()

    def test_a_damaged_checkpoint(self, whole_run, tmp_path):
        path = tmp_path / 'last.pt'
        path.write_bytes((whole_run / 'last.pt').read_bytes()[:-5000])
        with pytest.raises(GeoPriorError, match='cannot be read as a checkpoint'):
            load_checkpoint(path)

    def test_the_script_says_what_is_wrong_in_one_line(self, photo_folder, tmp_path):
        done = run(command(photo_folder, tmp_path / 'run', tmp_path / 'no.yaml'))
        assert done.returncode == 1
        assert done.stderr.startswith('train.py: The recipe must be a YAML file or one of a1, ')
        assert done.stderr.count('\n') == 1
        assert not (tmp_path / 'run').exists()

    def test_a_missing_extra_names_its_cure(self):
        program = (f'import runpy, sys; sys.modules["yaml"] = None\nsys.argv = [{str(SCRIPT)!r}, "--help"]\n'
                   'runpy.run_path(sys.argv[0], run_name="__main__")')
        done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr == (
            'train.py: This command needs yaml, which is not installed. '
            "Run `pip install 'timm-geoprior[train]'`.\n")
