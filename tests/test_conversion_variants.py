"""scripts/experiments/conversion_variants.py: it converts as the package does, and reads Caffe's files."""
import struct

import pytest
import timm
import torch
from torch import nn

import conversion_variants as script
from timm_geoprior.conversion.state_dict import convert_state_dict

NANO, VALUE_DIMS = 'geoprior_resnet14_nano', (0, 8, 16, 24)


@pytest.fixture(scope='module')
def source():
    torch.manual_seed(0)
    model = timm.create_model(NANO, value_dims=(0, 0, 0, 0))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def test_without_options_it_is_the_packages_conversion(source):
    converted = timm.create_model(NANO).eval()
    converted.load_state_dict(convert_state_dict(source.state_dict(), converted))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = script.variant(source, VALUE_DIMS, 64)(images)
        torch.testing.assert_close(found, converted(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', script.VARIANTS)
def test_each_variant_runs(source, name):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answers = script.variant(source, VALUE_DIMS, 64, **script.VARIANTS[name])(images)
    assert answers.isfinite().all()
    assert not torch.equal(answers, source(images))


def varint(number):
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def test_a_caffemodel_is_read(tmp_path):
    values = [[1.5, -2.0], list(range(100))]
    packed = [field(5, struct.pack(f'<{len(part)}f', *part)) for part in values]
    blobs = b''.join(field(7, content + field(7, b'\x08\x02')) for content in packed)
    layer = field(1, b'conv_1') + field(2, b'Convolution') + varint(10 << 3) + varint(300) + blobs
    (tmp_path / 'a.caffemodel').write_bytes(field(1, b'a network') + field(100, layer))
    (name, found), = script.read_caffemodel(tmp_path / 'a.caffemodel').items()
    assert name == 'conv_1'
    assert [part.tolist() for part in found] == values
