"""Builds can be installed: a source archive, the wheel built from it, and an editable install."""
import os
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
import yaml

import timm_geoprior
from timm_geoprior.pretrained.manifest import load_manifest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'timm_geoprior'
# run in the new environment, away from the checkout: where things are, and that they load
PROBE = """
import json
import pathlib
import timm
import timm_geoprior
from timm_geoprior.pretrained.manifest import load_manifest, manifest_path

package = pathlib.Path(timm_geoprior.__file__).parent
manifest = load_manifest()
loaded = timm.list_pretrained('*geoprior*')
for name in loaded:
    if manifest.tags[name].status == 'bundled':
        timm.create_model(name, pretrained=True)
print(json.dumps({
    'package': str(package),
    'manifest': str(manifest_path()),
    'models': list(manifest.tags),
    'loaded': loaded,
    'classes': {name: labels.names for name, labels in manifest.label_sets.items()},
    'recipes': {path.stem: path.read_text(encoding='utf-8')
                for path in (package / 'training' / 'recipes').glob('*.yaml')},
}))
"""


def run(*command, cwd=None):
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def package_files():
    """Files of the package, relative to the root, without Python's caches."""
    return {str(path.relative_to(ROOT)) for path in PACKAGE.rglob('*')
            if path.is_file() and '__pycache__' not in path.parts}


@pytest.fixture(scope='module')
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sdist')
    run(sys.executable, '-m', 'hatchling', 'build', '-t', 'sdist', '-d', folder, cwd=ROOT)
    (archive,) = folder.glob('*.tar.gz')
    return archive


@pytest.fixture(scope='module')
def wheel(sdist, tmp_path_factory):
    """The wheel that is built from the source archive, as users of an index without a wheel would build it."""
    folder = tmp_path_factory.mktemp('wheel')
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **({'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}))
    (source,) = folder.iterdir()
    run(sys.executable, '-m', 'hatchling', 'build', '-t', 'wheel', '-d', folder, cwd=source)
    (built,) = folder.glob('*.whl')
    return built


@pytest.fixture
def environment(tmp_path):
    """Python of a new environment that sees this one's packages, but not its editable installs."""
    folder = tmp_path / 'environment'
    venv.create(folder)
    python = folder / ('Scripts' if os.name == 'nt' else 'bin') / 'python'
    (packages,) = folder.rglob('site-packages')
    (packages / 'outer.pth').write_text('\n'.join(site.getsitepackages()))
    return python


def probe(python, folder):
    """What a program in a new environment sees of the package."""
    seen = yaml.safe_load(run(python, '-c', PROBE, cwd=folder))
    manifest = load_manifest()
    assert seen['models'] == list(manifest.tags)
    assert set(seen['loaded']) == {entry.name for entry in manifest.tags.values() if entry.has_weights}
    assert seen['classes'] == {name: list(labels.names) for name, labels in manifest.label_sets.items()}
    shipped = (PACKAGE / 'training' / 'recipes').glob('*.yaml')
    recipes = {path.stem: path.read_text(encoding='utf-8') for path in shipped}
    assert seen['recipes'] == recipes
    assert {entry.recipe for entry in manifest.models.values() if entry.has_weights} <= set(recipes)
    return seen


def test_the_source_archive_is_whole(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition('/')[2] for name in archive.getnames()}
    assert package_files() <= names
    assert {'weights_manifest.json', 'README.md', 'LICENSE', 'CHANGELOG.md',
            'CITATION.cff', 'pyproject.toml'} <= names
    for folder in ('tests', 'scripts', 'scripts/experiments'):
        assert {str(path.relative_to(ROOT)) for path in (ROOT / folder).glob('*.py')} <= names


def test_the_wheel_is_whole(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if '.dist-info/' not in name}
        metadata = HeaderParser().parsestr(archive.read(
            next(name for name in archive.namelist() if name.endswith('.dist-info/METADATA'))).decode())
    assert names == package_files() | {'timm_geoprior/weights_manifest.json'}
    assert metadata['Version'] == timm_geoprior.__version__
    assert metadata['License-Expression'] == 'Apache-2.0'


def test_the_wheel_works_without_the_checkout(wheel, environment, tmp_path):
    run(sys.executable, '-m', 'pip', '--python', environment, 'install', '--no-deps', '--no-index', wheel)
    seen = probe(environment, tmp_path)
    assert Path(seen['package']).is_relative_to(environment.parent.parent)
    assert Path(seen['manifest']).parent == Path(seen['package'])
    assert timm_geoprior.__version__ in run(environment.with_name('timm-geoprior'), '--version', cwd=tmp_path)


def test_an_editable_install_reads_the_checkout(environment, tmp_path):
    run(sys.executable, '-m', 'pip', '--python', environment, 'install', '--no-deps', '--no-index',
        '--no-build-isolation', '-e', ROOT)
    seen = probe(environment, tmp_path)
    assert Path(seen['package']) == PACKAGE
    assert Path(seen['manifest']) == ROOT / 'weights_manifest.json'


def test_the_version_is_one():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))
    assert citation['version'] == timm_geoprior.__version__
