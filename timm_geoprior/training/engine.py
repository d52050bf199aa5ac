"""The training loop, in one process or many under torchrun.

All randomness is a function of the seed, the epoch and the position in it (`data/batches.py`), so a checkpoint needs no
random states: a resumed run draws the same numbers as an uninterrupted one, and on a CPU ends with the same bits.
"""
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from ..data.batches import LoaderConfig, seed_everything
from ..data.listing import is_inside_images
from ..data.memory import ImageTensors
from ..distributed import find_device, from_first, group_of_processes
from ..errors import GeoPriorError
from ..evaluation.metrics import count_correct
from ..files import first_line, write_json
from ..progress import Progress, handled_signals
from ..provenance import git_commit, hardware, versions
from ..radii import radii_in_cells
from . import parts, report
from .checkpoint import load_checkpoint, read_weights, save_checkpoint
from .loaders import TrainingData, open_training_data
from .recipe import Recipe, RunConfig
from .recovery import start_from_folder


class Trainer:
    """One run of a recipe."""

    def __init__(self, recipe: Recipe, config: RunConfig, decoded: ImageTensors | None = None) -> None:
        """
        Args:
            recipe: What to train, and how.
            config: Where and how to run it.
            decoded: The decoded training split, as for `open_training_data`.
        """
        recipe, config, note = start_from_folder(recipe, config)
        parts.check_recipe(recipe)
        _check_config(config)
        self.recipe, self.config = recipe, config
        self._join()
        if self.rank:  # only the first process reports what all of them find
            self.config = replace(config, tell=lambda text: None)
        if note:
            self.config.tell(note)
        self.last = config.output / 'last.pt'
        self.commit = git_commit() or ''
        self.resume = from_first(self._check_output, self.device)
        share = LoaderConfig(self._batch_share(), self.device, config.seed, self.rank, self.world_size)
        self.data: TrainingData = open_training_data(recipe, config, share, decoded)
        self.updates_per_epoch = len(self.data.train) // recipe.grad_accum_steps
        if not self.updates_per_epoch:
            raise GeoPriorError(
                f'{config.data_dir} has fewer training images than one batch of {recipe.batch_size}. Lower batch_size.')
        seed_everything(config.seed, 'init')  # only now, since loading the data draws random numbers too
        self._build_model()
        self.epoch = self.update = 0  # completed epochs, and completed updates of the current one
        # mps has no float64
        self.loss_sum = torch.zeros(
            (), dtype=torch.float32 if self.device.type == 'mps' else torch.float64, device=self.device)
        self.loss_count = 0  # updates whose losses are in the sum
        self.seconds = 0.0
        self.skipped = 0
        self.history: list[dict[str, Any]] = []
        self.best: float | None = None
        self.stop_signal = self.agreed_signal = 0
        if self.resume:
            self._resume()

    def _join(self) -> None:
        """Find this process's device and rank, and the number of processes."""
        self.device, self.rank, self.world_size = find_device(self.config.device)
        if self.recipe.sync_bn and self.world_size > 1 and self.device.type == 'cpu':
            raise GeoPriorError('sync_bn must be false on CPUs, got true, which torch supports on GPUs only. Add '
                                '--set sync_bn=false.')
        if self.device.type == 'cuda':
            torch.backends.cudnn.benchmark = True  # there are few sizes

    def _check_output(self) -> bool:
        """Whether the run is resumed, if its folder can be used."""
        if not self.config.resume and self.last.exists():
            raise GeoPriorError(f'{self.config.output} already holds a run. Add --resume, or name another folder.')
        config = self.config
        if config.data_dir.is_dir() and is_inside_images(
                config.output, config.data_dir, *filter(None, (config.train_split, config.val_split))):
            raise GeoPriorError(f'The output must lie outside the folders of the images, since its plots would be '
                                f'read as some of them, got {config.output}. Name another folder with --output.')
        try:
            str(self.config.output).encode()
        except UnicodeEncodeError:
            raise GeoPriorError(f'The name of the folder {self.config.output} must be UTF-8, since TensorBoard cannot '
                                f'write to any other. Name another one with --output.') from None
        if not self.config.resume:  # else --resume without a checkpoint would leave an empty folder
            try:
                self.config.output.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise GeoPriorError(f'The folder {self.config.output} cannot be created ({error.strerror}). '
                                    f'Check --output.') from None
        if self.config.output.exists() and not os.access(self.config.output, os.W_OK):
            raise GeoPriorError(f'The folder {self.config.output} must be writable, got one that is read-only. Check '
                                f'its permissions, or name another with --output.')
        return bool(config.resume)

    def _batch_share(self) -> int:
        """Images per batch of one process."""
        recipe = self.recipe
        share, rest = divmod(recipe.batch_size, self.world_size * recipe.grad_accum_steps)
        if rest or not share:
            raise GeoPriorError(
                f'batch_size must be a multiple of {self.world_size} processes times {recipe.grad_accum_steps} '
                f'accumulation steps, got {recipe.batch_size}. Change batch_size or grad_accum_steps.')
        if share % 2 and (recipe.mixup or recipe.cutmix):
            raise GeoPriorError(
                f'batch_size must give each process an even number of images for mixup and cutmix, got '
                f'{recipe.batch_size}, which gives {share}. Change batch_size or grad_accum_steps.')
        if share == 1:
            self._check_single_images()
        return share

    def _check_single_images(self) -> None:
        """Refuse single images whose last map is one cell: batch norm needs more than one value per channel."""
        size = min(self.recipe.size_at(epoch) for epoch in range(self.recipe.epochs))
        with torch.device('meta'):
            model = parts.build_model(self.recipe, 2).train()
            try:
                model(torch.empty(1, 3, size, size))
            except ValueError as error:
                raise GeoPriorError(
                    f'batch_size must give each process at least 2 images at {size} px, got 1, for which batch norm '
                    f'has no statistics ({first_line(error)}). Raise batch_size or img_size.') from None

    def _build_model(self) -> None:
        recipe = self.recipe
        classes = len(self.data.class_names)
        self.model = self._start(classes).to(self.device)
        self.memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.model = self.model.to(memory_format=self.memory_format)
        if recipe.sync_bn and self.world_size > 1:
            self.model = convert_sync_batchnorm(self.model)
        self.ema = ModelEmaV3(self.model, decay=recipe.model_ema_decay) if recipe.model_ema else None
        self.optimizer = parts.build_optimizer(recipe, self.model)
        self.schedule = parts.build_schedule(recipe, self.optimizer, self.updates_per_epoch)
        self.mixup = parts.build_mixup(recipe, classes)
        half = recipe.amp and recipe.amp_dtype == 'float16'
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        network, self.replica = self.model, None
        if self.world_size > 1:
            ids = [self.device] if self.device.type == 'cuda' else None
            network = self.replica = nn.parallel.DistributedDataParallel(network, device_ids=ids)
        # there are few sizes, all fixed: one graph for each is faster than a dynamic one
        self.network: Any = torch.compile(network, dynamic=False) if recipe.torchcompile else network
        teacher = _load(
            lambda: parts.build_teacher(recipe, classes, self.config.tell).to(self.device),
            f'The teacher {recipe.teacher}'
        ) if recipe.teacher else None
        self.task = parts.build_task(recipe, self.network, teacher, self.device)

    def _start(self, classes: int) -> nn.Module:
        """The model with its starting weights."""
        finetune = '' if self.resume else self.config.finetune
        start = None
        if finetune and finetune != 'pretrained':
            start = read_weights(Path(finetune))
            if start.note:
                self.config.tell(start.note)
        model: nn.Module = _load(
            lambda: parts.build_model(self.recipe, classes, finetune == 'pretrained', start),
            self.recipe.model if finetune in ('', 'pretrained') else f'--finetune {finetune}')
        return model

    def _autocast(self) -> AbstractContextManager[Any]:
        if not self.recipe.amp:
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.recipe.amp_dtype))

    # -- state ---------------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Any]:
        """The weights, their average, and where they come from, without the optimizer."""
        return {
            'model': self.model.state_dict(),
            # a name that timm's own loading knows, and prefers to the raw weights
            'model_ema': self.ema.module.state_dict() if self.ema else None,
            'recipe': self.recipe.to_dict(), 'seed': self.config.seed,
            'model_name': self.recipe.model, 'model_kwargs': self.recipe.model_kwargs,
            'num_classes': len(self.data.class_names), 'class_names': list(self.data.class_names),
            'versions': versions(), 'commit': self.commit,
        }

    def state(self) -> dict[str, Any]:
        """The weights, and everything else that a resumed run needs."""
        return {
            **self.weights(),
            'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict(),
            'epoch': self.epoch, 'update': self.update, 'loss_sum': self.loss_sum.item(),
            'loss_count': self.loss_count, 'seconds': self.seconds,
            'skipped': self.skipped, 'best': self.best, 'history': self.history,
            'step': self.epoch * self.updates_per_epoch + self.update,
            'held_names': list(self.data.held_names), 'train_sha256': self.data.train_sha256,
        }

    def _resume(self) -> None:
        state = from_first(lambda: load_checkpoint(self.last), self.device)
        self._check_same_run(state)
        self.model.load_state_dict(state['model'])
        if self.ema:
            self.ema.module.load_state_dict(state['model_ema'])
        self.optimizer.load_state_dict(state['optimizer'])
        self.scaler.load_state_dict(state['scaler'])
        self.loss_sum.fill_(state['loss_sum'])
        for key in ('epoch', 'update', 'loss_count', 'seconds', 'skipped', 'best', 'history'):
            setattr(self, key, state[key])

    def _check_same_run(self, state: dict[str, Any]) -> None:
        """Refuse to resume a checkpoint with another recipe or seed, or with other classes or images."""
        if missing := self.state().keys() - state.keys():
            raise GeoPriorError(f'{self.last} must be a checkpoint of this version of train, got one without '
                                f'{", ".join(sorted(missing))}. Train into another folder.')
        recipe = self.recipe.to_dict()
        for key in recipe:
            if state['recipe'].get(key) != recipe[key]:
                raise GeoPriorError(
                    f'{self.last} was trained with {key} = {state["recipe"].get(key)!r}, this run has {recipe[key]!r}. '
                    f'Resume with the same recipe, or train into another folder.')
        if state['seed'] != self.config.seed:
            raise GeoPriorError(f'{self.last} was trained with seed {state["seed"]}, this run has {self.config.seed}. '
                                f'Add --seed {state["seed"]}, or train into another folder.')
        if state['class_names'] != list(self.data.class_names):
            raise GeoPriorError(f'{self.last} was trained on {len(state["class_names"])} classes that differ from '
                                f'the {len(self.data.class_names)} in {self.config.data_dir}. Check --data-dir.')
        # empty if nothing has been measured so far
        held_names, same_images = state['held_names'], state['train_sha256'] == self.data.train_sha256
        if same_images and held_names and not self.data.held_names:
            raise GeoPriorError(f'{self.last} was measured on {len(held_names):,} images, and this run would measure '
                                f'none. Add the same --val-split, or train into another folder.')
        if not same_images or held_names not in ([], list(self.data.held_names)):
            raise GeoPriorError(
                f'{self.last} was trained or measured on other images than those in {self.config.data_dir}: some were '
                f'added, removed or renamed, and images that were trained on might be held out now. Restore them, or '
                f'train into another folder.')

    def save(self, path: Path, whole: bool = True) -> None:
        """Write a checkpoint; a `whole` one has everything that a resumed run needs, and is larger than the weights.

        Only the first process writes it. Weights that are not finite do not replace good ones.
        """
        if self.rank == 0 and bool(torch.stack([p.isfinite().all() for p in self.model.parameters()]).all()):
            save_checkpoint(self.state() if whole else self.weights(), path)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def fit(self, stop: Callable[[Sequence[dict[str, Any]]], bool] | None = None) -> dict[str, Any]:
        """Train to the end.

        Args:
            stop: Called before each further epoch with the rows of those so far; training ends if it returns True.

        Returns:
            The run's results, as written to results.json.

        Raises:
            GeoPriorError: The loss was not finite for too many steps in a row or for a whole epoch, images cannot be
                read, or a checkpoint cannot be written.
            SystemExit: On SIGTERM or Ctrl-C, once a checkpoint is saved; the code is 128 plus the signal's number.
        """
        with handled_signals(self._note_signal, signal.SIGTERM, signal.SIGINT), self._start_log() as events:
            while not (stop and self.history and stop(self.history)) and self.epoch < self.recipe.epochs:
                self._train_epoch()
                self._end_epoch()
                if events:
                    report.log_epoch(events, self.history, self.config.output)
                    self.config.tell(report.describe_epoch(self.history))
            if self.stop_signal:  # came while the last epoch was measured: a resumed run only writes the results
                self._leave(self.stop_signal)
            results = self._results()
            if self.rank == 0:
                write_json(self.config.output / 'results.json', results)
                report.plot_history(self.history, self.config.output)
            return results

    def _results(self) -> dict[str, Any]:
        """The content of results.json: what was run, and the outcome."""
        return {
            'recipe': self.recipe.to_dict(), 'seed': self.config.seed, 'world_size': self.world_size,
            'epochs': self.epoch, 'images_per_epoch': self.updates_per_epoch * self.recipe.batch_size,
            'parameters': sum(p.numel() for p in self.model.parameters()),
            'last': self.history[-1] if self.history else {}, 'best': self.best,
            'radii': radii_in_cells(self.model), 'hours': round(self.seconds / 3600, 3),
            'hardware': hardware(self.device), 'versions': versions(), 'commit': self.commit,
        }

    def _start_log(self) -> AbstractContextManager[SummaryWriter | None]:
        """The first process's TensorBoard writer; it purges the events of epochs that a resumed run repeats."""
        if self.rank:
            return nullcontext()
        report.write_recipe(self.recipe, self.config.output, self.commit)
        if self.data.held_out is None:
            self.config.tell('No images are held out of this run: its accuracy is not measured, and best.pt is not '
                             'written. Add --val-split, or set holdout.')
        return SummaryWriter(str(self.config.output / 'tensorboard'), purge_step=self.epoch or None)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        # not print, which is not reentrant if a second signal arrives
        if not self.stop_signal and self.rank == 0:
            os.write(2, f'\n{signal.Signals(number).name}: stopping as soon as a checkpoint is saved.\n'.encode())
        self.stop_signal = number

    def _leave(self, number: int) -> None:
        """Exit with a signal's exit code, once the checkpoint is saved."""
        how = self.config.command or 'the same command and --resume'
        self.config.tell(f'Saved {self.last}. Resume with: {how}')
        raise SystemExit(128 + number)

    def _train_epoch(self) -> None:
        recipe = self.recipe
        self.model.train()
        first = self.update * recipe.grad_accum_steps
        batches = self.data.train.epoch(self.epoch, recipe.size_at(self.epoch), first)
        progress = Progress(
            f'epoch {self.epoch + 1}/{recipe.epochs}', self.updates_per_epoch * recipe.batch_size,
            done=self.update * recipe.batch_size, tell=None if self.rank else self.config.tell)
        started = time.perf_counter()
        with progress:
            while self.update < self.updates_per_epoch:
                self._step(batches)
                self.update += 1
                now = time.perf_counter()
                self.seconds, started = self.seconds + now - started, now
                # reading the loss waits for the device, so it is read only when it is shown
                progress.update(recipe.batch_size, lambda: f'loss {self._mean_loss():.3f}')
                # a single process stops at once, several at the step that all have agreed on
                if number := self.agreed_signal if self.replica else self.stop_signal:
                    self.save(self.last)
                    self._leave(number)
                if self.update % self.config.save_every == 0:
                    self.save(self.last)

    def _step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Make one update, and add its loss to the sum. An update whose loss is not finite is skipped."""
        recipe = self.recipe
        done = self.epoch * self.updates_per_epoch + self.update
        self.schedule.step_update(done)
        statistics = Statistics(self.model)
        total = torch.zeros_like(self.loss_sum)
        for micro_step in range(recipe.grad_accum_steps):
            images, targets = next(batches)
            # only after loading, which may draw too, and how much depends on where the epoch is entered
            seed_everything(self.config.seed, 'step', done, micro_step, self.rank)
            images, targets = self._augment(images, targets)
            last = micro_step == recipe.grad_accum_steps - 1
            # gradients are reduced over the processes once, after the last part of the batch
            with nullcontext() if last or self.replica is None else self.replica.no_sync():
                with self._autocast():
                    loss = self.task(images, targets)['loss'] / recipe.grad_accum_steps
                total += loss.detach()
                if last:
                    answer = self._agree(total)  # before the backward pass, which hides the copy to the host
                self.scaler.scale(loss).backward()
        mean = answer.mean
        finite, self.agreed_signal = answer.wait()
        if finite:
            self._apply(done)
            self.skipped = 0
            self.loss_sum += mean
            self.loss_count += 1
        else:
            statistics.restore()  # norms may have seen values that are not finite
            self._skip(done)
        self.optimizer.zero_grad(set_to_none=True)

    def _mean_loss(self) -> float:
        """The mean loss of the epoch's updates so far, without skipped ones."""
        return self.loss_sum.item() / max(self.loss_count, 1)  # at an epoch's end there is at least one

    def _augment(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        off = self.recipe.mixup_off_epoch
        if self.mixup and not (off and self.epoch >= off):
            images, targets = self.mixup(images, targets)
        return images.contiguous(memory_format=self.memory_format), targets

    def _agree(self, loss: Tensor) -> '_Answer':
        """The mean loss of all processes, and a signal if any of them got one: all stop at the same step."""
        facts = torch.stack([loss, torch.full_like(loss, self.stop_signal)])
        if self.world_size > 1:
            gathered = [torch.empty_like(facts) for _ in range(self.world_size)]
            dist.all_gather(gathered, facts)
            every = torch.stack(gathered)
            facts = torch.stack([every[:, 0].mean(), every[:, 1].max()])
        return _Answer(facts)

    def _apply(self, done: int) -> None:
        recipe = self.recipe
        if recipe.clip_grad:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.model.parameters(), recipe.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema:
            self.ema.update(self.model, step=done)

    def _skip(self, done: int) -> None:
        self.skipped += 1
        no_loss = not self.loss_count and self.update + 1 == self.updates_per_epoch  # in the whole epoch
        if self.skipped >= self.recipe.max_skipped_steps or no_loss:
            which = f'any step of epoch {self.epoch + 1}' if no_loss else f'{self.skipped} steps in a row'
            lr = self.optimizer.param_groups[-1]['lr']
            good = f'the last good checkpoint is {self.last}' if self.last.exists() else 'there is no checkpoint yet'
            raise GeoPriorError(
                f'The loss was not finite for {which}, up to step {done} with a learning rate of {lr:.3g}; {good}. '
                f'Lower lr, or clip gradients with clip_grad.')

    # -- after each epoch ----------------------------------------------------------------------------------------------

    def _end_epoch(self) -> None:
        row: dict[str, Any] = {
            'epoch': self.epoch, 'img_size': self.recipe.size_at(self.epoch),
            'lr': self.optimizer.param_groups[-1]['lr'], 'train_loss': self._mean_loss(),
        }
        row.update(self._measure())
        before = self.history[-1]['seconds'] if self.history else 0
        row['seconds'] = round(self.seconds, 1)
        row['images_per_second'] = round(
            self.updates_per_epoch * self.recipe.batch_size / max(self.seconds - before, 1e-9), 1)
        row.update({f'radius.{name}': value for name, value in radii_in_cells(self.model).items()})
        self.history.append(row)
        self.epoch, self.update = self.epoch + 1, 0
        self.loss_sum.zero_()
        self.loss_count = 0
        chosen_by = row.get('ema_top1', row.get('top1'))
        if chosen_by is not None and (self.best is None or chosen_by > self.best):
            self.best = chosen_by
            self.save(self.config.output / 'best.pt', whole=False)
        self.save(self.last)

    def _measure(self) -> dict[str, float]:
        """Top-1 accuracy on the held-out images in percent, with the weights and with their average."""
        measured = {}
        networks = {'top1': self.model, **({'ema_top1': self.ema.module} if self.ema else {})}
        for name, network in networks.items():
            if self.world_size > 1:
                distribute_bn(network, self.world_size)  # all measure what the first process saves
            if self.data.held_out is not None:
                with self._autocast():
                    batches = ((x.contiguous(memory_format=self.memory_format), y) for x, y in self.data.held_out())
                    counts = count_correct(network, batches)
                if not counts.num_images:
                    raise GeoPriorError('None of the held-out images can be read, so no accuracy can be measured. '
                                        'Repair them, or hold out others.')
                measured[name] = 100 * counts.top1_correct / counts.num_images
        return measured


class _Answer:
    """Mean loss and signal, copied to the host while the device works on."""

    def __init__(self, facts: Tensor) -> None:
        self.mean = facts[0]
        self.facts = facts.to('cpu', non_blocking=facts.is_cuda)
        self.arrived = None
        if facts.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record(torch.cuda.current_stream(facts.device))

    def wait(self) -> tuple[bool, int]:
        """Whether the loss is finite, and the signal. On a GPU, this waits for the forward pass only."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, number = self.facts.tolist()
        return math.isfinite(loss), int(number)


class Statistics:
    """A network's buffers before an update, in one flat copy per dtype."""

    def __init__(self, model: nn.Module) -> None:
        self.groups: dict[torch.dtype, list[Tensor]] = {}
        for buffer in model.buffers():
            self.groups.setdefault(buffer.dtype, []).append(buffer)
        self.copies = {dtype: torch.cat([buffer.reshape(-1) for buffer in buffers])
                       for dtype, buffers in self.groups.items()}

    def restore(self) -> None:
        """Copy them back into the network."""
        for dtype, buffers in self.groups.items():
            parts = self.copies[dtype].split([buffer.numel() for buffer in buffers])
            for buffer, part in zip(buffers, parts, strict=True):
                buffer.copy_(part.view_as(buffer))


def _check_config(config: RunConfig) -> None:
    for key, least in (('workers', 0), ('save_every', 1), ('max_corrupt', 0)):
        if getattr(config, key) < least:
            raise GeoPriorError(f'--{key.replace("_", "-")} must be {least} or more, got {getattr(config, key)}.')


def _load(make: Callable[[], Any], what: str) -> Any:
    """Call `make`, and turn whatever it raises into one sentence."""
    try:
        return make()
    except GeoPriorError:
        raise
    except Exception as error:  # loading by timm, or from a Hub, fails in many ways
        raise GeoPriorError(f'{what} cannot be loaded ({first_line(error)}). Check the name, the options '
                            f'(model_kwargs), the weights and the connection.') from error


def train(recipe: Recipe, config: RunConfig) -> dict[str, Any]:
    """Run a recipe, or the rest of an interrupted run.

    Args:
        recipe: What to train, and how.
        config: Where and how to run it.

    Returns:
        The results, as from `Trainer.fit`.

    Raises:
        GeoPriorError: As in `Trainer` and `Trainer.fit`.
    """
    with group_of_processes():
        return Trainer(recipe, config).fit()
