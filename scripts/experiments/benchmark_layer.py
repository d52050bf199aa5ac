#!/usr/bin/env python3
"""Compare the attention layer with the same attention as a dense map, and with content-based attention.

    python scripts/experiments/benchmark_layer.py --output bench/layer

For each map size, this measures GeoPriorAttn2d, its values times the precomputed dense (H W) x (H W) map, and
scaled_dot_product_attention of a query, key and value projection. All have the same number of value channels. The size
of a map is that of its tensors; scaled_dot_product_attention stores no map.
"""
import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.utils.benchmark import Timer

from benchmark import BenchmarkError, Workload, summarize
from timm_geoprior import GeoPriorAttn2d
from timm_geoprior.files import save_figure, write_csv
from timm_geoprior.layers import attention_map


class DenseAttn2d(nn.Module):
    """GeoPriorAttn2d with the full map of shape (H W, H W), which the separable form avoids."""

    def __init__(self, attn: GeoPriorAttn2d, size: int) -> None:
        super().__init__()
        self.value = attn.value
        axis = attention_map(attn.log_radius.detach(), size)[0]
        self.register_buffer('map', torch.kron(axis, axis))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, dim, H, W) to (B, value_dim, H, W)."""
        values = self.value(x)
        mixed: torch.Tensor = values.flatten(2) @ self.map.T  # type: ignore[operator]
        return mixed.view_as(values)


def map_bytes(layer: nn.Module, size: int) -> int | None:
    """Bytes of the attention maps that a layer stores or computes for a feature map of `size` x `size` cells."""
    if isinstance(layer, GeoPriorAttn2d):
        return 2 * attention_map(layer.log_radius, size).nbytes  # rows and columns
    return layer.map.nbytes if isinstance(layer, DenseAttn2d) else None  # type: ignore[operator,return-value]


class ComputedAttn2d(nn.Module):
    """Single-head attention whose map is computed from the input, by torch's own function."""

    def __init__(self, dim: int, value_dim: int) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(dim, 3 * value_dim, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, dim, H, W) to (B, value_dim, H, W)."""
        query, key, value = self.qkv(x).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return mixed[:, 0].transpose(1, 2).reshape(len(x), -1, *x.shape[2:])


def contestants(dim: int, value_dim: int, size: int, max_bytes: float) -> dict[str, nn.Module]:
    """The layers to compare, without the dense one if its map would exceed `max_bytes`."""
    attn = GeoPriorAttn2d(dim, value_dim)
    layers: dict[str, nn.Module] = {'GeoPriorAttn2d': attn}
    if 4 * size ** 4 <= max_bytes:
        layers['dense map'] = DenseAttn2d(attn, size)
    else:
        print(f'dense map at {size} x {size} is left out: it takes {4 * size ** 4 / 1e9:.1f} GB.', file=sys.stderr)
    layers['scaled_dot_product_attention'] = ComputedAttn2d(dim, value_dim)
    return layers


@torch.inference_mode()
def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds of each layer at each size: median and quartiles of interleaved repetitions."""
    rows = []
    for size in args.sizes:
        layers = contestants(args.dim, args.value_dim, size, args.max_gigabytes * 1e9)
        x = torch.randn(1, args.dim, size, size, device=args.device).to(memory_format=torch.channels_last)
        timers = {}
        for name, layer in layers.items():
            layer.to(args.device)
            timers[name] = Timer('layer(x)', globals={'layer': layer, 'x': x}, num_threads=args.threads)
        numbers = {name: max(1, round(args.min_seconds / timer.timeit(1).mean)) for name, timer in timers.items()}
        times: dict[str, list[float]] = {name: [] for name in timers}
        for _ in range(args.repeats):
            for name, timer in timers.items():
                times[name].append(1e3 * timer.timeit(numbers[name]).mean)
        for name, values in times.items():
            spread = summarize(values)
            kept = map_bytes(layers[name], size)
            rows.append({'layer': name, 'size': size, 'milliseconds': spread.median, 'low': spread.low,
                         'high': spread.high, 'map_bytes': kept})
            print(f'{size:4} x {size:<4} {name:30} {spread.median:10.3f} ms [{spread.low:.3f}, {spread.high:.3f}]'
                  + (f'  maps {kept:,} bytes' if kept else ''))
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw time and map bytes over the side of the map, with lines that grow as H W (H + W), (H W)^2 and H^2 + W^2."""
    figure = Figure(figsize=(11, 4.2), layout='constrained')
    times, maps = figure.subplots(1, 2)
    sizes = sorted({row['size'] for row in rows})
    for name in dict.fromkeys(row['layer'] for row in rows):
        own = [row for row in rows if row['layer'] == name]
        sides = [row['size'] for row in own]
        times.errorbar(sides, [row['milliseconds'] for row in own], marker='o', label=name,
                       yerr=[[row['milliseconds'] - row['low'] for row in own],
                             [row['high'] - row['milliseconds'] for row in own]])
        if own[0]['map_bytes']:
            maps.plot(sides, [row['map_bytes'] for row in own], marker='o', label=name)
    last = next(row for row in reversed(rows) if row['layer'] == 'GeoPriorAttn2d')
    for axes, key, powers in (
            (times, 'milliseconds', {3: 'grows as H W (H + W)', 4: 'grows as (H W)$^2$'}),
            (maps, 'map_bytes', {2: 'grows as H$^2$ + W$^2$', 4: 'grows as (H W)$^2$'})):
        for style, (power, label) in zip((':', '--'), powers.items(), strict=True):
            growth = [last[key] * (size / last['size']) ** power for size in sizes]
            axes.plot(sizes, growth, style, color='0.5', label=label)
        axes.set(xscale='log', yscale='log', xlabel='side of the map, cells')
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.legend(fontsize=8)
    times.set_ylabel('milliseconds, one image')
    maps.set_ylabel('bytes of the maps')
    save_figure(path, figure, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, required=True, help='folder to write: layer.csv and layer.png')
    parser.add_argument(
        '--sizes', type=int, nargs='+', default=[14, 28, 56, 128, 256], help='sides of the maps, in cells')
    parser.add_argument('--dim', type=int, default=128, help='input channels (default: 128)')
    parser.add_argument('--value-dim', type=int, default=8, help='value channels (default: 8)')
    parser.add_argument('--device', default='cpu', help='cpu, cuda or cuda:N')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='CPU threads')
    parser.add_argument('--repeats', type=int, default=9, help='repetitions (default: 9)')
    parser.add_argument('--min-seconds', type=float, default=0.2, help='minimum seconds per repetition (default: 0.2)')
    parser.add_argument('--max-gigabytes', type=float, default=4, help='largest dense map (default: 4)')
    args = parser.parse_args()
    try:
        Workload(device=args.device).check()
    except BenchmarkError as error:
        sys.exit(f'benchmark_layer.py: {error}')
    args.output.mkdir(parents=True, exist_ok=True)
    rows = measure(args)
    write_csv(args.output / 'layer.csv', rows)
    plot(rows, args.output / 'layer.png')


if __name__ == '__main__':
    main()
