"""Recipes, flat YAML files with the settings of a training run; and `RunConfig`, where and how one is run."""
import contextlib
import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from ..errors import GeoPriorError
from ..progress import tell_on_stderr

SOURCE = 'source'
ADVICE = 'Change it in the recipe, or with --set KEY=VALUE.'


@dataclass(frozen=True)
class Recipe:
    """One training run. Names and meanings are those of timm's train.py unless noted."""

    name: str
    model: str
    epochs: int
    batch_size: int  # images per update, over all processes and accumulation steps
    lr: float  # peak, for this batch size
    img_size: int  # side of the training images, pixels

    # model
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    drop: float = 0.0
    drop_path: float = 0.0
    sync_bn: bool = False
    freeze: tuple[str, ...] = ()  # modules to freeze, including the statistics of their norms
    freeze_norms: bool = False  # freeze all batch norms, including their statistics
    # timm model whose logits are distilled, with its pretrained weights; SOURCE for the network that --finetune's
    # folder was converted from
    teacher: str = ''
    teacher_path: str = ''  # checkpoint of the teacher, instead of its pretrained weights
    distill_alpha: float = 0.5  # share of the distillation loss; with 1, images need no labels
    distill_temperature: float = 1.0

    # data
    eval_size: int = 0  # side of the images in evaluation, 0 for img_size
    progressive: tuple[tuple[int, int], ...] = ()  # (first epoch, size) pairs from epoch 0 on, in place of img_size
    in_memory: bool = False  # hold the images in memory as uint8, crop and flip whole batches
    memory_size: int = 64  # side of the images held in memory, pixels
    holdout: int = 0  # training images of each class to hold out, for choosing recipes and epochs

    # augmentation
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    color_jitter: float = 0.0
    aa: str = ''  # timm's string for AutoAugment, RandAugment, AugMix or 3-Augment; 'ta_wide' for TrivialAugment
    interpolation: str = 'random'
    reprob: float = 0.0
    remode: str = 'pixel'
    aug_repeats: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_off_epoch: int = 0

    # loss
    smoothing: float = 0.0
    bce_loss: bool = False
    bce_target_thresh: float = 0.0  # soft targets above it become ones, 0 to leave them soft

    # optimizer
    opt: str = 'sgd'
    momentum: float = 0.9
    weight_decay: float = 0.0
    opt_kwargs: dict[str, Any] = field(default_factory=dict)
    radius_lr: float = 1.0  # learning rate of the radii, as a multiple of lr
    grad_accum_steps: int = 1
    clip_grad: float = 0.0

    # schedule
    sched: str = 'cosine'
    warmup_epochs: int = 0
    warmup_lr: float = 0.0
    warmup_prefix: bool = False
    min_lr: float = 0.0
    decay_epochs: float = 0.0  # length of the first cosine cycle, 0 for all epochs
    lr_cycle_mul: float = 1.0
    lr_cycle_limit: int = 1

    # averaging and engine
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    amp: bool = False
    amp_dtype: str = 'bfloat16'
    channels_last: bool = False
    torchcompile: bool = False
    max_skipped_steps: int = 10  # steps in a row with a non-finite loss after which the run stops

    def __post_init__(self) -> None:
        _require(self.name.encode(errors='ignore').decode() == self.name, 'name', self.name,
                 'text that can be written in UTF-8')
        for key in ('epochs', 'batch_size', 'img_size', 'grad_accum_steps', 'memory_size', 'max_skipped_steps',
                    'lr_cycle_limit'):
            _require(getattr(self, key) >= 1, key, getattr(self, key), 'at least 1')
        for key in ('drop', 'drop_path', 'hflip', 'reprob', 'mixup_prob', 'mixup_switch_prob', 'smoothing',
                    'distill_alpha', 'bce_target_thresh'):
            _require(0 <= getattr(self, key) <= 1, key, getattr(self, key), 'from 0 to 1')
        for key in ('weight_decay', 'radius_lr', 'clip_grad', 'min_lr', 'warmup_lr', 'warmup_epochs', 'holdout',
                    'mixup', 'cutmix', 'mixup_off_epoch', 'aug_repeats', 'eval_size', 'decay_epochs'):
            _require(getattr(self, key) >= 0, key, getattr(self, key), '0 or more')
        for key in ('lr', 'distill_temperature', 'lr_cycle_mul'):
            _require(getattr(self, key) > 0, key, getattr(self, key), 'more than 0')
        for key in ('min_lr', 'warmup_lr'):
            _require(getattr(self, key) <= self.lr, key, getattr(self, key), f'at most lr, {self.lr}')
        _require(0 < self.model_ema_decay < 1, 'model_ema_decay', self.model_ema_decay, 'between 0 and 1')
        _require(0 < self.scale[0] <= self.scale[1] <= 1, 'scale', self.scale,
                 'two shares of the area, the smaller first')
        _require(0 < self.ratio[0] <= self.ratio[1], 'ratio', self.ratio, 'two aspect ratios, the smaller first')
        for key, choices in _CHOICES.items():
            _require(getattr(self, key) in choices, key, getattr(self, key), ' or '.join(choices))
        starts = [start for start, _ in self.progressive]
        _require(starts == sorted(set(starts)) and starts[:1] in ([], [0])
                 and all(size >= 1 for _, size in self.progressive), 'progressive', self.progressive,
                 'pairs of first epoch and size, the first from epoch 0 on')
        for key in _OF_FILES if self.in_memory else ():
            _require(not getattr(self, key), key, getattr(self, key),
                     'left out with in_memory, which only crops and flips')

    def size_at(self, epoch: int) -> int:
        """Side of the training images in an epoch, in pixels."""
        size = self.img_size
        for start, pixels in self.progressive:
            if epoch >= start:
                size = pixels
        return size

    @property
    def measured_size(self) -> int:
        """Side of the images when measured, in pixels."""
        return self.eval_size or self.img_size

    @property
    def needs_labels(self) -> bool:
        """Whether the loss depends on the images' classes."""
        return not self.teacher or self.distill_alpha < 1

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain containers, every key written out."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class RunConfig:
    """Where and how a recipe is run: data, starting weights, seed, device and output.

    Attributes:
        data_dir: Folder with one folder per split, each with one folder of images per class.
        output: Folder of the run.
        train_split: Split to train on; '' if the class folders are in `data_dir` itself.
        val_split: Split to measure after each epoch if no training images are held out; '' for none.
        holdout_share: Share of each class's training images to hold out if the recipe's `holdout` is 0.
        seed: Seed of weights, order and augmentation.
        device: A device of torch.
        workers: Processes that decode images, per training process.
        finetune: '' for random weights, 'pretrained' for those of the model's tag, or the path of a checkpoint or of a
            folder of `timm-geoprior convert`.
        resume: Continue the run in `output`.
        save_every: Updates between two checkpoints within an epoch.
        max_corrupt: Number of unreadable images to skip; with one more, the run stops.
        class_names: The network's classes, in order, if they are not those of the training images' folders.
        command: The command that resumes the run, for the message when it is interrupted.
        tell: Called with each message for the user.
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
    class_names: tuple[str, ...] = ()
    command: str = ''
    tell: Callable[[str], None] = tell_on_stderr


_CHOICES = {'sched': ('cosine', 'tanh', 'poly'), 'amp_dtype': ('bfloat16', 'float16')}
_OF_FILES = ('aa', 'color_jitter', 'reprob', 'aug_repeats')  # only for images that are read from files


def _require(holds: bool, key: str, got: Any, wanted: str) -> None:
    if not holds:
        raise GeoPriorError(f'The recipe key {key!r} must be {wanted}, got {got!r}. {ADVICE}')


def _convert(key: str, value: Any, kind: Any) -> Any:
    """A YAML value as the field's type; integers and numeric strings pass as floats, lists as tuples, nothing else."""
    origin, kinds = get_origin(kind), get_args(kind)
    if origin is tuple:
        if isinstance(value, (list, tuple)):
            kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
            if len(kinds) == len(value):
                return tuple(_convert(key, item, item_kind) for item, item_kind in zip(value, kinds, strict=True))
    elif kind is float:
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            with contextlib.suppress(ValueError):
                number = float(value)  # YAML 1.1 reads 1e-4 as a string
                if math.isfinite(number):
                    return number
    elif isinstance(value, origin or kind) and not (kind is int and isinstance(value, bool)):
        return value
    name = getattr(kind, '__name__', str(kind)) if origin is None else str(kind).replace('typing.', '')
    raise GeoPriorError(f'The recipe key {key!r} must be of type {name}, got {value!r}. {ADVICE}')


