"""Recipes: what is rejected, and what the shipped ones build, against the tables of the publications."""
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import nn

from timm_geoprior.errors import GeoPriorError
from timm_geoprior.radii import radii_in_cells
from timm_geoprior.training.loaders import make_transform
from timm_geoprior.training.parts import (
    TargetLoss,
    build_mixup,
    build_model,
    build_optimizer,
    build_schedule,
    check_recipe,
)
from timm_geoprior.training.recipe import Recipe, load_recipe, make_recipe, recipe_names

LEAST = {'name': 'x', 'model': 'geoprior_resnet14_nano', 'epochs': 1, 'batch_size': 8, 'lr': 0.1, 'img_size': 32}


class TestRefusals:
    @pytest.mark.parametrize(('changes', 'message'), [
        ({'weight_decai': 0.1}, "Unknown key 'weight_decai' in the recipe: did you mean 'weight_decay'?"),
        ({'zzz': 1}, "Unknown key 'zzz' in the recipe: see"),
        ({'epochs': 'ten'}, "The recipe key 'epochs' must be of type int, got 'ten'."),
        ({'epochs': True}, "The recipe key 'epochs' must be of type int, got True."),
        ({'epochs': 0}, "The recipe key 'epochs' must be at least 1, got 0."),
        ({'lr': -1}, "The recipe key 'lr' must be more than 0, got -1.0."),
        ({'lr': 'fast'}, "The recipe key 'lr' must be of type float, got 'fast'."),
        ({'name': 'a\ud800'}, "The recipe key 'name' must be text that can be written in UTF-8, got 'a\\ud800'."),
        ({'smoothing': 1.5}, "The recipe key 'smoothing' must be from 0 to 1, got 1.5."),
        ({'scale': [0.5]}, "The recipe key 'scale' must be of type tuple[float, float], got [0.5]."),
        ({'scale': [0.9, 0.5]}, "The recipe key 'scale' must be two shares of the area"),
        ({'progressive': [[3, 48]]}, "The recipe key 'progressive' must be pairs of first epoch and size"),
        ({'amp_dtype': 'int8'}, "The recipe key 'amp_dtype' must be bfloat16 or float16, got 'int8'."),
        ({'sched': 'cosin'}, "The recipe key 'sched' must be cosine or tanh or poly, got 'cosin'."),
        ({'in_memory': True, 'aa': 'rand-m9'}, "The recipe key 'aa' must be left out with in_memory"),
        ({'radius_lr': -0.1}, "The recipe key 'radius_lr' must be 0 or more, got -0.1."),
        ({'lr': '.inf'}, "The recipe key 'lr' must be of type float, got '.inf'."),
        ({'weight_decay': math.nan}, "The recipe key 'weight_decay' must be of type float, got nan."),
        ({'min_lr': 1}, "The recipe key 'min_lr' must be at most lr, 0.1, got 1.0."),
        ({'lr_cycle_limit': 0}, "The recipe key 'lr_cycle_limit' must be at least 1, got 0."),
        ({'progressive': [[0, 0]]}, "The recipe key 'progressive' must be pairs of first epoch and size"),
    ])
    def test_keys_and_values(self, changes, message):
        with pytest.raises(GeoPriorError) as error:
            make_recipe({**LEAST, **changes})
        assert message in str(error.value)

    @pytest.mark.parametrize(('changes', 'message'), [
        ({'model': 'geoprior_resnet5'}, r"model, model_kwargs and freeze \(Unknown model.*did you mean 'geoprior_"),
        ({'model_kwargs': {'fo': 1}}, r"unexpected keyword argument 'fo'\): change one, in the recipe or with --set"),
        ({'model': 'convnext_atto', 'freeze_norms': True}, 'unless the batch norms of the model are BatchNorm2d'),
        ({'model': 'levit_128', 'freeze_norms': True}, 'unless the batch norms of the model are BatchNorm2d'),
        ({'freeze': ['layr1']}, 'has no attribute `layr1`'),
        ({'opt': 'sgdd'}, r"opt and opt_kwargs \(.*sgdd.*did you mean 'sgd'\?"),
        ({'opt_kwargs': {'nesterv': True}}, "unexpected keyword argument 'nesterv'"),
        ({'model': 'test_vit', 'img_size': 100}, r'model and model_kwargs at 100 px \(Input height \(100\) should be'),
        ({'teacher': 'resnet5'}, r"teacher \(Unknown model.*did you mean 'resnet50'\?"),
    ])
    def test_what_timm_cannot_build(self, changes, message):
        with pytest.raises(GeoPriorError, match=message):
            check_recipe(make_recipe({**LEAST, **changes}))

    @pytest.mark.parametrize('changes', [{'aa': 'randm'}, {'interpolation': 'bic'}, {'remode': 'x', 'reprob': 0.1}])
    def test_augmentation_that_timm_does_not_have(self, changes):
        norms = {'mean': (0.5,) * 3, 'std': (0.5,) * 3}
        with pytest.raises(GeoPriorError, match='timm does not accept the recipe keys aa = '):
            make_transform(make_recipe({**LEAST, **changes}), norms)

    def test_a_missing_key(self):
        with pytest.raises(GeoPriorError, match="lacks the key 'lr'"):
            make_recipe({key: value for key, value in LEAST.items() if key != 'lr'})

    @pytest.mark.parametrize(('content', 'message'), [
        (b'- a list', 'must hold keys and values, got a list'),
        (b'a: [', r'must be YAML with keys and values \([^\n]*\)\. Check'),
        (b'\xff\xfe\xff', 'must be a YAML file in UTF-8')])
    def test_files(self, tmp_path, content, message):
        path = tmp_path / 'recipe.yaml'
        path.write_bytes(content)
        with pytest.raises(GeoPriorError, match=message):
            load_recipe(path)

    def test_names(self):
        with pytest.raises(GeoPriorError, match="The recipe must be a YAML file or one of a1, a2, a3, .*, got 'a4'"):
            load_recipe('a4')

    def test_overrides(self):
        recipe = load_recipe('a1', ['lr=1e-4', 'epochs=3', 'scale=[0.5, 1]'])
        assert (recipe.lr, recipe.epochs, recipe.scale) == (1e-4, 3, (0.5, 1.0))
        for override, message in (
                ('lr', "An override must be key=value, got 'lr'"), ('lr=[', r"value of 'lr=\[' must be YAML")):
            with pytest.raises(GeoPriorError, match=message):
                load_recipe('a1', [override])


