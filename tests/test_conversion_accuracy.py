"""scripts/experiments/conversion_accuracy.py: conversions and their control, compared with the source."""
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

import conversion_accuracy as script


def test_what_is_not_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [
        'conversion_accuracy.py', 'missing', '--images', str(tmp_path), '--data-dir', str(tmp_path), '--output', 'out'])
    with pytest.raises(SystemExit, match='^conversion_accuracy.py: The model missing cannot be created'):
        script.main()


def test_other_classes_are_refused_before_any_work(checkpoint, photo_folder, tmp_path, monkeypatch):
    (tmp_path / 'val' / 'another').mkdir(parents=True)
    shutil.copy(next((photo_folder / 'val').rglob('*.*')), tmp_path / 'val' / 'another')
    monkeypatch.setattr(sys, 'argv', [
        'conversion_accuracy.py', str(checkpoint), '--images', str(photo_folder / 'train'), '--data-dir', str(tmp_path),
        '--output', str(tmp_path / 'out')])
    with pytest.raises(SystemExit, match=f'The classes of {tmp_path} must be those of .*, got none of them'):
        script.main()
    assert not (tmp_path / 'out').exists()


def test_conversions_stand_beside_their_control(checkpoint, photo_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [
        'conversion_accuracy.py', str(checkpoint), '--images', str(photo_folder / 'train'), '--data-dir',
        str(photo_folder), '--limit', '20', '--output', str(tmp_path / 'out')])
    script.main()
    rows = json.loads((tmp_path / 'out' / 'conversion.json').read_text())['rows']
    assert [(row['network'], row['fitted_to']) for row in rows] == [
        ('source', None), ('converted', 0), ('converted', 20), ('channels left out', 0), ('channels left out', 20)]
    assert {row['labelled'] for row in rows} == {20}
    assert rows[0]['agree'] == 20
    assert all(row['feature_error'] > 0 for row in rows[1:])
    assert rows[2]['feature_error'] < rows[4]['feature_error']
    assert (tmp_path / 'out' / 'conversion.md').read_text() in capsys.readouterr().out
    values = {kind: load_file(tmp_path / 'out' / f'{kind}_20' / 'model.safetensors')['layer3.0.conv2.attn.value.weight']
              for kind in ('converted', 'left_out')}
    assert values['converted'].any()
    assert torch.equal(values['left_out'], torch.zeros_like(values['left_out']))
