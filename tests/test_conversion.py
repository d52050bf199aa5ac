"""The conversion in closed form: its sums against dense matrices and samples, and the state dicts that it returns."""
import copy
import logging
import math
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import Bottleneck, ResNet
from timm.utils import reparameterize_model
from torch import nn

from timm_geoprior import GeoPriorResNet
from timm_geoprior.conversion import closed_form
from timm_geoprior.conversion.closed_form import (
    FollowingLayers,
    InputModel,
    LayerModel,
    activation_statistics,
    fit_layer,
)
from timm_geoprior.conversion.state_dict import (
    ConversionError,
    attention_blocks,
    checkpoint_filter_fn,
    convert_state_dict,
)
from timm_geoprior.errors import GeoPriorError
from timm_geoprior.layers import GeoPriorConv2d, attention_map

CHANNELS = (8, 16, 24, 32)
VALUE_DIMS = (0, 8, 8, 8)
FAR_BORDERS = {'input_size': (3, 2 ** 30, 2 ** 30)}  # so that the share of border positions vanishes


class Rectifier(nn.ReLU):
    """A ReLU that the closed form does not recognize."""


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomize(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_var, 0.5)):
                    tensor.copy_(low + torch.rand(tensor.shape, generator=generator))
                module.running_mean.copy_(0.1 * torch.randn(module.running_mean.shape, generator=generator))
    return model.eval()