def rates(recipe: Recipe, updates: int = 4) -> list[float]:
    """Learning rate of the weights at each update."""
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(recipe, model)
    schedule = build_schedule(recipe, optimizer, updates)
    found = []
    for update in range(recipe.epochs * updates):
        schedule.step_update(update)
        found.append(optimizer.param_groups[-1]['lr'])
    return found


# name: optimizer class, epochs, batch, warm-up epochs, first, peak and last learning rate, weight decay
PUBLISHED = {
    'a1': ('Lamb', 600, 2048, 5, 1e-4, 5e-3, 1e-6, 0.01),
    'a2': ('Lamb', 300, 2048, 5, 1e-4, 5e-3, 1e-6, 0.02),
    'a3': ('Lamb', 100, 2048, 5, 1e-4, 8e-3, 1e-6, 0.02),
    'sgd100': ('SGD', 100, 256, 5, 0, 0.1, 0, 1e-4),
    'torchvision_v2': ('SGD', 600, 1024, 5, 5e-3, 0.5, 0, 2e-5),
    'paper_in1k': ('SGD', 164, 256, 15, 0, 0.05, 0, 1e-4),
    'paper_tin200': ('SGD', 324, 256, 15, 0, 0.05, 0, 1e-4),
    'r64_tin200': ('SGD', 48, 256, 2, 0, 0.5, 0, 3e-4),
    'r80_tin200': ('SGD', 100, 256, 2, 0, 0.5, 0, 3e-4),
    'r128_tin200': ('SGD', 37, 512, 2, 0, 0.8, 0, 5e-4),
    'r192_tin200': ('SGD', 111, 512, 3, 0, 0.5, 0, 5e-4),
    'warm_in1k': ('SGD', 3, 256, 0, 2.4e-3, 2.4e-3, 0, 1e-4),
    'warm_tin200': ('SGD', 3, 256, 0, 0.05, 0.05, 0, 3e-4),
    'finetune': ('AdamW', 10, 64, 1, 0, 1e-3, 0, 0.05),
}


