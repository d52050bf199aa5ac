"""What is written about the models: model cards and the README's tables, from the manifest, and a plot of the radii."""
from collections.abc import Collection
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..files import markdown_table, save_figure, write_atomically
from ..pretrained.manifest import Manifest, ManifestError, Metric, ModelEntry, load_manifest, manifest_path
from ..radii import LayerRadii

BEGIN, END = '<!-- models:begin -->', '<!-- models:end -->'

CITATION = """@inproceedings{tan2021explicitly,
  title = {Explicitly Modeled Attention Maps for Image Classification},
  author = {Tan, Andong and Nguyen, Duc Tam and Dax, Maximilian and Nie{\\ss}ner, Matthias and Brox, Thomas},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  volume = {35},
  pages = {9799--9807},
  year = {2021}
}"""

RADII = """## How far each layer looks

![The learned radius of each attention layer](radii.png)

The radius of each layer, relative to the side of its map: near zero the layer passes its values on as they are, far
above one it takes their mean over the whole picture."""

RECONSTRUCTION = """## What is reconstructed

The authors published no code. The kernel, the learned radius and the place of the attention are the paper's. The
numbers of value channels of the large networks were chosen so that the 152-layer one meets both cost figures of the
paper's abstract. These numbers, the small network, and the radii's initial value and learning rate are this project's
choices, not the paper's."""


def models_table(manifest: Manifest) -> str:
    """The README's table of models, in Markdown."""
    rows = []
    for entry in manifest.tags.values():
        if entry.status == 'converted' and not entry.default:  # these have a table of their own
            continue
        metric = entry.metrics[0] if entry.metrics else None
        size = metric.img_size if metric else entry.input.input_size[-1]
        rows.append((
            f'`{entry.name}`',
            entry.status,
            manifest.label_sets[entry.label_set].title,
            f'{size} px',
            _number(entry.parameters),
            'not measured' if entry.source and not metric else _percent(metric.top1 if metric else None),
            _percent(metric.top5 if metric else None),
            _baseline(entry),
            f'{entry.bytes / 1e6:.1f} MB' if entry.bytes else '',
        ))
    return markdown_table(('model', 'status', 'data', 'input', 'parameters', 'top-1', 'top-5', 'plain ResNet', 'file'),
                          rows, left=(0, 1, 2, 7))


def converted_table(manifest: Manifest) -> str:
    """The README's table of converted tags, in Markdown."""
    rows = []
    for entry in manifest.tags.values():
        if entry.source is None:
            continue
        own = _percent(entry.metrics[0].top1) if entry.metrics else 'not measured'
        rows.append((
            f'`{entry.name}`', entry.license, f'{entry.input.input_size[-1]} px', f'{entry.input.crop_pct:g}',
            _percent(entry.source.top1), own if entry.num_classes else 'no classifier'))
    return markdown_table(
        ('model', 'licence', 'input', 'crop', 'top-1 of its source, by timm', 'own top-1'), rows, left=(0, 1))


def runs_table(manifest: Manifest) -> str:
    """The README's table of how the weights were made, in Markdown: those with a training log in the manifest."""
    rows = []
    for entry in manifest.models.values():
        if not (log := entry.train_log):
            continue
        command = f'python scripts/train.py {entry.recipe} --data-dir DIR --output OUT --seed {entry.seed}'
        torch = f', torch {log.software["torch"]}' if 'torch' in log.software else ''
        rows.append((f'`{entry.name}`', f'`{command}`', f'`{(entry.recipe_commit or "")[:7]}`',
                     f'{_duration(log.hours)}, {log.epochs} epochs', f'{log.hardware}{torch}'))
    return markdown_table(('weights', 'command of the recipe', 'commit', 'wall time', 'on'), rows, left=(0, 1, 2, 4))


def _duration(hours: float) -> str:
    return f'{max(60 * hours, 1):.0f} min' if hours < 0.95 else f'{hours:.1f} h'


def _number(value: int | None) -> str:
    return '' if value is None else f'{value:,}'


def _percent(value: float | None) -> str:
    return '' if value is None else f'{value:.2f}%'


