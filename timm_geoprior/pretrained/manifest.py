"""The weights manifest: which tags exist, the hashes of their files, and what was measured with them.

`weights_manifest.json` is the single source: timm's `default_cfgs`, the README's table, model cards and the Hub's
config.json are generated from it. It is read from the package in a wheel and from the project's root in an editable
install. Reading it needs only the standard library.
"""
import functools
import json
import re
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from ..errors import GeoPriorError, write_advice
from ..files import first_line, write_atomically

SCHEMA_VERSION = 1
FILE_NAME = 'weights_manifest.json'
# architectures that have a tag `from_TAG` for each of timm's tags of a ResNet
SOURCES = {'geoprior_resnet50': 'resnet50', 'geoprior_resnet101': 'resnet101', 'geoprior_resnet152': 'resnet152'}
Status = Literal['planned', 'staged', 'bundled', 'published', 'converted']

_T = TypeVar('_T')


class ManifestError(GeoPriorError):
    """The manifest is missing or malformed, cannot be written, or does not have the requested name."""


def _check(condition: bool, where: str, got: object, wanted: str) -> None:
    if not condition:
        raise ManifestError(f'{where} must be {wanted}, got {got!r}.')


def _hex(digits: int) -> tuple[Callable[[str], object], str]:
    return re.compile(f'[0-9a-f]{{{digits}}}').fullmatch, f'{digits} lower-case hexadecimal digits'


# requirements beyond the type, for the values of a key wherever it is in the file
_RULES: dict[str, tuple[Callable[[Any], object], str]] = {
    **dict.fromkeys(('num_classes', 'num_images', 'img_size', 'parameters', 'bytes'),
                    (lambda value: value > 0, 'above 0')),
    **dict.fromkeys(('epochs', 'hours', 'seed'), (lambda value: value >= 0, '0 or more')),
    'crop_pct': (lambda value: 0 < value <= 1, 'a share above 0 and up to 1'),
    'input_size': (lambda sizes: min(sizes) > 0, 'sizes above 0 (channels, height, width)'),
    'std': (lambda values: min(values) > 0, 'numbers above 0'),
    'sha256': _hex(64),
    'revision': _hex(40),
    'hub_id': (re.compile('[^/]+/[^/]+').fullmatch, 'owner/name'),
    'file': (re.compile(r'(golden/)?[^/\\]+\.safetensors').fullmatch, 'a bare file name that ends in .safetensors'),
}


@dataclass(frozen=True)
class LabelSet:
    """The classes of a data set, in class order; the manifest has each label set once."""
    title: str  # the usual name of the data set
    hub_dataset: str  # its name among the Hub's data sets
    source: Literal['timm', 'manifest']  # 'timm' if timm ships the classes under the same name, else 'manifest'
    num_classes: int
    # WordNet id -> name, in class order; empty if timm has them
    classes: dict[str, str] = field(default_factory=dict)
    name: str = field(default='', metadata={'key': True})

    def __post_init__(self) -> None:
        if self.source == 'manifest':
            _check(len(self.classes) == self.num_classes, f'num_classes of {self.name}', self.num_classes,
                   f'{len(self.classes)}, as many as it lists')

    @functools.cached_property
    def _resolved(self) -> dict[str, str]:
        if self.source == 'manifest':
            return self.classes
        from timm.data import ImageNetInfo  # reads two files of 22,000 lines: not at import
        info = ImageNetInfo(self.name)
        return {wnid: info.label_name_to_description(wnid) for wnid in info.label_names()}

    @property
    def wnids(self) -> tuple[str, ...]:
        """WordNet ids, in class order."""
        return tuple(self._resolved)

    @property
    def names(self) -> tuple[str, ...]:
        """Readable names, in class order."""
        return tuple(self._resolved.values())


