"""Weight files: one reader for every command, and its messages about other files."""
import pickle
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from timm_geoprior.errors import GeoPriorError
from timm_geoprior.evaluation.models import load_model
from timm_geoprior.training.checkpoint import load_checkpoint, read_weights, strip_prefix
from timm_geoprior.training.parts import build_model
from timm_geoprior.training.recipe import make_recipe

NANO = 'geoprior_resnet14_nano'
RECIPE = make_recipe({'name': 'x', 'model': NANO, 'epochs': 1, 'batch_size': 8, 'lr': 0.1, 'img_size': 32})
SOURCE = timm.create_model(NANO, num_classes=3)


def halved(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value * 0.5 if value.is_floating_point() else value for name, value in model.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_every_reader_takes_the_same_weights(tmp_path):
    """A release, fine-tuning and timm's own loading use the weights that scripts/validate.py measures."""
    path = tmp_path / 'last.pt'
    torch.save({'model': SOURCE.state_dict(), 'model_ema': halved(SOURCE), 'model_name': NANO, 'num_classes': 3,
                'model_kwargs': {}}, path)
    measured = load_model(None, path).model.state_dict()
    released = read_weights(path).state_dict
    tuned = build_model(RECIPE, 3, start=read_weights(path)).state_dict()
    of_timm = timm.create_model(NANO, num_classes=3, checkpoint_path=str(path)).state_dict()
    for others in (released, tuned, of_timm):
        assert_same(measured, others)


@pytest.mark.parametrize(('name', 'value'), [
    ('model_name', 5), ('model_kwargs', [1]), ('num_classes', '3'), ('class_names', 3), ('recipe', 'a1')])
def test_what_another_program_means_by_a_name_is_not_taken(name, value, tmp_path):
    path = tmp_path / 'other.pt'
    torch.save({'model': SOURCE.state_dict(), 'model_name': NANO, 'num_classes': 3, name: value}, path)
    saved = read_weights(path)
    assert getattr(saved, name) == getattr(type(saved)({}), name)
    assert saved.img_size is None
    assert_same(load_model(NANO, path, num_classes=3).model.state_dict(), SOURCE.state_dict())


@pytest.mark.parametrize('wrap', [
    lambda state: {'state_dict': {f'model.{name}': value for name, value in state.items()} | {
        'loss.weight': torch.ones(3)}, 'pytorch-lightning_version': '2.5.0', 'hyper_parameters': {'lr': 0.1}},
    lambda state: {f'net.backbone.{name}': value for name, value in state.items()},
    lambda state: {f'module._orig_mod.{name}': value for name, value in state.items()},
    lambda state: {'model_ema': {'n_averaged': torch.tensor(3), **{f'module.{k}': v for k, v in state.items()}},
                   'model': {}},
], ids=['lightning', 'two levels', 'compiled in ddp', 'torchvision'])
def test_weights_below_a_prefix(wrap, tmp_path):
    """As other programs save them: the prefix is removed, and reported."""
    path = tmp_path / 'other.ckpt'
    torch.save(wrap(SOURCE.state_dict()), path)
    loaded = load_model(NANO, path, num_classes=3)
    assert_same(loaded.model.state_dict(), SOURCE.state_dict())
    assert_same(build_model(RECIPE, 3, start=read_weights(path)).state_dict(), SOURCE.state_dict())
    prefix = {True: "the weights below 'model.' are used", False: ''}['lightning' in str(torch.load(path).keys())]
    assert prefix in ' '.join(loaded.notes)


def test_a_prefix_is_taken_off_where_the_head_is_another():
    state = {f'model.{name}': value for name, value in timm.create_model(NANO, num_classes=7).state_dict().items()}
    found, prefix = strip_prefix(state, SOURCE.state_dict().keys())
    assert (prefix, len(found['fc.weight'])) == ('model.', 7)
    assert strip_prefix(SOURCE.state_dict(), SOURCE.state_dict().keys())[1] == ''


def pointer(path: Path) -> None:
    path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n')


def whole_model(path: Path) -> None:
    torch.save(SOURCE, path)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({'model': SOURCE}))


def a_list(path: Path) -> None:
    torch.save([torch.ones(1)], path)


def no_tensors(path: Path) -> None:
    torch.save({'epoch': 3, 'model': {'lr': 0.1}}, path)


def empty(path: Path) -> None:
    path.write_bytes(b'')


@pytest.mark.parametrize(('write', 'name', 'message'), [
    (pointer, 'a.pt', r'a\.pt must hold weights, got a Git LFS pointer to them\. Run `git lfs pull`'),
    (pointer, 'a.safetensors', 'got a Git LFS pointer'),
    (whole_model, 'a.pt', r'got a pickled timm_geoprior\.\S+, whose code is not run\. Save `model\.state_dict'),
    (pickled, 'a.pkl', 'cannot be read as a checkpoint|got a pickled'),
    (a_list, 'a.pt', 'must hold a dictionary, got a list'),
    (no_tensors, 'a.pt', 'must hold a state dict of tensors, got the keys epoch, model'),
    (empty, 'a.pt', 'cannot be read as a checkpoint'),
    (empty, 'a.safetensors', 'cannot be read as a checkpoint'),
    (lambda path: None, 'a.pt', r'a\.pt does not exist\. Check its path'),
])
def test_files_that_hold_something_else(write, name, message, tmp_path):
    write(tmp_path / name)
    with pytest.raises(GeoPriorError, match=message):
        read_weights(tmp_path / name)
    if write in (pointer, whole_model):
        with pytest.raises(GeoPriorError, match=message):
            load_checkpoint(tmp_path / name)
