"""Signals and the workers that read images: workers ignore those to the group, and end on one from the parent."""
import os
import signal
import sys

import pytest

from programs import Program

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere Python does not report who sent a signal')
SIGNALS = [signal.SIGTERM, signal.SIGINT]

READING = """
import signal, sys
import torch
from torch.utils.data import DataLoader
from timm_geoprior.data.batches import start_workers, init_worker

def stop(number, frame):
    raise SystemExit(128 + number)

class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index in (4, 6):  # one for each worker: a pipe, which waits for the test
            open(f'{sys.argv[1]}{index}').read()
        return index

signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
loader = DataLoader(Numbers(), 2, num_workers=2, collate_fn=list, worker_init_fn=init_worker, persistent_workers=True)
print(list(start_workers(loader)))
"""


@pytest.mark.parametrize('number', [*SIGNALS, None])
def test_a_signal_to_the_group_reaches_the_parent_only(number, tmp_path):
    """A loader whose workers are still there does not keep the program from ending."""
    for index in (4, 6):
        os.mkfifo(tmp_path / f'pipe{index}')
    with Program(['-c', READING, tmp_path / 'pipe'], start_new_session=True) as program:
        with open(tmp_path / 'pipe4', 'w'), open(tmp_path / 'pipe6', 'w'):  # from here on both workers read
            if number is not None:
                os.killpg(program.pid, number)
        done = program.finish()
    assert (done.returncode, done.stderr) == (0 if number is None else 128 + number, '')
    assert done.stdout == ('' if number is not None else '[[0, 1], [2, 3], [4, 5], [6, 7]]\n')


STARTING = """
import os, signal, sys
from torch.utils.data._utils import worker
from timm_geoprior.data.batches import map_in_workers

def slow(*arguments):  # a process that has not reached its first line yet
    open(sys.argv[1]).read()
    loop(*arguments)

def note(number, frame):  # a forked worker inherits this handler
    global noted
    noted = number
    os.write(2, b'noted')

loop, worker._worker_loop = worker._worker_loop, slow
signal.signal(signal.SIGTERM, note)
signal.signal(signal.SIGINT, note)
numbers = list(map_in_workers(list, range(8), 2, workers=1))
print(numbers)
sys.exit(128 + noted)
"""


@pytest.mark.parametrize('number', SIGNALS)
def test_a_signal_while_workers_start_reaches_the_parent_only(number, tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    with Program(['-c', STARTING, tmp_path / 'pipe'], start_new_session=True) as program:
        with open(tmp_path / 'pipe', 'w'):  # from here on the worker exists
            os.killpg(program.pid, number)
        done = program.finish()
    assert (done.returncode, done.stderr) == (128 + number, 'noted')
    assert done.stdout == '[[0, 1], [2, 3], [4, 5], [6, 7]]\n'
