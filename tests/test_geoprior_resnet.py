"""The model family: exact counts, timm's whole interface, invalid options."""
import copy
import io
import math
import pickle
import re
from functools import partial

import pytest
import timm
import torch
from packaging.version import Version
from timm.data import create_transform, resolve_model_data_config
from timm.layers import (
    BatchNormAct2d,
    BlurPool2d,
    GroupNorm1,
    LayerNorm2d,
    convert_sync_batchnorm,
    freeze_batch_norm_2d,
)
from timm.models import Bottleneck, ResNet, group_parameters
from timm.optim import create_optimizer_v2
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from networks import attentions, randomize
from timm_geoprior.geoprior_resnet import GeoPriorResNet
from timm_geoprior.inference.inputs import sample_image
from timm_geoprior.layers import GeoPriorAttn2d, GeoPriorConv2d
from timm_geoprior.radii import learned_radii, scale_radii

FAMILY = timm.list_models('geoprior_resnet*')
SIZE = 64
FEATURE_CLASSES = ('list', 'dict', 'hook', 'getter', 'fx')

# classes, parameters, side of the input, FLOPs (two per multiply-add), attention layers
COUNTS = {
    'geoprior_resnet14_nano': (200, 1_095_035, 64, 58_067_200, 3),
    'geoprior_resnet50': (1000, 24_541_237, 224, 7_971_124_384, 13),
    'geoprior_resnet101': (1000, 42_697_798, 224, 15_072_496_032, 30),
    'geoprior_resnet152': (1000, 57_669_719, 224, 22_201_313_952, 47),
}
AA_RESNET152 = (61.6e6, 23.8e9)  # parameters and FLOPs, Bello et al., 2019

# torch 2.9 exports a max pooling only for sides that are equal modulo 4, and does not accept names for them
EXPORTS_POOLING = Version(torch.__version__) >= Version('2.14')
SIDES = (33, 70) if EXPORTS_POOLING else (36, 72)
UNNAMED = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)


def create(name: str = 'geoprior_resnet14_nano', **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return randomize(timm.create_model(name, **{'num_classes': 10, **kwargs})).eval()


def small(value_dims: tuple[int, ...] = (0, 8, 8, 8)) -> nn.Module:
    """An even smaller network."""
    return randomize(GeoPriorResNet((1, 1, 1, 1), value_dims, channels=(8, 16, 16, 16), num_classes=5)).eval()


@pytest.fixture(scope='module')
def nano() -> nn.Module:
    """Do not modify."""
    return create()


@pytest.fixture(scope='module')
def images() -> torch.Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


class ScaledNorm2d(nn.BatchNorm2d):
    """A batch norm with another forward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def wrap(module: nn.Module) -> nn.Module:
    """As an adapter does."""
    return nn.Sequential(module, nn.Tanh())


CHANGES = [lambda conv: prune.l1_unstructured(conv, 'weight', 0.5), parametrizations.weight_norm, wrap]


class PartialWrites(TorchDispatchMode):
    """Records the operations that change a tensor in place: all of its memory, or a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.whole: list[str] = []
        self.partial: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable:
            changed = args[0]
            (self.whole if changed.nbytes == changed.untyped_storage().nbytes() else self.partial).append(str(func))
        return func(*args, **kwargs or {})


class TestCounts:
    @pytest.mark.parametrize('name', FAMILY)
    def test_parameters_and_flops(self, name):
        classes, parameters, side, flops, layers = COUNTS[name]
        with torch.device('meta'):
            model = timm.create_model(name, num_classes=classes).eval()
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(1, 3, side, side))
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert counter.get_total_flops() == flops
        assert len(attentions(model)) == layers

    def test_the_published_cost(self):
        """6.4% fewer parameters and 6.7% fewer FLOPs than AA-ResNet152: the paper's abstract."""
        _, parameters, _, flops, _ = COUNTS['geoprior_resnet152']
        savings = [round(100 * (1 - ours / theirs), 1) for ours, theirs in zip(
            (parameters, flops), AA_RESNET152, strict=True)]
        assert savings == [6.4, 6.7]

    def test_the_nano(self, nano):
        assert [len(getattr(nano, f'layer{i}')) for i in range(1, 5)] == [1, 1, 1, 1]
        assert [isinstance(getattr(nano, f'layer{i}')[0].conv2, GeoPriorConv2d) for i in range(1, 5)] == [
            False, True, True, True]

    def test_the_names_of_the_weights(self, nano):
        assert {name for name in nano.state_dict() if name.startswith('layer2.0.conv2')} == {
            'layer2.0.conv2.conv.weight', 'layer2.0.conv2.attn.value.weight', 'layer2.0.conv2.attn.log_radius'}


