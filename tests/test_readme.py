"""The README is correct: its code runs, and its commands exist."""
import functools
import json
import os
import re
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest
import timm
from conftest import HUB
from safetensors.torch import save

from programs import run
from timm_geoprior.cli import _MODULES, main
from timm_geoprior.inference.inputs import sample_image

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')
PAGES = {path.name: path.read_text(encoding='utf-8') for path in [ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md'))]}
BLOCKS = [(name, language, text.strip()) for name, page in PAGES.items() for language, text in
          re.findall(r'^ *```(\w+)\n(.*?)^ *```$', page, flags=re.DOTALL | re.MULTILINE)]
PYTHON = [(name, text) for name, language, text in BLOCKS if language == 'python']
SHELL = [text for name, language, text in BLOCKS if (name, language) == ('README.md', 'bash')]
COMMANDS = [command for _, language, text in BLOCKS if language == 'bash'
            for command in re.findall(r'(?:scripts/[\w/]+\.py|timm-geoprior \w+)(?:.*\\\n)*.*', text)]


@pytest.fixture(scope='module')
def source_on_hub():
    """Random weights for the source of the large model, on the tests' Hub."""
    weights = save(timm.create_model('resnet50').state_dict(), {'format': 'pt'})
    HUB.publish('timm/resnet50.a1_in1k', {'model.safetensors': weights})


@pytest.mark.parametrize(('name', 'code'), PYTHON, ids=[f'{name}-{index}' for index, (name, _) in enumerate(PYTHON)])
def test_python_runs(tmp_path, monkeypatch, source_on_hub, name, code):
    for library in ('segmentation_models_pytorch', 'transformers'):
        if re.search(rf'^(from|import) {library}', code, flags=re.MULTILINE):
            pytest.importorskip(library)
    for name in ('cats', 'dogs'):
        (tmp_path / 'photos' / name).mkdir(parents=True)
        sample_image().save(tmp_path / 'photos' / name / 'photo.jpg')
    (tmp_path / 'docs').symlink_to(ROOT / 'docs')
    monkeypatch.chdir(tmp_path)
    exec(compile(code, name, 'exec'), {})


def test_the_first_lines_print_what_is_written(capsys):
    (code, *_), (printed, *_) = (re.findall(rf'^```{language}\n(.*?)^```$', README, flags=re.DOTALL | re.MULTILINE)
                                 for language in ('python', 'text'))
    exec(compile(code, 'README.md', 'exec'), {})
    assert capsys.readouterr().out == printed


def test_the_two_lines_to_paste():
    assert SHELL[0] == "python -m pip install '.[sample]' && python -m timm_geoprior classify"
    assert SHELL[1] == "python -m pip install -e '.[test]' && python -m pytest"
    # .ci/run finds each one by these words, in the first line that has them
    assert next(line for line in README.splitlines() if 'timm_geoprior classify' in line) == SHELL[0]
    assert next(line for line in README.splitlines() if 'python -m pytest' in line) == SHELL[1]


def test_every_extra_exists():
    named = {extra for line in SHELL for extra in re.findall(r"'\.\[(\w+)\]'", line)}
    assert named == {'sample', 'test', 'train'}
    assert named <= set(metadata('timm-geoprior').get_all('Provides-Extra'))


def test_every_command_is_there(capsys):
    """The table's commands and options match `--help` in both directions."""
    rows = [line for line in README.splitlines() if line.startswith('| `timm-geoprior ')]
    with pytest.raises(SystemExit):
        main(['--help'])
    commands = set(re.findall(r'^    (\w+) ', capsys.readouterr().out, flags=re.MULTILINE))
    assert commands == {re.match(r'\| `timm-geoprior (\w+)', row)[1] for row in rows}
    for row in rows:
        if re.match(r'\| `timm-geoprior (\w+)', row)[1] in _MODULES:  # described on a page of its own
            continue
        with pytest.raises(SystemExit):
            main([row.split()[2].strip('`'), '--help'])
        described = capsys.readouterr().out
        assert set(re.findall(r'--[\w-]+', described)) - {'--help'} == set(re.findall(r'--[\w-]+', row)), row


@functools.cache
def help_of(command):
    command = ['-m', 'timm_geoprior', command[14:]] if command.startswith('timm-geoprior ') else [command]
    return run([*command, '--help'], cwd=ROOT, check=True).stdout


@pytest.mark.parametrize('line', COMMANDS)
def test_commands_take_what_is_written(line):
    command, arguments = re.fullmatch(r'(timm-geoprior \w+|\S+)(.*)', line, flags=re.DOTALL).groups()
    if command != 'timm-geoprior run':  # which passes its arguments on
        assert set(re.findall(r'(?<!\S)--[\w-]+', arguments)) <= set(re.findall(r'--[\w-]+', help_of(command)))


def test_the_pages_build_without_a_warning(tmp_path):
    pytest.importorskip('mkdocs')
    pytest.importorskip('material')
    pytest.importorskip('mkdocstrings')
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--quiet', '--site-dir', str(tmp_path)]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'})
    assert built.returncode == 0, built.stderr
    assert 'For a first publication you need' in (tmp_path / 'publishing' / 'index.html').read_text()
    assert 'log_radius' in (tmp_path / 'api' / 'index.html').read_text()


@pytest.mark.parametrize('path', re.findall(r'\]\((?!http)([^)]+)\)', README))
def test_every_link_leads_somewhere(path):
    assert (ROOT / path).is_file()


IMPORTS = """
import json, sys, timm
before = set(sys.modules)
import timm_geoprior
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_importing_the_plugin_imports_little():
    """Besides timm, only this package's model files: no command line, training, evaluation or publishing."""
    imported = subprocess.run([sys.executable, '-c', IMPORTS], capture_output=True, text=True, check=True).stdout
    others = [name for name in json.loads(imported) if name.split('.')[0] not in sys.stdlib_module_names]
    assert others == [
        'timm_geoprior', 'timm_geoprior.conversion', 'timm_geoprior.conversion.closed_form',
        'timm_geoprior.conversion.state_dict', 'timm_geoprior.errors', 'timm_geoprior.files',
        'timm_geoprior.geoprior_resnet', 'timm_geoprior.layers', 'timm_geoprior.pretrained',
        'timm_geoprior.pretrained.cfgs', 'timm_geoprior.pretrained.download', 'timm_geoprior.pretrained.loading',
        'timm_geoprior.pretrained.manifest', 'timm_geoprior.registration']
