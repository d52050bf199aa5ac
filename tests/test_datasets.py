"""Real-world data: pictures of every kind in every input format, stray files, class maps, names, shards."""
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_dataset

from timm_geoprior.data.batches import FolderLoader, LoaderConfig
from timm_geoprior.data.dataset import DataOptions, DataSplit, fingerprint, open_split
from timm_geoprior.data.listing import ilsvrc_val_labels, unpacked
from timm_geoprior.data.memory import decode_images
from timm_geoprior.data.preflight import check_data
from timm_geoprior.data.reading import read_image, read_item
from timm_geoprior.errors import EvaluationError

ORIENTATION = 0x0112


def picture(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    """Smooth noise in colour."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str, turned: int = 1) -> bytes:
    """An encoded image with an EXIF orientation."""
    exif = Image.Exif()
    exif[ORIENTATION] = turned
    content = io.BytesIO()
    image.save(content, form, exif=exif)
    return content.getvalue()


def odd_pictures() -> dict[str, bytes]:
    """Files that timm's own reader decodes differently from an image viewer."""
    grey = Image.fromarray((np.asarray(picture().convert('L')).astype(np.uint16) * 257))
    clear = picture().convert('RGBA')
    clear.putalpha(Image.linear_gradient('L').resize(clear.size))
    return {'deep.png': encoded(grey, 'PNG'), 'clear.png': encoded(clear, 'PNG'), 'palette.png': encoded(
        clear.quantize(), 'PNG'), 'turned.jpg': encoded(picture(), 'JPEG', 6), 'mirrored.jpg': encoded(
        picture(), 'JPEG', 2), 'askew.png': encoded(picture(), 'PNG', 8), 'plain.jpg': encoded(picture(), 'JPEG')}


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def pack(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def shards(root: Path, files: dict[str, bytes], label: bytes = b'0') -> Path:
    parts = {}
    for name, content in files.items():
        stem, _, ending = name.partition('.')
        parts |= {f'{stem}.{ending}': content, f'{stem}.cls': label}
    return pack(root / 'val-0.tar', parts).parent


def parquet(root: Path, files: dict[str, bytes], label: str = 'label', split: str = 'validation') -> Path:
    datasets = pytest.importorskip('datasets')
    features = datasets.Features({'image': datasets.Image(), label: datasets.ClassLabel(names=['a', 'b'])})
    rows = [{'image': {'bytes': content, 'path': name}, label: 0} for name, content in files.items()]
    root.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(root / f'{split}-00000-of-00001.parquet')
    return root


def opened(way: str, root: Path, files: dict[str, bytes]) -> DataSplit:
    """The same files in one of the input formats."""
    if way == 'folder':
        return open_split(write(root / 'set', {f'val/a/{name}': content for name, content in files.items()}))
    if way == 'archive':
        return open_split(pack(root / 'set.tar', {f'a/{name}': content for name, content in files.items()}))
    if way == 'shards':
        pytest.importorskip('webdataset')
        return open_split(shards(root / 'set', files), 'val-0.tar', 'wds/')
    place = parquet(root / 'set', files)
    options = DataOptions(num_samples=len(files)) if way == 'hfids' else None
    return open_split(root / 'cache', 'validation', f'{way}/{place}', options)


def pixels_of(data: DataSplit) -> dict[str, np.ndarray]:
    """Every image by its name, or by its position in a stream."""
    if not data.is_stream:
        return {name.rpartition('/')[2]: np.asarray(read_item(data.dataset, index))
                for index, name in enumerate(data.names)}
    data.dataset.transform, data.dataset.target_transform = np.asarray, int
    return {str(index): image for index, (image, _) in enumerate(data.dataset)}


WAYS = ['folder', 'archive', 'shards', 'hfds', 'hfids']


@pytest.mark.parametrize('way', WAYS)
def test_every_way_in_shows_what_classify_shows(way, tmp_path):
    files = odd_pictures()
    expected = [np.asarray(read_image(io.BytesIO(content), name)) for name, content in files.items()]
    found = pixels_of(opened(way, tmp_path, files))
    order = sorted(files) if way in ('folder', 'archive') else list(files)
    assert len(found) == len(files)
    for name, image in zip(order, found.values(), strict=True):
        assert np.array_equal(image, expected[list(files).index(name)]), name
    assert expected[list(files).index('turned.jpg')].shape == (48, 32, 3)  # upright
    assert len(np.unique(expected[0])) > 50  # 16 bits are scaled, not clipped


def test_training_reads_the_same_pixels(tmp_path):
    data = opened('folder', tmp_path, odd_pictures())
    kept = decode_images(data.dataset, 32, workers=0)
    loader = FolderLoader(data.dataset, lambda size: lambda image: torch.from_numpy(np.array(
        image.resize((32, 32), Image.Resampling.BICUBIC))).permute(2, 0, 1), LoaderConfig(len(kept)), workers=0)
    drawn, = (images for images, _ in loader.epoch(0, 32))
    assert {image.numpy().tobytes() for image in drawn} == {image.numpy().tobytes() for image in kept.images}
    for index, image in enumerate(kept.images):
        expected = read_item(data.dataset, index).resize((32, 32), Image.Resampling.BICUBIC)
        assert np.array_equal(image.permute(1, 2, 0), expected)


def ilsvrc_files() -> dict[str, bytes]:
    """Files named like ILSVRC's, of the kinds found there: colour, grey, CMYK, PNG, rotated."""
    clear = picture().convert('RGBA')
    clear.putalpha(100)
    return {'ILSVRC2012_val_00000001.JPEG': encoded(picture(), 'JPEG', 6),
            'ILSVRC2012_val_00000002.JPEG': encoded(picture().convert('L'), 'JPEG', 3),
            'ILSVRC2012_val_00000003.JPEG': encoded(picture().convert('CMYK'), 'JPEG'),
            'n02105855_2933.JPEG': encoded(clear, 'PNG'),
            'n01440764_10026_n01440764.JPEG': encoded(picture(), 'JPEG', 8)}


@pytest.mark.parametrize('way', WAYS)
def test_the_pixels_of_ilsvrc_are_timms(way, tmp_path):
    files = ilsvrc_files()
    timms = create_dataset('', root=str(write(tmp_path / 'timm', {f'a/{name}': c for name, c in files.items()})))
    expected = {timms.filename(index, basename=True): np.asarray(timms[index][0]) for index in range(len(timms))}
    found = pixels_of(opened(way, tmp_path, files))
    by_name = list(files) if way in ('shards', 'hfds', 'hfids') else list(expected)
    for name, image in zip(by_name, found.values(), strict=True):
        assert np.array_equal(image, expected[name]), name


def test_a_rotation_that_is_ignored_is_told(tmp_path):
    told: list[str] = []
    files = {**ilsvrc_files(), 'mine.jpg': encoded(picture(), 'JPEG', 6)}
    data = opened('folder', tmp_path, files)
    check_data(data, 0, told.append)
    assert [line for line in told if 'rotation' in line] == [
        "3 of ILSVRC's files state a rotation (EXIF), which is ignored as in published accuracies."]
    with pytest.warns(UserWarning, match="3 of ILSVRC's files state a rotation"):
        decode_images(data.dataset, 32, workers=0)
    loader = FolderLoader(data.dataset, lambda size: lambda image: torch.zeros(1), LoaderConfig(3), workers=0)
    with pytest.warns(UserWarning, match="3 of ILSVRC's files state a rotation"):
        list(zip(range(len(loader)), loader.epoch(0, 32), strict=False))  # a training run reads no further


@pytest.mark.parametrize(('rank', 'count'), [(0, 1), (1, 0)])
def test_the_first_process_tells_it_once_and_of_all_images(tmp_path, rank, count):
    told: list[str] = []
    files = {f'n01440764_{number}.JPEG': encoded(picture(), 'JPEG', 6) for number in range(4)}
    data = opened('folder', tmp_path, files)
    loader = FolderLoader(data.dataset, lambda size: lambda image: torch.zeros(1), LoaderConfig(
        1, rank=rank, world_size=2), workers=0, tell=told.append)
    list(loader.epoch(0, 32, first_batch=1))
    assert told == []
    list(loader.epoch(0, 32))
    list(loader.epoch(1, 32))
    assert len(told) == count


JPEG = encoded(picture(), 'JPEG')


def test_pictures_of_other_kinds_are_read_and_the_rest_is_counted(tmp_path):
    names = ['a/1.webp', 'a/2.gif', 'a/3.TIFF', 'b/4.bmp', 'b/5.JPG', 'b/6.heic', 'b/7.heic', 'b/list.txt', 'b/README']
    forms = {'webp': 'WEBP', 'gif': 'GIF', 'tiff': 'TIFF', 'bmp': 'BMP'}
    told: list[str] = []
    data = open_split(write(tmp_path, {
        name: encoded(picture(), forms.get(name.rpartition('.')[2].lower(), 'JPEG')) for name in names}))
    assert data.names == ('a/1.webp', 'a/2.gif', 'a/3.TIFF', 'b/4.bmp', 'b/5.JPG')
    check_data(data, 0, told.append)
    assert 'Skipped 4 files without an image extension: .heic (2), .txt (1), README (1).' in told
    for index in range(5):
        assert read_item(data.dataset, index).size == (48, 32)


LITTER = ['@eaDir/a/1.jpg', 'a/@eaDir/1.jpg/SYNOFILE_THUMB_M.jpg', '__MACOSX/a/._1.jpg', 'a/._1.jpg', '.DS_Store',
          'a/Thumbs.db', 'a/.ipynb_checkpoints/1-checkpoint.jpg', '.ipynb_checkpoints/x.jpg', 'a/desktop.ini',
          '#recycle/a/9.jpg', '$RECYCLE.BIN/8.jpg', 'lost+found/7.jpg', '.Trashes/6.jpg', 'a/.@__thumb/s100a.jpg',
          '@Recycle/a/5.jpg', '#snapshot/a/4.jpg', '.stversions/a/3.jpg', 'a/.picasaoriginals/1.jpg']


@pytest.mark.parametrize('packed', [False, True])
def test_litter_is_no_class_and_is_told(packed, tmp_path):
    files = dict.fromkeys(('a/1.jpg', 'b/2.jpg', *LITTER), JPEG)
    data = open_split(pack(tmp_path / 'set.tar', files) if packed else write(tmp_path / 'set', files))
    assert (data.classes, data.names) == (('a', 'b'), ('a/1.jpg', 'b/2.jpg'))
    note, = data.notes
    assert note.startswith(f'Skipped {len(LITTER)} files that systems and programs leave behind: @eaDir (2), ')
    told: list[str] = []
    check_data(data, 0, told.append)
    assert note in told
    assert not any('Folders without images' in line for line in told)


@pytest.mark.parametrize('target', ['.', '..', '../..'])
def test_a_link_to_a_folder_above_it_adds_no_images(target, tmp_path):
    root = write(tmp_path / 'above' / 'set', dict.fromkeys(('a/1.jpg', 'b/2.jpg'), JPEG))
    write(tmp_path / 'elsewhere', {'3.jpg': JPEG})
    (root / 'a' / 'again').symlink_to(target)
    (root / 'c').symlink_to(tmp_path / 'elsewhere')
    (root / 'self').symlink_to('self')
    assert open_split(root).names == ('a/1.jpg', 'b/2.jpg', 'c/3.jpg')


def test_links_from_one_folder_to_another_end(tmp_path):
    root = write(tmp_path / 'set', dict.fromkeys(('a/1.jpg', 'b/2.jpg', 'c/3.jpg'), JPEG))
    for one in 'abc':
        for other in 'abc':
            (root / one / f'to_{other}').symlink_to(f'../{other}')
    options = DataOptions(labelled=False)
    assert len(open_split(root, options=options).names) == 15  # each by every path without a cycle
    (tmp_path / 'below').mkdir()
    (tmp_path / 'below' / 'up').symlink_to('..')
    assert {name.split('/')[-1] for name in open_split(tmp_path / 'below', options=options).names} == {
        '1.jpg', '2.jpg', '3.jpg'}


@pytest.mark.parametrize(('names', 'message'), [
    (['cat/1.jpg', 'cat/crops/2.jpg', 'dog/3.jpg'], 'cat has images, and so has .*cat/crops inside of it'),
    (['cat/1.jpg', 'cat/more/crops/2.jpg'], 'cat has images, and so has .*cat/more/crops'),
    (['1.jpg', 'cat/2.jpg'], 'has images, and so has .*cat inside of it'),
    (['a/b/c/1.jpg', 'a/b/d/2.jpg', 'e/3.jpg'], 'a/b/c has images too far down'),
])
@pytest.mark.parametrize('packed', [False, True])
def test_classes_inside_of_one_another_are_refused(names, message, packed, tmp_path):
    files = dict.fromkeys(names, JPEG)
    with pytest.raises(EvaluationError, match=message):
        open_split(pack(tmp_path / 'set.tar', files) if packed else write(tmp_path / 'set', files))


def test_folders_above_the_classes_do_not_matter(tmp_path):
    files = {f'home/me/photos/{name}/1.jpg': JPEG for name in ('cat', 'dog')}
    for root in (pack(tmp_path / 'set.tar', files), write(tmp_path / 'set', files)):
        assert open_split(root).classes == ('cat', 'dog')


@pytest.mark.parametrize(('folder', 'split'), [
    ('Val', 'val'), ('VALIDATION', 'validation'), ('valid', 'validation'), ('Train', 'train'), ('test', 'test')])
def test_a_split_is_found_in_any_case(folder, split, tmp_path):
    data = open_split(write(tmp_path, {f'{folder}/a/1.jpg': JPEG, 'other/b/2.jpg': JPEG}), split)
    assert data.names == ('a/1.jpg',)


@pytest.mark.parametrize('packed', [False, True])
def test_another_split_does_not_stand_in(packed, tmp_path):
    files = {f'{folder}/1.png': encoded(picture(), 'PNG') for folder in ('train/a', 'train/b', 'Test/a')}
    root = pack(tmp_path / 'data.tar', files) if packed else write(tmp_path / 'data', files)
    with pytest.raises(EvaluationError, match=r'must have a folder of the split val, got Test, train only'):
        open_split(root, 'val')
    assert open_split(root, 'test').names == ('a/1.png',)
    classes = {f'{folder}/1.png': encoded(picture(), 'PNG') for folder in ('train', 'bus')}
    root = pack(tmp_path / 'classes.tar', classes) if packed else write(tmp_path / 'classes', classes)
    assert open_split(root, 'val').classes == ('bus', 'train')
    enclosed = {f'set/{folder}/1.png': encoded(picture(), 'PNG') for folder in ('train/a', 'train/b', 'bus/@eaDir')}
    root = pack(tmp_path / 'enclosed.tar', enclosed) if packed else write(tmp_path / 'enclosed', enclosed)
    with pytest.raises(EvaluationError, match='must have a folder of the split VAL, got set/train only'):
        open_split(root, 'VAL')


def test_the_archive_of_archives_of_the_training_images(tmp_path):
    inner = {name: pack(tmp_path / name, {f'{name[:9]}_1.JPEG': JPEG}).read_bytes()
             for name in ('n01440764.tar', 'n01443537.tar')}
    data = open_split(pack(tmp_path / 'ILSVRC2012_img_train.tar', inner))
    assert (data.classes, data.labels.tolist()) == (('n01440764', 'n01443537'), [0, 1])
    assert np.array_equal(read_item(data.dataset, 1), read_image(io.BytesIO(JPEG), 'x.jpg'))


def test_a_zip_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / 'photos.tar', 'w') as archive:  # whatever its name
        archive.writestr('photos/a/1.jpg', JPEG)
    with unpacked(tmp_path / 'photos.tar') as root:
        assert open_split(root).names == ('photos/a/1.jpg',)
        assert root.name.startswith('photos.tar-')  # shown in messages


# -- class maps --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('content', [
    b'dog\ncat\n', b'\xef\xbb\xbfdog\ncat\n', b'dog\r\ncat\r\n', b'dog\ncat\n\n\n', b' dog \ncat',
    'dog\r\ncat\r\n'.encode('utf-16')],
    ids=['plain', 'byte order mark', 'Windows', 'blank lines at the end', 'spaces', 'PowerShell'])