class TestOptions:
    def test_keywords_reach_the_layers(self):
        model = create('geoprior_resnet50', value_dims=(8, 0, 16, 32), attn_heads=4, attn_kernel='laplacian',
                       layers=(1, 1, 1, 1))
        found = [getattr(model, f'layer{i}')[0].conv2 for i in range(1, 5)]
        assert [conv.attn.value.out_channels if isinstance(conv, GeoPriorConv2d) else 0 for conv in found] == [
            8, 0, 16, 32]
        assert {attn.log_radius.shape for attn in attentions(model)} == {(4,)}
        assert {attn.kernel for attn in attentions(model)} == {'laplacian'}
        for given, expected in (({}, 3), ({'attn_radius': 2.5}, 2.5)):
            fresh = timm.create_model('geoprior_resnet14_nano', **given)
            assert [attn.radius().item() for attn in attentions(fresh)] == pytest.approx([expected] * 3)

    def test_without_value_channels_it_is_timms_resnet(self, images):
        plain = randomize(ResNet(Bottleneck, (1, 1, 1, 1), num_classes=10)).eval()
        ours = GeoPriorResNet((1, 1, 1, 1), value_dims=(0, 0, 0, 0), num_classes=10).eval()
        ours.load_state_dict(plain.state_dict())
        assert torch.equal(ours(images), plain(images))

    @pytest.mark.parametrize('aa_layer', [BlurPool2d, nn.AvgPool2d])
    def test_anti_aliasing_takes_the_stride(self, aa_layer, images):
        features = create(aa_layer=aa_layer, features_only=True)(images)
        assert [f.shape[-1] for f in features] == [32, 16, 8, 4, 2]
        assert [attn.stride for attn in attentions(create())] == [2, 2, 2]
        assert [attn.stride for attn in attentions(create(aa_layer=aa_layer))] == [1, 1, 1]

    @pytest.mark.parametrize(('options', 'message'), [
        ({'attn_kernel': 'box'}, "kernel (attn_kernel) must be one of gaussian, laplacian, got 'box'."),
        ({'value_dims': (0, -8, 8, 8)}, 'value_dims must not be negative, got (0, -8, 8, 8).'),
        ({'value_dims': (0, 64, 8, 8)}, 'value_dim must be from 1 to 63 in a layer of 64 channels, got 64. '
                                        'Use 0 in value_dims for a stage without attention.'),
        ({'value_dims': (0, 8, 8)}, 'value_dims must be four numbers (one per stage), got (0, 8, 8).'),
        ({'value_dims': 8}, 'value_dims must be four numbers (one per stage), got 8.'),
        ({'channels': (64, 64)}, 'channels must be four numbers (one per stage), got (64, 64).'),
        ({'layers': (1, 1)}, 'layers must be four numbers (one per stage), got (1, 1).'),
        ({'attn_radius': 0.0}, 'init_radius (attn_radius) must be from 0.0001 to 10000 cells, got 0.0.'),
        ({'attn_radius': -1.0}, 'init_radius (attn_radius) must be from 0.0001 to 10000 cells, got -1.0.'),
        ({'attn_radius': float('nan')}, 'init_radius (attn_radius) must be from 0.0001 to 10000 cells, got nan.'),
        ({'attn_radius': float('inf')}, 'init_radius (attn_radius) must be from 0.0001 to 10000 cells, got inf.'),
        ({'attn_heads': 16}, 'num_heads (attn_heads) must be a divisor of value_dim (8), got 16.'),
        ({'attn_heads': 3}, 'num_heads (attn_heads) must be a divisor of value_dim (8), got 3.'),
        ({'attn_heads': 0}, 'num_heads (attn_heads) must be a divisor of value_dim (8), got 0.'),
        ({'cardinality': 32}, 'cardinality must be 1 (GeoPrior layers have no groups), got 32.'),
        ({'block': Bottleneck}, f'block must not be given (it is GeoPriorBottleneck), got {Bottleneck}.'),
    ])
    def test_refused_by_name(self, options, message):
        with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
            timm.create_model('geoprior_resnet14_nano', **options)

    @pytest.mark.parametrize('options', [
        {'aa_layer': BlurPool2d}, {'avg_down': False}, {'block_args': {'attn_layer': 'se'}}, {'stem_type': ''},
        {'stem_type': 'deep_tiered'}, {'drop_block_rate': 0.1}, {'base_width': 128}, {'replace_stem_pool': True},
        {'norm_layer': 'groupnorm1'}, {'act_layer': 'silu'}, {'drop_rate': 0.1}, {'zero_init_last': False},
        {'down_kernel_size': 3, 'avg_down': False}, {'block_reduce_first': 2}, {'in_chans': 3, 'output_stride': 16},
    ], ids=str)
    def test_the_rest_of_timms_resnet(self, options, images):
        model = create(**options).train()
        logits = model(images)
        logits.sum().backward()
        assert logits.shape == (2, 10)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('name', FAMILY)
