"""Ridge regression towards known weights, from sums accumulated batch by batch in float64."""
import torch
from torch import Tensor

PENALTIES = tuple(10.0 ** (power / 2) for power in range(-10, 5))


class Moments:
    """The sums and products of inputs and outputs that a regression needs, in parts.

    Each part has its own images, so that one part can be left out and predicted. The sums are of differences from the
    first samples' means, so that the variance of a constant input is zero instead of a rounding error.
    """

    def __init__(self, parts: int, inputs: int, outputs: int, device: torch.device | None = None) -> None:
        """
        Args:
            parts: Number of parts.
            inputs: Input channels.
            outputs: Output channels.
            device: Where the sums are kept.
        """
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(parts, *shape, dtype=torch.float64, device=device)

        self.count = zeros()
        self.x, self.y = zeros(inputs), zeros(outputs)
        self.xx, self.xy = zeros(inputs, inputs), zeros(inputs, outputs)
        self.x_origin, self.y_origin = (torch.zeros(size, device=device) for size in (inputs, outputs))

    def add(self, part: int, x: Tensor, y: Tensor) -> None:
        """Add samples: inputs (N, inputs) and outputs (N, outputs), float32."""
        if not self.count.any():
            self.x_origin, self.y_origin = x.mean(0), y.mean(0)
        x, y = x - self.x_origin, y - self.y_origin
        self.count[part] += len(x)
        self.x[part] += x.sum(0, dtype=torch.float64)
        self.y[part] += y.sum(0, dtype=torch.float64)
        self.xx[part] += x.T @ x
        self.xy[part] += x.T @ y

    def without(self, part: int | None) -> 'Moments':
        """The sums of all parts, or of all but one, as one part."""
        rest = Moments(0, 0, 0)
        rest.x_origin, rest.y_origin = self.x_origin, self.y_origin
        for name in ('count', 'x', 'y', 'xx', 'xy'):
            sums = getattr(self, name)
            total = sums.sum(0) if part is None else sums.sum(0) - sums[part]
            setattr(rest, name, total[None])
        return rest

    def means(self) -> tuple[Tensor, Tensor]:
        """Means of the inputs, (inputs,), and of the outputs, (outputs,), over all parts."""
        count = self.count.sum()
        return self.x_origin + self.x.sum(0) / count, self.y_origin + self.y.sum(0) / count

    def covariances(self, x: Tensor, y: Tensor, part: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean products of the differences of inputs and outputs from some values, over one part or all.

        Args:
            x: Values to subtract from the inputs, (inputs,).
            y: Values to subtract from the outputs, (outputs,).
            part: The part; None for all.

        Returns:
            Products of the inputs with each other, (inputs, inputs), and of outputs with inputs, (outputs, inputs).
        """
        own = self.without(None) if part is None else self
        place, count = part or 0, own.count[part or 0]
        x, y = x - self.x_origin, y - self.y_origin
        x_sum, y_sum = own.x[place] - count * x, own.y[place]
        xx = own.xx[place] - x[:, None] * own.x[place] - x_sum[:, None] * x
        yx = own.xy[place].T - y_sum[:, None] * x - y[:, None] * x_sum
        return xx / count, yx / count


class _Path:
    """The terms of the solution that all penalties share, in the eigenbasis of the inputs' covariance."""

    def __init__(self, moments: Moments, prior: Tensor) -> None:
        x, y = self.means = moments.means()
        xx, yx = moments.covariances(x, y)
        self.values, self.vectors = torch.linalg.eigh(xx)
        self.left = (yx - prior @ xx) @ self.vectors
        # inputs that hardly vary leave the prior as it is: their variance is rounding error
        least = (1e-6 * x.square().mean()).clamp(min=torch.finfo(torch.float64).tiny)
        self.scale = torch.maximum(self.values.mean(), least)

    def damped(self, penalty: float) -> Tensor:
        """The inputs' variances along the eigenvectors, plus the penalty."""
        damped: Tensor = self.values.clamp(min=0) + penalty * self.scale
        return damped


def solve(moments: Moments, prior: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Ridge regression towards known weights.

    It minimizes the mean squared error plus the penalty times the inputs' mean variance times the squared distance from
    the prior.

    Args:
        moments: Moments of the samples.
        prior: Weights to stay near, float64, (outputs, inputs).
        penalty: Strength of the penalty.

    Returns:
        Weights, (outputs, inputs), and constants, (outputs,).
    """
    path = _Path(moments, prior)
    x, y = path.means
    weight = prior + (path.left / path.damped(penalty)) @ path.vectors.T
    return weight, y - weight @ x


def choose_penalty(moments: Moments, prior: Tensor, importance: Tensor) -> float:
    """Choose the penalty with the smallest cross-validation error, leaving out one part at a time.

    Args:
        moments: Moments of the samples, which must be in at least two parts.
        prior: Weights to stay near, (outputs, inputs).
        importance: Weight of each output's squared error, (outputs,).
    """
    errors = torch.zeros(len(PENALTIES), dtype=torch.float64, device=prior.device)
    for part in moments.count.nonzero().flatten().tolist():
        rest = moments.without(part)
        path = _Path(rest, prior)
        xx, yx = moments.covariances(*rest.means(), part)
        # the terms of the part's error that depend on the penalty: linear and quadratic in the step from the prior
        linear = (importance[:, None] * path.left * ((yx - prior @ xx) @ path.vectors)).sum(0)
        quadratic = (path.left.T * importance) @ path.left * (path.vectors.T @ xx @ path.vectors)
        for place, penalty in enumerate(PENALTIES):
            step = 1 / path.damped(penalty)
            errors[place] += step @ quadratic @ step - 2 * linear @ step
    return float(PENALTIES[int(errors.argmin())])
