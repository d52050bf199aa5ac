"""Recovery: training that starts from a folder of `timm-geoprior convert`, with its source as the teacher."""
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from timm.models import get_arch_pretrained_cfgs

from ..errors import GeoPriorError
from ..files import file_sha256, first_line
from .loaders import model_cfg
from .recipe import SOURCE, Recipe, RunConfig

FILES = ('config.json', 'results.json', 'model.safetensors')
PREPARATION = ('mean', 'std', 'crop_pct', 'interpolation')


def start_from_folder(recipe: Recipe, config: RunConfig) -> tuple[Recipe, RunConfig, str]:
    """Take model, weights, classes and teacher from the folder that `--finetune` names, if it names one.

    Args:
        recipe: A recipe; its teacher is replaced if it is 'source', its model in any case.
        config: Where and how it is run.

    Returns:
        Both, completed from the folder, and a message for the user; unchanged, and '', if no folder is named.

    Raises:
        GeoPriorError: The folder is not one of `timm-geoprior convert`, its source is missing or has changed, or the
            recipe needs a folder and none is named.
    """
    folder = Path(config.finetune)
    if config.finetune in ('', 'pretrained') or not folder.is_dir():
        if recipe.teacher == SOURCE:
            raise GeoPriorError(f'--finetune must name the folder that `timm-geoprior convert` wrote, since the '
                                f'teacher of the recipe {recipe.name} is its source, got '
                                f'{config.finetune or "nothing"}.')
        return recipe, config, ''
    written, source = _read(folder)
    model, model_kwargs = _model(written)
    classes = tuple(written.get('label_names') or map(str, range(written['num_classes'])))
    recipe = replace(recipe, model=model, model_kwargs={**recipe.model_kwargs, **model_kwargs})
    told = f'{folder}: {model}, converted from {source["name"]}'
    if recipe.teacher == SOURCE:
        path = recipe.teacher_path or source.get('checkpoint') or ''
        if path:
            _check_teacher(Path(path), folder, source)
        recipe = replace(recipe, teacher=source['name'], teacher_path=path)
        told += f', which is the teacher{f" ({path})" if path else ""}'
    config = replace(config, finetune=str(folder / 'model.safetensors'), class_names=classes)
    return recipe, config, f'{told}.'


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of config.json, and the source named in results.json."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise _other_folder(folder, f'one without {missing[0]}')
    try:
        written, results = (json.loads((folder / name).read_text(encoding='utf-8')) for name in FILES[:2])
    except (OSError, ValueError) as error:
        raise _other_folder(folder, f'one whose config.json or results.json cannot be read ({first_line(error)})'
                            ) from None
    _check(folder, 'config.json', written, architecture=str, num_classes=int)
    _check(folder, 'results.json', results, source=dict)
    _check(folder, 'results.json', results['source'], name=str)
    if written['num_classes'] < 1:
        raise GeoPriorError(f'{folder} must have a classifier to be trained, got a network without classes. '
                            f'Convert one that has classes.')
    return written, results['source']


def _check(folder: Path, name: str, content: Any, /, **kinds: type) -> None:
    """Refuse a file in which a key is missing, empty or of another type."""
    for key, kind in kinds.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind) or content[key] == '':
            raise _other_folder(folder, f'one whose {name} has no valid {key}')


def _other_folder(folder: Path, got: str) -> GeoPriorError:
    return GeoPriorError(f'{folder} must be a folder that `timm-geoprior convert` wrote, got {got}. Check --finetune.')


def _model(written: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and options of the network, including its preprocessing where that differs from the name's."""
    cfg, name, options = written.get('pretrained_cfg') or {}, written['architecture'], written.get('model_args') or {}
    tagged = f'{name}.{cfg.get("tag")}'
    if not options and tagged in get_arch_pretrained_cfgs(name):
        name = tagged
    known = json.loads(json.dumps(model_cfg(name)))  # tuples become lists, as in config.json
    other = {key: cfg[key] for key in PREPARATION if cfg.get(key) not in (None, known.get(key))}
    return name, {**options, **({'pretrained_cfg_overlay': other} if other else {})}


def _check_teacher(path: Path, folder: Path, source: dict[str, Any]) -> None:
    if not path.is_file():
        raise GeoPriorError(f'The teacher {path}, from which {folder} was converted, does not exist. Put it back, or '
                            f'give its path with --set teacher_path=FILE.')
    if file_sha256(path) != source.get('sha256'):
        raise GeoPriorError(f'The teacher {path} must be the file from which {folder} was converted, got another '
                            f'SHA-256. Convert it again, or name another teacher with --set teacher=NAME.')
