"""Self-attention with a modeled map instead of a computed one.

Tan, Nguyen, Dax, Niessner, Brox: *Explicitly Modeled Attention Maps for Image Classification*, AAAI 2021,
pages 9799-9807, arXiv 2006.07872. The map is a Gaussian of the distance between two positions, and its only learned
parameter is a radius. The softmax of a separable kernel over a grid is the product of one softmax over the rows and one
over the columns, so the dense (H*W) x (H*W) map is never built.
"""
import math
from typing import Any, Literal

import torch
from timm.layers import register_notrace_module
from torch import nn

__all__ = ['KERNELS', 'GeoPriorAttn2d', 'GeoPriorConv2d', 'attention_map', 'mix_values']

KernelType = Literal['gaussian', 'laplacian']
KERNELS = ('gaussian', 'laplacian')

# in float32 the map and its gradient are finite for these radii, but not for a log_radius of -30 or 90
MAX_RADIUS = 1e4
MIN_RADIUS = 1 / MAX_RADIUS


def attention_map(
        log_radius: torch.Tensor,
        size: int,
        stride: int = 1,
        dilation: int = 1,
        kernel: str = 'gaussian',
        limit: float = math.log(MAX_RADIUS),  # TorchScript sees arguments, but not globals
) -> torch.Tensor:
    """One axis of the attention map: `softmax_k(-(s i - k)^2 / (2 r^2))`, with `r = dilation * exp(log_radius)`.

    Args:
        log_radius: Logarithm of the radius of each head, in cells of an undilated grid, shape (num_heads,).
        size: Number of input positions along the axis, in cells.
        stride: Distance between neighbouring queries, in cells; query i is at cell `stride * i`.
        dilation: How many times finer the grid is than the undilated one.
        kernel: 'gaussian', or 'laplacian' for `softmax_k(-|s i - k| / r)`.
        limit: log_radius is clamped to -limit and limit.

    Returns:
        The map, shape (num_heads, (size - 1) // stride + 1, size), in the dtype of log_radius. Each row sums to one.
    """
    # as integers: bfloat16 holds whole numbers up to 256 only, float16 up to 2,048
    keys = queries = torch.arange(size, device=log_radius.device)
    if stride > 1:
        # written like a convolution's output size, so that torch.export can unify the two
        queries = stride * torch.arange((size - 1) // stride + 1, device=log_radius.device)
    radius = log_radius.clamp(-limit, limit).exp()
    if dilation > 1:
        radius = dilation * radius
    distance = (queries[:, None] - keys[None, :]) / radius[:, None, None]
    scores = -distance.abs() if kernel == 'laplacian' else -0.5 * distance * distance
    weights = scores.softmax(dim=-1)
    # tiny weights are set to zero: below 1e-38 they are subnormal, which makes a CPU's products many times slower
    return torch.where(weights <= 1e-30, 0.0, weights)  # not F.threshold: ONNX and OpenVINO cannot convert it


def _attend(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Average (B, N, C) over N by weights (Q, N): (B, Q, C)."""
    return torch.bmm(weights.expand(values.shape[0], -1, -1), values)


def _mix_head(values: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
    """Average (B, C, H, W) by weights (Q_h, H) and (Q_w, W): (B, Q_h, Q_w, C), the order of a channels_last tensor."""
    batch, channels, width = values.shape[0], values.shape[1], values.shape[3]
    mixed = _attend(rows, values.permute(0, 2, 3, 1).flatten(2))
    # nothing is copied between the two products; flattened first, because torch.export cannot split an axis of
    # (H - 1) // 2 + 1 rows directly
    mixed = mixed.flatten().view(-1, channels).view(batch * rows.shape[0], width, channels)
    return _attend(cols, mixed).view(batch, rows.shape[0], cols.shape[0], channels)


def _is_square(values: torch.Tensor) -> bool:
    """Whether one map serves both axes. An exported or compiled model has two: its height and width may vary."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return False
    if torch.jit.is_tracing() or torch.compiler.is_compiling():  # type: ignore
        return False
    return values.shape[2] == values.shape[3]


def mix_values(
        values: torch.Tensor,
        log_radius: torch.Tensor,
        stride: int = 1,
        dilation: int = 1,
        kernel: str = 'gaussian',
) -> torch.Tensor:
    """Apply the separable attention map to the rows and the columns of the values: `A_h V A_w^T`.

    The maps are computed in at least float32, also under autocast, and then cast to the dtype of the values.

    Args:
        values: Values V, shape (B, C, H, W). The channels are divided equally among the heads, in order.
        log_radius: Logarithm of the radius of each head, shape (num_heads,).
        stride: Distance between neighbouring queries, in cells.
        dilation: Factor applied to the radius.
        kernel: 'gaussian' or 'laplacian'.

    Returns:
        Shape (B, C, (H - 1) // stride + 1, (W - 1) // stride + 1), channels_last, in the dtype of the values.

    Raises:
        ValueError: The number of channels is not a multiple of the number of heads.
    """
    log_radius = log_radius.to(torch.promote_types(values.dtype, torch.float32))
    rows = cols = attention_map(log_radius, values.shape[2], stride, dilation, kernel).to(values.dtype)
    if not _is_square(values):
        cols = attention_map(log_radius, values.shape[3], stride, dilation, kernel).to(values.dtype)
    if log_radius.shape[0] == 1:  # also because the TorchScript-based ONNX exporter cannot split into one chunk
        mixed = _mix_head(values, rows[0], cols[0])
    else:
        if values.shape[1] % log_radius.shape[0]:
            raise ValueError(f'The number of channels must be a multiple of the number of heads '
                             f'({log_radius.shape[0]}), got {values.shape[1]}.')
        heads = values.chunk(log_radius.shape[0], dim=1)
        mixed = torch.cat([_mix_head(value, rows[i], cols[i]) for i, value in enumerate(heads)], dim=3)
    return mixed.permute(0, 3, 1, 2)


# torch.fx cannot trace values that depend on the input's size, so it keeps the call whole
torch.fx.wrap('mix_values')


def _check_options(
        dim: int, value_dim: int, stride: int, dilation: int, num_heads: int, radius: float, kernel: str) -> None:
    for name, value in (('dim', dim), ('value_dim', value_dim), ('stride', stride), ('dilation', dilation)):
        if value < 1:
            raise ValueError(f'{name} must be at least 1, got {value}.')
    if num_heads < 1 or value_dim % num_heads:
        raise ValueError(f'num_heads (attn_heads) must be a divisor of value_dim ({value_dim}), got {num_heads}.')
    if not MIN_RADIUS <= radius <= MAX_RADIUS:  # catches nan too
        limits = f'from {MIN_RADIUS:g} to {MAX_RADIUS:g} cells'
        raise ValueError(f'init_radius (attn_radius) must be {limits}, got {radius}.')
    if kernel not in KERNELS:
        raise ValueError(f'kernel (attn_kernel) must be one of {", ".join(KERNELS)}, got {kernel!r}.')


@register_notrace_module  # likewise for timm's FX feature extraction
class GeoPriorAttn2d(nn.Module):
    """Self-attention over a 2D map, with a modeled attention map and one learned radius per head.

    `Y = A_h (W_v X) A_w^T`: a 1x1 convolution computes the values, and each output position is their average over the
    whole input, weighted by a Gaussian of the distance. The cost per channel is O(H W (H + W)), for any H and W.
    Source: arXiv 2006.07872; the separable form is exact (see the module's docstring).

    `log_radius` is the logarithm of the radius. The map uses `dilation * exp(log_radius)`, in cells of the layer's
    input. Below about 0.3 cells the attention is the identity, and far beyond the size of the map it is the mean; at
    both ends the gradient of the radius vanishes.

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
            dim: Number of input channels.
            value_dim: Number of value channels, which is the number of output channels.
            stride: Distance between queries, in cells. The output positions are those of a 3x3 convolution.
            dilation: Factor applied to the radius, for the finer grid that `output_stride` makes.
            num_heads: Number of radii. Each head has an equal share of the value channels.
            init_radius: Initial radius of every head, in cells of an undilated grid.
            kernel: 'gaussian' or 'laplacian'.
            fan_out: W_v is initialized with standard deviation sqrt(2 / fan_out). Defaults to `value_dim`; where the
                attention is part of a layer, this is the number of channels of the whole layer.
            device: Device of the parameters.
            dtype: Dtype of the parameters.

        Raises:
            ValueError: If a size is below 1, `num_heads` does not divide `value_dim`, `init_radius` is not between
                1e-4 and 1e4, or the kernel is unknown.
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
        """Initialize W_v with standard deviation sqrt(2 / fan_out), and every radius with `init_radius`.

        With their own fan-out, the few value channels would start with 8 to 16 times the squared norm of the
        convolution's filters beside them, and learn 8 to 16 times slower under a norm layer.
        """
        nn.init.normal_(self.value.weight, std=math.sqrt(2 / self.fan_out))
        nn.init.constant_(self.log_radius, math.log(self.init_radius))

    def radius(self) -> torch.Tensor:
        """Return the learned radii in cells of the layer's input: float32, shape (num_heads,), detached."""
        return self.dilation * self.log_radius.detach().float().exp().clamp(MIN_RADIUS, MAX_RADIUS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, dim, H, W) to (B, value_dim, (H - 1) // stride + 1, (W - 1) // stride + 1)."""
        return mix_values(self.value(x), self.log_radius, self.stride, self.dilation, self.kernel)

    def extra_repr(self) -> str:
        return (f'num_heads={self.log_radius.shape[0]}, stride={self.stride}, dilation={self.dilation}, '
                f'kernel={self.kernel!r}')


class GeoPriorConv2d(nn.Module):
    """A 3x3 convolution and a `GeoPriorAttn2d` side by side: `cat([conv3x3(X), attn(X)], dim=1)`.

    A drop-in replacement for the 3x3 convolution of a bottleneck. Attention concatenated to a convolution is the
    arrangement of AA-ResNet (Bello et al., 2019, arXiv 1904.09925), the paper's baseline.

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
            in_channels: Number of input channels.
            out_channels: Number of output channels, of which the attention computes the last `value_dim`.
            value_dim: Number of channels that the attention computes, from 1 to out_channels - 1.
            stride: Stride of the convolution and of the attention's queries.
            dilation: Dilation of the convolution, and factor applied to the radius.
            num_heads: Number of radii.
            init_radius: Initial radius of every head, in cells of an undilated grid.
            kernel: 'gaussian' or 'laplacian'.
            device: Device of the parameters.
            dtype: Dtype of the parameters.

        Raises:
            ValueError: If `value_dim` is out of range, or GeoPriorAttn2d rejects an option.
        """
        super().__init__()
        if not 0 < value_dim < out_channels:
            raise ValueError(
                f'value_dim must be from 1 to {out_channels - 1} in a layer of {out_channels} channels, '
                f'got {value_dim}. Use 0 in value_dims for a stage without attention.')
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.conv = nn.Conv2d(
            in_channels, out_channels - value_dim, 3, stride, padding=dilation, dilation=dilation, bias=False, **dd)
        self.attn = GeoPriorAttn2d(
            in_channels, value_dim, stride, dilation, num_heads, init_radius, kernel, fan_out=out_channels, **dd)

    def _load_from_state_dict(
            self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
            missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str]) -> None:
        # reported even with strict=False, which would leave this layer random. A GeoPriorResNet has converted such a
        # weight by now, but a network of timm's features_only has no such class
        plain = f'{prefix}weight'
        if plain in state_dict and f'{prefix}conv.weight' not in state_dict and 'weight' not in self._parameters:
            error_msgs.append(
                f'{plain} is that of a plain convolution, where this network has attention. The weights of a plain '
                f'ResNet can be loaded into a whole GeoPriorResNet, which converts them, and into a features_only '
                f"network by pretrained=True and pretrained_cfg_overlay={{'file': FILE}}. Other weights need a network "
                f'with their own options, such as value_dims.')
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, (H - 1) // stride + 1, (W - 1) // stride + 1)."""
        return torch.cat([self.conv(x), self.attn(x)], dim=1)
