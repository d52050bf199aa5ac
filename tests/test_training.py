"""Runs of scripts/train.py and of the engine behind it, on real photographs."""
import csv
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import timm
import torch
import yaml

from timm_geoprior.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from timm_geoprior.training.engine import RunConfig, Trainer, TrainingError, train
from timm_geoprior.training.recipe import load_recipe, make_recipe

TIMES = ('seconds', 'images_per_second')
SCRIPT = Path(__file__).parents[1] / 'scripts' / 'train.py'
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']
TINY = {
    'name': 'tiny', 'model': 'geoprior_resnet14_nano', 'epochs': 3, 'batch_size': 8, 'lr': 0.05, 'img_size': 32,
    'model_kwargs': {'channels': [8, 16, 16, 16], 'value_dims': [0, 8, 8, 8], 'stem_width': 8},
    'warmup_epochs': 1, 'smoothing': 0.1, 'weight_decay': 1e-4, 'radius_lr': 0.1, 'model_ema': True,
    'model_ema_decay': 0.9, 'drop_path': 0.1, 'holdout': 2,
}


def tiny(**changes):
    return make_recipe({**TINY, **changes})


def config(folder, output, **changes):
    return RunConfig(**{'data_dir': folder, 'output': output, 'workers': 0, **changes})


def command(folder: Path, output: Path, recipe: Path, *more: str) -> list[str]:
    return [sys.executable, str(SCRIPT), str(recipe), '--data-dir', str(folder), '--output', str(output), *more]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, 'OMP_NUM_THREADS': '1', **more}


def weights(output: Path) -> dict[str, torch.Tensor]:
    state = load_checkpoint(output / 'last.pt')
    momenta = {f'optimizer.{i}': s['momentum_buffer'] for i, s in state['optimizer']['state'].items()}
    averages = {f'ema.{name}': value for name, value in state['ema'].items()}
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
    subprocess.run(command(photo_folder, output, recipe_file, '-j', '2'), env=environment(), check=True)
    return output


@pytest.fixture(scope='module')
def ddp_recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp('ddp') / 'ddp.yaml'
    path.write_text(yaml.safe_dump({
        **TINY, 'epochs': 2, 'drop_path': 0, 'in_memory': True, 'holdout': 0, 'lr': 0.01,
        'model_kwargs': {**TINY['model_kwargs'], 'norm_layer': 'groupnorm1'}}))
    return path


@pytest.fixture(scope='module')
def two_processes(photo_folder, ddp_recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp('two') / 'run'
    arguments = command(photo_folder, output, ddp_recipe)[1:]
    subprocess.run([*TORCHRUN, *arguments], env=environment(), check=True)
    return output


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
        assert make_recipe(yaml.safe_load((whole_run / 'recipe.yaml').read_text())).mixup == 0.2
        state = load_checkpoint(whole_run / 'best.pt')
        assert state['class_names'] == ['astronaut', 'chelsea', 'coffee', 'rocket']
        assert {path.name for path in whole_run.glob('*.png')} == {'curves.png', 'radii.png'}
        assert list((whole_run / 'tensorboard').glob('events.*'))
        assert not list(whole_run.glob('*.part*')) + list(whole_run.glob('.*.part*'))

    def test_it_learns(self, photo_folder, tmp_path):
        """Four photographs are told apart after a few epochs, in memory, by images that were held out."""
        recipe = tiny(epochs=12, in_memory=True, lr=0.1, smoothing=0, drop_path=0, model_ema=False, scale=[0.6, 1])
        results = train(recipe, config(photo_folder, tmp_path / 'run'))
        assert results['best'] >= 75
        assert results['last']['train_loss'] < 1.2  # chance is ln 4 = 1.39

    def test_progressive_sizes(self, photo_folder, tmp_path):
        recipe = tiny(progressive=[[0, 32], [1, 40], [2, 48]], img_size=48, in_memory=True)
        train(recipe, config(photo_folder, tmp_path / 'run'))
        rows = csv.DictReader((tmp_path / 'run/summary.csv').open())
        assert [row['img_size'] for row in rows] == ['32', '40', '48']

    def test_accumulation_is_the_same_update(self, photo_folder, tmp_path):
        """Half the batch twice is the batch, where no norm sees the batch."""
        for steps in (1, 2):
            recipe = tiny(epochs=1, grad_accum_steps=steps, drop_path=0, in_memory=True, lr=1e-3,
                          model_kwargs={**TINY['model_kwargs'], 'norm_layer': 'groupnorm1'})
            train(recipe, config(photo_folder, tmp_path / str(steps)))
        one, two = (weights(tmp_path / str(steps)) for steps in (1, 2))
        for name in one:
            torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4)


