"""The device of a process."""
import pytest
import torch

from timm_geoprior import distributed


def test_nothing_is_allocated_before_the_process_has_its_own_gpu(monkeypatch):
    """Otherwise each process on a machine would use some of GPU 0's memory."""
    calls = []
    allocate = torch.empty

    def join(place):
        calls.append('join')
        place.rank, place.world_size = 1, 2
        return torch.device('cpu')

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(distributed, 'init_distributed_device', join)
    monkeypatch.setattr(torch, 'empty', lambda *shape, device: [calls.append(str(device)), allocate(*shape)][1])
    assert distributed.find_device('cuda') == (torch.device('cpu'), 1, 2)
    assert calls == ['join', 'cpu']


@pytest.mark.parametrize('name', ['gpu', 'cpu:x', ''])
def test_a_typo_is_found_before_the_processes_meet(name, monkeypatch):
    monkeypatch.setattr(distributed, 'init_distributed_device', lambda place: pytest.fail('waits for others'))
    with pytest.raises(RuntimeError, match='cannot be used'):
        distributed.find_device(name)
