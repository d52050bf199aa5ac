#!/usr/bin/env python3
"""Measure what the weights of a model are worth on another data set, compared with random weights.

    python scripts/experiments/transfer.py geoprior_resnet50 --data-dir cifar10 \\
        --per-class 10 100 1000 --img-size 64 --output out
    python scripts/experiments/transfer.py geoprior_resnet50 --data-dir caltech101 --img-size 64 --output out

There are three methods, each with trained and with random weights: k nearest neighbours and a linear probe on frozen
features, and `timm-geoprior finetune`. Both networks get the same labels, the same number per class, drawn with a seed;
a smaller draw is a subset of a larger one. The test images are not used for any choice.

An interrupted run resumes with the same command; with more seeds or labels, only the new ones are measured. --output
receives transfer.md (a table), transfer.png and transfer.csv for all data sets measured into it. Of fine-tuned
networks, only the curves and results are kept.
"""
import argparse
import json
import math
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import timm_geoprior  # noqa: F401  (registers the models)
from compare import distinct, paired_interval
from timm_geoprior.data.batches import generator, init_worker, seed_everything, start_workers
from timm_geoprior.data.dataset import DataSplit, fingerprint, open_split
from timm_geoprior.data.preflight import check_data
from timm_geoprior.distributed import default_device, find_device
from timm_geoprior.errors import GeoPriorError, exit_on_error
from timm_geoprior.evaluation.models import state_dict_sha256
from timm_geoprior.files import first_line, markdown_table, save_figure, write_atomically, write_csv, write_json
from timm_geoprior.progress import command_line
from timm_geoprior.provenance import git_commit, hardware, versions
from timm_geoprior.training.checkpoint import save_checkpoint
from timm_geoprior.training.finetune import HELD_OUT_SHARE, FinetuneJob, find_splits, finetune
from timm_geoprior.training.loaders import hold_out, model_cfg
from timm_geoprior.training.recipe import load_recipe

METHODS = {'knn': 'k-NN', 'linear': 'linear probe', 'finetune': 'fine-tuned'}
STARTS = ('pretrained', 'random')
# k and temperature of the weighted vote in Wu et al., 2018 (arXiv 1805.01978), with the values that Caron et al., 2021
# (arXiv 2104.14294) found to work best
NEIGHBORS, TEMPERATURE = 20, 0.07
PENALTIES = tuple(10.0 ** power for power in range(-5, 2))
STATISTICS_IMAGES = 1024  # training images, without labels, for the batch norm statistics of a random network
BATCH_SIZE = 64  # for the frozen network
Row = dict[str, Any]


@dataclass(frozen=True)
class Transfer:
    """What to transfer, and to which data set.

    Attributes:
        data_dir: Folder with the splits `train` and `test` (or `val`), each with one folder of images per class.
        output: Folder of the rows, the features and the report; several data sets may share it.
        model: Any timm model with weights.
        per_class: Labels per class, 0 for all.
        seeds: Seeds of the drawn labels, of random weights, and of fine-tuning.
        methods: Some of `METHODS`.
        img_size: Side of the images in pixels, 0 for the model's own.
        overrides: 'key=value' strings for the recipe of fine-tuning.
        device: Device that runs the network.
        workers: Processes that decode images.
        command: Command line, stored in the rows.
        tell: Called with a sentence for each row.
    """
    data_dir: Path
    output: Path
    model: str
    per_class: tuple[int, ...] = (0,)
    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[str, ...] = tuple(METHODS)
    img_size: int = 0
    overrides: tuple[str, ...] = ()
    device: str = 'cpu'
    workers: int = 2
    command: str = ''
    tell: Callable[[str], None] = print

    @property
    def name(self) -> str:
        """The data set's name, which is that of its folder."""
        return self.data_dir.resolve().name

    @property
    def folder(self) -> Path:
        """Output folder of this data set."""
        return self.output / self.name


