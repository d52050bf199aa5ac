"""The layer, compared with the dense attention that it represents."""
import doctest
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from timm_geoprior import GeoPriorAttn2d, GeoPriorConv2d, geoprior_resnet, layers, radii
from timm_geoprior.layers import KERNELS, attention_map, mix_values

SIZES = [(8, 8), (5, 12), (1, 9), (9, 1), (7, 7), (1, 1)]
RADII = [(1.3,), (0.6, 4.0)]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}

# hypothesis' deadline is wall-clock time, which depends on the load of the machine
settings.register_profile('untimed', deadline=None, max_examples=40, derandomize=True)
settings.load_profile('untimed')


def dense_attention(values, log_radius, stride, dilation, kernel):
    """The definition: one softmax over all H*W positions for each query, in the values' type."""
    batch, channels, height, width = values.shape
    keys = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    queries = torch.cartesian_prod(torch.arange(0, height, stride), torch.arange(0, width, stride))
    offset = (queries[:, None] - keys[None, :]).to(values.dtype)
    radius = (dilation * log_radius.exp())[:, None, None]
    if kernel == 'gaussian':
        scores = -offset.square().sum(-1) / (2 * radius ** 2)
    else:
        scores = -offset.abs().sum(-1) / radius
    heads = values.reshape(batch, len(log_radius), -1, height * width)
    out = torch.einsum('nqk,bnck->bncq', scores.softmax(-1), heads)
    return out.reshape(batch, channels, -(-height // stride), -(-width // stride))


def relative_error(got, expected):
    return float(((got.double() - expected).abs().max() / expected.abs().max()).detach())


def randomized(attn, radii):
    with torch.no_grad():
        attn.log_radius.copy_(torch.tensor(radii).log())
    return attn


@pytest.mark.parametrize('kernel', KERNELS)
@pytest.mark.parametrize('radii', RADII, ids=['one head', 'two heads'])
@pytest.mark.parametrize('dilation', [1, 2, 4])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
def test_output_and_gradients_are_the_dense_attentions(dtype, size, stride, dilation, radii, kernel):
    torch.manual_seed(0)
    attn = GeoPriorAttn2d(3, 4, stride, dilation, num_heads=len(radii), kernel=kernel, dtype=dtype)
    randomized(attn, radii)
    x = torch.randn(2, 3, *size, dtype=dtype, requires_grad=True)
    out = attn(x)
    seed = torch.randn_like(out)
    got = [out, *torch.autograd.grad(out, [x, attn.value.weight, attn.log_radius], seed)]

    inputs = [t.detach().double().requires_grad_() for t in (x, attn.value.weight, attn.log_radius)]
    values = torch.einsum('oi,bihw->bohw', inputs[1][..., 0, 0], inputs[0])
    dense = dense_attention(values, inputs[2], stride, dilation, kernel)
    expected = [dense, *torch.autograd.grad(dense, inputs, seed.double())]
    assert out.dtype == dtype
    assert out.shape == dense.shape
    for one, other in zip(got[:-1], expected[:-1], strict=True):
        assert relative_error(one, other) < TOLERANCES[dtype]
    # a radius's gradient is a sum of terms that cancel, so that its error is relative to their size
    scale = float((seed.double() * dense).detach().abs().sum())
    assert float((got[-1].double() - expected[-1]).abs().max()) < TOLERANCES[dtype] * scale


@pytest.mark.parametrize('kernel', KERNELS)
@pytest.mark.parametrize('radii', RADII, ids=['one head', 'two heads'])
@pytest.mark.parametrize('dilation', [1, 2])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
def test_a_folded_norm_shifts_both_parts(dtype, stride, dilation, radii, kernel):
    """With biases as from a folded norm: convolution and dense attention, each plus its bias, including gradients."""
    torch.manual_seed(0)
    layer = GeoPriorConv2d(3, 9, 4, stride, dilation, len(radii), kernel=kernel, dtype=dtype)
    randomized(layer.attn, radii)
    weights = [p.detach().double() for p in (layer.conv.weight, layer.attn.value.weight)]
    layer = layer.to(memory_format=torch.channels_last)
    bias = torch.randn(9, dtype=dtype)
    layer.conv.bias, layer.attn.value.bias = nn.Parameter(bias[:5]), nn.Parameter(bias[5:])
    x = torch.randn(2, 3, 7, 10, dtype=dtype, requires_grad=True)
    out = layer(x)
    seed = torch.randn_like(out)
    got = [out, *torch.autograd.grad(out, [x, layer.attn.log_radius], seed)]

    inputs = [t.detach().double().requires_grad_() for t in (x, layer.attn.log_radius)]
    values = torch.einsum('oi,bihw->bohw', weights[1][..., 0, 0], inputs[0])
    dense = torch.cat([
        nn.functional.conv2d(inputs[0], weights[0], stride=stride, padding=dilation, dilation=dilation),
        dense_attention(values, inputs[1], stride, dilation, kernel)], 1) + bias.double()[:, None, None]
    expected = [dense, *torch.autograd.grad(dense, inputs, seed.double())]
    for one, other in zip(got[:-1], expected[:-1], strict=True):
        assert relative_error(one, other) < TOLERANCES[dtype]
    scale = float((seed.double() * dense).detach().abs().sum())
    assert float((got[-1].double() - expected[-1]).abs().max()) < TOLERANCES[dtype] * scale


@pytest.mark.parametrize('kernel', KERNELS)
@pytest.mark.parametrize(('stride', 'dilation', 'num_heads'), [(1, 1, 1), (2, 1, 2), (1, 2, 1), (2, 2, 4)])
def test_gradcheck(kernel, stride, dilation, num_heads):
    torch.manual_seed(0)
    attn = GeoPriorAttn2d(3, 4, stride, dilation, num_heads, kernel=kernel, dtype=torch.float64)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)

    def forward(x, weight, log_radius):
        return torch.func.functional_call(attn, {'value.weight': weight, 'log_radius': log_radius}, x)

    assert torch.autograd.gradcheck(forward, (x, attn.value.weight, attn.log_radius))


def finite_everywhere(attn, size, amp=None):
    """Whether the output, and the gradients of input and parameters, are finite."""
    x = torch.randn(1, attn.value.in_channels, *size, dtype=attn.value.weight.dtype, requires_grad=True)
    with torch.autocast('cpu', amp, enabled=amp is not None):
        out = attn(x)
    out.float().square().sum().backward()
    return all(bool(t.isfinite().all()) for t in (out, x.grad, attn.value.weight.grad, attn.log_radius.grad))


@pytest.mark.parametrize('amp', [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('kernel', KERNELS)
@pytest.mark.parametrize('log_radius', [-100.0, -30.0, 0.0, 90.0, 100.0])
def test_extreme_radii_stay_finite(log_radius, kernel, dtype, amp):
    torch.manual_seed(0)
    attn = GeoPriorAttn2d(8, 4, stride=2, dilation=4, kernel=kernel, dtype=dtype)
    nn.init.constant_(attn.log_radius, log_radius)
    assert finite_everywhere(attn, (3, 200), amp)


@given(
    log_radius=st.floats(allow_nan=False, allow_infinity=False, width=32),
    kernel=st.sampled_from(KERNELS),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)))
def test_any_radius_is_finite(log_radius, kernel, size):
    attn = GeoPriorAttn2d(2, 2, kernel=kernel)
    nn.init.constant_(attn.log_radius, log_radius)
    assert finite_everywhere(attn, size)


@pytest.mark.parametrize('amp', [torch.float16, torch.bfloat16], ids=str)
def test_maps_are_float32_under_autocast(amp):
    """Only the values and the final cast of the map are rounded."""
    torch.manual_seed(0)
    attn = GeoPriorAttn2d(16, 8, init_radius=40.0)
    x = torch.randn(2, 16, 30, 30)
    with torch.autocast('cpu', amp):
        out = attn(x)
    assert out.dtype == amp
    assert relative_error(out, attn(x).double()) < 8 * torch.finfo(amp).eps


@pytest.mark.parametrize('kernel', KERNELS)
@pytest.mark.parametrize('stride', [1, 2])
def test_no_radius_is_the_identity(stride, kernel):
    torch.manual_seed(0)
    attn = GeoPriorAttn2d(3, 2, stride, init_radius=1e-4, kernel=kernel)
    x = torch.randn(2, 3, 9, 6)
    assert torch.equal(attn(x), attn.value(x)[:, :, ::stride, ::stride])


@pytest.mark.parametrize('kernel', KERNELS)
@pytest.mark.parametrize('stride', [1, 2])
def test_endless_radius_is_the_mean(stride, kernel):
    torch.manual_seed(0)
    attn = GeoPriorAttn2d(3, 2, stride, init_radius=1e4, kernel=kernel, dtype=torch.float64)
    x = torch.randn(2, 3, 9, 6, dtype=torch.float64)
    out = attn(x)
    torch.testing.assert_close(out, attn.value(x).mean((2, 3), keepdim=True).expand_as(out), atol=1e-3, rtol=0)


def test_the_dense_map_is_never_built():
    attn = GeoPriorAttn2d(1, 1, init_radius=1e4)
    x = torch.rand(1, 1, 1000, 1000)  # its dense map would take 4 TB
    torch.testing.assert_close(attn(x).mean(), attn.value(x).mean(), atol=1e-3, rtol=0)


axes = st.tuples(st.integers(1, 60), st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]))


