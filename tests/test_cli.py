"""The command line, as a user calls it."""
import contextlib
import doctest
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import timm_geoprior
from programs import Program, run
from releases import as_mere_mortal, finish, start
from timm_geoprior import GeoPriorAttn2d, cli
from timm_geoprior.cli import main
from timm_geoprior.data.reading import read_image
from timm_geoprior.errors import out_of_memory
from timm_geoprior.inference.classifier import load_classifier
from timm_geoprior.inference.inputs import sample_image
from timm_geoprior.pretrained.manifest import ManifestError, default_model, load_manifest, manifest_path

MODELS, TAGS = load_manifest().models, load_manifest().tags
WITH_WEIGHTS = [name for name, entry in MODELS.items() if entry.status == 'bundled']
PLANNED = [name for name, entry in MODELS.items() if entry.status == 'planned']
COMMAND = ['-m', 'timm_geoprior']
SMALL = ['--model', 'geoprior_resnet14_nano']  # the default network takes 60 times longer


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / 'coffee.png'
    sample_image().save(path)
    return str(path)


real = partial(subprocess.run, capture_output=True, text=True)


def output(capsys, *arguments, code=0):
    """Run a command in this process, and return its stdout and stderr."""
    assert main(list(arguments)) == code
    return capsys.readouterr()


def test_list_names_every_tag(capsys):
    lines = output(capsys, 'list').out.partition('\n\n')[0].splitlines()
    assert len(lines) == 1 + len(TAGS)
    for line, entry in zip(lines[1:], TAGS.values(), strict=True):
        name, *rest = line.replace(' *', '', int(entry.default)).split()
        assert (name, rest[0]) == (entry.name, entry.status)
        assert f'{entry.parameters:,}' in line
        assert all(f'{metric.top1:.2f}' in line for metric in entry.metrics[:1])


@pytest.mark.parametrize('name', PLANNED)
def test_a_data_set_has_one_name_everywhere(capsys, name):
    assert MODELS[name].label_set == 'imagenet-1k'  # as in timm; users see the title
    shown = output(capsys, 'list').out + output(capsys, 'list', '--json').out + output(capsys, 'info', name).out
    assert 'ImageNet-1k' in shown
    assert 'imagenet-1k' not in shown


def test_list_json_is_the_manifest(capsys):
    tags = json.loads(output(capsys, 'list', '--json').out)
    assert [tag['name'] for tag in tags] == list(TAGS)
    for tag, entry in zip(tags, TAGS.values(), strict=True):
        assert (tag['status'], tag['parameters'], tag['bytes']) == (entry.status, entry.parameters, entry.bytes)
        assert tag['top1'] == (entry.metrics[0].top1 if entry.metrics else None)


@pytest.mark.parametrize('name', PLANNED)
def test_info_of_a_planned_tag(capsys, name):
    out = output(capsys, 'info', name).out
    assert f'name: {name}' in out
    assert 'status: planned' in out
    assert 'no weights yet' in out


def test_info_of_a_backbone(capsys):
    printed = output(capsys, 'info', 'geoprior_resnet50.from_bamboo', code=1)  # no Hub to read radii from
    assert 'num_classes: 0' in printed.out


@pytest.mark.parametrize('name', WITH_WEIGHTS)
def test_info_shows_each_layers_radius(capsys, name):
    text, _, table = output(capsys, 'info', name).out.rpartition('\n\n')
    assert f'sha256: {MODELS[name].sha256}' in text
    model = timm.create_model(name, pretrained=True).eval()
    layers = {key: module for key, module in model.named_modules() if isinstance(module, GeoPriorAttn2d)}
    rows = table.splitlines()[1:]
    assert len(rows) == len(layers)
    with torch.no_grad():
        maps = {f['module']: f['reduction'] for f in model.feature_info}
    for row, (key, layer) in zip(rows, layers.items(), strict=True):
        stage = key.split('.')[0]
        side = MODELS[name].input.input_size[-1] // (maps[stage] // layer.stride)
        radius = layer.log_radius.exp().item()
        assert row.split() == [key, str(side), 'x', str(side), f'{radius:.3f}', f'{radius / side:.3f}']


def classify(capsys, *arguments, code=0):
    """The JSON lines of `classify`."""
    return [json.loads(line) for line in output(capsys, 'classify', '--json', *arguments, code=code).out.splitlines()]


def test_classify_takes_the_sample_photograph_and_the_default_model(capsys):
    (result,) = classify(capsys)
    assert result['model'] == default_model(load_manifest()).name
    assert [result] == classify(capsys, '--model', result['model'])


def test_the_sample_photograph_is_classified_right(capsys):
    """By the model that a new user sees first, and by a wide margin."""
    first, second, *_ = classify(capsys)[0]['predictions']
    assert first['name'] == 'espresso'
    assert first['probability'] > 0.8 > 100 * second['probability']


