"""Where and how a recipe is run."""
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..progress import tell_on_stderr

__all__ = ['RunConfig', 'resuming_command']


def resuming_command() -> str:
    """This process's command line with `--resume`."""
    program = Path(sys.argv[0])
    words = ['python', sys.argv[0]] if program.suffix == '.py' else [program.name]
    if program.name == '__main__.py':
        words = ['python', '-m', program.parent.name]
    arguments = [word for word in sys.argv[1:] if word != '--resume']
    return shlex.join([*words, *arguments, '--resume'])


@dataclass(frozen=True)
class RunConfig:
    """Where and how a recipe is run; nothing in here changes what is learned, but for the seed.

    Attributes:
        data_dir: Folder with a folder for each split, and in those one folder of images for each class.
        output: Folder of the run.
        train_split: Folder of the training images; '' where the class folders lie in `data_dir` itself.
        val_split: Split that is measured after each epoch where the recipe holds nothing out; '' for none.
        holdout_share: Share of each class's training images that is held out where the recipe names no number.
        seed: Of weights, order and augmentation.
        device: A device of torch.
        workers: Processes that decode, for each process that trains.
        finetune: '' for random weights, 'pretrained' for those of the model's tag, or a checkpoint's path.
        resume: Go on with the run in `output`.
        save_every: Updates between two checkpoints within an epoch.
        max_corrupt: Unreadable images that are skipped; at one more the run stops.
        command: The command that resumes the run, for the message of an interruption.
        tell: Called with each sentence that a person should read.
    """
    data_dir: Path
    output: Path
    train_split: str = 'train'
    val_split: str = ''
    holdout_share: float = 0.0
    seed: int = 0
    device: str = 'cpu'
    workers: int = 2
    finetune: str = ''
    resume: bool = False
    save_every: int = 200
    max_corrupt: int = 10
    command: str = ''
    tell: Callable[[str], None] = tell_on_stderr