def transfer(job: Transfer) -> Iterator[list[Row]]:
    """Compute the missing rows, seed by seed.

    Args:
        job: What to transfer, and to which data set.

    Yields:
        The rows of all data sets in the output, at the start and after each new one.

    Raises:
        GeoPriorError: Bad images, too few of them, a model without weights, or an output with other settings.
        RuntimeError: A run failed; the message is written for the user.
        SystemExit: On SIGTERM and Ctrl-C.
    """
    cases = [(seed, per_class, method, start) for seed in job.seeds for per_class in job.per_class
             for method in job.methods for start in STARTS]
    todo = [case for case in cases if not _row_path(job, *case).exists()]
    _check_arguments(job)
    _check_settings(job, _settings(job))
    git_commit()  # cached now, since the checkout may change before the rows are written
    for seed, per_class, method, start in set(cases) - set(todo):
        if method == 'finetune':
            _remove_weights(_run_folder(job, seed, per_class, start))  # left by a kill after writing the row
    yield _rows(job.output)
    if not todo:
        return
    train, test = _open_splits(job)
    draws = {(seed, per_class): draw_labels(train, per_class, seed)
             for seed in job.seeds for per_class in job.per_class}
    trained = _network(job, 'pretrained', 0)  # a model without weights fails before anything is written
    settings = {**_settings(job), 'weights': state_dict_sha256(trained), 'train': _images(train), 'test': _images(test)}
    _check_settings(job, settings)
    for split in (train, test):
        check_data(split, job.workers, lambda text: None)
    job.folder.mkdir(parents=True, exist_ok=True)
    write_json(job.folder / 'settings.json', {**_kept_settings(job), **settings})
    for seed, per_class, method, start in todo:
        if method == 'finetune':
            row = _finetuned(job, train, draws[seed, per_class], seed, per_class, start)
        else:
            needed = [drawn for (other, _), drawn in draws.items() if other == seed or start == 'pretrained']
            row = _probed(job, (method, start, seed), draws[seed, per_class], torch.cat(needed).unique(), (train, test))
        row = {'data': job.name, 'per_class': per_class or 'all', 'labels': len(draws[seed, per_class]),
               'method': method, 'start': start, 'seed': seed, **row, 'model': job.model, 'commit': git_commit(),
               'hardware': hardware(torch.device(job.device)), 'torch': versions()['torch'], 'command': job.command}
        path = _row_path(job, seed, per_class, method, start)
        path.parent.mkdir(exist_ok=True)
        write_json(path, row)
        if method == 'finetune':
            _remove_weights(_run_folder(job, seed, per_class, start))
        job.tell(f'{job.name}, {row["per_class"]} labels per class, seed {seed}, {METHODS[method]}, {start}: '
                 f'top-1 {row["top1"]:.2f}%')
        yield _rows(job.output)


def _row_path(job: Transfer, seed: int, per_class: int, method: str, start: str) -> Path:
    return job.folder / 'rows' / f'{seed}-{per_class or "all"}-{method}-{start}.json'


def _rows(output: Path) -> list[Row]:
    return [json.loads(path.read_text()) for path in sorted(output.glob('*/rows/*.json'))]


# -- before ------------------------------------------------------------------------------------------------------------

def _check_arguments(job: Transfer) -> None:
    if job.img_size < 0:
        raise GeoPriorError(f'--img-size must be in pixels, got {job.img_size}. Name 32 or more, or leave it out.')
    if job.output.exists() and not job.output.is_dir():
        raise GeoPriorError(f'--output must be a folder, got the file {job.output}. Name another.')
    find_device(job.device)
    if 'finetune' in job.methods:
        load_recipe('finetune', list(job.overrides))  # rejects unknown keys before the probes, which take long


def _settings(job: Transfer) -> dict[str, Any]:
    """The settings that all rows of a data set share; the recipe does not affect the probes."""
    tuned = {'set': list(job.overrides)} if 'finetune' in job.methods else {}
    return {'model': job.model, 'img_size': job.img_size, **tuned}


def _images(data: DataSplit) -> dict[str, Any]:
    return fingerprint(data, np.arange(len(data.labels)))


def _kept_settings(job: Transfer) -> dict[str, Any]:
    """The settings of existing results: none without results, and no overrides without a fine-tuned network."""
    path = job.folder / 'settings.json'
    kept: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    tuned = any(job.folder.glob('rows/*-finetune-*')) or any(job.folder.glob('runs/*/last.pt'))
    if not tuned:
        kept.pop('set', None)
    return kept if tuned or any(job.folder.glob('features/*.pt')) else {}


