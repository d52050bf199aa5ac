"""Where a figure comes from: code, versions, hardware."""
import functools
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from . import __version__

__all__ = ['git_commit', 'hardware', 'versions']

PACKAGES = ('timm', 'torch', 'torchvision', 'numpy', 'pillow')


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {'python': platform.python_version(), 'timm_geoprior': __version__,
            **{package: metadata.version(package) for package in PACKAGES}}


@functools.cache  # of a process' first question: later the checkout may be another than what runs
def git_commit() -> str | None:
    """Commit of the checkout that this code lies in, '-dirty' where tracked files are changed; None outside of one."""
    here = Path(__file__)
    try:
        for command in (['ls-files', '--error-unmatch', here.name],  # an environment may lie in another checkout
                        ['describe', '--always', '--abbrev=40', '--dirty', '--exclude=*']):
            done = subprocess.run(['git', *command], cwd=here.parent, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def hardware(device: torch.device) -> str:
    """The accelerator's name, or the kind of CPU and its number of threads."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    if device.type != 'cpu':
        return device.type
    threads = torch.get_num_threads()
    return (f'{platform.machine()} CPU, {threads} thread{"s" if threads > 1 else ""}, '
            f'{torch.backends.cpu.get_cpu_capability()}')
