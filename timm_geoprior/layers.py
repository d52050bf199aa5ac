"""Self-attention whose map is modelled, not computed.

Tan, Nguyen, Dax, Niessner, Brox: *Explicitly Modeled Attention Maps for Image Classification*, AAAI 2021,
pages 9799-9807, arXiv 2006.07872. The map is a Gaussian of the distance between two positions; all that is learned of
it is a radius. The softmax of a separable kernel over a grid is the product of the softmaxes over its rows and columns,
so the dense (H*W) x (H*W) map is never built.
"""
import math
from typing import Any, Literal

import torch
from timm.layers import register_notrace_module
from torch import nn

__all__ = ['KERNELS', 'GeoPriorAttn2d', 'GeoPriorConv2d', 'attention_map', 'mix_values']

KernelType = Literal['gaussian', 'laplacian']
KERNELS = ('gaussian', 'laplacian')

MIN_RADIUS, MAX_RADIUS = 1e-4, 1e4


def attention_map(
        log_radius: torch.Tensor,
        size: int,
        stride: int = 1,
        dilation: int = 1,
        kernel: str = 'gaussian',
) -> torch.Tensor:
    """One axis of the attention map: `softmax_k(-(s i - k)^2 / (2 r^2))`, with `r = dilation * exp(log_radius)`.

    Args:
        log_radius: Logarithm of the radius of each head, in cells of an undilated grid, shape (num_heads,).
        size: Number of input positions along the axis, in cells.
        stride: Distance of two neighbouring queries, in cells; query i sits at cell `stride * i`.
        dilation: How many times finer the grid is than the one that the radius was learned on.
        kernel: 'gaussian', or 'laplacian' for `softmax_k(-|s i - k| / r)`.

    Returns:
        The map, shape (num_heads, (size - 1) // stride + 1, size), of log_radius' dtype; each row sums to one.
    """
    # written as a convolution's output size is, so that torch.export can unify the two
    queries = stride * torch.arange((size - 1) // stride + 1, device=log_radius.device, dtype=log_radius.dtype)
    keys = torch.arange(size, device=log_radius.device, dtype=log_radius.dtype)
    # float32 keeps the map and its gradient finite for any radius from 1e-4 to 1e4; a log_radius of -30 or 90 does not
    limit = math.log(1e4)  # MAX_RADIUS: TorchScript sees no globals
    radius = dilation * log_radius.clamp(-limit, limit).exp()
    distance = (queries[:, None] - keys[None, :]).abs() / radius[:, None, None]
    scores = -distance if kernel == 'laplacian' else -0.5 * distance * distance
    # far weights are nothing: below 1e-38 they would be subnormal numbers, on which a CPU multiplies many times slower
    return torch.nn.functional.threshold(scores.softmax(dim=-1), 1e-30, 0.0)


def _attend(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Average (B, N, C) over N by weights (Q, N): (B, Q, C)."""
    return torch.bmm(weights.expand(values.shape[0], -1, -1), values)


def mix_values(
        values: torch.Tensor,
        log_radius: torch.Tensor,
        stride: int = 1,
        dilation: int = 1,
        kernel: str = 'gaussian',
) -> torch.Tensor:
    """Attend with a separable map over the rows and columns of the values: `A_h V A_w^T`.

    The maps are computed in at least float32, whatever the autocast, and cast to the values' dtype.

    Args:
        values: Values V, shape (B, C, H, W); head j owns the j-th of num_heads equal shares of the channels.
        log_radius: Logarithm of each head's radius, shape (num_heads,).
        stride: Distance of two neighbouring queries, in cells.
        dilation: Factor on the radius.
        kernel: 'gaussian' or 'laplacian'.

    Returns:
        Shape (B, C, (H - 1) // stride + 1, (W - 1) // stride + 1), in the values' dtype and in channels_last format.
    """
    height, width = values.shape[2], values.shape[3]
    log_radius = log_radius.to(torch.promote_types(values.dtype, torch.float32))
    rows = attention_map(log_radius, height, stride, dilation, kernel).to(values.dtype)
    cols = attention_map(log_radius, width, stride, dilation, kernel).to(values.dtype)
    heads = []
    for head, value in enumerate(values.chunk(log_radius.shape[0], dim=1)):
        batch, channels = value.shape[0], value.shape[1]
        mixed = _attend(rows[head], value.permute(0, 2, 3, 1).flatten(2))
        # both products on the layout of a channels_last network: nothing is copied in between. By way of one axis and
        # two: what torch.export can split where a size is (H - 1) // 2 + 1
        mixed = mixed.flatten().view(-1, channels).view(batch * rows.shape[1], width, channels)
        heads.append(_attend(cols[head], mixed).view(batch, rows.shape[1], cols.shape[1], channels))
    mixed = heads[0] if len(heads) == 1 else torch.cat(heads, dim=3)
    return mixed.permute(0, 3, 1, 2)


# sizes are values in a traced graph: plain torch.fx keeps the call whole instead of tracing `shape`
torch.fx.wrap('mix_values')


def _check_options(
        dim: int, value_dim: int, stride: int, dilation: int, num_heads: int, radius: float, kernel: str) -> None:
    for name, value in (('dim', dim), ('value_dim', value_dim), ('stride', stride), ('dilation', dilation)):
        if value < 1:
            raise ValueError(f'{name} is {value}, expected at least 1: change {name}.')
    if not 1 <= num_heads <= value_dim or value_dim % num_heads:
        raise ValueError(
            f'num_heads is {num_heads} for {value_dim} value channels, expected a number from 1 to {value_dim} '
            f'that divides {value_dim}: change attn_heads or value_dims.')
    if not MIN_RADIUS <= radius <= MAX_RADIUS:  # nan too
        raise ValueError(
            f'The initial radius is {radius} cells, expected a finite number from {MIN_RADIUS:g} to {MAX_RADIUS:g}: '
            f'change attn_radius.')
    if kernel not in KERNELS:
        raise ValueError(f'The kernel is {kernel!r}, expected one of {", ".join(KERNELS)}: change attn_kernel.')


@register_notrace_module  # timm's FX feature extraction must not trace the sizes either
class GeoPriorAttn2d(nn.Module):
    """Self-attention over a 2D map with a modelled attention map and one learned radius a head.

    `Y = A_h (W_v X) A_w^T`: a 1x1 convolution makes the values; each output position takes their average over the
    whole input, weighted by a Gaussian of the distance. The cost is O(H W (H + W)) a channel, any H and W will do.
    Source: arXiv 2006.07872; the separable form is exact (see the module's docstring).

    `log_radius` holds the logarithm of the radius, which the map uses times the dilation, in cells of the layer's input
    grid. A radius below about 0.3 cells makes the identity, one far beyond the map's extent its mean; the gradient of
    the radius vanishes at both ends.

    Examples:
        >>> attn = GeoPriorAttn2d(64, 16, stride=2)
        >>> attn(torch.randn(2, 64, 15, 20)).shape
        torch.Size([2, 16, 8, 10])
    """

    def __init__(
            self,
            dim: int,
            value_dim: int,
            stride: int = 1,
            dilation: int = 1,
            num_heads: int = 1,
            init_radius: float = 3.0,
            kernel: KernelType = 'gaussian',
            fan_out: int | None = None,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            dim: Input channels.
            value_dim: Value channels, which are the output channels.
            stride: Distance of two queries, in cells; the output sits where a 3x3 convolution's of this stride does.
            dilation: Factor on the radius, for a grid made finer by an `output_stride`.
            num_heads: Number of radii, each over its equal share of the value channels.
            init_radius: Radius that every head starts from, in cells of an undilated grid.
            kernel: 'gaussian' or 'laplacian'.
            fan_out: Channels that the initial scale of W_v is for, standard deviation sqrt(2 / fan_out);
                `value_dim` where it is None, the whole layer's channels where this is a part of one.
            device: Device of the parameters.
            dtype: Type of the parameters.

        Raises:
            ValueError: A size below one, heads that do not divide the value channels, a radius that is not a finite
                number from 1e-4 to 1e4, or a kernel that does not exist.
        """
        super().__init__()
        _check_options(dim, value_dim, stride, dilation, num_heads, init_radius, kernel)
        self.stride = stride
        self.dilation = dilation
        self.kernel = kernel
        self.init_radius = init_radius
        self.fan_out = fan_out or value_dim
        self.value = nn.Conv2d(dim, value_dim, 1, bias=False, device=device, dtype=dtype)
        self.log_radius = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W_v with standard deviation sqrt(2 / fan_out) and put every radius back to its initial value.

        By its own fan-out the few value channels would start with 8 to 16 times the squared norm of the rows beside
        them, and under a norm layer learn as many times slower.
        """
        nn.init.normal_(self.value.weight, std=math.sqrt(2 / self.fan_out))
        nn.init.constant_(self.log_radius, math.log(self.init_radius))

    def radius(self) -> torch.Tensor:
        """The learned radii in cells of the layer's input grid, float32, shape (num_heads,), detached."""
        return self.dilation * self.log_radius.detach().float().exp().clamp(MIN_RADIUS, MAX_RADIUS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, dim, H, W) to (B, value_dim, (H - 1) // stride + 1, (W - 1) // stride + 1)."""
        return mix_values(self.value(x), self.log_radius, self.stride, self.dilation, self.kernel)

    def extra_repr(self) -> str:
        return (f'num_heads={self.log_radius.shape[0]}, stride={self.stride}, dilation={self.dilation}, '
                f'kernel={self.kernel!r}')


class GeoPriorConv2d(nn.Module):
    """A 3x3 convolution that leaves `value_dim` of its output channels to a `GeoPriorAttn2d`.

    `cat([conv3x3(X), attn(X)], dim=1)`: a drop-in for the 3x3 convolution of a bottleneck. The arrangement beside a
    convolution, concatenated, is that of AA-ResNet (Bello et al., 2019, arXiv 1904.09925), which the paper compares
    with.

    Examples:
        >>> GeoPriorConv2d(128, 128, value_dim=8, stride=2)(torch.randn(2, 128, 28, 28)).shape
        torch.Size([2, 128, 14, 14])
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            value_dim: int,
            stride: int = 1,
            dilation: int = 1,
            num_heads: int = 1,
            init_radius: float = 3.0,
            kernel: KernelType = 'gaussian',
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            in_channels: Input channels.
            out_channels: Output channels, the value channels among them (the last ones).
            value_dim: Output channels that come from the attention, from 1 to out_channels - 1.
            stride: Stride of the convolution and of the attention's queries.
            dilation: Dilation of the convolution and factor on the radius.
            num_heads: Number of radii.
            init_radius: Radius that every head starts from, in cells of an undilated grid.
            kernel: 'gaussian' or 'laplacian'.
            device: Device of the parameters.
            dtype: Type of the parameters.

        Raises:
            ValueError: Value channels below one or as many as out_channels, or an option that GeoPriorAttn2d refuses.
        """
        super().__init__()
        if not 0 < value_dim < out_channels:
            raise ValueError(
                f'{value_dim} value channels in a layer of {out_channels}, expected from 1 to {out_channels - 1} '
                f'(a stage with none has 0 in value_dims): change value_dims.')
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.conv = nn.Conv2d(
            in_channels, out_channels - value_dim, 3, stride, padding=dilation, dilation=dilation, bias=False, **dd)
        self.attn = GeoPriorAttn2d(
            in_channels, value_dim, stride, dilation, num_heads, init_radius, kernel, fan_out=out_channels, **dd)
        self.value_dim = value_dim
        self.merged = False

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Make one convolution of both parts, for inference; `timm.utils.reparameterize_model` calls it.

        The value projection becomes the middle tap of further 3x3 filters, whose channels the attention then averages
        in their place: the input is read once, and nothing is concatenated. Under a stride the values are needed where
        the convolution makes none, so there the projection stays, and zero filters hold the place of its channels. The
        outputs are the same up to rounding; the parameters have other names and shapes.
        """
        if self.merged:
            return
        conv, weight = self.conv, self.attn.value.weight
        weight = nn.functional.pad(weight if self.attn.stride == 1 else torch.zeros_like(weight), (1, 1, 1, 1))
        memory_format = (torch.channels_last if conv.weight.is_contiguous(memory_format=torch.channels_last)
                         else torch.contiguous_format)
        merged = torch.cat([conv.weight, weight]).contiguous(memory_format=memory_format)
        conv.weight = nn.Parameter(merged, requires_grad=conv.weight.requires_grad)
        conv.out_channels += self.value_dim
        if self.attn.stride == 1:
            self.attn.value = nn.Identity()  # type: ignore[assignment]
        self.merged = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, (H - 1) // stride + 1, (W - 1) // stride + 1)."""
        out: torch.Tensor = self.conv(x)
        if not self.merged:
            return torch.cat([out, self.attn(x)], dim=1)
        values = out[:, -self.value_dim:]
        values.copy_(self.attn(values if self.attn.stride == 1 else x))
        return out
