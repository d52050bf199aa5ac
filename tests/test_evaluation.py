"""The parts of evaluation: counting, classes, preflight, archives, weights, figures."""
import bz2
import gzip
import io
import itertools
import lzma
import math
import pickle
import re
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from programs import run
from timm_geoprior.data.dataset import open_split
from timm_geoprior.data.listing import ilsvrc_val_labels, natural_key, unpacked
from timm_geoprior.data.preflight import check_data, empty_folders, image_fault, repeated_classes
from timm_geoprior.errors import ClassMismatchError, EvaluationError, GeoPriorError
from timm_geoprior.evaluation.classes import match_classes
from timm_geoprior.evaluation.evaluate import EvalConfig, Forward, predict
from timm_geoprior.evaluation.measure import find_metric
from timm_geoprior.evaluation.metrics import (
    NO_RANK,
    Counts,
    Predictions,
    calibrate,
    confused_pairs,
    count_correct,
    per_class,
    target_ranks,
    wilson_interval,
)
from timm_geoprior.evaluation.models import load_model
from timm_geoprior.pretrained.manifest import Metric, load_manifest

NAN = math.nan
OFFICIAL_LABELS = Path(__file__).parents[2] / 'shared' / 'data' / 'ilsvrc2012_val_labels.txt'


@pytest.mark.parametrize(('scores', 'target', 'rank'), [
    ([1, 3, 2], 1, 0),
    ([1, 3, 2], 0, 2),
    ([5, 5, 5], 0, 0),  # of equal scores the lower index comes first
    ([5, 5, 5], 2, 2),
    ([-math.inf, -math.inf, 0], 1, 2),
    # never right: these rows have no softmax
    ([1, NAN, 2], 2, NO_RANK),
    ([1, NAN, 2], 1, NO_RANK),
    ([1, math.inf, 2], 1, NO_RANK),
    ([-math.inf, -math.inf, -math.inf], 0, NO_RANK),
])
def test_the_rank_of_a_target(scores, target, rank):
    assert target_ranks(torch.tensor([scores], dtype=torch.float32), torch.tensor([target])).tolist() == [rank]


@given(st.integers(0, 2 ** 31), st.integers(1, 12), st.integers(2, 30), st.sampled_from(['float32', 'bfloat16']))
@settings(deadline=None, max_examples=60)
def test_ranks_are_a_stable_sorting(seed, batch, classes, dtype):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, classes, generator=generator).to(getattr(torch, dtype))
    targets = torch.randint(classes, (batch,), generator=generator)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    assert target_ranks(scores, targets).tolist() == (order == targets[:, None]).int().argmax(1).tolist()


@pytest.mark.parametrize('batch_size', [1, 7, 64])
def test_counts_do_not_depend_on_the_batches(batch_size):
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(20, 20, bias=False)
    nn.init.eye_(model.weight)
    images = torch.randn(101, 20, generator=generator)
    targets = torch.randint(20, (101,), generator=generator)
    places = (images.argsort(1, descending=True) == targets[:, None]).int().argmax(1)
    expected = (101, int((places == 0).sum()), int((places < 5).sum()))
    assert count_correct(model, zip(images.split(batch_size), targets.split(batch_size), strict=True)) == expected
    assert count_correct(model, []) == Counts(0, 0, 0)


def test_counting_leaves_each_module_in_its_mode():
    model = nn.Sequential(nn.BatchNorm1d(8), nn.BatchNorm1d(8)).train()
    model[0].eval()
    count_correct(model, [(torch.randn(4, 8), torch.zeros(4, dtype=torch.int64))])
    assert [module.training for module in model.modules()] == [True, False, True]
    assert model[1].num_batches_tracked == 0


def test_the_labels_of_ilsvrc():
    labels = ilsvrc_val_labels()
    assert labels.shape == (50_000,)
    assert set(np.bincount(labels)) == {50}
    # from the folders of Imagenette, which contains these validation images
    known = {293: 0, 665: 217, 557: 482, 537: 491, 4939: 497, 957: 566, 1144: 569, 732: 571, 2314: 574, 1440: 701}
    assert {number: labels[number - 1] for number in known} == known
    if OFFICIAL_LABELS.exists():
        assert labels.tolist() == [int(line) for line in OFFICIAL_LABELS.read_text().split()]


WNIDS, NAMES = ('n01', 'n02', 'n03', 'n04'), ('cat', 'crane', 'dog', 'crane')


