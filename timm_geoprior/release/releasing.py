"""From a checkpoint to a staged folder, then into the package or onto the Hub.

`bundle` and `push` write the manifest only in their last step.
"""
import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token, hf_hub_download

from ..errors import GeoPriorError
from ..files import write_atomically
from ..pretrained.cfgs import bundled_path
from ..pretrained.download import describe_hub_error, http_status
from ..pretrained.manifest import (
    Golden,
    ModelEntry,
    check_bytes_stay,
    load_manifest,
    manifest_path,
    parse_manifest,
    to_json,
    update_converted,
    update_manifest,
)
from ..training.checkpoint import read_weights
from .cards import update_readme
from .staging import (
    GOLDEN,
    TRAIN_LOG,
    WEIGHTS,
    Evidence,
    check_loads,
    read_metrics,
    read_staged,
    stage,
)


def release(args: argparse.Namespace) -> None:
    """Do what the arguments of `timm-geoprior publish` say, and print what was done."""
    if not args.output:
        _report(record_results(load_manifest().get(args.tag), args.results))
    elif args.checkpoint:
        _stage(args)
    elif (staged := read_staged(args.output, load_manifest()).name) != args.tag:
        raise GeoPriorError(f'{args.output} must hold {args.tag}, got {staged}. Name that tag, or another folder.')
    if args.bundle:
        _report(bundle(args.output, replace_weights=args.replace))
    if args.push and args.dry_run:
        _print_dry_run(args.output, args.push, args.public)
    elif args.push:
        _report(push(args.output, args.push, args.public))


def bundle(folder: Path, manifest_file: Path | None = None, replace_weights: bool = False) -> ModelEntry:
    """Put a staged folder's weights and golden outputs into the package, and its entry into the manifest.

    Args:
        folder: A folder made by `stage`.
        manifest_file: The manifest; None for the package's own.
        replace_weights: Allow new weights for a bundled tag that is not released yet.

    Raises:
        GeoPriorError: It is not a staged folder.
        ManifestError: The entry would make the manifest invalid, or changes a tag's weights.
    """
    manifest = load_manifest(manifest_file)
    entry = read_staged(folder, manifest)
    if not replace_weights:
        check_bytes_stay(manifest, entry)
    path = bundled_path(entry)
    golden = path.with_suffix('.golden.safetensors')
    assert entry.golden is not None, 'the manifest checks that a staged tag has them'
    entry = replace(entry, status='bundled', file=path.name, golden=Golden(golden.name, entry.golden.sha256))
    # check what the manifest would refuse before the package's files change
    parse_manifest(to_json(replace(manifest, models={**manifest.models, entry.name: entry})), f'{folder}')
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, (folder / WEIGHTS).read_bytes())
    write_atomically(golden, (folder / GOLDEN).read_bytes())
    if (folder / TRAIN_LOG).exists():
        write_atomically(path.with_suffix('.train_log.csv'), (folder / TRAIN_LOG).read_bytes())
    update_manifest(manifest_file, entry, replace_weights=replace_weights)
    return entry


def push(folder: Path, repo_id: str, public: bool = False, manifest_file: Path | None = None) -> ModelEntry:
    """Create the repository, commit a staged folder, read the commit back, and only then write the manifest.

    An interrupted push can be run again: files that are there already are not sent twice. The token comes from
    HF_TOKEN or `hf auth login`.

    Args:
        folder: A folder made by `stage`.
        repo_id: 'owner/name'.
        public: Make a new repository public; an existing one stays as it is.
        manifest_file: The manifest; None for the package's own.

    Raises:
        GeoPriorError: There is no token, it has no write access, the network failed, or the files read back differ.
        ManifestError: The entry would make the manifest invalid, or changes a tag's weights.
    """
    manifest = load_manifest(manifest_file)
    entry = read_staged(folder, manifest)
    check_bytes_stay(manifest, entry)  # before anything is sent, and again when the manifest is written
    if get_token() is None:
        raise GeoPriorError('No Hub token found. Run `hf auth login` or set HF_TOKEN.')
    try:
        repo_id, revision = _commit(entry, folder, repo_id, public)
        _read_back(entry, folder, repo_id, revision)
    except GeoPriorError:
        raise
    except Exception as error:
        raise GeoPriorError(f'{entry.name} could not be pushed to {repo_id}: {_describe_push_error(error)}. '
                            f'The manifest is unchanged; run the command again to continue.') from None
    entry = replace(entry, status='published', hub_id=repo_id, revision=revision)
    update_manifest(manifest_file, entry)
    return entry


