"""Training batches: order and augmentation depend on seed, epoch and index alone."""
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data import create_dataset, create_transform

from timm_geoprior.data.batches import FolderLoader, LoaderConfig
from timm_geoprior.data.listing import folders_of_split
from timm_geoprior.data.memory import CropFlip, ImageTensors, MemoryLoader, decode_images
from timm_geoprior.errors import CorruptImagesError
from timm_geoprior.training.loaders import hold_out

HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope='module')
def photos(photo_folder: Path) -> ImageTensors:
    return decode_images(create_dataset('', root=str(photo_folder), split='train'), size=64, workers=0)


def make_transform(size: int):
    return create_transform(size, is_training=True, auto_augment='rand-m9-mstd0.5', mean=HALF, std=HALF, re_prob=0.5)


def memory_loader(photos, **kwargs):
    return MemoryLoader(photos, HALF, HALF, CropFlip(), LoaderConfig(**{'batch_size': 8, **kwargs}))


def folder_loader(folder, batch_size=8, workers=0, **kwargs):
    dataset = create_dataset('', root=str(folder), split='train')
    return FolderLoader(dataset, make_transform, LoaderConfig(batch_size), workers=workers, **kwargs)


def gather(loader, *args):
    batches = list(loader.epoch(*args))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


class TestDecode:
    def test_every_pixel_is_there(self, photos, photo_folder):
        dataset = create_dataset('', root=str(photo_folder), split='train')
        image, target = dataset[17]
        assert torch.equal(photos.images[17], torch.from_numpy(np.array(image)).permute(2, 0, 1))
        assert photos.targets[17] == target
        assert photos.images.shape == (48, 3, 64, 64)
        assert photos.targets.bincount().tolist() == [12] * 4

    def test_other_sizes_are_resized(self, photo_folder):
        dataset = create_dataset('', root=str(photo_folder), split='val')
        assert decode_images(dataset, size=32, workers=0).images.shape == (20, 3, 32, 32)


class TestCropFlip:
    def test_whole_image_at_its_size_is_the_image(self, photos):
        whole = CropFlip(scale=(1, 1), ratio=(1, 1), hflip=0)
        images = photos.images[:4].float()
        sampled = whole(images, torch.rand(4, 5), 64)
        torch.testing.assert_close(sampled, images, atol=0.05, rtol=0)  # out of 255: rounding of the sampling grid

    def test_flip(self, photos):
        flip = CropFlip(scale=(1, 1), ratio=(1, 1), hflip=1)
        images = photos.images[:4].float()
        torch.testing.assert_close(flip(images, torch.rand(4, 5), 64), images.flip(-1), atol=0.05, rtol=0)

    def test_a_crop_is_the_resized_window(self, photos):
        """A quarter of the area, moved to the upper left corner, doubled: pixel pairs lie around each source pixel."""
        quarter = CropFlip(scale=(0.25, 0.25), ratio=(1, 1), hflip=0)
        images = photos.images[:1].float()
        draws = torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.9]])
        window = torch.nn.functional.interpolate(images[:, :, :33, :33], scale_factor=2, mode='bilinear')[..., :64, :64]
        sampled = quarter(images, draws, 64)
        torch.testing.assert_close(sampled[..., 1:, 1:], window[..., 1:, 1:], atol=0.05, rtol=0)

    def test_crops_stay_inside_and_vary_as_asked(self):
        crop = CropFlip(scale=(0.3, 0.8))
        matrices = crop.matrices(torch.rand(2000, 5, generator=torch.Generator().manual_seed(0)))
        width, height = matrices[:, 0, 0].abs(), matrices[:, 1, 1]
        assert (width + matrices[:, 0, 2].abs() <= 1 + 1e-6).all()
        assert (height + matrices[:, 1, 2].abs() <= 1 + 1e-6).all()
        area = width * height
        assert 0.25 < area.min() < 0.32
        assert 0.75 < area.max() <= 0.8 + 1e-6
        assert 0.4 < (matrices[:, 0, 0] < 0).float().mean() < 0.6


class TestMemoryLoader:
    def test_batch_size_changes_nothing(self, photos):
        small, large = memory_loader(photos, batch_size=4), memory_loader(photos, batch_size=16)
        for a, b in zip(gather(small, 3, 32), gather(large, 3, 32), strict=True):
            assert torch.equal(a, b)

    def test_epochs_and_seeds_differ(self, photos):
        images, targets = gather(memory_loader(photos), 0, 32)
        for other in (gather(memory_loader(photos), 1, 32), gather(memory_loader(photos, seed=1), 0, 32)):
            assert not torch.equal(images, other[0])
            assert not torch.equal(targets, other[1])

    def test_every_image_once(self, photos):
        plain = MemoryLoader(photos, (0, 0, 0), (1, 1, 1), CropFlip((1, 1), (1, 1), 0), LoaderConfig(8))
        images, _ = gather(plain, 0, 64)
        found = (255 * images).round().to(torch.uint8).flatten(1).unique(dim=0)
        assert torch.equal(found, photos.images.flatten(1).unique(dim=0))

    def test_processes_share_each_global_batch(self, photos):
        whole = list(memory_loader(photos, batch_size=8).epoch(0, 32))
        shares = [list(memory_loader(photos, batch_size=4, rank=rank, world_size=2).epoch(0, 32)) for rank in (0, 1)]
        for batch, first, second in zip(whole, *shares, strict=True):
            assert torch.equal(batch[0][0::2], first[0])
            assert torch.equal(batch[0][1::2], second[0])

    def test_resumes_in_mid_epoch(self, photos):
        loader = memory_loader(photos)
        whole, rest = list(loader.epoch(2, 32)), list(loader.epoch(2, 32, first_batch=4))
        assert len(whole) == len(loader) == 6
        assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[4:], rest, strict=True))