@pytest.mark.parametrize('name', WITH_WEIGHTS)
def test_classify_gives_what_timm_gives(capsys, photo, name):
    model = timm.create_model(name, pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    with torch.inference_mode():
        probabilities, classes = model(transform(sample_image())[None]).softmax(-1)[0].topk(5)
    labels = load_manifest().label_sets[MODELS[name].label_set]
    (result,) = classify(capsys, photo, '--model', name)
    assert (result['image'], result['model']) == (photo, name)
    assert [guess['label'] for guess in result['predictions']] == [labels.wnids[index] for index in classes]
    assert [guess['name'] for guess in result['predictions']] == [labels.names[index] for index in classes]
    assert [guess['probability'] for guess in result['predictions']] == pytest.approx(probabilities.tolist())
    lines = output(capsys, 'classify', photo, '--model', name).out.splitlines()
    assert len(lines) == 6
    assert lines[0] == f'{photo} ({name})'
    assert lines[1].split(maxsplit=1) == [f'{probabilities[0]:.1%}', labels.names[classes[0]]]


@pytest.mark.parametrize('mode', ['CMYK', 'P', 'I;16', 'L', 'RGBA', '1x1', '1x900'])
def test_odd_pictures_are_classified(capsys, tmp_path, mode):
    image = sample_image().resize((90, 60))
    if 'x' in mode:
        image = image.resize(tuple(map(int, mode.split('x'))))
    elif mode == 'I;16':
        image = Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    image.save(tmp_path / 'odd.tiff')
    (result,) = classify(capsys, *SMALL, str(tmp_path / 'odd.tiff'))
    assert len(result['predictions']) == 5


def test_a_bad_image_does_not_keep_the_others_from_being_classified(capsys, tmp_path, photo):
    bad, odd = tmp_path / 'bad.png', tmp_path / os.fsdecode(b'\xff.png')  # a name that no terminal can print
    bad.write_text('no picture')
    cut = tmp_path / 'cut.png'
    cut.write_bytes(Path(photo).read_bytes()[:-9000])
    (tmp_path / 'empty').mkdir()
    images = [str(bad), photo, str(cut), str(tmp_path / 'empty'), str(odd)]
    got = output(capsys, 'classify', *images, code=1)
    assert len(got.out.splitlines()) == 6
    complaints = got.err.splitlines()
    assert [line.split()[0] for line in complaints] == ['timm-geoprior:'] * 4
    assert 'not an image' in complaints[0]
    assert 'cannot be decoded' in complaints[1]
    assert 'has no images in it' in complaints[2]
    assert 'does not exist' in complaints[3]
    results = classify(capsys, *images, code=1)
    assert [result['image'] for result in results] == images
    assert ['error' in result for result in results] == [True, False, True, True, True]
    assert ['predictions' in result for result in results] == [False, True, False, False, False]


@pytest.fixture(scope='module')
def album(tmp_path_factory):
    """70 crops of the photograph in subfolders, more than two batches, and files that are not images. Do not modify."""
    root = tmp_path_factory.mktemp('album')
    for number in range(70):
        folder = root / 'album' / f'part {number % 3}'
        folder.mkdir(parents=True, exist_ok=True)
        ending = ('jpg', 'PNG', 'webp')[number % 3]
        sample_image().crop((number, 0, number + 400, 400)).resize((96, 96)).save(folder / f'{number:02}.{ending}')
    (root / 'album' / '@eaDir').mkdir()
    for litter in ('@eaDir/00.jpg', '._01.jpg', '.DS_Store'):
        (root / 'album' / litter).write_text('litter')
    (root / 'album' / 'notes.txt').write_text('of the journey')
    return root / 'album'


def test_a_folder_is_classified_in_batches(capsys, album):
    got = output(capsys, 'classify', '--json', '--top', '2', *SMALL, str(album))
    results = [json.loads(line) for line in got.out.splitlines()]
    files = sorted(str(path) for path in album.rglob('*/*.*') if path.parent.name != '@eaDir')
    assert [result['image'] for result in results] == files
    assert got.err == f'timm-geoprior: skipped files that are not images: {album}/notes.txt.\n'
    model = load_classifier(SMALL[1])
    for result in results[::23]:
        alone = model(read_image(result['image']), 2)
        assert [guess['name'] for guess in result['predictions']] == [guess['name'] for guess in alone]
        assert result['predictions'][0]['probability'] == pytest.approx(alone[0]['probability'], rel=1e-4)


def test_linked_folders_are_classified_too(capsys, album, tmp_path):
    folder = tmp_path / 'links'
    folder.mkdir()
    (folder / 'linked').symlink_to(album / 'part 1', target_is_directory=True)
    (folder / 'back').symlink_to(folder, target_is_directory=True)
    (folder / '.hidden').mkdir()
    (folder / '.hidden' / 'root').symlink_to('/', target_is_directory=True)  # not searched
    assert len(classify(capsys, '--top', '1', *SMALL, str(folder))) == 23


@pytest.mark.parametrize('module', [[], ['-m']])
def test_a_script_gets_all_of_its_arguments(tmp_path, module):
    (tmp_path / 'echo_all.py').write_text('import sys; print(sys.argv[1:])')
    target = [*module, 'echo_all' if module else 'echo_all.py']
    done = run([*COMMAND, 'run', *target, '--', '-m', '--', 'run'], cwd=tmp_path, check=True)
    assert done.stdout == "['--', '-m', '--', 'run']\n"


@pytest.mark.parametrize(('pattern', 'count'), [
    ('part 1/*', 23), ('**/*.webp', 23), ('*/0?.jpg', 4), ('part [02]', 47), ('**', 70)])
def test_a_pattern_that_the_shell_has_left(capsys, album, pattern, count):
    assert len(classify(capsys, '--top', '1', *SMALL, str(album / pattern))) == count


def test_a_name_of_brackets_is_a_file_first(capsys, tmp_path):
    sample_image().save(tmp_path / 'photo [1].jpg')
    assert len(classify(capsys, str(tmp_path / 'photo [1].jpg'))) == 1


def test_the_compact_form_is_a_line_for_each_image(capsys, photo):
    (result,) = classify(capsys, photo, '--top', '2')
    one, other = (f'{guess["probability"]:.1%} {guess["name"]}' for guess in result['predictions'])
    assert output(capsys, 'classify', '--compact', '--top', '2', photo).out == f'{photo}: {one}; {other}\n'


def test_a_line_break_in_a_name_makes_no_second_line(capsys, tmp_path):
    sample_image().save(tmp_path / 'two\nlines.png')
    (line,) = output(capsys, 'classify', '--compact', *SMALL, str(tmp_path)).out.splitlines()
    assert line.startswith(str(tmp_path / r'two\nlines.png: '))


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """timm's own networks as folders: one with 1,000 classes, whose names timm knows, and one with 7."""
    root = tmp_path_factory.mktemp('models')
    for num_classes in (1000, 7):
        model = timm.create_model('resnet10t', num_classes=num_classes)
        timm.models.save_for_hf(model, root / str(num_classes))
    return root


def test_any_model_whose_classes_have_names(capsys, folders, photo):
    (result,) = classify(capsys, '--model', f'local-dir:{folders / "1000"}', '--top', '1000', photo)
    names = {guess['label']: guess['name'] for guess in result['predictions']}
    assert len(names) == 1000
    assert names['n07920052'] == 'espresso'
    assert f'{folders / "7"}, which has none. Use it from Python' in output(
        capsys, 'classify', photo, '--model', f'local-dir:{folders / "7"}', code=1).err


def test_a_downloaded_folder_knows_the_ids_of_its_classes(capsys, tmp_path, photo):
    output(capsys, 'download', 'geoprior_resnet14_nano', str(tmp_path / 'made'))
    (folder,) = (tmp_path / 'made').iterdir()
    known, found = (classify(capsys, '--model', name, photo)[0]['predictions']
                    for name in ('geoprior_resnet14_nano', f'local-dir:{folder}'))
    assert found == known


@pytest.mark.parametrize('command', ['classify', 'validate'])
def test_an_unknown_tag_is_told(capsys, tmp_path, photo, command):
    given = [photo] if command == 'classify' else ['--data-dir', str(tmp_path)]
    told = output(capsys, command, *given, '--model', 'resnet50.nonsense', code=1).err
    assert 'The model must have a tag that timm knows, got resnet50.nonsense (Invalid pretrained tag' in told
    assert "timm.list_pretrained('resnet50*') lists the known ones." in told


@pytest.mark.parametrize(('arguments', 'words'), [
    (['nowhere.jpg'], 'nowhere.jpg does not exist'), (['*.nothing'], 'does not exist'), (['.'], 'has no images in it'),
    (['notes.txt'], 'notes.txt is not an image'), (['--device', 'nothing', 'photo.png'], 'nothing'),
    (['--device', 'cuda:9', 'photo.png'], 'got cuda:9, and torch finds no GPU'),
])
def test_arguments_are_looked_at_before_a_model_is_loaded(capsys, tmp_path, monkeypatch, photo, arguments, words):
    from timm_geoprior.inference import classifier

    loaded = []
    monkeypatch.setattr(classifier, 'load_model', loaded.append)
    folder = tmp_path / 'folder'
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / 'notes.txt').write_text('words')
    if 'photo.png' in arguments:
        shutil.copy(photo, folder / 'photo.png')
    got = output(capsys, 'classify', *arguments, code=1)
    assert words in got.err.splitlines()[-1]
    assert got.out == ''
    assert not loaded


