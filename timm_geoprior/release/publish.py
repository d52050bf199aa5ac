"""From a checkpoint to a released model: the files, the package's own folder, the Hub.

A staged folder is the Hub repository before it is one. `stage` makes it from a checkpoint and the manifest's entry;
`bundle` puts its weights into the package, `push` onto the Hub. Only their last step writes the manifest.
"""
import copy
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, get_token, hf_hub_download
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..errors import GeoPriorError
from ..files import write_atomically
from ..pretrained.cfgs import bundled_path, hub_config
from ..pretrained.download import describe_hub_error, http_status
from ..pretrained.loading import load_golden
from ..pretrained.manifest import (
    Baseline,
    Golden,
    Manifest,
    Metric,
    ModelEntry,
    TrainLog,
    check_bytes_stay,
    load_manifest,
    parse_entry,
    parse_manifest,
    to_json,
    update_converted,
    update_manifest,
)
from ..pretrained.verify import GOLDEN_TOLERANCES, golden_error
from ..radii import learned_radii
from ..training.checkpoint import SavedModel, take_prefix_off
from .cards import model_card, plot_radii

__all__ = [
    'PublishError', 'bundle', 'describe_push', 'export_weights', 'push', 'read_metrics', 'record_results', 'stage',
]

WEIGHTS, RESULTS, TRAIN_LOG, CURVES = 'model.safetensors', 'results.json', 'train_log.csv', 'curves.png'
GOLDEN = 'golden/outputs.safetensors'  # a second such file beside the weights confuses timm up to 1.0.27

ROUNDING_TOLERANCE = 2e-2  # of the largest logit, for weights rounded to float16

# what a network may be trained with and still be its architecture
TRAINING_OPTIONS = {'drop_rate', 'drop_path_rate', 'drop_block_rate', 'attn_radius', 'zero_init_last', 'num_classes'}


class PublishError(GeoPriorError):
    """A model cannot be staged, bundled or pushed; nothing was released."""


