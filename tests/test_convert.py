"""`timm-geoprior convert`, as a user calls it: what the folder holds, what loads it, and what is rejected."""
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import PHOTOGRAPHS
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from programs import Program, run
from releases import planned
from timm_geoprior.cli import main
from timm_geoprior.conversion import job, state_dict
from timm_geoprior.conversion.closed_form import fit_layer
from timm_geoprior.conversion.images import draw_images
from timm_geoprior.conversion.state_dict import convert_state_dict
from timm_geoprior.data.dataset import open_split
from timm_geoprior.evaluation.models import load_model
from timm_geoprior.release.staging import stage
from timm_geoprior.training.checkpoint import read_weights

COMMAND = ['-m', 'timm_geoprior', 'convert']


def convert(*arguments: object, code: int = 0) -> None:
    assert main(['convert', '--device', 'cpu', '-j', '0', *map(str, arguments)]) == code


@pytest.fixture(scope='session')
def converted(checkpoint: Path, photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, converted and fitted to the photographs. Do not modify."""
    output = tmp_path_factory.mktemp('converted') / 'nano'
    convert(checkpoint, '-o', output, '--images', photo_folder / 'train')
    return output


def test_without_images_it_is_the_closed_form(checkpoint, tmp_path, capsys):
    convert(checkpoint, '-o', tmp_path / 'new' / 'closed')
    source = load_model(None, checkpoint).model
    model = timm.create_model(f'local-dir:{tmp_path}/new/closed', pretrained=True)
    expected = convert_state_dict(source.state_dict(), timm.create_model(
        'geoprior_resnet14_nano', pretrained_cfg_overlay={'input_size': (3, 64, 64)}))
    assert all(torch.equal(value, expected[name].float()) for name, value in model.float().state_dict().items())
    out = capsys.readouterr().out
    assert 'layer4.0        24' in out
    assert 'Nothing was measured: there were no images.' in out
    results = json.loads((tmp_path / 'new' / 'closed' / 'results.json').read_text())
    assert 'measured' not in results
    assert [0 < layer['lost'] < 1 for layer in results['layers']] == [True] * 3
    assert 'closed form, without images' in (tmp_path / 'new' / 'closed' / 'README.md').read_text()


def test_the_folder_says_where_it_is_from(converted, checkpoint):
    assert sorted(path.name for path in converted.iterdir()) == [
        'README.md', 'config.json', 'model.safetensors', 'results.json']
    results = json.loads((converted / 'results.json').read_text())
    assert results['source']['checkpoint'] == str(checkpoint)
    assert len(results['source']['sha256']) == len(results['source']['state_dict_sha256']) == 64
    assert results['images']['fit']['files'] == results['images']['fit']['images'] == 38
    assert results['images']['held_out']['files'] == 10
    assert len(results['images']['fit']['names_sha256']) == 64
    assert results['software']['timm'] == timm.__version__
    assert results['source']['license'] is None  # a checkpoint states none
    text = (converted / 'README.md').read_text()
    assert '38 images' in text
    assert 'On 10 images that it was not fitted to' in text


def test_what_is_measured_is_what_the_folder_gives(converted, checkpoint, photo_folder):
    measured = json.loads((converted / 'results.json').read_text())['measured']
    data = open_split(photo_folder / 'train', '')
    source, model = load_model(None, checkpoint), load_model(f'local-dir:{converted}')
    assert model.wnids == source.wnids == PHOTOGRAPHS
    data.dataset.transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model.model))
    held_out = draw_images(photo_folder / 'train', 1000).held_out
    images, labels = zip(*(data.dataset[int(index)] for index in held_out), strict=True)
    with torch.inference_mode():
        old, new = (network.model(torch.stack(images)) for network in (source, model))
    assert measured['agree'] == int((old.argmax(1) == new.argmax(1)).sum())
    assert measured['labelled'] == measured['images'] == 10
    assert measured['source_correct'] == int((old.argmax(1) == torch.tensor(labels)).sum())
    assert measured['correct'] == int((new.argmax(1) == torch.tensor(labels)).sum())
    divergence = nn.functional.kl_div(new.log_softmax(1), old.log_softmax(1), reduction='batchmean', log_target=True)
    assert measured['divergence'] == pytest.approx(float(divergence), rel=1e-3)
    assert 0 < measured['feature_error'] < 0.3


def test_every_command_takes_the_folder(converted, photo_folder, tmp_path, capsys):
    name = f'local-dir:{converted}'
    image = photo_folder / 'val' / 'coffee' / '00.jpg'
    assert main(['classify', '--model', name, str(image)]) == 0
    out = capsys.readouterr().out
    assert all(label in out for label in PHOTOGRAPHS)
    assert main(['validate', '--model', name, '--data-dir', str(photo_folder), '--split', 'val', '-j', '0']) == 0
    assert '20 images at 64 px' in capsys.readouterr().out
    tuned = ['finetune', str(photo_folder), '--model', name, '--output', str(tmp_path / 'tuned')]
    assert main([*tuned, '--set', 'epochs=1', '-j', '0', '--device', 'cpu']) == 0
    assert timm.create_model(f'local-dir:{tmp_path}/tuned', pretrained=True).num_classes == 4


def test_transformers_takes_the_folder(converted, photo_folder):
    transformers = pytest.importorskip('transformers')
    model = transformers.AutoModelForImageClassification.from_pretrained(converted).eval()
    prepare = transformers.AutoImageProcessor.from_pretrained(converted)
    photo = Image.open(photo_folder / 'val' / 'coffee' / '00.jpg')
    plain = timm.create_model(f'local-dir:{converted}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(plain))
    with torch.no_grad():
        torch.testing.assert_close(model(**prepare(photo)).logits, plain(transform(photo)[None]))
    assert list(model.config.id2label.values()) == list(PHOTOGRAPHS)


def test_the_weights_are_staged(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model('geoprior_resnet14_nano', value_dims=(0, 0, 0, 0), zero_init_last=False)
    torch.save({'model': source.state_dict(), 'model_name': 'geoprior_resnet14_nano',
                'model_kwargs': {'value_dims': [0, 0, 0, 0]}, 'num_classes': 200}, tmp_path / 'plain.pt')
    convert(tmp_path / 'plain.pt', '-o', tmp_path / 'out')
    entry = stage(planned(), read_weights(tmp_path / 'out' / 'model.safetensors'), tmp_path / 'staged')
    assert entry.status == 'staged'
    assert timm.create_model(f'local-dir:{tmp_path}/staged', pretrained=True).num_classes == 200


def test_half_precision_keeps_vectors(checkpoint, photo_folder, tmp_path):
    convert(checkpoint, '-o', tmp_path / 'half', '--half', '--images', photo_folder / 'train')
    for tensor in load_file(tmp_path / 'half' / 'model.safetensors').values():
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.float32 if tensor.ndim < 2 else torch.float16)
    assert json.loads((tmp_path / 'half' / 'results.json').read_text())['measured']['agree'] >= 8


def test_images_need_no_classes(checkpoint, photo_folder, tmp_path, capsys):
    flat = tmp_path / 'flat'
    flat.mkdir()
    for path in photo_folder.glob('train/*/*.jpg'):
        shutil.copy(path, flat / f'{path.parent.name}-{path.name}')
    convert(checkpoint, '-o', tmp_path / 'out', '--images', flat, '--limit', 20)
    assert 'Fitting to 20 images at 64 px' in capsys.readouterr().out
    measured = json.loads((tmp_path / 'out' / 'results.json').read_text())['measured']
    assert 'agree' in measured
    assert 'labelled' not in measured


def test_images_of_other_classes_are_compared_without_them(checkpoint, photo_folder, tmp_path):
    shutil.copytree(photo_folder / 'train', tmp_path / 'images')
    (tmp_path / 'images' / 'rocket').rename(tmp_path / 'images' / 'spaceship')
    convert(checkpoint, '-o', tmp_path / 'out', '--images', tmp_path / 'images')
    measured = json.loads((tmp_path / 'out' / 'results.json').read_text())['measured']
    kept_out = draw_images(tmp_path / 'images', 1000)
    rockets = sum(kept_out.data.class_of(index) == 'spaceship' for index in kept_out.held_out)
    assert measured['images'] == 10
    assert measured['labelled'] == 10 - rockets < 10


def test_unreadable_images_are_left_out_and_told(checkpoint, photo_folder, tmp_path, capsys):
    images = shutil.copytree(photo_folder / 'train', tmp_path / 'images')
    for path in images.glob('*/03.jpg'):
        path.write_bytes(path.read_bytes()[:200])
    (images / 'coffee' / '03.jpg').unlink()
    (images / 'coffee' / '03.jpg').symlink_to('nowhere')
    convert(checkpoint, '-o', tmp_path / 'out', '--images', images)
    text = capsys.readouterr().out
    assert '4 of 48 images could not be read and were left out, such as astronaut/03.jpg.' in text
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert results['images']['unreadable'] == [f'{name}/03.jpg' for name in PHOTOGRAPHS]
    fit, held_out = (results['images'][name]['images'] for name in ('fit', 'held_out'))
    assert (fit + held_out, held_out) == (44, results['measured']['images'])
    assert f'least squares on {fit} images' in (tmp_path / 'out' / 'README.md').read_text()


def test_a_batch_of_unreadable_images_only(checkpoint, photo_folder, tmp_path):
    """Nine of the eleven images are used for fitting, each as a batch."""
    images = shutil.copytree(photo_folder / 'train' / 'astronaut', tmp_path / 'images')
    (images / '11.jpg').unlink()
    for number in range(3):
        (images / f'{number:02}.jpg').write_bytes(b'no image')
    convert(checkpoint, '-o', tmp_path / 'out', '--images', images)
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert results['images']['unreadable'] == ['00.jpg', '01.jpg', '02.jpg']
    assert results['measured']['feature_error'] < 0.5


def test_a_network_without_a_classifier(tmp_path, photo_folder):
    torch.manual_seed(0)
    source = timm.create_model('resnet14t', num_classes=0, zero_init_last=False)
    save_file(source.state_dict(), tmp_path / 'backbone.safetensors')
    convert(tmp_path / 'backbone.safetensors', '--model', 'resnet14t', '-o', tmp_path / 'out')
    model = timm.create_model(f'local-dir:{tmp_path}/out', pretrained=True)
    assert model.num_classes == 0


@pytest.mark.parametrize(('options', 'num_classes'), [
    ({'global_pool': 'catavgmax'}, 4), ({'global_pool': ''}, 0), ({'in_chans': 1, 'global_pool': 'max'}, 4)])
def test_the_folder_has_the_pooling_and_the_channels_of_the_source(options, num_classes, photo_folder, tmp_path):
    torch.manual_seed(0)
    options = {**options, 'channels': [16, 32, 32, 48]}
    source = timm.create_model('resnet14t', num_classes=num_classes, zero_init_last=False, **options)
    torch.save({'model': source.state_dict(), 'model_name': 'resnet14t', 'model_kwargs': options,
                'num_classes': num_classes}, tmp_path / 'source.pt')
    convert(tmp_path / 'source.pt', '-o', tmp_path / 'out', '--images', photo_folder / 'train')
    model = timm.create_model(f'local-dir:{tmp_path}/out', pretrained=True).eval()
    assert model.global_pool.pool_type == options['global_pool']
    channels = options.get('in_chans', 3)
    config = timm.data.resolve_model_data_config(model)
    assert (config['input_size'][0], len(config['mean']), len(config['std'])) == (channels, channels, channels)
    images = torch.randn(2, channels, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        old, new = source.eval()(images), model(images)
    assert old.shape == new.shape
    assert (new - old).norm() < 0.3 * old.norm()
    assert json.loads((tmp_path / 'out' / 'results.json').read_text())['measured']['feature_error'] < 0.3


def test_the_closed_form_is_told_on_one_thread(checkpoint, tmp_path, monkeypatch):
    """Two threads take many times as long for its small matrix products."""
    counts, threads = [], torch.get_num_threads()

    def fit(*args):
        counts.append(torch.get_num_threads())
        return fit_layer(*args)

    monkeypatch.setattr(state_dict, 'fit_layer', fit)
    try:
        torch.set_num_threads(2)
        convert(checkpoint, '-o', tmp_path / 'out')
    finally:
        torch.set_num_threads(threads)
    assert counts == 6 * [1]  # three layers are fitted to convert them, and again to report them


@pytest.mark.parametrize('output', ['dangling', 'link', 'missing/../there'])
def test_the_output_may_be_behind_links(output, checkpoint, tmp_path):
    (tmp_path / 'dangling').symlink_to('there')
    (tmp_path / 'link').symlink_to('empty')
    (tmp_path / 'empty').mkdir()
    convert(checkpoint, '-o', tmp_path / output)
    place = tmp_path / ('empty' if output == 'link' else 'there')
    assert (place / 'README.md').read_text().startswith(f'# {place.name}\n')


def test_the_current_folder_is_not_replaced(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    convert(checkpoint, '-o', '.', code=1)
    assert '. must be a new or an empty folder, got the current one.' in capsys.readouterr().err
    (tmp_path / 'volume').mkdir()
    monkeypatch.setattr('os.path.ismount', lambda place: Path(place).name == 'volume')
    convert(checkpoint, '-o', 'volume', code=1)
    assert 'volume must be a new or an empty folder, got a mount point.' in capsys.readouterr().err


@pytest.mark.parametrize('option', ['--output', '--images'])
def test_a_path_of_a_variable_that_is_not_set(option, checkpoint, tmp_path, capsys):
    arguments = {'--output': str(tmp_path / 'out'), option: ''}
    assert main(['convert', str(checkpoint), *(part for pair in arguments.items() for part in pair)]) == 2
    assert capsys.readouterr().err == (
        f'timm-geoprior: An argument must not be empty, got one after {option}. Is a shell variable not set?\n')
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != 'linux', reason='other file systems reject such names')
def test_names_that_are_not_utf_8(checkpoint, photo_folder, tmp_path, capsys):
    root = tmp_path / os.fsdecode(b'caf\xe9')
    root.mkdir()
    shutil.copy(checkpoint, root / os.fsdecode(b'\xff.pt'))
    shutil.copytree(photo_folder / 'train', root / 'images')
    (root / 'images' / os.fsdecode(b'\xfe.jpg')).write_bytes(b'no image')
    source = root / os.fsdecode(b'\xff.pt')
    convert(source, '-o', tmp_path / 'out', '--images', root / 'images')
    assert 'caf\\udce9/\\udcff.pt`' in (tmp_path / 'out' / 'README.md').read_text()
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert (results['source']['checkpoint'], results['images']['unreadable']) == (str(source), ['\udcfe.jpg'])
    convert(source, '-o', root / 'out', code=1)
    assert 'must be a path in UTF-8, since safetensors cannot open any other' in capsys.readouterr().err
    assert not (root / 'out').exists()


OTHER_NETWORKS = {
    'basic': ('resnet18', {}), 'groups': ('resnet26', {'cardinality': 2}),
    'attention': ('resnet26', {'block_args': {'attn_layer': 'se'}}),
    'group norms': ('resnet26', {'norm_layer': 'groupnorm'}),
    'weighted': ('resnet26', {'act_layer': 'prelu'}), 'four channels': ('resnet26', {'in_chans': 4}),
}


@pytest.fixture
def source_of_timm(tmp_path: Path) -> Path:
    """A bare state dict of timm's resnet14t with ten classes."""
    torch.manual_seed(0)
    save_file(timm.create_model('resnet14t', num_classes=10).state_dict(), tmp_path / 'r14.safetensors')
    return tmp_path / 'r14.safetensors'


@pytest.mark.parametrize(('source', 'options', 'message'), [
    ('resnet18', [], 'No pretrained weights|resnet18'),
    ('resnetblur18', [], 'The model resnetblur18 cannot be created (No pretrained weights exist for resnetblur18'),
    ('no_such_net', [], 'The model no_such_net cannot be created (Unknown model'),
    ('missing.pt', [], 'The checkpoint missing.pt does not exist. Check its path.'),
    ('runs/missing', [], 'The checkpoint runs/missing does not exist. Check its path.'),
    ('r14', [], 'does not name its architecture'),
    ('r14', ['--model', 'resnet26'], 'do not fit resnet26'),
    ('r14', ['--model', 'resnet18'], 'do not fit resnet18'),
    ('geoprior_resnet14_nano', [], 'geoprior_resnet14_nano must be a plain ResNet, got a GeoPrior ResNet'),
    ('nano', ['--images', 'nowhere'], '--images must be a folder of images, got nowhere, which does not exist. Check'),
    ('nano', ['--images', 'empty'], 'empty must hold at least 10 images, got none (empty has no images). Add some'),
    ('nano', ['--images', 'few'], 'few must hold at least 10 images, got 3. Add some, name another folder or'),
    ('nano', ['--images', 'broken'], 'Most images must be readable, got 6 of 10 that are not, such as '),
    ('nano', ['--images', 'photos', '--limit', '5'], '--limit must be at least 10, got 5.'),
    ('nano', ['--output', 'full'], 'full must be a new or an empty folder, got one that is not empty. Name'),
    ('nano', ['--output', 'r14.safetensors'], 'must be a new or an empty folder, got a file. Name another'),
    ('nano', ['--output', 'r14.safetensors/out'], 'must be a folder that can be made, got '),
    ('nano', ['--workers', '-1', '--images', 'photos'], '--workers must be 0 or more, got -1.'),
    ('basic', [], 'resnet18 must be a ResNet of bottleneck blocks with plain 3x3 convolutions and batch norms, got a'),
    ('groups', [], 'got a convolution of 2 groups in layer1.0. Use another source, such as resnet50.'),
    ('attention', [], 'got channel attention (SEModule) in layer1.0. Use another source, such as resnet50.'),
    ('group norms', [], 'got a GroupNorm in layer1.0. Use another source, such as resnet50.'),
    ('weighted', [], 'must have activations without weights, got PReLU in layer2.0. Use another act_layer.'),
    ('four channels', ['--images', 'photos'], '--images must be left out for a network of 4 channels, got photos'),
    ('nano', ['--images', 'r14.safetensors'], 'r14.safetensors must hold at least 10 images, got none (r14.s'),
    ('nano', ['--output', '.'], '. must be a new or an empty folder, got one that is not empty. Name another'),
    ('nano', ['--output', 'x' * 300], 'x must be a folder that can be made, got | could not be written (['),
    ('x' * 300, [], 'xxx cannot be created (Unknown model'),
    ('x' * 300 + '.pt', [], 'xxx.pt does not exist. Check its path.'),
    ('nan', [], 'Weights to be converted must be finite'),
    ('nan elsewhere', [], 'Weights to be converted must be finite, got inf or nan in layer2.0.bn1.running_var.'),
    ('large', ['--half'], 'fc.weight must be finite as torch.float16, got some that are not. Leave out --half.'),
    ('infinite', ['--images', 'photos'], 'The activations at the input of the first attention layer must be finite'),
])
def test_bad_input_is_one_sentence_and_nothing_is_written(
        source, options, message, checkpoint, photo_folder, source_of_timm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sources = {'r14': source_of_timm, 'nano': checkpoint}
    for name in ('nan', 'nan elsewhere', 'large', 'infinite'):
        state = torch.load(checkpoint, weights_only=True)
        key, value = {'nan': ('layer2.0.bn1.bias', float('nan')), 'infinite': ('bn1.bias', 1e6),
                      'nan elsewhere': ('layer2.0.bn1.running_var', float('nan')), 'large': ('fc.weight', 1e5)}[name]
        state['model'][key].fill_(value)
        torch.save(state, tmp_path / f'{name}.pt')
        sources[name] = tmp_path / f'{name}.pt'
    if source in OTHER_NETWORKS:
        name, changes = OTHER_NETWORKS[source]
        shape = {'layers': [1, 1, 1, 1], 'channels': [32, 32, 32, 32], **changes}
        state = timm.create_model(name, num_classes=2, **shape).state_dict()
        torch.save({'model': state, 'model_name': name, 'model_kwargs': shape, 'num_classes': 2}, 'other.pt')
        sources[source] = 'other.pt'
    shutil.copytree(photo_folder / 'train', 'photos')
    for name, count in (('empty', 0), ('few', 3), ('broken', 12), ('full', 1)):
        Path(name).mkdir()
        for number in range(count):
            shutil.copy(photo_folder / 'train' / 'coffee' / f'{number:02}.jpg', name)
    for path in Path('broken').iterdir():
        path.write_bytes(b'no image')
    before = sorted(str(path) for path in tmp_path.rglob('*'))
    output = [] if '--output' in options else ['-o', 'out']
    convert(sources.get(source, source), *output, *options, code=1)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('timm-geoprior: ')
    assert any(part in error for part in message.split('|'))
    assert sorted(str(path) for path in tmp_path.rglob('*')) == before


@pytest.mark.skipif(os.name != 'posix', reason='signals and limits of POSIX')
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_leaves_nothing(number, checkpoint, photo_folder, tmp_path):
    with Program([*COMMAND, checkpoint, '-o', 'out', '--images', photo_folder / 'train', '-j', '0'], cwd=tmp_path,
                 env={**os.environ, 'TMPDIR': str(tmp_path)}) as process:
        while 'Fitting' not in (line := process.stdout.readline()):
            assert line, process.errors
        process.send_signal(number)
    assert process.returncode in (-number, 128 + number, 130)
    assert 'Traceback' not in process.errors
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != 'posix', reason='signals of POSIX')
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_killed_while_it_writes_leaves_nothing(number, checkpoint, tmp_path):
    program = (
        'import os\n'
        'from timm_geoprior.conversion import job\n'
        'from timm_geoprior.cli import main\n'
        'write = job._write_model\n'
        'def interrupted(*arguments):\n'
        '    write(*arguments)\n'
        '    print(sorted(os.listdir(arguments[-1])), flush=True)\n'
        f'    os.kill(os.getpid(), {int(number)})\n'
        'job._write_model = interrupted\n'
        f'raise SystemExit(main(["convert", {str(checkpoint)!r}, "-o", "out", "--device", "cpu"]))\n')
    done = run(['-c', program], cwd=tmp_path)
    assert done.returncode == 128 + number
    assert done.stdout.splitlines()[-1] == "['config.json', 'model.safetensors']"
    assert 'Traceback' not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != 'posix', reason='limits of POSIX')