def _check_settings(job: Transfer, settings: Mapping[str, Any]) -> None:
    """Check that the settings are those of the existing rows."""
    kept = _kept_settings(job)
    for key, value in settings.items():
        if kept.get(key, value) != value:
            was = kept[key]
            if isinstance(value, dict):
                got, expected = f'{was["files"]:,} {key} images', f'the {value["files"]:,} others of {job.data_dir}'
            elif key == 'set':
                got, expected = (f'--set {" ".join(values)}' if values else 'no --set' for values in (was, value))
            else:
                got, expected = (f'--img-size {it}' if key == 'img_size' else f'the {key} {it}' for it in (was, value))
            raise GeoPriorError(f'{job.folder} must have been made with {expected}, got {got}. Name another folder by '
                                f'--output, or leave it the same.')


def _test_split(job: Transfer) -> str:
    splits = find_splits(job.data_dir)
    test = splits.measured or splits.val
    if not (splits.train and test):
        raise GeoPriorError(f'{job.data_dir} must have class folders in train/ and in test/ or val/, got none in one '
                            f'of them. Sort the images into them.')
    return test


def _open_splits(job: Transfer) -> tuple[DataSplit, DataSplit]:
    test = _test_split(job)
    train, measured = (open_split(job.data_dir, split=split) for split in (find_splits(job.data_dir).train, test))
    if train.classes != measured.classes:
        other = sorted(set(train.classes) ^ set(measured.classes))[0]
        raise GeoPriorError(f'{job.data_dir} must have the same class folders in train and {test}, got {other} in '
                            f'one of them only. Add or remove it.')
    return train, measured


def draw_labels(data: DataSplit, per_class: int, seed: int) -> Tensor:
    """Draw labelled images of each class.

    Args:
        data: The training images.
        per_class: Images of each class, 0 for all.
        seed: Seed of the draw; with the same seed, a smaller draw is a subset of a larger one.

    Returns:
        Indices, ascending.

    Raises:
        GeoPriorError: A class has fewer images, or so few that none can be held out.
    """
    labels = torch.from_numpy(data.labels)
    drawn = []
    for index, name in enumerate(data.classes):
        members = (labels == index).nonzero().flatten()
        wanted = per_class or len(members)
        if len(members) < 2:
            raise GeoPriorError(f'The class {name} must have at least 2 training images, one to learn from and one to '
                                f'choose by, got 1. Add some, or take the class out.')
        if not 2 <= wanted <= len(members):
            raise GeoPriorError(f'--per-class must be from 2 (one to learn from, one to choose by) to the '
                                f'{len(members)} images of the class {name}, got {wanted}.')
        order = torch.randperm(len(members), generator=generator(seed, 'labels', index))
        drawn.append(members[order[:wanted]])
    return torch.cat(drawn).sort().values


# -- probes ------------------------------------------------------------------------------------------------------------

def _network(job: Transfer, start: str, seed: int) -> nn.Module:
    """The network without its classifier, with the weights of its tag or random ones."""
    seed_everything(seed, 'init')
    try:
        model: nn.Module = timm.create_model(job.model, pretrained=start == 'pretrained', num_classes=0)
    except Exception as error:  # timm, json and the Hub's client raise half a dozen exception types
        raise GeoPriorError(f'{job.model} must be a model with trained weights, got one that cannot be loaded '
                            f'({first_line(error)}). `timm-geoprior list` names some.') from error
    return model.to(device=job.device).to(memory_format=torch.channels_last).eval()


def _frozen(job: Transfer, start: str, seed: int, train: DataSplit) -> nn.Module:
    """The network whose features are probed.

    The batch norms of a random network have no statistics yet: they are computed from images. The last norm of each
    block keeps its initial zeros, so that the features are those of the stem and shortcuts: with ones they are worse.
    """
    network = _network(job, start, seed)
    if start == 'random':
        some = torch.randperm(len(train.labels), generator=generator(seed, 'statistics'))[:STATISTICS_IMAGES]
        batches = _loader(job, train, some, drop_last=len(some) > BATCH_SIZE)
        update_bn((images for images, _ in batches), network, torch.device(job.device))
    return network


def _loader(job: Transfer, data: DataSplit, wanted: Tensor, drop_last: bool = False) -> Any:
    cfg = resolve_data_config(pretrained_cfg=model_cfg(job.model))
    size = (3, job.img_size, job.img_size) if job.img_size else cfg['input_size']
    data.dataset.transform = create_transform(**{**cfg, 'input_size': size})
    images = Subset(data.dataset, wanted.tolist())
    return start_workers(DataLoader(
        images, BATCH_SIZE, num_workers=job.workers, drop_last=drop_last, worker_init_fn=init_worker))


