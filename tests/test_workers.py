"""Signals and the processes that read images: a group's go to the parent, the parent's own end them."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, signal, sys
import torch
from torch.utils.data import DataLoader
from timm_geoprior.data.batches import init_worker

def stop(number, frame):
    raise SystemExit(128 + number)

class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index in (4, 6):  # of one worker and of the other: a pipe, which waits for the test
            open(f'{sys.argv[1]}{index}').read()
        return index

if __name__ == '__main__':
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    loader = DataLoader(Numbers(), 2, num_workers=2, collate_fn=list,
                        worker_init_fn=init_worker, persistent_workers=True)
    numbers = list(loader)
    print(numbers)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere Python does not tell who has sent a signal')
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, None])
def test_a_signal_to_the_group_reaches_the_parent_only(number, tmp_path):
    """And a loader whose workers are still there does not keep the program from ending."""
    for index in (4, 6):
        os.mkfifo(tmp_path / f'pipe{index}')
    (tmp_path / 'program.py').write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, tmp_path / 'program.py', tmp_path / 'pipe'], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True, env={**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1])})
    with open(tmp_path / 'pipe4', 'w'), open(tmp_path / 'pipe6', 'w'):  # from here on both workers read
        if number is not None:
            os.killpg(process.pid, number)
    out, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0 if number is None else 128 + number, '')
    assert out == ('' if number is not None else '[[0, 1], [2, 3], [4, 5], [6, 7]]\n')
