"""Fine-tuning on a folder of images, as a user calls it, on real photographs."""
import ast
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import PHOTOGRAPHS
from PIL import Image

from programs import run
from timm_geoprior.cli import main
from timm_geoprior.errors import GeoPriorError
from timm_geoprior.evaluation.metrics import NO_RANK, Predictions
from timm_geoprior.pretrained.manifest import default_model, load_manifest
from timm_geoprior.release.staging import release_tensors
from timm_geoprior.training.checkpoint import load_checkpoint, read_weights
from timm_geoprior.training.finetune import Splits, find_splits, lr_factor, plot_confusion, unused_folders
from timm_geoprior.training.recipe import load_recipe

FAST = ('--set', 'epochs=2', '-j', '0', '--device', 'cpu')
SMALL = ('--model', 'geoprior_resnet14_nano')  # unless a later --model names another


def finetune(*arguments: object) -> int:
    return main(['finetune', *SMALL, *map(str, arguments), *FAST])


@pytest.fixture(scope='module')
def finished(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the nano network, fine-tuned on crops of four photographs. Do not modify."""
    output = tmp_path_factory.mktemp('finetuned') / 'photos'
    assert finetune(photo_folder, '--model', 'geoprior_resnet14_nano', '--output', output) == 0
    return output


@pytest.fixture
def photos(photo_folder: Path, tmp_path: Path) -> Path:
    """Class folders without splits, which a test may modify."""
    return Path(shutil.copytree(photo_folder / 'train', tmp_path / 'photos'))


def test_the_folder_is_what_timm_loads(finished, photo_folder):
    model = timm.create_model(f'local-dir:{finished}', pretrained=True).eval()
    assert model.pretrained_cfg['label_names'] == list(PHOTOGRAPHS)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    right = 0
    for path in photo_folder.glob('val/*/*.jpg'):
        with torch.no_grad():
            answer = model(transform(Image.open(path).convert('RGB'))[None]).argmax().item()
        right += PHOTOGRAPHS[answer] == path.parent.name
    results = json.loads((finished / 'results.json').read_text())
    assert (results['measured']['num_images'], results['measured']['top1_correct']) == (20, right)
    assert results['measured']['top1'] == pytest.approx(results['best'])
    assert results['best'] > 50  # after two short epochs, trained weights are better than chance, one in four


def test_classify_takes_the_folder(finished, photo_folder, capsys):
    image = photo_folder / 'val' / 'chelsea' / '00.jpg'
    assert main(['classify', '--model', f'local-dir:{finished}', '--json', str(image)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result['model'] == f'local-dir:{finished}'
    assert {guess['name'] for guess in result['predictions']} == set(PHOTOGRAPHS)
    assert sum(guess['probability'] for guess in result['predictions']) == pytest.approx(1)


def test_transformers_takes_the_folder(finished, photo_folder):
    transformers = pytest.importorskip('transformers')
    model = timm.create_model(f'local-dir:{finished}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    photo = Image.open(photo_folder / 'val' / 'chelsea' / '00.jpg')
    ours = model(transform(photo)[None]).softmax(-1)[0]
    given = transformers.pipeline('image-classification', str(finished))(photo)
    assert {answer['label']: answer['score'] for answer in given} == pytest.approx(
        dict(zip(PHOTOGRAPHS, ours.tolist(), strict=True)), rel=1e-4)


def test_publish_takes_the_run(finished):
    """With the weights of the folder, if the last epoch was the best one."""
    files = ('last.pt', 'model.safetensors')
    run, bare = (release_tensors(read_weights(finished / name).state_dict) for name in files)
    assert run.keys() == bare.keys()
    results = json.loads((finished / 'results.json').read_text())
    if results['best'] == results['last']['top1']:
        assert all(torch.equal(run[name], bare[name]) for name in run)


def test_what_a_run_leaves_on_the_disk(finished, photo_folder, tmp_path, capsys):
    """One file of weights and one to resume from, both with the permissions of the umask; their sizes are reported."""
    assert {path.name for path in finished.iterdir()} == {
        'last.pt', 'model.safetensors', 'config.json', 'recipe.yaml', 'summary.csv', 'results.json', 'tensorboard',
        'curves.png', 'radii.png', 'confusion.png'}
    before = os.umask(0o027)
    try:
        assert finetune(photo_folder, '--model', 'test_resnet', '--from-scratch', '--output', tmp_path / 'run',
                        '--set', 'img_size=32') == 0
        # a run that is resumed after its end has nothing left to do
        assert finetune(photo_folder, '--model', 'test_resnet', '--from-scratch', '--output', tmp_path / 'run',
                        '--set', 'img_size=32', '--resume') == 0
    finally:
        os.umask(before)
    for name in ('model.safetensors', 'config.json', 'last.pt', 'results.json', 'confusion.png'):
        assert (tmp_path / 'run' / name).stat().st_mode & 0o777 == 0o640, name
    assert 'num_classes' not in json.loads((tmp_path / 'run' / 'config.json').read_text())['model_args']
    said = re.search(r'run takes (\S+) MB, of which model.safetensors is (\S+)\. last.pt, with (\S+) MB, is needed',
                     capsys.readouterr().out)
    assert [float(size) for size in said.groups()[1:]] == [
        round((tmp_path / 'run' / name).stat().st_size / 1e6, 1) for name in ('model.safetensors', 'last.pt')]


def test_curves_of_several_runs(finished, tmp_path):
    script = Path(__file__).parent.parent / 'scripts' / 'experiments' / 'draw_finetune_curves.py'
    for place in ('photos/pretrained/0', 'photos/random/0', 'photos/random/1', 'others/pretrained/0'):
        shutil.copytree(finished, tmp_path / 'runs' / place, ignore=shutil.ignore_patterns('*.pt', 'tensorboard'))
    (tmp_path / 'runs' / 'photos' / 'random' / '2').mkdir()  # one that is not finished
    command = [script, tmp_path / 'runs', '--output', tmp_path / 'curves.png']
    printed = run(command, check=True).stdout.splitlines()[2:]
    measured = json.loads((finished / 'results.json').read_text())['measured']
    assert [line.split(' | ')[:2] for line in printed] == [
        ['| others', 'pretrained'], ['| photos', 'pretrained'], ['| photos', 'random'], ['| photos', 'random']]
    assert f'| {measured["top1_correct"]} of 20 | {measured["top1"]:.2f} | ' in printed[0]
    assert Image.open(tmp_path / 'curves.png').width > 900  # two panels
    command[1] = tmp_path / 'nothing'
    refused = run(command)
    assert refused.returncode == 1
    assert 'must hold finished runs' in refused.stderr


def test_confusion_matrix(finished, tmp_path):
    assert np.asarray(Image.open(finished / 'confusion.png')).std() > 10
    for classes in (2, 40, 130):
        names = [f'class {number}' for number in range(classes)]
        plot_confusion(_predictions(range(classes), range(classes)), names, tmp_path / 'confusion.png')
        assert min(Image.open(tmp_path / 'confusion.png').size) > 400


def test_images_without_finite_scores_are_no_confusions(tmp_path):
    """A row of NaN has no highest score, so the 0 that stands for one is no class."""
    plot_confusion(_predictions([0, 1, 1, 1], [0, 0, 1, 1], broken=1), ['cat', 'dog'], tmp_path / 'confusion.svg')
    texts = re.findall('<!-- (.*?) -->', (tmp_path / 'confusion.svg').read_text())
    assert texts.count('1') == texts.count('2') == 1  # on the diagonal only
    assert '3 of 4 images correct, 75.0%' in texts


def _predictions(target, predicted, broken=None):
    target, predicted = (np.array(list(values), np.int32) for values in (target, predicted))
    rank, confidence = (target != predicted).astype(np.int32), np.full(len(target), 0.9, np.float32)
    if broken is not None:
        rank[broken], confidence[broken] = NO_RANK, np.nan
    return Predictions(np.arange(len(target)), target, rank, predicted, confidence)


def test_from_a_folder_and_held_out_images(finished, photos, tmp_path, capsys):
    """From a fine-tuned network to other classes, without splits: a fifth of each class is held out."""
    shutil.rmtree(photos / 'rocket')
    output = tmp_path / "once 'again'"
    assert finetune(photos, '--model', f'local-dir:{finished}', '--output', output) == 0
    printed = capsys.readouterr().out
    code, command = printed.splitlines()[-2:]
    assert ast.parse(code).body[0].value.args[0].value == shlex.split(command)[3] == f'local-dir:{output}'
    assert '36 images in 3 classes, 12 in each' in printed
    assert 'held out of training' in printed
    results = json.loads((output / 'results.json').read_text())
    assert results['measured']['num_images'] == 6  # two of each twelve
    assert results['images_per_epoch'] == 28  # in batches of 4, from the other 30
    before, after = (read_weights(folder / 'model.safetensors').state_dict for folder in (finished, output))
    assert (after['conv1.0.weight'] - before['conv1.0.weight']).abs().max() < 0.05  # training began with those weights
    assert timm.create_model(f'local-dir:{output}', pretrained=True).num_classes == 3


def test_random_weights_and_another_network(photos, tmp_path, capsys):
    output = tmp_path / 'run'
    assert finetune(photos, '--model', 'test_resnet', '--from-scratch', '--output', output, '--set', 'img_size=32') == 0
    model = timm.create_model(f'local-dir:{output}', pretrained=True)
    assert list(model.pretrained_cfg['input_size']) == [3, 32, 32]


def test_it_ends_when_it_gets_no_better(photos, tmp_path, capsys):
    output = tmp_path / 'run'
    arguments = [*SMALL, str(photos), '--output', str(output), '--patience', '1', '-j', '0', '--device', 'cpu']
    assert main(['finetune', *arguments, '--set', 'lr=1e-12', '--set', 'epochs=9']) == 0  # nothing is learned
    printed = capsys.readouterr().out
    scores = [line.split('top-1 ')[1].split('%')[0] for line in printed.splitlines() if line.startswith('epoch')]
    best = max(range(len(scores)), key=lambda index: (float(scores[index]), -index))
    assert len(scores) == best + 2 < 9
    assert 'Training stops: no improvement for one epoch after epoch' in printed


def test_a_stopped_run_goes_on(photo_folder, tmp_path, capsys):
    """Ctrl-C after the first epoch, which a log file shows, then the same command with --resume.

    Without --resume, the run is not overwritten.
    """
    program = (
        'import os, signal, sys\n'
        'from timm_geoprior.training import finetune\n'
        'from timm_geoprior.cli import main\n'
        'decide = finetune._should_stop\n'
        'def stop(job, history):\n'
        '    assert "epoch 1: " in open("log.txt").read()\n'
        '    os.kill(os.getpid(), signal.SIGINT)\n'
        '    return decide(job, history)\n'
        'finetune._should_stop = stop\n'
        'sys.exit(main(sys.argv[1:]))\n')
    arguments = [*SMALL, str(photo_folder), '--output', str(tmp_path / 'run'), *FAST]
    with (tmp_path / 'log.txt').open('w') as log:
        stopped = run(['-c', program, 'finetune', *arguments], stdout=log.fileno(), cwd=tmp_path)
    assert stopped.returncode == 130, stopped.stderr
    assert not (tmp_path / 'run' / 'model.safetensors').exists()
    assert main(['finetune', *arguments]) == 1
    assert 'already holds a run. Add --resume' in capsys.readouterr().err
    assert main(['finetune', *arguments, '--resume']) == 0
    results = json.loads((tmp_path / 'run' / 'results.json').read_text())
    assert results['epochs'] == 2
    assert results['measured']['top1'] == pytest.approx(results['best'])


@pytest.mark.parametrize(('folders', 'expected'), [
    (['a', 'b'], Splits()),
    (['train/a', 'train/b'], Splits('train')),
    (['training/a', 'validation/a', 'test/a'], Splits('training', 'validation', 'test')),
    (['train/a', 'test/a'], Splits('train', '', 'test')),
    (['train', 'bus'], Splits()),  # a class with that name
    (['train/@eaDir', 'bus/@eaDir'], Splits()),
    (['val/a', 'b'], Splits()),
    (['Training/a', 'Testing/a', 'DEV/a'], Splits('Training', 'DEV', 'Testing')),
    (['train/a', 'training/a', 'valid/a'], Splits('train', 'valid', '')),
    (['train', 'Training/a'], Splits('Training')),
])
def test_splits_are_found(tmp_path, folders, expected):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    assert find_splits(tmp_path) == expected


@pytest.mark.parametrize('folders', [
    ['train', 'test'], ['Train', 'VAL', 'test'], ['val', 'test'], ['train', 'test', 'annotations']])
def test_splits_without_class_folders_are_no_classes(tmp_path, folders):
    for folder in folders:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'a.jpg').touch()
    with pytest.raises(GeoPriorError, match='must have one folder of images for each class, got none'):
        find_splits(tmp_path)


def test_what_is_beside_the_splits_is_told(photo_folder, tmp_path, capsys):
    for split in ('train', 'extra'):
        shutil.copytree(photo_folder / 'train', tmp_path / 'data' / split)
    shutil.copytree(photo_folder / 'val' / 'coffee', tmp_path / 'data' / 'test')  # no class folders
    assert unused_folders(tmp_path / 'data', find_splits(tmp_path / 'data')) == ['extra', 'test']
    assert finetune(tmp_path / 'data', '--output', tmp_path / 'run', '--set', 'epochs=1') == 0
    printed = capsys.readouterr().out
    for name in ('extra', 'test'):
        assert f'data/{name} is not used: it is not a split, or has no class folders' in printed


@pytest.mark.filterwarnings('error:Skipped')
def test_each_note_about_the_images_is_told_once(photos, tmp_path, capsys):
    (photos / '@eaDir').mkdir()
    shutil.copy(photos / 'coffee' / '00.jpg', photos / '@eaDir' / 'thumbnail.jpg')
    shutil.copy(photos / 'coffee' / '00.jpg', photos / 'coffee' / '._00.jpg')
    (photos / 'coffee' / 'notes.txt').write_text('taken in June')
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(8):  # more than are trained on
        Image.open(photos / 'coffee' / '00.jpg').save(photos / 'coffee' / f'n07920052_{number}.jpg', exif=exif)
    assert finetune(photos, '--output', tmp_path / 'run', '--set', 'epochs=1', '--set', 'img_size=32') == 0
    printed = capsys.readouterr().out
    assert '56 images in 4 classes, 12 to 20 in each' in printed
    assert printed.count('state a rotation') == printed.count("8 of ILSVRC's files state") == 1, printed
    assert printed.count('@eaDir') == 1, printed
    assert printed.count('.txt') == 1, printed


@pytest.mark.parametrize(('changes', 'splits', 'expected'), [
    (['holdout=2'], ['train', 'val'], ('val', 20)),
    (['holdout=2'], ['train', 'val', 'test'], ('test', 20)),
    (['holdout=2'], ['train'], ('held out of training', 8)),
    ([], ['train'], ('held out of training', 8)),
])
def test_held_out_images_choose_and_others_are_measured(photo_folder, tmp_path, changes, splits, expected):
    for split in splits:
        shutil.copytree(photo_folder / ('train' if split == 'train' else 'val'), tmp_path / 'data' / split)
    more = [word for change in changes for word in ('--set', change)]
    output = tmp_path / 'run'
    assert finetune(tmp_path / 'data', '--output', output, *more) == 0
    results = json.loads((output / 'results.json').read_text())
    assert (results['measured']['split'], results['measured']['num_images']) == expected
    state = load_checkpoint(output / 'last.pt')
    assert len(state['held_names']) == 8
    if expected[0] == 'held out of training':
        assert results['measured']['top1'] == pytest.approx(results['best'])


def test_images_that_came_since_are_not_held_out_unnoticed(photos, tmp_path, capsys):
    output = tmp_path / 'run'
    assert main(['finetune', str(photos), '--output', str(output), '--set', 'img_size=32', *FAST]) == 0
    assert load_recipe(output / 'recipe.yaml').model == default_model(load_manifest()).name
    shutil.copy(photos / 'coffee' / '00.jpg', photos / 'coffee' / '99.jpg')
    assert main(['finetune', str(photos), '--output', str(output), '--set', 'img_size=32', *FAST, '--resume']) == 1
    assert 'was trained or measured on other images than those in' in capsys.readouterr().err


def test_class_names_are_drawn_literally(photo_folder, tmp_path):
    for number, name in enumerate(('$_$', 'a$^$b', '猫', 'größe')):
        shutil.copytree(photo_folder / 'train' / PHOTOGRAPHS[number], tmp_path / 'data' / name)
    assert finetune(tmp_path / 'data', '--output', tmp_path / 'run', '--set', 'epochs=1') == 0
    assert (tmp_path / 'run' / 'confusion.png').exists()


def test_the_learning_rate_suits_the_batch_and_the_network(photos, tmp_path, capsys):
    assert lr_factor(64, 1_100_000) == 1 == lr_factor(256, 400_000)
    assert lr_factor(16, 1_100_000) == pytest.approx(1 / 2)
    assert lr_factor(64, 4_400_000) == pytest.approx(1 / 2)
    assert finetune(photos, '--model', 'geoprior_resnet14_nano', '--output', tmp_path / 'run') == 0
    # 48 images in batches of 8
    assert 'Batches of 8 images, learning rate 3.5e-04' in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / 'run' / 'recipe.yaml').read_text())['lr'] == pytest.approx(1e-3 / 8 ** 0.5)


def no_class(photos: Path) -> None:
    for folder in photos.iterdir():
        shutil.rmtree(folder)


def one_class(photos: Path) -> None:
    for name in ('astronaut', 'chelsea', 'rocket'):
        shutil.rmtree(photos / name)


def a_text(photos: Path) -> None:
    (photos / 'coffee' / '99.jpg').write_text('no picture')


def cut_off(photos: Path) -> None:
    path = photos / 'coffee' / '03.jpg'
    path.write_bytes(path.read_bytes()[:900])


def hidden(photos: Path) -> None:
    shutil.copytree(photos / 'coffee', photos / '.thumbnails')


def one_image(photos: Path) -> None:
    for path in sorted((photos / 'coffee').iterdir())[1:]:
        path.unlink()


def convert(photos: Path) -> None:
    for path in photos.glob('*/*.jpg'):
        path.rename(path.with_suffix('.xyz'))


def huge(photos: Path) -> None:
    Image.new('1', (30_000, 30_000)).save(photos / 'coffee' / 'huge.png')


@pytest.mark.parametrize(('spoil', 'words'), [
    (no_class, 'must have one folder for each class, with images that end in'),
    (convert, ' has no images). Sort them into folders, or convert them'),
    (one_class, 'must have at least two folders of images, one for each class, got one, coffee'),
    (one_image, 'must have at least two images, one to train on and one to hold out, got one of coffee'),
    (a_text, 'coffee/99.jpg'),
    (cut_off, 'coffee/03.jpg'),
    (huge, 'coffee/huge.png'),
    (hidden, 'must not have images in hidden folders, got some in .thumbnails'),
])
def test_bad_images_are_told_before_anything_is_written(photos, tmp_path, capsys, spoil, words):
    spoil(photos)
    assert finetune(photos, '--output', tmp_path / 'run') == 1
    complaint = capsys.readouterr().err
    assert complaint.startswith('timm-geoprior: ')
    assert words in complaint
    assert 'Traceback' not in complaint
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('split', ['val', 'test'])
def test_classes_of_another_name_are_refused_before_the_training(photo_folder, tmp_path, capsys, split):
    data = shutil.copytree(photo_folder, tmp_path / 'data')
    (data / 'val').rename(data / split)
    (data / split / 'coffee').rename(data / split / 'Kaffee')
    assert finetune(data, '--output', tmp_path / 'run') == 1
    assert f"{split} must be among those of {data / 'train'}, got also Kaffee. Rename or" in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


def test_another_network_is_not_replaced(finished, photos, tmp_path, capsys):
    folder = tmp_path / 'network'
    folder.mkdir()
    for name in ('model.safetensors', 'config.json'):
        shutil.copy(finished / name, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert finetune(photos, '--model', f'local-dir:{folder}', '--output', folder) == 1
    assert f'must be a new folder, got {folder}, which has another model.safetensors' in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(('arguments', 'words'), [
    (['--model', 'resnet51'], 'resnet51'),
    (['--model', 'local-dir:nowhere'], 'local-dir:nowhere cannot be loaded'),
    *((['--model', name], f'must have trained weights to start from, got {name}')
      for name, entry in load_manifest().models.items()
      if entry.status == 'planned'),
    (['--set', 'epoch=3'], "did you mean 'epochs'"),
    (['--set', 'batch_size=512'], 'fewer training images than one batch of 512. Lower batch_size'),
    (['--device', 'cuda:77'], 'cuda:77'),
    (['--workers', '-1'], '--workers must be 0 or more, got -1.'),
    (['--set', 'model=test_vit'], 'The model must be named with --model, got it with --set.'),
    (['--device', 'meta'], '--device must be one that computes, got meta. Use --device cpu.'),
    (['--output', '{photos}/out'], 'must lie outside the folder of the images'),
    (['--output', '{photos}/coffee/00.jpg'], 'must lie outside the folder of the images'),
    (['--output', __file__], 'must be a folder, or a new one, got the file'),
])
def test_bad_arguments(photos, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    given = [argument.format(photos=photos) for argument in arguments]
    assert main(['finetune', str(photos), *FAST, *given]) == 1
    complaint = capsys.readouterr().err
    assert words in complaint
    assert complaint.count('\n') == 1
    assert not list(tmp_path.glob('*/*.pt'))


def test_a_single_class_is_measured_but_not_trained_on(photo_folder, tmp_path, capsys):
    for split, classes in (('train', ('coffee', 'rocket')), ('test', ('rocket',))):
        for name in classes:
            shutil.copytree(photo_folder / 'train' / name, tmp_path / 'data' / split / name)
    arguments = [tmp_path / 'data', '--output', tmp_path / 'run', '--set', 'img_size=32']
    assert finetune(*arguments) == 0
    assert 'test: ' in capsys.readouterr().out
    shutil.copytree(photo_folder / 'train/chelsea', tmp_path / 'data/test/chelsea')
    assert finetune(*arguments, '--resume') == 1
    assert 'test must be among those of' in capsys.readouterr().err
    shutil.rmtree(tmp_path / 'data/train/coffee')
    assert finetune(*arguments[:2], tmp_path / 'other') == 1
    assert 'train must have at least two folders of images' in capsys.readouterr().err


def test_no_folder(capsys, tmp_path):
    assert finetune(tmp_path / 'nowhere') == 1
    assert 'nowhere must be a folder with one folder of images for each class' in capsys.readouterr().err


def test_a_missing_extra_names_its_cure(photos, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith('timm_geoprior.training')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'yaml', None)
    assert finetune(photos) == 1
    assert "pip install 'timm-geoprior[train]'" in capsys.readouterr().err