class TestEveryModel:
    """On the meta device where only shapes matter."""

    def test_features_and_gradients(self, name):
        """At an odd size; each feature from timm's extractor is compared with the plain forward pass."""
        model = create(name)
        x = torch.randn(2, 3, 33, 41)
        extractor = create(name, features_only=True)
        with torch.no_grad():
            features = [model.act1(model.bn1(model.conv1(x)))]
            features.append(model.layer1(model.maxpool(features[0])))
            for layer in (model.layer2, model.layer3, model.layer4):
                features.append(layer(features[-1]))
            for found, wanted in zip(extractor(x), features, strict=True):
                torch.testing.assert_close(found, wanted)
            torch.testing.assert_close(model.forward_head(features[-1]), model(x))
        model.train()(x).square().sum().backward()
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad.isfinite().all(), parameter_name
            assert parameter.grad.any(), parameter_name

    def test_forward_heads_and_channels(self, name):
        with torch.device('meta'):
            model = timm.create_model(name, in_chans=1, num_classes=0).eval()
            features = model(torch.empty(2, 1, SIZE, SIZE))
            assert features.shape == (2, model.num_features)
            model.reset_classifier(7, 'max')
            assert model(torch.empty(2, 1, SIZE, SIZE)).shape == (2, 7)
            assert model.get_classifier().out_features == 7
            map_out = timm.create_model(name, num_classes=0, global_pool='')(torch.empty(2, 3, SIZE, SIZE))
            assert map_out.shape == (2, model.num_features, 2, 2)

    @pytest.mark.parametrize('stride', [8, 16])
    def test_output_stride(self, name, stride):
        with torch.device('meta'):
            model = timm.create_model(name, features_only=True, output_stride=stride)
            features = model(torch.empty(1, 3, SIZE, SIZE))
        assert [f.shape[-1] for f in features] == [SIZE // r for r in model.feature_info.reduction()]
        assert max(model.feature_info.reduction()) == stride

    def test_cfg(self, name):
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.classifier == 'fc'
        assert cfg.first_conv in ('conv1', 'conv1.0')
        assert cfg.tag

    def test_groups_cover_every_parameter(self, name):
        with torch.device('meta'):
            model = timm.create_model(name)
        for coarse in (False, True):
            groups = group_parameters(model, model.group_matcher(coarse=coarse))
            assert sum(map(len, groups.values())) == len(list(model.parameters()))


class TestInterface:
    @pytest.mark.parametrize('feature_cls', FEATURE_CLASSES)
    def test_features_only(self, feature_cls, nano, images):
        extractor = create(features_only=True, feature_cls=feature_cls)
        features = extractor(images)
        features = list(features.values()) if isinstance(features, dict) else features
        expected = nano.forward_intermediates(images, intermediates_only=True)
        assert len(features) == len(expected) == 5
        for found, wanted in zip(features, expected, strict=True):
            torch.testing.assert_close(found, wanted)
        assert list(extractor.feature_info.channels()) == [f.shape[1] for f in features]

    def test_forward_intermediates(self, nano, images):
        final, intermediates = nano.forward_intermediates(images)
        torch.testing.assert_close(final, nano.forward_features(images))
        torch.testing.assert_close(intermediates[-1], final)
        last_two = nano.forward_intermediates(images, indices=2, intermediates_only=True, stop_early=True)
        assert all(torch.equal(a, b) for a, b in zip(last_two, intermediates[-2:], strict=True))
        pruned = copy.deepcopy(nano)
        pruned.prune_intermediate_layers([1, 2])
        torch.testing.assert_close(
            pruned.forward_intermediates(images, indices=[1, 2], intermediates_only=True)[1], intermediates[2])

    def test_output_stride_keeps_the_window_in_the_picture(self):
        model, dilated = create(), create(output_stride=8)
        radii = [[m.radius() for m in net.modules() if isinstance(m, GeoPriorAttn2d)] for net in (model, dilated)]
        factors = [round((b / a).item(), 4) for a, b in zip(*radii, strict=True)]
        assert factors == [1, 1, 2]  # the first layer of a finer stage still has the grid of the one before

    @pytest.mark.parametrize('make', [
        create, lambda: create(features_only=True), lambda: reparameterize_model(create().eval())])
    def test_radii_are_scaled(self, make):
        model = make()
        before = [attn.radius() for attn in attentions(model)]
        scale_radii(model, 1.5)
        assert len(before) == 3
        torch.testing.assert_close([attn.radius() for attn in attentions(model)], [1.5 * radius for radius in before])

    def test_reading_radii_leaves_each_module_in_its_mode(self):
        model = create().train()
        model.layer1.eval()
        learned_radii(model, (3, 64, 64))
        assert (model.training, model.layer1[0].bn1.training, model.layer2[0].bn1.training) == (True, False, True)

    def test_layers_that_the_forward_pass_does_not_reach_have_no_radii(self):
        model = create()
        expected = learned_radii(model, (3, 64, 64))
        model.unused = create()
        assert learned_radii(model, (3, 64, 64)) == expected

    @pytest.mark.parametrize(('factor', 'bound'), [(1e9, 1e4), (1e-9, 1e-4)])
    def test_radii_are_scaled_within_their_bounds(self, factor, bound):
        """Beyond them a parameter would have no effect, and no gradient to bring it back."""
        model = create()
        scale_radii(model, factor)
        for attn in attentions(model):
            torch.testing.assert_close(attn.log_radius.detach(), torch.full((1,), math.log(bound)))
        scale_radii(model, 1 / bound)
        assert [round(attn.radius().item(), 3) for attn in attentions(model)] == [1, 1, 1]

    @pytest.mark.parametrize('factor', [0, -1, math.nan, math.inf])
    def test_a_factor_that_scales_nothing(self, factor):
        model = create()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=f'^factor must be a finite number above 0, got {factor}. Use the new'):
            scale_radii(model, factor)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_output_stride_keeps_the_features(self):
        """On a smooth picture, at the positions that both networks have; exactly if the grid is the same."""
        coarse, fine = (create(avg_down=False, output_stride=stride) for stride in (32, 8))
        for attn in attentions(coarse) + attentions(fine):
            nn.init.constant_(attn.log_radius, math.log(2))
        x = torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(0))
        x = nn.functional.interpolate(x, (129, 129), mode='bicubic', align_corners=True)

        def differences():
            pairs = zip(*(model.forward_intermediates(x, [3, 4], intermediates_only=True) for model in (coarse, fine)),
                        (2, 4), strict=True)
            return [float(((f[..., ::step, ::step] - c).norm() / c.norm()).detach()) for c, f, step in pairs]

        exact, close = differences()
        assert exact < 1e-6
        assert close < 0.03
        attentions(fine)[-1].dilation = 1  # the same radius in cells: half the window
        assert differences()[1] > 1.2 * close

    @pytest.mark.parametrize('pool', ['avg', 'max', 'avgmax', 'catavgmax'])
    def test_global_pool(self, pool, images):
        assert create(global_pool=pool)(images).shape == (2, 10)

    def test_drop_path_is_for_training(self, nano, images):
        model = create(drop_path_rate=0.9)
        assert torch.equal(model(images), nano(images))
        model.train()
        torch.manual_seed(0)
        assert not torch.equal(model(images), model(images))

    def test_gradient_checkpointing(self, images):
        gradients = []
        for enable in (False, True):
            model = create().train()
            model.set_grad_checkpointing(enable)
            model(images).square().sum().backward()
            gradients.append({name: p.grad for name, p in model.named_parameters()})
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient)

    def test_meta_device_and_back(self):
        with torch.device('meta'):
            model = timm.create_model('geoprior_resnet14_nano', attn_radius=2.0)
        model = model.to_empty(device='cpu')
        for tensor in model.state_dict().values():
            tensor.fill_(3)
        model.init_weights()
        fresh = timm.create_model('geoprior_resnet14_nano', attn_radius=2.0)
        for (name, tensor), other in zip(model.state_dict().items(), fresh.state_dict().values(), strict=True):
            assert tensor.float().std(correction=0).item() == pytest.approx(
                other.float().std(correction=0).item(), rel=0.25, abs=1e-6), name
        assert [attn.radius().item() for attn in attentions(model)] == pytest.approx([2, 2, 2])

    def test_device_and_dtype(self):
        model = timm.create_model('geoprior_resnet14_nano', device='meta', dtype=torch.bfloat16)
        assert {(p.device.type, p.dtype) for p in model.parameters()} == {('meta', torch.bfloat16)}

    @pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
    def test_other_types_run(self, dtype, nano, images):
        logits = copy.deepcopy(nano).to(dtype)(images.to(dtype))
        assert logits.dtype == dtype
        torch.testing.assert_close(logits.float(), nano(images), rtol=0.1, atol=0.2)

    def test_channels_last(self, nano, images):
        """The layout is kept through every stage, and the features are the same."""
        model = copy.deepcopy(nano).to(memory_format=torch.channels_last)
        kept = []
        for layer in model.modules():
            if isinstance(layer, GeoPriorConv2d):
                layer.register_forward_hook(
                    lambda _, args, out: kept.append(out.is_contiguous(memory_format=torch.channels_last)))
        images = images.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(model(images), nano(images.contiguous()), rtol=1e-4, atol=1e-4)
        assert kept == [True, True, True]

    def test_copies(self, nano, images):
        file = io.BytesIO()
        torch.save(nano, file)
        file.seek(0)
        for twin in (copy.deepcopy(nano), pickle.loads(pickle.dumps(nano)), torch.load(file, weights_only=False)):
            assert torch.equal(twin(images), nano(images))

    def test_the_radii_leave_weight_decay(self, nano):
        optimizer = create_optimizer_v2(nano, opt='sgd', lr=0.1, weight_decay=0.1)
        decayed = {id(p) for group in optimizer.param_groups if group['weight_decay'] for p in group['params']}
        radii = [p for name, p in nano.named_parameters() if 'log_radius' in name]
        assert len(radii) == 3
        assert not decayed & {id(p) for p in radii}

    def test_branches_start_at_zero_and_values_at_the_layers_scale(self):
        torch.manual_seed(0)
        model = GeoPriorResNet((1, 1, 1, 1), num_classes=4)
        assert model.layer4[0].bn3.weight.abs().sum() == 0
        assert model.layer4[0].conv2.attn.value.weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.02)