@pytest.mark.parametrize(('data', 'subset', 'to_model', 'competing', 'note'), [
    (['n01', 'n02', 'n03', 'n04'], False, [0, 1, 2, 3], None, ''),
    (['n04', 'n02'], False, [3, 1], None, "not in the model's order"),
    (['n02', 'n04'], False, [1, 3], None, "2 of the model's 4 classes"),
    (['n02', 'n04'], True, [1, 3], (1, 3), '2 classes are in both'),
    (['n09', 'n03', 'n01'], True, [-1, 2, 0], (0, 2), '2 classes are in both, of 3'),
    (['cat', 'crane', 'dog', 'crane'], False, [], None, ''),  # with a repeated name, in the model's order
    (['0', '1', '2', '3'], False, [], None, 'their order is assumed'),
    ([], False, [], None, 'their order is assumed'),
])
def test_classes_are_matched_by_name(data, subset, to_model, competing, note):
    match = match_classes(data, WNIDS, NAMES, 4, subset)
    assert (match.to_model.tolist(), match.competing) == (to_model, competing)
    assert note in ' '.join(match.notes)
    assert bool(note) == bool(match.notes)
    labels = np.arange(len(data) or 4)
    assert match.apply(labels).tolist() == (to_model or labels.tolist())


@pytest.mark.parametrize(('data', 'subset', 'message'), [
    (['n01', 'n09'], False, r'does not have 1 of the 2 classes \(n09\)'),
    (['a', 'b', 'c'], False, r"the model's 4 classes, which begin with n01, got 3 \(a, b, c\)"),
    (['a', 'b', 'c', 'd'], True, 'no name in common'),
    (['a', 'b', 'c', 'd'], False, r"must have the model's names \(n01, n02, n03 and 1 more\), got none of them \(a, b"),
    (['cat', 'crane', 'dog', 'fox'], False, "must have the model's names"),  # 'crane' is repeated
])
def test_classes_that_do_not_match_are_refused(data, subset, message):
    with pytest.raises(ClassMismatchError, match=message):
        match_classes(data, WNIDS, NAMES, 4, subset, sorted_names=True)


def test_folders_are_sorted_as_timm_sorts_them():
    names = ['b', 'A10', 'a2', '10', '9', 'x1y20', 'x1y3', 'é', '٣']
    assert sorted(names, key=natural_key) == sorted(names, key=timm.utils.natural_key)
    assert sorted(['②', '①', 'x²'], key=natural_key) == ['x²', '①', '②']  # which timm cannot sort
    alike = ['a01', 'A1', 'a001', 'a1']  # to timm, which leaves them in file system order
    assert len({tuple(sorted(names, key=natural_key)) for names in itertools.permutations(alike)}) == 1


def test_an_order_that_was_stated_is_taken():
    match = match_classes(['a', 'b', 'c', 'd'], WNIDS, NAMES, 4)
    assert match.notes == ("The class names of these data are not the model's names: their order is assumed to be "
                           "the model's.",)


def encoded(form: str, height: int = 40, width: int = 40, **options) -> bytes:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))
    content = io.BytesIO()
    picture.save(content, form, **options)
    return content.getvalue()


@pytest.mark.parametrize(('content', 'fault'), [
    (encoded('JPEG'), None),
    (encoded('PNG'), None),
    (encoded('GIF'), None),
    (encoded('JPEG') + bytes(9), None),  # padded, as some files of ImageNet are
    (encoded('JPEG')[:-200], 'truncated'),
    (encoded('PNG')[:-200], 'truncated'),
    (encoded('GIF')[:-200], 'truncated'),
    (b'', 'cannot identify'),
    (b'<html>not found</html>', 'cannot identify'),
    (encoded('PNG', 1001, 1), 'it must have no side more than 1000 times the other, got 1 x 1001 pixels'),
], ids=['JPEG', 'PNG', 'GIF', 'padded', 'cut JPEG', 'cut PNG', 'cut GIF', 'empty', 'HTML', 'thin'])
def test_an_unreadable_image_is_found(content, fault):
    found = image_fault(io.BytesIO(content))
    assert found is None if fault is None else fault in found


@pytest.mark.filterwarnings('error')
def test_a_large_image_is_no_fault():
    content = io.BytesIO()
    Image.new('1', (10_000, 10_000)).save(content, 'PNG')
    assert image_fault(content) is None


def make_folder(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded('JPEG'))
    return root