@pytest.mark.parametrize('top', ['0', '-1', 'many', '1.5'])
def test_top_is_a_number(capsys, top):
    with pytest.raises(SystemExit) as stop:
        main(['classify', f'--top={top}'])
    assert stop.value.code == 2
    assert f"argument --top: must be an integer of at least 1, got '{top}'" in capsys.readouterr().err


def test_results_come_one_by_one_and_a_bar_shows_how_far_it_is(album):
    """The bar is shown only on a terminal, here a real one; the lines go to a pipe."""
    terminal, end = os.openpty()
    termios.tcsetwinsize(end, (24, 80))
    with Program([*COMMAND, 'classify', '--compact', *SMALL, album], stderr=end) as process:
        os.close(end)
        lines = process.stdout.readlines()
        shown = b''
        while chunk := _read(terminal):
            shown += chunk
    assert len(lines) == 70
    assert process.returncode == 0
    assert b'/70 [' in shown
    plain = run([*COMMAND, 'classify', '--compact', *SMALL, album])
    assert plain.stdout.splitlines() == [line.rstrip('\n') for line in lines]
    assert 'image/s' not in plain.stderr


def _read(terminal):
    try:
        return os.read(terminal, 65536)
    except OSError:  # how Linux reports that the other end is closed
        return b''