@dataclass(frozen=True)
class InputConfig:
    """How an image becomes the network's input at evaluation, in timm's terms."""
    input_size: tuple[int, int, int]
    interpolation: str
    crop_pct: float
    crop_mode: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Metric:
    """A tag's result on a data set, as whole counts, so that it can be reproduced exactly.

    Attributes:
        precision: The dtype of the computation: 'float32', 'bfloat16' or 'float16'.
        img_size: Height and width of the input, in pixels.
        software: Package -> version used for the measurement.
    """
    dataset: str
    split: str
    num_images: int
    top1_correct: int
    top5_correct: int
    precision: str
    img_size: int
    software: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self.num_images > 0, 'num_images', self.num_images, 'above 0')
        _check(0 <= self.top1_correct <= self.top5_correct <= self.num_images, 'top1_correct and top5_correct',
               (self.top1_correct, self.top5_correct), f'counts in this order, from 0 to {self.num_images}')

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * self.top1_correct / self.num_images

    @property
    def top5(self) -> float:
        """Top-5 accuracy in percent."""
        return 100 * self.top5_correct / self.num_images


@dataclass(frozen=True)
class Baseline:
    """A plain network trained with the same recipe on the same data, for comparison."""
    architecture: str
    parameters: int
    metric: Metric


@dataclass(frozen=True)
class TrainLog:
    """Summary of the training log."""
    epochs: int
    hours: float
    hardware: str
    software: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Golden:
    """A fixed input and the logits it gave, as safetensors beside the weights."""
    file: str
    sha256: str


@dataclass(frozen=True)
class Source:
    """The trained ResNet that a tag's weights are converted from."""
    name: str  # timm's name for it, such as 'resnet50.a1_in1k'
    # top-1 accuracy on ImageNet-1k in percent at the tag's input size and crop, as published by timm
    top1: float | None = None
    top5: float | None = None  # top-5 accuracy likewise


@dataclass(frozen=True)
class ConvertedEntry:
    """What the manifest stores about a converted tag; the rest comes from timm's registry."""
    # commit of the source's repository on the Hub that the tag is pinned to, 40 hexadecimal digits
    revision: str | None = None
    sha256: str | None = None  # SHA-256 of the source's model.safetensors
    bytes: int | None = None  # its size
    metrics: tuple[Metric, ...] = ()  # what was measured with the converted weights

    def __post_init__(self) -> None:
        pin = (self.revision, self.sha256, self.bytes)
        _check(all(pin) or pin == (None, None, None), 'revision, sha256 and bytes', pin, 'all given or all left out')


