"""Model cards and tables agree with the manifest."""
import json
import re
from dataclasses import replace

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import get_session
from PIL import Image
from timm.models import save_for_hf

from releases import NANO, using_manifest, with_entry
from timm_geoprior.pretrained.cfgs import hub_config
from timm_geoprior.pretrained.manifest import Baseline, ManifestError, load_manifest, manifest_path
from timm_geoprior.release.cards import (
    BEGIN,
    END,
    converted_table,
    main,
    model_card,
    models_table,
    readme_tables,
    runs_table,
    update_readme,
)
from timm_geoprior.release.staging import read_staged

ROOT = manifest_path().parent


@pytest.fixture
def entry(staged):
    """A staged entry with figures and a baseline."""
    entry = read_staged(staged, load_manifest())
    plain = replace(entry.metrics[0], top1_correct=5300, top5_correct=7600)
    return replace(entry, baseline=Baseline('resnet14', 1_180_000, plain), base_model='owner/other')


def tables():
    return f'{BEGIN}\n{readme_tables(load_manifest())}\n{END}'


def test_readme_has_the_manifests_tables():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    written = text[text.index(BEGIN):text.index(END) + len(END)].splitlines()
    assert tables().splitlines() == written, 'update them: python -m timm_geoprior.release.cards'


def test_table(entry):
    rows = models_table(with_entry(replace(entry, status='bundled'))).splitlines()
    assert len(rows) == 2 + len(load_manifest().models) + 3  # converted tags that are defaults
    assert {row.count('|') for row in rows} == {10}
    (row,) = (row for row in rows if NANO in row)
    assert [cell.strip() for cell in row.strip('|').split('|')] == [
        f'`{NANO}`', 'bundled', 'Tiny-ImageNet-200', '64 px', f'{entry.parameters:,}', '54.32%', '76.54%',
        'same recipe: 53.00% (1,180,000 parameters)', '2.2 MB']


def test_tables_of_converted_tags():
    (row,) = (row for row in models_table(load_manifest()).splitlines() if 'geoprior_resnet50.from_a1_in1k' in row)
    assert [cell.strip() for cell in row.strip('|').split('|')] == [
        '`geoprior_resnet50.from_a1_in1k`', 'converted', 'ImageNet-1k', '224 px', '24,541,237', 'not measured', '',
        '`resnet50.a1_in1k`: 80.38%, published by timm', '']
    rows = {row.split('`')[1]: [cell.strip() for cell in row.strip('|').split('|')][1:]
            for row in converted_table(load_manifest()).splitlines()[2:]}
    assert len(rows) == sum(entry.status == 'converted' for entry in load_manifest().tags.values())
    assert rows['geoprior_resnet50.from_a3_in1k'] == ['apache-2.0', '160 px', '0.95', '75.99%', 'not measured']
    assert rows['geoprior_resnet50.from_fb_ssl_yfcc100m_ft_in1k'][0] == 'cc-by-nc-4.0'
    assert rows['geoprior_resnet50.from_bamboo'] == ['none stated', '224 px', '1', '', 'no classifier']


def test_table_of_runs(entry):
    rows = runs_table(with_entry(entry)).splitlines()
    assert {row.count('|') for row in rows} == {6}
    assert [cell.strip() for cell in rows[2].strip('|').split('|')] == [
        f'`{NANO}`', '`python scripts/train.py r64_tin200 --data-dir DIR --output OUT --seed 3`',
        f'`{entry.recipe_commit[:7]}`', '2.0 h, 2 epochs', f'a CPU, torch {torch.__version__}']
    assert len(runs_table(load_manifest()).splitlines()) == 2 + sum(
        bool(model.train_log) for model in load_manifest().models.values())


def test_readme_is_written_between_its_markers(tmp_path):
    readme, path = tmp_path / 'README.md', tmp_path / 'weights_manifest.json'
    path.write_text(load_manifest().to_json(), encoding='utf-8')
    readme.write_text(f'# Title\n\n{BEGIN}\nold\n{END}\n\nthe rest\n', encoding='utf-8')
    assert update_readme(readme, load_manifest())
    assert readme.read_text(encoding='utf-8') == f'# Title\n\n{tables()}\n\nthe rest\n'
    assert not update_readme(readme, load_manifest())
    readme.write_text('# Title\n', encoding='utf-8')
    with using_manifest(path):
        with pytest.raises(ManifestError, match='must have the lines <!-- models:begin -->'):
            main()
    assert readme.read_text(encoding='utf-8') == '# Title\n'


