"""Where and how a recipe is run."""
from dataclasses import dataclass
from pathlib import Path

__all__ = ['RunConfig']


@dataclass(frozen=True)
class RunConfig:
    """Where and how a recipe is run; nothing in here changes what is learned, but for the seed."""

    data_dir: Path
    output: Path
    train_split: str = 'train'
    val_split: str = ''  # measured each epoch where the recipe holds nothing out
    holdout_share: float = 0.0  # of each class's training images, held out where the recipe says no number
    seed: int = 0
    device: str = 'cpu'
    workers: int = 2
    finetune: str = ''  # '' for random weights, 'pretrained' for the tag's, or a checkpoint's path
    resume: bool = False
    save_every: int = 200  # updates between two checkpoints in mid-epoch
    max_corrupt: int = 10
