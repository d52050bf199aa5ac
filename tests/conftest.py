"""What several test files share: a Hub of the tests' own, a release, a small folder of real photographs."""
import atexit
import json
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from hub_server import HubServer

# before huggingface_hub is imported anywhere: no test sees the real Hub, or the user's own cache and token
HUB = HubServer()
HF_HOME = tempfile.mkdtemp(prefix='timm-geoprior-tests-')
os.environ.update(HF_ENDPOINT=HUB.url, HF_HOME=HF_HOME, HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1')
for name in ('HF_TOKEN', 'HF_HUB_OFFLINE', 'HF_HUB_CACHE', 'HUGGINGFACE_HUB_CACHE', 'TRANSFORMERS_OFFLINE'):
    os.environ.pop(name, None)
atexit.register(shutil.rmtree, HF_HOME, ignore_errors=True)

PHOTOGRAPHS = ('astronaut', 'chelsea', 'coffee', 'rocket')


@pytest.fixture(scope='session')
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of four classes, crops of four photographs at 64 px: 12 a class in train, 5 in val."""
    data = pytest.importorskip('skimage.data')
    root = tmp_path_factory.mktemp('photos')
    places = torch.Generator().manual_seed(0)
    for name in PHOTOGRAPHS:
        photo = Image.fromarray(getattr(data, name)())
        for split, count in (('train', 12), ('val', 5)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                x, y = (int(torch.randint(0, side - 128, (), generator=places)) for side in photo.size)
                photo.crop((x, y, x + 128, y + 128)).resize((64, 64)).save(folder / f'{number:02}.jpg', quality=95)
    return root


@pytest.fixture
def hub() -> HubServer:
    """The Hub, empty."""
    HUB.reset()
    return HUB


@pytest.fixture(scope='session')
def forkserver() -> multiprocessing.context.ForkServerContext:
    """A context whose processes start at once: one server has imported all that they need."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['timm_geoprior.publish'])
    return context


@pytest.fixture(scope='session')
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the nano network; its weights are random, its norms not all alike."""
    import timm

    import timm_geoprior  # noqa: F401

    folder = tmp_path_factory.mktemp('run')
    torch.manual_seed(0)
    model = timm.create_model('geoprior_resnet14_nano', num_classes=200)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    averaged = {key: value * 0.9 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    recipe = {'name': 'r64_tin200', 'model': 'geoprior_resnet14_nano', 'epochs': 2, 'scale': (0.35, 1.0)}
    facts = {'recipe': recipe, 'seed': 3, 'commit': 'a' * 40, 'versions': {'torch': str(torch.__version__)}}
    torch.save({'model': model.state_dict(), 'ema': averaged, 'model_name': 'geoprior_resnet14_nano',
                'model_kwargs': {'attn_radius': 2.0}, 'num_classes': 200, **facts}, folder / 'last.pt')
    (folder / 'summary.csv').write_text('epoch,train_loss,seconds\n0,5.1,3600\n1,4.2,7200\n')
    (folder / 'results.json').write_text(json.dumps({**facts, 'epochs': 2, 'hours': 2.0, 'hardware': 'a CPU'}))
    metric = {'dataset': 'Tiny-ImageNet-200', 'split': 'validation', 'num_images': 10_000, 'top1_correct': 5432,
              'top5_correct': 7654, 'precision': 'float32', 'img_size': 64, 'software': {'timm': timm.__version__}}
    (folder / 'val.json').write_text(json.dumps(metric))
    return folder


@pytest.fixture(scope='session')
def planned():
    """The nano network's entry as it was before it had weights."""
    from dataclasses import replace

    from timm_geoprior.manifest import load_manifest

    return replace(
        load_manifest().get('geoprior_resnet14_nano'), status='planned', hub_id=None, revision=None, file=None,
        sha256=None, bytes=None, dtype=None, golden=None, metrics=(), baseline=None, train_log=None)


@pytest.fixture(scope='session')
def staged(run_folder: Path, planned, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The staged folder of that run. Not to be changed: copy it."""
    from timm_geoprior.publish import read_checkpoint, read_metrics, stage

    folder = tmp_path_factory.mktemp('staged') / 'nano'
    metrics = read_metrics(run_folder / 'val.json')
    stage(planned, read_checkpoint(run_folder / 'last.pt'), folder, metrics, run_folder)
    return folder