@given(
    axis=axes, log_radius=st.lists(st.floats(-100, 100), min_size=1, max_size=3), kernel=st.sampled_from(KERNELS),
    dtype=st.sampled_from([torch.float32, torch.float64]))
def test_rows_of_the_map_sum_to_one(axis, log_radius, kernel, dtype):
    size, stride, dilation = axis
    rows = attention_map(torch.tensor(log_radius, dtype=dtype), size, stride, dilation, kernel)
    assert rows.shape == (len(log_radius), -(-size // stride), size)
    assert ((rows == 0) | (rows >= 1e-30)).all()  # subnormal numbers make the products many times slower
    torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:2], dtype=dtype))


def test_fx_keeps_the_map_whole():
    class Map(nn.Module):
        def forward(self, log_radius):
            return attention_map(log_radius, 5)

    radius = torch.zeros(2)
    torch.testing.assert_close(torch.fx.symbolic_trace(Map())(radius), attention_map(radius, 5))


@pytest.mark.parametrize(('dtype', 'size'), [(torch.bfloat16, 400), (torch.float16, 2500)])
def test_half_precision_counts_the_cells(dtype, size):
    """bfloat16 has no 257, and float16 no 2,049."""
    rows = attention_map(torch.zeros(1, dtype=dtype), size)
    assert rows.dtype == dtype
    torch.testing.assert_close(rows.float(), attention_map(torch.zeros(1), size), rtol=0, atol=1e-3)


