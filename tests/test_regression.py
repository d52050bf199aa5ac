"""The conversion with images: least squares on sums, activations in files, and the effect of a fit on a network."""
import copy
import tempfile

import pytest
import timm
import torch
from torch import nn

from timm_geoprior.conversion.activations import Activations
from timm_geoprior.conversion.closed_form import SMALLEST_RADIUS
from timm_geoprior.conversion.mirror import blocks, mirror
from timm_geoprior.conversion.regression import PARTS, RADII, activation_bytes, refine
from timm_geoprior.conversion.ridge import PENALTIES, Moments, choose_penalty, solve
from timm_geoprior.conversion.state_dict import attention_blocks, convert_state_dict
from timm_geoprior.errors import GeoPriorError
from timm_geoprior.layers import GeoPriorConv2d

CPU = torch.device('cpu')


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def samples(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs that are not centred, and outputs that are nearly linear in them."""
    x = draw(count, 6, seed=seed) @ draw(6, 6, seed=1) + 3
    return x, x @ draw(6, 4, seed=2) - 5 + 0.1 * draw(count, 4, seed=seed + 10)


def gathered(x: torch.Tensor, y: torch.Tensor, parts: int = PARTS) -> Moments:
    sums = Moments(parts, x.shape[1], y.shape[1])
    for index, (some, outputs) in enumerate(zip(x.chunk(2 * parts), y.chunk(2 * parts), strict=True)):
        sums.add(index % parts, some, outputs)
    return sums


class TestRidge:
    def test_without_a_penalty_it_is_least_squares(self):
        x, y = samples(200)
        weight, constant = solve(gathered(x, y), torch.zeros(4, 6, dtype=torch.float64), 0.0)
        expected = torch.linalg.lstsq(torch.cat([x, torch.ones(200, 1)], 1), y).solution.T
        torch.testing.assert_close(torch.cat([weight, constant[:, None]], 1), expected)

    def test_the_penalty_is_on_the_distance_from_the_prior(self):
        x, y = samples(50)
        prior = draw(4, 6, seed=3)
        weight, constant = solve(gathered(x, y), prior, 0.3)
        centred, outputs = x - x.mean(0), y - y.mean(0)
        strength = 0.3 * centred.var(0, correction=0).mean() * 50
        left = outputs.T @ centred + strength * prior
        torch.testing.assert_close(weight, torch.linalg.solve(centred.T @ centred + strength * torch.eye(6), left.T).T)
        torch.testing.assert_close(constant, y.mean(0) - weight @ x.mean(0))

    @pytest.mark.parametrize('x', [torch.ones(20, 6), torch.zeros(20, 6)])
    def test_inputs_that_never_change_leave_the_prior(self, x):
        prior = draw(4, 6, seed=3)
        weight, constant = solve(gathered(x.double(), samples(20)[1]), prior, 1e-3)
        torch.testing.assert_close(weight, prior, atol=1e-4, rtol=0)
        assert constant.isfinite().all()

    @pytest.mark.parametrize('part', [None, 2])
    def test_covariances_are_those_of_the_samples(self, part):
        x, y = samples(100)
        own = torch.ones(100, dtype=torch.bool) if part is None else torch.arange(100) // 10 % PARTS == part
        xx, yx = gathered(x, y).covariances(x.mean(0), y.mean(0), part)
        x, y = (x - x.mean(0))[own], (y - y.mean(0))[own]
        torch.testing.assert_close((xx, yx), (x.T @ x / own.sum(), y.T @ x / own.sum()))

    def test_the_penalty_is_the_one_that_predicts_the_parts_left_out(self):
        x, y = samples(40)
        prior, importance = draw(4, 6, seed=3), torch.tensor([1.0, 0, 2, 0], dtype=torch.float64)
        errors, part = [], torch.arange(40) // 4 % PARTS
        for penalty in PENALTIES:
            errors.append(0.0)
            for left_out in range(PARTS):
                weight, constant = solve(gathered(x[part != left_out], y[part != left_out]), prior, penalty)
                missed = x[part == left_out] @ weight.T + constant - y[part == left_out]
                errors[-1] += float(missed.square().mean(0) @ importance)
        assert choose_penalty(gathered(x, y), prior, importance) == PENALTIES[errors.index(min(errors))]

    def test_parts_may_be_empty(self):
        prior, importance = draw(4, 6, seed=3), torch.ones(4, dtype=torch.float64)
        x, _ = samples(40)
        y = x @ prior.T + 10 * draw(40, 4, seed=5)
        sums = Moments(PARTS, 6, 4)
        for part, rows in ((0, slice(20)), (3, slice(20, 40))):
            sums.add(part, x[rows], y[rows])
        two = Moments(2, 6, 4)
        for part, rows in ((0, slice(20)), (1, slice(20, 40))):
            two.add(part, x[rows], y[rows])
        assert choose_penalty(sums, prior, importance) == choose_penalty(two, prior, importance) != PENALTIES[0]

    def test_few_noisy_samples_stay_near_a_good_prior(self):
        x, _ = samples(15)
        truth = draw(4, 6, seed=3)
        noisy = x @ truth.T + 10 * draw(15, 4, seed=5)
        exact = x @ truth.T
        importance = torch.ones(4, dtype=torch.float64)
        wrong = torch.zeros_like(truth)
        assert choose_penalty(gathered(x, noisy), truth, importance) > choose_penalty(
            gathered(x, exact), wrong, importance)


class TestActivations:
    def test_what_is_written_is_read(self):
        kept = Activations(3, 2 * 4 * 5 * 6)
        maps = [torch.randn(2, 4, 5, 6), torch.randn(1, 4, 5, 6)]
        for batch, some in enumerate(maps):
            kept.write(batch, some, 'somewhere')
        kept.write(0, maps[0][:, :3, ::2, ::2], 'somewhere')
        torch.testing.assert_close(kept.read(0, CPU), maps[0][:, :3, ::2, ::2], atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(kept.read(1, CPU), maps[1], atol=2e-3, rtol=1e-3)
        assert kept.read(1, CPU).is_contiguous(memory_format=torch.channels_last)

    def test_the_file_has_no_name(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
        kept = Activations(1, 10)
        kept.write(0, torch.zeros(1, 10, 1, 1), 'somewhere')
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(('value', 'got'), [
        (float('nan'), 'values that are not finite'), (float('inf'), 'values that are not finite'), (1e5, '1e+05')])
    def test_values_that_float16_cannot_hold_are_told(self, value, got):
        with pytest.raises(GeoPriorError) as raised:
            Activations(1, 10).write(0, torch.full((1, 10, 1, 1), value), 'the output of layer2.0')
        assert str(raised.value) == (
            f'The activations at the output of layer2.0 must be finite and within ±65,504, got {got}. Check the '
            f'weights of the source, and its mean and std.')


def smooth_images(count: int, size: int = 48, seed: int = 0) -> torch.Tensor:
    coarse = torch.randn(count, 3, size // 6, size // 6, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, (size, size), mode='bicubic')


@pytest.fixture(scope='module')
def trained() -> nn.Module:
    """A plain network of the nano's shape whose norms have the statistics of images, as after training."""
    torch.manual_seed(0)
    model = timm.create_model('geoprior_resnet14_nano', value_dims=(0, 0, 0, 0))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    with torch.no_grad():
        for _ in range(30):
            model(smooth_images(64))
    return model.eval()


def converted(source: nn.Module) -> nn.Module:
    model = mirror(source).create().eval()
    model.load_state_dict(convert_state_dict(source.state_dict(), model))
    return model


def refined(source: nn.Module, images: torch.Tensor, size: int = 8) -> tuple[nn.Module, list]:
    model = converted(source)
    batches = images.split(size)
    return model, refine(source, model, batches, len(batches), size)


@torch.inference_mode()
def feature_error(source: nn.Module, model: nn.Module) -> float:
    images = smooth_images(50, seed=9)
    expected = source.forward_features(images)
    return float((model.forward_features(images) - expected).norm() / expected.norm())


def test_images_make_it_better(trained):
    model, layers = refined(trained, smooth_images(200, seed=1))
    assert feature_error(trained, model) < 0.9 * feature_error(trained, converted(trained))
    assert [layer.name for layer in layers] == ['layer2.0', 'layer3.0', 'layer4.0']
    assert [layer.value_dim for layer in layers] == [8, 16, 24]
    assert all(0 < layer.lost < 1 and 0 < layer.output < 0.1 for layer in layers)


def test_few_images_make_it_no_worse(trained):
    model, _ = refined(trained, smooth_images(10, seed=1), size=2)
    assert feature_error(trained, model) < 1.1 * feature_error(trained, converted(trained))


def test_the_table_says_what_the_network_has(trained):
    images = smooth_images(40, seed=1)
    model, layers = refined(trained, images)
    closed = [float(item.attn.radius()[0]) for item in attention_blocks(converted(trained))]
    for layer, center, item in zip(layers, closed, attention_blocks(model), strict=True):
        assert float(item.attn.radius()[0]) == pytest.approx(layer.radius, rel=1e-5)
        assert layer.radius / center == pytest.approx(min(RADII, key=lambda ratio: abs(layer.radius / center - ratio)))
    with torch.no_grad():
        old, new = trained.forward_features(images), model.forward_features(images)
    assert layers[-1].output == pytest.approx(float((new - old).square().sum() / old.square().sum()), rel=0.02)


def test_channels_that_stay_are_the_source_s(trained):
    model, _ = refined(trained, smooth_images(40, seed=1))
    for (_, old), (_, new) in zip(blocks(trained), blocks(model), strict=True):
        torch.testing.assert_close(new.conv1.weight, old.conv1.weight, atol=0, rtol=0)
        if isinstance(new.conv2, GeoPriorConv2d):
            rows = {tuple(row) for row in old.conv2.weight.flatten(1).tolist()}
            assert all(tuple(row) in rows for row in new.conv2.conv.weight.flatten(1).tolist())
    assert trained.state_dict().keys() != model.state_dict().keys()


def test_the_source_is_not_changed_and_the_result_is_the_same_again(trained):
    before = copy.deepcopy(trained.state_dict())
    one, other = (refined(trained, smooth_images(40, seed=1))[0].state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items())


@pytest.mark.parametrize(('name', 'kwargs'), [
    ('resnet26t', {}), ('resnetblur50', {'layers': (1, 1, 1, 1)}), ('resnet26', {'output_stride': 8}),
    ('resnet14t', {'act_layer': 'silu', 'in_chans': 1}), ('resnet26', {'num_classes': 0, 'layers': (1, 2, 1, 1)}),
])
def test_every_kind_of_network_is_fitted(name, kwargs):
    torch.manual_seed(0)
    source = timm.create_model(name, zero_init_last=False, channels=(16, 32, 48, 64), **kwargs)
    images = torch.randn(15, source.in_chans, 64, 64)
    with torch.no_grad():
        source(images)
    source.eval()
    model, layers = refined(source, images, size=3)
    assert len(layers) == len(list(attention_blocks(model)))
    with torch.no_grad():
        old, new = source.forward_features(images), model.forward_features(images)
    assert torch.cosine_similarity(old.flatten(), new.flatten(), 0) > 0.98


def test_norms_that_let_nothing_through_keep_their_weights(trained):
    source = copy.deepcopy(trained)
    nn.init.zeros_(source.layer3[0].bn3.weight)
    model, _ = refined(source, smooth_images(40, seed=1))
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert feature_error(source, model) < 0.3


@pytest.mark.parametrize('name', ['bn2.weight', 'conv2.weight'])
def test_channels_that_never_change_leave_the_weights_of_the_next_layer(trained, name):
    """Their variance is zero, not a rounding error."""
    source = copy.deepcopy(trained)
    for stage in (source.layer3, source.layer4):
        nn.init.zeros_(stage[0].get_parameter(name))
    model, layers = refined(source, smooth_images(40, seed=1))
    for stage in ('layer3', 'layer4'):
        old, new = (network.get_submodule(f'{stage}.0.conv3').weight.sort(1).values for network in (source, model))
        torch.testing.assert_close(new, old, rtol=0, atol=1e-2 * float(old.abs().max()))
    assert all(layer.radius >= SMALLEST_RADIUS for layer in layers)


def test_the_temporary_files_are_as_large_as_was_said(trained, monkeypatch):
    sizes = []

    class Watched(Activations):
        def write(self, batch: int, maps: torch.Tensor, place: str) -> None:
            super().write(batch, maps, place)
            sizes.append(self.file.seek(0, 2))

    monkeypatch.setattr('timm_geoprior.conversion.regression.Activations', Watched)
    refined(trained, smooth_images(40, seed=1))
    assert 2 * max(sizes) == 40 * activation_bytes(converted(trained), (3, 48, 48))


def test_weights_that_give_nan_are_told(trained):
    source = copy.deepcopy(trained)
    source.conv1[0].weight.data[0, 0, 0, 0] = float('nan')
    with pytest.raises(GeoPriorError, match='at the input of the first attention layer must be finite'):
        refined(source, smooth_images(40, seed=1))
