"""What produced a result: code, versions, hardware."""
import functools
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from . import __version__

PACKAGES = ('timm', 'torch', 'torchvision', 'numpy', 'pillow')


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python, this package, and others; by default those that determine results."""
    return {'python': platform.python_version(), 'timm_geoprior': __version__,
            **{package: _version(package) for package in packages}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return 'not installed'


@functools.cache  # cached, since the checkout may change while the process runs
def git_commit() -> str | None:
    """Commit of the checkout that contains this code, with '-dirty' if tracked files have changed; None outside one."""
    here = Path(__file__)
    try:
        for command in (['ls-files', '--error-unmatch', here.name],  # site-packages may lie in another checkout
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
