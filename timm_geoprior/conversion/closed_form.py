r"""Convert a trained ResNet to a GeoPrior ResNet in closed form, without images.

A bottleneck computes `conv3(act(norm2(conv2(act(norm1(...))))))`. In a GeoPrior ResNet, some output channels of the 3x3
convolution conv2 are computed by attention instead: `W_v` mixes the input channels, and each output position takes an
average over the map, weighted by a Gaussian of radius r around it. Given the weights of a trained bottleneck and the
size of its map, this module chooses which channels of conv2 to replace, finds the r, `W_v` and running means of norm2
that approximate them best, and corrects conv3 for what is lost.

**Symbols.** The input channels of conv2 are i, its output channels c and d, those of conv3 e; t and u are the nine taps
of a kernel, q the output positions. K_ci is the kernel from i to c, K_cit its weight at tap t. A vector has an entry
for each position of the input map: k_qt is one at the position that tap t of output q falls on and zero elsewhere (zero
everywhere if the tap falls on the padding); a_q holds the attention weights for q, which sum to one. A trailing prime
denotes the transpose.

**Inputs.** Channel i of conv2's input is `x_i = act(z_i)`. z_i is modelled as Gaussian: its mean is norm1's bias, its
standard deviation the absolute value of norm1's weight. The mean m_i and the variance of x_i are then those of a
rectified Gaussian (for activations other than ReLU, by quadrature). The block's own input is modelled as white, so that
the correlation of z_i and z_j is the cosine of two rows of conv1, with the signs of norm1's weights. This gives the
covariance C_ij of x_i and x_j (see Correction). Two positions that are dy rows and dx columns apart have the
correlation `rho^(|dy| + |dx|)`; R is the matrix of these correlations over all positions, and the covariance of the
whole input is the product of C and R.

**Products of kernels.** For kernels K and L, and G for the attention, define

    <K, L> = sum_tu K_t L_u mean_q(k_qt' R k_qu)
    <K, G> = sum_t K_t mean_q(k_qt' R a_q)
    <G, G> = mean_q(a_q' R a_q)

`sum_ij C_ij <K_ci, K_dj>` is then the covariance of conv2's channels c and d, averaged over the map. R, k and a are
separable, so each mean over q is a mean over the rows times one over the columns. The means are over the layer's own
map and stride, including its borders: on a map of 7x7 cells half of the positions see the padding.

**Values.** The least-squares fit of channel c, `u_c = sum_i K_ci * x_i`, by `sum_i W_ci (G * x_i)` is

    W_ci = <K_ci, G> / <G, G>        error_c = sum_ij C_ij (<K_ci, K_cj> - <K_ci, G> <K_cj, G> / <G, G>)

The W_ci of the replaced channels make up `W_v`. They do not depend on C: the normal equations separate.

**Means.** The fit raises the mean of u_c by `sum_i m_i (W_ci - sum_t f_t K_cit)`, where f_t is the share of output
positions whose tap t falls on the map. The running mean of norm2 is raised by the same amount.

**Choice.** The cost of replacing channel c is the product of

- its error as a share of its variance, `error_c / sum_ij C_ij <K_ci, K_cj>`,
- the square of norm2's weight, which is the channel's variance after the norm,
- the mean squared slope of the activation, which for ReLU is the share of positions where the channel is active,
- `sum_e (s_e W3_ec)^2`, with conv3's weights W3 and norm3's scales s_e.

For each radius, the channels with the lowest costs are taken, as many as the attention has; the layer gets the radius
at which their total cost is lowest. Several heads choose one after the other, each from the channels that are left.

**Correction.** Let y_c be channel c after norm2, and y'_c the same channel in the new layer. Both are modelled as
Gaussian with norm2's bias as their mean. The standard deviation of y_c is the absolute value of norm2's weight; that of
y'_c is smaller by the same factor as before the norm. Their correlations follow from the products of kernels. For each
replaced channel c, what is lost, `act(y_c) - act(y'_c)`, is regressed on `act(y'_d)` for all channels d, with a small
ridge penalty. With the expansion `act(mean + std z) = sum_n a_n he_n(z)` in orthonormal Hermite polynomials, Mehler's
formula gives the covariances that the regression needs:

    cov(act(y_c), act(y'_d)) = sum_(n >= 1) a_cn a'_dn corr(y_c, y'_d)^n

C is computed in the same way, from the correlations of z. The coefficients B_cd are added to conv3's weights,
`W3_ed += sum_c W3_ec B_cd`, and the constants b_c go into the running mean of norm3, which is lowered by
`sum_c W3_ec b_c`.

All sums are in float64 on the CPU, and `convert_state_dict` runs them on one thread, so that the same weights give
bit-identical results on the same machine.

Sources: deriving the moments of activations from the preceding norm follows Nagel et al., 2019, arXiv 1906.04721;
choosing channels and refitting the next layer by what that layer loses follows He et al., 2017, arXiv 1707.06168, who
use images. The replacement by attention is this package's own.
"""
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import attention_map