def _baseline(entry: ModelEntry) -> str:
    if entry.source:
        return f'`{entry.source.name}`: {_percent(entry.source.top1)}, published by timm'
    if entry.baseline is None:
        return ''
    return f'same recipe: {_percent(entry.baseline.metric.top1)} ({_number(entry.baseline.parameters)} parameters)'


def readme_tables(manifest: Manifest) -> str:
    """All of the README's tables, in Markdown."""
    count = sum(entry.source is not None for entry in manifest.tags.values())
    converted = f'<details><summary>All {count} converted tags</summary>\n\n{converted_table(manifest)}\n\n</details>'
    return f'{models_table(manifest)}\n\n{converted}\n\n{runs_table(manifest)}'


def update_readme(path: Path, manifest: Manifest) -> bool:
    """Write all tables between their markers in a README; returns whether it was changed."""
    text = path.read_text(encoding='utf-8')
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ManifestError(f'{path} must have the lines {BEGIN} and {END}, between which the tables go. Add them.')
    updated = f'{before}{BEGIN}\n{readme_tables(manifest)}\n{END}{after}'
    if updated != text:
        write_atomically(path, updated.encode('utf-8'))
    return updated != text


def model_card(
        entry: ModelEntry, manifest: Manifest, recipe: str = '', files: Collection[str] = (), experiments: str = '',
) -> ModelCard:
    """The model card of a tag: the README.md of its repository.

    Args:
        recipe: The recipe as YAML, to be quoted.
        files: Which of the files `train_log.csv` and `curves.png` are next to the card.
        experiments: Markdown with further results for this architecture, to be quoted.
    """
    data_set = manifest.label_sets[entry.label_set]
    data = ModelCardData(
        license=entry.license,
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'transformers', 'geoprior'],
        datasets=[data_set.hub_dataset],
        base_model=entry.base_model,
        model_name=entry.name,
        # not an empty list: that becomes a model-index without results
        eval_results=[r for metric in entry.metrics for r in _eval_results(metric, data_set.hub_dataset)] or None,
    )
    sections = [
        _head(entry, data_set.title), _use(entry), _figures(entry), _training(entry, recipe, files), RADII,
        f'## Experiments\n\n{experiments}' if experiments else '', RECONSTRUCTION,
        _limits(entry, data_set.title), f'## Citation\n\n```bibtex\n{CITATION}\n```']
    return ModelCard(f'---\n{data.to_yaml()}\n---\n\n' + '\n\n'.join(section for section in sections if section) + '\n')


def _eval_results(metric: Metric, hub_dataset: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type='image-classification', task_name='Image Classification', dataset_type=hub_dataset,
            dataset_name=metric.dataset, dataset_split=metric.split, metric_type='accuracy', metric_name=name,
            metric_value=round(value, 3))
        for name, value in (('Top-1 accuracy', metric.top1), ('Top-5 accuracy', metric.top5))]


def _head(entry: ModelEntry, title: str) -> str:
    return f"""# {entry.name}

An image classifier for the {entry.num_classes} classes of {title}: `{entry.architecture}` of timm_geoprior, a plugin
for [timm](https://github.com/huggingface/pytorch-image-models). It is a ResNet in which, from the second stage on,
some output channels of each 3x3 layer come from self-attention whose map is not computed from the image: it is a
Gaussian of the distance between two positions, with one learned radius per layer (*Explicitly Modeled Attention Maps
for Image Classification*, AAAI 2021, [arXiv 2006.07872](https://arxiv.org/abs/2006.07872))."""


def _use(entry: ModelEntry) -> str:
    return f"""## Use

```bash
pip install timm-geoprior
```

```python
import timm, timm_geoprior  # the second import registers the architecture
from PIL import Image
model = timm.create_model('{entry.name}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
probabilities = model(transform(Image.open('image.jpg').convert('RGB'))[None]).softmax(-1)
```

Loaded by this name, the weights come from a pinned commit and are checked against the SHA-256 that the package carries.
`hf-hub:` names of timm and transformers' `TimmWrapperForImageClassification` and `pipeline` load this repository too,
after `import timm_geoprior`, but do not check it. For features use timm's `features_only=True`: `TimmBackbone` of
transformers 5.24 loads the weights of any timm network, then resets the running statistics of its batch norms."""


