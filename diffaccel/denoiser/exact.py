"""Exact denoisers of known distributions, as oracles for solvers, priors and chains."""

import math

import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.condition import Condition
from diffaccel.denoiser.base import DENOISERS, Denoiser
from diffaccel.errors import UsageError
from diffaccel.process import EDMVarianceExploding, Prediction, Process, expand


class MixtureDenoiser(Denoiser):
    """Exact denoiser of a mixture of isotropic Gaussians.

    Args:
        means: Component means, (K, C, H, W).
        var: Variance within a component; 0 for a finite set of points.
        weights: Component weights, (K,); None for equal weights.
        process: Forward process.
    """

    means: Tensor
    log_weights: Tensor

    def __init__(
        self, means: Tensor, var: float, weights: Tensor | None = None, process: Process | None = None
    ) -> None:
        super().__init__()
        self.process, self.var = process or EDMVarianceExploding(), var
        self.ratio_range = (0.0, math.inf)
        weights = torch.ones(len(means), dtype=means.dtype) if weights is None else weights
        self.register_buffer("means", means)
        self.register_buffer("log_weights", (weights / weights.sum()).log())

    def _square_distance(self, x: Tensor, alpha: Tensor) -> Tensor:
        """|x - alpha mean|^2 of each sample and component, (B, K)."""
        x, means = x.flatten(1), self.means.to(x).flatten(1)
        a = alpha.to(x)[:, None]
        return x.square().sum(1, keepdim=True) - 2 * a * (x @ means.T) + a.square() * means.square().sum(1)

    @override
    def forward(
        self, x_t: Tensor, t: Tensor, condition: Condition | None = None, augment: Tensor | None = None
    ) -> Prediction:
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        variance = (alpha.square() * self.var + sigma.square()).to(x_t)
        logits = self.log_weights.to(x_t) - self._square_distance(x_t, alpha) / (2 * variance[:, None])
        mean = torch.einsum("bk,k...->b...", logits.softmax(1), self.means.to(x_t))
        residual = (x_t - expand(alpha, x_t) * mean) / expand(variance, x_t)
        return Prediction(mean + expand(alpha * self.var, x_t) * residual, expand(sigma, x_t) * residual)

    def log_prob(self, y: Tensor, ratio: Tensor) -> Tensor:
        """Log-density of y = x / alpha at each ratio: (B, C, H, W), (L,) -> (B, L), in nats."""
        variance = self.var + ratio.to(y).square()  # (L,)
        square = self._square_distance(y, torch.ones(len(y), dtype=y.dtype, device=y.device))
        exponent = self.log_weights.to(y) - square[:, None] / (2 * variance[:, None])  # (B, L, K)
        return exponent.logsumexp(2) - 0.5 * y[0].numel() * (2 * math.pi * variance).log()


@DENOISERS.register("mixture")
def mixture(process: Process, means: list[list[float]], std: float, weights: list[float]) -> MixtureDenoiser:
    """Exact denoiser of toy points of D coordinates, each of shape (D, 1, 1).

    Args:
        process: Forward process.
        means: Component means, (K, D).
        std: Standard deviation within a component.
        weights: Component weights, (K,), positive; they need not sum to 1.

    Raises:
        UsageError: No means, means of different lengths, or weights that are not positive or not one per mean.
    """
    lengths = {len(mean) for mean in means}
    if len(lengths) != 1 or 0 in lengths:
        raise UsageError("denoiser 'mixture': denoiser.means: set one or more means of as many coordinates each")
    if len(weights) != len(means) or not min(weights) > 0:
        raise UsageError(f"denoiser 'mixture': denoiser.weights: set {len(means)} positive numbers, one for each mean")
    points = torch.tensor(means, dtype=torch.float32)[:, :, None, None]
    return MixtureDenoiser(points, std**2, torch.tensor(weights, dtype=torch.float32), process)


class GaussianDenoiser(MixtureDenoiser):
    """Exact denoiser of N(mean, var I), with mean (C, H, W)."""

    def __init__(self, mean: Tensor, var: float, process: Process | None = None) -> None:
        super().__init__(mean[None], var, process=process)


class FiniteSetDenoiser(MixtureDenoiser):
    """Exact denoiser of data drawn from a finite set of images (N, C, H, W)."""

    def __init__(self, images: Tensor, process: Process | None = None) -> None:
        super().__init__(images, 0.0, process=process)
