"""Recovery of a converted network: `convert`, then `train.py warm_tin200 --finetune OUT`, as a user calls them."""
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from conftest import PHOTOGRAPHS
from test_training import SCRIPT, at_update

from programs import run, run_ranks
from timm_geoprior.cli import main
from timm_geoprior.evaluation.models import load_model
from timm_geoprior.training.checkpoint import load_checkpoint
from timm_geoprior.training.engine import Trainer, train
from timm_geoprior.training.parts import build_teacher
from timm_geoprior.training.recipe import RunConfig, load_recipe
from timm_geoprior.training.recovery import start_from_folder

SMALL = ['epochs=2', 'batch_size=8', 'eval_size=64']
OPTIONS = [part for change in SMALL for part in ('--set', change)]


@pytest.fixture(scope='session')
def out(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `convert` writes for the plain checkpoint. Do not modify."""
    folder = tmp_path_factory.mktemp('recovery') / 'out'
    assert main(['convert', str(checkpoint), '-o', str(folder), '--device', 'cpu']) == 0
    return folder


@pytest.fixture(scope='session')
def flat(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training photographs in one folder, in the order of their class folders."""
    folder = tmp_path_factory.mktemp('flat')
    for path in photo_folder.glob('train/*/*.jpg'):
        shutil.copy(path, folder / f'{path.parent.name}-{path.name}')
    return folder


def command(out: Path, data: Path, run: Path, *more: str) -> list[str]:
    return [str(SCRIPT), 'warm_tin200', '--data-dir', str(data), '--output', str(run), '--finetune', str(out),
            '--device', 'cpu', '-j', '0', *OPTIONS, *more]


def in_process(out: Path, data: Path, run: Path, *overrides: str, **options: object) -> Trainer:
    config = RunConfig(data, run, finetune=str(out), workers=0, tell=lambda text: None)
    return Trainer(load_recipe('warm_tin200', [*SMALL, *overrides]), replace(config, **options))


def test_it_starts_from_the_folder_and_is_taught_by_its_source(out, checkpoint, photo_folder, tmp_path):
    done = run(command(out, photo_folder, tmp_path / 'run', '--val-split', 'val'))
    assert done.returncode == 0, done.stderr
    assert (f'{out}: geoprior_resnet14_nano, converted from geoprior_resnet14_nano, which is the teacher '
            f'({checkpoint}).') in done.stderr.splitlines()
    recovered = load_model(None, tmp_path / 'run' / 'last.pt')
    assert recovered.name == 'geoprior_resnet14_nano'
    assert recovered.wnids == PHOTOGRAPHS
    saved = load_checkpoint(tmp_path / 'run' / 'last.pt')
    assert (saved['recipe']['teacher'], saved['recipe']['teacher_path']) == ('geoprior_resnet14_nano', str(checkpoint))
    trainer = in_process(out, photo_folder, tmp_path / 'other')
    start = timm.create_model(f'local-dir:{out}', pretrained=True).state_dict()
    assert all(torch.equal(value, start[name]) for name, value in trainer.model.state_dict().items())
    assert not torch.equal(start['layer3.0.conv2.attn.log_radius'], saved['model']['layer3.0.conv2.attn.log_radius'])
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(trainer.task.teacher(images), load_model(None, checkpoint).model(images))


def test_without_labels_the_teacher_alone_teaches_the_same(out, photo_folder, flat, tmp_path):
    """The same images give the same bits with and without class folders, even if these are other classes."""
    done = run(command(out, flat, tmp_path / 'flat', '--set', 'distill_alpha=1'))
    assert done.returncode == 0, done.stderr
    assert f'The images in {flat} are used without labels.' in done.stderr
    found = load_checkpoint(tmp_path / 'flat' / 'last.pt')
    assert found['class_names'] == list(PHOTOGRAPHS)
    other = Path(shutil.copytree(photo_folder / 'train', tmp_path / 'other'))
    (other / 'astronaut').rename(other / 'a')
    for data, overrides in ((photo_folder, []), (other, ['in_memory=false'])):
        in_process(out, data, tmp_path / 'runs' / data.name, 'distill_alpha=1', *overrides).fit()
    labelled = load_checkpoint(tmp_path / 'runs' / photo_folder.name / 'last.pt')['model']
    assert all(torch.equal(value, labelled[name]) for name, value in found['model'].items())
    start = timm.create_model(f'local-dir:{out}', pretrained=True).state_dict()
    assert not torch.equal(found['model']['fc.weight'], start['fc.weight'])


@pytest.mark.skipif(os.name != 'posix', reason='signals of POSIX')
def test_a_killed_recovery_resumes_to_the_same_bits(out, flat, tmp_path):
    whole = in_process(out, flat, tmp_path / 'whole', 'distill_alpha=1')
    whole.fit()
    arguments = command(out, flat, tmp_path / 'run', '--set', 'distill_alpha=1', '--save-every', '1')
    killed = run(['-c', at_update('self.epoch == 1 and self.update == 2', signal.SIGKILL), *arguments])
    assert killed.returncode == -signal.SIGKILL
    done = run([*arguments, '--resume'])
    assert done.returncode == 0, done.stderr
    found = load_checkpoint(tmp_path / 'run' / 'last.pt')['model']
    assert all(torch.equal(value, found[name]) for name, value in whole.model.state_dict().items())


def test_two_processes_recover_as_one(out, flat, tmp_path):
    """With norms that do not depend on the batch. What all processes find is reported once."""
    changes = ['distill_alpha=1', 'amp=false', 'lr=1e-3', 'freeze_norms=true']
    options = [part for change in changes for part in ('--set', change)]
    first, second = run_ranks(2, command(out, flat, tmp_path / 'run', *options))
    assert (first.returncode, second.returncode) == (0, 0), (first.stderr, second.stderr)
    for sentence in ('which is the teacher', 'are used without labels', 'No images are held out'):
        assert first.stderr.count(sentence) == 1
    assert (second.stdout, second.stderr) == ('', '')
    last = json.loads(first.stdout)['last']
    one = in_process(out, flat, tmp_path / 'one', *changes)
    assert last['train_loss'] == pytest.approx(one.fit()['last']['train_loss'], rel=1e-4)
    found = load_checkpoint(tmp_path / 'run' / 'last.pt')['model']
    start = timm.create_model(f'local-dir:{out}', pretrained=True).state_dict()
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(found[name], value)
    assert not torch.equal(found['layer4.0.conv3.weight'], start['layer4.0.conv3.weight'])
    recovered = load_model(None, tmp_path / 'run' / 'last.pt').model.state_dict()
    assert all(torch.equal(recovered[name], start[name]) for name in start if name.endswith('running_var'))


def test_classes_are_matched_by_name(out, photo_folder, tmp_path):
    """Two of the four classes in a separate folder keep their places in the network."""
    for name in ('coffee', 'rocket'):
        shutil.copytree(photo_folder / 'train' / name, tmp_path / 'data' / 'train' / name)
    for overrides in ([], ['in_memory=false']):
        trainer = in_process(out, tmp_path / 'data', tmp_path / 'run', *overrides)
        _, targets = next(iter(trainer.data.train.epoch(0, 64)))
        assert trainer.data.class_names == PHOTOGRAPHS
        assert set(targets.tolist()) == {2, 3}


def test_images_are_prepared_as_the_source_was_trained(out, checkpoint, photo_folder, tmp_path):
    folder = Path(shutil.copytree(out, tmp_path / 'out'))
    written = json.loads((folder / 'config.json').read_text())
    written['pretrained_cfg'].update(mean=[0.5, 0.25, 0.125], crop_pct=0.5, std=None)
    written['model_args'] = None  # as some programs write empty values
    (folder / 'config.json').write_text(json.dumps(written))
    trainer = in_process(folder, photo_folder, tmp_path / 'run')
    assert trainer.data.train.mean.flatten().tolist() == [127.5, 63.75, 31.875]
    trainer.fit()
    last = tmp_path / 'run' / 'last.pt'
    again = replace(trainer.recipe, teacher=trainer.recipe.model, teacher_path=str(last))
    for model in (load_model(None, last).model, build_teacher(again, 4)):
        assert (list(model.pretrained_cfg['mean']), model.pretrained_cfg['crop_pct']) == ([0.5, 0.25, 0.125], 0.5)
    # the teacher gets them normalized as in its own training
    pixels = torch.rand(2, 3, 64, 64)
    cfgs = trainer.model.pretrained_cfg, load_model(None, checkpoint).model.pretrained_cfg
    own, source = ((pixels - torch.tensor(cfg['mean']).view(1, 3, 1, 1)) / torch.tensor(cfg['std']).view(1, 3, 1, 1)
                   for cfg in cfgs)
    task = trainer.task
    torch.testing.assert_close(task.teacher.normalize_input(own, task.student_mean, task.student_std), source)


def test_a_source_that_timm_loads_by_name(photo_folder, tmp_path):
    torch.manual_seed(0)
    source = timm.create_model('resnet14t', num_classes=4, zero_init_last=False)
    timm.models.save_for_hf(source, str(tmp_path / 'source'), {'label_names': list(PHOTOGRAPHS)})
    name = f'local-dir:{tmp_path}/source'
    assert main(['convert', name, '-o', str(tmp_path / 'out'), '--device', 'cpu']) == 0
    trainer = in_process(tmp_path / 'out', photo_folder, tmp_path / 'run')
    assert (trainer.recipe.model, trainer.recipe.teacher) == ('geoprior_resnet50', name)
    assert trainer.recipe.model_kwargs['stem_type'] == 'deep_tiered'
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(trainer.task.teacher(images), source.eval()(images))


def test_a_converted_tag_keeps_its_name(out, tmp_path):
    """So that it is measured and published under its own name."""
    folder = Path(shutil.copytree(out, tmp_path / 'out'))
    cfg = timm.get_pretrained_cfg('geoprior_resnet50.from_bamboo').to_dict()
    (folder / 'config.json').write_text(json.dumps({
        'architecture': 'geoprior_resnet50', 'num_classes': 3, 'pretrained_cfg': {**cfg, 'tag': 'from_bamboo'}}))
    (folder / 'results.json').write_text(json.dumps({'source': {'name': 'resnet50.bamboo'}}))
    config = RunConfig(tmp_path, tmp_path / 'run', finetune=str(folder))
    recipe, config, _ = start_from_folder(load_recipe('warm_in1k'), config)
    assert (recipe.model, recipe.model_kwargs) == ('geoprior_resnet50.from_bamboo', {})
    assert (recipe.teacher, recipe.teacher_path) == ('resnet50.bamboo', '')
    assert config.class_names == ('0', '1', '2')


def test_another_teacher_may_be_named(out, photo_folder, tmp_path):
    other = timm.create_model('test_resnet', num_classes=4)
    torch.save(other.state_dict(), tmp_path / 'other.pt')
    trainer = in_process(out, photo_folder, tmp_path / 'run', 'teacher=test_resnet',
                         f'teacher_path={tmp_path / "other.pt"}')
    assert torch.equal(trainer.task.teacher.model.state_dict()['fc.weight'], other.state_dict()['fc.weight'])


BAD = {
    'nothing': 'must name the folder that `timm-geoprior convert` wrote, since the teacher of the recipe warm_tin200',
    'model': '--model must be left out with the folder',
    'missing': 'must name the folder that `timm-geoprior convert` wrote, since the teacher of the recipe warm_tin200',
    'no results': 'must be a folder that `timm-geoprior convert` wrote, got one without results.json. Check',
    'no weights': 'must be a folder that `timm-geoprior convert` wrote, got one without model.safetensors. Check',
    'damaged': 'must be a folder that `timm-geoprior convert` wrote, got one whose config.json or results.json cannot',
    'fine-tuned': 'got one whose results.json has no valid source. Check --finetune.',
    'no results but null': 'got one whose results.json has no valid source. Check --finetune.',
    'no name': 'got one whose results.json has no valid name. Check --finetune.',
    'a list': 'got one whose config.json has no valid architecture. Check --finetune.',
    'classes in words': 'got one whose config.json has no valid num_classes. Check --finetune.',
    'unknown network': 'timm does not accept the recipe keys model, model_kwargs and freeze (Unknown model (nope))',
    'grey': 'The model must take images of 3 channels to be trained, got 1. Change in_chans.',
    'no classes': 'must have a classifier to be trained, got a network without classes.',
    'teacher gone': 'does not exist. Put it back, or give its path with --set teacher_path=FILE.',
    'teacher changed': 'must be the file from which',
    'teacher on the Hub': 'The teacher resnet50.a1_in1k cannot be loaded (',
    'flat': 'must have one folder of images for each class, or add --set distill_alpha=1, which needs no labels.',
    'flat, held out': 'must have the classes of the network for some to be held out, got none. Set holdout=0.',
    'other classes': 'must be those of the network, got tea. Rename the folders, or add --set distill_alpha=1, which',
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_one_sentence(case, out, photo_folder, flat, hub, tmp_path, capsys):
    folder = Path(shutil.copytree(out, tmp_path / 'out'))
    data, more = photo_folder, []
    results, written = (json.loads((folder / name).read_text()) for name in ('results.json', 'config.json'))
    if case == 'model':
        more = ['--model', 'resnet50']
    elif case == 'missing':
        folder = tmp_path / 'nowhere'
    elif case in ('no results', 'no weights'):
        (folder / {'no results': 'results.json', 'no weights': 'model.safetensors'}[case]).unlink()
    elif case == 'damaged':
        (folder / 'config.json').write_text('{')
    elif case == 'fine-tuned':
        results = {'recipe': {}}
    elif case == 'no results but null':
        results = None
    elif case == 'no name':
        results['source'] = {}
    elif case == 'a list':
        written = [written]
    elif case == 'classes in words':
        written['num_classes'] = 'four'
    elif case == 'unknown network':
        written['architecture'] = 'nope'
    elif case == 'grey':
        written['model_args'] = {'in_chans': 1}
    elif case == 'no classes':
        written['num_classes'] = 0
    elif case == 'teacher gone':
        results['source']['checkpoint'] = str(tmp_path / 'gone.pt')
    elif case == 'teacher changed':
        results['source']['checkpoint'] = str(out / 'model.safetensors')
    elif case == 'teacher on the Hub':
        results['source'] = {'name': 'resnet50.a1_in1k'}
    elif case.startswith('flat'):
        data, more = flat, ['--set', 'distill_alpha=1', '--set', 'holdout=2'] if 'held' in case else []
    elif case == 'other classes':
        data = Path(shutil.copytree(photo_folder, tmp_path / 'data'))
        (data / 'train' / 'coffee').rename(data / 'train' / 'tea')
    if folder.exists() and case not in ('damaged', 'no results'):
        (folder / 'results.json').write_text(json.dumps(results))
        (folder / 'config.json').write_text(json.dumps(written))
    arguments = command(folder, data, tmp_path / 'run', *more)[1:]
    if case == 'nothing':
        place = arguments.index('--finetune')
        del arguments[place:place + 2]
    assert main(['train', *arguments]) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith('timm-geoprior train: ')
    assert BAD[case] in told
    assert not (tmp_path / 'run').exists() or not list((tmp_path / 'run').iterdir())


def test_an_ordinary_recipe_takes_the_folder_without_a_teacher(out, photo_folder, tmp_path):
    recipe = load_recipe('finetune', ['epochs=1', 'batch_size=8'])
    results = train(recipe, RunConfig(photo_folder, tmp_path / 'run', finetune=str(out), workers=0))
    assert (results['recipe']['model'], results['recipe']['teacher']) == ('geoprior_resnet14_nano', '')