def _files(folder: Path) -> dict[str, Path]:
    """Name in the repository -> file of a staged folder."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob('*')) if path.is_file()}


def _commit(entry: ModelEntry, folder: Path, repo_id: str, public: bool) -> tuple[str, str]:
    """Push the folder in one commit; returns the repository's full name and the commit."""
    api = HfApi(library_name='timm_geoprior')
    repo_id = api.create_repo(repo_id, private=not public, exist_ok=True).repo_id  # includes the owner
    head = api.model_info(repo_id).sha
    files = [CommitOperationAdd(name, path) for name, path in _files(folder).items()]
    # with the parent given, one of two concurrent pushes fails instead of mixing with the other
    commit = api.create_commit(repo_id, files, commit_message=f'Add {entry.name}', parent_commit=head)
    return repo_id, commit.oid


def _read_back(entry: ModelEntry, folder: Path, repo_id: str, revision: str) -> None:
    """Fetch the commit into an empty cache, and compare every file and the logits."""
    with tempfile.TemporaryDirectory() as cache:
        root = Path(cache)
        for name, path in _files(folder).items():  # as anyone else would get them, not from this machine's cache
            fetched = Path(hf_hub_download(repo_id, name, revision=revision, cache_dir=cache))
            root = fetched.parent if name == WEIGHTS else root
            if fetched.read_bytes() != path.read_bytes():
                raise GeoPriorError(f'{name} of {repo_id} at {revision} came back with other bytes than were sent. The '
                                    f'manifest is unchanged; run the command again.')
        check_loads(entry, root)


def _describe_push_error(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error
    status = http_status(cause)
    if status == 412:
        return 'another commit came in between'
    if status in (401, 403):
        return (f'the Hub answered {status}: the token must have write access to it '
                f'(`hf auth whoami` says whose it is)')
    return describe_hub_error(cause)


def record_results(entry: ModelEntry, results: Path, manifest_file: Path | None = None) -> ModelEntry:
    """Write what `timm-geoprior validate` measured with a converted tag into the manifest."""
    if entry.status != 'converted':
        raise GeoPriorError(f'--results alone must be figures of a converted tag, got those of {entry.name}. '
                            f'Stage a checkpoint with --results and --output.')
    if entry.sha256 is None:
        raise GeoPriorError(f'{entry.name} must be pinned before its figures are recorded, got no pin. '
                            f'Run timm-geoprior pin {entry.name}, and validate it again.')
    metrics = read_metrics(results, entry, entry.name)
    return update_converted(manifest_file, entry.name, metrics=metrics).tags[entry.name]


def _stage(args: argparse.Namespace) -> None:
    entry = load_manifest().get(args.tag)
    checkpoint = read_weights(args.checkpoint, args.weights)
    if checkpoint.note:
        print(checkpoint.note)
    run = args.checkpoint.parent if args.checkpoint.suffix == '.pt' else None
    entry = stage(entry, checkpoint, args.output, Evidence(args.results, args.baseline, run, args.experiments))
    print(f'Staged {entry.name} in {args.output}: {entry.bytes:,} bytes, SHA-256 {entry.sha256}')


def _print_dry_run(folder: Path, repo_id: str, public: bool) -> None:
    entry = read_staged(folder, load_manifest())
    files = '\n'.join(f'  {name}, {path.stat().st_size:,} bytes' for name, path in _files(folder).items())
    print(f'would push {entry.name} to {repo_id}, a {"public" if public else "private"} repository if it is new, in '
          f'one commit:\n{files}\nand then write its commit into the manifest')


def _report(entry: ModelEntry) -> None:
    readme = manifest_path().parent / 'README.md'
    if readme.is_file():  # in a checkout; a wheel has none
        update_readme(readme, load_manifest())
    where = f'{entry.hub_id} at {entry.revision}' if entry.status == 'published' else 'the package'
    said = f'is {entry.status}: {where}'
    if entry.status == 'converted':
        said = f'has a top-1 accuracy of {entry.metrics[0].top1:.2f}%'
    print(f'{entry.name} {said}. {manifest_path()} is updated.')
