"""scripts/experiments/compare.py and its parts, on real photographs."""
import csv
import json
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from scipy.stats import ttest_rel

import compare as comparison
from compare import compare, differences, load_variants, paired_interval, write_comparison
from programs import run
from timm_geoprior.errors import GeoPriorError
from timm_geoprior.training.checkpoint import load_checkpoint
from timm_geoprior.training.engine import train
from timm_geoprior.training.recipe import RunConfig

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / 'scripts' / 'experiments' / 'compare.py'
TINY = {
    'epochs': 2, 'batch_size': 8, 'lr': 0.05, 'img_size': 32, 'eval_size': 32, 'progressive': [], 'warmup_epochs': 1,
    'model_kwargs': {'channels': [8, 16, 16, 16], 'value_dims': [0, 8, 8, 8], 'stem_width': 8}, 'holdout': 2,
    'torchcompile': False, 'memory_size': 32}
VARIANTS = {
    'prior': {},
    'plain': {'model_kwargs': {'value_dims': [0, 0, 0, 0]}},
    'heads': {'radius_lr': 1, 'model_kwargs': {'attn_heads': 2, 'attn_radius': 2.0}},
}


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / 'variants.yaml'
    path.write_text(yaml.safe_dump({'recipe': 'r64_tin200', 'set': TINY, 'variants': VARIANTS}, sort_keys=False))
    return path


def arguments(plan, data, output, *more):
    return [str(SCRIPT), str(plan), '--data-dir', str(data), '--output', str(output), '--device', 'cpu', '-j', '0',
            *map(str, more)]


@pytest.fixture
def script(monkeypatch):
    """Run the script in this process."""
    def run(*given):
        monkeypatch.setattr(sys, 'argv', arguments(*given))
        runpy.run_path(str(SCRIPT), run_name='__main__')

    return run


def rows_of(output):
    return list(csv.DictReader((output / 'runs.csv').open()))


# ends the process, as SIGKILL would, after the first epoch of the third run
KILLED = (
    'import os, runpy, sys\n'
    'from timm_geoprior.training import engine\n'
    'end = engine.Trainer._end_epoch\n'
    'def killed(self):\n'
    '    end(self)\n'
    "    if 'heads' in str(self.config.output): os._exit(9)\n"
    'engine.Trainer._end_epoch = killed\n'
    f'sys.argv[0] = {str(SCRIPT)!r}\n'
    'runpy.run_path(sys.argv[0], run_name="__main__")\n')


def test_killed_and_gone_on(plan, photo_folder, tmp_path, script, capsys):
    """Runs are made seed by seed; finished ones are kept and unfinished ones resumed; each equals that of train.py."""
    output = tmp_path / 'out'
    given = (plan, photo_folder, output, '--seeds', 0, 1)
    assert run(['-c', KILLED, *arguments(*given)[1:]]).returncode == 9
    assert [(row['variant'], row['seed']) for row in rows_of(output)] == [('prior', '0'), ('plain', '0')]
    first = output / 'runs' / 'prior' / '0' / 'results.json'
    before = first.stat().st_mtime_ns
    script(*given)
    assert first.stat().st_mtime_ns == before
    rows = rows_of(output)
    assert [(row['variant'], row['seed']) for row in rows] == [(name, seed) for name in VARIANTS for seed in '01']
    alone = RunConfig(photo_folder, tmp_path / 'alone', workers=0)
    recipe = load_variants(str(plan))['heads']
    last = train(recipe, alone)['last']
    row = rows[4]
    assert float(row['top1']) == pytest.approx(last['top1'])
    one, other = (load_checkpoint(folder / 'last.pt')['model'] for folder in (output / 'runs/heads/0', alone.output))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    radii = [float(value) for value in row['radius.layer2.0'].split()]
    assert radii == pytest.approx(last['radius.layer2.0.conv2.attn'], abs=1e-4)
    assert [float(value) for value in row['share.layer2.0'].split()] == pytest.approx(
        [radius / 8 for radius in radii], abs=1e-4)  # 32 px, a stem of stride 4
    assert rows[2]['radius.layer2.0'] == rows[2]['top1_x2_share'] == ''
    assert int(rows[2]['parameters']) > int(rows[0]['parameters'])
    text = (output / 'comparison.md').read_text()
    assert text in capsys.readouterr().out
    assert 'No intervals yet, with 2 of the 3 seeds that they need.' in text
    assert Image.open(output / 'comparison.png').size[0] > 1000


