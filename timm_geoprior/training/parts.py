"""Model, optimizer, schedule, loss and mixup of a recipe, each made by timm's own factory."""
import difflib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import Mixup
from timm.layers import freeze_batch_norm_2d
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationTask, LogitDistillationTask
from timm.utils import freeze
from torch import nn

from ..errors import GeoPriorError
from ..files import first_line
from .checkpoint import SavedModel, read_weights, strip_prefix
from .recipe import SOURCE, Recipe


def build_model(
        recipe: Recipe, num_classes: int, pretrained: bool = False, start: SavedModel | None = None) -> nn.Module:
    """The recipe's model; its head is initialized anew if the weights have another number of classes.

    Args:
        pretrained: Start from the weights of the model's tag.
        start: Start from these weights.

    Raises:
        RuntimeError: The tag has no weights, or those of `start` do not fit.
        ValueError: The recipe freezes norms, and the model's batch norms are not BatchNorm2d.
    """
    options = {'drop_rate': recipe.drop, 'drop_path_rate': recipe.drop_path, **recipe.model_kwargs}
    if start is not None:
        options['pretrained_cfg_overlay'] = {
            **(recipe.model_kwargs.get('pretrained_cfg_overlay') or {}),
            **_overlay(recipe.model, num_classes, start, **recipe.model_kwargs)}
    model: Any = timm.create_model(
        recipe.model, pretrained=pretrained or start is not None, num_classes=num_classes, **options)
    for cfg in (model.pretrained_cfg, model.default_cfg):
        cfg.pop('state_dict', None)  # timm would keep a second copy of the weights there
    if recipe.freeze_norms:
        kinds = [kind for kind in (nn.BatchNorm1d, nn.BatchNorm2d) if any(isinstance(m, kind) for m in model.modules())]
        if kinds != [nn.BatchNorm2d]:
            raise ValueError('freeze_norms must be false unless the batch norms of the model are BatchNorm2d')
        model = freeze_batch_norm_2d(model)
    if recipe.freeze:
        freeze(model, list(recipe.freeze))
    network: nn.Module = model
    return network


def _overlay(name: str, num_classes: int, start: SavedModel, **model_kwargs: Any) -> dict[str, Any]:
    """Overrides of timm's configuration, to load these weights in place of the tag's."""
    with torch.device('meta'):
        model = timm.create_model(name, num_classes=num_classes, **model_kwargs)
    state_dict, _ = strip_prefix(start.state_dict, model.state_dict().keys())
    head = state_dict.get(f'{_classifier(model)}.weight')
    return {'state_dict': state_dict, 'num_classes': num_classes if head is None else len(head)}


def _classifier(model: nn.Module) -> str:
    """Name of a model's last layer."""
    return str(getattr(model, 'pretrained_cfg', {}).get('classifier') or 'fc')


def check_recipe(recipe: Recipe) -> None:
    """Build all of a recipe on the meta device, before any data is read. Errors suggest the nearest known name."""
    with torch.device('meta'):
        model = _try(lambda: build_model(recipe, 2), 'model, model_kwargs and freeze', recipe.model, timm.list_models)
        optimizer = _try(lambda: build_optimizer(recipe, model), 'opt and opt_kwargs', recipe.opt, list_optimizers)
        if recipe.teacher not in ('', SOURCE) and not timm.is_model(recipe.teacher.split('.')[0]):
            _try(lambda: timm.create_model(recipe.teacher), 'teacher', recipe.teacher, timm.list_models)
    if (channels := getattr(model, 'in_chans', 3)) != 3:
        raise GeoPriorError(f'The model must take images of 3 channels to be trained, got {channels}. Change in_chans.')
    sizes = {recipe.measured_size, *(recipe.size_at(epoch) for epoch in range(recipe.epochs))}
    for size in sorted(sizes):
        images = torch.empty(2, 3, size, size, device='meta')
        _try(partial(model, images), f'model and model_kwargs at {size} px')
    _try(lambda: build_schedule(recipe, optimizer, 100), 'lr_cycle_mul and lr_cycle_limit')


def _try(make: Callable[[], Any], keys: str, name: str = '', known: Callable[[], Sequence[Any]] = list) -> Any:
    try:
        return make()
    except Exception as error:  # timm's and torch's constructors may raise anything
        near = [] if name in known() else difflib.get_close_matches(name, known(), n=1)
        hint = f'did you mean {near[0]!r}?' if near else 'change one, in the recipe or with --set KEY=VALUE.'
        raise GeoPriorError(f'timm does not accept the recipe keys {keys} ({first_line(error)}): {hint}') from error


