"""Fine-tuning on a folder of images: this package's training, with what a user needs before and after it.

Before: the folder is checked, images are held out if it has no split for that, and sizes are chosen. After: a folder
that `timm.create_model('local-dir:...')` loads, its accuracy when loaded from there, and a confusion matrix.
"""
import functools
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from timm.models import save_for_hf

from ..data.batches import FolderLoader
from ..data.dataset import DataSplit, open_split
from ..data.listing import SPLITS, folders_of_split
from ..data.preflight import check_data
from ..data.reading import EXTENSIONS, LITTER
from ..errors import EvaluationError, GeoPriorError
from ..evaluation.evaluate import EvalConfig, evaluate, plan
from ..evaluation.metrics import Predictions, confused_pairs, wilson_interval
from ..evaluation.models import load_model
from ..files import drawable, first_line, first_sentence, save_figure, write_atomically, write_json
from ..progress import command_line, tell
from .checkpoint import read_weights
from .engine import Trainer
from .loaders import model_cfg
from .parts import build_model, check_recipe
from .recipe import Recipe, RunConfig, load_recipe

HELD_OUT_SHARE = 0.2
# what the recipe's learning rate was tuned for
RATED_BATCH, RATED_PARAMETERS = 64, 1.1e6
WEIGHTS, CONFIG = 'model.safetensors', 'config.json'


@dataclass(frozen=True)
class Splits:
    """Folders of the splits, inside the folder of the data set."""
    train: str = ''  # images to train on; '' if the class folders are in the data set's own folder
    val: str = ''  # images to choose the epoch by; '' for a share of the training images
    measured: str = ''  # images for the final evaluation; '' for those that the epoch is chosen by


@dataclass(frozen=True)
class FinetuneJob(RunConfig):
    """What to fine-tune, and where; the splits are found in `data_dir`."""
    model: str = ''  # any model of timm: a tag, or `local-dir:` and a folder
    overrides: tuple[str, ...] = ()  # 'key=value' strings for the recipe
    patience: int = 5  # epochs without improvement after which training stops
    finetune: str = 'pretrained'  # '' starts from random weights, for a comparison
    tell: Callable[[str], None] = tell


def finetune(job: FinetuneJob) -> dict[str, Any]:
    """Train, choose the best epoch, and write a folder that timm loads.

    Returns:
        The run's results, as in results.json, with the evaluation of the finished folder under 'measured'.

    Raises:
        GeoPriorError: The folder has too few classes or images, the model cannot be loaded, the output cannot be
            used, or the training fails.
        SystemExit: On SIGTERM or Ctrl-C, once a checkpoint is saved.
    """
    # each message once: the check reports faulty images, and so does reading them
    job = replace(job, tell=functools.cache(job.tell), command=command_line(resume=True))
    splits = find_splits(job.data_dir)
    for name in unused_folders(job.data_dir, splits):
        job.tell(f'{job.data_dir / name} is not used: it is not a split, or has no class folders.')
    _check_places(job)
    recipe = _recipe(job, splits)
    if not job.resume:
        _check_model(job, recipe.model)
    _check_images(job, splits)
    trainer = Trainer(recipe, replace(
        job, train_split=splits.train, val_split=splits.val, holdout_share=0.0 if splits.val else HELD_OUT_SHARE))
    if isinstance(trainer.data.train, FolderLoader):
        trainer.data.train.rotations_told = True  # by the check of the images
    results = trainer.fit(lambda history: _should_stop(job, history))
    try:
        export(trainer, job.output)
        results['measured'] = _measure(job, splits, trainer)
    except KeyboardInterrupt:
        job.tell(f'Training is finished, but its evaluation is not. Resume with: {job.command}')
        raise
    write_json(job.output / 'results.json', results)
    _tell_disk_use(job)
    return results


# -- before ------------------------------------------------------------------------------------------------------------

def find_splits(folder: Path) -> Splits:
    """Find the splits in a data set's folder: `train` and the like are splits if they have class folders."""
    if not folder.is_dir():
        raise GeoPriorError(f'{folder} must be a folder with one folder of images for each class. Check its name.')
    train, val, test = (next((name for name in folders_of_split(folder, split) if _folders(folder / name)), '')
                        for split in SPLITS)
    if train:
        return Splits(train, val, test)
    meant = [name for split in SPLITS for name in folders_of_split(folder, split)]
    if sum(bool(folders_of_split(folder, split)) for split in SPLITS) > 1:
        raise GeoPriorError(f'The splits {", ".join(sorted(meant))} of {folder} must have one folder of images for '
                            f'each class, got none. Sort the images into class folders.')
    return Splits()


