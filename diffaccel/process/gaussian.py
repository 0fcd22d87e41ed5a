"""Gaussian processes: variance preserving (linear, cosine, discrete), sub-VP, and variance exploding."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.errors import UsageError
from diffaccel.process.base import PROCESSES, Process, require


def _positive(denominator: Tensor) -> Tensor:
    """Replace a denominator of 0, which has a numerator of 0 at ratio 0 of schedules without noise at t = 0."""
    return denominator.clamp_min(torch.finfo(denominator.dtype).tiny)


@PROCESSES.register("vp")
@dataclass(frozen=True)
class VariancePreserving(Process):
    """VP with linear beta: B(t) = beta_0 t + (beta_1 - beta_0) t^2 / 2, alpha = exp(-B / 2), sigma^2 = 1 - exp(-B).

    Attributes:
        beta_0: Rate beta at t = 0.
        beta_1: Rate beta at t = 1.

    Raises:
        UsageError: Not 0 <= beta_0 <= beta_1 < infinity, or beta_1 is 0.

    References:
        Score-Based Generative Modeling through SDEs (Song et al., 2021), https://arxiv.org/abs/2011.13456, Eq. 33
    """

    preserves_variance = True

    beta_0: float = 0.1
    beta_1: float = 20.0

    def __post_init__(self) -> None:
        require(
            0 <= self.beta_0 <= self.beta_1 < math.inf and self.beta_1 > 0,
            f"process: beta_0 is {self.beta_0:g} and beta_1 {self.beta_1:g}: set 0 <= beta_0 <= beta_1 and beta_1 > 0",
        )

    def _integral(self, t: Tensor) -> Tensor:
        return self.beta_0 * t + 0.5 * (self.beta_1 - self.beta_0) * t.square()

    def _integral_inverse(self, integral: Tensor) -> Tensor:
        # The root of the quadratic in the form that doesn't cancel at small B.
        root = (self.beta_0**2 + 2 * (self.beta_1 - self.beta_0) * integral).sqrt()
        return 2 * integral / _positive(self.beta_0 + root)

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_0 + (self.beta_1 - self.beta_0) * t

    @override
    def alpha(self, t: Tensor) -> Tensor:
        return (-0.5 * self._integral(t)).exp()

    @override
    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-self._integral(t))).sqrt()

    @override
    def time(self, ratio: Tensor) -> Tensor:
        return self._integral_inverse(torch.log1p(ratio.square()))

    @override
    def drift(self, t: Tensor) -> Tensor:
        return -0.5 * self._beta(t)

    @override
    def diffusion(self, t: Tensor) -> Tensor:
        return self._beta(t).sqrt()


@PROCESSES.register("sub_vp")
@dataclass(frozen=True)
class SubVariancePreserving(VariancePreserving):
    """Sub-VP: the alpha of VP, sigma = 1 - exp(-B), so rho = 2 sinh(B / 2).

    References:
        Score-Based Generative Modeling through SDEs (Song et al., 2021), https://arxiv.org/abs/2011.13456, Eq. 29
    """

    preserves_variance = False

    @override
    def sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self._integral(t))

    @override
    def time(self, ratio: Tensor) -> Tensor:
        return self._integral_inverse(2 * torch.asinh(0.5 * ratio))

    @override
    def diffusion(self, t: Tensor) -> Tensor:
        return (-self._beta(t) * torch.expm1(-2 * self._integral(t))).sqrt()


@PROCESSES.register("vp_cosine")
@dataclass(frozen=True)
class CosineVariancePreserving(Process):
    """VP with alpha = cos(u) / cos(u_0), u = pi/2 (t + s) / (1 + s).

    alpha reaches 0 at t = 1. ``t_max`` is slightly lower, so that a prediction of eps still determines x_0 in float32.

    Attributes:
        offset: Shift s of the schedule, which keeps the noise near t = 0 from vanishing.
        t_max: Largest time.

    Raises:
        UsageError: ``offset`` is negative or infinite, or ``t_max`` is not between 0 and 1.

    References:
        Improved DDPM (Nichol and Dhariwal, 2021), https://arxiv.org/abs/2102.09672, Eq. 17
    """

    preserves_variance = True

    offset: float = 0.008
    t_max: float = 0.9999

    def __post_init__(self) -> None:
        require(
            0 <= self.offset < math.inf and 0 < self.t_max < 1,
            f"process 'vp_cosine': offset is {self.offset:g} and t_max {self.t_max:g}: set offset to 0 or more and "
            "t_max between 0 and 1",
        )

    @property
    def _u_0(self) -> float:
        return 0.5 * math.pi * self.offset / (1 + self.offset)

    def _u(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * (t + self.offset) / (1 + self.offset)

    @override
    def alpha(self, t: Tensor) -> Tensor:
        return self._u(t).cos() / math.cos(self._u_0)

    @override
    def sigma(self, t: Tensor) -> Tensor:
        # cos^2 u_0 - cos^2 u as a product, which doesn't cancel at small t.
        above = 0.5 * math.pi * t / (1 + self.offset)  # u - u_0
        return (above.sin() * (above + 2 * self._u_0).sin()).clamp_min(0).sqrt() / math.cos(self._u_0)

    @override
    def time(self, ratio: Tensor) -> Tensor:
        sin_0, cos_0 = math.sin(self._u_0), math.cos(self._u_0)
        sin_u = (ratio.square() + sin_0**2).sqrt()  # sin u and cos u up to a common factor, with cos u = cos_0
        # Sine and cosine of u - u_0, the former without cancellation at small ratios.
        above = torch.atan2(cos_0 * ratio.square() / _positive(sin_u + sin_0), cos_0**2 + sin_u * sin_0)
        return above / (0.5 * math.pi) * (1 + self.offset)

    @override
    def drift(self, t: Tensor) -> Tensor:
        return -0.5 * math.pi / (1 + self.offset) * self._u(t).tan()

    @override
    def diffusion(self, t: Tensor) -> Tensor:
        return (-2 * self.drift(t)).sqrt()


@lru_cache(maxsize=8)
def _log_alpha_bar(steps: int, beta_0: float, beta_1: float) -> Tensor:
    """Logarithm of alpha_bar_i, i = -1 .. steps - 1, (steps + 1,) float64 on the CPU; 0 for i = -1, the data."""
    beta = torch.linspace(beta_0, beta_1, steps, dtype=torch.float64, device="cpu")
    return torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), torch.log1p(-beta).cumsum(0)])


@lru_cache(maxsize=8)
def _table(steps: int, beta_0: float, beta_1: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same table on a device, kept there, because each copy to a GPU would wait for the work before it."""
    with torch.inference_mode(False):  # or a table that is first used in sampling could not be used in training
        return _log_alpha_bar(steps, beta_0, beta_1).to(device, dtype)