def build_teacher(recipe: Recipe, num_classes: int, tell: Callable[[str], object] = str) -> nn.Module:
    """The recipe's teacher, with the weights of its name or those of `teacher_path`; `tell` gets a message about them.
    """
    options: dict[str, Any] = {}
    if recipe.teacher_path:
        start = read_weights(Path(recipe.teacher_path))
        if start.note:
            tell(start.note)
        # timm's task normalizes the images again if the teacher's mean or std differ from the student's
        options = {**start.model_kwargs, 'pretrained_cfg_overlay': {
            **(start.model_kwargs.get('pretrained_cfg_overlay') or {}),
            **_overlay(recipe.teacher, num_classes, start, **start.model_kwargs)}}
    teacher: Any = timm.create_model(recipe.teacher, pretrained=True, num_classes=num_classes, **options)
    known = teacher.pretrained_cfg.get('num_classes')
    if known != num_classes:  # timm has initialized a new head, which would teach noise
        raise GeoPriorError(f'The teacher {recipe.teacher} must know the {num_classes} classes of the images, got '
                            f'weights for {known}. Name another, or a checkpoint with teacher_path.')
    network: nn.Module = teacher.eval().requires_grad_(False)
    return network


def build_task(recipe: Recipe, network: Any, teacher: nn.Module | None, device: torch.device) -> nn.Module:
    """timm's task: the loss of a network for images (B, C, H, W) and targets (B,) or (B, K), as `['loss']`.

    With a teacher, a share of the loss is the Kullback-Leibler divergence from its softened probabilities (Hinton et
    al., 2015, arXiv 1503.02531).
    """
    loss = TargetLoss(recipe)
    if teacher is None:
        return ClassificationTask(network, loss, device=device, verbose=False)
    return LogitDistillationTask(
        network, teacher, loss, task_loss_weight=1 - recipe.distill_alpha, temperature=recipe.distill_temperature,
        device=device, verbose=False)


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer over timm's parameter groups; radii have no weight decay and a learning rate of their own.

    timm's schedulers multiply the learning rate by a group's `lr_scale`.
    """
    radii = {id(p) for name, p in model.named_parameters() if name.endswith('log_radius')}
    # timm's optimizers with a fallback (Muon) use it for vectors by themselves, but the classifier must be named
    groups = param_groups_weight_decay(model, recipe.weight_decay, fallback_list=[f'{_classifier(model)}.weight'])
    split = []
    for group in groups:
        own = [p for p in group['params'] if id(p) in radii]
        rest = [p for p in group['params'] if id(p) not in radii]
        if own:
            split.append({**group, 'params': own, 'lr_scale': recipe.radius_lr})
        if rest:
            split.append({**group, 'params': rest})
    return create_optimizer_v2(split, opt=recipe.opt, lr=recipe.lr, momentum=recipe.momentum, **recipe.opt_kwargs)


def build_schedule(recipe: Recipe, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Scheduler:
    """timm's schedule, which changes the learning rate every update."""
    restarts: dict[str, Any] = {
        'cycle_mul': recipe.lr_cycle_mul, 'cycle_decay': 1.0, 'cycle_limit': recipe.lr_cycle_limit}
    # with warmup_prefix, the warm-up comes before the first cycle; without it, it replaces the start of that cycle
    epochs: Any = recipe.decay_epochs or recipe.epochs - (recipe.warmup_epochs if recipe.warmup_prefix else 0)
    scheduler: Scheduler
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=recipe.sched, num_epochs=epochs, min_lr=recipe.min_lr, warmup_lr=recipe.warmup_lr,
        warmup_epochs=recipe.warmup_epochs, warmup_prefix=recipe.warmup_prefix, step_on_epochs=False,
        updates_per_epoch=updates_per_epoch, **restarts)
    return scheduler


def build_mixup(recipe: Recipe, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix, or None if the recipe has neither."""
    if not recipe.mixup and not recipe.cutmix:
        return None
    return Mixup(
        mixup_alpha=recipe.mixup, cutmix_alpha=recipe.cutmix, prob=recipe.mixup_prob,
        switch_prob=recipe.mixup_switch_prob, label_smoothing=recipe.smoothing, num_classes=num_classes)


class TargetLoss(nn.Module):
    """Cross entropy for class indices, with label smoothing, and for mixup's soft targets; binary with `bce_loss`."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.soft: nn.Module = SoftTargetCrossEntropy()
        self.hard: nn.Module = LabelSmoothingCrossEntropy(recipe.smoothing)
        if recipe.bce_loss:  # timm's smooths class indices only
            self.soft = self.hard = BinaryCrossEntropy(
                recipe.smoothing, target_threshold=recipe.bce_target_thresh or None)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean loss of logits (B, K) for targets (B,) or (B, K)."""
        loss: torch.Tensor = (self.soft if targets.ndim == 2 else self.hard)(logits, targets)
        return loss
