#!/usr/bin/env python3
"""Measure how much accuracy a conversion costs, by the number of images given to `convert`.

    python scripts/experiments/conversion_accuracy.py runs/plain/last.pt --images tiny-imagenet-200/train \\
        --data-dir tiny-imagenet-200 --output runs/conversion

Each conversion is compared with a control that leaves out the same number of channels, the least important ones. The
control is corrected as far as the other channels predict them, in closed form or by the same least squares on the same
images.

--output receives one folder per network, from which `train.py warm_tin200 --finetune` can train further,
conversion.json with the counts, and conversion.md with the table. Existing folders are reused.
"""
import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import timm_geoprior  # noqa: F401  registers the models
from conversion_variants import removal
from timm_geoprior.conversion import job, regression, state_dict
from timm_geoprior.conversion.comparison import class_indices, compare
from timm_geoprior.conversion.images import ImageSets, PreparedImages
from timm_geoprior.data.dataset import open_split
from timm_geoprior.errors import GeoPriorError, exit_on_error
from timm_geoprior.evaluation.metrics import wilson_interval
from timm_geoprior.evaluation.models import LoadedModel, load_model
from timm_geoprior.files import markdown_table, write_json
from timm_geoprior.provenance import git_commit, hardware, versions


def leave_out(layer: Any, following: Any, value_dim: int, heads: int = 1) -> Any:
    """Replaces `fit_layer`."""
    return removal(layer, following, value_dim)


@torch.no_grad()
def leave_out_of_block(inputs: Any, old: Any, item: Any) -> tuple[float, float]:
    """Replaces the fit of an attention layer to images."""
    fit = removal(*state_dict.layer_models(item, old.state_dict()), item.value_dim)
    new = item.block.state_dict()
    for name, tensor in state_dict.apply_fit(old.state_dict(), fit).items():
        new[name].copy_(tensor)
    return fit.radii[0], 1.0


@contextmanager
def channels_left_out() -> Iterator[None]:
    """Within this context, conversions produce the control."""
    with patch.object(state_dict, 'fit_layer', leave_out), \
            patch.object(regression, '_fit_attention', leave_out_of_block):
        yield


def make(kind: str, task: job.ConvertJob) -> None:
    with nullcontext() if kind == 'converted' else channels_left_out():
        job.convert(task)


def load(name: str) -> LoadedModel:
    path = Path(name)
    if path.is_file():
        return load_model(None, path)
    return load_model(f'local-dir:{path}' if path.is_dir() else name)


def table(rows: list[dict[str, Any]]) -> str:
    header = ('network', 'images', 'top-1', '95% interval', 'same top-1 as the source', 'KL divergence',
              'feature error')
    lines = []
    for row in rows:
        images, correct = row['labelled'], row['correct']
        low, high = wilson_interval(correct, images)
        fitted = '' if row['fitted_to'] is None else f'{row["fitted_to"]:,}' if row['fitted_to'] else 'none'
        lines.append([row['network'], fitted, f'{correct / images:.2%}', f'{low:.2%} to {high:.2%}',
                      f'{row["agree"] / images:.1%}', f'{row["divergence"]:.4f}', f'{row["feature_error"]:.4f}'])
    return markdown_table(header, lines, left=(0, 3)) + '\n'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help='checkpoint of a plain ResNet, or a model of timm with weights')
    parser.add_argument('--images', type=Path, required=True, help='folder of images to fit to, without labels')
    parser.add_argument('--data-dir', type=Path, required=True, help='data set to measure on')
    parser.add_argument('--split', default='val', help='default: val')
    parser.add_argument('--limit', type=int, nargs='*', default=[30, 100, 300, 1000, 3000, 10000],
                        help='numbers of images to fit to (default: 30 to 10000)')
    parser.add_argument('--output', type=Path, required=True, help='folder to write')
    return parser.parse_args()


def run(args: argparse.Namespace) -> str:
    """Make and measure all networks, write the results, and return the table."""
    source = load(args.source)
    data, config = open_split(args.data_dir, args.split), job._data_config(source)
    every = np.arange(len(data.labels))
    answers = class_indices(data, source)
    if bool((answers < 0).all()):
        raise GeoPriorError(f'The classes of {args.data_dir} must be those of {args.source}, got none of them. Check '
                            f'--data-dir.')

    def measure(network: str, fitted_to: int | None, model: Any) -> dict[str, Any]:
        images = PreparedImages(ImageSets(data, every[:0], every), every, config, 100)
        return {'network': network, 'fitted_to': fitted_to,
                **compare(source.model, model, images, answers)}

    rows = [measure('source', None, source.model)]
    for kind, title in (('converted', 'converted'), ('left_out', 'channels left out')):
        for limit in (0, *args.limit):
            folder = args.output / f'{kind}_{limit}'
            if not folder.exists():
                make(kind, job.ConvertJob(args.source, folder, args.images if limit else None, limit=limit or 1000))
            rows.append(measure(title, limit, load(str(folder)).model))
    write_json(args.output / 'conversion.json', {
        'source': args.source, 'rows': rows, 'commit': git_commit(), 'software': versions(),
        'hardware': hardware(torch.device('cpu'))})
    text = table(rows)
    (args.output / 'conversion.md').write_text(text, encoding='utf-8')
    return text


def main() -> None:
    args = parse_args()
    with exit_on_error():
        print(run(args))


if __name__ == '__main__':
    main()