class TestReparameterized:
    """timm's `reparameterize_model`: the batch norms are folded into the convolutions."""

    @pytest.mark.parametrize('options', [
        {}, {'attn_heads': 4, 'attn_kernel': 'laplacian', 'output_stride': 8}, {'aa_layer': BlurPool2d},
        {'drop_block_rate': 0.5, 'drop_path_rate': 0.5, 'down_kernel_size': 3},
        {'avg_down': True, 'value_dims': (4, 8, 8, 8), 'block_args': {'attn_layer': 'se'}}], ids=str)
    def test_the_same_outputs(self, options, images):
        model = randomize(GeoPriorResNet((2, 1, 2, 1), **{
            'value_dims': (0, 8, 8, 8), 'channels': (8, 16, 16, 16), 'num_classes': 5, **options})).eval()
        expected = model(images)
        fast = reparameterize_model(model)
        assert torch.equal(model(images), expected)  # a copy was changed
        # all are folded but the stem's, which timm's traversal does not reach
        assert [name for name, m in fast.named_modules() if isinstance(m, nn.BatchNorm2d)] == ['bn1']
        with torch.inference_mode():
            torch.testing.assert_close(fast(images), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
            fast = reparameterize_model(model.double())
            torch.testing.assert_close(fast(images.double()), model(images.double()), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str)
    def test_trained_weights(self, dtype, tolerance):
        """Within the tolerance that `verify` allows for a precision."""
        model = timm.create_model('geoprior_resnet14_nano', pretrained=True).eval()
        picture = create_transform(**resolve_model_data_config(model))(sample_image())[None]
        with torch.inference_mode():
            expected = model(picture)
            found = reparameterize_model(model.to(dtype))(picture.to(dtype))
        assert float((found - expected).abs().max() / expected.abs().max()) < tolerance
        assert found.argmax() == expected.argmax()

    @pytest.mark.parametrize('value_dims', [(0, 8, 8, 8), (4, 8, 8, 8)], ids=str)
    @pytest.mark.parametrize(('norm_layer', 'convert', 'folded'), [
        (nn.BatchNorm2d, None, True),
        (partial(nn.BatchNorm2d, affine=False), None, True),
        (partial(nn.BatchNorm2d, track_running_stats=False), None, False),  # no statistics to fold
        (nn.BatchNorm2d, freeze_batch_norm_2d, True),
        (nn.BatchNorm2d, convert_sync_batchnorm, True),
        (BatchNormAct2d, None, False),  # an activation of its own
        (BatchNormAct2d, freeze_batch_norm_2d, False),
        (BatchNormAct2d, convert_sync_batchnorm, False),
        (ScaledNorm2d, None, False),
        (LayerNorm2d, None, False),
        (GroupNorm1, None, False),
    ], ids=lambda value: getattr(value, 'func', value).__name__ if callable(value) else str(value))
    def test_norms(self, norm_layer, convert, folded, value_dims, images):
        """Norms are folded by their exact type; all others stay, and work as before."""
        model = randomize(GeoPriorResNet(
            (1, 2, 1, 1), value_dims, channels=(8, 16, 16, 16), norm_layer=norm_layer, num_classes=5))
        model = (convert(model) if convert else model).eval()
        expected = model(images).detach()
        fast = reparameterize_model(model)
        torch.testing.assert_close(fast(images), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        norms = [name for name, module in model.named_modules() if type(module) is type(model.bn1)]
        stayed = [name for name, module in fast.named_modules() if type(module) is type(model.bn1)]
        assert stayed == (['bn1'] if folded else norms)

    @pytest.mark.parametrize(('name', 'changes'), [
        ('layer2.0.conv1', CHANGES), ('layer1.0.conv2', CHANGES), ('layer2.0.conv2.conv', CHANGES),
        ('layer2.0.conv2.attn.value', CHANGES), ('layer2.0.conv3', CHANGES), ('layer2.0.downsample.0', CHANGES),
        ('layer2.0.conv2.attn', [wrap]), ('layer2.0.conv2', [wrap]),
    ], ids=lambda value: value if isinstance(value, str) else '')
    def test_norms_of_other_convolutions_stay(self, name, changes, images):
        """An adapter, a parametrized or a pruned weight: such a convolution is not defined by its weight alone."""
        for change in changes:
            model = small()
            model.set_submodule(name, change(model.get_submodule(name)))
            expected = model(images).detach()
            fast = reparameterize_model(model, inplace=True)  # pruned modules cannot be copied
            assert sum(isinstance(module, nn.BatchNorm2d) for module in fast.modules()) == 2  # and the stem's
            torch.testing.assert_close(fast(images), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))

    def test_after_pruning(self, images):
        """Channels are counted in the weights, since pruning leaves fewer in either part."""
        model = small()
        block = model.layer2[0]
        kept = torch.tensor([0, 1, 2, 3, 5, 7, 8, 9, 12, 13, 15])  # six of the convolution, five of the attention
        for conv, channels in ((block.conv2.conv, kept[:6]), (block.conv2.attn.value, kept[6:] - 8)):
            conv.weight, conv.out_channels = nn.Parameter(conv.weight[channels].detach()), len(channels)
        for name, tensor in [*block.bn2.named_parameters(), *block.bn2.named_buffers()]:
            if tensor.dim():
                setattr(block.bn2, name, type(tensor)(tensor[kept].detach()))
        block.conv3.weight = nn.Parameter(block.conv3.weight[:, kept].detach())
        expected = model(images).detach()
        fast = reparameterize_model(model)
        assert isinstance(fast.layer2[0].bn2, nn.Identity)
        torch.testing.assert_close(fast(images), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))

    def test_its_radii_can_still_be_read(self, nano):
        radii = learned_radii(reparameterize_model(nano), (3, SIZE, SIZE))
        assert radii == learned_radii(nano, (3, SIZE, SIZE))


