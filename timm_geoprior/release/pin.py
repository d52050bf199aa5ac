"""What the project records about the sources of converted tags: pins, and the figures that timm has published.

    python -m timm_geoprior.release.pin results-imagenet.csv

writes the figures that timm has published (results/results-imagenet.csv of its repository) into the package.
"""
import csv
import io
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from timm.models import get_arch_pretrained_cfgs

from ..errors import GeoPriorError
from ..files import write_atomically
from ..pretrained.cfgs import PUBLISHED_RESULTS
from ..pretrained.download import PATIENCE, describe_hub_error
from ..pretrained.manifest import SOURCES, ModelEntry, load_manifest, update_converted

HEADER = """\
# ImageNet-1k accuracies in percent that timm has published, from results/results-imagenet.csv of its repository, by
# python -m timm_geoprior.release.pin results-imagenet.csv
"""
COLUMNS = ('model', 'img_size', 'crop_pct', 'top1', 'top5')


def pin_sources(names: Iterable[str] = (), manifest_file: Path | None = None) -> Iterator[str]:
    """Write the revision, SHA-256 and size of each source's newest file into the manifest.

    From then on a converted tag loads exactly these bytes; figures that were measured with other bytes are removed.

    Args:
        names: Converted tags, or architectures for their default tags; empty for all converted tags.
        manifest_file: The manifest; None for the package's own.

    Yields:
        A line about each tag, once it is pinned.

    Raises:
        ManifestError: There is no such tag.
        GeoPriorError: A tag is not a converted one, or its source's file cannot be looked up on the Hub.
    """
    manifest = load_manifest(manifest_file)
    entries = [manifest.get(name) for name in names] or [
        entry for entry in manifest.tags.values() if entry.status == 'converted']
    for entry in entries:
        if entry.status != 'converted':
            raise GeoPriorError(f'The tags to pin must be converted ones, got {entry.name}. Leave it out.')
    for entry in entries:
        yield _pin(entry, manifest_file)


def _pin(entry: ModelEntry, manifest_file: Path | None) -> str:
    try:
        found = get_hf_file_metadata(hf_hub_url(str(entry.hub_id), str(entry.file)), timeout=PATIENCE)
    except Exception as error:
        raise GeoPriorError(
            f'{entry.name} could not be pinned to {entry.hub_id}: {describe_hub_error(error)}.') from None
    if not (found.commit_hash and found.etag and len(found.etag) == 64 and found.size):
        raise GeoPriorError(f'{entry.name} could not be pinned: the Hub must give a commit, a SHA-256 and a size of '
                            f'{entry.file} in {entry.hub_id}, got {found.commit_hash}, {found.etag} and {found.size}.')
    metrics = entry.metrics if found.etag == entry.sha256 else ()
    update_converted(manifest_file, entry.name, revision=found.commit_hash, sha256=found.etag, bytes=found.size,
                     metrics=metrics)
    dropped = ', its figures, measured with other bytes, were removed' if metrics != entry.metrics else ''
    return f'{entry.name}: {entry.hub_id} at {found.commit_hash}, sha256 {found.etag}{dropped}'


def write_published_results(table: Path, output: Path = PUBLISHED_RESULTS) -> int:
    """Extract the figures of the sources, each at the size and crop of its cfg, from timm's results-imagenet.csv.

    Returns the number of sources that the table has figures for.
    """
    wanted = {(f'{source}.{cfg.tag}', cfg.input_size[-1], cfg.crop_pct)
              for source in SOURCES.values() for cfg in get_arch_pretrained_cfgs(source).values()}
    with table.open(encoding='utf-8', newline='') as file:
        rows = [row for row in csv.DictReader(file)
                if (row['model'], int(row['img_size']), float(row['crop_pct'])) in wanted]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction='ignore', lineterminator='\n')
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: row['model']))
    write_atomically(output, (HEADER + text.getvalue()).encode('utf-8'))
    return len(rows)


if __name__ == '__main__':
    print(f'{write_published_results(Path(sys.argv[1]))} sources')
