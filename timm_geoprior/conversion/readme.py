"""The README of a converted folder: what it was made from, what was measured, how to use it."""
from typing import Any

from ..files import markdown_table


def layer_rows(results: dict[str, Any]) -> list[list[str]]:
    """A table of the layers, header first: their channels, radius in cells, and losses in percent."""
    fitted = 'images' in results
    rows = [['layer', 'channels', 'radius', 'energy lost', *(['output error'] if fitted else [])]]
    for layer in results['layers']:
        rows.append([layer['name'], str(layer['value_dim']), f'{layer["radius"]:.2f}', f'{100 * layer["lost"]:.1f}%',
                     *([f'{100 * layer["output"]:.2f}%'] if fitted else [])])
    return rows


def lines(results: dict[str, Any]) -> list[str]:
    """What was measured on the held-out images, one sentence each."""
    measured = results.get('measured') or {}
    if not measured:
        return ['Nothing was measured: there were no images.']
    count = measured['images']
    said = [f'Pooled features are off by {100 * measured["feature_error"]:.1f}% of their norm.']
    if 'agree' in measured:
        said.append(f'Top-1 predictions agree on {measured["agree"]:,} of {count:,} images '
                    f'({100 * measured["agree"] / count:.1f}%); the mean KL divergence from the source is '
                    f'{measured["divergence"]:.4f} nats.')
    if 'labelled' in measured:
        of = measured['labelled']
        said.append(f'Top-1 is {100 * measured["correct"] / of:.2f}% ({measured["correct"]:,} of {of:,} images), the '
                    f"source's {100 * measured['source_correct'] / of:.2f}% ({measured['source_correct']:,}).")
    return said


def readme(results: dict[str, Any], name: str) -> str:
    """The text of README.md, given the content of results.json and the folder's name."""
    source, images = results['source'], results.get('images')
    how = f'least squares on {images["fit"]["images"]:,} images' if images else 'in closed form, without images'
    origin = ', '.join(f'{title} `{source[key]}`' for key, title in (
        ('checkpoint', 'checkpoint'), ('hub_id', 'repository'), ('revision', 'revision'), ('sha256', 'SHA-256'),
    ) if source.get(key))
    header, *rows = layer_rows(results)
    return f"""# {name}

A `{results['architecture']}` of timm_geoprior, converted from the trained ResNet `{source['name']}`: {how}.

The channels of its 3x3 layers that lose least by the replacement come from Gaussian attention (*Explicitly Modeled
Attention Maps for Image Classification*, AAAI 2021, [arXiv 2006.07872](https://arxiv.org/abs/2006.07872)). The 1x1
convolutions and norms after them compensate for what is lost; all other weights are the source's. The network has
{results['parameters']:,} parameters, the source {source['parameters']:,}.

- Source: {origin or f"`{source['name']}`"}
- Licence of the source's weights, from which these are derived: {source.get('license') or 'not known'}

## Use

```python
import timm, timm_geoprior
model = timm.create_model({f'local-dir:{name}'!r}, pretrained=True).eval()
```

## Figures

{_figures(results)}

{markdown_table(header, rows)}

Radii are in cells of the layer's input. {_explanation(bool(images))}

Everything about this conversion is in `results.json`.
"""


def _figures(results: dict[str, Any]) -> str:
    if 'measured' not in results:
        return 'Nothing was measured. The accuracy is not known.'
    count = results['measured']['images']
    return f'On {count:,} images that it was not fitted to, compared with the source:\n\n' + '\n'.join(
        f'- {line}' for line in lines(results))


def _explanation(fitted: bool) -> str:
    if fitted:
        return ("*Energy lost* is the share of the replaced channels' energy, after norm and activation, that the "
                "attention misses; *output error* is the squared error of the block's output as a share of the energy "
                "of the source's. Both are measured on the images it was fitted to.")
    return ('*Energy lost* is the mean share of the variance of the replaced channels that the attention misses, under '
            'a model of the inputs: no images were used.')