@pytest.mark.parametrize('kernel', KERNELS)
def test_an_undefined_radius_is_not_hidden(kernel):
    """A NaN radius gives NaN instead of a map of zeros."""
    assert attention_map(torch.tensor([math.nan, 0.0]), 3, kernel=kernel).isnan().all((1, 2)).tolist() == [True, False]


@given(
    side=st.integers(1, 6), margin=st.integers(4, 9), shift=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    radius=st.floats(0.05, 1.5), stride=st.sampled_from([1, 2]), seed=st.integers(0, 99))
def test_a_shift_of_the_input_shifts_the_output(side, margin, shift, radius, stride, seed):
    """Up to what the borders cut off the Gaussian: at most exp(-m^2 / 4 r^2) times a sum over its tail, per axis."""
    torch.manual_seed(seed)
    down, right = (stride * s for s in shift)
    values = torch.zeros(1, 1, side + 2 * margin + down, side + 2 * margin + right, dtype=torch.float64)
    shifted = values.clone()
    patch = torch.rand(side, side)
    values[0, 0, margin:margin + side, margin:margin + side] = patch
    shifted[0, 0, margin + down:margin + down + side, margin + right:margin + right + side] = patch
    log_radius = torch.tensor([radius], dtype=torch.float64).log()
    before, after = (mix_values(v, log_radius, stride)[0, 0] for v in (values, shifted))
    height, width = before.shape
    tail = 2 * (1 + 1.26 * radius) ** 2 * math.exp(-margin ** 2 / (4 * radius ** 2))
    moved = after[shift[0]:, shift[1]:]
    assert (moved - before[:height - shift[0], :width - shift[1]]).abs().max() <= tail + 1e-14


@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)), stride=st.sampled_from([1, 2]),
    radius=st.floats(0.1, 20), kernel=st.sampled_from(KERNELS), axis=st.sampled_from([(2,), (3,), (2, 3)]))
