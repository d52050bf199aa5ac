"""Which of timm's ResNets a GeoPrior ResNet can replace, and that its plain form is the same network."""
import re

import pytest
import timm
import torch
from torch import nn

from networks import randomize
from timm_geoprior.conversion.mirror import blocks, mirror, value_channels, value_dim
from timm_geoprior.conversion.state_dict import convert_state_dict
from timm_geoprior.errors import GeoPriorError

BASIC = r'resnet(10t|18d?|34d?|aa34d|blur18)'
PLAIN = [name for name in timm.list_models(module='resnet')
         if re.fullmatch(r'(wide_)?resnet(aa|blur)?\d+[cdst]?(_2)?', name) and not re.fullmatch(BASIC, name)]


def on_meta(name: str, **kwargs: object) -> nn.Module:
    with torch.device('meta'):
        return timm.create_model(name, **kwargs)


@pytest.mark.parametrize('name', {re.sub(r'\d+', '', name): name for name in PLAIN}.values())
def test_every_kind_of_plain_bottleneck_resnet_of_timm_is_converted(name):
    """One of each kind, with one block per stage: depth makes no difference."""
    torch.manual_seed(0)
    source = randomize(timm.create_model(name, num_classes=10, layers=(1, 1, 1, 1))).eval()
    model = mirror(source, name).create().eval()
    model.load_state_dict(convert_state_dict(source.state_dict(), model))
    widths = [block.bn2.num_features for _, block in blocks(source)]
    values = [value_dim(block) for _, block in blocks(model)]
    assert {value / width for value, width in zip(values, widths, strict=True)} == {0, 1 / 16, 3 / 32, 7 / 64}
    images = torch.nn.functional.interpolate(torch.randn(2, 3, 8, 8), (96, 96), mode='bicubic')
    with torch.inference_mode():
        old, new = source.forward_features(images), model.forward_features(images)
    assert torch.cosine_similarity(old.flatten(), new.flatten(), 0) > 0.98


def test_the_registry_has_them():
    assert len(PLAIN) >= 27


@pytest.mark.parametrize(('name', 'kwargs'), [
    ('resnet26t', {}), ('resnetblur50', {}), ('resnetaa50d', {}), ('wide_resnet50_2', {}),
    ('resnet14t', {'act_layer': 'silu', 'in_chans': 1, 'num_classes': 7, 'global_pool': 'avgmax'}),
    ('resnet26d', {'act_layer': 'leaky_relu', 'output_stride': 8}),
    ('resnet26', {'output_stride': 16, 'replace_stem_pool': True, 'down_kernel_size': 3}),
    ('resnet26', {'base_width': 48, 'channels': (32, 64, 96, 128), 'block_reduce_first': 2, 'num_classes': 0}),
    ('geoprior_resnet14_nano', {'value_dims': (0, 0, 0, 0)}),
])
def test_the_plain_form_of_the_mirror_is_the_source(name, kwargs):
    torch.manual_seed(0)
    source = randomize(timm.create_model(name, **kwargs)).eval()
    plain = mirror(source, name).create(value_dims=(0, 0, 0, 0)).eval()
    plain.load_state_dict(source.state_dict())
    images = torch.randn(1, source.in_chans, 64, 64)
    torch.testing.assert_close(plain(images), source(images))


@pytest.mark.parametrize(('name', 'architecture', 'options'), [
    ('resnet50', 'geoprior_resnet50', {}),
    ('resnet101', 'geoprior_resnet101', {}),
    ('resnet152d', 'geoprior_resnet152', {'stem_type': 'deep', 'stem_width': 32, 'avg_down': True}),
    ('wide_resnet50_2', 'geoprior_resnet50', {'base_width': 128, 'value_dims': [0, 16, 48, 112]}),
    ('resnetblur50', 'geoprior_resnet50', {'aa_layer': 'blur'}),
])
def test_the_architecture_needs_the_fewest_options(name, architecture, options):
    made = mirror(on_meta(name))
    assert (made.architecture, made.model_args) == (architecture, options)


def test_a_network_of_the_nano_shape_has_the_nano_value_channels():
    made = mirror(on_meta('geoprior_resnet14_nano', value_dims=(0, 0, 0, 0)))
    assert (made.architecture, made.model_args) == ('geoprior_resnet14_nano', {})


@pytest.mark.parametrize(('width', 'share', 'channels'), [
    (128, 1 / 16, 8), (256, 3 / 32, 24), (512, 7 / 64, 56), (1024, 7 / 64, 112), (64, 1 / 16, 8), (112, 3 / 32, 8),
    (208, 3 / 32, 16), (16, 1 / 16, 8), (12, 1 / 16, 0), (64, 0, 0),
])
def test_value_channels_are_multiples_of_8(width, share, channels):
    assert value_channels(width, share) == channels


@pytest.mark.parametrize(('name', 'kwargs', 'message'), [
    ('resnet18', {}, r'resnet18 must be .* got a basic block in layer1\.0'),
    ('test_resnet', {}, r'got a basic block in layer1\.0'),
    ('resnext50_32x4d', {}, r'got a convolution of 32 groups in layer1\.0'),
    ('seresnet50', {}, r'got channel attention \(SEModule\) in layer1\.0'),
    ('ecaresnet50t', {}, r'got channel attention \(EcaModule\) in layer1\.0'),
    ('resnet50_gn', {}, r'got a GroupNorm in layer1\.0'),
    ('res2net50d', {}, r'got a Bottle2neck in layer1\.0'),
    ('resnetv2_50', {}, r'resnetv2_50 must be a ResNet of timm, got a ResNetV2\. Use'),
    ('vit_tiny_patch16_224', {}, r'must be a ResNet of timm, got a VisionTransformer'),
    ('resnet26', {'layers': (0, 1, 1, 1)}, r'resnet26 must have blocks in each of four stages, got none in layer1\. U'),
    ('resnet26', {'channels': (8, 8, 12, 12)}, r'must have 3x3 layers of 16 channels or more .* got narrower ones\. U'),
    ('geoprior_resnet50', {}, r'must be a plain ResNet, got a GeoPrior ResNet \(layer2\.0 has attention already\)'),
])
def test_other_networks_are_refused_by_name(name, kwargs, message):
    with pytest.raises(GeoPriorError, match=message):
        mirror(on_meta(name, **kwargs), name)


def test_a_network_with_a_part_of_its_own_is_refused():
    source = timm.create_model('resnet26', num_classes=2)
    source.layer2[0].conv1.stride = (2, 2)  # as in Caffe
    with pytest.raises(GeoPriorError, match=r'got layer2\.0\.conv1 = Conv2d.* where the mirror has Conv2d'):
        mirror(source, 'mine')


def test_activations_are_known_by_name():
    class Squared(nn.ReLU):
        pass

    with pytest.raises(GeoPriorError, match='must have an activation that timm knows by name, got Squared'):
        mirror(timm.create_model('resnet26', act_layer=Squared, num_classes=2), 'mine')