def test_folders_that_are_empty_or_stand_twice(tmp_path):
    make_folder(tmp_path, 'val/a/1.jpg', 'val/b/2.jpg')
    (tmp_path / 'val' / 'c').mkdir()
    data = open_split(tmp_path)
    assert empty_folders(data) == ['c']
    assert repeated_classes(data) == []
    make_folder(tmp_path / 'groups', 'one/a/1.jpg', 'one/B/3.jpg', 'two/a/2.jpg', 'two/b/2.jpg')
    assert repeated_classes(open_split(tmp_path / 'groups')) == [
        ('a', ['one/a', 'two/a']), ('b', ['B', 'b'])]


def test_two_groups_with_one_class_end_the_preflight(tmp_path):
    told = []
    make_folder(tmp_path, 'one/a/1.jpg', 'one/b/2.jpg')
    check_data(open_split(tmp_path), 0, told.append)
    assert any('Class folders lie deeper than one level, as one/a does' in line for line in told)
    make_folder(tmp_path, 'two/a/3.jpg')
    with pytest.raises(EvaluationError, match=r'one folder, got several for 1 \(a: one/a, two/a\)'):
        check_data(open_split(tmp_path, split='testing'), 0)
    told.clear()
    make_folder(tmp_path, 'val/a/3.jpg')
    check_data(open_split(tmp_path), 0, told.append)
    assert told == ['1 images in 1 classes, 1 in each.']


def test_a_set_of_one_class(tmp_path):
    assert open_split(make_folder(tmp_path, 'dog/1.jpg')).classes == ('dog',)


@pytest.mark.parametrize(('ending', 'compress'), [
    ('.tar', bytes), ('.tar.xz', lzma.compress), ('.tgz', gzip.compress), ('.tar.bz2', bz2.compress), ('.TAR', bytes)])
def test_an_archive_of_any_compression(ending, compress, tmp_path):
    make_folder(tmp_path / 'set', 'val/b/1.jpg', 'val/a/2.jpg')
    plain = Path(shutil.make_archive(str(tmp_path / 'made'), 'tar', tmp_path / 'set'))
    path = tmp_path / f'images{ending}'
    path.write_bytes(compress(plain.read_bytes()))
    with unpacked(path) as root:
        data = open_split(root)
        assert (data.classes, data.labels.tolist()) == (('a', 'b'), [0, 1])
        assert data.names == ('a/2.jpg', 'b/1.jpg')  # of the split, as from a folder
    assert (root == path) == (ending.lower() == '.tar')
    assert root.exists() == (ending.lower() == '.tar')


def tar_of(content: bytes) -> bytes:
    info, made = tarfile.TarInfo('a/1.jpg'), io.BytesIO()
    info.size = len(content)
    with tarfile.open(fileobj=made, mode='w') as archive:
        archive.addfile(info, io.BytesIO(content))
    return made.getvalue()


@pytest.fixture(params=[True, False], ids=['new', 'old'])
def tar_filters(request, monkeypatch):
    """Python's archive filters, and their absence before 3.10.12 and 3.11.4."""
    if not request.param:
        monkeypatch.delattr(tarfile, 'data_filter', raising=False)
        extractall = tarfile.TarFile.extractall
        monkeypatch.setattr(tarfile.TarFile, 'extractall', lambda self, path: extractall(self, path))


@pytest.mark.usefixtures('tar_filters')
@pytest.mark.parametrize(('name', 'kind'), [('../out.jpg', tarfile.REGTYPE), ('a/1.jpg', tarfile.SYMTYPE)])
def test_an_archive_unpacks_into_its_own_folder(name, kind, tmp_path):
    content = encoded('JPEG')
    with tarfile.open(tmp_path / 'set.tar.gz', 'w:gz') as archive:
        for place, type_ in (('a/0.jpg', tarfile.REGTYPE), (name, kind)):
            info = tarfile.TarInfo(place)
            info.size, info.type, info.linkname = len(content) * (type_ == tarfile.REGTYPE), type_, '/etc/passwd'
            archive.addfile(info, io.BytesIO(content))
    with (pytest.raises(EvaluationError, match=f'cannot be unpacked .*{re.escape(name)}'),
          unpacked(tmp_path / 'set.tar.gz')):
        pass
    with tarfile.open(tmp_path / 'good.tar.gz', 'w:gz') as archive:
        info = tarfile.TarInfo('a/0.jpg')
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    with unpacked(tmp_path / 'good.tar.gz') as root:
        assert (root / 'a' / '0.jpg').read_bytes() == content


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('cut.tar.xz', lzma.compress(tar_of(encoded('JPEG')))[:-200], 'cannot be unpacked .* damaged or cut off'),
    ('cut.tar.gz', gzip.compress(np.random.default_rng(0).bytes(999), mtime=0)[:500], 'cannot be unpacked'),
    ('photo.tar', encoded('JPEG'), r'\(file could not be opened successfully\)\. It is not a tar or zip archive'),
    ('empty.tar', b'', 'cannot be unpacked'),
    ('missing.tar', None, 'does not exist'),
], ids=['xz', 'gzip', 'photo', 'empty', 'missing'])
def test_a_file_that_is_no_archive(name, content, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EvaluationError, match=message), unpacked(path) as root:
        open_split(root)