def unused_folders(folder: Path, splits: Splits) -> list[str]:
    """Names of the folders beside the splits that are not used."""
    used = (splits.train, splits.val, splits.measured)
    return [name for name in _folders(folder) if splits.train and name not in used]


def _folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, without hidden ones and those that systems and programs leave behind."""
    return sorted(item.name for item in folder.iterdir()
                  if item.is_dir() and not item.name.startswith('.') and not LITTER.fullmatch(item.name))


def _check_places(job: FinetuneJob) -> None:
    if job.patience < 1:
        raise GeoPriorError(f'--patience must be 1 or more, got {job.patience}.')
    if job.workers < 0:  # here, since the check of the images uses workers too
        raise GeoPriorError(f'--workers must be 0 or more, got {job.workers}.')
    output, data = job.output.resolve(), job.data_dir.resolve()
    if output == data or data in output.parents:
        raise GeoPriorError(f'The output must lie outside the folder of the images, since its plots would be read as '
                            f'one more class, got {job.output}. Name another folder with --output.')
    if output.exists() and not output.is_dir():
        raise GeoPriorError(f'The output must be a folder, or a new one, got the file {job.output}. Name another with '
                            f'--output.')
    # the Trainer refuses a folder with a run, and says how to resume it
    held = [name for name in (WEIGHTS, CONFIG) if (output / name).exists()]
    if held and not job.resume and not (output / 'last.pt').exists():
        raise GeoPriorError(f'The output must be a new folder, got {job.output}, which has another {held[0]}. Name '
                            f'another with --output.')


def _recipe(job: FinetuneJob, splits: Splits) -> Recipe:
    """The recipe `finetune` at the model's own size, with batch size and learning rate for these images and model."""
    own = [f'model={json.dumps(job.model)}']
    chosen = {override.partition('=')[0] for override in job.overrides}
    if 'model' in chosen:  # the size below is that of --model
        raise GeoPriorError('The model must be named with --model, got it with --set. Use --model.')
    if 'img_size' not in chosen:
        own.append(f'img_size={_cfg(job.model).get("input_size", (3, 224, 224))[-1]}')
    recipe = load_recipe('finetune', own + list(job.overrides))
    if 'batch_size' not in chosen:
        images = len(_open(job, splits.train).labels)
        batch_size = recipe.batch_size
        while batch_size > 2 and 5 * batch_size > images:
            batch_size //= 2  # so that an epoch has a few steps, even without the held-out images
        recipe = replace(recipe, batch_size=batch_size)
    if 'lr' not in chosen:
        check_recipe(recipe)
        with torch.device('meta'):
            parameters = sum(parameter.numel() for parameter in build_model(recipe, 2).parameters())
        recipe = replace(recipe, lr=recipe.lr * lr_factor(recipe.batch_size, parameters))
        job.tell(f'Batches of {recipe.batch_size} images, learning rate {recipe.lr:.1e}.')
    return recipe


def lr_factor(batch_size: int, parameters: int) -> float:
    """Factor for the learning rate of an optimizer like Adam, with smaller batches or larger networks; at most 1.

    It is proportional to the square root of the batch size (Malladi et al., 2022, arXiv 2205.10287), and inversely to
    the network's width (Yang et al., 2022, arXiv 2203.03466); the number of parameters grows with the width's square.
    """
    return min(1, math.sqrt(batch_size / RATED_BATCH)) * min(1, math.sqrt(RATED_PARAMETERS / parameters))


def _cfg(model: str) -> dict[str, Any]:
    try:
        return model_cfg(model)
    except Exception as error:  # timm, json and the Hub's client raise half a dozen types
        raise GeoPriorError(f'{model} cannot be loaded ({first_line(error)}). Name a model of timm, or `local-dir:` '
                            f'and a folder with config.json and model.safetensors.') from error