def test_a_class_map_of_any_editor(content, tmp_path):
    (tmp_path / 'map.txt').write_bytes(content)
    root = write(tmp_path / 'set', {f'{name}/{name}.jpg': JPEG for name in ('cat', 'dog')})
    data = open_split(root, options=DataOptions(class_map=str(tmp_path / 'map.txt')))
    assert (data.classes, data.labels.tolist(), data.notes) == (('dog', 'cat'), [1, 0], ())


def test_a_class_map_with_names_that_are_not_utf_8(tmp_path):
    (tmp_path / 'map.txt').write_bytes(b'caf\xe9\ndog\n')
    root = write(tmp_path / 'set', {f'{name}/1.jpg': JPEG for name in ('caf\udce9', 'dog')})
    data = open_split(root, options=DataOptions(class_map=str(tmp_path / 'map.txt')))
    assert data.classes == ('caf\udce9', 'dog')


def test_a_short_class_map_says_what_it_leaves_out(tmp_path):
    (tmp_path / 'map.txt').write_text('dog\n')
    root = write(tmp_path / 'set', {f'{name}/1.jpg': JPEG for name in ('cat', 'dog', 'owl')})
    data = open_split(root, options=DataOptions(class_map=str(tmp_path / 'map.txt')))
    assert data.names == ('dog/1.jpg',)
    assert data.notes == ('Skipped 2 images in 2 folders that --class-map does not name: cat (1), owl (1).',)