def test_every_recipe_is_held_to_a_table():
    assert set(recipe_names()) == set(PUBLISHED)


@pytest.mark.parametrize('name', PUBLISHED)
class TestShipped:
    def test_optimizer_and_schedule(self, name):
        kind, epochs, batch_size, warmup, first, peak, last, decay = PUBLISHED[name]
        recipe = load_recipe(name)
        optimizer = build_optimizer(recipe, nn.Linear(2, 2))
        assert (recipe.name, recipe.epochs, recipe.batch_size) == (name, epochs, batch_size)
        assert type(optimizer).__name__ == kind
        # of the bias and of the weights
        assert [group['weight_decay'] for group in optimizer.param_groups] == [0, pytest.approx(decay)]
        updates = 4
        found = rates(recipe, updates)
        assert found[0] == pytest.approx(first)
        # the cosine begins after the warm-up, or has already fallen during it, as in timm and "Bag of Tricks"
        begin = warmup if recipe.warmup_prefix else 0
        end = epochs if not recipe.lr_cycle_limit > 1 else min(r for r in (25, 45, 85, 165, 325) if r > epochs)
        begin_last = begin if not recipe.lr_cycle_limit > 1 else max(r for r in (25, 45, 85, 165, 325) if r < epochs)

        def cosine(epoch, begin):
            return last + (peak - last) / 2 * (1 + math.cos(math.pi * (epoch - begin) / (end - begin)))

        assert max(found) == found[warmup * updates] == pytest.approx(cosine(warmup, begin) if not begin else peak)
        assert found[-1] == pytest.approx(cosine(epochs - 1 / updates, begin_last))

    def test_model_loss_and_augmentation(self, name):
        recipe = load_recipe(name)
        check_recipe(recipe)
        loss = TargetLoss(recipe)
        targets = torch.tensor([1, 3])
        mixup = build_mixup(recipe, 4)
        if mixup:
            assert isinstance(mixup, Mixup)
            _, targets = mixup(torch.zeros(2, 3, 8, 8), targets)
        assert math.isfinite(loss(torch.randn(2, 4), targets))
        norms = {'mean': (0.5,) * 3, 'std': (0.5,) * 3}
        steps = str(make_transform(recipe, norms)(recipe.img_size))
        assert ('RandAugment' in steps) == recipe.aa.startswith('rand')
        assert ('TrivialAugmentWide' in steps) == (recipe.aa == 'ta_wide')
        assert ('RandomErasing' in steps) == bool(recipe.reprob)

    def test_the_tag_is_one_for_the_data(self, name):
        """So that a network is evaluated as is usual for its data, whatever the architecture's default tag is."""
        recipe = load_recipe(name)
        cfg = timm.get_pretrained_cfg(recipe.model)
        of_imagenet = 'tin200' not in name and (recipe.img_size > 128 or 'in1k' in name)
        assert (cfg.num_classes, cfg.crop_pct) == ((1000, 0.875) if of_imagenet else (200, 1.0))


@pytest.mark.parametrize('name', ['paper_in1k', 'paper_tin200'])
def test_the_papers_restarts(name):
    """Warm-up over 15 epochs, restarts at 25, 45, 85, 165 (the experiments section of arXiv 2006.07872)."""
    recipe = load_recipe(name)
    updates = 10
    found = rates(recipe, updates)
    jumps = [i / updates for i in range(1, len(found)) if found[i] > 5 * found[i - 1] and i > 15 * updates]
    assert jumps == [restart for restart in (25, 45, 85, 165) if restart < recipe.epochs]
    assert all(found[restart * updates] == pytest.approx(0.05) for restart in (15, *map(int, jumps)))
    assert found[5 * updates] == pytest.approx(0.05 / 3)