def _check_model(job: FinetuneJob, model: str) -> None:
    cfg = _cfg(model)
    sources = ('file', 'url', 'hf_hub_id', 'state_dict')
    if job.finetune and timm.is_model(model.split('.')[0]) and not any(cfg.get(key) for key in sources):
        raise GeoPriorError(f'The model must have trained weights to start from, got {model}, which has none. Choose '
                            f'another (`timm-geoprior list`), or start from random ones with --from-scratch.')


def _open(job: FinetuneJob, split: str) -> DataSplit:
    place = job.data_dir / split
    try:
        data = open_split(job.data_dir, split=split)
    except EvaluationError as error:  # without its advice, which is meant for validate
        raise GeoPriorError(f'{place} must have one folder for each class, with images that end in '
                            f'{", ".join(EXTENSIONS)} ({first_sentence(error)}). Sort them into folders, or '
                            f'convert them.') from error
    return data


def _check_images(job: FinetuneJob, splits: Splits) -> None:
    """Refuse splits with unknown classes, too few images or, unless a run is resumed, images that cannot be read."""
    known: set[str] = set()
    for split in dict.fromkeys((splits.train, splits.val, splits.measured)):
        if split or split == splits.train:
            data = _open(job, split)
            trained_on = split == splits.train
            _check_classes(data, job.data_dir / split, trained_on, held_out=trained_on and not splits.val)
            known = known or set(data.classes)
            if others := [name for name in data.classes if name not in known]:
                raise GeoPriorError(f'The class folders of {job.data_dir / split} must be among those of '
                                    f'{job.data_dir / splits.train}, got also {", ".join(others[:3])}. Rename or '
                                    f'remove them.')
            if not job.resume:
                if split:
                    job.tell(f'{split}:')
                check_data(data, job.workers, job.tell)


def _check_classes(data: DataSplit, place: Path, trained_on: bool, held_out: bool) -> None:
    if trained_on and len(data.classes) < 2:
        raise GeoPriorError(f'{place} must have at least two folders of images, one for each class, got one, '
                            f'{data.classes[0]}. Add another class.')
    per_class = np.bincount(data.labels, minlength=len(data.classes))
    hidden = [name for name in data.classes if name.startswith('.')]
    if hidden:
        raise GeoPriorError(f'{place} must not have images in hidden folders, got some in {hidden[0]}. Remove it.')
    few = [name for name, count in zip(data.classes, per_class, strict=True) if count < 2]
    if held_out and few:
        raise GeoPriorError(f'Each class in {place} must have at least two images, one to train on and one to hold '
                            f'out, got one of {", ".join(few[:3])}. Add some, or a folder val beside train.')


# -- in between --------------------------------------------------------------------------------------------------------

def _should_stop(job: FinetuneJob, history: Sequence[dict[str, Any]]) -> bool:
    scores = [past.get('ema_top1', past['top1']) for past in history]
    best = int(np.argmax(scores))  # the first of equal ones, as for best.pt
    stop = len(scores) - 1 - best >= job.patience
    if stop:
        epochs = f'{job.patience} epochs' if job.patience > 1 else 'one epoch'
        job.tell(f'Training stops: no improvement for {epochs} after epoch {best + 1}.')
    return stop


# -- after -------------------------------------------------------------------------------------------------------------

def export(trainer: Trainer, folder: Path) -> None:
    """Write the best epoch's weights and config.json, so that `local-dir:` can load the run's folder.

    best.pt, which holds the same weights, is deleted. A run that is resumed after this has none: nothing is left to do.
    """
    best = trainer.config.output / 'best.pt'
    if not best.exists() and (folder / WEIGHTS).exists():
        return
    saved = read_weights(best)
    names = saved.class_names
    recipe = trainer.recipe
    model: Any = build_model(recipe, len(names))
    model.load_state_dict(saved.state_dict)
    size = recipe.measured_size
    cfg = {key: value for key, value in model.pretrained_cfg.items()
           if key not in ('label_names', 'label_descriptions', 'tag') and not key.startswith('test_')}
    cfg.update(input_size=(3, size, size), num_classes=len(names), tag='finetuned')
    model.pretrained_cfg = cfg
    with tempfile.TemporaryDirectory() as made:
        save_for_hf(model, made, model_config={'label_names': list(names)}, model_args=recipe.model_kwargs or None,
                    safe_serialization=True)
        config = json.loads(Path(made, CONFIG).read_text())
        # timm 1.0.31 repeats it among the options, where transformers rejects it; it is at the top level anyway
        config.setdefault('model_args', {}).pop('num_classes', None)
        write_json(folder / CONFIG, config)
        write_atomically(folder / WEIGHTS, Path(made, WEIGHTS).read_bytes())
    best.unlink()