def _features(
        job: Transfer, splits: Mapping[str, DataSplit], split: str, wanted: Tensor, start: str, seed: int) -> Tensor:
    """Pooled features of some images of a split, shape (images, features), computed once and kept in a file."""
    folder = job.folder / 'features'
    path = folder / f'{split}-{start if start == "pretrained" else f"{start}{seed}"}.pt'
    kept = torch.load(path, weights_only=True) if path.exists() else {'indices': torch.zeros(0, dtype=torch.int64)}
    if not torch.isin(wanted, kept['indices']).all():
        network = _frozen(job, start, seed, splits['train'])
        kept = {'indices': wanted, 'features': _forward(job, splits[split], wanted, network, path.stem)}
        folder.mkdir(exist_ok=True)
        save_checkpoint(kept, path)
    return kept['features'][torch.searchsorted(kept['indices'], wanted)]


@torch.inference_mode()
def _forward(job: Transfer, data: DataSplit, wanted: Tensor, network: nn.Module, what: str) -> Tensor:
    batches = tqdm(_loader(job, data, wanted), f'features, {what}', leave=False, mininterval=5)
    return torch.cat([network(images.to(job.device)).float().cpu() for images, _ in batches])


def _probed(
        job: Transfer, case: tuple[str, str, int], drawn: Tensor, needed: Tensor, splits: tuple[DataSplit, DataSplit],
) -> Row:
    """The row of a probe for a method, a start and a seed; features are computed for all `needed` images at once."""
    method, start, seed = case
    train, test = splits
    both = {'train': train, 'test': test}
    features = _features(job, both, 'train', needed, start, seed)[torch.searchsorted(needed, drawn)]
    measured = _features(job, both, 'test', torch.arange(len(test.labels)), start, seed)
    labels, truth = torch.from_numpy(train.labels)[drawn], torch.from_numpy(test.labels)
    if method == 'knn':
        answers, chosen = knn(features, labels, measured), {}
    else:
        penalty = choose_penalty(features, labels)
        probe = fit_linear(features, labels, penalty)
        answers, chosen = torch.from_numpy(probe.predict(measured.numpy())), {'penalty': penalty}
    return {'top1': 100 * (answers == truth).double().mean().item(), 'test_images': len(truth), **chosen}


def knn(features: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """Classify by the nearest features, each voting by its cosine similarity (Wu et al., 2018, arXiv 1805.01978).

    Args:
        features: Features of images whose class is known, shape (N, F).
        labels: Their classes, shape (N,).
        queries: Features to classify, shape (M, F).

    Returns:
        Classes, shape (M,).
    """
    classifier = KNeighborsClassifier(
        min(NEIGHBORS, len(features)), metric='cosine', weights=lambda distances: np.exp((1 - distances) / TEMPERATURE))
    return torch.from_numpy(classifier.fit(features.numpy(), labels.numpy()).predict(queries.numpy()))


def fit_linear(features: Tensor, labels: Tensor, penalty: float) -> Pipeline:
    """Fit a softmax regression on standardized features.

    Args:
        features: Shape (N, F).
        labels: Classes, shape (N,).
        penalty: Half of it times the sum of the squared weights is added to the mean cross entropy.

    Returns:
        The scaler and the regression.
    """
    # with two classes scikit-learn fits one weight vector, the difference of two of opposite sign
    strength = (2 if len(labels.unique()) == 2 else 1) / (penalty * len(labels))
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, tol=1e-5, max_iter=1000))
    return probe.fit(features.numpy(), labels.numpy())


def choose_penalty(features: Tensor, labels: Tensor) -> float:
    """The penalty with the lowest cross entropy on a held-out fifth of each class."""
    stay, held = hold_out(labels, HELD_OUT_SHARE)
    losses = []
    for penalty in PENALTIES:
        probe = fit_linear(features[stay], labels[stay], penalty)
        losses.append(log_loss(labels[held], probe.predict_proba(features[held].numpy()), labels=probe.classes_))
    return PENALTIES[losses.index(min(losses))]


# -- fine-tuning -------------------------------------------------------------------------------------------------------