def make_recipe(values: Mapping[str, Any], source: str = 'the recipe') -> Recipe:
    """Make a Recipe from plain values; for an unknown key, the message suggests the nearest valid one."""
    fields = {f.name: f for f in dataclasses.fields(Recipe)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f'did you mean {near[0]!r}?' if near else 'see timm_geoprior/training/recipe.py for all keys.'
            raise GeoPriorError(f'Unknown key {key!r} in {source}: {hint}')
    missing = [key for key, f in fields.items() if key not in values
               and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    if missing:
        raise GeoPriorError(f'{source} lacks the key {missing[0]!r}. Every recipe needs {", ".join(missing)}.')
    return Recipe(**{key: _convert(key, value, fields[key].type) for key, value in values.items()})


def recipe_names() -> list[str]:
    """Names of the bundled recipes."""
    folder = resources.files('timm_geoprior.training') / 'recipes'
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith('.yaml'))


def _parse(text: str, what: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = ' '.join(str(error).split())
        raise GeoPriorError(
            f'{what} must be YAML with keys and values ({reason}). Check brackets, colons and quotes.') from None


def load_recipe(source: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        source: Name of a bundled recipe, or path of a YAML file.
        overrides: 'key=value' strings that replace or add keys; values are YAML.

    Raises:
        GeoPriorError: There is no such recipe, the file has no mapping, or `make_recipe` refuses a key or value.
    """
    shipped = resources.files('timm_geoprior.training') / 'recipes' / f'{source}.yaml'
    path = Path(source) if Path(source).suffix in ('.yaml', '.yml') else shipped
    if not path.is_file():
        raise GeoPriorError(f'The recipe must be a YAML file or one of {", ".join(recipe_names())}, got '
                            f'{str(source)!r}. Check its name.')
    try:
        text = path.read_text(encoding='utf-8')
    except OSError as error:
        raise GeoPriorError(f'{source} cannot be read ({error.strerror}). Check its permissions.') from None
    except UnicodeDecodeError as error:
        raise GeoPriorError(f'{source} must be a YAML file in UTF-8, got other bytes ({error}).') from None
    values = _parse(text, f'Recipe {source}')
    if not isinstance(values, dict):
        raise GeoPriorError(f'Recipe {source} must hold keys and values, got a {type(values).__name__}.')
    for override in overrides or []:
        key, equals, value = override.partition('=')
        if not equals:
            raise GeoPriorError(f'An override must be key=value, got {override!r}. Write it as in --set epochs=30.')
        values[key] = _parse(value, f'The value of {override!r}')
    return make_recipe(values, f'recipe {source}')