def test_resnet_strikes_back_table_2():
    """Columns A1, A2, A3 of table 2 of arXiv 2110.00476."""
    keys = ('img_size', 'eval_size', 'weight_decay', 'smoothing', 'drop_path', 'aug_repeats', 'mixup', 'cutmix',
            'bce_loss', 'aa')
    found = {name: tuple(getattr(load_recipe(name), key) for key in keys) for name in ('a1', 'a2', 'a3')}
    assert found == {
        'a1': (224, 224, 0.01, 0.1, 0.05, 3, 0.2, 1.0, True, 'rand-m7-mstd0.5-inc1'),
        'a2': (224, 224, 0.02, 0.0, 0.05, 3, 0.1, 1.0, True, 'rand-m7-mstd0.5-inc1'),
        'a3': (160, 224, 0.02, 0.0, 0.0, 0, 0.1, 1.0, True, 'rand-m6-mstd0.5-inc1'),
    }


def test_torchvisions_second_recipe():
    """The command in references/classification; the EMA decay as its train.py computes it from 0.00002."""
    recipe = load_recipe('torchvision_v2')
    keys = ('img_size', 'eval_size', 'smoothing', 'aug_repeats', 'mixup', 'cutmix', 'mixup_switch_prob', 'aa', 'reprob',
            'remode', 'interpolation', 'momentum')
    assert tuple(getattr(recipe, key) for key in keys) == (
        176, 224, 0.1, 4, 0.2, 1.0, 0.5, 'ta_wide', 0.1, 'const', 'bilinear', 0.9)
    assert recipe.model_ema_decay == pytest.approx((1 - 2e-5 * 8 * 128 * 32 / 600) ** (1 / 32), abs=2e-7)


@pytest.mark.parametrize('name', ['paper_in1k', 'paper_tin200', 'torchvision_v2'])
def test_plain_momentum(name):
    """As in torch.optim.SGD; timm's "sgd" uses Nesterov momentum."""
    group = build_optimizer(load_recipe(name), nn.Linear(2, 2)).param_groups[0]
    assert (group['momentum'], group['nesterov']) == (0.9, False)


def test_bag_of_tricks():
    """Sections 3.1 and 5 of arXiv 1812.01187."""
    recipe = load_recipe('sgd100')
    group = build_optimizer(recipe, nn.Linear(2, 2)).param_groups[0]
    assert (group['momentum'], group['nesterov'], recipe.smoothing, recipe.img_size) == (0.9, True, 0.1, 224)


