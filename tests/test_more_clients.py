"""The networks in exporters, quantizers, trainers and explainers, each next to a plain timm ResNet in its place.

Some tests need packages of the extra `clients-more`, and are skipped without them.
"""
import copy
import os

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import timm_geoprior  # noqa: F401  registers the models
from networks import attentions, randomize
from timm_geoprior.layers import GeoPriorAttn2d, GeoPriorConv2d

NETWORKS = {
    'resnet': ('resnet50', {}),
    'geoprior': ('geoprior_resnet50', {}),
    'four heads': ('geoprior_resnet50', {'attn_heads': 4, 'attn_kernel': 'laplacian'}),
}
NETWORKS.update({f'{name}, reparameterized': NETWORKS[name] for name in ('geoprior', 'four heads')})
PLAIN, OURS, FOLDED = 'resnet', 'geoprior', 'geoprior, reparameterized'
CLASSES, SIZE = 10, 64

pytestmark = pytest.mark.filterwarnings('ignore')  # warnings of the clients


def create(name: str = OURS, **options) -> nn.Module:
    """A narrow network with both strides, random norms and another radius in each head, reparameterized if named so."""
    torch.manual_seed(0)
    architecture, own = NETWORKS[name]
    shape = {'layers': (1, 2, 1, 2), 'channels': (16, 24, 32, 48), 'num_classes': CLASSES}
    if name != PLAIN:
        shape['value_dims'] = (0, 4, 8, 12)
    model = randomize(timm.create_model(architecture, **{**shape, **own, **options})).eval()
    with torch.no_grad():
        for attn in attentions(model):
            attn.log_radius.copy_(torch.linspace(-0.5, 1.0, len(attn.log_radius)))
    return reparameterize_model(model) if name.endswith('reparameterized') else model


@pytest.fixture(params=NETWORKS)
def network(request) -> nn.Module:
    return create(request.param)


@pytest.fixture(scope='module')
def images() -> torch.Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of any two logits, as a share of the largest logit."""
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


# -- graphs ------------------------------------------------------------------------------------------------------------

def test_feature_extraction_of_torchvision(network, images):
    from torchvision.models.feature_extraction import create_feature_extractor

    found = create_feature_extractor(network, ['layer2', 'layer4', 'fc'])(images)
    expected = network.forward_intermediates(images, intermediates_only=True)
    torch.testing.assert_close([found['layer2'], found['layer4'], found['fc']],
                               [expected[2], expected[4], network(images)])


def test_removal_of_dead_code(network, images):
    traced = torch.fx.symbolic_trace(network)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    torch.testing.assert_close(traced(images), network(images))


@pytest.mark.parametrize('name', [PLAIN, OURS])
def test_dilated_pooling_is_not_traced(name):
    """timm's pooling with "same" padding reads sizes: docs/backbones.md documents this limit."""
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(create(name, avg_down=True, output_stride=8))


def test_quantization_by_fx(network, images):
    """The prepared network is exact; in the converted one, convolutions and classifier are int8."""
    quantization = pytest.importorskip('torch.ao.quantization')
    quantize_fx = pytest.importorskip('torch.ao.quantization.quantize_fx')
    expected = network(images)
    prepared = quantize_fx.prepare_fx(
        copy.deepcopy(network), quantization.get_default_qconfig_mapping('x86'), (images,))
    assert difference(prepared(images), expected) < 1e-5
    quantized = quantize_fx.convert_fx(prepared)
    assert quantized.get_submodule('layer4.0.conv3').weight().dtype == torch.qint8
    assert difference(quantized(images), expected) < 0.2


# -- ONNX --------------------------------------------------------------------------------------------------------------