def _tell_disk_use(job: FinetuneJob) -> None:
    sizes = {path: path.stat().st_size for path in job.output.rglob('*') if path.is_file()}
    job.tell(f'{job.output} takes {sum(sizes.values()) / 1e6:.1f} MB, of which {WEIGHTS} is '
             f'{sizes[job.output / WEIGHTS] / 1e6:.1f}. last.pt, with {sizes[job.output / "last.pt"] / 1e6:.1f} MB, is '
             f'needed only for --resume.')


def _measure(job: FinetuneJob, splits: Splits, trainer: Trainer) -> dict[str, Any]:
    """Evaluate the folder as timm loads it, and plot its confusion matrix."""
    split = splits.measured or splits.val or splits.train
    data = _open(job, split)
    loaded = load_model(f'local-dir:{job.output}')
    settings = EvalConfig(device=torch.device(job.device), batch_size=64, workers=job.workers, tell=lambda text: None)
    todo = plan(data, loaded, settings)
    held_out = not splits.measured and not splits.val
    if held_out:
        held = trainer.data.held_indices.numpy()
        todo = replace(todo, indices=todo.indices[held], targets=todo.targets[held])
    outcome = evaluate(data, loaded, todo, settings).outcome
    predictions = outcome.predictions['float32']
    counts = outcome.counts['float32']
    if not counts.num_images:
        raise GeoPriorError(f'{job.data_dir / split} must have images that can be read, got none. Repair them, and '
                            f'resume with: {job.command}')
    plot_confusion(predictions, loaded.wnids, job.output / 'confusion.png')
    return {
        'split': 'held out of training' if held_out else split, 'num_images': counts.num_images,
        'top1_correct': counts.top1_correct, 'top1': 100 * counts.top1_correct / counts.num_images,
        'top1_interval': [100 * end for end in wilson_interval(counts.top1_correct, counts.num_images)],
        'confused': [{'class': row['wnid'], 'taken_for': row['predicted_wnid'], 'count': row['count']}
                     for row in confused_pairs(predictions, loaded.wnids, (), limit=5)],
    }


def plot_confusion(predictions: Predictions, names: Sequence[str], path: Path) -> None:
    """Plot a confusion matrix: the share of each class's images as colour, and their number if there is room.

    Images without finite scores have no predicted class: they are counted in the title only.
    """
    count = len(names)
    decided = predictions.correct | predictions.confused
    matrix = np.zeros((count, count), np.int64)  # rows are the true classes
    np.add.at(matrix, (predictions.target[decided], predictions.predicted[decided]), 1)
    side = float(np.clip(1.5 + 0.42 * count, 3.5, 15))
    figure = Figure(figsize=(side + 1.2, side), layout='constrained')
    axes = figure.add_subplot()
    shares = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    gamma = 1 if count <= 30 else 0.5  # with many classes, confusions of a few percent should still show
    image = axes.imshow(shares, cmap='Blues', norm=PowerNorm(gamma, 0, 100))
    size = float(np.clip(330 / count, 4.5, 10))
    if count <= 120:
        short = [name if len(name) <= 24 else f'{name[:22]}…' for name in names]
        shown = [drawable(name, str(index)) for index, name in enumerate(short)]
        axes.set_xticks(range(count), shown, rotation=90 if count > 6 or max(map(len, shown)) > 8 else 0, fontsize=size)
        axes.set_yticks(range(count), shown, fontsize=size)
    for row, column in np.argwhere(matrix) if count <= 30 else ():
        color = 'white' if shares[row, column] > 55 else 'black'
        axes.text(column, row, f'{matrix[row, column]}', ha='center', va='center', fontsize=size, color=color)
    axes.set_xlabel('predicted', fontsize=max(10, side))
    axes.set_ylabel('true', fontsize=max(10, side))
    total, right, _ = predictions.counts
    axes.set_title(f'{right:,} of {total:,} images correct, {100 * right / max(total, 1):.1f}%', fontsize=max(11, side))
    bar = figure.colorbar(image, ax=axes, shrink=0.7, pad=0.02)
    bar.set_label('% of the true class')
    bar.outline.set_visible(False)
    save_figure(path, figure)
