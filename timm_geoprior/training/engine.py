"""The training loop: one process or many under torchrun, killed and resumed to the same bits.

Whatever is random is a function of the seed, the epoch and the position in it (`data/seeding.py`), so that a checkpoint
needs no random states: a resumed run draws what an uninterrupted one would have drawn.
"""
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn
from torch import nn
from tqdm import tqdm

from ..data.memory import ImageTensors
from ..data.seeding import seed_everything
from ..distributed import find_device
from ..errors import EvaluationError, GeoPriorError, WeightsError
from ..evaluation.accuracy import Counts, count_correct
from ..provenance import git_commit, hardware, versions
from . import report
from .checkpoint import load_checkpoint, read_weights, save_checkpoint
from .config import RunConfig
from .parts import (
    Distillation,
    check_recipe,
    create_loss,
    create_mixup,
    create_model,
    create_optimizer,
    create_schedule,
    learned_radii,
)
from .recipe import Recipe
from .sources import TrainingData, open_data

__all__ = ['Trainer', 'TrainingError', 'train']


class TrainingError(GeoPriorError):
    """A run that cannot start or go on; the message says why and what to do."""


class Trainer:
    """One run of a recipe."""

    def __init__(self, recipe: Recipe, config: RunConfig, decoded: ImageTensors | None = None) -> None:
        """
        Args:
            recipe: What is trained, and how.
            config: Where.
            decoded: The images of the training split, as `open_data` takes them.
        """
        self.recipe, self.config = recipe, config
        check_recipe(recipe)
        _check_config(config)
        self._join()
        self.last = config.output / 'last.pt'
        self.commit = git_commit() or ''
        if self.rank == 0:
            self._check_output()
        self.resume = bool(self._from_first(config.resume))
        share = self._share()
        self.data: TrainingData = open_data(
            recipe, config, share, self.device, self.rank, self.world_size, decoded)
        self.updates_per_epoch = len(self.data.train) // recipe.grad_accum_steps
        if not self.updates_per_epoch:
            raise TrainingError(
                f'{config.data_dir} has fewer training images than one batch of {recipe.batch_size}: lower batch_size.')
        seed_everything(config.seed, 'init')  # here, since what decodes draws too
        self._build_model()
        self.epoch = self.update = 0  # epochs and, within this one, updates that are behind us
        self.loss_sum = self.seconds = 0.0
        self.skipped = 0
        self.history: list[dict[str, Any]] = []
        self.best: float | None = None
        self.stop_signal = self.agreed_signal = 0
        if self.resume:
            self._resume()

    def _join(self) -> None:
        """Find this process's device, and its place among the others."""
        self.device, self.rank, self.world_size = find_device(self.config.device)
        if self.recipe.sync_bn and self.world_size > 1 and self.device.type == 'cpu':
            raise TrainingError('sync_bn is true, which torch has for GPUs only: add --set sync_bn=false.')
        if self.device.type == 'cuda':
            torch.backends.cudnn.benchmark = True  # sizes are few

    def _check_output(self) -> None:
        if not self.config.resume and self.last.exists():
            raise TrainingError(f'{self.config.output} already holds a run: add --resume, or name another folder.')
        try:
            self.config.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f'{self.config.output} cannot be made ({error.strerror}), expected a folder for the '
                                f'run: check --output.') from None

    def _share(self) -> int:
        """Images of one process's batch."""
        recipe = self.recipe
        share, rest = divmod(recipe.batch_size, self.world_size * recipe.grad_accum_steps)
        if rest or not share:
            raise TrainingError(
                f'batch_size is {recipe.batch_size}, expected a multiple of {self.world_size} processes times '
                f'{recipe.grad_accum_steps} accumulation steps: change batch_size or grad_accum_steps.')
        if share % 2 and (recipe.mixup or recipe.cutmix):
            raise TrainingError(
                f'batch_size is {recipe.batch_size}, which gives each process {share} images a step, expected an even '
                f'number for mixup and cutmix: change batch_size or grad_accum_steps.')
        return share

    def _from_first(self, value: Any) -> Any:
        """What the first process has: only its machine needs to see the run's folder."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def _build_model(self) -> None:
        recipe = self.recipe
        finetune = '' if self.resume else self.config.finetune
        classes = len(self.data.class_names)
        start = None
        if finetune and finetune != 'pretrained':
            start = read_weights(Path(finetune))
            if start.note and self.rank == 0:
                print(start.note, file=sys.stderr)
        self.model = _load(lambda: create_model(recipe, classes, finetune == 'pretrained', start),
                           f'--finetune {finetune}').to(self.device)
        self.memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.model = self.model.to(memory_format=self.memory_format)
        if recipe.sync_bn and self.world_size > 1:
            self.model = convert_sync_batchnorm(self.model)
        self.ema = ModelEmaV3(
            self.model, decay=recipe.model_ema_decay, use_warmup=recipe.model_ema_warmup) if recipe.model_ema else None
        self.optimizer = create_optimizer(recipe, self.model)
        self.schedule = create_schedule(recipe, self.optimizer, self.updates_per_epoch)
        self.loss = create_loss(recipe)
        self.mixup = create_mixup(recipe, classes)
        self.distillation = _load(
            lambda: Distillation(recipe, classes, *self.data.normalization).to(self.device),
            f'The teacher {recipe.teacher}') if recipe.teacher else None
        half = recipe.amp and recipe.amp_dtype == 'float16'
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        network, self.replica = self.model, None
        if self.world_size > 1:
            ids = [self.device] if self.device.type == 'cuda' else None
            network = self.replica = nn.parallel.DistributedDataParallel(network, device_ids=ids)
        # sizes are few and fixed: a graph for each is faster than a dynamic one
        self.network = torch.compile(network, dynamic=False) if recipe.torchcompile else network

    def _autocast(self) -> AbstractContextManager[Any]:
        if not self.recipe.amp:
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.recipe.amp_dtype))

    # -- state ---------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, and what a reader of the weights wants to know."""
        return {
            'model': self.model.state_dict(),
            'model_ema': self.ema.module.state_dict() if self.ema else None,
            'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict(),
            'epoch': self.epoch, 'update': self.update, 'loss_sum': self.loss_sum, 'seconds': self.seconds,
            'skipped': self.skipped, 'best': self.best, 'history': self.history,
            'step': self.epoch * self.updates_per_epoch + self.update,
            'recipe': self.recipe.to_dict(), 'seed': self.config.seed,
            'model_name': self.recipe.model, 'model_kwargs': self.recipe.model_kwargs,
            'num_classes': len(self.data.class_names), 'class_names': list(self.data.class_names),
            'versions': versions(), 'commit': self.commit,
        }

    def _resume(self) -> None:
        state = self._from_first(load_checkpoint(self.last) if self.rank == 0 else None)
        if missing := self.state().keys() - state.keys():
            raise TrainingError(f'{self.last} lacks {", ".join(sorted(missing))}, expected a checkpoint of this '
                                f'version of train.py: train into another folder.')
        recipe = self.recipe.to_dict()
        for key in recipe:
            if state['recipe'].get(key) != recipe[key]:
                raise TrainingError(
                    f'{self.last} was trained with {key} = {state["recipe"].get(key)!r}, this run has {recipe[key]!r}: '
                    f'resume with the same recipe, or train into another folder.')
        if state['seed'] != self.config.seed:
            raise TrainingError(f'{self.last} has seed {state["seed"]}, this run {self.config.seed}: use the same.')
        if state['class_names'] != list(self.data.class_names):
            raise TrainingError(f'{self.last} was trained on {len(state["class_names"])} other classes than the '
                                f'{len(self.data.class_names)} in {self.config.data_dir}: check --data-dir.')
        self.model.load_state_dict(state['model'])
        if self.ema:
            self.ema.module.load_state_dict(state['model_ema'])
        self.optimizer.load_state_dict(state['optimizer'])
        self.scaler.load_state_dict(state['scaler'])
        for key in ('epoch', 'update', 'loss_sum', 'seconds', 'skipped', 'best', 'history'):
            setattr(self, key, state[key])

    def save(self, path: Path) -> None:
        """Write a checkpoint; only the first process does. Weights that are not finite replace no good ones."""
        if self.rank == 0 and all(bool(p.isfinite().all()) for p in self.model.parameters()):
            save_checkpoint(self.state(), path)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def fit(self, stop: Callable[[Sequence[dict[str, Any]]], bool] | None = None) -> dict[str, Any]:
        """Train to the end.

        Args:
            stop: Gets the rows of the epochs so far before each further one; training ends where it answers True.

        Returns:
            The run's results, as written to results.json.

        Raises:
            TrainingError: The loss was not finite for too many steps in a row.
            SystemExit: 128 plus the signal's number, after a checkpoint, on SIGTERM or Ctrl-C.
        """
        previous = {number: signal.signal(number, self._note_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        log = self._start_log()
        try:
            while not (stop and self.history and stop(self.history)) and self.epoch < self.recipe.epochs:
                self._train_epoch()
                self._end_epoch()
                if log:
                    log.write(self.history)
            if self.stop_signal:  # it came while the last epoch was measured; a resumed run has only results to write
                raise SystemExit(128 + self.stop_signal)
            results = self._results()
            if self.rank == 0:
                report.write_results(results, self.config.output)
                report.plot_history(self.history, self.config.output)
            return results
        finally:
            if log:
                log.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _results(self) -> dict[str, Any]:
        """What was run and what came of it."""
        return {
            'recipe': self.recipe.to_dict(), 'seed': self.config.seed, 'world_size': self.world_size,
            'epochs': self.epoch, 'images_per_epoch': self.updates_per_epoch * self.recipe.batch_size,
            'parameters': sum(p.numel() for p in self.model.parameters()),
            'last': self.history[-1] if self.history else {}, 'best': self.best,
            'radii': learned_radii(self.model), 'hours': round(self.seconds / 3600, 3),
            'hardware': hardware(self.device), 'versions': versions(), 'commit': self.commit,
        }

    def _start_log(self) -> report.EpochLog | None:
        if self.rank:
            return None
        report.write_recipe(self.recipe, self.config.output, self.commit)
        if self.data.held_out is None:
            warnings.warn('No images are held out of this run: its accuracy is not measured, and best.pt not written. '
                          'Name --val-split, or set holdout.', stacklevel=2)
        return report.EpochLog(self.config.output, self.epoch)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop_signal = number

    def _train_epoch(self) -> None:
        recipe = self.recipe
        self.model.train()
        first = self.update * recipe.grad_accum_steps
        batches = self.data.train.epoch(self.epoch, recipe.size_at(self.epoch), first)
        bar = tqdm(
            total=self.updates_per_epoch, initial=self.update, desc=f'epoch {self.epoch + 1}/{recipe.epochs}',
            unit_scale=recipe.batch_size, unit='img', disable=self.rank > 0, leave=False,
            mininterval=0.1 if sys.stderr.isatty() else 60)
        started = time.perf_counter()
        with bar:
            while self.update < self.updates_per_epoch:
                loss = self._step(batches)
                self.update += 1
                self.loss_sum += loss
                now = time.perf_counter()
                self.seconds, started = self.seconds + now - started, now
                bar.set_postfix(loss=f'{self.loss_sum / self.update:.3f}', refresh=False)
                bar.update()
                # alone, a process stops now; many stop at the step that all have agreed on
                if number := self.agreed_signal if self.replica else self.stop_signal:
                    self.save(self.last)
                    raise SystemExit(128 + number)
                if self.update % self.config.save_every == 0:
                    self.save(self.last)

    def _step(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> float:
        """One update; the mean loss over all processes. An update whose loss is not finite is left out."""
        recipe = self.recipe
        done = self.epoch * self.updates_per_epoch + self.update
        self.schedule.step_update(done)
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        total = 0.0
        for micro_step in range(recipe.grad_accum_steps):
            images, targets = next(batches)
            # after the batch was made, which may draw too: when an epoch is entered decides about those draws
            seed_everything(self.config.seed, 'step', done, micro_step, self.rank)
            images, targets = self._augment(images, targets)
            last = micro_step == recipe.grad_accum_steps - 1
            with self._no_sync(not last):
                with self._autocast():
                    logits = self.network(images)
                    loss = self.loss(logits, targets)
                    if self.distillation:
                        alpha = recipe.distill_alpha
                        loss = (1 - alpha) * loss + alpha * self.distillation(images, logits)
                loss = loss / recipe.grad_accum_steps
                self.scaler.scale(loss).backward()
            total += loss.item()
        total, finite = self._agree(total)
        if finite:
            self._apply(done)
            self.skipped = 0
        else:
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)  # norms have seen what was not finite
            self._skip(done)
        self.optimizer.zero_grad(set_to_none=True)
        return total if finite else self.loss_sum / max(self.update, 1)

    def _augment(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        off = self.recipe.mixup_off_epoch
        if self.mixup and not (off and self.epoch >= off):
            images, targets = self.mixup(images, targets)
        return images.contiguous(memory_format=self.memory_format), targets

    def _no_sync(self, wanted: bool) -> AbstractContextManager[Any]:
        if wanted and self.replica is not None:
            return self.replica.no_sync()
        return nullcontext()

    def _agree(self, loss: float) -> tuple[float, bool]:
        """Mean loss, and whether it is finite everywhere; a signal that one process got stops all at the same step."""
        facts = torch.tensor([loss, float(self.stop_signal)], dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            gathered = [torch.empty_like(facts) for _ in range(self.world_size)]
            dist.all_gather(gathered, facts)
            facts = torch.stack(gathered)
            self.agreed_signal = int(facts[:, 1].max())
            loss = float(facts[:, 0].mean())
        return loss, bool(torch.isfinite(torch.tensor(loss)))

    def _apply(self, done: int) -> None:
        recipe = self.recipe
        if recipe.clip_grad:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.model.parameters(), recipe.clip_grad, mode=recipe.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema:
            self.ema.update(self.model, step=done)

    def _skip(self, done: int) -> None:
        self.skipped += 1
        if self.skipped >= self.recipe.max_skipped_steps:
            lr = self.optimizer.param_groups[-1]['lr']
            good = f'the last good checkpoint is {self.last}' if self.last.exists() else 'there is no checkpoint yet'
            raise TrainingError(
                f'The loss was not finite for {self.skipped} steps in a row, up to step {done} with a learning rate of '
                f'{lr:.3g}; {good}: lower lr, or clip gradients with clip_grad.')

    # -- after each epoch ----------------------------------------------------------------------------------------------

    def _end_epoch(self) -> None:
        row: dict[str, Any] = {
            'epoch': self.epoch, 'img_size': self.recipe.size_at(self.epoch),
            'lr': self.optimizer.param_groups[-1]['lr'], 'train_loss': self.loss_sum / self.updates_per_epoch,
        }
        row.update(self._measure())
        before = self.history[-1]['seconds'] if self.history else 0
        row['seconds'] = round(self.seconds, 1)
        row['images_per_second'] = round(
            self.updates_per_epoch * self.recipe.batch_size / max(self.seconds - before, 1e-9), 1)
        row.update({f'radius.{name}': value for name, value in learned_radii(self.model).items()})
        self.history.append(row)
        self.epoch, self.update, self.loss_sum = self.epoch + 1, 0, 0.0
        chosen_by = row.get('ema_top1', row.get('top1'))
        if chosen_by is not None and (self.best is None or chosen_by > self.best):
            self.best = chosen_by
            self.save(self.config.output / 'best.pt')
        self.save(self.last)

    def _measure(self) -> dict[str, float]:
        """Top-1 in percent of the held-out images, by the weights and by their average."""
        measured = {}
        for name, network in (('top1', self.model), ('ema_top1', self.ema.module if self.ema else None)):
            if network is not None and self.world_size > 1:
                distribute_bn(network, self.world_size)  # what the first process saves is what all measure
            counts = self._count(network)
            if counts:
                measured[name] = 100 * counts.top1_correct / counts.num_images
        return measured

    def _count(self, network: nn.Module | None) -> Counts | None:
        if network is None or self.data.held_out is None:
            return None
        with self._autocast():
            batches = ((x.contiguous(memory_format=self.memory_format), y) for x, y in self.data.held_out())
            return count_correct(network, batches)


def _check_config(config: RunConfig) -> None:
    for key, least in (('workers', 0), ('save_every', 1), ('max_corrupt', 0)):
        if getattr(config, key) < least:
            raise TrainingError(f'--{key.replace("_", "-")} is {getattr(config, key)}, expected {least} or more.')


def _load(make: Callable[[], Any], what: str) -> Any:
    """What `make` gives; what goes wrong with its weights is one sentence."""
    try:
        return make()
    except (EvaluationError, WeightsError):
        raise
    except Exception as error:  # timm's loading, and a Hub's, fail in many ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainingError(f'{what} cannot be loaded ({reason}), expected weights that fit: check the name, and the '
                            f'connection.') from error


def train(recipe: Recipe, config: RunConfig) -> dict[str, Any]:
    """Run a recipe, or what is left of it.

    Args:
        recipe: What is trained, and how.
        config: Where.

    Returns:
        The results, as `Trainer.fit` gives them.

    Raises:
        TrainingError: As `Trainer` and `Trainer.fit` have it.
    """
    try:
        return Trainer(recipe, config).fit()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