def test_flips_commute(size, stride, radius, kernel, axis):
    torch.manual_seed(0)
    if stride == 2:  # the queries of an even size are not symmetric, nor are a convolution's
        size = tuple(n | 1 for n in size)
    attn = GeoPriorAttn2d(2, 3, stride, init_radius=radius, kernel=kernel, dtype=torch.float64)
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    torch.testing.assert_close(attn(x.flip(axis)), attn(x).flip(axis), atol=1e-12, rtol=0)


def test_dilation_keeps_the_window_on_a_finer_grid():
    """With twice the cells over the same picture, the average is the same where the picture is smooth."""
    attn = GeoPriorAttn2d(1, 1, init_radius=2.0, dtype=torch.float64)
    dilated = GeoPriorAttn2d(1, 1, dilation=2, init_radius=2.0, dtype=torch.float64)
    dilated.load_state_dict(attn.state_dict())
    y, x = torch.meshgrid(*[torch.arange(81, dtype=torch.float64) / 80] * 2, indexing='ij')
    fine = ((3 * x).sin() * (2 * y).cos())[None, None]
    got, expected = dilated(fine)[..., ::2, ::2], attn(fine[..., ::2, ::2])
    inside = (..., slice(12, -12), slice(12, -12))  # six radii away the borders no longer matter
    torch.testing.assert_close(got[inside], expected[inside], atol=1e-9, rtol=0)
    assert relative_error(attn(fine)[..., ::2, ::2][inside], expected[inside]) > 1e-3


def test_radius_is_in_cells_of_the_layers_grid():
    attn = GeoPriorAttn2d(4, 4, dilation=2, num_heads=2, init_radius=3.0)
    assert attn.radius().tolist() == pytest.approx([6.0, 6.0])
    nn.init.constant_(attn.log_radius, 100.0)
    assert attn.radius().tolist() == pytest.approx([2e4, 2e4])


@pytest.mark.parametrize(('make', 'fan_out'), [
    (lambda **dd: GeoPriorAttn2d(512, 32, **dd), 32),
    (lambda **dd: GeoPriorConv2d(512, 128, 32, **dd).attn, 128),
], ids=['alone', 'beside a convolution'])
def test_initial_scale(make, fan_out):
    """Also for parameters whose memory is allocated after creation."""
    torch.manual_seed(0)
    attn = make(init_radius=2.5, device='meta').to_empty(device='cpu')
    for parameter in attn.parameters():
        nn.init.constant_(parameter, math.nan)
    attn.reset_parameters()
    for layer in (attn, make(init_radius=2.5)):
        assert layer.value.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.03)
        assert layer.value.weight.mean().item() == pytest.approx(0, abs=0.01)
        assert layer.log_radius.tolist() == pytest.approx([math.log(2.5)])


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('dilation', [1, 2])
def test_conv_stands_beside_the_attention(stride, dilation):
    """Names, shapes and the output of each part: a drop-in replacement for a 3x3 convolution."""
    torch.manual_seed(0)
    layer = GeoPriorConv2d(6, 10, 4, stride, dilation, num_heads=2)
    plain = nn.Conv2d(6, 10, 3, stride, padding=dilation, dilation=dilation)
    x = torch.randn(2, 6, 9, 12)
    out = layer(x)
    assert list(layer.state_dict()) == ['conv.weight', 'attn.log_radius', 'attn.value.weight']
    assert out.shape == plain(x).shape
    assert torch.equal(out, torch.cat([layer.conv(x), layer.attn(x)], 1))
    torch.testing.assert_close(layer.conv(x), nn.functional.conv2d(
        x, layer.conv.weight, stride=stride, padding=dilation, dilation=dilation))
    assert (layer.attn.stride, layer.attn.dilation, layer.attn.radius().shape) == (stride, dilation, (2,))


@pytest.mark.parametrize('make', [GeoPriorAttn2d, lambda *args: GeoPriorConv2d(args[0], 16, args[1])],
                         ids=['attention', 'convolution and attention'])