@PROCESSES.register("vp_discrete")
@dataclass(frozen=True)
class DiscreteVariancePreserving(Process):
    """DDPM's chain of T steps with linear beta. Times are the indices i = 0 .. T - 1; i = -1 is the data.

        alpha_i^2 = alpha_bar_i = (1 - beta_0) (1 - beta_1) .. (1 - beta_i),    sigma_i^2 = 1 - alpha_bar_i

    ln alpha_bar is interpolated linearly between indices, for solvers whose grids have non-integer times, and
    extrapolated linearly beyond the last.

    Attributes:
        steps: Number of steps T.
        beta_0: First beta.
        beta_1: Last beta.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), https://arxiv.org/abs/2006.11239, section 4
    """

    preserves_variance = True

    steps: int = 1000
    beta_0: float = 1e-4
    beta_1: float = 0.02

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.beta_0 <= self.beta_1 < 1:
            raise UsageError(
                f"process 'vp_discrete': steps is {self.steps}, beta_0 {self.beta_0} and beta_1 {self.beta_1}: set "
                "steps to 1 or more and 0 < beta_0 <= beta_1 < 1"
            )

    @property
    @override
    def t_max(self) -> float:  # type: ignore[override]
        """The last index."""
        return self.steps - 1.0

    def _table(self, like: Tensor) -> Tensor:
        return _table(self.steps, self.beta_0, self.beta_1, like.dtype, like.device)

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Index into the table of the segment that contains a time, and the slope of the segment."""
        table = self._table(t)
        below = (t.detach() + 1).floor().clamp(0, self.steps - 1).long()
        return below, table.take(below + 1) - table.take(below)  # indexing by a number would read it from the device

    def _log_alpha_bar(self, t: Tensor) -> Tensor:
        below, slope = self._segment(t)
        return self._table(t).take(below) + (t + 1 - below) * slope

    @override
    def alpha(self, t: Tensor) -> Tensor:
        return (0.5 * self._log_alpha_bar(t)).exp()

    @override
    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(self._log_alpha_bar(t))).sqrt()

    @override
    def time(self, ratio: Tensor) -> Tensor:
        log_alpha_bar, table = -torch.log1p(ratio.square()), self._table(ratio)
        below = (torch.searchsorted(-table, -log_alpha_bar, right=True) - 1).clamp(0, self.steps - 1)
        start = table.take(below)
        return below - 1 + (log_alpha_bar - start) / (table.take(below + 1) - start)

    @override
    def drift(self, t: Tensor) -> Tensor:
        return 0.5 * self._segment(t)[1]

    @override
    def diffusion(self, t: Tensor) -> Tensor:
        return (-2 * self.drift(t)).sqrt()


@PROCESSES.register("ve")
@dataclass(frozen=True)
class VarianceExploding(Process):
    """VE with geometric sigma: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t; ratio 0 is at t = -inf.

    Attributes:
        sigma_min: Standard deviation of the noise at t = 0.
        sigma_max: Standard deviation of the noise at t = 1.

    Raises:
        UsageError: Not 0 < sigma_min < sigma_max < infinity.

    References:
        Score-Based Generative Modeling through SDEs (Song et al., 2021), https://arxiv.org/abs/2011.13456, Eq. 30
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def __post_init__(self) -> None:
        require(
            0 < self.sigma_min < self.sigma_max < math.inf,
            f"process 've': sigma_min is {self.sigma_min:g} and sigma_max {self.sigma_max:g}: set "
            "0 < sigma_min < sigma_max",
        )

    @property
    def _rate(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    @override
    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    @override
    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * (self._rate * t).exp()

    @override
    def time(self, ratio: Tensor) -> Tensor:
        return (ratio / self.sigma_min).log() / self._rate

    @override
    def drift(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    @override
    def diffusion(self, t: Tensor) -> Tensor:
        return self.sigma(t) * math.sqrt(2 * self._rate)


@PROCESSES.register("edm")
@dataclass(frozen=True)
class EDMVarianceExploding(Process):
    """EDM's VE: alpha = 1, sigma = t, so that time is the noise level.

    Attributes:
        sigma_max: Largest standard deviation of the noise.

    Raises:
        UsageError: ``sigma_max`` is not positive and finite.

    References:
        Elucidating the Design Space (Karras et al., 2022), https://arxiv.org/abs/2206.00364, Table 1
    """

    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        require(0 < self.sigma_max < math.inf, f"process 'edm': sigma_max is {self.sigma_max:g}: set a positive level")

    @property
    @override
    def t_max(self) -> float:  # type: ignore[override]
        """The largest noise level."""
        return self.sigma_max

    @override
    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    @override
    def sigma(self, t: Tensor) -> Tensor:
        return t

    @override
    def time(self, ratio: Tensor) -> Tensor:
        return ratio

    @override
    def drift(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    @override
    def diffusion(self, t: Tensor) -> Tensor:
        return (2 * t).sqrt()