@pytest.mark.parametrize('packed', [False, True])
def test_ilsvrc_as_downloaded_is_labelled(packed, tmp_path):
    names = [f'ILSVRC2012_val_{number:08d}.JPEG' for number in (957, 293, 1440)]
    make_folder(tmp_path / 'val', *names)
    if packed:  # next to the archive of training images, as is usual
        with tarfile.open(tmp_path / 'ILSVRC2012_img_val.tar', 'w') as archive:
            for name in names:
                archive.add(tmp_path / 'val' / name, name)
        shutil.rmtree(tmp_path / 'val')
        (tmp_path / 'ILSVRC2012_img_train.tar').write_bytes(b'')
    data = open_split(tmp_path)
    assert {name.rpartition('_')[2]: data.class_of(index) for index, name in enumerate(data.names)} == {
        '00000293.JPEG': 'n01440764', '00000957.JPEG': 'n03394916', '00001440.JPEG': 'n03888257'}
    assert data.classes == ('n01440764', 'n03394916', 'n03888257')


@pytest.mark.parametrize(('names', 'message'), [
    (['ILSVRC2012_val_00050001.JPEG'], '00050001.JPEG must lie in a folder of its class'),
    (['ILSVRC2012_val_00000001.JPEG', 'me.jpg'], 'me.jpg must lie in a folder of its class'),
    ([], 'has no images'),
])
def test_other_flat_folders_are_refused(names, message, tmp_path):
    with pytest.raises(EvaluationError, match=message):
        open_split(make_folder(tmp_path, *names))


def test_wilson_intervals():
    stats = pytest.importorskip('scipy.stats')
    for correct, total in ((0, 10), (3, 10), (10, 10), (7613, 10_000), (1, 1)):
        expected = stats.binomtest(correct, total).proportion_ci(0.95, 'wilson')
        assert wilson_interval(correct, total) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson_interval(0, 0) == (0, 1)


def predictions_of(target, predicted, rank, confidence) -> Predictions:
    return Predictions(np.arange(len(target)), *(np.array(column, np.int32) for column in (target, rank, predicted)),
                       np.array(confidence, np.float32))


def test_figures_by_class_and_confusion():
    found = predictions_of([0, 0, 0, 2, 2], [1, 1, 0, 2, 0], [1, 7, 0, 0, 2], [.9, .8, .7, .6, .5])
    rows = per_class(found, ('a', 'b', 'c'), ('ant', 'bee', ''))
    assert [(row['wnid'], row['num_images'], row['top1_correct'], row['top5_correct'], row['most_often_taken_for'])
            for row in rows] == [('a', 3, 1, 2, 'bee'), ('c', 2, 1, 2, 'ant')]
    assert rows[0]['top1_low'] < rows[0]['top1'] == 33.3333 < rows[0]['top1_high']
    pairs = confused_pairs(found, ('a', 'b', 'c'), ())
    assert [(pair['wnid'], pair['predicted_wnid'], pair['count'], pair['share']) for pair in pairs] == [
        ('a', 'b', 2, 66.6667), ('c', 'a', 1, 50)]


def test_an_image_without_finite_scores_is_not_taken_for_the_first_class():
    found = predictions_of([0, 1], [0, 0], [NO_RANK, NO_RANK], [NAN, NAN])
    assert confused_pairs(found, ('a', 'b'), ()) == []
    assert [(row['top1_correct'], row['most_often_taken_for']) for row in per_class(found, ('a', 'b'), ())] == [
        (0, ''), (0, '')]


