"""scripts/experiments/gpu_report.py, rehearsed on the CPU: what it measures, and that it lists what it does not."""
import csv
import json
from pathlib import Path

import pytest

from programs import run

SCRIPT = Path(__file__).parents[1] / 'scripts' / 'experiments' / 'gpu_report.py'


@pytest.mark.parametrize('minutes', [0, 0.9])
def test_what_there_is_no_time_for_is_told(tmp_path, minutes):
    done = run([SCRIPT, '--rehearse', '--minutes', str(minutes), '--output', tmp_path / 'out'], check=True)
    report = (tmp_path / 'out' / 'report.md').read_text()
    assert report in done.stdout
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert sum(len(results[part]) for part in ('equality', 'tests', 'speed', 'not_measured')) == 10 + 1 + 1 + 5
    assert 'counts of validate.py (no --data-dir)' in results['not_measured']
    assert all(f'- {what}' in report for what in results['not_measured'])
    assert all(row['equal'] for row in results['equality'])
    assert not results['tests'] or results['tests'] == [{'passed': 4, 'skipped': 0, 'failed': 0, 'which': ''}]
    for part in ('equality', 'speed'):
        path = tmp_path / 'out' / f'{part}.csv'
        rows = list(csv.DictReader(path.open())) if path.exists() else []
        assert [row['model'] for row in rows] == [row['model'] for row in results[part]]
        assert bool(rows) or not minutes or part == 'speed'


def test_what_is_not_there_is_refused(tmp_path):
    done = run([SCRIPT, '--output', tmp_path / 'out', '--device', 'cuda:99'])
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith('gpu_report.py: device is cuda:99, this machine has')
    done = run([SCRIPT, '--output', tmp_path / 'out', '--rehearse', '--data-dir', tmp_path])
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(f'--data-dir must be a folder with val/ in it, got {tmp_path}')
    assert not (tmp_path / 'out').exists()