@pytest.mark.parametrize(('content', 'message'), [
    ('dog\n\ncat\n', 'must have one name per line, got a blank line 2'),
    ('dog\ncat\ndog\n', 'must name each class once, got dog twice'),
    ('\n', 'got an empty file'),
    ('0 dog\n1 cat\n', 'must name class folders, such as cat, got 0 dog'),
    (None, 'does not exist'),
])
def test_class_maps_that_are_refused(content, message, tmp_path):
    if content is not None:
        (tmp_path / 'map.txt').write_text(content)
    root = write(tmp_path / 'set', {f'{name}/1.jpg': JPEG for name in ('cat', 'dog')})
    with pytest.raises(EvaluationError, match=message):
        open_split(root, options=DataOptions(class_map=str(tmp_path / 'map.txt')))


# -- ILSVRC ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('folders', [False, True])
def test_what_is_missing_of_ilsvrc_is_counted_and_named(folders, tmp_path):
    numbers = (np.flatnonzero(np.isin(ilsvrc_val_labels(), [0, 3])) + 1).tolist()
    wnids = {0: 'n01440764', 3: 'n01491361'}

    def name(number: int) -> str:
        folder = f'{wnids[ilsvrc_val_labels()[number - 1]]}/' if folders else ''
        return f'{folder}ILSVRC2012_val_{number:08}.JPEG'

    root = write(tmp_path / 'set', {name(number): JPEG for number in numbers[4:]})
    first, second, third, _ = (name(number).rpartition('/')[2] for number in numbers[:4])
    assert open_split(root).notes == (
        f'4 of the 100 validation images of ILSVRC in these classes are missing: {first}, {second}, {third}, ...',)
    assert open_split(write(root, {name(number): JPEG for number in numbers[:4]})).notes == ()


