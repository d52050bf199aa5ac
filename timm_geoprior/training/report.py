"""What a run leaves for people: a CSV row an epoch, the recipe echoed, results as JSON."""
import csv
import io
import json
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List

import timm
import torch
import torchvision
import yaml

from .checkpoint import write_atomically
from .parts import learned_radii

if TYPE_CHECKING:
    from .engine import Trainer

__all__ = ['git_commit', 'results', 'versions', 'write_epoch', 'write_results']


def versions() -> Dict[str, str]:
    """Versions of what computes."""
    return {  # torch's is a class of its own, which a checkpoint loaded as data must not hold
        'python': platform.python_version(), 'torch': str(torch.__version__),
        'torchvision': str(torchvision.__version__), 'timm': timm.__version__}


def git_commit() -> str:
    """Commit of the checkout that this code lies in, '' outside of one; '-dirty' where tracked files are changed."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ['git', 'describe', '--always', '--abbrev=40', '--dirty', '--exclude=*'], cwd=folder, check=True,
            capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return ''
    return done.stdout.strip()


def hardware(device: torch.device) -> str:
    """The device's name, or the number of CPU threads."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{platform.machine()} CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}'


def write_epoch(history: List[Dict[str, Any]], output: Path) -> None:
    """Write summary.csv anew from the whole history, so that a resumed run has no row twice."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for row in history for key in row)))
    writer.writeheader()
    writer.writerows(history)
    write_atomically(output / 'summary.csv', lambda file: file.write(text.getvalue().encode()))


def results(trainer: 'Trainer') -> Dict[str, Any]:
    """What was run and what came of it."""
    return {
        'recipe': trainer.recipe.to_dict(), 'seed': trainer.config.seed, 'world_size': trainer.world_size,
        'epochs': trainer.epoch, 'images': len(trainer.data.train) * trainer.recipe.batch_size,
        'parameters': sum(p.numel() for p in trainer.model.parameters()),
        'last': trainer.history[-1] if trainer.history else {}, 'best': trainer.best,
        'radii': learned_radii(trainer.model), 'hours': round(trainer.seconds / 3600, 3),
        'hardware': hardware(trainer.device), 'versions': versions(), 'commit': trainer.commit,
    }


def write_results(values: Dict[str, Any], output: Path) -> None:
    """Write results.json, and recipe.yaml with every key."""
    write_atomically(output / 'results.json', lambda file: file.write(json.dumps(values, indent=2).encode()))
    recipe = json.loads(json.dumps(values['recipe']))  # tuples as lists
    write_atomically(output / 'recipe.yaml', lambda file: file.write(yaml.safe_dump(recipe, sort_keys=False).encode()))
