"""Fixtures that several test files share: a local Hub, a release, a small folder of real photographs."""
import atexit
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')  # before torch: two processes run tests at once, and start others

import pytest
import torch
from PIL import Image

from hub_server import HubServer

# background jobs of a shell ignore SIGINT, and so would the programs that tests start and interrupt
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# before huggingface_hub is imported anywhere, so that no test sees the real Hub or the user's own cache and token
HUB = HubServer()
HF_HOME = tempfile.mkdtemp(prefix='timm-geoprior-tests-')
os.environ.update(HF_ENDPOINT=HUB.url, HF_HOME=HF_HOME, HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1')
for name in ('HF_TOKEN', 'HF_HUB_OFFLINE', 'HF_HUB_CACHE', 'HUGGINGFACE_HUB_CACHE', 'TRANSFORMERS_OFFLINE'):
    os.environ.pop(name, None)
atexit.register(shutil.rmtree, HF_HOME, ignore_errors=True)

PHOTOGRAPHS = ('astronaut', 'chelsea', 'coffee', 'rocket')


@pytest.fixture(scope='session')
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of four classes, crops of four photographs at 64 px: 12 per class in train, 5 in val."""
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


@pytest.fixture(scope='session')
def checkpoint(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain network of the nano's shape, trained for two epochs on four classes, as `train` saves it."""
    from timm_geoprior.training.engine import train
    from timm_geoprior.training.recipe import RunConfig, load_recipe

    shape = '{value_dims: [0, 0, 0, 0], zero_init_last: false}'  # so that blocks do something after two epochs
    recipe = load_recipe('finetune', [
        'model=geoprior_resnet14_nano', f'model_kwargs={shape}', 'epochs=2', 'batch_size=8', 'lr=3e-3'])
    output = tmp_path_factory.mktemp('source')
    train(recipe, RunConfig(photo_folder, output, val_split='val', workers=0))
    return output / 'last.pt'


@pytest.fixture
def weights_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A weights folder for the test, in place of the package's; it does not exist yet."""
    from timm_geoprior.pretrained import cfgs

    monkeypatch.setattr(cfgs, 'WEIGHTS_DIR', tmp_path / 'weights')
    return tmp_path / 'weights'


@pytest.fixture
def hub(weights_dir: Path) -> HubServer:
    """An empty Hub, with an empty cache and a package without weights."""
    HUB.reset()
    shutil.rmtree(Path(HF_HOME, 'hub'), ignore_errors=True)
    return HUB


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record how long retries would wait, without waiting."""
    noted: list[float] = []
    monkeypatch.setattr(time, 'sleep', noted.append)
    return noted


@pytest.fixture(scope='session')
def forkserver() -> multiprocessing.context.ForkServerContext:
    """A context whose processes start quickly, since its server has already imported what they need."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['pytest', 'timm_geoprior.release.releasing', 'timm_geoprior.training.report'])
    return context


@pytest.fixture(scope='session')
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the nano network. Do not modify."""
    from releases import make_run

    return make_run(tmp_path_factory.mktemp('run'))


@pytest.fixture(scope='session')
def staged(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The staged folder of that run. Do not modify."""
    from releases import stage_run

    return stage_run(run_folder, tmp_path_factory.mktemp('staged') / 'nano')