def test_a_missing_extra_names_its_cure(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'skimage', None)
    assert 'pip install scikit-image' in output(capsys, 'classify', code=1).err


@pytest.mark.parametrize(('package', 'arguments'), [
    ('scipy', ['finetune', '.']),
    ('scipy', ['validate', '--model', 'geoprior_resnet14_nano', '--data-dir', '.']),
    ('matplotlib', ['publish', 'geoprior_resnet14_nano.r64_tin200', 'last.pt', '--output', 'staged']),
])
def test_an_extra_that_is_needed_at_the_end_is_missed_at_the_beginning(capsys, monkeypatch, package, arguments):
    monkeypatch.setitem(sys.modules, package, None)
    message = f"This command needs {package}, which is not installed. Run `pip install 'timm-geoprior[train]'`.\n"
    assert output(capsys, *arguments, code=1).err.endswith(message)


@pytest.mark.parametrize(('arguments', 'words'), [
    *((['classify', '--model', name], f'{name} has no weights') for name in PLANNED),
    (['classify', '--model', 'geoprior_resnet51'], 'Did you mean geoprior_resnet50? Check the name.'),
    (['info', 'geoprior_resnet51'], "got 'geoprior_resnet51'"),
    (['run', 'nowhere.py'], 'nowhere.py does not exist'),
    (['run', '-m', 'nowhere.at.all'], 'must be one that `python -m` takes, got nowhere.at.all.'),
    (['run', '-m', 'json.decoder.nowhere'], 'got json.decoder.nowhere.'),
    (['run', '-m', 'xml'], 'got xml.'),
    (['run', '-m', '.json'], 'got .json.'),
    (['train', 'r64_tin200', '--data-dir', '.', '--output', 'x' * 300], 'A file name must be shorter, got xxx'),
    (['run', os.path.dirname(__file__)], 'A folder to run must have a __main__.py'),
])
def test_an_error_is_one_sentence(capsys, arguments, words):
    got = output(capsys, *arguments, code=1)
    assert got.out == ''
    assert got.err.startswith('timm-geoprior train: ' if arguments[0] == 'train' else 'timm-geoprior: ')
    assert words in got.err
    assert got.err.endswith('.\n')
    assert got.err.count('\n') == 1


def _without_capabilities(arguments):
    """The exit code and stderr of the command line, for which permissions count even if it is root's."""
    as_mere_mortal()
    with contextlib.redirect_stderr(io.TextIOWrapper(io.BytesIO())) as err:
        code = main(arguments)
        err.seek(0)
        return code, err.read()


@pytest.mark.skipif(sys.platform != 'linux', reason='drops Linux capabilities')
@pytest.mark.parametrize('arguments', [
    ['train', 'r64_tin200', '--data-dir', 'images', '--output', 'closed/x'],
    ['train', 'r64_tin200', '--data-dir', 'closed/x', '--output', 'out'],
    ['train', 'x.yaml', '--data-dir', 'images', '--output', 'out'],
    ['validate', '--model', 'resnet18', '--data-dir', 'images', '--results-file', 'closed/x'],
    ['validate', '--checkpoint', 'closed/x', '--data-dir', 'images'],
    ['validate', '--checkpoint', 'x.pt', '--data-dir', 'images'],
    ['explain', 'closed/x', '-o', 'x.png'],
    ['classify', 'x.jpg'],
    ['classify', 'closed/x'],
    ['run', 'closed/x'],
    ['run', 'x.py'],
])
def test_what_may_not_be_accessed_is_one_sentence(forkserver, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'images').mkdir()
    for suffix in ('yaml', 'pt', 'jpg', 'py'):
        (tmp_path / f'x.{suffix}').touch(mode=0)
    (tmp_path / 'closed').mkdir(mode=0)
    try:
        (code, err), _ = finish(*start(forkserver, _without_capabilities, arguments))
    finally:
        (tmp_path / 'closed').chmod(0o755)
    assert (code, err.count('\n')) == (1, 1)
    path = next(word for word in arguments if re.fullmatch(r'closed/x|x\.(yaml|pt|jpg|py)', word))
    prog = f'timm-geoprior {arguments[0]}' if arguments[0] in ('train', 'validate') else 'timm-geoprior'
    assert re.match(rf'{prog}: (The checkpoint )?{re.escape(path)}\S* cannot be (accessed|read) ', err)
    assert ' (Permission denied). Check its permissions' in err