def release_tensors(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they are released: float16, but float32 below two dimensions, where radii and variances keep digits.

    Args:
        state_dict: Floating-point and integer tensors.

    Returns:
        Contiguous copies on the CPU.

    Raises:
        PublishError: A value is not finite, or too large for float16.
    """
    released = {}
    for name, tensor in state_dict.items():
        dtype = torch.float32 if tensor.ndim < 2 else torch.float16
        copy = tensor.detach().cpu().to(dtype if tensor.is_floating_point() else tensor.dtype)
        if not copy.isfinite().all():
            raise PublishError(
                f'{name} has values that are not finite as {dtype}, expected finite ones: the training diverged.')
        released[name] = copy.contiguous().clone()
    return released


def export_weights(state_dict: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> str:
    """Write a release file: the same tensors and metadata always give the same bytes.

    Args:
        state_dict: Weights, as trained.
        path: A .safetensors file to write, whole or not at all.
        metadata: Where the weights are from.

    Returns:
        The file's SHA-256.

    Raises:
        PublishError: As `release_tensors`.
    """
    content = _sorted_metadata(save(release_tensors(state_dict), {'format': 'pt', **metadata}))
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def _sorted_metadata(content: bytes) -> bytes:
    """safetensors writes its metadata in random order: sort it, so that a file can be made again to the byte."""
    size = int.from_bytes(content[:8], 'little')
    header = json.loads(content[8:8 + size])
    header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
    # escapes would make a name like größe longer than it is in the file
    text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # the tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, 'little') + text + content[8 + size:]


@torch.no_grad()
def golden_tensors(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, Tensor]:
    """A fixed input, smooth as a picture is, and the logits that the model gives for it in float32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(2, input_size[0], 8, 8, generator=generator)
    smooth = nn.functional.interpolate(coarse, input_size[1:], mode='bicubic')
    noise = 0.2 * torch.randn(2, *input_size, generator=generator)
    images = (smooth + noise).half()  # half the file, and every value exact in float32 too
    return {'input': images, 'logits': model.eval()(images.float())}


def stage(
        entry: ModelEntry,
        checkpoint: SavedModel,
        folder: Path,
        results: Path | None = None,
        baseline: Path | None = None,
        run: Path | None = None,
        experiments: Sequence[Path] = (),
) -> ModelEntry:
    """Make the folder that is the Hub repository.

    Args:
        entry: The manifest's entry: input, label set, licence, terms, recipe.
        checkpoint: The weights.
        folder: Where to; a folder staged there before is replaced, anything else is not.
        results: What scripts/validate.py measured with the staged weights, else the figures stay the entry's.
        baseline: What it measured with the plain network of the same recipe, else that stays the entry's.
        run: Folder of the training run, for its log, the summary and the curves of it.
        experiments: Markdown files of what else was found with this architecture, for the model card.

    Returns:
        The entry with status 'staged', as in the folder's results.json.

    Raises:
        PublishError: The tag is a converted one, the checkpoint is not of this architecture, the results are of other
            weights, the baseline's of other images or otherwise prepared ones, the experiments cannot be read, or the
            folder is something else.
    """
    if entry.status == 'converted':
        raise PublishError(f"{entry.name} must be a tag of the manifest's own, got one that is converted from "
                           f"timm's weights. Give yours a tag in weights_manifest.json.")
    if folder.exists() and not (folder / RESULTS).exists():
        raise PublishError(f'{folder} exists and is no staged folder, expected a new one: name another.')
    found = '\n\n'.join(_read_text(path) for path in experiments)
    model = timm.create_model(entry.architecture, num_classes=entry.num_classes).eval()
    tensors, _ = take_prefix_off(checkpoint.state_dict, model.state_dict().keys())
    checkpoint = replace(checkpoint, state_dict=tensors)
    _load_released(model, entry, checkpoint)
    described = replace(
        entry, recipe=checkpoint.recipe.get('name', entry.recipe),
        recipe_commit=checkpoint.commit or entry.recipe_commit,
        seed=checkpoint.seed if checkpoint.seed is not None else entry.seed,
        train_log=_train_log(run) if run else entry.train_log)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_folder(folder) as new:
        staged = _write_weights(described, checkpoint, model, new)
        if entry.sha256 not in (None, staged.sha256):  # nothing that was measured or said of other weights stays
            described = replace(
                described, recipe_commit=checkpoint.commit, seed=checkpoint.seed, metrics=(), baseline=None,
                train_log=described.train_log if run else None)
            staged = _write_weights(described, checkpoint, model, new)
        if results:
            staged = replace(staged, metrics=read_metrics(results, staged))
        if baseline:
            staged = replace(staged, baseline=_read_baseline(baseline, staged))
        _write_papers(staged, checkpoint, model, run, found, new)
        _check_loads(staged, new)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    return staged


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8').strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'it is not UTF-8'
        raise PublishError(f'{path} cannot be read ({reason}), expected a Markdown file.') from None


@contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """A folder beside another, gone at the end unless it was renamed."""
    new = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f'.{folder.name}.'))
    new.chmod(0o755)
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _load_released(model: nn.Module, entry: ModelEntry, checkpoint: SavedModel) -> None:
    """Load the weights as they are released."""
    if checkpoint.model_name.partition('.')[0] not in ('', entry.architecture):
        raise PublishError(
            f'The checkpoint is of {checkpoint.model_name}, expected {entry.architecture} for {entry.name}.')
    options = set(checkpoint.model_kwargs) - TRAINING_OPTIONS
    if options:
        raise PublishError(
            f'The checkpoint was trained with {", ".join(sorted(options))}, expected the architecture as it is: '
            f"a tag's weights must fit the plain name.")
    try:
        model.load_state_dict(release_tensors(checkpoint.state_dict))
    except RuntimeError as error:
        if isinstance(error, PublishError):
            raise
        raise PublishError(f'The checkpoint does not fit {entry.name}: {" ".join(str(error).split())}') from None


def _check_rounding(checkpoint: SavedModel, model: nn.Module, golden: dict[str, Tensor]) -> None:
    """The checkpoint as it was trained gives nearly the golden logits."""
    trained = copy.deepcopy(model)
    trained.load_state_dict(checkpoint.state_dict)
    error = golden_error(trained, golden)
    if not error <= ROUNDING_TOLERANCE:
        raise PublishError(
            f'float16 changes the logits by {error:.1e} of the largest, expected at most {ROUNDING_TOLERANCE:.0e}: the '
            f'weights do not bear it.')


def _write_weights(entry: ModelEntry, checkpoint: SavedModel, model: nn.Module, folder: Path) -> ModelEntry:
    """Weights and golden outputs, and the entry that describes them."""
    metadata = {'architecture': entry.architecture, 'tag': entry.tag}
    metadata |= {key: value for key, value in (('recipe', entry.recipe), ('commit', entry.recipe_commit)) if value}
    sha256 = export_weights(checkpoint.state_dict, folder / WEIGHTS, metadata)
    released = entry.has_weights and entry.sha256 == sha256
    tensors = load_golden(entry) if released else golden_tensors(model, entry.input.input_size)
    _check_rounding(checkpoint, model, tensors)
    golden = save(tensors)
    (folder / GOLDEN).parent.mkdir(exist_ok=True)
    write_atomically(folder / GOLDEN, golden)
    return replace(
        entry, status='staged', hub_id=None, revision=None, file=WEIGHTS, sha256=sha256,
        bytes=(folder / WEIGHTS).stat().st_size, dtype='float16',
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        golden=Golden(GOLDEN, hashlib.sha256(golden).hexdigest()))