def test_config_is_what_timm_would_save(tmp_path):
    entry = load_manifest().get(NANO)
    save_for_hf(timm.create_model(NANO), tmp_path, safe_serialization=True)
    timms = json.loads((tmp_path / 'config.json').read_text(encoding='utf-8'))
    ours = json.loads(json.dumps(hub_config(entry)))
    for key in ('architecture', 'num_classes'):
        assert ours[key] == timms[key]
    for key in ('tag', 'input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std', 'num_classes',
                'pool_size', 'first_conv', 'classifier', 'license', 'custom_load'):
        assert ours['pretrained_cfg'][key] == timms['pretrained_cfg'][key], key
    assert ours['label_names'] == list(load_manifest().label_sets[entry.label_set].names)
    # timm and transformers recognize ImageNet's labels by their number
    assert 'label_names' not in hub_config(load_manifest().get('geoprior_resnet101.paper_in1k'))


def test_front_matter(staged, entry):
    card = ModelCard.load(staged / 'README.md')
    data = card.data.to_dict()
    assert data.items() >= {
        'license': 'apache-2.0', 'library_name': 'timm', 'pipeline_tag': 'image-classification',
        'datasets': ['zh-plus/tiny-imagenet']}.items()
    assert {'timm', 'image-classification', 'geoprior'} <= set(data['tags'])
    name, results = model_index_to_eval_results(data['model-index'])
    assert name == NANO
    assert [(r.metric_name, r.metric_value, r.dataset_split) for r in results] == [
        ('Top-1 accuracy', 54.32, 'validation'), ('Top-5 accuracy', 76.54, 'validation')]
    assert 'base_model' not in data
    assert model_card(entry, load_manifest()).data.base_model == 'owner/other'
    assert ModelCard(str(card)).data.to_dict() == data


def test_card_passes_the_hubs_validation(hub, staged):
    card = ModelCard.load(staged / 'README.md')
    for license, status in (('apache-2.0', 200), ('my own', 400)):
        card.data.license = license
        answer = get_session().post(f'{hub.url}/api/validate-yaml', json={'content': str(card), 'repoType': 'model'})
        assert answer.status_code == status


def test_card_text(entry, staged):
    recipe = yaml.safe_dump({'name': 'r64_tin200', 'lr': 0.5})
    text = model_card(entry, load_manifest(), recipe).text
    assert re.findall(r'^## (.*)$', text, flags=re.MULTILINE) == [
        'Use', 'Figures', 'Training', 'How far each layer looks', 'What is reconstructed', 'Intended use and limits',
        'Citation']
    assert '54.32% (5,432)' in text
    assert 'The plain `resnet14`, trained by the same recipe, reaches' in text
    assert 'It has 1,180,000 parameters, this model ' in text
    assert '2 epochs in 2.0 h on a CPU' in text
    assert f'python scripts/validate.py --check --data-dir DIR \\\n    --model {NANO} --precision float32\n' in text
    assert 'non-commercial' in text
    assert recipe in text
    assert not {'train_log.csv', 'curves.png'} & set(re.findall(r'[\w.]+', text))
    text = (staged / 'README.md').read_text(encoding='utf-8')
    assert 'The log of every epoch is `train_log.csv`.' in text
    assert (images := re.findall(r'!\[.*?\]\((.*?)\)', text)) == ['curves.png', 'radii.png']
    for image in images:
        with Image.open(staged / image) as plot:
            assert min(plot.size) > 300
    planned = model_card(load_manifest().get('geoprior_resnet101.paper_in1k'), load_manifest())
    assert 'Figures' not in planned.text
    assert 'model-index' not in planned.data.to_dict()


def test_the_cards_five_lines_run(staged, entry, monkeypatch, tmp_path):
    (code,) = re.findall(r'```python\n(.*?)```', model_card(entry, load_manifest()).text, flags=re.DOTALL)
    assert len(code.splitlines()) == 5
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (80, 60), 'orange').save('image.jpg')
    names = {}
    exec(code.replace(f"'{NANO}'", f"'local-dir:{staged}'"), names)
    assert names['probabilities'].shape == (1, 200)