# -- names -------------------------------------------------------------------------------------------------------------

def test_names_that_are_not_utf_8_have_a_fingerprint(tmp_path):
    files = {os.fsdecode(name): JPEG for name in (b'caf\xe9/\xff.jpg', b'dog/1.jpg')}
    from_folder, from_archive = open_split(write(tmp_path / 'set', files)), open_split(pack(tmp_path / 's.tar', files))
    found = fingerprint(from_folder, np.arange(2))
    assert found == fingerprint(from_archive, np.arange(2))
    assert (found['files'], found['bytes']) == (2, 2 * len(JPEG))
    told: list[str] = []
    check_data(from_folder, 0, told.append)
    assert read_item(from_archive.dataset, 0).size == (48, 32)


# -- shards and tables -------------------------------------------------------------------------------------------------

def test_shards_with_jpeg_keys_are_read(tmp_path):
    pytest.importorskip('webdataset')
    root = pack(tmp_path / 'val-0.tar', {'1.JPEG': JPEG, '1.cls': b'3', '2.JPEG': JPEG, '2.cls': b'5'}).parent
    data = open_split(root, 'val-0.tar|2', 'wds/')
    assert (data.labels.tolist(), data.expected) == ([3, 5], 2)


def test_shards_whose_classes_stand_in_json(tmp_path):
    pytest.importorskip('webdataset')
    root = pack(tmp_path / 'val-0.tar', {'x/1.jpg': JPEG, 'x/1.json': json.dumps({'id': 4}).encode()}).parent
    assert open_split(root, 'val-0.tar', 'wds/', DataOptions(target_key='id')).labels.tolist() == [4]