def _write_papers(
        entry: ModelEntry, checkpoint: SavedModel, model: nn.Module, run: Path | None, experiments: str, folder: Path,
) -> None:
    """All but the weights."""
    logs = {}
    if run:
        logs = {TRAIN_LOG: run / 'summary.csv', CURVES: run / CURVES}
    elif entry.train_log:  # the weights are those of the package
        logs = {TRAIN_LOG: bundled_path(entry).with_suffix('.train_log.csv')}
    beside = [name for name, path in logs.items() if path.exists()]
    for name in beside:
        shutil.copyfile(logs[name], folder / name)
    config = json.dumps(hub_config(entry), indent=2, ensure_ascii=False)
    (folder / 'config.json').write_text(config, encoding='utf-8')
    (folder / RESULTS).write_text(to_json({'name': entry.name, 'entry': entry}), encoding='utf-8')
    card = model_card(entry, load_manifest(), _recipe_text(entry, checkpoint), beside, experiments)
    card.save(folder / 'README.md')
    plot_radii(learned_radii(model, entry.input.input_size), folder / 'radii.png')


def _recipe_text(entry: ModelEntry, checkpoint: SavedModel) -> str:
    """The recipe as it was run, else as the package ships it."""
    if checkpoint.recipe:
        return yaml.safe_dump(checkpoint.recipe, sort_keys=False, default_flow_style=None)
    shipped = Path(__file__).parents[1] / 'training' / 'recipes' / f'{entry.recipe}.yaml'
    return shipped.read_text(encoding='utf-8') if shipped.exists() else ''