class TestFolderLoader:
    def test_workers_and_batch_size_change_nothing(self, photo_folder):
        here = gather(folder_loader(photo_folder), 1, 32)
        there = gather(folder_loader(photo_folder, workers=2, batch_size=16), 1, 32)
        for a, b in zip(here, there, strict=True):
            assert torch.equal(a, b)

    def test_resumes_in_mid_epoch_at_any_size(self, photo_folder):
        loader = folder_loader(photo_folder)
        whole, rest = gather(loader, 0, 32), gather(loader, 0, 32, 4)
        assert torch.equal(whole[0][32:], rest[0])
        assert gather(loader, 0, 48)[0].shape == (48, 3, 48, 48)

    def test_repeated_augmentation(self, photo_folder):
        images, targets = gather(folder_loader(photo_folder, repeats=3), 0, 32)
        triples = targets.view(-1, 3)
        assert (triples == triples[:, :1]).all()
        assert not torch.equal(images[0], images[1])
        assert len(images) == 48

    def test_an_unreadable_image_is_named_and_replaced(self, photo_folder, tmp_path):
        root = copy_with_bad_images(photo_folder, tmp_path, 1)
        loader = folder_loader(root)
        with pytest.warns(UserWarning, match=r'coffee/00\.jpg cannot be read'):
            images, targets = gather(loader, 0, 32)
        assert len(images) == 48
        assert torch.isfinite(images).all()
        assert targets.bincount().tolist() == [12] * 4

    def test_unreadable_images_in_memory(self, photo_folder, tmp_path):
        dataset = create_dataset('', root=str(copy_with_bad_images(photo_folder, tmp_path, 2)), split='train')
        with pytest.warns(UserWarning, match=r'coffee/01\.jpg cannot be read'):
            found = decode_images(dataset, 64, workers=0, max_corrupt=2)
        assert found.targets.tolist() == [0] * 12 + [1] * 12 + [-1] * 2 + [2] * 10 + [3] * 12
        assert found.readable().targets.tolist() == [target for target in found.targets.tolist() if target >= 0]
        assert torch.equal(found.readable(torch.tensor([30, 25, 3])).images, found.images[[30, 3]])
        with (pytest.warns(UserWarning, match='cannot be read'), pytest.raises(CorruptImagesError, match='at most 1')):
            decode_images(dataset, 64, workers=0, max_corrupt=1)

    def test_too_many_unreadable_images_stop_the_run(self, photo_folder, tmp_path):
        root = copy_with_bad_images(photo_folder, tmp_path, 4)
        with (pytest.warns(UserWarning, match='cannot be read'), pytest.raises(CorruptImagesError, match='at most 2')):
            gather(folder_loader(root, max_corrupt=2), 0, 32)


def copy_with_bad_images(folder: Path, tmp_path: Path, count: int) -> Path:
    for source in folder.rglob('*.jpg'):
        target = tmp_path / source.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    for number in range(count):
        (tmp_path / f'train/coffee/{number:02}.jpg').write_bytes(b'\xff\xd8 no photograph')
    return tmp_path


class TestHoldOut:
    def test_the_same_images_of_each_class_are_drawn_each_time(self):
        targets = torch.tensor([0, 1] * 50)
        stay, held = hold_out(targets, 10)
        assert targets[held].bincount().tolist() == [10, 10]
        assert torch.equal(torch.cat([stay, held]).sort().values, torch.arange(100))
        assert torch.equal(hold_out(targets, 10)[1], held)
        for target in (0, 1):  # neither the first nor the last by name
            places = (targets == target).nonzero().flatten().tolist()
            drawn = [places.index(index) for index in held.tolist() if targets[index] == target]
            assert min(drawn) < 20 < max(drawn)
        assert torch.equal(hold_out(targets, 0.2)[1], held)

    def test_a_class_that_would_vanish(self):
        with pytest.raises(ValueError, match='Class 1 must have more than 2 images to hold out 2, got 2'):
            hold_out(torch.tensor([0, 0, 0, 1, 1]), 2)


@pytest.mark.parametrize(('folders', 'split', 'expected'), [
    (['train', 'Train', 'TRAINING'], 'train', ['train', 'Train', 'TRAINING']),
    (['Training', 'Testing'], 'train', ['Training']),
    (['val', 'Validation', 'dev'], 'validation', ['Validation', 'val', 'dev']),
    (['Testing', 'testing2'], 'test', ['Testing']),
    (['Fold1', 'fold2'], 'fold1', ['Fold1']),
    (['a', 'b'], 'train', []),
])
def test_a_split_has_several_names_in_any_case(folders, split, expected, tmp_path):
    for folder in folders:
        (tmp_path / folder).mkdir()
    assert folders_of_split(tmp_path, split) == expected