def test_channels_last(make):
    torch.manual_seed(0)
    layer = make(6, 4)
    x = torch.randn(2, 6, 9, 12)
    out = layer(x.contiguous(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, layer(x))


@pytest.mark.parametrize('kernel', KERNELS)
def test_script_and_compile(kernel):
    """One graph, whatever the size."""
    torch.manual_seed(0)
    layer = GeoPriorConv2d(4, 8, 4, stride=2, num_heads=2, kernel=kernel)
    scripted = torch.jit.script(layer)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend='aot_eager')
    for size, stance in (((9, 12), 'default'), ((6, 5), 'fail_on_recompile'), ((7, 7), 'fail_on_recompile')):
        x = torch.randn(2, 4, *size)
        expected = torch.autograd.grad(layer(x).square().sum(), layer.parameters())
        torch.testing.assert_close(scripted(x), layer(x))
        with torch.compiler.set_stance(stance):
            found = torch.autograd.grad(compiled(x).square().sum(), layer.parameters())
        torch.testing.assert_close(found, expected)


def test_a_square_has_one_map(monkeypatch):
    sizes = []
    original = layers.attention_map

    def noting(log_radius, size, *args):
        sizes.append(size)
        return original(log_radius, size, *args)

    monkeypatch.setattr(layers, 'attention_map', noting)
    for shape in ((8, 8), (8, 5)):
        mix_values(torch.randn(1, 2, *shape), torch.zeros(1))
    assert sizes == [8, 8, 5]


def test_what_was_traced_with_a_square_has_two_maps():
    torch.manual_seed(0)
    layer = GeoPriorConv2d(4, 8, 4, stride=2).eval()
    traced = torch.jit.trace(layer, torch.randn(1, 4, 8, 8))
    exported = torch.export.export(layer, (torch.randn(2, 4, 8, 8),), dynamic_shapes=(
        {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)).module()
    x = torch.randn(2, 4, 8, 5)
    torch.testing.assert_close(traced(x), layer(x))
    torch.testing.assert_close(exported(x), layer(x))


@pytest.mark.parametrize(('options', 'message'), [
    ({'kernel': 'cauchy'}, "kernel (attn_kernel) must be one of gaussian, laplacian, got 'cauchy'."),
    ({'value_dim': 0}, 'value_dim must be at least 1, got 0.'),
    ({'value_dim': -8}, 'value_dim must be at least 1, got -8.'),
    ({'dim': 0}, 'dim must be at least 1, got 0.'),
    ({'stride': 0}, 'stride must be at least 1, got 0.'),
    ({'dilation': -1}, 'dilation must be at least 1, got -1.'),
    ({'num_heads': 3}, 'num_heads (attn_heads) must be a divisor of value_dim (8), got 3.'),
    ({'num_heads': 16}, 'num_heads (attn_heads) must be a divisor of value_dim (8), got 16.'),
    ({'num_heads': 0}, 'num_heads (attn_heads) must be a divisor of value_dim (8), got 0.'),
    ({'init_radius': 0.0}, 'init_radius (attn_radius) must be from 0.0001 to 10000 cells, got 0.0.'),
    ({'init_radius': -1.0}, 'init_radius (attn_radius) must be from 0.0001 to 10000 cells, got -1.0.'),
    ({'init_radius': math.nan}, 'init_radius (attn_radius) must be from 0.0001 to 10000 cells, got nan.'),
    ({'init_radius': math.inf}, 'init_radius (attn_radius) must be from 0.0001 to 10000 cells, got inf.'),
    ({'init_radius': 1e-5}, 'init_radius (attn_radius) must be from 0.0001 to 10000 cells, got 1e-05.'),
    ({'init_radius': 1e5}, 'init_radius (attn_radius) must be from 0.0001 to 10000 cells, got 100000.0.'),
], ids=str)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        GeoPriorAttn2d(**{'dim': 16, 'value_dim': 8, **options})


@pytest.mark.parametrize('value_dim', [-8, 0, 16, 24])
def test_refused_shares_of_the_convolution(value_dim):
    message = (f'value_dim must be from 1 to 15 in a layer of 16 channels, got {value_dim}. '
               f'Use 0 in value_dims for a stage without attention.')
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        GeoPriorConv2d(16, 16, value_dim)


@pytest.mark.parametrize('channels', [2, 4, 5])
def test_heads_that_do_not_divide_the_channels_are_refused(channels):
    with pytest.raises(ValueError, match=rf'must be a multiple of the number of heads \(3\), got {channels}'):
        mix_values(torch.zeros(1, channels, 4, 4), torch.zeros(3))


def test_examples_of_the_docstrings():
    for module, examples in ((layers, 3), (geoprior_resnet, 2), (radii, 5)):
        assert doctest.testmod(module).attempted == examples
        assert doctest.testmod(module).failed == 0