def test_finished_runs_are_done_once_and_must_be_the_same(plan, photo_folder, tmp_path, monkeypatch):
    decoded = []
    decode = comparison.decode_images
    monkeypatch.setattr(comparison, 'decode_images', lambda *given: decoded.append(given) or decode(*given))
    config = RunConfig(photo_folder, tmp_path / 'out', workers=0)
    recipes = load_variants(str(plan), ['epochs=1'])
    recipes.pop('heads')
    said = []
    *_, rows = compare(recipes, [3], config, said.append)
    assert len(said) == len(rows) == 2
    assert len(decoded) == 1
    assert next(compare(recipes, [3, 4], config)) == rows
    assert next(compare(recipes, [5], config)) == rows
    assert list(compare(recipes, [3], RunConfig(tmp_path / 'nowhere', config.output))) == [rows]  # nothing is read
    other = shutil.copytree(photo_folder, tmp_path / 'other')
    (other / 'train' / 'rocket' / '00.jpg').unlink()
    with pytest.raises(GeoPriorError, match='was trained on 48 other images than the 47 in .*other: check --d'):
        list(compare(recipes, [3, 4], RunConfig(other, config.output, workers=0)))
    changed = load_variants(str(plan), ['epochs=1', 'lr=0.01'])
    with pytest.raises(GeoPriorError, match=r'was trained with lr = 0.05, variant prior has 0.01: give changed'):
        next(compare(changed, [3], config))


def test_radii_are_scaled_with_the_map(plan, photo_folder, tmp_path, monkeypatch):
    """The network's radius while each accuracy is measured; it is restored afterwards."""
    seen = []
    count = comparison.count_correct

    def look(network, batches):
        batches = list(batches)
        seen.append((batches[0][0].shape[-1], network.layer2[0].conv2.attn.radius().item()))
        return count(network, batches)

    monkeypatch.setattr(comparison, 'count_correct', look)
    recipes = load_variants(str(plan), ['epochs=1'])
    *_, rows = compare({'prior': recipes['prior']}, [0], RunConfig(photo_folder, tmp_path / 'out', workers=0))
    radius = float(rows[0]['radius.layer2.0'])
    assert seen == [(24, pytest.approx(radius, rel=1e-3)), (24, pytest.approx(0.75 * radius, rel=1e-3)),
                    (32, pytest.approx(radius, rel=1e-3)),
                    (64, pytest.approx(radius, rel=1e-3)), (64, pytest.approx(2 * radius, rel=1e-3))]


def test_paired_interval():
    one, other = [31.5, 30.9, 32.2, 31.0], [30.6, 30.8, 31.1, 30.9]
    rows = [{'variant': name, 'seed': seed, 'top1': value} for name, values in (('a', one), ('b', other))
            for seed, value in enumerate(values)]
    rows.append({'variant': 'a', 'seed': 9, 'top1': 99.0})  # no partner
    found = differences(rows, 'a', 'b')
    assert found == pytest.approx([x - y for x, y in zip(one, other, strict=True)])
    mean, half = paired_interval(found)
    low, high = ttest_rel(one, other).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert str(paired_interval([0.5, 0.7])) == '+0.60'