@pytest.mark.parametrize(('files', 'split', 'options', 'message'), [
    ({'1.jpg': JPEG, '1.cls': b'0'}, 'val-0.tar', DataOptions(input_key='photo'), '--input-key'),
    ({'1.heic': JPEG, '1.cls': b'0'}, 'val-0.tar', None, 'has no image under .*, only heic, cls'),
    ({'1.jpg': JPEG, '1.txt': b'a cat'}, 'val-0.tar', None, 'has no .cls with its class, only jpg, txt'),
    ({'1.jpg': JPEG, '1.cls': b'cat'}, 'val-0.tar', None, r"must have a whole number in its .cls, got b'cat'"),
    ({'1.jpg': JPEG, '1.json': b'{"id": 1}'}, 'val-0.tar', DataOptions(target_key='label'), 'under label in its .json'),
    ({'1.jpg': JPEG, '1.cls': b'0'}, 'val-{0..1}.tar', None, 'val-1.tar does not exist'),
    ({}, 'val-0.tar', None, 'have no images'),
])
def test_shards_that_are_refused(files, split, options, message, tmp_path):
    pytest.importorskip('webdataset')
    with pytest.raises(EvaluationError, match=message):
        open_split(pack(tmp_path / 'val-0.tar', files).parent, split, 'wds/', options)