def _finetuned(job: Transfer, train: DataSplit, drawn: Tensor, seed: int, per_class: int, start: str) -> Row:
    """The row of `finetune` on a folder of the drawn images."""
    place = _run_folder(job, seed, per_class, start)
    images = place / 'images'
    _link(job, train, drawn, images)
    # fewer labels get more epochs: labels times epochs is 30,000, within 10 to 100 epochs
    epochs = min(max(math.ceil(30_000 / len(drawn)), 10), 100)
    size = [f'img_size={job.img_size}'] if job.img_size else []
    results = finetune(FinetuneJob(
        images, place, model=job.model, finetune='' if start == 'random' else 'pretrained',
        overrides=(f'epochs={epochs}', *size, *job.overrides),
        patience=10_000, seed=seed, device=job.device, workers=job.workers, resume=(place / 'last.pt').exists(),
        tell=lambda text: None))
    measured = results['measured']
    return {'top1': measured['top1'], 'test_images': measured['num_images'], 'epochs': results['epochs'],
            'hours': results['hours']}


def _run_folder(job: Transfer, seed: int, per_class: int, start: str) -> Path:
    return job.folder / 'runs' / f'{seed}-{per_class or "all"}-{start}'


def _remove_weights(place: Path) -> None:
    """Keep only the curves and results of a run, which need not be resumed since its row is written."""
    for name in ('last.pt', 'best.pt', 'model.safetensors'):
        (place / name).unlink(missing_ok=True)
    shutil.rmtree(place / 'images', ignore_errors=True)


def _link(job: Transfer, train: DataSplit, drawn: Tensor, folder: Path) -> None:
    """Make a folder for `finetune` with links to the drawn images."""
    test = _test_split(job)
    shutil.rmtree(folder, ignore_errors=True)  # left by a killed run
    split = job.data_dir.resolve() / find_splits(job.data_dir).train
    try:
        for index in drawn.tolist():
            target = folder / 'train' / train.classes[train.labels[index]] / f'{index}{Path(train.names[index]).suffix}'
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(split / train.names[index])
        (folder / 'test').symlink_to(job.data_dir.resolve() / test, target_is_directory=True)
    except OSError as error:
        raise GeoPriorError(f'{folder} must be on a file system that has symbolic links, got {error.strerror}. Name '
                            f'another --output.') from error


# -- the report --------------------------------------------------------------------------------------------------------

def write_transfer(rows: Sequence[Row], output: Path) -> str:
    """Write transfer.csv, transfer.md and transfer.png.

    Args:
        rows: Rows of all data sets.
        output: Folder to write to.

    Returns:
        The text of transfer.md.
    """
    names = list(dict.fromkeys(row['data'] for row in rows))
    sections = ['Top-1 in percent of the test images: the mean over the seeds (least to greatest), and the mean '
                'difference, paired by seed, ± half the width of its 95% interval (Student; from three seeds on). Both '
                'networks have the same labels, recipe and epochs. A fifth of the labels is used to choose, and in '
                'fine-tuning not to train. An interval covers the variation between seeds on these test images. For '
                f'probing, the norms of a random network get the statistics of up to {STATISTICS_IMAGES:,} training '
                'images.']
    if any(row['per_class'] == 'all' for row in rows):
        sections[0] += ' With all labels nothing is drawn, so the probes of trained weights are the same for each seed.'
    for name in names:
        own = [row for row in rows if row['data'] == name]
        sections += [f'{name}, {own[0]["test_images"]:,} test images, {own[0]["model"]}:', _table(own),
                     *(f'`{command}`' for command in dict.fromkeys(row['command'] for row in own) if command),
                     f'Commit {distinct(own, "commit")}; {distinct(own, "hardware")}; torch {distinct(own, "torch")}.']
    text = '\n\n'.join(sections) + '\n'
    write_csv(output / 'transfer.csv', rows)
    write_atomically(output / 'transfer.md', text.encode())
    _plot(rows, names, output / 'transfer.png')
    return text


def _cases(rows: Sequence[Row]) -> list[Any]:
    """Labels per class, the fewest first."""
    return sorted({row['per_class'] for row in rows}, key=lambda value: math.inf if value == 'all' else value)


def _by_seed(rows: Sequence[Row], per_class: Any, method: str, start: str) -> dict[int, float]:
    return {row['seed']: row['top1'] for row in rows
            if (row['per_class'], row['method'], row['start']) == (per_class, method, start)}