class TestParts:
    @pytest.mark.parametrize(('changes', 'expected'), [
        ({}, lambda x, y: F.cross_entropy(x, y)),
        ({'smoothing': 0.1}, lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1)),
        ({'bce_loss': True}, lambda x, y: F.binary_cross_entropy_with_logits(x, F.one_hot(y, 5).float())),
        ({'bce_loss': True, 'smoothing': 0.1},
         lambda x, y: F.binary_cross_entropy_with_logits(x, 0.9 * F.one_hot(y, 5) + 0.02)),
    ])
    def test_losses(self, changes, expected):
        loss = TargetLoss(make_recipe({**LEAST, **changes}))
        logits, targets = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
        assert loss(logits, targets) == pytest.approx(expected(logits, targets).item())

    def test_losses_of_mixed_targets(self):
        logits, mixed = torch.randn(1, 3), torch.tensor([[0.7, 0.3, 0.0]])
        loss = TargetLoss(make_recipe({**LEAST, 'bce_loss': True, 'bce_target_thresh': 0.2}))
        both = torch.tensor([[1.0, 1.0, 0.0]])
        assert loss(logits, mixed) == pytest.approx(F.binary_cross_entropy_with_logits(logits, both).item())
        assert TargetLoss(make_recipe(LEAST))(logits, mixed) == pytest.approx(F.cross_entropy(logits, mixed).item())

    def test_every_key_of_the_augmentation_arrives(self):
        recipe = make_recipe({
            **LEAST, 'scale': [0.3, 0.9], 'ratio': [0.5, 2], 'hflip': 0.25, 'interpolation': 'bilinear',
            'color_jitter': 0.4, 'aa': 'ta_wide', 'reprob': 0.1, 'remode': 'const', 'mixup': 0.2, 'cutmix': 0.7,
            'mixup_prob': 0.6, 'mixup_switch_prob': 0.3, 'smoothing': 0.1})
        steps = str(make_transform(recipe, {'mean': (0.5,) * 3, 'std': (0.5,) * 3})(32))
        for part in ('size=(32, 32), scale=(0.3, 0.9), ratio=(0.5, 2.0), interpolation=bilinear', 'Flip(p=0.25)',
                     'ColorJitter(brightness=(0.6, 1.4)', 'RandomErasing(p=0.1, mode=const',
                     'TrivialAugmentWide(num_magnitude_bins=31, interpolation=InterpolationMode.BILINEAR'):
            assert part in steps
        mixup = build_mixup(recipe, 10)
        assert [getattr(mixup, key) for key in (
            'mixup_alpha', 'cutmix_alpha', 'mix_prob', 'switch_prob', 'label_smoothing')] == [0.2, 0.7, 0.6, 0.3, 0.1]

    def test_every_key_of_model_and_optimizer_arrives(self):
        recipe = make_recipe(
            {**LEAST, 'drop': 0.2, 'drop_path': 0.3, 'momentum': 0.8, 'opt_kwargs': {'nesterov': False}})
        model = build_model(recipe, 10)
        assert (model.drop_rate, model.layer4[-1].drop_path.drop_prob) == (0.2, pytest.approx(0.3))
        group = build_optimizer(recipe, model).param_groups[0]
        assert (group['momentum'], group['nesterov']) == (0.8, False)

    def test_radii_have_a_rate_of_their_own_and_no_decay(self):
        recipe = make_recipe({**LEAST, 'weight_decay': 0.1, 'radius_lr': 0.01})
        model = build_model(recipe, 10)
        optimizer = build_optimizer(recipe, model)
        schedule = build_schedule(recipe, optimizer, 4)
        schedule.step_update(0)
        radii = {id(p) for name, p in model.named_parameters() if 'log_radius' in name}
        groups = [g for g in optimizer.param_groups if {id(p) for p in g['params']} & radii]
        assert len(groups) == 1
        assert {id(p) for p in groups[0]['params']} == radii
        assert groups[0]['weight_decay'] == 0
        assert groups[0]['lr'] == pytest.approx(0.01 * 0.1)
        assert sum(len(g['params']) for g in optimizer.param_groups) == len(list(model.parameters()))

    def test_frozen_modules_stay(self):
        recipe = make_recipe({**LEAST, 'freeze': ['conv1', 'bn1', 'layer1']})
        model = build_model(recipe, 10)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = build_optimizer(recipe, model)
        model.train()(torch.randn(4, 3, 32, 32)).sum().backward()
        optimizer.step()
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert not [name for name in changed if name.startswith(('conv1', 'bn1', 'layer1'))]
        assert 'fc.weight' in changed

    def test_frozen_norms_stay(self):
        model = build_model(make_recipe({
            **LEAST, 'freeze_norms': True, 'freeze': ['bn1'], 'model_kwargs': {'pretrained_cfg_overlay': None}}), 10)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = build_optimizer(make_recipe(LEAST), model)
        model.train()(torch.randn(4, 3, 32, 32)).sum().backward()
        optimizer.step()
        plain = timm.create_model('geoprior_resnet14_nano')
        norms = [name for name, module in plain.named_modules() if isinstance(module, nn.BatchNorm2d)]
        stayed = {name.rpartition('.')[0] for name, value in model.state_dict().items()
                  if torch.equal(value, before[name]) and name.endswith('running_mean')}
        assert stayed == set(norms)
        assert not torch.equal(model.state_dict()['fc.weight'], before['fc.weight'])

    def test_radii_by_layer(self):
        model = build_model(make_recipe({**LEAST, 'model_kwargs': {'attn_radius': 2.0, 'attn_heads': 2}}), 10)
        assert radii_in_cells(model)['layer4.0.conv2.attn'] == pytest.approx([2.0, 2.0])
        assert radii_in_cells(timm.create_model('test_resnet')) == {}