def _figures(entry: ModelEntry) -> str:
    if not entry.metrics:
        return ''
    rows = [(f'{metric.dataset}, {metric.split}', f'{metric.num_images:,}', f'{metric.img_size} px', metric.precision,
             f'{metric.top1:.2f}% ({metric.top1_correct:,})', f'{metric.top5:.2f}% ({metric.top5_correct:,})')
            for metric in entry.metrics]
    header = ('data', 'images', 'input', 'precision', 'top-1', 'top-5')
    text = f'## Figures\n\n{markdown_table(header, rows, left=(0, 3))}'
    if entry.baseline:
        text += (f'\n\nThe plain `{entry.baseline.architecture}`, trained by the same recipe, reaches '
                 f'{entry.baseline.metric.top1:.2f}% top-1. It has {entry.baseline.parameters:,} parameters, this '
                 f'model {entry.parameters:,}.')
    precisions = ' '.join(dict.fromkeys(metric.precision for metric in entry.metrics))
    return text + f"""

To reproduce the figures, in a checkout of the project (the command fails if one differs):

```bash
python scripts/validate.py --check --data-dir DIR \\
    --model {entry.name} --precision {precisions}
```"""


def _training(entry: ModelEntry, recipe: str, files: Collection[str]) -> str:
    facts = [
        f'- recipe: `{entry.recipe}`' if entry.recipe else '',
        f'- seed: {entry.seed}' if entry.seed is not None else '',
        f'- commit of the project: `{entry.recipe_commit}`' if entry.recipe_commit else '',
        f'- started from: `{entry.base_model}`' if entry.base_model else '- started from random weights',
    ]
    if entry.train_log:
        facts.append(
            f'- {entry.train_log.epochs} epochs in {_duration(entry.train_log.hours)} on {entry.train_log.hardware}')
    text = '## Training\n\n' + '\n'.join(fact for fact in facts if fact)
    if 'train_log.csv' in files:
        text += '\n\nThe log of every epoch is `train_log.csv`.'
    if 'curves.png' in files:
        text += '\n\n![Loss, accuracy and learning rate over the epochs](curves.png)'
    if not recipe:
        return text
    return text + f'\n\n<details><summary>The whole recipe</summary>\n\n```yaml\n{recipe.strip()}\n```\n\n</details>'


def _limits(entry: ModelEntry, title: str) -> str:
    return f"""## Intended use and limits

For research on image classification and as a starting point for fine-tuning. It knows the {entry.num_classes} classes
of {title} and answers with one of them whatever it is shown; its errors and biases are those of that data set, and it
has not been tested for any decision about people.

The weights are under {entry.license}. Terms of the data they were trained on: {entry.data_terms}."""


def plot_radii(layers: list[LayerRadii], path: Path) -> None:
    """Draw the radius of each attention layer, relative to its map, as PNG."""
    from matplotlib.figure import Figure  # extra `train`

    figure = Figure(figsize=(8, 3.5), layout='constrained')
    axes = figure.add_subplot()
    for index, layer in enumerate(layers):
        axes.plot([index] * len(layer.relative), layer.relative, 'o', color='C0')
    axes.set_yscale('log')
    lowest, highest = axes.get_ylim()
    axes.set_ylim(min(lowest, 0.01), max(highest, 5))  # so that the plots of different networks are comparable
    axes.yaxis.set_major_formatter('{x:g}')
    axes.yaxis.set_minor_formatter('')
    axes.axhline(1, color='0.7', linewidth=1)
    names = [f'{layer.name.removesuffix(".conv2.attn")}  ({layer.height} x {layer.width})' for layer in layers]
    axes.set_xticks(range(len(layers)), names, rotation=90, fontsize=7)
    axes.set_xlabel('layer and its map in cells')
    axes.set_ylabel('radius / side of the map')
    save_figure(path, figure, dpi=120)


def main() -> None:
    """Update the README's tables."""
    update_readme(manifest_path().parent / 'README.md', load_manifest())


if __name__ == '__main__':
    main()
