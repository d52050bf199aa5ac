"""What a recipe is turned into: model, optimizer, schedule, loss and mixup, each by timm's own factory."""
from typing import Any, Dict, Optional

import timm
import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from .recipe import Recipe

__all__ = ['create_loss', 'create_mixup', 'create_model', 'create_optimizer', 'create_schedule', 'learned_radii']


def create_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """The recipe's model with random weights."""
    return timm.create_model(
        recipe.model, num_classes=num_classes, drop_rate=recipe.drop, drop_path_rate=recipe.drop_path,
        **recipe.model_kwargs)


def learned_radii(model: nn.Module) -> Dict[str, Any]:
    """Each layer's radii in cells of its input grid, by the layer's name; a list where it has several heads."""
    radii = {name: module.radius().tolist() for name, module in model.named_modules() if hasattr(module, 'log_radius')}
    return {name: values if len(values) > 1 else values[0] for name, values in radii.items()}


def create_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer over timm's parameter groups; radii have no weight decay and a learning rate of their own.

    The groups' `lr_scale` is timm's: its schedulers multiply by it.
    """
    radii = {id(p) for name, p in model.named_parameters() if name.endswith('log_radius')}
    # timm's optimizers with a fallback (Muon) leave vectors to it by themselves; the classifier is named, as timm's train.py
    classifier = getattr(model, 'pretrained_cfg', {}).get('classifier') or 'fc'
    groups = param_groups_weight_decay(
        model, recipe.weight_decay, fallback_list=[f'{classifier}.weight'])
    split = []
    for group in groups:
        own = [p for p in group['params'] if id(p) in radii]
        rest = [p for p in group['params'] if id(p) not in radii]
        if own:
            split.append({**group, 'params': own, 'lr_scale': recipe.radius_lr})
        if rest:
            split.append({**group, 'params': rest})
    return create_optimizer_v2(split, opt=recipe.opt, lr=recipe.lr, momentum=recipe.momentum, **recipe.opt_kwargs)


def create_schedule(recipe: Recipe, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Scheduler:
    """timm's schedule, a new learning rate each update."""
    restarts = {'cycle_mul': recipe.lr_cycle_mul, 'cycle_decay': recipe.lr_cycle_decay,
                'cycle_limit': recipe.lr_cycle_limit}
    epochs = recipe.decay_epochs or recipe.epochs - (recipe.warmup_epochs if recipe.warmup_prefix else 0)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=recipe.sched, num_epochs=epochs, min_lr=recipe.min_lr, warmup_lr=recipe.warmup_lr,
        warmup_epochs=recipe.warmup_epochs, warmup_prefix=recipe.warmup_prefix, step_on_epochs=False,
        updates_per_epoch=updates_per_epoch, **restarts)
    return scheduler


def create_mixup(recipe: Recipe, num_classes: int) -> Optional[Mixup]:
    """timm's mixup and cutmix, or None where the recipe has neither."""
    if not recipe.mixup and not recipe.cutmix:
        return None
    return Mixup(
        mixup_alpha=recipe.mixup, cutmix_alpha=recipe.cutmix, prob=recipe.mixup_prob,
        switch_prob=recipe.mixup_switch_prob, label_smoothing=recipe.smoothing, num_classes=num_classes)


class TargetLoss(nn.Module):
    """Cross entropy for class indices, smoothed, and for the soft targets that mixup makes; binary where asked."""

    def __init__(self, smoothing: float, bce: bool) -> None:
        super().__init__()
        self.soft: nn.Module = BinaryCrossEntropy(smoothing=0) if bce else SoftTargetCrossEntropy()
        self.hard: nn.Module = BinaryCrossEntropy(smoothing=smoothing) if bce else LabelSmoothingCrossEntropy(smoothing)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean loss of logits (B, K) for targets (B,) or (B, K)."""
        return self.soft(logits, targets) if targets.ndim == 2 else self.hard(logits, targets)


def create_loss(recipe: Recipe) -> TargetLoss:
    """The recipe's loss."""
    return TargetLoss(recipe.smoothing, recipe.bce_loss)
