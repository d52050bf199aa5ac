"""What a recipe is turned into: model, optimizer, schedule, loss and mixup, each by timm's own factory."""
import difflib
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import DistillationTeacher
from timm.utils import freeze
from torch import nn

from .checkpoint import SavedModel, take_prefix_off
from .recipe import Recipe, RecipeError

__all__ = [
    'Distillation', 'check_recipe', 'create_loss', 'create_mixup', 'create_model', 'create_optimizer',
    'create_schedule', 'learned_radii',
]


def create_model(
        recipe: Recipe, num_classes: int, pretrained: bool = False, start: SavedModel | None = None) -> nn.Module:
    """The recipe's model.

    Args:
        recipe: Names the model, its options and what of it is frozen.
        num_classes: Number of classes; a head of another size is drawn anew.
        pretrained: Start from the weights of the model's tag.
        start: Start from these weights.

    Raises:
        RuntimeError: The tag has no weights, or those of `start` do not fit.
    """
    options = {'drop_rate': recipe.drop, 'drop_path_rate': recipe.drop_path, **recipe.model_kwargs}
    if start is not None:
        options['pretrained_cfg_overlay'] = _overlay(recipe, num_classes, start)
    model: Any = timm.create_model(
        recipe.model, pretrained=pretrained or start is not None, num_classes=num_classes, **options)
    for cfg in (model.pretrained_cfg, model.default_cfg):
        cfg.pop('state_dict', None)
    if recipe.freeze:
        freeze(model, list(recipe.freeze))
    network: nn.Module = model
    return network


def _overlay(recipe: Recipe, num_classes: int, start: SavedModel) -> dict[str, Any]:
    """What timm loads in place of the tag's weights."""
    with torch.device('meta'):
        model = timm.create_model(recipe.model, num_classes=num_classes, **recipe.model_kwargs)
    state_dict, _ = take_prefix_off(start.state_dict, model.state_dict().keys())
    classifier = getattr(model, 'pretrained_cfg', {}).get('classifier') or 'fc'
    head = state_dict.get(f'{classifier}.weight')
    return {'state_dict': state_dict, 'num_classes': num_classes if head is None else len(head)}


def check_recipe(recipe: Recipe) -> None:
    """Build all of a recipe without memory, before any data are read.

    Raises:
        RecipeError: timm can make nothing of some keys; the message names them, and what is near the name that was got.
    """
    with torch.device('meta'):
        model = _try(lambda: create_model(recipe, 2), 'model, model_kwargs and freeze', recipe.model, timm.list_models)
        optimizer = _try(lambda: create_optimizer(recipe, model), 'opt and opt_kwargs', recipe.opt, list_optimizers)
        if recipe.teacher and not timm.is_model(recipe.teacher.split('.')[0]):
            _try(lambda: timm.create_model(recipe.teacher), 'teacher', recipe.teacher, timm.list_models)
    _try(lambda: create_schedule(recipe, optimizer, 100), 'lr_cycle_mul, lr_cycle_decay and lr_cycle_limit')


def _try(make: Callable[[], Any], keys: str, name: str = '', known: Callable[[], Sequence[Any]] = list) -> Any:
    try:
        return make()
    except Exception as error:  # timm's and torch's constructors raise what they like
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        near = [] if name in known() else difflib.get_close_matches(name, known(), n=1)
        hint = f'did you mean {near[0]!r}?' if near else 'change one, in the recipe or by --set KEY=VALUE.'
        raise RecipeError(f'timm can make nothing of the recipe keys {keys} ({reason}): {hint}') from error


class Distillation(nn.Module):
    """Kullback-Leibler divergence from a teacher's softened probabilities (Hinton et al., 2015, arXiv 1503.02531)."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, recipe: Recipe, num_classes: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.teacher = DistillationTeacher(
            recipe.teacher, num_classes=num_classes, pretrained_path=recipe.teacher_path or None,
            device=torch.device('cpu'),  # where timm 1.0.24 and older take CUDA; the whole module is moved later
        ).requires_grad_(False)
        self.temperature = recipe.distill_temperature
        self.register_buffer('mean', torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer('std', torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The mean divergence of logits (B, K) for the student's normalised images (B, C, H, W)."""
        with torch.no_grad():
            expected = self.teacher(self.teacher.normalize_input(images, self.mean, self.std)).float()
        student = (logits.float() / self.temperature).log_softmax(dim=1)
        teacher = (expected / self.temperature).log_softmax(dim=1)
        return self.temperature ** 2 * F.kl_div(student, teacher, reduction='batchmean', log_target=True)


def learned_radii(model: nn.Module) -> dict[str, Any]:
    """Each layer's radii in cells of its input grid, by the layer's name; a list where it has several heads."""
    radii = {name: module.radius().tolist() for name, module in model.named_modules() if hasattr(module, 'log_radius')}
    return {name: values if len(values) > 1 else values[0] for name, values in radii.items()}


def create_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer over timm's parameter groups; radii have no weight decay and a learning rate of their own.

    The groups' `lr_scale` is timm's: its schedulers multiply by it.
    """
    radii = {id(p) for name, p in model.named_parameters() if name.endswith('log_radius')}
    # timm's optimizers with a fallback (Muon) leave vectors to it by themselves, but the classifier must be named
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
    restarts: dict[str, Any] = {'cycle_mul': recipe.lr_cycle_mul, 'cycle_decay': recipe.lr_cycle_decay,
                'cycle_limit': recipe.lr_cycle_limit}
    epochs: Any = recipe.decay_epochs or recipe.epochs - (recipe.warmup_epochs if recipe.warmup_prefix else 0)
    scheduler: Scheduler
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=recipe.sched, num_epochs=epochs, min_lr=recipe.min_lr, warmup_lr=recipe.warmup_lr,
        warmup_epochs=recipe.warmup_epochs, warmup_prefix=recipe.warmup_prefix, step_on_epochs=False,
        updates_per_epoch=updates_per_epoch, **restarts)
    return scheduler


def create_mixup(recipe: Recipe, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix, or None where the recipe has neither."""
    if not recipe.mixup and not recipe.cutmix:
        return None
    return Mixup(
        mixup_alpha=recipe.mixup, cutmix_alpha=recipe.cutmix, prob=recipe.mixup_prob,
        switch_prob=recipe.mixup_switch_prob, label_smoothing=recipe.smoothing, num_classes=num_classes)


class TargetLoss(nn.Module):
    """Cross entropy for class indices, smoothed, and for the soft targets that mixup makes; binary where asked."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.soft: nn.Module = SoftTargetCrossEntropy()
        self.hard: nn.Module = LabelSmoothingCrossEntropy(recipe.smoothing)
        if recipe.bce_loss:
            threshold = recipe.bce_target_thresh or None
            self.soft = BinaryCrossEntropy(0, target_threshold=threshold, sum_classes=recipe.bce_sum)
            self.hard = BinaryCrossEntropy(
                recipe.smoothing, target_threshold=threshold, sum_classes=recipe.bce_sum)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean loss of logits (B, K) for targets (B,) or (B, K)."""
        loss: torch.Tensor = (self.soft if targets.ndim == 2 else self.hard)(logits, targets)
        return loss


def create_loss(recipe: Recipe) -> TargetLoss:
    """The recipe's loss."""
    return TargetLoss(recipe)
