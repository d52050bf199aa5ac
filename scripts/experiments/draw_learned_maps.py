"""Draw what each attention layer of a trained network looks at, over the sample photograph."""
import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import timm
import torch
from matplotlib.axes import Axes
from PIL import Image, ImageOps

from timm_geoprior.inference.inputs import sample_image
from timm_geoprior.layers import attention_map
from timm_geoprior.radii import learned_radii


def draw_map(axes: Axes, photo: Image.Image, cells: int, radius: float, at: float) -> None:
    """Draw a layer's map for the query at the relative position `at` on both axes; attended cells are bright."""
    query = int(at * cells)
    row = attention_map(torch.tensor([radius]).log(), cells)[0, query]
    weights = torch.outer(row, row)
    shade = torch.zeros(cells, cells, 4)
    shade[..., 3] = 0.85 * (1 - weights / weights.max())
    axes.imshow(photo, extent=(0, cells, cells, 0))
    axes.imshow(shade, extent=(0, cells, cells, 0))
    axes.plot(query + 0.5, query + 0.5, 'x', color='cyan', markersize=8)
    axes.set_axis_off()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--model', default='geoprior_resnet14_nano', help='default: geoprior_resnet14_nano')
    parser.add_argument(
        '--output', type=Path, default=Path(__file__).parents[2] / 'docs' / 'learned_maps.png',
        help='PNG file to write (default: docs/learned_maps.png)')
    args = parser.parse_args()
    model = timm.create_model(args.model, pretrained=True)
    layers = learned_radii(model, model.pretrained_cfg['input_size'])
    photo = ImageOps.fit(sample_image(), (192, 192))
    figure, panels = plt.subplots(1, len(layers), figsize=(2.6 * len(layers), 3), layout='constrained', squeeze=False)
    for axes, layer in zip(panels[0], layers, strict=True):
        draw_map(axes, photo, layer.width, layer.cells[0], at=0.4)
        axes.set_title(f'{layer.name}\n{layer.cells[0]:.2f} cells of {layer.width}', fontsize=9)
    figure.savefig(args.output, dpi=100, bbox_inches='tight', pad_inches=0.05)
    Image.open(args.output).convert('RGB').quantize(256).save(args.output, optimize=True)
    print(f'Wrote {args.output}.')


if __name__ == '__main__':
    main()