def test_the_report(tmp_path):
    rows = [{'variant': name, 'seed': seed, 'parameters': 1000, 'eval_size': 64, 'num_images': 50, 'top1': top1 + seed,
             'top1_x0.75_cells': 20.0, 'top1_x2_cells': 20.0, 'commit': 'abc' if seed else '', 'model': 'resnet14t',
             'recipe': 'short', 'epochs': 4 + seed // 2, 'img_size': 40, 'precision': 'bfloat16', **more}
            for name, top1, more in (('base', 30.0, {}), ('wide', 31.0, {
                'top1_x0.75_cells': 20.5, 'top1_x0.75_share': 21.0, 'top1_x2_share': 18.0,
                'map.layer2.0': 16, 'radius.layer2.0': '2.0000 4.0000', 'share.layer2.0': '0.1250 0.2500'}))
            for seed in (0, 1, 2)]
    text = write_comparison(rows, tmp_path, 'python scripts/experiments/compare.py')
    assert '| wide | 1,000 | 31.00 | 32.00 | 33.00 | 32.00 | +1.00 ± 0.00 | 3 |' in text
    assert '| variant | layer2.0, map of 16 |\n| --- | ---: |\n| wide | 2.00 (0.12), 4.00 (0.25) |' in text
    assert '| base | 20.00 | base |  |  | 31.00 | 20.00 | base |  |  |' in text
    assert ('| wide | 20.50 | +0.50 ± 0.00 | 21.00 | +0.50 ± 0.00 | 32.00 '
            '| 20.00 | +0.00 ± 0.00 | 18.00 | -2.00 ± 0.00 |') in text
    assert 'No intervals' not in text
    assert 'not corrected' not in text  # for one comparison there is nothing to correct
    assert 'The runs are of 2 commits: unknown, abc.' in text
    assert 'resnet14t by the recipe short: 4 and 5 epochs, the last at 40 px, in bfloat16. Top-1 in percent' in text


def test_layers_in_their_order():
    rows = [{f'radius.layer{layer}': '1.0' for layer in ('4.0', '3.0', '3.10', '3.9')}]
    assert comparison._layers(rows) == ['layer3.0', 'layer3.9', 'layer3.10', 'layer4.0']


@pytest.mark.parametrize('name', ['nano_variants', 'nano_radius', 'resnet50_pair'])
def test_the_reports_of_the_documentation_are_their_rows(name, tmp_path):
    """Each report is what scripts/experiments/compare.py writes for the runs in the CSV file next to it."""
    def value(key, text):
        return float(text) if key.startswith('top1') else int(text) if text.isdigit() else text

    docs = ROOT / 'docs'
    with (docs / f'{name}.csv').open(newline='') as file:
        rows = [{key: value(key, text) for key, text in row.items() if text} for row in csv.DictReader(file)]
    text = (docs / f'{name}.md').read_text()
    assert write_comparison(rows, tmp_path, text.partition('\n')[0].strip('`')) == text


def test_the_variants_that_the_project_has():
    variants = load_variants(str(ROOT / 'scripts' / 'experiments' / 'nano_variants.yaml'))
    assert next(iter(variants)) == 'prior'
    assert variants['heads_4_rate_1'].model_kwargs == {'attn_radius': 1, 'attn_heads': 4}
    assert len({json.dumps(recipe.to_dict()) for recipe in variants.values()}) == len(variants)


def test_the_control_differs_from_its_network_in_the_model_alone():
    prior, control = load_variants(str(ROOT / 'scripts' / 'experiments' / 'resnet50_pair.yaml')).values()
    assert (prior.model, control.model) == ('geoprior_resnet50.r192_tin200', 'resnet50')
    assert (prior.model_kwargs, control.model_kwargs) == ({'attn_radius': 1}, {})  # a plain network has no radius
    assert replace(control, model=prior.model, model_kwargs=prior.model_kwargs) == prior


@pytest.mark.parametrize(('overrides', 'variants', 'error', 'words'), [
    ([], ['a: {}'], GeoPriorError, 'must name at least two variants, got 1'),
    ([], ['a: {}', 'b'], GeoPriorError, "--variant must hold 'NAME: {KEY: VALUE}', got 'b'"),
    ([], ['a: {', 'b: {}'], GeoPriorError, '--variant is not YAML'),
    ([], ['a: {}', 'b: 3'], GeoPriorError, 'variant b must be keys and values, got 3'),
    ([], ['a: {}', 'b/c: {lr: 1}'], GeoPriorError, "must consist of letters, digits, _, - and dots, got 'b/c'"),
    (['holdout=0'], [], GeoPriorError, 'must hold out images .*, got holdout=0 and in_memory=True'),
    ([], ['a: {}', 'b: {holdout: 5}'], GeoPriorError, 'holdout must be the same in all variants, .* got 2 and 5'),
    (['eval_size=0'], ['a: {}', 'b: {img_size: 40}'], GeoPriorError, 'eval_size must be the same .* got 32 and 40'),
    ([], ['a: {}', 'b: {radius: 5}'], GeoPriorError, "'radius' in variant b: did you mean 'radius_lr'"),
    ([], ['a: {}', 'b: {model_kwargs: {attn_heads: 3}}'], GeoPriorError, 'Variant b: .*attn_?heads|Variant b: .*3'),
])
def test_what_cannot_be_compared(plan, overrides, variants, error, words):
    with pytest.raises(error, match=words):
        load_variants(str(plan), overrides, variants)


def test_bad_input_is_one_sentence(plan, tmp_path, script):
    with pytest.raises(SystemExit, match=r'^compare.py: .*nowhere must be a folder.*$'):
        script(plan, tmp_path / 'nowhere', tmp_path / 'out')
    plan.write_text('variants: {a: {}, b: {}}')
    with pytest.raises(SystemExit, match='must have the keys recipe, set and variants, got variants'):
        script(plan, tmp_path, tmp_path / 'out')
    plan.write_text('recipe: 5\nvariants: {a: {}, b: {}}')
    with pytest.raises(SystemExit, match='must name a recipe or a YAML file as its recipe, got 5'):
        script(plan, tmp_path, tmp_path / 'out')