def plain(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return randomize(ResNet(Bottleneck, **{'layers': (2, 2, 2, 2), 'channels': CHANNELS, 'num_classes': 5, **kwargs}))


def geoprior(**kwargs) -> nn.Module:
    torch.manual_seed(1)
    options = {'layers': (2, 2, 2, 2), 'channels': CHANNELS, 'num_classes': 5, 'value_dims': VALUE_DIMS, **kwargs}
    return GeoPriorResNet(**options).eval()


def test_moments_of_a_rectified_gaussian_are_those_of_samples():
    mean, std = torch.tensor([-1.0, 0.0, 0.5, 3.0]), torch.tensor([1.0, 2.0, 0.3, 0.5])
    found = activation_statistics(mean, std, nn.ReLU())
    samples = (mean + std * draw(1_000_000, 4)).relu()
    torch.testing.assert_close(found.mean, samples.mean(0), rtol=0, atol=5e-3)
    torch.testing.assert_close(found.variance, samples.var(0), rtol=0, atol=2e-2)
    torch.testing.assert_close(found.slope, (samples > 0).double().mean(0), rtol=0, atol=5e-3)


@pytest.mark.parametrize(('activation', 'exact'), [(nn.SiLU(), False), (nn.GELU(), False), (Rectifier(), True)])
def test_other_activations_by_quadrature(activation, exact):
    mean, std = torch.tensor([-1.0, 0.0, 0.5]), torch.tensor([1.0, 2.0, 0.3])
    found = activation_statistics(mean, std, activation)
    samples = activation(mean + std * draw(1_000_000, 3))
    torch.testing.assert_close(found.mean, samples.mean(0), rtol=0, atol=1e-2)
    torch.testing.assert_close(found.variance, samples.var(0), rtol=0, atol=2e-2)
    assert (found.series.square().sum(0) <= found.variance * 1.02).all()
    if exact:
        rectified = activation_statistics(mean, std, nn.ReLU())
        torch.testing.assert_close(found.variance, rectified.variance, rtol=2e-2, atol=1e-3)
        torch.testing.assert_close(found.series[:4], rectified.series[:4], rtol=0, atol=5e-2)


def test_series_give_the_covariance_of_correlated_activations():
    correlation = torch.tensor([[0.9, -0.7], [0.3, 0.0]], dtype=torch.float64)
    mean, std = torch.tensor([0.3, -0.5]), torch.tensor([1.0, 2.0])
    series = activation_statistics(mean, std, nn.ReLU()).series
    found = closed_form._series_covariance(series, series, correlation)
    one, other = draw(1_000_000), draw(1_000_000, seed=1)
    for row in range(2):
        for column in range(2):
            r = correlation[row, column]
            left = (mean[row] + std[row] * one).relu()
            right = (mean[column] + std[column] * (r * one + (1 - r * r).sqrt() * other)).relu()
            expected = ((left - left.mean()) * (right - right.mean())).mean()
            assert abs(found[row, column] - expected) < 0.02


def input_model(rho: float = 0.5) -> InputModel:
    root = draw(3, 3, seed=1)
    return InputModel(draw(3).abs(), root @ root.T + 0.1 * torch.eye(3, dtype=torch.float64), rho)


def test_the_inputs_are_those_behind_a_convolution_of_white_noise():
    weight, bias, previous = draw(6), draw(6, seed=1), draw(6, 4, 1, 1, seed=2)
    found = InputModel.after_norm(weight, bias, nn.ReLU(), previous)
    samples = draw(1_000_000, 4, seed=3) @ previous.flatten(1).T
    samples = (samples / samples.std(0) * weight + bias).relu()
    torch.testing.assert_close(found.mean, samples.mean(0), rtol=0, atol=1e-2)
    torch.testing.assert_close(found.covariance, samples.T.cov(), rtol=0, atol=2e-2)
    assert (found.covariance - found.covariance.diagonal().diag()).abs().max() > 0.2


def test_nothing_depends_on_how_neighbours_share_a_scale():
    """Multiplying a norm's weight and bias by a factor and dividing the next weights by it gives the same network."""
    def fit(first: torch.Tensor, second: torch.Tensor):
        inputs = InputModel.after_norm(draw(8, seed=1) * first, draw(8, seed=2) * first, nn.ReLU(), draw(8, 6, seed=3))
        layer = LayerModel(draw(16, 8, 3, 3) / first[:, None, None], inputs, (7, 7))
        following = FollowingLayers(draw(16, seed=4) * second, draw(16, seed=5) * second, nn.ReLU(),
                                 draw(32, 16, seed=6) / second)
        return fit_layer(layer, following, 4)

    one = fit(torch.ones(8).double(), torch.ones(16).double())
    first, second = 10 ** draw(8, seed=7), 10 ** draw(16, seed=8)
    other = fit(first, second)
    torch.testing.assert_close(other.channels, one.channels)
    torch.testing.assert_close(other.radii, one.radii)
    torch.testing.assert_close(other.values * first, one.values)
    scales = second[one.channels]
    torch.testing.assert_close(other.correction / scales[:, None] * second, one.correction, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(other.constant / scales, one.constant, rtol=1e-6, atol=1e-9)


def test_channels_that_are_always_zero_do_no_harm():
    weight, bias, previous = draw(6), torch.full((6,), -50.0), draw(6, 4)
    weight[3:], previous[4:] = 0, 0
    layer = LayerModel(draw(4, 6, 3, 3), InputModel.after_norm(weight, bias, nn.ReLU(), previous), (7, 7))
    assert layer.errors(torch.ones(1, dtype=torch.float64)).isfinite().all()
    assert layer.covariance().isfinite().all()


@pytest.mark.parametrize('activation', [nn.ReLU(), nn.SiLU(), nn.GELU()])
@pytest.mark.parametrize(('weight', 'bias', 'row'), [
    (1e-9, 1, 1), (1e-20, 1, 1), (1, 1e10, 1), (1, 1e20, 1), (1, 1, 1e-170)])
def test_channels_of_any_size_are_fitted(weight, bias, row, activation):
    """Also next to ordinary channels, and if rows of the preceding convolution are nearly equal."""
    size = torch.ones(8, dtype=torch.float64)
    size[::2] = weight
    previous = torch.stack([torch.ones(6, dtype=torch.float64)] * 8) + 1e-3 * draw(8, 6)
    previous[::2] *= row
    inputs = InputModel.after_norm(draw(8, seed=1) * size, draw(8, seed=2) * bias, activation, previous)
    layer = LayerModel(draw(16, 8, 3, 3), inputs, (7, 7))
    following = FollowingLayers(draw(16, seed=4), draw(16, seed=5) * bias, activation, draw(32, 16, seed=6))
    fit = fit_layer(layer, following, 4)
    for found in (fit.values, fit.mean_shift, fit.errors, fit.correction, fit.constant):
        assert found.isfinite().all()


def test_the_variance_of_a_channel_that_is_always_active():
    found = activation_statistics(torch.tensor([0.3, 1e10]), torch.tensor([1e-9, 2.0]), nn.ReLU())
    torch.testing.assert_close(found.variance, torch.tensor([1e-18, 4.0], dtype=torch.float64), rtol=1e-3, atol=0)


def dense_model(weight, inputs, size, stride, radius, kernel):
    """Convolution, attention and covariance of the inputs as matrices over all positions of a map."""
    (height, width), cells = size, size[0] * size[1]
    impulses = torch.eye(cells, dtype=torch.float64).view(cells, 1, height, width)
    each_tap = torch.eye(9, dtype=torch.float64).view(9, 1, 3, 3)
    taps = torch.nn.functional.conv2d(impulses, each_tap, stride=stride, padding=1).flatten(2).permute(1, 2, 0)
    log_radius = torch.tensor([math.log(radius)], dtype=torch.float64)
    attention = torch.kron(*(attention_map(log_radius, side, stride, kernel=kernel)[0] for side in size))
    distances = [(torch.arange(side)[:, None] - torch.arange(side)).abs().double() for side in size]
    correlation = torch.kron(*(inputs.rho ** distance for distance in distances))
    return torch.einsum('oit,tqk->oiqk', weight.flatten(2), taps), attention, correlation


@pytest.mark.parametrize('kernel', ['gaussian', 'laplacian'])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('size', [(5, 6), (7, 4), (1, 3)])
def test_sums_are_those_of_dense_matrices(size, stride, kernel):
    weight, radius = draw(4, 3, 3, 3), 0.9
    inputs = input_model(rho=0.4)
    layer = LayerModel(weight, inputs, size, stride, kernel)
    convolution, attention, correlation = dense_model(weight, inputs, size, stride, radius, kernel)
    both = torch.einsum('oiqk,kl,ql->oi', convolution, correlation, attention)
    norm = torch.einsum('qk,kl,ql->', attention, correlation, attention)
    values = layer.values(torch.arange(4), radius)
    torch.testing.assert_close(values, both / norm)
    left = convolution - values[:, :, None, None] * attention
    missed = torch.einsum('oiqk,kl,ojql,ij->o', left, correlation, left, inputs.covariance)
    covariance = torch.einsum('oiqk,kl,pjql,ij->op', convolution, correlation, convolution, inputs.covariance)
    errors = layer.errors(torch.tensor([radius], dtype=torch.float64))
    torch.testing.assert_close(errors[0], missed / covariance.diagonal())
    means = torch.einsum('oiqk,i->oq', left, inputs.mean).mean(1)
    torch.testing.assert_close(layer.mean_shift(torch.arange(4), values), -means)
    torch.testing.assert_close(layer.covariance(), covariance / len(attention))


def test_covariance_with_the_attention_of_two_heads():
    weight, values, radii = draw(4, 3, 3, 3), draw(4, 3, seed=2), torch.tensor([0.7, 2.0], dtype=torch.float64)
    inputs = input_model()
    cross, among = LayerModel(weight, inputs, (5, 6)).cross_covariance(values, radii)
    parts = [dense_model(weight, inputs, (5, 6), 1, radius, 'gaussian') for radius in radii.tolist()]
    convolution, _, correlation = parts[0]
    attention = torch.stack([parts[0][1], parts[0][1], parts[1][1], parts[1][1]])
    mixed = torch.einsum('oiqk,kl,dql,dj,ij->od', convolution, correlation, attention, values, inputs.covariance)
    torch.testing.assert_close(cross, mixed / 30)
    own = torch.einsum('cqk,kl,dql,ci,dj,ij->cd', attention, correlation, attention, values, values, inputs.covariance)
    torch.testing.assert_close(among, own / 30)


def test_the_middle_of_a_large_map_is_counted_once():
    weight, inputs = draw(4, 3, 3, 3), input_model()
    whole = closed_form._Axis(302, 2, 0.5, 'gaussian')
    closed_form.LARGEST_MAP, kept = 1000, closed_form.LARGEST_MAP
    try:
        exact = closed_form._Axis(302, 2, 0.5, 'gaussian')
    finally:
        closed_form.LARGEST_MAP = kept
    assert whole.size < exact.size
    radii = torch.tensor([0.5, 3.0], dtype=torch.float64)
    for found, expected in zip(whole.windows(radii), exact.windows(radii), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(whole.pairs, exact.pairs)
    assert LayerModel(weight, inputs, (2 ** 40, 2 ** 40)).variance.isfinite().all()


def fitted(num_heads: int = 1, activation: nn.Module | None = None):
    weight, bias = draw(16, 8, 3, 3), 0.3 * draw(16, seed=4).abs()
    inputs = InputModel.after_norm(draw(8, seed=1), draw(8, seed=2), nn.ReLU(), draw(8, 6, seed=7))
    layer = LayerModel(weight, inputs, (7, 7))
    following = FollowingLayers(draw(16, seed=3), bias, activation or nn.ReLU(), draw(32, 16, seed=5))
    return layer, following, fit_layer(layer, following, 4, num_heads)


def test_the_correction_is_a_regression_of_what_is_lost():
    """Against least squares on samples of the model itself, at a position far from any border."""
    layer, following, _ = fitted()
    layer = LayerModel(layer.kernels.view(16, 8, 3, 3), layer.inputs, (2 ** 30, 2 ** 30))
    fit = fit_layer(layer, following, 4)
    distance = (torch.arange(7)[:, None] - torch.arange(7)).abs().double()
    root = torch.linalg.cholesky(torch.kron(layer.inputs.rho ** distance, layer.inputs.rho ** distance))
    maps = (draw(40_000, 8, 49, seed=6) @ root.T).view(-1, 8, 7, 7)
    maps = torch.einsum('ij,njhw->nihw', torch.linalg.cholesky(layer.inputs.covariance), maps)
    old = maps[:, :, 2:5, 2:5].flatten(1) @ layer.kernels.flatten(1).T
    weights = attention_map(torch.tensor(fit.radii).double().log(), 7)[0][3]
    attended = torch.einsum('nihw,h,w,ci->nc', maps, weights, weights, fit.values)
    new = old.index_copy(1, fit.channels, attended)
    scale = following.weight / layer.variance.sqrt()
    kept = (new * scale + following.bias).relu()
    lost = ((old * scale + following.bias).relu() - kept)[:, fit.channels]
    left = lost - kept @ fit.correction.T - fit.constant
    assert left.mean(0).abs().max() < 0.02 * lost.std(0).max()
    best = torch.linalg.lstsq(kept - kept.mean(0), lost - lost.mean(0)).solution
    remaining = (lost - lost.mean(0) - (kept - kept.mean(0)) @ best).var(0)
    torch.testing.assert_close(left.var(0), remaining, rtol=0.03, atol=0)
    assert (remaining < 0.97 * lost.var(0)).all()


@pytest.mark.parametrize('activation', [nn.ReLU(), nn.SiLU()])
@pytest.mark.parametrize('num_heads', [1, 2, 4])
def test_heads_have_radii_and_channels_of_their_own(num_heads, activation):
    layer, _, fit = fitted(num_heads, activation)
    assert len(fit.radii) == num_heads
    assert len(set(fit.channels.tolist())) == len(fit.channels) == 4
    for part, radius in zip(fit.channels.chunk(num_heads), fit.radii, strict=True):
        torch.testing.assert_close(fit.values[torch.isin(fit.channels, part)], layer.values(part, radius))


def planted(value_dims: tuple[int, ...] = VALUE_DIMS) -> tuple[nn.Module, nn.Module]:
    """A GeoPrior ResNet, and a plain one with the same attention in some of its channels: blurred 1x1 projections.

    A 3x3 kernel covers a Gaussian of up to 0.37 cells to within 1e-6. The blurred channels lie among the others.
    """
    model, source = randomize(geoprior(value_dims=value_dims)), plain()
    state, shuffle = model.state_dict(), torch.Generator().manual_seed(2)
    for number, item in enumerate(attention_blocks(model)):
        item.attn.log_radius.data.fill_(math.log(0.31 + 0.01 * number))
        taps = attention_map(item.attn.log_radius.detach().double(), 101)[0, 50, 49:52]
        blurred = item.attn.value.weight.detach().double() * torch.outer(taps, taps)
        order = torch.randperm(len(item.block.bn2.weight), generator=shuffle)
        for name in ('weight', 'bias', 'running_mean', 'running_var'):
            state[f'{item.prefix}bn2.{name}'] = state[f'{item.prefix}bn2.{name}'][order]
        state[f'{item.prefix}conv3.weight'] = state[f'{item.prefix}conv3.weight'][:, order]
        kernels = torch.cat([state.pop(f'{item.prefix}conv2.conv.weight'), blurred.float()])[order]
        state[f'{item.prefix}conv2.weight'] = kernels
        del state[f'{item.prefix}conv2.attn.value.weight'], state[f'{item.prefix}conv2.attn.log_radius']
    source.load_state_dict(state)
    return model, source


def test_planted_attention_is_found():
    model, source = planted()
    converted = geoprior()
    converted.pretrained_cfg = FAR_BORDERS
    assert converted.load_state_dict(convert_state_dict(source.state_dict(), converted))
    for found, expected in zip(attention_blocks(converted), attention_blocks(model), strict=True):
        torch.testing.assert_close(found.attn.radius(), expected.attn.radius(), rtol=1e-3, atol=0)
        scale = expected.attn.value.weight.abs().max()
        # the order of the channels is lost
        differences = (found.attn.value.weight[:, None] - expected.attn.value.weight).abs().amax((2, 3, 4))
        assert (differences.min(1).values < 1e-5 * scale).all()


def test_a_planted_network_gives_the_same_features():
    _, source = planted((0, 8, 0, 0))
    converted = geoprior(value_dims=(0, 8, 0, 0))
    converted.pretrained_cfg = FAR_BORDERS
    converted.load_state_dict(convert_state_dict(source.state_dict(), converted))
    images = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (model.forward_intermediates(images, indices=[2], intermediates_only=True)[0]
                           for model in (source, converted))
    # at the border the convolution sees zeros, and the attention does not
    inside = (..., slice(3, -3), slice(3, -3))
    assert (found - expected)[inside].abs().max() < 1e-5 * expected.abs().max()
    assert (found - expected).abs().max() > 1e-4 * expected.abs().max()


MODELS = {
    'bottleneck': ({}, {}),
    'other maps and heads': ({}, {'attn_heads': 2, 'attn_kernel': 'laplacian', 'value_dims': (2, 8, 12, 16)}),
    'deep stem, pooled shortcuts': ({'stem_type': 'deep', 'avg_down': True}, {}),
    'another activation': ({'act_layer': nn.SiLU}, {}),
}


@pytest.mark.parametrize('name', MODELS)
def test_the_attention_stands_in_for_what_it_replaces(name):
    """With smooth kernels, as some in trained networks, it is far closer to the source than without attention."""
    both, own = MODELS[name]
    source, model = plain(**both), geoprior(**both, **own)
    model.pretrained_cfg = {'input_size': (3, 96, 96)}
    images = torch.randn(8, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in (source.layer1, source.layer2, source.layer3, source.layer4):
            for block in layer:
                block.conv2.weight.copy_(block.conv2.weight.mean((2, 3), keepdim=True) + 0.3 * block.conv2.weight)
        source.train()(images)  # the network's own running statistics
        source.eval()
        model.load_state_dict(convert_state_dict(source.state_dict(), model))
        converted = (model.forward_features(images) - source.forward_features(images)).norm()
        for item in attention_blocks(model):
            item.attn.value.weight.zero_()
        assert converted < 0.7 * (model.forward_features(images) - source.forward_features(images)).norm()


def test_the_same_bits_whatever_the_output_stride_and_the_head():
    source = plain().state_dict()
    first = convert_state_dict(source, geoprior())
    for options in ({}, {'output_stride': 8}, {'num_classes': 0}, {'global_pool': 'max'}):
        again = convert_state_dict(source, geoprior(**options))
        assert again.keys() == first.keys()
        assert all(torch.equal(again[key], first[key]) for key in first)


def test_the_map_size_is_that_of_the_input_size():
    source, model = plain().state_dict(), geoprior()
    assert [item.map_size for item in attention_blocks(model)][:2] == [(56, 56), (28, 28)]
    assert [item.stride for item in attention_blocks(model)] == [2, 1] * 3
    first = convert_state_dict(source, model)
    model.pretrained_cfg = {'input_size': (3, 64, 100)}
    assert [item.map_size for item in attention_blocks(model)][:3] == [(16, 25), (8, 13), (8, 13)]
    assert not torch.equal(convert_state_dict(source, model)['layer4.0.bn2.running_mean'],
                           first['layer4.0.bn2.running_mean'])


def test_half_precision_and_float64_sources():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        source = {key: value.to(dtype) if value.is_floating_point() else value
                  for key, value in plain().state_dict().items()}
        converted = convert_state_dict(source, geoprior())
        assert converted['layer4.0.conv2.attn.value.weight'].dtype == dtype
        assert converted['layer4.0.conv2.attn.log_radius'].dtype == torch.promote_types(dtype, torch.float32)
        geoprior().load_state_dict(converted)


@pytest.mark.parametrize('change', [
    lambda model: delattr(model, 'layer4'),
    lambda model: setattr(model, 'layer4', nn.Sequential(nn.Conv2d(64, 8, 3))),
    lambda model: model.layer4.append(nn.ReLU()),
    lambda model: model.layer3.insert(0, nn.Sequential(model.layer3[0], nn.ReLU())),
], ids=['cut off', 'replaced', 'appended', 'wrapped'])
def test_a_changed_network_loads_its_own_weights(change):
    model = geoprior()
    change(model)
    assert str(model.load_state_dict(model.state_dict())) == '<All keys matched successfully>'


@pytest.mark.parametrize('feature_cls', ['list', 'dict'])
def test_weights_that_nothing_converts_are_refused(feature_cls):
    """timm's networks of features have no class of this package around the stages; strict=False would keep silent."""
    features = timm.create_model('geoprior_resnet14_nano', features_only=True, feature_cls=feature_cls)
    source = timm.create_model('geoprior_resnet14_nano', value_dims=(0, 0, 0, 0)).state_dict()
    with pytest.raises(RuntimeError, match=r'layer2\.0\.conv2\.weight is that of a plain convolution, .* features_'):
        features.load_state_dict(source, strict=False)


def test_weights_with_fewer_stages_of_attention_name_the_option():
    fewer = timm.create_model('geoprior_resnet14_nano', value_dims=(0, 0, 16, 24)).state_dict()
    with pytest.raises(RuntimeError, match=r'layer2\.0\.conv2\.weight is that of .* such as value_dims'):
        timm.create_model('geoprior_resnet14_nano').load_state_dict(fewer, strict=False)


def test_a_layer_with_a_weight_of_its_own_loads_it():
    class Scaled(GeoPriorConv2d):
        def __init__(self) -> None:
            super().__init__(8, 8, 4)
            self.weight = nn.Parameter(torch.ones(1))

    assert str(Scaled().load_state_dict(Scaled().state_dict())) == '<All keys matched successfully>'


def test_dead_channels_go_first_and_do_no_harm():
    source = plain()
    with torch.no_grad():
        dead = torch.tensor([1, 3, 4, 8, 9, 13, 14, 15])
        source.layer2[1].bn2.weight[dead] = 0
        source.layer3[1].conv2.weight.zero_()
        source.layer4[1].bn1.weight.zero_()
        source.layer4[1].bn1.bias.zero_()
    converted = convert_state_dict(source.state_dict(), geoprior())
    assert all(tensor.isfinite().all() for tensor in converted.values())
    assert (converted['layer2.1.bn2.weight'][-8:] == 0).all()


def test_the_source_is_not_changed():
    source = plain().state_dict()
    before = {key: value.clone() for key, value in source.items()}
    convert_state_dict(source, geoprior())
    assert all(torch.equal(source[key], before[key]) for key in before)


# -- where timm and torch load -----------------------------------------------------------------------------------------

NANO = 'geoprior_resnet14_nano'
PLAIN = {'value_dims': (0, 0, 0, 0)}  # the nano's plain twin


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[key], state[key].to(found[key])) for key in found)


@pytest.fixture(scope='module')
def twin() -> dict[str, torch.Tensor]:
    """The state dict of a plain network of the nano's shape. Do not modify."""
    torch.manual_seed(0)
    return randomize(timm.create_model(NANO, **PLAIN)).state_dict()


@pytest.fixture(scope='module')
def expected(twin) -> dict[str, torch.Tensor]:
    return convert_state_dict(twin, timm.create_model(NANO))


def test_every_way_to_load_converts(twin, expected, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger='timm_geoprior')
    torch.save(twin, tmp_path / 'twin.pth')
    save_file(twin, tmp_path / 'twin.safetensors')
    model = timm.create_model(NANO)
    model.load_state_dict(twin)
    whole = nn.ModuleDict({'backbone': timm.create_model(NANO), 'head': nn.Linear(2, 2)})
    whole.load_state_dict({**whole['head'].state_dict(prefix='head.'),
                           **{f'backbone.{key}': value for key, value in twin.items()}})
    for loaded in (
            model, whole['backbone'],
            timm.create_model(NANO, checkpoint_path=str(tmp_path / 'twin.pth')),
            timm.create_model(NANO, checkpoint_path=str(tmp_path / 'twin.safetensors')),
            timm.create_model(NANO, pretrained=True, pretrained_cfg_overlay={'file': str(tmp_path / 'twin.pth')}),
            timm.create_model(NANO, pretrained=True, pretrained_cfg_overlay={'state_dict': dict(twin)})):
        assert same(loaded, expected)
    assert len(caplog.messages) == 6
    assert all(message.startswith('Converted the weights of a plain ResNet in closed form: 48 channels of 3 layers')
               for message in caplog.messages)


@pytest.mark.parametrize('options', [
    {'num_classes': 7}, {'num_classes': 0}, {'in_chans': 1}, {'in_chans': 5, 'num_classes': 3}, {'features_only': True},
    {'features_only': True, 'output_stride': 8}, {'dtype': torch.bfloat16}])
def test_timm_adapts_what_it_always_adapts(twin, expected, tmp_path, options):
    save_file(twin, tmp_path / 'twin.safetensors')
    save_file(expected, tmp_path / 'converted.safetensors')
    models = []
    for file in ('twin', 'converted'):
        torch.manual_seed(0)
        models.append(timm.create_model(
            NANO, pretrained=True, pretrained_cfg_overlay={'file': str(tmp_path / f'{file}.safetensors')}, **options))
    assert same(models[0], models[1].state_dict())


def test_a_geoprior_state_dict_is_not_touched(expected, caplog):
    caplog.set_level(logging.INFO, logger='timm_geoprior')
    assert checkpoint_filter_fn(expected, timm.create_model(NANO)) is expected
    model = timm.create_model(NANO)
    model.load_state_dict(expected)
    assert same(model, expected)
    merged = reparameterize_model(model)
    merged.load_state_dict(merged.state_dict())
    plain_one = timm.create_model(NANO, **PLAIN)
    assert checkpoint_filter_fn(plain_one.state_dict(), plain_one)
    plain_one.load_state_dict(plain_one.state_dict())
    assert not caplog.messages


@pytest.mark.parametrize(('value_dims', 'name'), [
    ((0, 0, 0, 0), 'layer2.0.conv2.weight'), ((0, 8, 16, 0), 'layer4.0.conv2.weight'),
    ((8, 8, 16, 24), 'layer1.0.conv2.conv.weight')])
def test_weights_of_other_3x3_layers_are_refused(expected, value_dims, name):
    """With another number of classes, timm would leave the layers random and load the rest."""
    message = f'must have the 3x3 layers of the network, got none for {name}. Build it with the options of the weights'
    for options in ({'pretrained_cfg_overlay': {'state_dict': expected}}, {}):
        with pytest.raises(GeoPriorError, match=re.escape(message)) as raised:
            timm.create_model(NANO, pretrained=True, num_classes=7, value_dims=value_dims, **options)
    assert str(raised.value).startswith('The weights of geoprior_resnet14_nano.r64_tin200 cannot be loaded: Weights ')


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


def having(name, value):
    return lambda state: {**state, name: value}


SPOILT = {
    'a 3x3 is missing': (lambda state: without(state, 'layer3.0.conv2.weight'), 'layer3.0.conv2.weight, got none'),
    'a norm is missing': (lambda state: without(state, 'layer3.0.bn2.weight'), 'layer3.0.bn2.weight, got none'),
    'a plain stage lacks a norm': (lambda state: without(state, 'layer1.0.bn3.bias'), 'bn3.bias, got none'),
    'another width': (having('layer4.0.conv2.weight', torch.zeros(72, 144, 3, 3)),
                      'layer4.0.conv2.weight of the shape 144 x 144 x 3 x 3, got 72 x 144 x 3 x 3'),
    'groups': (having('layer4.0.conv2.weight', torch.zeros(144, 36, 3, 3)), 'got 144 x 36 x 3 x 3'),
    'a wider norm': (having('layer2.0.bn1.bias', torch.zeros(70)), 'layer2.0.bn1.bias of the shape 64, got 70'),
    'a deeper network': (having('layer3.1.conv1.weight', torch.zeros(1)), 'got layer3.1.conv1.weight among them'),
    'channel attention': (having('layer3.0.se.fc1.weight', torch.zeros(1)), 'got layer3.0.se.fc1.weight among them'),
    'not finite': (having('layer2.0.bn2.running_var', torch.full((64,), torch.nan)), 'inf or nan in layer2.0.bn2.run'),
    'a negative variance': (having('layer2.0.bn2.running_var', torch.full((64,), -0.5)),
                            'variances of at least 0, got -0.5 in layer2.0.bn2.running_var'),
    'not finite, elsewhere': (having('fc.bias', torch.full((200,), torch.inf)), 'inf or nan in fc.bias'),
    'integers': (having('layer2.0.conv2.weight', torch.zeros(64, 64, 3, 3, dtype=torch.int8)),
                 'floating point, and not on the meta device, got layer2.0.conv2.weight as torch.int8, torch.strided'),
    'sparse': (having('layer2.0.conv2.weight', torch.zeros(64, 64, 3, 3).to_sparse()), 'torch.sparse_coo on cpu'),
    'no values': (having('layer2.0.bn2.weight', torch.zeros(64, device='meta')), 'torch.strided on meta'),
    'too large': (having('layer2.0.conv2.weight', torch.full((64, 64, 3, 3), 3e38)),
                  'must be finite in torch.float32, got inf in layer2.0.'),
    'not tensors': (having('layer2.0.bn2.running_var', 3), 'layer2.0.bn2.running_var, got int'),
    'another family': (lambda state: {'head.weight': torch.zeros(3, 3)}, 'got head.weight among them'),
    'nothing': (lambda state: {}, 'must hold a tensor conv1.0.weight, got none'),
}


@pytest.mark.parametrize('num_classes', [200, 7])
@pytest.mark.parametrize('name', SPOILT)
def test_other_weights_are_refused_in_one_sentence(twin, name, num_classes):
    spoil, message = SPOILT[name]
    state = spoil(dict(twin))
    with pytest.raises(ConversionError, match=re.escape(message)) as caught:
        checkpoint_filter_fn(state, timm.create_model(NANO, num_classes=num_classes))
    assert '\n' not in str(caught.value)
    if state:  # timm does not load the remaining tensors
        overlay = {'state_dict': state}
        with pytest.raises(ConversionError, match=re.escape(message)):
            timm.create_model(NANO, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay)


def test_load_state_dict_says_what_the_conversion_lacks(twin):
    model = timm.create_model(NANO)
    before = copy.deepcopy(model.state_dict())
    for strict in (True, False):
        with pytest.raises(ConversionError, match=r'^Weights .* must hold a tensor layer3\.0\.bn2\.weight, got none'):
            model.load_state_dict(without(twin, 'layer3.0.bn2.weight'), strict=strict)
    assert same(model, before)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "layer5'):
        model.load_state_dict({**twin, 'layer5.weight': torch.zeros(1)})


@pytest.mark.parametrize(('options', 'message'), [
    ({'norm_layer': nn.Identity}, 'must have batch norms with weights and statistics, got none in layer2.0.bn1.weight'),
    ({'norm_layer': partial(nn.BatchNorm2d, track_running_stats=False)}, 'got none in layer2.0.bn2.running_mean'),
    ({'act_layer': 'prelu'}, 'must have activations without weights, got PReLU in layer2.0. Use another act_layer.'),
    ('folded', 'got none in layer2.0.bn1.weight. Create it again and load into that.')])
def test_a_network_that_can_load_no_plain_resnet_says_so(twin, options, message):
    folded = options == 'folded'
    model = reparameterize_model(timm.create_model(NANO).eval()) if folded else timm.create_model(NANO, **options)
    source = twin if folded else timm.create_model(NANO, **PLAIN, **options).state_dict()
    with pytest.raises(ConversionError, match=re.escape(message)):
        model.load_state_dict({**twin, **source})


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_assigned_weights_keep_their_types(twin, dtype):
    source = {key: value.to(dtype) if value.is_floating_point() else value for key, value in twin.items()}
    with torch.device('meta'):
        model = timm.create_model(NANO).eval()
    model.load_state_dict(source, assign=True)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    with torch.no_grad():
        found = model(draw(1, 3, 64, 64).to(dtype))
    assert found.dtype == dtype
    copied = timm.create_model(NANO).eval()
    copied.load_state_dict(source)
    with torch.no_grad():
        expected = copied.to(dtype)(draw(1, 3, 64, 64).to(dtype))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_old_checkpoints_without_counters(twin, expected):
    old = {key: value for key, value in twin.items() if not key.endswith('num_batches_tracked')}
    model = timm.create_model(NANO, pretrained=True, pretrained_cfg_overlay={'state_dict': old})
    assert same(model, expected)


def test_a_converted_model_is_pickled_and_copied(twin, expected):
    model = timm.create_model(NANO)
    model.load_state_dict(twin)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert same(again, expected)
        again.load_state_dict(twin)
        assert same(again, expected)


def test_the_number_of_threads_makes_no_difference(twin, expected):
    model, threads = timm.create_model(NANO), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            converted = convert_state_dict(twin, model)
            assert all(torch.equal(converted[key], expected[key]) for key in expected)
            assert torch.get_num_threads() == count
        with pytest.raises(ConversionError):
            checkpoint_filter_fn({'fc.weight': torch.zeros(1)}, model)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_conversions_at_once_leave_the_number_of_threads(twin, expected):
    """Also that of threads that first used torch while another thread converted."""
    model, threads = timm.create_model(NANO), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda _: (torch.get_num_threads(), convert_state_dict(twin, model))[1], range(6)))
        assert all(torch.equal(state[key], expected[key]) for state in found for key in expected)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_a_default_device_makes_no_difference(twin, expected):
    model = timm.create_model(NANO)
    with torch.device('meta'), torch.inference_mode():
        converted = convert_state_dict(twin, model)
    assert all(torch.equal(converted[key], expected[key]) for key in expected)