class TestResume:
    @pytest.mark.parametrize('updates', [1, 6, 12])
    def test_killed_anywhere_the_run_ends_with_the_same_bits(
            self, whole_run, photo_folder, recipe_file, tmp_path, updates):
        """SIGKILL from inside, right after a step: no handler runs, and workers are at work."""
        killer = at_update(f'self.epoch * self.updates_per_epoch + self.update == {updates}', signal.SIGKILL)
        output = tmp_path / 'run'
        arguments = command(photo_folder, output, recipe_file, '-j', '2', '--save-every', '2')
        killed = subprocess.run([sys.executable, '-c', killer, *arguments[1:]], env=environment())
        assert killed.returncode == -signal.SIGKILL
        more = ['--resume'] if (output / 'last.pt').exists() else []
        subprocess.run([*arguments, *more], env=environment(), check=True)
        assert_same_run(whole_run, output)

    @pytest.mark.parametrize(('number', 'code'), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_asked_to_stop_it_saves_and_leaves(self, whole_run, photo_folder, recipe_file, tmp_path, number, code):
        output = tmp_path / 'run'
        arguments = command(photo_folder, output, recipe_file, '-j', '2')
        stopper = at_update('self.update == 2', number)
        stopped = subprocess.run([sys.executable, '-c', stopper, *arguments[1:]], env=environment())
        assert stopped.returncode == code
        assert load_checkpoint(output / 'last.pt')['update'] == 3
        subprocess.run([*arguments, '--resume'], env=environment(), check=True)
        assert_same_run(whole_run, output)

    def test_another_recipe_or_seed_is_refused(self, whole_run, photo_folder, recipe_file):
        recipe = make_recipe(yaml.safe_load(recipe_file.read_text()))
        changed = make_recipe({**recipe.to_dict(), 'lr': 0.3})
        with pytest.raises(TrainingError, match='was trained with lr = 0.05, this run has 0.3'):
            Trainer(changed, config(photo_folder, whole_run, resume=True))
        with pytest.raises(TrainingError, match='has seed 0, this run 5'):
            Trainer(recipe, config(photo_folder, whole_run, resume=True, seed=5))

    def test_a_run_is_not_overwritten(self, whole_run, photo_folder):
        with pytest.raises(TrainingError, match='already holds a run: add --resume'):
            Trainer(tiny(), config(photo_folder, whole_run))

    def test_nothing_to_resume(self, photo_folder, tmp_path):
        with pytest.raises(CheckpointError, match='There is no checkpoint'):
            Trainer(tiny(), config(photo_folder, tmp_path, resume=True))


class TestProcesses:
    def test_two_processes_train_as_one(self, photo_folder, ddp_recipe, two_processes, tmp_path):
        """The same global batches give the same loss curve, to 1e-4, with a norm that does not see the batch."""
        train(load_recipe(ddp_recipe), config(photo_folder, tmp_path / 'one'))
        losses = [[float(row['train_loss']) for row in csv.DictReader((output / 'summary.csv').open())]
                  for output in (tmp_path / 'one', two_processes)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    def test_a_killed_process_comes_back(self, photo_folder, ddp_recipe, two_processes, tmp_path):
        """The second process is killed in the second epoch; `torchrun --max-restarts` brings both back."""
        mark, output, script = tmp_path / 'was_killed', tmp_path / 'run', tmp_path / 'killed.py'
        script.write_text(at_update(
            'os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and self.epoch == 1'
            f' and open({str(mark)!r}, "w")', signal.SIGKILL))
        arguments = command(photo_folder, output, ddp_recipe, '--save-every', '2')[1:]
        done = subprocess.run(
            [*TORCHRUN, '--max-restarts=1', str(script), *arguments], capture_output=True, text=True,
            env=environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1'))
        assert done.returncode == 0, done.stderr
        assert mark.exists()
        assert_same_run(two_processes, output)

    def test_a_batch_that_does_not_divide(self, photo_folder, tmp_path):
        with pytest.raises(TrainingError, match='batch_size is 8, expected a multiple of 1 processes times 3'):
            Trainer(tiny(grad_accum_steps=3), config(photo_folder, tmp_path))

    def test_fewer_images_than_a_batch(self, photo_folder, tmp_path):
        with pytest.raises(TrainingError, match='fewer training images than one batch of 64'):
            Trainer(tiny(batch_size=64), config(photo_folder, tmp_path))


class TestStartingPoint:
    def test_finetuning_starts_from_a_checkpoint_with_a_new_head(self, photo_folder, first_run, tmp_path):
        root = tmp_path / 'two'
        for name in ('coffee', 'rocket'):
            shutil.copytree(photo_folder / 'train' / name, root / 'train' / name)
        trainer = Trainer(
            tiny(in_memory=True), config(root, tmp_path / 'run', finetune=str(first_run / 'last.pt')))
        start = trainer.model.state_dict()
        source = load_checkpoint(first_run / 'last.pt')['ema']
        assert start['fc.weight'].shape[0] == 2
        assert all(torch.equal(start[name], source[name]) for name in source if not name.startswith('fc.'))
        assert trainer.fit()['epochs'] == 3

    def test_distillation_from_a_checkpoint(self, photo_folder, first_run, tmp_path):
        teacher = {'teacher': 'geoprior_resnet14_nano', 'teacher_path': str(tmp_path / 'teacher.pt')}
        torch.save(timm.create_model('geoprior_resnet14_nano', num_classes=4).state_dict(), tmp_path / 'teacher.pt')
        trainer = Trainer(
            tiny(in_memory=True, distill_alpha=1.0, distill_temperature=2.0, **teacher),
            config(photo_folder, tmp_path / 'run'))
        images, logits = torch.randn(4, 3, 32, 32), torch.randn(4, 4, requires_grad=True)
        expected = trainer.distillation.teacher(images)
        assert trainer.distillation(images, expected).item() == pytest.approx(0, abs=1e-6)
        trainer.distillation(images, logits).backward()
        assert logits.grad.abs().sum() > 0
        assert trainer.fit()['last']['train_loss'] > 0


class TestFaults:
    def test_a_loss_that_is_not_finite_stops_the_run(self, photo_folder, tmp_path):
        recipe = tiny(lr=1e30, warmup_epochs=0, max_skipped_steps=3, epochs=20)
        with pytest.raises(TrainingError, match=r'not finite for 3 steps in a row, up to step \d+ with a learn'):
            train(recipe, config(photo_folder, tmp_path / 'run'))

    def test_a_full_disk_leaves_the_old_checkpoint(self, tmp_path):
        path = tmp_path / 'last.pt'
        save_checkpoint({'model': {'w': torch.zeros(8)}}, path)
        before = path.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            with pytest.raises(CheckpointError, match='the one before it is untouched'):
                save_checkpoint({'model': {'w': torch.zeros(100_000)}}, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, ignored)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_a_pickle_is_not_run(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / 'was_here'),)

        path = tmp_path / 'last.pt'
        for write in (lambda file: pickle.dump(Evil(), file), lambda file: torch.save({'model': Evil()}, file)):
            with path.open('wb') as file:
                write(file)
            with pytest.raises(CheckpointError, match='not a checkpoint that can be read as data'):
                load_checkpoint(path)
        assert not (tmp_path / 'was_here').exists()

    def test_a_damaged_checkpoint(self, whole_run, tmp_path):
        path = tmp_path / 'last.pt'
        path.write_bytes((whole_run / 'last.pt').read_bytes()[:-5000])
        with pytest.raises(CheckpointError, match='not a checkpoint that can be read as data'):
            load_checkpoint(path)

    def test_the_script_says_what_is_wrong_in_one_line(self, photo_folder, tmp_path):
        done = subprocess.run(
            command(photo_folder, tmp_path / 'run', tmp_path / 'no.yaml'), env=environment(), capture_output=True,
            text=True)
        assert done.returncode == 1
        assert done.stderr.startswith('train.py: There is no recipe file')
        assert done.stderr.count('\n') == 1
        assert not (tmp_path / 'run').exists()