@dataclass(frozen=True)
class ModelEntry:
    """One tag of an architecture.

    Attributes:
        status: 'planned' (no weights yet), 'staged' (made, not released), 'bundled' (in this package), 'published', or
            'converted' (from a trained ResNet of timm, when it is loaded).
        default: Whether the architecture's name alone means this tag.
        hub_id: 'owner/name' of the Hub repository.
        revision: Commit of that repository, 40 hexadecimal digits.
        file: Name of the weights file, in the package's weights folder if bundled, in the repository if published.
        sha256: SHA-256 of that file.
        bytes: Its size.
        dtype: Dtype of its tensors with two or more dimensions; the others are float32.
        license: SPDX identifier of the weights' licence.
        data_terms: Terms of the data that the weights were trained on.
        label_set: Name of the label set.
        first_conv: Name of the network's first convolution, which timm adapts to other numbers of input channels.
        recipe: Name of the recipe, a file of timm_geoprior/training/recipes without its extension.
        recipe_commit: Commit of this project that it was trained with.
        base_model: Tag or Hub id of the weights that training started from, if any.
        num_classes: Number of classes; 0 for a backbone.
        source: What the weights are converted from; the file, its size and its hash are then the source's.
    """
    status: Status
    default: bool
    license: str
    data_terms: str
    input: InputConfig
    label_set: str
    first_conv: str = 'conv1'
    parameters: int | None = None
    hub_id: str | None = None
    revision: str | None = None
    file: str | None = None
    sha256: str | None = None
    bytes: int | None = None
    dtype: Literal['float16', 'float32'] | None = None
    golden: Golden | None = None
    recipe: str | None = None
    recipe_commit: str | None = None
    base_model: str | None = None
    seed: int | None = None
    metrics: tuple[Metric, ...] = ()
    baseline: Baseline | None = None
    train_log: TrainLog | None = None
    name: str = field(default='', metadata={'key': True})
    num_classes: int = field(default=0, metadata={'key': True})
    source: Source | None = field(default=None, metadata={'key': True})

    def __post_init__(self) -> None:
        _check(re.fullmatch(r'[a-z0-9_]+\.[a-z0-9_]+', self.name) is not None, 'A model name', self.name,
               'architecture.tag of lower-case letters, digits and underscores')
        own = ('file', 'sha256', 'bytes', 'dtype', 'golden', 'parameters')
        needed = {'planned': (), 'converted': ('source', 'hub_id', 'file'), 'published': (*own, 'hub_id', 'revision')}
        for name in needed.get(self.status, own):
            value = getattr(self, name)
            _check(value is not None, f'{name} of {self.name}', value, f'given, since its status is {self.status}')

    @property
    def architecture(self) -> str:
        """The name's part before the dot."""
        return self.name.split('.')[0]

    @property
    def tag(self) -> str:
        """The name's part after the dot."""
        return self.name.split('.')[1]

    @property
    def has_weights(self) -> bool:
        """Whether `pretrained=True` finds weights."""
        return self.status in ('bundled', 'published', 'converted')

    @property
    def is_released(self) -> bool:
        """Whether there is a file of this project's own, in the package or on the Hub."""
        return self.status in ('bundled', 'published')