@pytest.mark.parametrize('arguments', [['nothing'], ['info'], ['run'], ['list', '--wrong']])
def test_a_wrong_use_is_exit_code_2(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert 'usage: timm-geoprior' in capsys.readouterr().err


def test_the_default_model_is_the_best_of_those_at_hand(tmp_path):
    """The most accurate bundled tag, as measured; without bundled tags, the most accurate published one."""
    data = json.loads(load_manifest().to_json())
    weights = {'file': 'model.safetensors', 'sha256': '0' * 64, 'bytes': 1, 'dtype': 'float16',
               'golden': {'file': 'golden.safetensors', 'sha256': '0' * 64}, 'hub_id': 'a/b', 'revision': '0' * 40}

    def default(**statuses):
        for name, entry in data['models'].items():
            entry.update(weights, status=statuses.get(name.split('.')[0], 'planned'))
        path = tmp_path / f'{len(list(tmp_path.iterdir()))}.json'
        path.write_text(json.dumps(data))
        return default_model(load_manifest(path)).architecture

    assert default(geoprior_resnet50='published', geoprior_resnet14_nano='bundled') == 'geoprior_resnet14_nano'
    assert default(geoprior_resnet50='staged', geoprior_resnet101='published') == 'geoprior_resnet101'
    with pytest.raises(ManifestError, match='must have a bundled or a published tag'):
        default(geoprior_resnet50='staged')
    both = {'geoprior_resnet50': 'bundled', 'geoprior_resnet14_nano': 'bundled'}
    assert default(**both) == 'geoprior_resnet50'  # 67.34%, and 49.19%
    data['models']['geoprior_resnet50.r192_tin200']['metrics'][0].update(top1_correct=4900)
    assert default(**both) == 'geoprior_resnet14_nano'
    data['models']['geoprior_resnet50.r192_tin200']['metrics'] = []
    assert default(**both) == 'geoprior_resnet14_nano'


def test_damaged_weights_are_told(tmp_path):
    copy = tmp_path / 'timm_geoprior'
    shutil.copytree(Path(timm_geoprior.__file__).parent, copy, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(manifest_path(), tmp_path)
    weights = copy / 'pretrained' / 'weights' / f'{default_model(load_manifest()).name}.safetensors'
    weights.write_bytes(weights.read_bytes()[:-1])
    told = run([*COMMAND, 'classify'], cwd=tmp_path)  # `python -m` imports the package from its working directory
    assert told.returncode == 1
    assert told.stdout == ''
    assert told.stderr.count('\n') == 1
    assert re.search(r'must be \d+ bytes, got \d+', told.stderr)


SCRIPT = """
import sys
import timm
model = timm.create_model('geoprior_resnet14_nano')  # this script imports timm alone
print(__name__, sys.argv, type(model).__name__)
import beside
sys.exit(7)
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / 'scripts').mkdir()
    (tmp_path / 'scripts' / 'train.py').write_text(SCRIPT)
    (tmp_path / 'scripts' / 'beside.py').write_text('print("found what lies beside the script")')
    return tmp_path / 'scripts' / 'train.py'


def test_run_cures_unknown_model(script, tmp_path):
    arguments = ['-m', 'x', '--', '--help', '--json']
    cured = run([*COMMAND, 'run', script, *arguments], cwd=tmp_path)
    assert cured.returncode == 7
    assert cured.stdout.splitlines() == [
        f'__main__ {[str(script), *arguments]} GeoPriorResNet', 'found what lies beside the script']


@pytest.fixture
def as_a_process(monkeypatch):
    """Undo the changes that `run` makes to its process."""
    monkeypatch.setattr(sys, 'argv', list(sys.argv))
    monkeypatch.setattr(sys, 'path', list(sys.path))
    monkeypatch.setenv('PYTHONPATH', os.environ.get('PYTHONPATH', ''))


@pytest.mark.usefixtures('as_a_process')
def test_run_module(script, capsys, monkeypatch):
    monkeypatch.chdir(script.parent)
    with pytest.raises(SystemExit) as stop:
        main(['run', '-m', 'train', '--lr', '1'])
    assert stop.value.code == 7
    assert f"{str(script)!r}, '--lr', '1'] GeoPriorResNet" in capsys.readouterr().out


@pytest.mark.usefixtures('as_a_process')
def test_an_error_of_the_script_is_its_own(script, capsys):
    script.write_text('raise ValueError("wrong data")')
    with pytest.raises(ValueError, match='wrong data'):
        main(['run', str(script)])
    script.write_text('raise BrokenPipeError("a worker died")')  # not from a closed stdout
    assert main(['run', str(script)]) == 1
    assert 'BrokenPipeError: a worker died' in capsys.readouterr().err


def test_a_malformed_manifest_is_one_sentence(tmp_path):
    package = tmp_path / 'timm_geoprior'
    shutil.copytree(Path(timm_geoprior.__file__).parent, package)
    text = manifest_path().read_text().replace('"status": "planned"', '"status": "wished for"')
    (package / 'weights_manifest.json').write_text(text)
    listing = run([*COMMAND, 'list'], cwd=tmp_path)
    assert listing.returncode == 1
    assert listing.stdout == ''
    assert re.fullmatch(r"timm-geoprior: .* must be one of .*, got 'wished for'\. Restore .*, or install.* again\.\n",
                        listing.stderr)


def test_a_closed_pipe_is_quiet():
    reader, writer = os.pipe()
    os.close(reader)
    listing = run([*COMMAND, 'list'], stdout=writer)
    os.close(writer)
    assert listing.stderr == ''
    assert listing.returncode == 128 + signal.SIGPIPE


def test_a_long_name_of_a_scripts_own_has_its_traceback(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(f"open('{'y' * 300}', 'w')\n")
    done = run(['-m', 'timm_geoprior', 'run', script])
    assert done.returncode == 1
    assert 'Traceback' in done.stderr
    assert 'script.py' in done.stderr
    script.write_text("import sys\nsys.excepthook = lambda *error: print(error[0].__name__)\nopen('nowhere')\n")
    done = run(['-m', 'timm_geoprior', 'run', script])
    assert (done.returncode, done.stdout, done.stderr) == (1, 'FileNotFoundError\n', '')


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='Linux has a device that is always full')
def test_a_full_disk_is_one_sentence():
    with open('/dev/full', 'w') as full:
        listing = run([*COMMAND, 'list'], stdout=full.fileno())
    assert listing.returncode == 1
    assert listing.stderr == 'timm-geoprior: The output cannot be written (No space left on device). Free some space.\n'


def test_a_network_of_one_channel(photo, tmp_path, capsys):
    model = timm.create_model('geoprior_resnet14_nano', in_chans=1, num_classes=2)
    timm.models.save_for_hf(
        model, tmp_path / 'grey', model_config={'label_names': ['a', 'b']}, model_args={'in_chans': 1})
    (result,) = classify(capsys, '--model', f'local-dir:{tmp_path / "grey"}', photo)
    assert {guess['label'] for guess in result['predictions']} == {'a', 'b'}
    assert main(['explain', photo, '--model', f'local-dir:{tmp_path / "grey"}', '-o', str(tmp_path / 'e.png')]) == 0


def test_a_network_that_does_not_name_its_1000_classes(photo, tmp_path, capsys):
    place = f'local-dir:{tmp_path / "unnamed"}'
    timm.models.save_for_hf(timm.create_model('geoprior_resnet14_nano', num_classes=1000), tmp_path / 'unnamed')
    told = f'timm-geoprior: {place} does not name its 1,000 classes: they are assumed to be those of ImageNet.\n'
    for arguments in (['classify'], ['explain', '-o', str(tmp_path / 'e.png')]):
        assert main([*arguments, '--model', place, photo]) == 0
        assert capsys.readouterr().err == told
    assert main(['classify', '--model', 'geoprior_resnet14_nano', photo]) == 0
    assert capsys.readouterr().err == ''


def test_ctrl_c(tmp_path):
    (tmp_path / 'wait.py').write_text('import signal; print("ready", flush=True); signal.pause()')
    with Program([*COMMAND, 'run', tmp_path / 'wait.py']) as process:
        assert process.stdout.readline() == 'ready\n'
        process.send_signal(signal.SIGINT)
    assert (process.returncode, process.errors) == (130, '')


def test_the_examples_in_docstrings_run():
    from timm_geoprior.inference import classifier

    for module in (timm_geoprior, classifier):
        tested = doctest.testmod(module)
        assert tested.attempted > 1
        assert tested.failed == 0


# -- startup: what is imported when ------------------------------------------------------------------------------------

def python(code, **options):
    """Run code in a new process that has imported nothing yet, and return its stdout."""
    return real([sys.executable, '-c', code], check=True, **options).stdout


@pytest.mark.parametrize('arguments', [
    [], ['--help'], ['--version'], ['classify', '--help'], ['run', '--help'], ['lst'], ['classify', '--wrong'],
    ['info'], ['explain', '--point', 'here'], ['download', 'folder'], ['train', '--help'], ['train', 'r64_tin200'],
    ['train', 'nothing', '--data-dir', 'd', '--output', 'o'], ['validate', '--help'], ['validate'],
    ['validate', '--model', 'x', '--check', '--mean', '1'], ['publish', '--help'], ['publish', 'x', '--dry-run']])
def test_neither_torch_nor_timm_is_imported_for_help_or_a_usage_error(arguments):
    imported = python(
        'import sys\nfrom timm_geoprior.cli import main\n'
        f'try:\n    main({arguments})\nexcept SystemExit:\n    pass\n'
        'print("imported:", sorted({"torch", "timm", "numpy", "huggingface_hub", "PIL"} & set(sys.modules)))')
    assert imported.splitlines()[-1] == 'imported: []'


@pytest.mark.parametrize('command', ['classify', 'explain'])
def test_a_wrong_file_is_told_before_torch_is_imported(command):
    told = python(
        'import sys\nfrom timm_geoprior.cli import main\nsys.stderr = sys.stdout\n'
        f'print(main(["{command}", "nowhere.jpg"]), sorted({{"torch", "timm"}} & set(sys.modules)))')
    assert told.startswith('timm-geoprior: nowhere.jpg does not exist')
    assert told.splitlines()[-1] == '1 []'


def test_commands_with_a_parser_of_their_own(capsys):
    for name in ('train', 'validate', 'publish'):
        with pytest.raises(SystemExit) as stop:
            main([name, '--help'])
        assert stop.value.code == 0
        assert capsys.readouterr().out.startswith(f'usage: timm-geoprior {name} [-h]')
        with pytest.raises(SystemExit) as stop:
            main([name, '--no-such-option'])
        assert stop.value.code == 2
        assert f'timm-geoprior {name}: error:' in capsys.readouterr().err


def test_alone_it_prints_the_help(capsys):
    alone = output(capsys).out
    with pytest.raises(SystemExit) as stop:
        main(['--help'])
    assert stop.value.code == 0
    assert capsys.readouterr().out == alone
    assert alone.startswith('usage: timm-geoprior [-h]')


@pytest.mark.parametrize('arguments', [
    ['classify', '--wrong'], ['list', 'photo.png'], ['info', 'a', 'b'], ['demo', '--port', '1', '--wrong=2'],
    ['explain', 'a.png', 'b.png'], ['doctor', '-v']])
def test_wrong_usage_shows_the_commands_own_usage(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f'usage: timm-geoprior {arguments[0]} [-h]')
    assert f'error: unrecognized arguments: {arguments[-1]}' in told


CREATE = "print(type(timm.create_model('geoprior_resnet14_nano')).__name__, flush=True)"


def test_the_models_are_registered_however_the_two_are_imported():
    imports = [
        'import timm_geoprior; import timm',
        'import timm; import timm_geoprior',
        'import timm_geoprior; from timm.layers import DropPath; import timm',
        'import timm_geoprior.pretrained.manifest; from timm.models import create_model; import timm',
        'import timm_geoprior.errors, timm.optim, timm',
        'from timm_geoprior import GeoPriorConv2d; import timm',
        'import timm_geoprior, importlib.util; importlib.util.find_spec("timm"); import timm',
        'import timm_geoprior, importlib; timm = importlib.import_module("timm")',
        # the modules that define the models, each one before timm
        'import timm_geoprior.layers; import timm',
        'from timm_geoprior.layers import GeoPriorConv2d; import timm',
        'from timm_geoprior.pretrained.loading import load_verified; import timm',
        'import timm_geoprior.geoprior_resnet, timm',
        'from timm_geoprior import layers; import timm; assert layers is sys.modules["timm_geoprior.layers"]',
        'import timm_geoprior.inference.classifier, timm',
    ]
    # the model uses the class that was imported before
    same = ("conv2 = timm.create_model('geoprior_resnet14_nano').layer2[0].conv2;"
            "assert isinstance(conv2, globals().get('GeoPriorConv2d', object))")
    for statements in imports:
        assert run(['-c', f'import sys; {statements}; {CREATE}; {same}']).stdout == 'GeoPriorResNet\n', statements


def test_timm_is_as_if_nothing_had_found_it():
    """The module's loader and source, and the list of finders."""
    look = ('import inspect, sys; print(timm.__loader__ is timm.__spec__.loader, type(timm.__loader__),'
            'inspect.getsource(timm)[:99], [str(finder).split(" at ")[0] for finder in sys.meta_path])')
    assert (run(['-c', f'import timm_geoprior, timm; {look}'], check=True).stdout
            == run(['-c', f'import timm; {look}'], check=True).stdout)


def test_the_package_has_its_names_before_they_are_imported():
    code = ('import timm_geoprior; print(sorted({*timm_geoprior.__all__, "layers"} - set(dir(timm_geoprior))),'
            'timm_geoprior.layers.attention_map.__name__, timm_geoprior.GeoPriorResNet.__module__,'
            'hasattr(timm_geoprior, "nothing"))')
    assert run(['-c', code]).stdout == '[] attention_map timm_geoprior.geoprior_resnet False\n'


def test_a_timm_that_cannot_be_imported_fails_alike_each_time(tmp_path):
    """And not with "Unknown model" the second time."""
    (tmp_path / 'timm.py').write_text('import sys\nraise ImportError("half a timm")')
    code = ('import timm_geoprior\nfor _ in range(2):\n    try:\n        import timm\n'
            '    except ImportError as error:\n        print(error)')
    assert python(code, cwd=tmp_path) == 'half a timm\nhalf a timm\n'


# -- run: child processes ----------------------------------------------------------------------------------------------

CHILDREN = {
    'a grandchild': f"""
import subprocess, sys
grandchild = "import timm; {CREATE}"
child = f'import subprocess, sys; subprocess.run([sys.executable, "-c", {{grandchild!r}}], check=True)'
subprocess.run([sys.executable, '-c', child], check=True)
""",
    'forkserver': f"""
import multiprocessing

def work(number):
    import timm
    {CREATE}

if __name__ == '__main__':
    with multiprocessing.get_context('forkserver').Pool(1) as pool:
        pool.map(work, [0])
""",
    'mp.spawn': f"""
import timm
import torch.multiprocessing as mp

def work(rank):
    {CREATE}

if __name__ == '__main__':
    mp.spawn(work, nprocs=1)
""",
    'torchrun': f"""
import os, sys
import torch.distributed.run
if 'RANK' in os.environ:
    import timm
    {CREATE}
else:
    torch.distributed.run.main(['--standalone', '--nproc-per-node', '1', 'parent.py'])
""",
}


@pytest.mark.parametrize(('kind', 'target'), [
    ('a grandchild', ['parent.py']), ('forkserver', ['-m', 'parent']), ('mp.spawn', ['parent.py']),
    ('torchrun', ['parent.py'])])
def test_run_reaches_child_processes(tmp_path, kind, target):
    (tmp_path / 'parent.py').write_text(CHILDREN[kind])
    done = run([*COMMAND, 'run', *target], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, 'GeoPriorResNet\n'), done.stderr


LOOK = """
import json, os, sys
import sitecustomize
print(json.dumps([sys.path, getattr(sitecustomize, '__file__', None), sorted(sys.modules)]), flush=True)
"""


# flushed at once, so that the order of outputs does not depend on PYTHONUNBUFFERED
SPEAKING = 'print("theirs", flush=True)'


@pytest.mark.parametrize('theirs', [SPEAKING, None, 'raise ValueError("theirs is broken")', 'import nowhere'])
def test_a_sitecustomize_of_theirs_runs_as_without_run(tmp_path, theirs):
    """Path, module, output and errors of a child are the same as without `run`, which adds only few modules."""
    if theirs is not None:
        (tmp_path / 'site').mkdir()
        (tmp_path / 'site' / 'sitecustomize.py').write_text(theirs)
    look = LOOK if theirs == SPEAKING else LOOK.replace('import sitecustomize\n', 'sitecustomize = None\n')
    (tmp_path / 'child.py').write_text(look)
    (tmp_path / 'parent.py').write_text('import subprocess, sys; subprocess.run([sys.executable, "child.py"])')
    inherited = os.pathsep.join([str(tmp_path / 'site'), os.environ.get('PYTHONPATH', ''), ''])  # '': working directory
    options = {'cwd': tmp_path, 'env': {**os.environ, 'PYTHONPATH': inherited}}
    plain = real([sys.executable, 'parent.py'], **options)
    ours = real([sys.executable, *COMMAND, 'run', 'parent.py'], **options)
    assert ours.stderr == plain.stderr
    *before, expected = plain.stdout.splitlines()
    *told, got = ours.stdout.splitlines()
    assert told == before == (['theirs'] * 2 if theirs == SPEAKING else [])
    (path, place, modules), (expected_path, expected_place, expected_modules) = json.loads(got), json.loads(expected)
    assert (path, place) == (expected_path, expected_place)
    assert set(modules) - set(expected_modules) - {'importlib', 'importlib._bootstrap', 'importlib._bootstrap_external',
                                                   'warnings', '_warnings', 'sitecustomize'} == {
        'timm_geoprior', 'timm_geoprior.registration'}


@pytest.mark.parametrize('module', ['pretrained.cfgs', 'pretrained.download', 'conversion.state_dict', 'layers'])
def test_a_module_that_is_imported_before_timm_is_loaded_once(module):
    told = run(['-c', (
        f'import timm_geoprior.{module} as first, inspect, sys\n'
        'modules = [module for name, module in sys.modules.items() if name.startswith("timm_geoprior")]\n'
        f'users = [value for module in modules for value in vars(module).values()\n'
        f'         if getattr(value, "__module__", "") == first.__name__ and hasattr(value, "__code__")]\n'
        'same = all(inspect.unwrap(value).__globals__ is vars(first) for value in users)\n'
        'print(len(users), same, sys.modules[first.__name__] is first)')]).stdout
    count, *same = told.split()
    assert int(count) > 0
    assert same == ['True', 'True']


@pytest.mark.parametrize(('error', 'expected'), [
    (MemoryError(), True), (torch.OutOfMemoryError('CUDA out of memory.'), True),
    (OSError(errno.ENOMEM, 'Cannot allocate memory'), True),
    (RuntimeError('CUDA error: out of memory'), True), (RuntimeError('std::bad_alloc'), True),
    (RuntimeError('Caught MemoryError in DataLoader worker process 0.'), True),
    (RuntimeError('shapes cannot be multiplied'), False), (OSError(errno.ENOENT, 'out of memory.jpg'), False),
    (ValueError('out of memory'), False),
])
def test_which_errors_mean_too_little_memory(error, expected):
    assert out_of_memory(error) == expected


def test_arrays_of_numpy_that_do_not_fit_are_told(monkeypatch, capsys):
    monkeypatch.setattr(cli, '_dispatch', lambda argv, script: np.ones(2 ** 55))
    assert main(['list']) == 1
    assert capsys.readouterr().err == (
        'timm-geoprior: There is not enough memory. Use smaller images, a smaller batch, or another device.\n')