# Correlation of neighbouring positions. Of the values from 0 to 0.75, those from 0.4 to 0.6 preserved the features of
# fully trained networks best (docs/experiments.md); a value per stage, or per layer from its running variances, was no
# better.
RHO = 0.5
TERMS = 12  # of the Hermite series, which then misses 0.3% of the variance of a rectified Gaussian of mean zero
NODES = 96  # of the quadrature for activations other than ReLU
# Shares of each channel's own variance, so that nothing depends on how a norm and the next layer share a scale
RIDGE = 1e-3  # of the activations, plus ACTIVE of the activations' inputs: rarely active channels are not relied on
ACTIVE = 1e-6
JITTER = 1e-9  # of the inputs
SMALLEST = 1e-300  # lower bound of a variance to divide by
LARGEST_MAP = 129  # queries computed along an axis; those in the middle of a larger map are all alike
SMALLEST_RADIUS = 0.3  # in cells; below it the attention is nearly the identity, and no gradient moves the radius
ZOOMS = (65, 33, 33, 33, 33)  # radii tried per round, between the neighbours of the best so far; 1e-6 apart in the last


@dataclass(frozen=True)
class ActivationStatistics:
    """Statistics of an activation's output for Gaussian channels; all tensors are float64."""
    mean: Tensor  # means, shape (C,)
    variance: Tensor  # variances, shape (C,)
    slope: Tensor  # means of the squared derivative, shape (C,); for ReLU the share of active positions
    series: Tensor  # coefficients of the orthonormal Hermite polynomials from the first order on, shape (TERMS, C)

    @property
    def series_variance(self) -> Tensor:
        """The variances, shape (C,), at least those of the series, so that they are consistent with its covariances."""
        return torch.maximum(self.variance, self.series.square().sum(0))


def activation_statistics(mean: Tensor, std: Tensor, activation: nn.Module) -> ActivationStatistics:
    """Moments and Hermite series of `activation(mean + std z)` for a standard Gaussian z.

    Args:
        mean: Means of the channels, shape (C,).
        std: Standard deviations, shape (C,), at least 0.
        activation: An elementwise activation; ReLU is handled in closed form, others by quadrature.

    Returns:
        The statistics.
    """
    mean, std = mean.double().cpu(), std.double().cpu().clamp_min(1e-9)
    return _rectified(mean, std) if type(activation) is nn.ReLU else _by_quadrature(mean, std, activation)