@pytest.fixture(scope='module', params=['plain', 'reparameterized'])
def graph_nano(request, nano) -> nn.Module:
    """Do not modify."""
    return nano if request.param == 'plain' else reparameterize_model(nano)


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::torch.jit.TracerWarning')
class TestGraphs:
    def test_torchscript(self, graph_nano, images):
        nano = graph_nano
        scripted, traced = torch.jit.script(nano), torch.jit.trace(nano, images)
        for inputs in (images, images[..., :45]):
            torch.testing.assert_close(scripted(inputs), nano(inputs))
            torch.testing.assert_close(traced(inputs), nano(inputs))

    def test_nothing_is_written_into_a_part_of_a_tensor(self, graph_nano, images):
        """Graph passes lose such writes, but keep in-place operations on whole tensors, such as timm's activations."""
        with PartialWrites() as writes, torch.no_grad():
            graph_nano(images)
        assert writes.whole
        assert not writes.partial

    def test_plain_fx(self, graph_nano, images):
        """Also after the removal of dead code, which every exporter and quantizer does."""
        nano = graph_nano
        traced = torch.fx.symbolic_trace(nano)
        traced.graph.eliminate_dead_code()
        traced.recompile()
        for inputs in (images, images[..., :45]):
            torch.testing.assert_close(traced(inputs), nano(inputs))

    def test_compile_with_dynamic_sizes(self):
        """One graph for all sizes, and its backward pass. Generating code for it would take minutes."""
        model = small(value_dims=(0, 0, 0, 8))
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend='aot_eager')

        def check(inputs):
            expected = torch.autograd.grad(model(inputs).square().sum(), model.parameters())
            found = torch.autograd.grad(compiled(inputs).square().sum(), model.parameters())
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

        check(torch.randn(2, 3, 64, 48))
        with torch.compiler.set_stance('fail_on_recompile'):
            check(torch.randn(3, 3, 45, 70))
            check(torch.randn(2, 3, 64, 64))

    def test_export_with_named_sizes(self, images):
        """From 33 px up. timm's `avg_down` prevents names: its pooling adds constraints that no name can express."""
        model = small()
        names = {0: torch.export.Dim('batch', max=64), 2: torch.export.Dim('height', min=33, max=1024),
                 3: torch.export.Dim('width', min=33, max=1024)}
        program = torch.export.export(model, (images,), dynamic_shapes=(names if EXPORTS_POOLING else UNNAMED,))
        for inputs in (images, torch.randn(1, 3, *SIDES), torch.randn(3, 3, SIDES[1], SIDES[0])):
            torch.testing.assert_close(program.module()(inputs), model(inputs), rtol=1e-4, atol=1e-4)

    def test_export_and_onnx(self, graph_nano, images, tmp_path, capsys):
        """One exported program, and one ONNX file, for any batch, height and width."""
        nano, opsets = graph_nano, (18, 21) if isinstance(graph_nano.layer2[0].bn2, nn.BatchNorm2d) else (21,)
        runtime = pytest.importorskip('onnxruntime')
        pytest.importorskip('onnxscript')
        program = torch.export.export(nano, (images,), dynamic_shapes=(UNNAMED,))
        others = (torch.randn(1, 3, *SIDES), torch.randn(3, 3, SIDES[1], SIDES[0]))
        if not EXPORTS_POOLING:  # the guards allow only sizes like the traced ones
            others = (torch.randn(5, *images.shape[1:]),)
        inputs = (images, *others)
        for batch in inputs:
            torch.testing.assert_close(program.module()(batch), nano(batch), rtol=1e-4, atol=1e-4)
        for opset in opsets:
            path = tmp_path / f'nano{opset}.onnx'
            torch.onnx.export(program, (images,), path, opset_version=opset, dynamo=True, verbose=False)
            session = runtime.InferenceSession(path)
            name = session.get_inputs()[0].name
            found = [torch.from_numpy(session.run(None, {name: batch.numpy()})[0]) for batch in inputs]
            worst = max((f - nano(batch)).abs().max().item() for f, batch in zip(found, inputs, strict=True))
            with capsys.disabled():
                print(f'\nONNX Runtime {runtime.__version__}, opset {opset}: maximum difference {worst:.1e}')
            assert worst < 1e-4
