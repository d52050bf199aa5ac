"""The networks in other libraries: built, trained on real photographs, saved and loaded again."""
from collections import OrderedDict

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.transforms.functional import normalize, to_tensor

import timm_geoprior  # noqa: F401  registers the models
from programs import run
from timm_geoprior.pretrained.download import download_tag

NANO, LARGE = 'geoprior_resnet14_nano', 'geoprior_resnet50'
TAG = 'geoprior_resnet14_nano.r64_tin200'
SIZE = 64
# photographs of scikit-image with the box of what they show, in pixels: a face, a cat's head, a cup, a rocket
BOXES = {'astronaut': (155, 15, 300, 190), 'chelsea': (30, 0, 375, 300), 'coffee': (78, 18, 476, 392),
         'rocket': (310, 125, 337, 410)}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope='module')
def photos():
    """Images, shape (4, 3, 64, 64) in [0, 1], and the box of each as x1, y1, x2, y2 in fractions of the sides."""
    data = pytest.importorskip('skimage.data')
    opened = [Image.fromarray(getattr(data, name)()) for name in BOXES]
    images = torch.stack([to_tensor(photo.resize((SIZE, SIZE))) for photo in opened])
    boxes = torch.tensor([[x1 / photo.width, y1 / photo.height, x2 / photo.width, y2 / photo.height]
                          for photo, (x1, y1, x2, y2) in zip(opened, BOXES.values(), strict=True)])
    return images, boxes


def prepared(name, images):
    cfg = timm.get_pretrained_cfg(name)
    return normalize(images, cfg.mean, cfg.std)


def radii(model):
    return {name: value.clone() for name, value in model.state_dict().items() if name.endswith('log_radius')}


def check_training(model, loss_of):
    """Train for two steps, and check that all radii change and the loss on the images falls.

    One step is not enough: in a new network the last norm of each block is zero, and nothing before it learns.
    """
    before = radii(model)
    assert before
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    model.train()
    losses = []
    for _ in range(2):
        torch.manual_seed(0)  # dropout and the boxes that a detector samples
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert not any(torch.equal(value, before[name]) for name, value in radii(model).items())


def check_same(model, again, answer):
    with torch.no_grad():
        for ours, theirs in zip(answer(model.eval()), answer(again.eval()), strict=True):
            assert ours.numel()
            assert torch.equal(ours, theirs)


def check_bundled(loaded, features_only=True):
    """Check that a client loaded the same tensors as timm does after verifying the file."""
    bundled = timm.create_model(TAG, pretrained=True, features_only=features_only).state_dict()
    assert loaded.keys() == bundled.keys()
    assert all(torch.equal(value, bundled[name]) for name, value in loaded.items())


# -- segmentation_models_pytorch ---------------------------------------------------------------------------------------

@pytest.mark.parametrize(('architecture', 'name'), [
    ('Unet', NANO), ('Unet', LARGE), ('FPN', NANO), ('DeepLabV3Plus', NANO)])