def run_onnx(path, images):
    session = pytest.importorskip('onnxruntime').InferenceSession(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


def test_legacy_onnx(network, images, tmp_path):
    """The TorchScript-based exporter, for any batch, height and width."""
    path = tmp_path / 'network.onnx'
    torch.onnx.export(network, (images,), path, dynamo=False, input_names=['x'],
                      dynamic_axes={'x': {0: 'batch', 2: 'height', 3: 'width'}})
    for batch in (images, torch.randn(3, 3, 96, 80)):
        assert difference(run_onnx(path, batch), network(batch)) < 1e-5


@pytest.mark.parametrize('name', [PLAIN, OURS, FOLDED])
def test_onnx_by_timm(name, images, tmp_path):
    """What timm's `onnx_export.py` calls, with `--reparam` for the reparameterized network."""
    from timm.utils.onnx import onnx_export

    pytest.importorskip('onnx')
    network, path = create(name), tmp_path / 'network.onnx'
    onnx_export(network, str(path), example_input=images)
    assert difference(run_onnx(path, images), network(images)) < 1e-5


@pytest.mark.parametrize('name', [PLAIN, OURS, FOLDED])
def test_int8_in_onnx_runtime(name, images, tmp_path):
    quantization = pytest.importorskip('onnxruntime.quantization')
    network, path, quantized = create(name), tmp_path / 'network.onnx', tmp_path / 'int8.onnx'
    torch.onnx.export(network, (images,), path, dynamo=False, input_names=['x'])

    class Calibration(quantization.CalibrationDataReader):
        def __init__(self):
            self.batches = iter([{'x': images.numpy()}])

        def get_next(self):
            return next(self.batches, None)

    quantization.quantize_static(path, quantized, Calibration(), per_channel=True)
    assert 1e-4 < difference(run_onnx(quantized, images), network(images)) < 0.2


# -- OpenVINO ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('way', ['trace', 'exported program'])
def test_openvino(network, images, way):
    openvino = pytest.importorskip('openvino')
    if way == 'trace':
        converted = openvino.convert_model(network, example_input=images)
    else:
        converted = openvino.convert_model(torch.export.export(network, (images,)))
    compiled = openvino.compile_model(converted, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    for batch in (images, torch.randn(3, 3, 96, 80)) if way == 'trace' else (images,):
        assert difference(torch.from_numpy(compiled(batch.numpy())[0]), network(batch)) < 1e-5


# -- torchao -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('config', ['Int8WeightOnlyConfig', 'Int8DynamicActivationInt8WeightConfig'])
def test_int8_in_torchao(network, images, config):
    torchao = pytest.importorskip('torchao.quantization')
    expected = network(images)
    torchao.quantize_(network, getattr(torchao, config)())
    assert type(network.fc.weight) is not nn.Parameter
    assert 0 < difference(network(images), expected) < 0.05


@pytest.mark.parametrize('name', [PLAIN, FOLDED])  # a norm after a concatenation makes the conversion 30 times slower
def test_int8_by_pt2e(name, images):
    pt2e = pytest.importorskip('torchao.quantization.pt2e.quantize_pt2e')
    x86 = pytest.importorskip('torchao.quantization.pt2e.quantizer.x86_inductor_quantizer')
    network = create(name)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = pt2e.prepare_pt2e(torch.export.export(network, (images,)).module(), quantizer)
    prepared(images)
    quantized = pt2e.convert_pt2e(prepared)
    assert any('quantized_decomposed' in str(node.target) for node in quantized.graph.nodes)
    assert 1e-4 < difference(quantized(images), network(images)) < 0.2


# -- gradients of single images ----------------------------------------------------------------------------------------

def sample_gradients(model, images, labels):
    """Gradients of each image's loss by parameter name, shape (B, ...)."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters, image, label):
        return F.cross_entropy(functional_call(model, parameters, (image[None],)), label[None])

    return vmap(grad(loss), (None, 0, 0))(parameters, images, labels)


def test_gradients_of_single_images(network, images):
    labels = torch.tensor([3, 7])
    torch.testing.assert_close(vmap(lambda image: network(image[None])[0])(images), network(images),
                               rtol=1e-4, atol=1e-4)
    found = sample_gradients(network, images, labels)
    assert len(found) == len(list(network.parameters()))
    for index in range(len(images)):
        one = slice(index, index + 1)
        expected = torch.autograd.grad(F.cross_entropy(network(images[one]), labels[one]), network.parameters())
        for value, wanted in zip(found.values(), expected, strict=True):
            assert difference(value[index], wanted) < 1e-3


def private(model):
    """Disable in-place activations, which opacus' hooks reject."""
    for module in model.modules():
        if hasattr(module, 'inplace'):
            module.inplace = False
    return model.train()


@pytest.mark.parametrize('name', [PLAIN, OURS])
def test_opacus(name, images):
    """A private step from the gradients of `vmap`; opacus' own hooks cannot train any ResNet of timm."""
    opacus = pytest.importorskip('opacus')
    labels = torch.tensor([3, 7])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=2)

    def make(mode):
        model = private(create(name, norm_layer='groupnorm1', zero_init_last=False))
        return opacus.PrivacyEngine().make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), data_loader=loader,
            noise_multiplier=1.0, max_grad_norm=1.0, poisson_sampling=False, grad_sample_mode=mode)

    model, _, _ = make('hooks')
    with pytest.raises(RuntimeError, match='is a view and is being modified inplace'):
        model(images)

    model, optimizer, _ = make('no_op')
    before = {parameter_name: value.clone() for parameter_name, value in model.named_parameters()}
    for parameter, samples in zip(model.parameters(), sample_gradients(model, images, labels).values(), strict=True):
        parameter.grad_sample = samples
    optimizer.step()
    assert not any(torch.equal(value, before[parameter_name]) for parameter_name, value in model.named_parameters())