@pytest.mark.parametrize(('kilobytes', 'message'), [
    (100, 'bytes, got File too large. Make room, set TMPDIR, or lower --limit.'),
    (3000, 'out could not be written'),
])
def test_a_full_disk_is_one_sentence(kilobytes, message, checkpoint, photo_folder, tmp_path):
    program = (
        'import resource, sys\n'
        f'resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * {kilobytes}, resource.RLIM_INFINITY))\n'
        'from timm_geoprior.cli import main\n'
        'sys.exit(main(sys.argv[1:]))')
    done = run(['-c', program, 'convert', checkpoint, '-o', 'out', '--images', photo_folder / 'train', '-j', '0'],
               cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_one_sentence(checkpoint, photo_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, 'refine', lambda *arguments: torch.empty(2 ** 60, dtype=torch.uint8))
    convert(checkpoint, '-o', tmp_path / 'out', '--images', photo_folder / 'train', code=1)
    assert capsys.readouterr().err.splitlines()[-1] == (
        'timm-geoprior: There is not enough memory. Use smaller images, a smaller batch, or another device.')
    assert not (tmp_path / 'out').exists()


def test_other_errors_are_shown_whole(checkpoint, photo_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(job, 'refine', lambda *arguments: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match='inconsistent tensor size'):
        convert(checkpoint, '-o', tmp_path / 'out', '--images', photo_folder / 'train', code=1)