def _check_loads(entry: ModelEntry, folder: Path) -> None:
    """The folder as timm opens it gives the golden logits."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    error = golden_error(model, load_file(folder / GOLDEN))
    if not error <= GOLDEN_TOLERANCES['float32']:
        raise PublishError(
            f'{entry.name} from {folder} gives logits that differ from the golden ones by {error:.1e} of the largest, '
            f"expected at most {GOLDEN_TOLERANCES['float32']:.0e}: stage it again.")


def _measurements(path: Path, entry: ModelEntry) -> list[tuple[dict[str, Any], tuple[Metric, ...]]]:
    """What scripts/validate.py measured: of each network its description and its figures."""
    dataset = load_manifest().label_sets[entry.label_set].title
    try:
        data = json.loads(path.read_text(encoding='utf-8'))
        measured = [(item, tuple(
            Metric(dataset, item['data']['split'], row['num_images'], row['top1_correct'], row['top5_correct'],
                   row['precision'], item['preprocessing']['input_size'][-1], item['software'])
            for row in item['results'])) for item in (data if isinstance(data, list) else [data])]
        if not measured or not all(metrics for _, metrics in measured):
            raise ValueError('it has no figures')
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PublishError(
            f'{path} is no results file ({type(error).__name__}: {error}), expected the JSON of scripts/validate.py.'
        ) from None
    return measured


def read_metrics(path: Path, entry: ModelEntry, network: str = f'the staged {WEIGHTS}') -> tuple[Metric, ...]:
    """What scripts/validate.py measured with an entry's weights.

    Args:
        path: Its results file.
        entry: The entry, with the hash of the weights.
        network: What to call them in messages.

    Returns:
        The figures.

    Raises:
        PublishError: The file is no results file, or of other weights, of a part of the set, or of images that were
            prepared otherwise.
    """
    for item, metrics in _measurements(path, entry):
        if item.get('weights', {}).get('sha256') == entry.sha256:
            _check_measured(path, item, entry, metrics[0].img_size, network)
            return metrics
    raise PublishError(
        f'{path} must have figures of the weights with sha256 {entry.sha256}, got none. '
        f'Measure {network} with scripts/validate.py, then record these results.')


def record_results(entry: ModelEntry, results: Path, manifest_file: Path | None = None) -> ModelEntry:
    """Take what scripts/validate.py measured with a converted tag into the manifest.

    Args:
        entry: The converted tag, pinned.
        results: The JSON of scripts/validate.py.
        manifest_file: The manifest, else the package's own.

    Returns:
        The tag with its figures.

    Raises:
        PublishError: The tag is not a converted one or not pinned, or the results are of other weights, a part of the
            set, or images that were prepared otherwise.
    """
    if entry.status != 'converted':
        raise PublishError(f'Only figures of converted tags are recorded by themselves, got {entry.name}. '
                           f'Stage a checkpoint with --results and --output.')
    if entry.sha256 is None:
        raise PublishError(f'{entry.name} must be pinned before its figures are recorded, got no pin. '
                           f'Run timm-geoprior pin {entry.name}, and validate it again.')
    metrics = read_metrics(results, entry, entry.name)
    return update_converted(manifest_file, entry.name, metrics=metrics).tags[entry.name]


def _check_measured(path: Path, item: Mapping[str, Any], entry: ModelEntry, img_size: int, network: str) -> None:
    """That a network was measured as the entry is, on the whole set, at its own size or another that a figure says."""
    part = list(item.get('problems', ()))
    if competing := item.get('classes', {}).get('competing'):
        part.append(f'{len(competing)} classes competed, not {entry.num_classes}')
    if part:
        raise PublishError(f'{path} is not of the whole set ({"; ".join(part).rstrip(".")}), expected all its classes '
                           f'and images: measure {network} again on those.')
    size = (entry.input.input_size[0], img_size, img_size)
    for key, value in json.loads(to_json(replace(entry.input, input_size=size))).items():
        got = item['preprocessing'].get(key)
        if got != value:
            words = ' '.join(map(str, value)) if isinstance(value, list) else value
            raise PublishError(f'{path} was measured with {key} = {got}, expected that of {entry.name}: measure '
                               f'{network} again with --{key.replace("_", "-")} {words}.')


def _read_baseline(path: Path, entry: ModelEntry) -> Baseline:
    """The plain network's figure, on the images of the entry's own and prepared as they are.

    timm's plain networks have other crops and interpolations of their own, by which figures differ as well.
    """
    (item, metrics), *_ = _measurements(path, entry)
    own = entry.metrics[0] if entry.metrics else None
    size = own.img_size if own else entry.input.input_size[-1]
    _check_measured(path, item, entry, size, 'the plain network')
    for metric in metrics:
        if not own or (metric.split, metric.num_images, metric.precision) == (
                own.split, own.num_images, own.precision):
            return Baseline(item['model'], item['parameters'], metric)
    measured = f'{own.num_images:,} images of {own.split} in {own.precision}' if own else 'any images'
    raise PublishError(f'{path} has no figure of {measured}, expected one beside that of {entry.name}: measure the '
                       f'plain network by the same command.')


def _train_log(run: Path) -> TrainLog:
    try:
        results = json.loads((run / 'results.json').read_text(encoding='utf-8'))
        return TrainLog(results['epochs'], float(results['hours']), results['hardware'], results['versions'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PublishError(
            f'{run} has no results.json of a finished run ({type(error).__name__}: {error}), expected one: name the '
            f'folder that scripts/train.py wrote.') from None


def read_staged(folder: Path, manifest: Manifest) -> ModelEntry:
    """The entry of a staged folder, its files checked against it.

    Args:
        folder: What `stage` made.
        manifest: The manifest, for the label sets.

    Returns:
        The entry.

    Raises:
        PublishError: It is no staged folder, or its files have changed since.
    """
    try:
        data = json.loads((folder / RESULTS).read_text(encoding='utf-8'))
        entry = parse_entry(data['name'], data['entry'], manifest.label_sets)
        files = {WEIGHTS: entry.sha256, GOLDEN: entry.golden.sha256 if entry.golden else None}
        for name, expected in files.items():
            got = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            if got != expected:
                raise PublishError(f'{folder / name} has the sha256 {got}, expected {expected}: stage it again.')
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PublishError(f'{folder} is no staged folder ({error}), expected one: stage it first.') from None
    return entry


def bundle(folder: Path, manifest_file: Path | None = None, replace_weights: bool = False) -> ModelEntry:
    """Put a staged folder's weights and golden outputs into the package, and its entry into the manifest.

    Args:
        folder: What `stage` made.
        manifest_file: The manifest, else the package's own.
        replace_weights: Allow other bytes under a bundled tag's name, before it is released.

    Returns:
        The entry as written.

    Raises:
        PublishError: It is no staged folder.
        ManifestError: The manifest does not take it.
    """
    manifest = load_manifest(manifest_file)
    entry = read_staged(folder, manifest)
    if not replace_weights:
        check_bytes_stay(manifest, entry)
    path = bundled_path(entry)
    golden = path.with_suffix('.golden.safetensors')
    sha256 = hashlib.sha256((folder / GOLDEN).read_bytes()).hexdigest()
    entry = replace(entry, status='bundled', file=path.name, golden=Golden(golden.name, sha256))
    # what the manifest would refuse is refused before the package's files are others
    parse_manifest(replace(manifest, models={**manifest.models, entry.name: entry}).to_json(), f'{folder}')
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, (folder / WEIGHTS).read_bytes())
    write_atomically(golden, (folder / GOLDEN).read_bytes())
    if (folder / TRAIN_LOG).exists():
        write_atomically(path.with_suffix('.train_log.csv'), (folder / TRAIN_LOG).read_bytes())
    update_manifest(manifest_file, entry, replace_weights=replace_weights)
    return entry


def push(folder: Path, repo_id: str, public: bool = False, manifest_file: Path | None = None) -> ModelEntry:
    """Create the repository, commit a staged folder, read the commit back, and only then write the manifest.

    A push that was interrupted can be run again: what is there already is not sent twice. The token is the
    environment's (HF_TOKEN) or the login's.

    Args:
        folder: What `stage` made.
        repo_id: 'owner/name'.
        public: Make a new repository public; one that exists stays as it is.
        manifest_file: The manifest, else the package's own.

    Returns:
        The entry as written, with status 'published'.

    Raises:
        PublishError: There is no token, it may not write, the network broke, or what came back is not what was sent.
        ManifestError: The manifest does not take it.
    """
    manifest = load_manifest(manifest_file)
    entry = read_staged(folder, manifest)
    check_bytes_stay(manifest, entry)
    if get_token() is None:
        raise PublishError('There is no token for the Hub, expected one: `hf auth login`, or set HF_TOKEN.')
    try:
        repo_id, revision = _commit(entry, folder, repo_id, public)
        _read_back(entry, folder, repo_id, revision)
    except PublishError:
        raise
    except Exception as error:
        raise PublishError(
            f'{entry.name} could not be pushed to {repo_id}: {_describe_push_error(error)}. '
            f'The manifest is as it was; run it again to go on.') from None
    entry = replace(entry, status='published', hub_id=repo_id, revision=revision)
    update_manifest(manifest_file, entry)
    return entry


def describe_push(folder: Path, repo_id: str, public: bool = False) -> str:
    """Say what `push` would do, without the network.

    Args:
        folder: What `stage` made.
        repo_id: 'owner/name'.
        public: Whether a new repository would be public.

    Returns:
        A few lines.

    Raises:
        PublishError: It is no staged folder.
    """
    entry = read_staged(folder, load_manifest())
    files = '\n'.join(f'  {name}, {path.stat().st_size:,} bytes' for name, path in _files(folder).items())
    visibility = 'public' if public else 'private'
    return (f'would push {entry.name} to {repo_id}, a {visibility} repository if it is new, in one commit:\n{files}\n'
            f'and then write its commit into the manifest')


def _files(folder: Path) -> dict[str, Path]:
    """Name in the repository -> file of a staged folder."""
    paths = sorted(path for path in folder.rglob('*') if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _commit(entry: ModelEntry, folder: Path, repo_id: str, public: bool) -> tuple[str, str]:
    """Send the folder in one commit; the repository's full name and the commit."""
    api = HfApi(library_name='timm_geoprior')
    repo_id = api.create_repo(repo_id, private=not public, exist_ok=True).repo_id
    head = api.model_info(repo_id).sha
    files = [CommitOperationAdd(name, path) for name, path in _files(folder).items()]
    # the parent makes a push at the same time from elsewhere fail instead of mixing with this one
    commit = api.create_commit(repo_id, files, commit_message=f'Add {entry.name}', parent_commit=head)
    return repo_id, commit.oid


def _read_back(entry: ModelEntry, folder: Path, repo_id: str, revision: str) -> None:
    """Fetch the commit into an empty cache, and compare every file, and the logits."""
    with tempfile.TemporaryDirectory() as cache:
        root = Path(cache)
        for name, path in _files(folder).items():
            fetched = Path(hf_hub_download(repo_id, name, revision=revision, cache_dir=cache))
            root = fetched.parent if name == WEIGHTS else root
            if fetched.read_bytes() != path.read_bytes():
                raise PublishError(
                    f'{name} of {repo_id} at {revision} came back with other bytes than were sent. The manifest '
                    f'is as it was; run it again.')
        _check_loads(entry, root)


def _describe_push_error(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error
    status = http_status(cause)
    if status == 412:
        return 'another commit came in between'
    if status in (401, 403):
        return (f'the Hub answered {status}: the token must have write rights for it '
                f'(`hf auth whoami` says whose it is)')
    return describe_hub_error(cause)