# -- several processes -------------------------------------------------------------------------------------------------

def step(model, images, labels):
    """One update; batch norms in eval mode, so that the batch may be divided."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()


def train_in_parallel(rank, folder, kind, name, images, labels):
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    model = create(name)
    if kind == 'DDP':
        wrapped = DistributedDataParallel(model)
    else:
        mesh = torch.distributed.init_device_mesh('cpu', (2,))
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            for block in stage:
                fully_shard(block, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    step(wrapped, images[rank::2], labels[rank::2])
    state = {key: value.full_tensor() if hasattr(value, 'full_tensor') else value
             for key, value in model.state_dict().items()}
    torch.save(state, folder / f'{rank}.pt')
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(os.name == 'nt', reason='gloo is initialized through a file')
@pytest.mark.parametrize('name', [PLAIN, OURS])
@pytest.mark.parametrize('kind', ['DDP', 'FSDP2'])
def test_two_processes(kind, name, forkserver, tmp_path):
    """Two halves of a batch give the update of the whole, also in the radii, of which FSDP2 gives one process none."""
    images, labels = torch.randn(4, 3, SIZE, SIZE), torch.tensor([1, 3, 5, 7])
    processes = [forkserver.Process(target=train_in_parallel, args=(rank, tmp_path, kind, name, images, labels))
                 for rank in range(2)]
    for process in processes:
        process.start()
    model = create(name)
    before = copy.deepcopy(model.state_dict())
    step(model, images, labels)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    states = [torch.load(tmp_path / f'{rank}.pt') for rank in range(2)]
    for key, value in model.state_dict().items():
        torch.testing.assert_close(states[0][key], value, rtol=1e-3, atol=1e-5)
        assert torch.equal(states[0][key], states[1][key])
        assert 'log_radius' not in key or not torch.equal(value, before[key])


# -- torch-pruning -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('part', ['conv', 'attn.value'])
def test_pruned_channels(part, images):
    """Pruning a channel of either part gives the network in which nothing reads that channel."""
    pruning = pytest.importorskip('torch_pruning')
    model, cut = create(), [0, 2]
    layer = model.layer2[1].conv2
    graph = pruning.DependencyGraph().build_dependency(model, images)
    group = graph.get_pruning_group(layer.get_submodule(part), pruning.prune_conv_out_channels, cut)
    blind = copy.deepcopy(model)
    first = 0 if part == 'conv' else layer.conv.out_channels
    with torch.no_grad():
        blind.layer2[1].conv3.weight[:, [first + index for index in cut]] = 0
    group.prune()
    assert layer.get_submodule(part).out_channels == blind.layer2[1].conv2.get_submodule(part).out_channels - 2
    torch.testing.assert_close(model(images), blind(images))
    torch.testing.assert_close(reparameterize_model(model)(images), blind(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', [PLAIN, OURS, FOLDED])
def test_pruning(name, images):
    """By magnitude, in every layer; then trained further and reparameterized."""
    pruning = pytest.importorskip('torch_pruning')
    model = create(name)
    before = sum(parameter.numel() for parameter in model.parameters())
    pruning.pruner.MagnitudePruner(model, images, pruning.importance.MagnitudeImportance(), pruning_ratio=0.25,
                                   ignored_layers=[model.fc]).step()
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.7 * before
    step(model, images, torch.tensor([3, 7]))
    torch.testing.assert_close(reparameterize_model(model)(images), model(images), rtol=1e-4, atol=1e-4)
    assert [attn.value.out_channels for attn in attentions(model)] == ([] if name == PLAIN else [3, 3, 6, 9, 9])


def test_several_heads_are_not_pruned(images):
    """docs/backbones.md documents this limit."""
    pruning = pytest.importorskip('torch_pruning')
    with pytest.raises(IndexError):
        pruning.pruner.MagnitudePruner(create('four heads'), images, pruning.importance.MagnitudeImportance(),
                                       pruning_ratio=0.25).step()


# -- peft --------------------------------------------------------------------------------------------------------------

def adapt(model, **options):
    """Add low-rank adapters to convolutions, and train them for two steps."""
    peft = pytest.importorskip('peft')
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, **options))
    optimizer = torch.optim.SGD(adapted.parameters(), 0.1)
    images = torch.randn(2, 3, SIZE, SIZE)
    for _ in range(2):  # one of the two factors starts at zero
        F.cross_entropy(adapted(images), torch.tensor([3, 7])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval()


@pytest.mark.parametrize(('name', 'options'), [
    (PLAIN, {'target_modules': ['conv2']}),
    (OURS, {'target_modules': r'layer1\..*\.conv2|.*\.conv2\.(conv|attn\.value)'}),
    (OURS, {'target_modules': r'.*\.conv2\.conv', 'modules_to_save': ['fc', 'attn']}),
], ids=['plain', 'both parts', 'the attention as a whole'])
def test_adapters(name, options, images, tmp_path):
    model = create(name)
    before = model(images)
    adapted = adapt(copy.deepcopy(model), **options)
    expected = adapted(images)
    assert difference(expected, before) > 1e-3
    adapted.save_pretrained(tmp_path)
    again = pytest.importorskip('peft').PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    torch.testing.assert_close(again(images), expected)
    # an adapter is neither folded nor lost
    torch.testing.assert_close(reparameterize_model(adapted)(images), expected, rtol=1e-4, atol=1e-4)
    merged = adapted.merge_and_unload()
    assert sum(type(module) is GeoPriorConv2d for module in merged.modules()) == len(attentions(model))
    torch.testing.assert_close(reparameterize_model(merged)(images), expected, rtol=1e-4, atol=1e-4)


def test_adapters_of_the_whole_layer():
    """peft supports only single layers."""
    with pytest.raises(ValueError, match=r'(?s)Target module GeoPriorConv2d.* is not supported'):
        adapt(create(), target_modules=['conv2'])


# -- captum ------------------------------------------------------------------------------------------------------------

def test_captum(network, images):
    """Integrated gradients add up to the difference of logits; Grad-CAM and the activations equal those of a hook."""
    attr = pytest.importorskip('captum.attr')
    shares, deltas = attr.IntegratedGradients(network).attribute(
        images, target=3, n_steps=200, internal_batch_size=50, return_convergence_delta=True)
    change = network(images)[:, 3] - network(torch.zeros_like(images))[:, 3]
    assert shares.shape == images.shape
    assert float(deltas.abs().max()) < 0.05 * float(change.abs().max())

    maps = network.forward_features(images)
    slopes = torch.autograd.grad(network.forward_head(maps)[:, 3].sum(), maps)[0]
    cam = attr.LayerGradCam(network, network.layer4).attribute(images, target=3)
    torch.testing.assert_close(cam, (slopes.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True),
                               rtol=1e-4, atol=1e-5)
    seen = []
    layer = network.layer2[1].conv2
    layer = layer.attn if isinstance(layer, GeoPriorConv2d) else layer
    with torch.no_grad(), layer.register_forward_hook(lambda _, args, out: seen.append(out.clone())):
        network(images)
    torch.testing.assert_close(attr.LayerActivation(network, layer).attribute(images), seen[0])


# -- Lightning ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', [PLAIN, OURS])
def test_lightning(name, tmp_path):
    lightning = pytest.importorskip('lightning.pytorch')

    class Classifier(lightning.LightningModule):
        def __init__(self, name):
            super().__init__()
            self.save_hyperparameters()
            self.model = create(name)

        def training_step(self, batch, _):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    data = torch.utils.data.TensorDataset(torch.randn(8, 3, SIZE, SIZE), torch.arange(8))
    module = Classifier(name)
    before = copy.deepcopy(module.state_dict())
    trainer = lightning.Trainer(
        max_epochs=1, accelerator='cpu', devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    radii = [key for key in before if key.endswith('log_radius')]
    assert len(radii) == len([m for m in module.modules() if isinstance(m, GeoPriorAttn2d)])
    assert not any(torch.equal(module.state_dict()[key], before[key]) for key in radii)
    trainer.save_checkpoint(tmp_path / 'last.ckpt')
    again = Classifier.load_from_checkpoint(tmp_path / 'last.ckpt')
    assert all(torch.equal(value, again.state_dict()[key].cpu()) for key, value in module.state_dict().items())