@dataclass(frozen=True)
class Manifest:
    """The whole manifest; models are in file order.

    Attributes:
        models: The tags that the file describes.
        converted: What the file stores about converted tags; it need not name all of them.
    """
    schema_version: int
    label_sets: dict[str, LabelSet]
    models: dict[str, ModelEntry]
    converted: dict[str, ConvertedEntry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for architecture in {entry.architecture for entry in self.models.values()}:
            defaults = [e.name for e in self.models.values() if e.architecture == architecture and e.default]
            if architecture in SOURCES:
                _check(not defaults, f'default of {architecture}', defaults, 'left to a converted tag')
            else:
                _check(len(defaults) == 1, f'default of {architecture}', defaults, 'one tag')

    @functools.cached_property
    def tags(self) -> dict[str, ModelEntry]:
        """All tags, those of `models` and the converted ones, by architecture."""
        from .cfgs import converted_entries  # imports timm

        entries = [*self.models.values(), *converted_entries(self)]
        order = {architecture: place for place, architecture in enumerate(dict.fromkeys(
            entry.architecture for entry in entries))}
        return {entry.name: entry for entry in sorted(entries, key=lambda entry: order[entry.architecture])}

    def find(self, name: str) -> ModelEntry | None:
        """Like `get`, but returns None if there is no such name."""
        return next((entry for entry in self.tags.values()
                     if name == entry.name or (name == entry.architecture and entry.default)), None)

    def get(self, name: str) -> ModelEntry:
        """Look up 'architecture.tag', or an architecture for its default tag.

        Raises:
            ManifestError: There is no such name; the message lists valid ones.
        """
        if entry := self.find(name):
            return entry
        same = [entry.name for entry in self.tags.values() if entry.architecture == name.partition('.')[0]]
        raise ManifestError(f'The model must be one of {", ".join(same or self.models)}, got {name!r}.')

    def to_json(self) -> str:
        """The file's text."""
        return to_json(self)


def to_json(value: Any) -> str:
    """Dataclasses of this module as JSON: absent values left out, lists of numbers on one line."""
    text = json.dumps(_plain(value), indent=2, ensure_ascii=False)
    return re.sub(r'\[[\s\d.,-]+\]', lambda match: '[' + ' '.join(match[0][1:-1].split()) + ']', text) + '\n'


def _plain(value: Any) -> Any:
    """Convert dataclasses to JSON's types, without absent values and without fields that the file does not store."""
    if is_dataclass(value):
        stored = {f.name: getattr(value, f.name) for f in fields(value) if not f.metadata.get('key')}
        return {name: _plain(item) for name, item in stored.items() if item is not None and item not in ({}, ())}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _parse(kind: Any, value: Any, where: str, **given: Any) -> Any:
    """Convert a JSON value to the type `kind`, or say where it does not fit."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        return _parse_dataclass(cast(type, kind), value, where, given)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _parse(args[0], value, where)
    if origin is Literal:
        _check(value in args, where, value, f'one of {", ".join(args)}')
        return value
    if origin is dict:
        _check(isinstance(value, dict), where, value, 'an object')
        # the keys of an object of models or label sets are their names
        named = is_dataclass(args[1]) and any(f.name == 'name' for f in fields(args[1]))
        return {key: _parse(args[1], item, f'{where}.{key}', **{'name': key} if named else {})
                for key, item in value.items()}
    if origin is tuple:
        length = len(value) if isinstance(value, list) and args[-1] is Ellipsis else len(args)
        _check(isinstance(value, list) and len(value) == length, where, value, f'a list of {length} values')
        return tuple(_parse(args[0], item, f'{where}[{i}]') for i, item in enumerate(value))
    accepted = (int, float) if kind is float else kind
    _check(isinstance(value, accepted) and (kind is bool or not isinstance(value, bool)), where, value,
           f'of the type {kind.__name__}')
    return kind(value)


def _parse_dataclass(kind: type[_T], value: Any, where: str, given: dict[str, Any]) -> _T:
    _check(isinstance(value, dict), where, value, 'an object')
    hints = typing.get_type_hints(kind)
    stored = {f.name: f for f in fields(cast(Any, kind)) if not f.metadata.get('key')}
    for key in value:
        _check(key in stored, f'A key of {where}', key, f'one of {", ".join(stored)}')
    for name, f in stored.items():
        required = f.default is MISSING and f.default_factory is MISSING
        _check(name in value or not required, f'{name} of {where}', None, 'given')
    parsed = {key: _parse(hints[key], item, f'{where}.{key}') for key, item in value.items()}
    for key, item in parsed.items():
        if key in _RULES and item is not None:
            holds, wanted = _RULES[key]
            _check(bool(holds(item)), f'{where}.{key}', item, wanted)
    return kind(**parsed, **given)


def parse_manifest(text: str, where: str = FILE_NAME) -> Manifest:
    """Parse and check a manifest's text; messages call it `where`."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ManifestError(f'{where} is not valid JSON ({error}).') from None
    _check(isinstance(data, dict), where, data, 'an object')
    version = data.get('schema_version')  # first, since a newer version may have changed all else
    _check(version == SCHEMA_VERSION, f'schema_version of {where}', version, f'{SCHEMA_VERSION} (update timm_geoprior)')
    manifest = cast(Manifest, _parse(Manifest, data, where))
    models = {name: _with_classes(entry, manifest.label_sets) for name, entry in manifest.models.items()}
    return replace(manifest, models=models)


def parse_entry(name: str, data: Any, label_sets: dict[str, LabelSet]) -> ModelEntry:
    """Parse and check a manifest's entry of one model, as `parse_manifest` does."""
    return _with_classes(cast(ModelEntry, _parse(ModelEntry, data, f'models.{name}', name=name)), label_sets)


def _with_classes(entry: ModelEntry, label_sets: dict[str, LabelSet]) -> ModelEntry:
    _check(entry.label_set in label_sets, f'label_set of {entry.name}', entry.label_set,
           f'one of {", ".join(label_sets)}')
    return replace(entry, num_classes=label_sets[entry.label_set].num_classes)


def manifest_path() -> Path:
    """Where the manifest is: in the package (wheel) or in the folder above it (editable install, checkout)."""
    package = Path(__file__).parents[1]
    inside = package / FILE_NAME
    return inside if inside.exists() else package.parent / FILE_NAME


@functools.lru_cache(maxsize=8)
def _load(path: Path) -> Manifest:
    try:
        text = path.read_text(encoding='utf-8')
    except OSError as error:
        raise ManifestError(f'{path} cannot be read ({error.strerror}). Install timm_geoprior again, or run from its '
                            f'checkout.') from None
    try:
        return parse_manifest(text, str(path))
    except ManifestError as error:
        raise ManifestError(f'{error} Restore {path}, or install timm_geoprior again.') from None


def load_manifest(path: Path | None = None) -> Manifest:
    """Read the manifest, the package's own or another file, once per process.

    Raises:
        ManifestError: It is missing or malformed.
    """
    return _load(path or manifest_path())


def update_manifest(path: Path | None, entry: ModelEntry, *, replace_weights: bool = False) -> Manifest:
    """Add an entry, or replace the one of the same name. Writers wait for each other.

    The file is replaced atomically (temporary file, fsync, rename), so that a reader sees the old or the new one.

    Args:
        path: The manifest; None for the package's own.
        entry: What to write.
        replace_weights: Allow other bytes under a released tag's name, for a tag that nobody has loaded yet.

    Returns:
        The manifest as written.

    Raises:
        ManifestError: The file is malformed or cannot be written, or the entry is invalid or would change a released
            tag's bytes.
    """
    def change(manifest: Manifest) -> Manifest:
        if not replace_weights:
            check_bytes_stay(manifest, entry)
        return replace(manifest, models={**manifest.models, entry.name: entry})

    return _rewrite(path or manifest_path(), change)


def update_converted(path: Path | None, name: str, **changes: Any) -> Manifest:
    """Change fields of a tag's `ConvertedEntry`; the file is written as by `update_manifest`."""
    def change(manifest: Manifest) -> Manifest:
        entry = replace(manifest.converted.get(name, ConvertedEntry()), **changes)
        return replace(manifest, converted=dict(sorted({**manifest.converted, name: entry}.items())))

    return _rewrite(path or manifest_path(), change)


def _rewrite(path: Path, change: Callable[[Manifest], Manifest]) -> Manifest:
    from filelock import FileLock  # a dependency of torch, needed only to write

    try:
        with FileLock(path.with_name(f'.{path.name}.lock')):
            text = change(parse_manifest(path.read_text(encoding='utf-8'), str(path))).to_json()
            updated = parse_manifest(text, str(path))
            for left in path.parent.glob(f'.{path.name}.*.tmp'):  # left by a writer that was killed
                left.unlink()
            write_atomically(path, text.encode('utf-8'))
    except OSError as error:
        raise ManifestError(f'{path} could not be written ({first_line(error)}) and is unchanged. '
                            f'{write_advice(error)}, or run this in a checkout of your own.') from None
    _load.cache_clear()
    return updated


def check_bytes_stay(manifest: Manifest, entry: ModelEntry) -> None:
    """Raise ManifestError if an entry would change the bytes of the released tag of its name."""
    old = manifest.models.get(entry.name)
    if old is not None and old.has_weights and old.sha256 != entry.sha256:
        raise ManifestError(f"{entry.name} must keep the sha256 {old.sha256}, since a tag's bytes never change, got "
                            f'{entry.sha256}. Give these weights a new tag.')


def default_model(manifest: Manifest) -> ModelEntry:
    """The model that commands use by default: the most accurate bundled tag, else the most accurate published one."""
    for status in ('bundled', 'published'):
        entries = [entry for entry in manifest.models.values() if entry.status == status]
        if entries:  # the first of equals
            return max(entries, key=lambda entry: entry.metrics[0].top1 if entry.metrics else 0)
    raise ManifestError('The manifest must have a bundled or a published tag, got none. Name a model with --model.')