def _rectified(mean: Tensor, std: Tensor) -> ActivationStatistics:
    offset = (mean / std).clamp(-40, 40)  # beyond that, a channel is constant in float64, or always active
    density = torch.exp(-offset.square() / 2) / math.sqrt(2 * math.pi)
    active = torch.erfc(-offset / math.sqrt(2)) / 2
    first = mean * active + std * density
    variance = (offset.square() + 1) * active + offset * density - (offset * active + density).square()
    variance = std.square() * variance.clamp_min(0)
    polynomials = _hermite(-offset)
    # E[relu(z + t) He_n(z)] = density(t) He_(n-2)(-t) for n >= 2
    higher = [polynomials[n - 2] * density / math.sqrt(n * (n - 1)) for n in range(2, TERMS + 1)]
    return ActivationStatistics(first, variance, active, std * torch.stack([active, *higher]))


def _by_quadrature(mean: Tensor, std: Tensor, activation: nn.Module) -> ActivationStatistics:
    # Gauss-Hermite nodes are the eigenvalues of the recurrence's Jacobi matrix (Golub and Welsch, 1969)
    off_diagonal = torch.arange(1, NODES, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    weights = vectors[0].square()
    outputs = activation(mean + std * nodes[:, None])
    first = weights @ outputs
    series = (_hermite(nodes, NODES // 2)[1:] * weights) @ outputs
    orders = torch.arange(1, len(series) + 1)
    slope = orders.double() @ series.square() / std.square()  # differentiated term by term
    return ActivationStatistics(first, weights @ (outputs - first).square(), slope, series[:TERMS])


def _hermite(points: Tensor, terms: int = TERMS) -> Tensor:
    """Orthonormal Hermite polynomials of orders 0 to `terms`, shape (terms + 1, *points.shape)."""
    values = [torch.ones_like(points), points]
    for n in range(1, terms):
        values.append((points * values[n] - math.sqrt(n) * values[n - 1]) / math.sqrt(n + 1))
    return torch.stack(values)


@dataclass(frozen=True)
class InputModel:
    """A model of a 3x3 convolution's inputs: the covariance of the channels times the correlation of the positions."""
    mean: Tensor  # mean of each channel, shape (C_in,), float64
    covariance: Tensor  # covariance of the channels at one position, shape (C_in, C_in), float64
    rho: float = RHO  # correlation of two neighbouring positions; at a distance of (dy, dx) it is `rho^(|dy| + |dx|)`

    @classmethod
    def after_norm(
            cls, weight: Tensor, bias: Tensor, activation: nn.Module, previous: Tensor, rho: float = RHO,
    ) -> 'InputModel':
        """The model after a 1x1 convolution of a white input, a batch norm and an activation.

        Args:
            weight: The norm's weight, shape (C_in,).
            bias: The norm's bias, shape (C_in,).
            activation: The activation.
            previous: The convolution's weight, shape (C_in, C) or (C_in, C, 1, 1).
            rho: Correlation of two neighbouring positions.
        """
        statistics = activation_statistics(bias, weight.abs(), activation)
        rows = previous.detach().cpu().double().flatten(1) * weight.detach().cpu().double().sign()[:, None]
        rows = F.normalize(F.normalize(rows, p=math.inf, eps=SMALLEST), eps=SMALLEST)  # squares of 1e-170 underflow
        covariance = _series_covariance(statistics.series, statistics.series, rows @ rows.T)
        covariance.diagonal().copy_(statistics.series_variance)
        return cls(statistics.mean, covariance, rho)


class _Axis:
    """Averages over the output positions of one axis: the factors of the products in the module's docstring."""

    def __init__(self, size: int, stride: int, rho: float, kernel: str) -> None:
        alike = max((size - 1) // stride + 1 - LARGEST_MAP, 0)
        self.size, self.stride, self.kernel = size - alike * stride, stride, kernel
        positions = torch.arange(self.size)
        queries = positions[::stride]
        self.share = torch.ones(len(queries), dtype=torch.float64)
        self.share[len(queries) // 2] += alike
        self.share /= self.share.sum()
        self.correlation = rho ** (positions[:, None] - positions).abs().double()
        taps = queries[:, None] + torch.arange(-1, 2)
        self.inside = ((taps >= 0) & (taps < self.size)).double()
        self.taps = taps.clamp(0, self.size - 1)
        self.seen = self.share @ self.inside
        self.pairs = torch.einsum('q,qt,qu->tu', self.share, self.inside, self.inside)
        self.pairs *= rho ** (torch.arange(3)[:, None] - torch.arange(3)).abs().double()

    def windows(self, radii: Tensor) -> tuple[Tensor, Tensor]:
        """Means of `k_qt' R a_q`, shape (N, 3), and of `a_q' R a_q`, shape (N,), for N radii."""
        weights = self._weights(radii)
        spread = weights @ self.correlation
        taps = spread.gather(2, self.taps.expand(len(radii), -1, -1)) * self.inside
        return torch.einsum('q,nqt->nt', self.share, taps), (spread * weights).sum(2) @ self.share

    def overlaps(self, radii: Tensor) -> Tensor:
        """Means of `a_q' R b_q` for the attention weights a and b of each pair of N radii, shape (N, N)."""
        weights = self._weights(radii)
        return torch.einsum('q,nqk,mqk->nm', self.share, weights @ self.correlation, weights)

    def _weights(self, radii: Tensor) -> Tensor:
        return attention_map(radii.log(), self.size, self.stride, kernel=self.kernel)


_axis = functools.lru_cache(maxsize=64)(_Axis)


class LayerModel:
    """A trained 3x3 convolution under a model of its inputs, and the attention that may replace its channels.

    Attributes:
        kernels: The convolution's weights, shape (C_out, C_in, 9), float64.
        inputs: The model of its inputs.
        variance: Variance of each output channel under this model, shape (C_out,).
    """

    def __init__(
            self,
            weight: Tensor,
            inputs: InputModel,
            map_size: tuple[int, int],
            stride: int = 1,
            kernel: str = 'gaussian',
    ) -> None:
        """
        Args:
            weight: The convolution's weights, shape (C_out, C_in, 3, 3).
            inputs: The model of its inputs.
            map_size: Height and width of its input in cells.
            stride: Its stride.
            kernel: The attention's kernel, 'gaussian' or 'laplacian'.
        """
        self.kernels = weight.detach().cpu().double().flatten(2)
        self.inputs = inputs
        self._axes = [_axis(size, stride, inputs.rho, kernel) for size in map_size]
        self._pairs = torch.kron(self._axes[0].pairs, self._axes[1].pairs)
        jitter = (JITTER * inputs.covariance.diagonal()).clamp_min(SMALLEST)
        root = torch.linalg.cholesky(inputs.covariance + jitter.diag())
        # kernels for uncorrelated input channels of unit variance
        self._whitened = torch.tensordot(self.kernels, root, dims=([1], [0])).transpose(1, 2)
        self._gram = self._whitened.transpose(1, 2) @ self._whitened
        self.variance = (self._gram * self._pairs).sum((1, 2))

    @property
    def largest_radius(self) -> float:
        """A radius that covers the map, in cells."""
        return float(max(axis.size for axis in self._axes))

    def _windows(self, radii: Tensor) -> tuple[Tensor, Tensor]:
        """`_Axis.windows` for both axes together: shapes (N, 9) and (N,)."""
        (rows, height), (columns, width) = (axis.windows(radii) for axis in self._axes)
        return (rows[:, :, None] * columns[:, None]).flatten(1), height * width

    def errors(self, radii: Tensor) -> Tensor:
        """The share of each channel's variance, 0 to 1, that the best values miss for N radii, shape (N, C_out)."""
        taps, norms = self._windows(radii)
        explained = (taps[:, :, None] * taps[:, None]).flatten(1) @ self._gram.flatten(1).T / norms[:, None]
        shares: Tensor = explained / self.variance.clamp_min(SMALLEST)
        return (1 - shares).clamp(0, 1)

    def values(self, channels: Tensor, radius: float) -> Tensor:
        """W_v of the channels for a radius, shape (len(channels), C_in)."""
        taps, norms = self._windows(torch.tensor([radius], dtype=torch.float64))
        return self.kernels[channels] @ (taps[0] / norms[0])

    def mean_shift(self, channels: Tensor, values: Tensor) -> Tensor:
        """How much the values raise the mean of the channels that they replace, shape (len(channels),)."""
        seen = torch.kron(*(axis.seen for axis in self._axes))
        return (values - self.kernels[channels] @ seen) @ self.inputs.mean

    def covariance(self) -> Tensor:
        """Covariance of the convolution's output channels, shape (C_out, C_out)."""
        root = torch.linalg.cholesky(self._pairs + 1e-12 * torch.eye(9, dtype=torch.float64))
        flat = (self._whitened @ root).flatten(1)
        covariance: Tensor = flat @ flat.T
        return covariance

    def cross_covariance(self, values: Tensor, radii: Tensor) -> tuple[Tensor, Tensor]:
        """Covariance of the convolution's channels with attention channels, and of the latter with each other.

        Args:
            values: W_v of the attention channels, shape (D, C_in), head by head.
            radii: A radius for each head, in cells, shape (num_heads,).

        Returns:
            The two covariances, shapes (C_out, D) and (D, D).
        """
        share = len(values) // len(radii)
        weighted = values @ self.inputs.covariance
        cross = [(self.kernels @ taps) @ part.T
                 for taps, part in zip(self._windows(radii)[0], weighted.split(share), strict=True)]
        overlaps = self._axes[0].overlaps(radii) * self._axes[1].overlaps(radii)
        overlaps = overlaps.repeat_interleave(share, 0).repeat_interleave(share, 1)
        return torch.cat(cross, dim=1), weighted @ values.T * overlaps


@dataclass(frozen=True)
class FollowingLayers:
    """What the fit of a 3x3 convolution needs to know about the layers after it."""
    weight: Tensor  # weight of the norm after it, shape (C_out,)
    bias: Tensor  # bias of that norm, shape (C_out,)
    activation: nn.Module  # the activation after that norm
    # weights of the 1x1 convolution after the activation, shape (C_next, C_out), each row times the scale of the norm
    # after that convolution
    next_weight: Tensor


@dataclass(frozen=True)
class LayerFit:
    """Attention channels that replace a 3x3 convolution's; tensors are float64, in the order of `channels`."""
    channels: Tensor  # output channels that are replaced, shape (value_dim,), head by head
    radii: tuple[float, ...]  # the radius of each head, in cells of an undilated grid
    values: Tensor  # W_v, shape (value_dim, C_in)
    mean_shift: Tensor  # to be added to the next norm's running means, shape (value_dim,)
    errors: Tensor  # the share of each channel's variance that is lost, shape (value_dim,)
    # B, shape (value_dim, C_out), columns in the source's order: the next convolution's weights for each replaced
    # channel, times that channel's row, are added to its weights for all channels
    correction: Tensor
    constant: Tensor  # what the mean of each replaced channel still lacks, shape (value_dim,)


def fit_layer(layer: LayerModel, following: FollowingLayers, value_dim: int, num_heads: int = 1) -> LayerFit:
    """Choose channels and radii, fit the values, and correct the next convolution.

    Args:
        layer: The convolution under the model of its inputs.
        following: The layers after it.
        value_dim: Number of channels to replace.
        num_heads: Number of radii, each for an equal share of these channels.

    Returns:
        The fit.
    """
    after = activation_statistics(following.bias, following.weight.abs(), following.activation)
    scale = following.weight.double().cpu().square() * following.next_weight.double().cpu().square().sum(0)
    importance = scale * after.slope
    share = value_dim // num_heads
    radii, parts, errors = [], [], []
    for _ in range(num_heads):
        radius, chosen, missed = _choose(layer, importance, share)
        importance = importance.index_fill(0, chosen, math.inf)
        radii.append(radius)
        parts.append(chosen)
        errors.append(missed)
    channels = torch.cat(parts)
    values = torch.cat([layer.values(part, radius) for part, radius in zip(parts, radii, strict=True)])
    correction, constant = correct(layer, following, channels, values, torch.tensor(radii, dtype=torch.float64))
    return LayerFit(channels, tuple(radii), values, layer.mean_shift(channels, values), torch.cat(errors), correction,
                    constant)


def _choose(layer: LayerModel, importance: Tensor, count: int) -> tuple[float, Tensor, Tensor]:
    """The radius at which the cheapest channels cost least, those channels, and their errors."""
    low, high = SMALLEST_RADIUS, layer.largest_radius
    for steps in ZOOMS:
        radii = torch.logspace(math.log10(low), math.log10(high), steps, dtype=torch.float64)
        errors = layer.errors(radii)
        # a channel that is already taken costs infinity, even if its error is zero
        costs = (errors * importance).nan_to_num(nan=math.inf, posinf=math.inf)
        best = int(costs.topk(count, largest=False).values.sum(1).argmin())
        low, high = float(radii[max(best - 1, 0)]), float(radii[min(best + 1, steps - 1)])
    chosen = costs[best].argsort(stable=True)[:count].sort().values
    return float(radii[best]), chosen, errors[best, chosen]


def correct(
        layer: LayerModel,
        following: FollowingLayers,
        channels: Tensor,
        values: Tensor,
        radii: Tensor,
) -> tuple[Tensor, Tensor]:
    """Regress what the activations lose on the activations of the new layer.

    Args:
        layer: The convolution under the model of its inputs.
        following: The layers after it.
        channels: Output channels that are replaced, shape (value_dim,), head by head.
        values: W_v, shape (value_dim, C_in).
        radii: The radius of each head, shape (num_heads,).

    Returns:
        The correction and the constant of `LayerFit`.
    """
    covariance = layer.covariance()
    cross, among = layer.cross_covariance(values, radii)
    old_std = covariance.diagonal().clamp_min(SMALLEST).sqrt()
    mixed = covariance.clone()  # of the old channels with the new ones
    mixed[:, channels] = cross
    new = mixed.clone()
    new[channels] = cross.T
    new[channels[:, None], channels] = among
    new_std = new.diagonal().clamp_min(SMALLEST).sqrt()
    sign = following.weight.double().sign().cpu()
    mixed = (mixed * (sign / old_std)[:, None] * (sign / new_std)).clamp(-1, 1)
    new = (new * (sign / new_std)[:, None] * (sign / new_std)).clamp(-1, 1)
    std = following.weight.double().abs().cpu()
    old = activation_statistics(following.bias, std, following.activation)
    kept_std = std * new_std / old_std
    kept = activation_statistics(following.bias, kept_std, following.activation)
    lost = _series_covariance(old.series[:, channels], kept.series, mixed[channels])
    lost -= _series_covariance(kept.series[:, channels], kept.series, new[channels])
    among = _series_covariance(kept.series, kept.series, new)
    # the series converges slowest for a variance, which the moments give directly
    ridge = RIDGE * kept.series_variance + ACTIVE * kept_std.square()
    among.diagonal().copy_(kept.series_variance + ridge.clamp_min(SMALLEST))
    correction = torch.linalg.solve(among, lost.T).T
    return correction, (old.mean - kept.mean)[channels] - correction @ kept.mean


def _series_covariance(one: Tensor, other: Tensor, correlation: Tensor) -> Tensor:
    """Covariances of two sets of activations from their Hermite series, shape of the correlations."""
    total = torch.zeros_like(correlation)
    for first, second in zip(one.flip(0), other.flip(0), strict=True):  # Horner's scheme
        total = (total + first[:, None] * second) * correlation
    return total