def test_calibration_error():
    # two bins of 15 hold images: |1/2 - 0.95| of four, |1 - 0.5| of one; a NaN is left out
    found = predictions_of([0] * 6, [0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0], [.94, .95, .95, .96, .5, NAN])
    calibration = calibrate(found)
    assert calibration.error == pytest.approx((4 * .45 + .5) / 5, abs=1e-6)
    assert calibration.counts.sum() == 5
    exact = calibrate(predictions_of([0] * 4, [0, 0, 0, 1], [0, 0, 0, 1], [.75] * 4))
    assert exact.error == pytest.approx(0)
    assert calibrate(predictions_of([0], [0], [0], [1])).counts[-1] == 1
    assert math.isnan(calibrate(predictions_of([], [], [], [])).error)


HUNGRY = """
import resource
from pathlib import Path
import timm
import torch
from timm_geoprior.errors import EvaluationError
from timm_geoprior.evaluation.evaluate import Forward


class Hungry(torch.nn.Module):
    needs = 2 ** 30  # bytes for each image, which nothing touches

    def forward(self, images):
        torch.empty(len(images), self.needs, dtype=torch.uint8)
        return images


images, forward = torch.randn(30, 3), Forward(Hungry(), print)
used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2 ** 33, resource.RLIM_INFINITY))
assert torch.equal(forward(images), images)
assert torch.equal(forward(images[:5]), images[:5])
Hungry.needs = 2 ** 50
try:
    forward(images)
except EvaluationError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='the memory limit needs Linux')
def test_the_batch_is_halved_when_memory_runs_out():
    # in a new process: torch maps its libraries to report where it failed, and threads of other tests map more memory
    done = run(['-c', HUNGRY], check=True)
    told = done.stdout.splitlines()
    assert told[:2] == ['Not enough memory for 30 images at a time: going on with 15.',
                        'Not enough memory for 15 images at a time: going on with 8.']
    assert told[-1].startswith('There is not enough memory for one image. Use a smaller --img-size')


def test_other_errors_are_not_taken_for_want_of_memory():
    with pytest.raises(EvaluationError, match=r'on images of 5 \(mat1 and mat2 shapes cannot be multiplied'):
        Forward(nn.Linear(4, 2))(torch.randn(3, 5))


def test_only_competing_classes_are_predicted():
    scores = torch.tensor([[9., 1, 2, 0], [9., 2, 1, 0], [9., 0, 0, 1]])
    outcome = predict(nn.Identity(), [(scores, torch.tensor([1, 1, 3]))], EvalConfig(),
                      np.array([4, 2, 7]), competing=(1, 2, 3))
    found = outcome.predictions['float32']
    assert outcome.counts['float32'] == (3, 2, 3)
    assert (found.index.tolist(), found.predicted.tolist()) == ([2, 4, 7], [1, 2, 3])
    assert found.confidence[0] == pytest.approx(torch.tensor([2., 1, 0]).softmax(0)[0].item())


def test_precisions_are_compared_and_overflow_is_seen():
    torch.manual_seed(0)
    layer = nn.Linear(64, 10)
    images = torch.cat([torch.randn(40, 64), torch.full((1, 64), 1e6)])
    targets = layer(images).argmax(1)
    outcome = predict(layer, [(images, targets)], EvalConfig(precisions=('float32', 'bfloat16', 'float16')))
    assert outcome.counts['float32'] == (41, 41, 41)
    assert np.isnan(outcome.predictions['float16'].confidence).tolist() == 40 * [False] + [True]
    assert outcome.largest_difference['float32'] == 0
    assert 0 < outcome.largest_difference['float16'] < 0.1
    assert outcome.counts['float16'].top1_correct <= 40


METRIC = Metric('Tiny', 'val', 10_000, 5000, 7500, 'float32', 64)


def test_figures_of_the_manifest():
    entry = replace(load_manifest().get('geoprior_resnet14_nano'), metrics=(METRIC, replace(METRIC, num_images=20_000)))
    assert find_metric(entry, 'float32', 64, 20_000) == entry.metrics[1]
    assert find_metric(entry, 'float32', 64, None) == METRIC


@pytest.mark.parametrize(('metrics', 'precision', 'img_size', 'num_images', 'message'), [
    ((), 'float32', 64, 10_000, 'no figure for'),
    ((METRIC,), 'bfloat16', 64, 10_000, 'bfloat16 at 64 px, only for float32 at 64 px'),
    ((METRIC,), 'float32', 96, 10_000, 'float32 at 96 px, only for float32 at 64 px'),
    ((METRIC,), 'float32', 64, 9_999, 'is for Tiny val with 10,000 images, got 9,999'),
])
def test_figures_that_the_manifest_does_not_have(metrics, precision, img_size, num_images, message):
    entry = replace(load_manifest().get('geoprior_resnet14_nano'), metrics=metrics)
    with pytest.raises(EvaluationError, match=message):
        find_metric(entry, precision, img_size, num_images)


NANO = 'geoprior_resnet14_nano'


def nano_state(scale: float = 1.0, classes: int = 3) -> dict:
    model = load_fresh(classes)
    return {key: value * scale if value.is_floating_point() else value for key, value in model.state_dict().items()}


def load_fresh(classes: int) -> nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model(NANO, num_classes=classes)


@pytest.mark.parametrize('weights', ['auto', 'ema', 'raw'])
@pytest.mark.parametrize('kind', ['own', 'timm', 'older', 'bare', 'safetensors'])
def test_checkpoints_of_every_kind(kind, weights, tmp_path):
    plain, averaged = nano_state(), nano_state(0.5)
    path = tmp_path / ('weights.safetensors' if kind == 'safetensors' else 'last.pt')
    said = {'model_name': NANO, 'model_kwargs': {'attn_radius': 2.0}, 'num_classes': 3,
            'class_names': ['x', 'y', 'z'], 'recipe': {'img_size': 48, 'eval_size': 0}}
    if kind == 'safetensors':
        from safetensors.torch import save_file
        save_file(plain, path)
    else:
        torch.save({
            'own': {'model': plain, 'model_ema': averaged, **said}, 'older': {'model': plain, 'ema': averaged, **said},
            'timm': {'state_dict': {f'module.{key}': value for key, value in plain.items()},
                     'state_dict_ema': averaged},
            'bare': plain}[kind], path)
    if weights == 'ema' and kind in ('bare', 'safetensors'):
        with pytest.raises(GeoPriorError, match='must hold averaged weights, got raw ones only'):
            load_model(NANO, path, weights, num_classes=3)
        return
    own = kind in ('own', 'older')
    loaded = load_model(None if own else NANO, path, weights, None if own else 3)
    expected = averaged if weights != 'raw' and kind not in ('bare', 'safetensors') else plain
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.model.state_dict().items())
    assert not loaded.model.training
    assert (loaded.wnids, loaded.img_size) == ((('x', 'y', 'z'), 48) if own else ((), None))
    taken = 'averaged' if expected is averaged else 'raw'
    said = f'the {taken} weights are used; it holds {"raw" if taken == "averaged" else "averaged"} ones too'
    assert (said in ' '.join(loaded.notes)) == (kind in ('own', 'timm', 'older'))


def test_the_hash_of_a_state_dict_is_of_its_values(tmp_path):
    hashes = []
    for scale in (1.0, 1.0, 0.5):
        torch.save(nano_state(scale), tmp_path / 'weights.pt')
        hashes.append(load_model(NANO, tmp_path / 'weights.pt', num_classes=3).weights['state_dict_sha256'])
    assert hashes[0] == hashes[1] != hashes[2]


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_is_read_as_data(tmp_path):
    (tmp_path / 'evil.pt').write_bytes(pickle.dumps(Payload(tmp_path / 'ran'), protocol=2))
    torch.save({'model': Payload(tmp_path / 'ran')}, tmp_path / 'evil2.pt')
    for name in ('evil.pt', 'evil2.pt'):
        with pytest.raises(GeoPriorError, match='cannot be read as a checkpoint|must hold tensors and'):
            load_model(NANO, tmp_path / name)
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize(('name', 'content', 'message'), [
    (NANO, None, 'does not exist'),
    (NANO, b'abc', 'cannot be read as a checkpoint'),
    (NANO, {'a': torch.ones(1)}, 'do not fit'),
    (NANO, nano_state(classes=4), 'do not fit'),
    (None, {'a': torch.ones(1)}, 'does not name its architecture'),
    ('geoprior_resnet41', {'a': torch.ones(1)}, 'Did you mean geoprior_resnet'),
], ids=['missing', 'damaged', 'other', 'other head', 'no name', 'unknown name'])
def test_weights_that_do_not_fit(name, content, message, tmp_path):
    path = tmp_path / 'weights.pt'
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(GeoPriorError, match=message):
        load_model(name, path, num_classes=3)