def test_segmentation(photos, tmp_path, architecture, name):
    smp = pytest.importorskip('segmentation_models_pytorch')
    images, boxes = photos
    masks = torch.zeros(len(images), 1, SIZE, SIZE)
    for mask, (x1, y1, x2, y2) in zip(masks[:, 0], (SIZE * boxes).round().int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    inputs = prepared(name, images)
    model = getattr(smp, architecture)(f'tu-{name}', encoder_weights=True if name == NANO else None, classes=1)
    if name == NANO:
        check_bundled(model.encoder.model.state_dict())
    check_training(model, lambda model: F.binary_cross_entropy_with_logits(model(inputs), masks))
    model.save_pretrained(tmp_path)
    check_same(model, smp.from_pretrained(tmp_path), lambda model: [model(inputs)])


# -- torchvision's detectors -------------------------------------------------------------------------------------------

class Pyramid(torch.nn.Module):
    """Stages of a timm network with a feature pyramid on top, as torchvision's detectors expect it."""

    def __init__(self, name, first, top, pretrained):
        super().__init__()
        self.body = timm.create_model(
            name, pretrained=pretrained, features_only=True, out_indices=tuple(range(first, 5)))
        self.pyramid = FeaturePyramidNetwork(self.body.feature_info.channels(), 64, top)
        self.out_channels = 64

    def forward(self, images):
        return self.pyramid(OrderedDict((str(level), stage) for level, stage in enumerate(self.body(images))))


def detector(kind, name):
    """A detector with three levels and two derived from the last (RetinaNet), or with four and one (Faster R-CNN)."""
    cfg, pretrained = timm.get_pretrained_cfg(name), name == NANO
    common = {'num_classes': 5, 'min_size': SIZE, 'max_size': SIZE, 'image_mean': cfg.mean, 'image_std': cfg.std}
    if kind == 'RetinaNet':
        return RetinaNet(Pyramid(name, 2, LastLevelP6P7(64, 64), pretrained), score_thresh=0.0, **common)
    return FasterRCNN(Pyramid(name, 1, LastLevelMaxPool(), pretrained), box_score_thresh=0.0, **common)


@pytest.mark.parametrize(('kind', 'name'), [('RetinaNet', NANO), ('FasterRCNN', NANO), ('FasterRCNN', LARGE)])
def test_detection(photos, tmp_path, kind, name):
    images, boxes = photos
    targets = [{'boxes': SIZE * box[None], 'labels': torch.tensor([label])} for label, box in enumerate(boxes, start=1)]
    model = detector(kind, name)
    if name == NANO:
        check_bundled(model.backbone.body.state_dict())
    check_training(model, lambda model: sum(model(list(images), targets).values()))
    torch.save(model.state_dict(), tmp_path / 'detector.pt')
    again = detector(kind, name)
    again.load_state_dict(torch.load(tmp_path / 'detector.pt', weights_only=True))
    check_same(model, again, lambda model: [found[key] for found in model(list(images)) for key in found])


# -- transformers ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def transformers():
    return pytest.importorskip('transformers')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The bundled tag as a folder, as `timm-geoprior download` writes it."""
    return download_tag(TAG, tmp_path_factory.mktemp('download') / 'nano')


@pytest.mark.parametrize('name', [NANO, LARGE])
def test_timm_wrapper(transformers, photos, folder, tmp_path, name):
    wrapper = transformers.TimmWrapperForImageClassification
    inputs, labels = prepared(name, photos[0]), torch.arange(4)
    if name == NANO:
        check_bundled(wrapper.from_pretrained(folder).timm_model.state_dict(), features_only=False)
        model = wrapper.from_pretrained(
            folder, num_labels=4, id2label=dict(enumerate(BOXES)), ignore_mismatched_sizes=True)
        model.config.label_names = list(BOXES)  # transformers 5.23 saves the old names with the new number
    else:
        model = wrapper(transformers.TimmWrapperConfig(architecture=name, num_labels=4))
    check_training(model, lambda model: model(inputs, labels=labels).loss)
    model.save_pretrained(tmp_path)
    again = wrapper.from_pretrained(tmp_path)
    check_same(model, again, lambda model: [model(inputs).logits])
    assert again.config.id2label == model.config.id2label
    if name == NANO:  # its config.json came from ours
        timms = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
        check_same(model, timms, lambda model: [getattr(output := model(inputs), 'logits', output)])


@pytest.mark.parametrize('name', [NANO, LARGE])
def test_timm_backbone(transformers, photos, tmp_path, name):
    inputs, labels = prepared(name, photos[0]), torch.arange(4)
    backbone = transformers.TimmBackbone(transformers.TimmBackboneConfig(backbone=name, out_indices=[2, 3, 4]))
    if name == NANO:
        # pretrained=True loads the same, but transformers 5.23 then resets the running statistics of every timm network
        weights = timm.create_model(name, pretrained=True, features_only=True).state_dict()
        backbone._backbone.load_state_dict(weights)
        check_bundled(backbone._backbone.state_dict())
    head = torch.nn.Linear(backbone.channels[-1], 4)
    check_training(torch.nn.ModuleList([backbone, head]), lambda model: F.cross_entropy(
        model[1](model[0](inputs).feature_maps[-1].mean((2, 3))), labels))
    backbone.save_pretrained(tmp_path)
    again = transformers.TimmBackbone(transformers.TimmBackboneConfig.from_pretrained(tmp_path))
    again.load_state_dict(load_file(tmp_path / 'model.safetensors'))
    check_same(backbone, again, lambda model: model(inputs).feature_maps)


@pytest.mark.parametrize('way', ['from_config', 'from_pretrained'])
def test_auto_backbone(transformers, photos, way):
    """From a configuration it is a TimmBackbone; by name it asks the Hub first, and resets running statistics."""
    inputs = prepared(NANO, photos[0])
    weights = timm.create_model(NANO, pretrained=True, features_only=True).state_dict()
    if way == 'from_config':
        config = transformers.TimmBackboneConfig(backbone=NANO, out_indices=[2, 3, 4])
        backbone = transformers.AutoBackbone.from_config(config)
    else:
        backbone = transformers.AutoBackbone.from_pretrained(NANO, out_indices=[2, 3, 4])
        found = backbone._backbone.state_dict()
        assert {name.rsplit('.', 1)[1] for name, value in found.items() if not torch.equal(value, weights[name])} == {
            'num_batches_tracked', 'running_mean', 'running_var'}
    backbone._backbone.load_state_dict(weights)
    expected = timm.create_model(NANO, pretrained=True, features_only=True, out_indices=[2, 3, 4]).eval()(inputs)
    for stage, wanted in zip(backbone.eval()(inputs).feature_maps, expected, strict=True):
        assert torch.equal(stage, wanted)


def test_a_detector_of_transformers(transformers, photos, tmp_path):
    """DETR, which uses a TimmBackbone and freezes its norms, so that it needs trained weights."""
    pytest.importorskip('scipy')
    inputs, boxes = prepared(NANO, photos[0]), photos[1]
    config = transformers.DetrConfig(
        backbone_config=transformers.TimmBackboneConfig(backbone=NANO, out_indices=[4]), d_model=32, encoder_layers=1,
        decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2,
        num_queries=5, num_labels=4)
    model = transformers.DetrForObjectDetection(config)
    weights = timm.create_model(NANO, pretrained=True, features_only=True).state_dict()
    model.model.backbone.model.load_state_dict(weights)
    places = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1)  # center, width, height
    targets = [{'class_labels': torch.tensor([label]), 'boxes': place[None]} for label, place in enumerate(places)]
    check_training(model, lambda model: model(inputs, labels=targets).loss)
    model.save_pretrained(tmp_path)
    again = transformers.DetrForObjectDetection.from_pretrained(tmp_path)
    check_same(model, again, lambda model: [model(inputs).logits, model(inputs).pred_boxes])


SCRIPT = """
import sys
from transformers import TimmWrapperForImageClassification
print(TimmWrapperForImageClassification.from_pretrained(sys.argv[1]).num_labels)
"""


def test_the_cure_of_an_unknown_model(transformers, folder, tmp_path):
    """A script that does not import the package is told to upgrade timm; under `timm-geoprior run` it works."""
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT)
    plain = run([script, folder])
    assert plain.returncode == 1
    assert 'geoprior_resnet14_nano' in plain.stderr
    assert 'pip install -U timm' in plain.stderr
    cured = run(['-m', 'timm_geoprior', 'run', script, folder], check=True)
    assert cured.stdout.split()[-1] == '200'
