"""scripts/validate.py end to end: every kind of data, one and several processes, what it writes and what it rejects."""
import csv
import hashlib
import io
import json
import lzma
import os
import re
import shlex
import shutil
import signal
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform
from torch import nn
from tqdm import tqdm

from programs import Program, run_ranks
from releases import planned, put_on, using_manifest
from timm_geoprior import progress
from timm_geoprior.evaluation.validate import main, parse_arguments
from timm_geoprior.pretrained.manifest import LabelSet, Metric, load_manifest, to_json
from timm_geoprior.provenance import git_commit

SCRIPT = Path(__file__).parents[1] / 'scripts' / 'validate.py'
TIN200_VAL = Path(__file__).parents[2] / 'shared' / 'data' / 'tin200_val.tar.xz'
NANO = 'geoprior_resnet14_nano'
COUNT = 97  # a prime: no batch size and no number of processes divides it
IMAGENET = ImageNetInfo('imagenet-1k').label_names()
CLASSES = IMAGENET[::111][::-1]  # ten WordNet ids, not in order


def photographs(count: int) -> list[tuple[str, int, bytes]]:
    """Crops of scikit-image's photographs: file name, class, JPEG."""
    data = pytest.importorskip('skimage.data')
    photos = [Image.fromarray(getattr(data, name)()) for name in ('astronaut', 'chelsea', 'coffee', 'rocket', 'cat')]
    places, made = np.random.default_rng(0), []
    for number in range(count):
        label = number % len(CLASSES)
        photo = photos[label // 2]
        x, y = (int(places.integers(0, side // 2 - 60)) + label % 2 * side // 2 for side in photo.size)
        content = io.BytesIO()
        photo.crop((x, y, x + 60, y + 60)).resize((40, 44)).save(content, 'JPEG')
        made.append((f'{number:03}.JPEG', label, content.getvalue()))
    return made


@pytest.fixture(scope='module')
def pictures() -> list[tuple[str, int, bytes]]:
    return photographs(COUNT)


@pytest.fixture(scope='module')
def data(pictures, tmp_path_factory) -> Path:
    """The same images as a folder, an archive, WebDataset shards, and parquet."""
    root = tmp_path_factory.mktemp('data')
    order = sorted(CLASSES)
    for name, label, content in pictures:
        path = root / 'folder' / 'val' / CLASSES[label] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (root / 'val.tar.xz').write_bytes(lzma.compress(
        Path(shutil.make_archive(str(root / 'val'), 'tar', root / 'folder')).read_bytes(), preset=0))
    (root / 'shards').mkdir()
    for shard in range(5):  # more than one per process, with different numbers of images
        with tarfile.open(root / 'shards' / f'val-{shard}.tar', 'w') as archive:
            for name, label, content in pictures[shard ** 2 * 6:min((shard + 1) ** 2 * 6, COUNT)]:
                for ending, part in (('jpg', content), ('cls', str(order.index(CLASSES[label])).encode())):
                    info = tarfile.TarInfo(f'{name[:3]}.{ending}')
                    info.size = len(part)
                    archive.addfile(info, io.BytesIO(part))
    return root


@pytest.fixture(scope='module')
def parquet(pictures, data) -> Path:
    datasets = pytest.importorskip('datasets')
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=sorted(CLASSES))})
    rows = [{'image': {'bytes': content, 'path': name}, 'label': CLASSES[label]} for name, label, content in pictures]
    (data / 'parquet').mkdir()
    for part in range(3):
        datasets.Dataset.from_list(rows[part::3], features=features).to_parquet(
            data / 'parquet' / f'validation-{part:05}-of-00003.parquet')
    return data / 'parquet'


def tensors_of(pictures, size: int) -> torch.Tensor:
    """The network's input, made one by one by timm's transform without its collation and prefetching."""
    cfg = timm.get_pretrained_cfg(NANO)
    transform = create_transform((3, size, size), interpolation=cfg.interpolation, crop_pct=cfg.crop_pct,
                                 mean=cfg.mean, std=cfg.std)
    return torch.stack([transform(Image.open(io.BytesIO(content)).convert('RGB')) for _, _, content in pictures])


@pytest.fixture(scope='module')
def classifier(pictures) -> nn.Module:
    """A random network whose head uses the mean features of half of each class's images."""
    torch.manual_seed(0)
    model = timm.create_model(NANO, num_classes=len(CLASSES))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    images = tensors_of(pictures, 32)
    with torch.no_grad():
        model.train()(images)
        features = model.eval().forward_head(model.forward_features(images), pre_logits=True)
        means = torch.stack([features[label:COUNT // 2:len(CLASSES)].mean(0) for label in range(len(CLASSES))])
        model.fc.weight.copy_(means - means.mean(0))
        model.fc.bias.copy_((means.mean(0).square().sum() - means.square().sum(1)) / 2)
    return model


@pytest.fixture(scope='module')
def large_checkpoint(classifier, tmp_path_factory) -> Path:
    """The same network with all of ImageNet's classes, five of which always win unless they are excluded."""
    path = tmp_path_factory.mktemp('large') / 'large.pth'
    state = classifier.state_dict()
    rows = [IMAGENET.index(name) for name in CLASSES]
    weight, bias = torch.zeros(1000, state['fc.weight'].shape[1]), torch.full((1000,), -1e4)
    weight[rows], bias[rows] = state['fc.weight'], state['fc.bias']
    bias[500:505] = 1e4
    torch.save({**state, 'fc.weight': weight, 'fc.bias': bias}, path)
    return path


@pytest.fixture(scope='module')
def checkpoint(classifier, tmp_path_factory) -> Path:
    """A checkpoint as saved by scripts/train.py, for the ten classes in their own order."""
    path = tmp_path_factory.mktemp('run') / 'last.pt'
    torch.save({'model': classifier.state_dict(), 'ema': None, 'model_name': NANO,
                'model_kwargs': {}, 'num_classes': len(CLASSES), 'class_names': CLASSES,
                'recipe': {'img_size': 64, 'eval_size': 32}}, path)
    return path


@pytest.fixture(scope='module')
def expected(pictures, classifier) -> dict[str, int]:
    """Counts of a plain loop."""
    with torch.no_grad():
        order = torch.cat([classifier(image[None]) for image in tensors_of(pictures, 32)]).argsort(1, descending=True)
    places = [order[i].tolist().index(label) for i, (_, label, _) in enumerate(pictures)]
    return {'num_images': COUNT, 'top1_correct': sum(place < 1 for place in places),
            'top5_correct': sum(place < 5 for place in places)}


def counts_of(results: dict) -> dict[str, int]:
    return {key: results[key] for key in ('num_images', 'top1_correct', 'top5_correct')}


def validate(*arguments: object) -> int:
    return main([str(argument) for argument in (*arguments, '--device', 'cpu')])


def kinds_of_data(data: Path, parquet: Path) -> dict[str, list[str]]:
    return {
        'folder': ['--data-dir', f'{data / "folder"}'],
        'archive': ['--data-dir', f'{data / "val.tar"}'],
        'compressed': ['--data-dir', f'{data / "val.tar.xz"}'],
        'shards': ['--dataset', 'wds/', '--data-dir', f'{data / "shards"}', '--split', f'val-{{0..4}}.tar|{COUNT}'],
        'parquet': ['--dataset', f'hfds/{parquet}', '--data-dir', f'{data / "cache"}'],
        'stream': ['--dataset', f'hfids/{parquet}', '--data-dir', f'{data / "cache"}', '--num-samples', f'{COUNT}'],
    }


def test_the_test_can_tell_something(expected):
    assert 0.3 * COUNT < expected['top1_correct'] < expected['top5_correct'] < COUNT


@pytest.mark.parametrize('kind', ['folder', 'archive', 'compressed', 'shards', 'parquet', 'stream'])
@pytest.mark.parametrize('workers', [0, 2])
def test_every_kind_of_data_gives_the_counts_of_a_plain_loop(
        kind, workers, data, parquet, checkpoint, expected, tmp_path, capfd):
    pytest.importorskip('webdataset')
    batch_size = {0: 7, 2: 64}[workers]
    # in shards the labels are indices of the sorted classes
    ordered = sorted_checkpoint(checkpoint, tmp_path) if kind == 'shards' else checkpoint
    assert validate('--checkpoint', ordered, *kinds_of_data(data, parquet)[kind], '-j', workers, '-b', batch_size,
                    '--results-file', tmp_path / 'found.json') == 0
    results = json.loads((tmp_path / 'found.json').read_text())
    assert counts_of(results['results'][0]) == expected
    files = {'folder': COUNT, 'archive': COUNT, 'compressed': COUNT, 'parquet': COUNT, 'shards': 5, 'stream': 3}
    assert results['data']['files'] == files[kind]
    if files[kind] == COUNT:
        names = sorted(f'{CLASSES[label]}/{name}' for name, label, _ in photographs(COUNT))
        assert results['data']['names_sha256'] == hashlib.sha256('\n'.join(names).encode()).hexdigest()
    assert (results['data']['bytes'] == sum(len(c) for _, _, c in photographs(COUNT))) == (files[kind] == COUNT)
    assert f'top-1 {100 * expected["top1_correct"] / COUNT:.2f}%' in capfd.readouterr().out


def sorted_checkpoint(checkpoint: Path, folder: Path) -> Path:
    """The same network with sorted, unnamed classes."""
    content = torch.load(checkpoint, weights_only=True)
    order = [CLASSES.index(name) for name in sorted(CLASSES)]
    for key in ('fc.weight', 'fc.bias'):
        content['model'][key] = content['model'][key][order]
    torch.save({**content, 'class_names': []}, folder / 'sorted.pt')
    return folder / 'sorted.pt'


DRIVER = """
import json, runpy, sys
import torch.distributed as dist
dist.init_process_group('gloo')
for arguments in json.load(open(sys.argv[1])):
    sys.argv[1:] = arguments
    try:
        runpy.run_path(%r, run_name='__main__')
    except SystemExit as end:
        assert end.code == 0, (arguments, end.code)
dist.destroy_process_group()
"""


@pytest.mark.parametrize('processes', [2, 3])
def test_several_processes_count_every_image_once(processes, data, parquet, checkpoint, expected, tmp_path):
    pytest.importorskip('webdataset')
    kinds = kinds_of_data(data, parquet)
    ordered = sorted_checkpoint(checkpoint, tmp_path)
    runs = {'folder-1': 1, 'folder-7': 7, 'folder-64': 64, 'archive-7': 7, 'shards-7': 7, 'parquet-64': 64,
            'stream-7': 7}
    commands = [[
        '--checkpoint', str(ordered if name.startswith('shards') else checkpoint), *kinds[name.partition('-')[0]],
        '-b', str(batch_size), '-j', '1' if batch_size == 64 else '0', '--device', 'cpu',
        '--results-file', str(tmp_path / f'{name}.json')] for name, batch_size in runs.items()]
    (tmp_path / 'commands.json').write_text(json.dumps(commands))
    done = run_ranks(processes, ['-c', DRIVER % str(SCRIPT), tmp_path / 'commands.json'])
    assert not any(process.returncode for process in done), done
    found = {name: json.loads((tmp_path / f'{name}.json').read_text()) for name in runs}
    assert {name: counts_of(result['results'][0]) for name, result in found.items()} == dict.fromkeys(runs, expected)
    assert {result['engine']['processes'] for result in found.values()} == {processes}
    assert done[0].stdout.count('top-1') == len(runs)
    for process in done[1:]:  # only the first process prints
        assert (process.stdout, f'{COUNT} images in 10 classes' in process.stderr) == ('', False)
    assert done[0].stderr.count(f'{COUNT} images in 10 classes') == len(runs) - 1  # not for a stream
    calibration = {result['results'][0]['calibration_error'] for result in found.values()}
    assert max(calibration) - min(calibration) < 0.01


def test_the_report(data, checkpoint, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(data)
    torch.backends.cuda.matmul.allow_tf32 = True
    output = tmp_path / 'report'
    assert validate('--checkpoint', checkpoint, '--data-dir', 'folder', '--precision', 'float32', 'bfloat16', '-j', 0,
                    '--output', output, '--results-file', tmp_path / 'all.csv', '--channels-last') == 0
    results = json.loads((output / 'results.json').read_text())
    first, second = results['results']
    assert counts_of(first) == expected
    assert second['difference']['from'] == 'float32'
    assert abs(second['difference']['top1']) < 10
    assert first['top1_interval'][0] < first['top1'] < first['top1_interval'][1]
    assert f'--data-dir folder --precision float32 bfloat16 -j 0 --output {output}' in results['command']
    assert results['data']['data_dir'] == 'folder'
    assert results['preprocessing']['input_size'] == [3, 32, 32]
    assert any('Resize(size=32' in step for step in results['preprocessing']['steps'])
    assert results['engine']['allow_tf32'] is torch.backends.cuda.matmul.allow_tf32 is False
    assert results['weights']['sha256'] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert results['commit'] == git_commit()
    assert results['images_per_second'] == pytest.approx(COUNT / results['seconds'], rel=0.01)
    assert {'timm', 'torch', 'pillow'} <= set(results['software'])
    with (output / 'per_class.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [row['wnid'] for row in rows] == CLASSES
    assert sum(int(row['top1_correct']) for row in rows) == expected['top1_correct']
    with (output / 'confused_pairs.csv').open() as file:
        assert sum(int(row['count']) for row in csv.DictReader(file)) == COUNT - expected['top1_correct']
    for name in ('reliability.png', 'per_class.png'):
        with Image.open(output / name) as plot:
            assert plot.format == 'PNG'
            assert len(plot.convert('RGB').getcolors(2 ** 24)) > 10
    with (tmp_path / 'all.csv').open() as file:
        summary, = csv.DictReader(file)
    assert (summary['model'], summary['img_size']) == (NANO, '32')
    assert int(summary['top1_correct']) == expected['top1_correct']
    assert float(summary['top5_low']) < float(summary['top5']) < float(summary['top5_high'])
    told = capsys.readouterr()
    assert re.search(r'from float32: top-1 [+-]\d.*, top-5 .*; \d+ top-1 predictions differ, scores by', told.out)
    assert told.err.splitlines()[0] == '97 images in 10 classes, 9 to 10 in each.'


def test_it_runs_in_any_thread(data, checkpoint):
    with ThreadPoolExecutor() as threads:  # only the main thread may handle signals
        done = threads.submit(validate, '--checkpoint', checkpoint, '--data-dir', data / 'folder', '-j', 0)
    assert done.result() == 0


def test_the_progress_bar(data, checkpoint, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, 'stderr', terminal)
    every_step = {'mininterval': 0, 'miniters': 1}
    monkeypatch.setattr(progress, 'tqdm', lambda **options: tqdm(**{**options, **every_step}))
    assert validate('--checkpoint', checkpoint, '--data-dir', data / 'folder', '-j', 0, '-b', 50) == 0
    assert re.search(r'geoprior_resnet14_nano: 100%.* 97/97 \[\d\d:\d\d<\d\d:\d\d, .*images/s\]', terminal.getvalue())


@pytest.mark.parametrize('options', [[], ['--channels-last'], ['--torchcompile', 'eager']])
def test_layout_and_compiler_are_as_asked_and_give_the_same_counts(
        options, data, checkpoint, expected, tmp_path, monkeypatch):
    layouts, backends = set(), []
    compiler = torch.compile

    def note(module, inputs, output):
        if isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1:
            tensors = (inputs[0], module.weight)
            layouts.add(all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors))

    def compile_noted(model, backend):
        backends.append(backend)
        return compiler(model, backend=backend)

    monkeypatch.setattr(torch, 'compile', compile_noted)
    hook = nn.modules.module.register_module_forward_hook(note) if '--torchcompile' not in options else None
    try:
        assert validate('--checkpoint', checkpoint, '--data-dir', data / 'folder', '-j', 0, '-b', COUNT, *options,
                        '--results-file', tmp_path / 'found.json') == 0
    finally:
        if hook:
            hook.remove()
    assert counts_of(json.loads((tmp_path / 'found.json').read_text())['results'][0]) == expected
    assert (layouts, backends) == ({bool(options)} if hook else set(), options[1:])


def test_a_subset_of_the_classes(data, large_checkpoint, expected, tmp_path, capsys):
    arguments = ['--model', NANO, '--checkpoint', large_checkpoint, '--num-classes', 1000, '--img-size', 32,
                 '--data-dir', data / 'folder', '-j', 0, '--results-file', tmp_path / 'found.json']
    assert validate(*arguments, '--subset') == 0
    assert '10 classes are in both, of 10 in the data and 1000 in the model' in capsys.readouterr().err
    results = json.loads((tmp_path / 'found.json').read_text())
    assert counts_of(results['results'][0]) == expected
    assert results['classes']['competing'] == sorted(IMAGENET.index(name) for name in CLASSES)
    assert validate(*arguments) == 0
    assert json.loads((tmp_path / 'found.json').read_text())['results'][0]['top5_correct'] == 0
    assert "10 of the model's 1000 classes have images here" in capsys.readouterr().err


def test_images_of_unknown_classes_are_left_out(pictures, data, checkpoint, expected, tmp_path, capsys):
    shutil.copytree(data / 'folder', tmp_path / 'more')
    (tmp_path / 'more' / 'val' / 'n00000001').mkdir()
    (tmp_path / 'more' / 'val' / 'n00000002').mkdir()
    (tmp_path / 'more' / 'val' / 'n00000001' / 'x.jpg').write_bytes(pictures[0][2])
    arguments = ['--checkpoint', checkpoint, '--data-dir', tmp_path / 'more', '-j', 0,
                 '--results-file', tmp_path / 'found.json']
    assert validate(*arguments) == 1
    told = capsys.readouterr().err
    assert 'The model does not have 1 of the 11 classes (n00000001)' in told
    assert 'Folders without images: n00000002.' in told
    assert not (tmp_path / 'found.json').exists()
    assert validate(*arguments, '--subset') == 0
    assert counts_of(json.loads((tmp_path / 'found.json').read_text())['results'][0]) == expected


def test_real_labels(pictures, classifier, large_checkpoint, tmp_path, capsys):
    """By labels of the test: each image's second and third best class, but none for one image and the best for one."""
    (tmp_path / 'flat').mkdir()
    for number, (_, _, content) in enumerate(pictures[:12], 1):
        (tmp_path / 'flat' / f'ILSVRC2012_val_{number:08}.JPEG').write_bytes(content)
    with torch.no_grad():
        best = classifier(tensors_of(pictures[:12], 32)).argsort(1, descending=True)
    truth = [[IMAGENET.index(CLASSES[label]) for label in row[1:3].tolist()] for row in best]
    truth[3], truth[4] = [], [IMAGENET.index(CLASSES[int(best[4, 0])])]
    (tmp_path / 'real.json').write_text(json.dumps(truth + [[]] * (50_000 - 12)))
    state = torch.load(large_checkpoint, weights_only=True)
    state['fc.bias'][500:505] = -1e4
    torch.save(state, tmp_path / 'large.pth')
    arguments = ['--model', NANO, '--checkpoint', tmp_path / 'large.pth', '--num-classes', 1000, '--img-size', 32,
                 '-j', 0, '-b', 5, '--data-dir', tmp_path / 'flat', '--results-file', tmp_path / 'found.json']
    assert validate(*arguments, '--real-labels', tmp_path / 'real.json') == 0
    results = json.loads((tmp_path / 'found.json').read_text())
    assert counts_of(results['real_labels']) == {'num_images': 11, 'top1_correct': 1, 'top5_correct': 11}
    assert results['results'][0]['num_images'] == 12
    assert 'of 11 with ReaL labels' in capsys.readouterr().out
    assert validate(*arguments, '--real-labels') == 0  # those in timm
    assert json.loads((tmp_path / 'found.json').read_text())['real_labels']['num_images'] == 11
    capsys.readouterr()
    victim = tmp_path / 'flat' / 'ILSVRC2012_val_00000002.JPEG'
    content = bytearray(victim.read_bytes())
    table = content.index(b'\xff\xc4')  # of the Huffman codes: header and end stay valid
    content[table + 4:table + 24] = b'\xff' * 20
    victim.write_bytes(content)
    assert validate(*arguments, '--real-labels', tmp_path / 'real.json') == 1
    assert counts_of(json.loads((tmp_path / 'found.json').read_text())['real_labels']) == {
        'num_images': 10, 'top1_correct': 1, 'top5_correct': 10}
    told = capsys.readouterr()
    assert 'of 10 with ReaL labels' in told.out
    assert '1 of 12 images could not be decoded and were left out: ILSVRC2012_val_00000002.JPEG' in told.err
    (tmp_path / 'real.json').write_text(json.dumps([[]] * 50_000))
    assert validate(*arguments, '--real-labels', tmp_path / 'real.json') == 1
    assert 'ReaL         no figure   of 0 with ReaL labels' in capsys.readouterr().out
    assert json.loads((tmp_path / 'found.json').read_text())['real_labels']['top1'] is None


def break_pixels(content: bytes) -> bytes:
    """A PNG file of this image with a valid header and end, but invalid data."""
    made = io.BytesIO()
    Image.open(io.BytesIO(content)).save(made, 'PNG')
    broken = bytearray(made.getvalue())
    broken[200:260] = bytes(60)
    return bytes(broken)


@pytest.mark.parametrize('workers', [0, 2])
def test_unreadable_images_are_listed_before_the_pass(workers, data, checkpoint, tmp_path, capfd):
    shutil.copytree(data / 'folder', tmp_path / 'set')
    victims = sorted((tmp_path / 'set').rglob('*.JPEG'))[::40]
    for path in victims:
        path.write_bytes(path.read_bytes()[:-50])
    assert validate('--checkpoint', checkpoint, '--data-dir', tmp_path / 'set', '-j', workers,
                    '--results-file', tmp_path / 'found.json') == 1
    told = capfd.readouterr()
    assert f'3 of {COUNT} images cannot be read' in told.err
    for path in victims:
        assert f'\n  {path.parent.name}/{path.name}: image file is truncated' in told.err
    assert told.out == ''
    assert not (tmp_path / 'found.json').exists()


def test_an_image_that_fails_in_the_pass_is_told_and_not_counted(data, checkpoint, tmp_path, capfd):
    shutil.copytree(data / 'folder', tmp_path / 'set')
    victim = sorted((tmp_path / 'set').rglob('*.JPEG'))[5]
    victim.with_suffix('.png').write_bytes(break_pixels(victim.read_bytes()))
    victim.unlink()
    assert validate('--checkpoint', checkpoint, '--data-dir', tmp_path / 'set', '-j', 2,
                    '--results-file', tmp_path / 'found.json') == 1
    name = f'{victim.parent.name}/{victim.stem}.png'
    assert f'1 of {COUNT} images could not be decoded and were left out: {name}' in capfd.readouterr().err
    results = json.loads((tmp_path / 'found.json').read_text())
    assert results['results'][0]['num_images'] == COUNT - 1
    assert len(results['problems']) == 1


def test_a_stream_that_loses_images_is_told(data, checkpoint, tmp_path, capfd):
    pytest.importorskip('webdataset')
    arguments = ['--checkpoint', sorted_checkpoint(checkpoint, tmp_path), '--dataset', 'wds/', '--data-dir',
                 data / 'shards', '-j', 1]
    assert validate(*arguments, '--split', f'val-{{0..3}}.tar|{COUNT}') == 1
    assert f'must have {COUNT} images, got 96' in capfd.readouterr().err


@pytest.fixture
def with_figure(checkpoint, expected, tmp_path):
    """A manifest whose nano tag has the hash and figure of this checkpoint."""
    whole = load_manifest()
    labels = replace(whole.label_sets['tin200'], num_classes=10, classes={name: name for name in CLASSES})
    metric = Metric('Photographs', 'val', COUNT, expected['top1_correct'], expected['top5_correct'], 'float32', 32)

    def make(**changes):
        entry = replace(planned(), num_classes=10, sha256=hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
                        metrics=(replace(metric, **changes),))
        content = replace(whole, label_sets={**whole.label_sets, 'tin200': labels},
                          models={**whole.models, entry.name: entry})
        (tmp_path / 'manifest.json').write_text(to_json(content))
        return using_manifest(tmp_path / 'manifest.json')

    return make


@pytest.mark.parametrize(('changes', 'options', 'code', 'message'), [
    ({}, [], 0, 'top-1 in float32 is +0.0000 points'),
    ({'top1_correct': -1}, [], 1, 'The check failed: top-1 in float32 is'),
    ({'top1_correct': +1}, [], 1, 'The check failed: top-1 in float32 is -1.0309 points'),
    ({'top5_correct': -1}, [], 1, 'The check failed: top-5 in float32 is +1.0309 points'),
    ({'top1_correct': -1}, ['--tolerance', '1.1'], 0, 'within 1.1'),
    ({'num_images': 10_000}, [], 1, 'is for Photographs val with 10,000 images, got 97'),
    ({}, ['--precision', 'bfloat16'], 1, 'has no figure of geoprior_resnet14_nano.r64_tin200 for bfloat16 at 32 px'),
])
def test_the_check_against_the_manifest(
        changes, options, code, message, with_figure, data, checkpoint, expected, capsys):
    changes = {key: expected[key] + value if abs(value) == 1 else value for key, value in changes.items()}
    with with_figure(**changes):
        assert validate('--model', NANO, '--checkpoint', checkpoint, '--data-dir', data / 'folder', '-j', 0, '--check',
                        *options) == code
    told = capsys.readouterr()
    assert message in told.out + told.err


def test_without_a_check_another_set_is_told(with_figure, data, checkpoint, capsys):
    with with_figure(num_images=10_000):
        assert validate('--model', NANO, '--checkpoint', checkpoint, '--data-dir', data / 'folder', '-j', 0) == 0
    assert "These 97 images are not the set that the manifest's figure is for: Photographs val, 10,000 images." in (
        capsys.readouterr().err)


def test_a_sweep(hub, staged, data, tmp_path, capsys):
    """A tag that fits, one whose weights are gone, one that has other classes."""
    published = put_on(hub, staged)
    gone = replace(published, revision='0' * 40, name=f'{NANO}.gone_tin200', default=False)
    other = replace(published, label_set='letters', name=f'{NANO}.x_letters', default=False, num_classes=2)
    whole = load_manifest()
    letters = LabelSet('Letters', 'owner/letters', 'manifest', 2, {'a': 'A', 'b': 'B'}, name='letters')
    (tmp_path / 'manifest.json').write_text(to_json(replace(
        whole, label_sets={**whole.label_sets, 'letters': letters},
        models={**whole.models, **{entry.name: entry for entry in (published, gone, other)}})))
    images = sorted((data / 'folder').rglob('*.JPEG'))
    for wnid in whole.label_sets['tin200'].wnids[:3]:
        (tmp_path / 'set' / wnid).mkdir(parents=True)
        shutil.copy(images.pop(), tmp_path / 'set' / wnid)
    with using_manifest(tmp_path / 'manifest.json'):
        assert validate('--tag', 'all', '--data-dir', tmp_path / 'set', '-j', 0, '--output', tmp_path / 'out') == 1
    told = capsys.readouterr()
    assert f'{gone.name} failed: The weights of {gone.name}' in told.err
    assert f'{other.name} is skipped' in told.err
    assert told.out.startswith(f'{published.name}: ')
    assert [folder.name for folder in (tmp_path / 'out').iterdir()] == [published.name]


def renamed(data: Path, root: Path, names: dict[str, str]) -> Path:
    """The images with other names for their class folders."""
    for old, new in names.items():
        shutil.copytree(data / 'folder' / 'val' / old, root / 'val' / new)
    return root


def test_class_folders_that_can_be_sorted_in_two_ways_are_refused(data, checkpoint, expected, tmp_path, capsys):
    """torchvision's ImageFolder, with which the network was trained, sorts 10 before 2; timm sorts 2 before 10."""
    by_character = sorted(str(number) for number in range(1, 11))
    folder = renamed(data, tmp_path / 'set', dict(zip(sorted(CLASSES), by_character, strict=True)))
    arguments = ['--checkpoint', sorted_checkpoint(checkpoint, tmp_path), '--data-dir', folder, '-j', 0,
                 '--results-file', tmp_path / 'found.json']
    assert validate(*arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert 'class 1 is 2 in natural order (timm), 10 by character (ImageFolder)' in error
    assert '--class-map' in error
    content = torch.load(sorted_checkpoint(checkpoint, tmp_path), weights_only=True)
    torch.save({'state_dict': content['model'], 'class_names': by_character}, tmp_path / 'named.pt')
    assert validate('--model', NANO, '--checkpoint', tmp_path / 'named.pt', '--img-size', 32, *arguments[2:]) == 0
    assert counts_of(json.loads((tmp_path / 'found.json').read_text())['results'][0]) == expected
    (tmp_path / 'order.txt').write_text('\ufeff' + '\n'.join(by_character) + '\n\n', encoding='utf-8')
    assert validate(*arguments, '--class-map', tmp_path / 'order.txt') == 0
    assert counts_of(json.loads((tmp_path / 'found.json').read_text())['results'][0]) == expected


ODD_NAMES = ['$_$', 'a$^$b', '猫', 'قطة', '😀', os.fsdecode(b'caf\xe9'), 'naïve', '𓃠', '한국어', 'x']


def test_classes_of_any_name_are_measured_and_drawn(data, checkpoint, expected, tmp_path):
    folder = renamed(data, tmp_path / 'set', dict(zip(CLASSES, ODD_NAMES, strict=True)))
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, 'class_names': ODD_NAMES}, tmp_path / 'odd.pt')
    assert validate('--checkpoint', tmp_path / 'odd.pt', '--data-dir', folder, '-j', 0, '--output', tmp_path / 'o') == 0
    results = json.loads((tmp_path / 'o' / 'results.json').read_text(encoding='utf-8'))
    assert counts_of(results['results'][0]) == expected
    with (tmp_path / 'o' / 'per_class.csv').open(encoding='utf-8') as file:
        assert [row['wnid'] for row in csv.DictReader(file)] == [
            name.replace('\udce9', r'\udce9') for name in ODD_NAMES]
    assert {path.name for path in (tmp_path / 'o').glob('*.png')} == {'reliability.png', 'per_class.png'}


@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere Python does not report who sent a signal')
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_group_ends_it_with_one_sentence(number, data, checkpoint, tmp_path):
    shutil.copytree(data / 'folder', tmp_path / 'set')
    first, second = (sorted((tmp_path / 'set').rglob('*.JPEG'))[place] for place in (0, 64))  # of two workers' batches
    for path in (first, second):
        path.unlink()
        os.mkfifo(path)
    with Program(
            [SCRIPT, '--checkpoint', checkpoint, '--data-dir', tmp_path / 'set', '-j', '2', '--device', 'cpu',
             '--results-file', tmp_path / 'found.json'], start_new_session=True) as process:
        with first.open('wb'), second.open('wb'):  # both workers wait for these images
            os.killpg(process.pid, number)
        done = process.finish()
    assert done.returncode == 128 + number
    assert done.stderr.splitlines()[-1] == (
        f'validate.py: stopped by {number.name}. Unfinished results are not written.')
    assert 'Traceback' not in done.stderr
    assert (done.stdout, (tmp_path / 'found.json').exists()) == ('', False)


def test_a_missing_checkpoint_is_told_before_any_image_is_looked_at(data, tmp_path, capsys):
    assert validate('--checkpoint', tmp_path / 'no.pt', '--data-dir', data / 'folder', '-j', 0) == 1
    error, = capsys.readouterr().err.splitlines()
    assert error == f'timm-geoprior validate: The checkpoint {tmp_path}/no.pt does not exist. Check its path.'


def test_a_model_without_weights_is_refused_before_any_image_is_looked_at(data, capsys):
    assert validate('--model', 'geoprior_resnet101.paper_in1k', '--data-dir', data / 'folder', '-j', 0) == 1
    error, = capsys.readouterr().err.splitlines()
    assert error == ('timm-geoprior validate: geoprior_resnet101.paper_in1k has no weights yet. Name a file of weights '
                     'with --checkpoint, or another model: `timm-geoprior list` shows those that have some.')


def test_images_without_a_class_are_not_taken_for_the_last_one(pictures, checkpoint, tmp_path, capsys):
    """As in test sets on the Hub, whose labels are -1."""
    datasets = pytest.importorskip('datasets')
    for labels, code in (([-1] * 6, 1), ([-1, -1, 0, 1, 2, 3], 0)):
        features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=sorted(CLASSES))})
        rows = [{'image': {'bytes': content, 'path': name}, 'label': label}
                for (name, _, content), label in zip(pictures, labels, strict=False)]
        place = tmp_path / f'set{code}'
        place.mkdir()
        datasets.Dataset.from_list(rows, features=features).to_parquet(place / 'validation-00000-of-00001.parquet')
        assert validate('--checkpoint', checkpoint, '--dataset', f'hfds/{place}', '--data-dir', tmp_path / 'cache',
                        '-j', 0, '--results-file', tmp_path / 'found.json') == code
    assert 'None of the 6 images has a class of the model' in capsys.readouterr().err
    assert json.loads((tmp_path / 'found.json').read_text())['results'][0]['num_images'] == 4


def test_what_is_missing_of_ilsvrc_is_told_and_written(pictures, large_checkpoint, tmp_path, capsys):
    (tmp_path / 'flat').mkdir()
    for number, (_, _, content) in enumerate(pictures[:3], 1):
        (tmp_path / 'flat' / f'ILSVRC2012_val_{number:08}.JPEG').write_bytes(content)
    assert validate('--model', NANO, '--checkpoint', large_checkpoint, '--num-classes', 1000, '--img-size', 32, '-j', 0,
                    '--data-dir', tmp_path / 'flat', '--results-file', tmp_path / 'found.json') == 0
    note = '147 of the 150 validation images of ILSVRC in these classes are missing: ILSVRC2012_val_'
    assert note in capsys.readouterr().err
    assert json.loads((tmp_path / 'found.json').read_text())['data']['notes'][0].startswith(note)


def test_shards_that_hold_less_than_they_say(data, checkpoint, tmp_path, capsys):
    pytest.importorskip('webdataset')
    assert validate('--checkpoint', sorted_checkpoint(checkpoint, tmp_path), '--dataset', 'wds/', '--data-dir',
                    data / 'shards', '--split', 'val-{0..3}.tar|97', '-j', 0) == 1
    assert 'must have 97 images, got 96' in capsys.readouterr().err


@pytest.mark.skipif(not TIN200_VAL.exists(), reason='needs the validation images of Tiny-ImageNet-200')
@pytest.mark.parametrize('tag', [  # the large network takes six minutes
    pytest.param(name, marks=[] if entry.architecture == NANO.split('.')[0] else pytest.mark.slow)
    for name, entry in load_manifest().models.items() if (entry.status, entry.label_set) == ('bundled', 'tin200')])
def test_bundled_weights_reproduce_the_figure_of_the_manifest(tag):
    fast = ['-b', 16, '--channels-last']  # a batch fits into a CPU's cache
    assert validate('--tag', tag, '--data-dir', TIN200_VAL, '-j', 2, '--check', *fast) == 0


@pytest.mark.parametrize(('processors', 'workers'), [(2, 2), (64, 4), (None, 1)])
def test_no_more_workers_than_processors(processors, workers, monkeypatch):
    monkeypatch.setattr('os.cpu_count', lambda: processors)
    assert parse_arguments(['--model', NANO]).workers == workers


@pytest.mark.parametrize(('arguments', 'message'), [
    ([], 'nothing to measure'),
    (['--tag', 'x', '--checkpoint', 'y'], '--tag measures the weights of the tag'),
    (['--model', NANO, '--amp', '--precision', 'float32'], '--amp and --precision'),
    (['--model', NANO, '--check', '--crop-pct', '0.9'], 'Leave out --crop-pct'),
    (['--model', NANO, '-b', '0'], '--batch-size must be 1 or more, got 0'),
    (['--model', NANO, '--precision', 'float8'], 'invalid choice'),
    (['--model', NANO, '--input-size', '3', '0', '64'], 'of 1 or more, got [3, 0, 64]'),
    (['--model', NANO, '--crop-pct', '0'], '--crop-pct must be from 0.01 to 1, got 0.0'),
    (['--model', NANO, '--crop-pct', '1e-9'], '--crop-pct must be from 0.01 to 1, got 1e-09'),
    (['--model', NANO, '--check', '--model-kwargs', 'attn_kernel=laplacian'], 'Leave out --model-kwargs'),
    (['--model', NANO, '--check', '--input-size', '3', '32', '64'], 'Leave out --input-size'),
    (['--model', NANO, '--check', '--tolerance', 'nan'], '--tolerance must be 0 or more, got nan'),
    (['--model', NANO, '--std', '0'], '--std must be finite and above 0, got 0.0'),
    (['--model', NANO, '--mean', '0.5', 'nan', '0.5'], '--mean must be finite, got 0.5 nan 0.5'),
    (['--model', NANO, '--model-kwargs', 'attn_heads'], '--model-kwargs must be KEY=VALUE, got attn_heads'),
    (['--model', NANO, '--torchcompile', 'nosuch'], '--torchcompile must be a backend of torch'),
])
def test_wrong_commands(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        validate(*arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_scores_that_are_not_finite_are_a_fault(data, checkpoint, tmp_path, capsys):
    content = torch.load(checkpoint, weights_only=True)
    content['model']['fc.bias'][0] = float('nan')
    torch.save(content, tmp_path / 'nan.pt')
    assert validate('--checkpoint', tmp_path / 'nan.pt', '--data-dir', data / 'folder', '-j', 0) == 1
    assert f'{COUNT} images have scores that are not finite in float32, and count as wrong' in capsys.readouterr().err


def test_weights_that_are_no_fractions(data, checkpoint, tmp_path, capsys):
    content = torch.load(checkpoint, weights_only=True)
    content['model']['conv1.0.weight'] = content['model']['conv1.0.weight'].long()
    torch.save(content, tmp_path / 'whole.pt')
    assert validate('--checkpoint', tmp_path / 'whole.pt', '--data-dir', data / 'folder', '-j', 0) == 1
    assert 'must be floating-point numbers, got torch.int64 in conv1.0.weight.' in capsys.readouterr().err


def test_a_checkpoint_that_says_nonsense_of_itself(data, checkpoint, tmp_path, capsys):
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, 'model_kwargs': {3: 2}}, tmp_path / 'odd.pt')
    assert validate('--checkpoint', tmp_path / 'odd.pt', '--data-dir', data / 'folder', '-j', 0) == 1
    assert "got an unexpected keyword argument '3'). Check the name and its options." in capsys.readouterr().err
    torch.save({**content, 'recipe': {'img_size': 'large'}}, tmp_path / 'odd.pt')
    assert validate('--checkpoint', tmp_path / 'odd.pt', '--data-dir', data / 'folder', '-j', 0) == 0


def test_images_that_are_not_square(data, checkpoint, tmp_path, capsys):
    assert validate('--checkpoint', checkpoint, '--data-dir', data / 'folder', '-j', 0, '--input-size', 3, 32, 48) == 0
    assert 'images at 32 x 48 px, ' in capsys.readouterr().out


def test_only_results_are_replaced(data, checkpoint, tmp_path, capsys):
    run = tmp_path / 'run'
    run.mkdir()
    (run / 'results.json').write_text('{"epochs": 3, "results": 5}')  # from training
    options = ['--checkpoint', checkpoint, '--data-dir', data / 'folder', '-j', 0]
    for more in (['--output', run], ['--results-file', run / 'results.json'], ['--results-file', checkpoint]):
        assert validate(*options, *more) == 1
        assert 'must be a new file or earlier results' in capsys.readouterr().err
    assert (run / 'results.json').read_text() == '{"epochs": 3, "results": 5}'
    other = tmp_path / 'other' / 'per_class.csv'
    other.parent.mkdir()
    other.write_text('of another program')
    assert validate(*options, '--output', other.parent) == 1
    assert 'other, which has another per_class.csv. Name another with --output.' in capsys.readouterr().err
    assert [path.read_text() for path in other.parent.iterdir()] == ['of another program']
    for name in ('a.csv', 'a.json'):
        for _ in range(2):
            assert validate(*options, '--results-file', tmp_path / name, '--output', tmp_path / 'out') == 0


@pytest.mark.parametrize(('program', 'command'), [
    (['scripts/validate.py'], 'python scripts/validate.py'),
    (['/bin/timm-geoprior', 'validate'], 'timm-geoprior validate'),
    (['a_sweep.py', '--all'], 'timm-geoprior validate')])
def test_the_command_that_is_recorded_can_be_repeated(program, command, data, checkpoint, tmp_path, monkeypatch):
    arguments = ['--checkpoint', str(checkpoint), '--data-dir', str(data / 'folder'), '-j', '0', '--device', 'cpu',
                 '--results-file', str(tmp_path / 'found.json')]
    monkeypatch.setattr(sys, 'argv', program if 'sweep' in program[0] else [*program, *arguments])
    assert main(arguments) == 0
    assert json.loads((tmp_path / 'found.json').read_text())['command'] == f'{command} {shlex.join(arguments)}'


def test_a_mean_for_two_of_three_channels(data, checkpoint, capsys):
    assert validate('--checkpoint', checkpoint, '--data-dir', data / 'folder', '-j', 0, '--mean', '1', '2') == 1
    assert '--mean and --std must have one number, or one for each channel of the images.' in capsys.readouterr().err


@pytest.mark.parametrize(('arguments', 'message'), [
    (['--data-dir', 'missing'], 'missing does not exist'),
    ([], 'No data to read'),
    (['--data-dir', '.', '--device', 'cuda:99'], '--device'),
    (['--data-dir', '.', '--device', 'gpu'], '--device gpu cannot be used'),
    (['--data-dir', '.', '--dataset', 'tfds/x'], '--dataset must begin with torch/, wds/, hfds/, hfids/, got tfds/x'),
    (['--data-dir', '.', '--dataset', 'wds/', '--split', 'val'], 'cannot be opened'),
    (['--dataset', 'hfids/PARQUET'], 'Dataset length is unknown'),
    (['--data-dir', 'folder', '--model', 'nosuch'], 'Unknown model'),
    (['--data-dir', 'folder', '--model', 'geoprior_resnet101.paper_in1k'], 'has no weights'),
    (['--data-dir', 'folder', '--results-file', 'missing/x.csv'], 'missing does not exist'),
    (['--data-dir', 'folder', '--results-file', 'folder'], '--results-file must be a file, got the folder folder'),
    (['--data-dir', 'folder', '--output', 'val.tar'], 'val.tar cannot be created'),
    (['--data-dir', 'folder', '--output', 'folder/val/results'], 'must lie outside the folder of the images'),
    (['--data-dir', 'folder', '--class-map', 'val.tar', '--results-file', 'val.tar'],
     'val.tar must be a new file or earlier results, got another file or a read-only place. Name another with'),
    (['--data-dir', 'folder', '--model', NANO, '--model-kwargs', 'attn_heads=2'],
     'size mismatch for layer2.0.conv2.attn.log_radius'),
    (['--data-dir', 'folder', '--model', NANO, '--input-size', '4', '64', '64', '--subset'],
     'The model must take images of one or three channels, got geoprior_resnet14_nano, which takes 4.'),
    (['--data-dir', 'folder', '--real-labels'], "all of ImageNet-1k's classes"),
    (['--data-dir', 'folder', '--model-kwargs', 'drop_rate=2'],
     'The model cannot be run on images of 3 x 32 x 32 (dropout probability has to be between 0 and 1, but got 2.0).'),
    (['--data-dir', 'folder', '--check', '--model', 'resnet50'], 'The model must be one of geoprior_'),
    (['--data-dir', 'folder', '--tag', '*paper*'], 'must match a tag that has weights'),
])
def test_what_cannot_be_done_is_one_sentence(arguments, message, data, parquet, checkpoint, monkeypatch, capsys):
    monkeypatch.chdir(data)
    arguments = [argument.replace('PARQUET', str(parquet)) for argument in arguments]
    chosen = [] if '--model' in arguments or '--tag' in arguments else ['--checkpoint', str(checkpoint)]
    device = [] if '--device' in arguments else ['--device', 'cpu']
    assert main([*chosen, *arguments, *device, '-j', '0']) == 1
    told = capsys.readouterr()
    assert message in told.err.splitlines()[-1]
    assert told.err.splitlines()[-1].startswith('timm-geoprior validate: ')
    assert told.out == ''


def test_too_little_memory_is_one_sentence(photo_folder, monkeypatch, capsys):
    monkeypatch.setattr('timm_geoprior.evaluation.measure.open_split', lambda *args, **kwargs: np.ones(2 ** 55))
    assert main(['--model', 'geoprior_resnet14_nano', '--data-dir', str(photo_folder), '--split', 'val']) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        'timm-geoprior validate: There is not enough memory. Use a smaller --batch-size, fewer --workers, or another '
        'device.')
