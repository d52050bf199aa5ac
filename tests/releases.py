"""Releases for tests: a run, its staged folder, a manifest that contains it, processes that load it."""
import ctypes
import json
import resource
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import generate_default_cfgs, register_model

from hub_server import HubServer
from timm_geoprior import geoprior_resnet
from timm_geoprior.files import write_csv
from timm_geoprior.pretrained import cfgs, manifest
from timm_geoprior.pretrained.cfgs import pretrained_cfgs
from timm_geoprior.pretrained.manifest import Manifest, ModelEntry, load_manifest
from timm_geoprior.release.staging import Evidence, read_staged, stage
from timm_geoprior.training.checkpoint import read_weights
from timm_geoprior.training.report import plot_history

NANO = 'geoprior_resnet14_nano.r64_tin200'
WEIGHTS_DIR = cfgs.WEIGHTS_DIR


def planned(name: str = NANO) -> ModelEntry:
    """A network's entry as it was before there were weights."""
    return replace(
        load_manifest().get(name), status='planned', hub_id=None, revision=None, file=None, sha256=None, bytes=None,
        dtype=None, golden=None, metrics=(), baseline=None, train_log=None, recipe_commit=None, seed=None)


def make_run(folder: Path) -> Path:
    """Write the files of a finished run of the nano network, with random weights and norms."""
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
    torch.save({'model': model.state_dict(), 'model_ema': averaged, 'model_name': 'geoprior_resnet14_nano',
                'model_kwargs': {'attn_radius': 2.0}, 'num_classes': 200, **facts}, folder / 'last.pt')
    history = [{'epoch': epoch, 'lr': 0.1, 'train_loss': 5.1 - epoch, 'seconds': 3600} for epoch in range(2)]
    write_csv(folder / 'summary.csv', history)
    plot_history(history, folder)
    (folder / 'results.json').write_text(json.dumps({**facts, 'epochs': 2, 'hours': 2.0, 'hardware': 'a CPU'}))
    return folder


def stage_run(run: Path, folder: Path) -> Path:
    """Stage a run's averaged weights, with figures as scripts/validate.py would write them."""
    checkpoint = read_weights(run / 'last.pt')
    entry = stage(planned(), checkpoint, folder, Evidence(run=run))
    write_results(run / 'val.json', str(entry.sha256))
    stage(planned(), checkpoint, folder, Evidence(run / 'val.json', run=run))
    return folder


def write_results(path: Path, sha256: str) -> None:
    """Write a results file like that of scripts/validate.py, with only what a release reads."""
    counts = {'num_images': 10_000, 'top1_correct': 5432, 'top5_correct': 7654}
    path.write_text(json.dumps({
        'results': [{'precision': 'float32', **counts}], 'data': {'split': 'validation'}, 'weights': {'sha256': sha256},
        'preprocessing': asdict(planned().input), 'software': {'timm': timm.__version__}}))


def files(folder: Path) -> set[str]:
    """Relative paths of all files in a folder and its subfolders."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file()}


def put_on(server: HubServer, folder: Path, repo_id: str = 'owner/nano', private: bool = False) -> ModelEntry:
    """Put a staged folder on the Hub without the client, and return the published entry."""
    revision = server.publish(repo_id, {name: (folder / name).read_bytes() for name in files(folder)}, private)
    return replace(read_staged(folder, load_manifest()), status='published', hub_id=repo_id, revision=revision)


def with_entry(entry: ModelEntry) -> Manifest:
    """The manifest with this entry in place of the one of the same name; no other entry has weights."""
    whole = load_manifest()
    return replace(whole, models={**{name: planned(name) for name in whole.models}, entry.name: entry})


@contextmanager
def using_manifest(path: Path) -> Iterator[None]:
    """Make the package and timm's registry use another manifest."""
    def register() -> None:
        geoprior_resnet.default_cfgs = generate_default_cfgs(pretrained_cfgs())
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # timm warns that it overwrites models
            for name in geoprior_resnet.default_cfgs:
                register_model(getattr(geoprior_resnet, name))

    try:
        with pytest.MonkeyPatch.context() as patch:
            # not `manifest_path`, which other modules have imported: publishing would write tables to the real README
            patch.setattr(manifest, 'FILE_NAME', str(path.resolve()))
            register()
            yield
    finally:
        with pytest.MonkeyPatch.context() as patch:  # a fixture may restore its folder only later
            patch.setattr(cfgs, 'WEIGHTS_DIR', WEIGHTS_DIR)
            register()


def _report(
        connection: Connection, weights_dir: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    cfgs.WEIGHTS_DIR = weights_dir
    try:
        connection.send((function(*arguments), ''))
    except BaseException:
        connection.send((None, traceback.format_exc()))


def start(context: ForkServerContext, function: Callable[..., Any], *arguments: Any) -> tuple[Any, Connection]:
    """Call a function in a new process; returns the process, and the connection for its result or traceback."""
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(there, cfgs.WEIGHTS_DIR, function, arguments))
    process.start()
    there.close()
    return process, here


def finish(process: Any, connection: Connection) -> tuple[Any, str]:
    """Its result and its traceback; both are empty if it was killed."""
    try:
        outcome = connection.recv()
    except EOFError:
        outcome = (None, '')
    process.join()
    return outcome


def as_mere_mortal() -> None:
    """Make file permissions apply to this process even if it is root, by dropping every capability (Linux)."""
    if sys.platform == 'linux':
        header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        ctypes.CDLL(None).capset(header, data)


def limit_file_size(count: int) -> None:
    """Limit the size of this process's files, so that a longer write fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))