def test_a_shard_that_is_cut_off_is_refused(tmp_path):
    pytest.importorskip('webdataset')
    path = pack(tmp_path / 'val-0.tar', {'1.jpg': JPEG, '1.cls': b'0', '2.jpg': JPEG, '2.cls': b'1'})
    path.write_bytes(path.read_bytes()[:-9000])
    with pytest.raises(EvaluationError, match='val-0.tar'):
        check_data(open_split(tmp_path, 'val-0.tar', 'wds/'), 0, lambda text: None)


@pytest.mark.parametrize('way', ['hfds', 'hfids'])
@pytest.mark.parametrize(('options', 'message'), [
    (DataOptions(num_samples=1), r'has no column label, only image, category. Name the column with --target-key'),
    (DataOptions(num_samples=1, target_key='category', input_key='photo'), 'photo'),
])
def test_tables_without_the_columns_are_refused(way, options, message, tmp_path):
    place = parquet(tmp_path / 'set', {'1.jpg': JPEG}, label='category')
    with pytest.raises(EvaluationError, match=message):
        open_split(tmp_path / 'cache', 'validation', f'{way}/{place}', options)


def test_a_class_map_is_for_folders(tmp_path):
    with pytest.raises(EvaluationError, match='--class-map names class folders'):
        open_split(tmp_path, 'val', 'wds/', DataOptions(class_map='map.txt'))


def test_the_images_of_torchvision_are_read_alike(tmp_path):
    write(tmp_path, {'val/a/1.jpg': encoded(picture(), 'JPEG', 6)})
    data = open_split(tmp_path, 'val', 'torch/folder')
    assert read_item(data.dataset, 0).size == (32, 48)
    assert data.classes == ('a',)