def _table(rows: Sequence[Row]) -> str:
    lines = []
    for per_class in _cases(rows):
        labels = next(row['labels'] for row in rows if row['per_class'] == per_class)
        for method, title in METHODS.items():
            pretrained, random = (_by_seed(rows, per_class, method, start) for start in STARTS)
            if pretrained or random:
                pairs = [value - random[seed] for seed, value in pretrained.items() if seed in random]
                lines.append([f'{per_class}', f'{labels:,}', title, _spread(pretrained), _spread(random),
                              str(paired_interval(pairs)) if pairs else '', str(len(pairs))])
    return markdown_table(['labels per class', 'labels', 'method', *STARTS, 'difference', 'n'], lines)


def _spread(values: dict[int, float]) -> str:
    if not values:
        return ''
    numbers = list(values.values())
    mean = f'{statistics.fmean(numbers):.2f}'
    return mean if len(numbers) == 1 else f'{mean} ({min(numbers):.2f} to {max(numbers):.2f})'


def _plot(rows: Sequence[Row], names: Sequence[str], path: Path) -> None:
    """One panel per data set: accuracy over the labels per class, one colour per method, filled for trained weights."""
    figure = Figure(figsize=(1.8 + 4.2 * len(names), 4), layout='constrained')
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for axes, name in zip(panels, names, strict=True):
        own = [row for row in rows if row['data'] == name]
        cases = _cases(own)
        for color, method in enumerate(METHODS):
            for start, line, face in zip(STARTS, ('-', '--'), (f'C{color}', 'white'), strict=True):
                seen = [(place + 0.08 * (color - 1), values) for place, case in enumerate(cases)
                        if (values := list(_by_seed(own, case, method, start).values()))]
                if seen:
                    means = [statistics.fmean(values) for _, values in seen]
                    # a mean of equal numbers may differ from them in its last digit
                    ends = [[max(mean - min(values), 0) for mean, (_, values) in zip(means, seen, strict=True)],
                            [max(max(values) - mean, 0) for mean, (_, values) in zip(means, seen, strict=True)]]
                    axes.errorbar([x for x, _ in seen], means, yerr=ends, color=f'C{color}', linestyle=line, marker='o',
                                  markerfacecolor=face, capsize=3, label=f'{METHODS[method]}, {start}')
        axes.set_xticks(range(len(cases)), [str(case) for case in cases])
        axes.set(title=name, xlabel='labels per class', xlim=(-0.5, len(cases) - 0.5))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel('top-1 of the test images (%)')
    panels[-1].legend(fontsize='small', loc='center left', bbox_to_anchor=(1, 0.5))
    save_figure(path, figure, dpi=130)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', metavar='MODEL', help='a tag or an architecture with weights, or local-dir:FOLDER')
    parser.add_argument(
        '--data-dir', type=Path, required=True,
        help='folder with train/ and test/ (or val/), each with one folder of images per class')
    parser.add_argument('--output', type=Path, required=True, help='folder to write; several data sets may share it')
    parser.add_argument(
        '--per-class', type=int, nargs='+', default=[0], metavar='N', help='labels per class (default: all)')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], metavar='N', help='default: 0 1 2')
    parser.add_argument(
        '--methods', nargs='+', default=list(METHODS), choices=METHODS, help='default: knn linear finetune')
    parser.add_argument(
        '--img-size', type=int, default=0, metavar='N', help="image size in pixels (default: the model's own)")
    parser.add_argument(
        '--set', action='append', default=[], metavar='KEY=VALUE', help='override a key of finetune.yaml')
    parser.add_argument('--device', default=default_device(), help='default: cuda if there is one, else cpu')
    parser.add_argument('-j', '--workers', type=int, default=2, help='processes that decode images')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    job = Transfer(
        args.data_dir, args.output, args.model, tuple(dict.fromkeys(args.per_class)), tuple(dict.fromkeys(args.seeds)),
        tuple(args.methods), args.img_size, tuple(args.set), args.device, args.workers,
        command_line())
    text = ''
    try:
        with exit_on_error():
            for rows in transfer(job):
                if rows:
                    text = write_transfer(rows, args.output)
    except KeyboardInterrupt:  # while images are read; a run saves a checkpoint and exits by itself
        sys.exit(130)
    print(f'\n{text}')


if __name__ == '__main__':
    main()
