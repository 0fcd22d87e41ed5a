"""Forward processes x_t = alpha_t x_0 + sigma_t eps.

The ratio rho = sigma_t / alpha_t is the one noise level that all of them share: x_t / alpha_t at equal rho has the same
law on every process. Times and coefficients are (B,) tensors, float64 where they come from a grid.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from diffaccel.attenuation import ATTENUATIONS, Attenuation, Constant
from diffaccel.errors import UsageError
from diffaccel.prediction import DecoupledPrediction, Prediction
from diffaccel.registry import Registry


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """Give a (B,) coefficient the dtype and device of ``x`` and the axes to broadcast over it."""
    return coefficient.to(x).reshape(-1, *(1,) * (x.ndim - 1))


def require(holds: bool, what: str) -> None:
    """Refuse a value out of range; a comparison with NaN doesn't hold either.

    Raises:
        UsageError: It does not hold.
    """
    if not holds:
        raise UsageError(what)


class Process(ABC):
    """A Gaussian forward process, from data at ratio 0 to noise at ``t_max``."""

    t_max: float = 1.0

    @property
    def scales_data(self) -> bool:
        """Whether the mean of q(x_t | x_0) is alpha_t x_0, which all need that work with x / alpha."""
        return True

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the data at time ``t``, shaped like ``t``."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at time ``t``, shaped like ``t``."""

    @abstractmethod
    def time(self, ratio: Tensor) -> Tensor:
        """Invert ``sigma / alpha``."""

    @abstractmethod
    def drift(self, t: Tensor) -> Tensor:
        """f(t) of dx = f(t) x dt + g(t) dw: the logarithmic derivative of alpha."""

    @abstractmethod
    def diffusion(self, t: Tensor) -> Tensor:
        """g(t) of dx = f(t) x dt + g(t) dw; g^2 = alpha^2 d(rho^2)/dt."""

    def ratio(self, t: Tensor) -> Tensor:
        """Noise-to-data ratio sigma / alpha; infinite where alpha is 0."""
        return self.sigma(t) / self.alpha(t)

    def marginal(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Diffuse ``x_0`` (B, C, H, W) to time ``t`` (B,) with noise ``eps``."""
        return expand(self.alpha(t), x_0) * x_0 + expand(self.sigma(t), x_0) * eps

    def from_ratio(self, y: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Bring ``y = x / alpha`` (B, C, H, W) at ``ratio`` (B,) to this process: (x_t, t)."""
        t = self.time(ratio)
        return expand(self.alpha(t), y) * y, t

    def posterior_std(self, t: Tensor, s: Tensor) -> Tensor:
        """Standard deviation of q(x_s | x_t, x_0) for s < t.

        For a Markov process of these marginals it is sigma_s sqrt(1 - rho_s^2 / rho_t^2) (DDPM, 2006.11239, Eq. 7).
        """
        return self.sigma(s) * (1 - (self.ratio(s) / self.ratio(t)).square()).clamp_min(0).sqrt()

    def mean(self, prediction: Prediction, s: Tensor) -> Tensor:
        """Mean of the state at time ``s`` (B,), without its noise: (B, C, H, W)."""
        return expand(self.alpha(s), prediction.x_0) * prediction.x_0

    def change(self, prediction: Prediction, t: Tensor, s: Tensor) -> Tensor:
        """How the state's mean moves from ``t`` to ``s``, (B, C, H, W)."""
        return expand(self.alpha(s) - self.alpha(t), prediction.x_0) * prediction.x_0

    def reprojected(self, prediction: Prediction, x_0: Tensor) -> Prediction:
        """Give a prediction another ``x_0`` (B, C, H, W), and make whatever the mean depends on fit it."""
        return Prediction(x_0, prediction.eps)

    def transition(self, prediction: Prediction, t: Tensor, s: Tensor, eta: float = 0.0) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a step from t to s < t that knows the prediction at t.

            mean = alpha_s x_0 + sqrt(sigma_s^2 - c^2) eps,    std = c = eta * posterior_std(t, s)

        eta = 0 is DDIM's deterministic step, eta = 1 ancestral sampling: DDPM's on a variance preserving process, DDM's
        bridge on the decoupled one. Nothing is divided by alpha_t, so a step may start at infinite ratio.

        Args:
            prediction: The denoiser's, at t.
            t: Times of the states, (B,).
            s: Times to reach, (B,).
            eta: Stochasticity in [0, 1].

        Returns:
            The mean (B, C, H, W) and the standard deviation (B,).

        References:
            Denoising Diffusion Implicit Models (Song et al., 2021), https://arxiv.org/abs/2010.02502, Eq. 12
        """
        std = eta * self.posterior_std(t, s) if eta else torch.zeros_like(s)
        remaining = (self.sigma(s).square() - std.square()).clamp_min(0).sqrt()
        return self.mean(prediction, s) + expand(remaining, prediction.eps) * prediction.eps, std


PROCESSES: Registry[Process] = Registry("process", group="diffaccel.processes", nested={"attenuation": ATTENUATIONS})


@PROCESSES.register("vp")
@dataclass(frozen=True)
class VariancePreserving(Process):
    """VP with linear beta: B(t) = beta_0 t + (beta_1 - beta_0) t^2 / 2, alpha = exp(-B / 2), sigma^2 = 1 - exp(-B).

    Raises:
        UsageError: The betas are negative, infinite, or fall.

    References:
        Score-Based Generative Modeling through SDEs (Song et al., 2021), https://arxiv.org/abs/2011.13456, Eq. 33
    """

    beta_0: float = 0.1
    beta_1: float = 20.0

    def __post_init__(self) -> None:
        require(
            0 <= self.beta_0 <= self.beta_1 < math.inf and self.beta_1 > 0,
            f"process: beta_0={self.beta_0:g} and beta_1={self.beta_1:g}: give 0 <= beta_0 <= beta_1, beta_1 positive",
        )

    def _integral(self, t: Tensor) -> Tensor:
        return self.beta_0 * t + 0.5 * (self.beta_1 - self.beta_0) * t.square()

    def _integral_inverse(self, integral: Tensor) -> Tensor:
        # The root of the quadratic in the form that doesn't cancel at small B.
        return 2 * integral / (self.beta_0 + (self.beta_0**2 + 2 * (self.beta_1 - self.beta_0) * integral).sqrt())

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_0 + (self.beta_1 - self.beta_0) * t

    def alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return (-0.5 * self._integral(t)).exp()

    def sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        return (-torch.expm1(-self._integral(t))).sqrt()

    def time(self, ratio: Tensor) -> Tensor:  # noqa: D102
        return self._integral_inverse(torch.log1p(ratio.square()))

    def drift(self, t: Tensor) -> Tensor:  # noqa: D102
        return -0.5 * self._beta(t)

    def diffusion(self, t: Tensor) -> Tensor:  # noqa: D102
        return self._beta(t).sqrt()


@PROCESSES.register("sub_vp")
@dataclass(frozen=True)
class SubVariancePreserving(VariancePreserving):
    """Sub-VP: the alpha of VP, sigma = 1 - exp(-B), so rho = 2 sinh(B / 2).

    References:
        Score-Based Generative Modeling through SDEs (Song et al., 2021), https://arxiv.org/abs/2011.13456, Eq. 29
    """

    def sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        return -torch.expm1(-self._integral(t))

    def time(self, ratio: Tensor) -> Tensor:  # noqa: D102
        return self._integral_inverse(2 * torch.asinh(0.5 * ratio))

    def diffusion(self, t: Tensor) -> Tensor:  # noqa: D102
        return (-self._beta(t) * torch.expm1(-2 * self._integral(t))).sqrt()


@PROCESSES.register("vp_cosine")
@dataclass(frozen=True)
class CosineVariancePreserving(Process):
    """VP with alpha = cos(u) / cos(u_0), u = pi/2 (t + s) / (1 + s).

    The schedule ends at alpha = 0; ``t_max`` stops just before, where an eps prediction still fixes x_0 in float32.

    Raises:
        UsageError: ``offset`` is negative or infinite, or ``t_max`` is not between 0 and 1.

    References:
        Improved DDPM (Nichol and Dhariwal, 2021), https://arxiv.org/abs/2102.09672, Eq. 17
    """

    offset: float = 0.008
    t_max: float = 0.9999

    def __post_init__(self) -> None:
        require(
            0 <= self.offset < math.inf and 0 < self.t_max < 1,
            f"process 'vp_cosine': offset={self.offset:g} and t_max={self.t_max:g}: give an offset of 0 or more, and "
            "t_max between 0 and 1",
        )

    @property
    def _u_0(self) -> float:
        return 0.5 * math.pi * self.offset / (1 + self.offset)

    def _u(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * (t + self.offset) / (1 + self.offset)

    def alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return self._u(t).cos() / math.cos(self._u_0)

    def sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        # cos^2 u_0 - cos^2 u as a product, which doesn't cancel at small t.
        above = 0.5 * math.pi * t / (1 + self.offset)  # u - u_0
        return (above.sin() * (above + 2 * self._u_0).sin()).clamp_min(0).sqrt() / math.cos(self._u_0)

    def time(self, ratio: Tensor) -> Tensor:  # noqa: D102
        sin_0, cos_0 = math.sin(self._u_0), math.cos(self._u_0)
        sin_u = (ratio.square() + sin_0**2).sqrt()  # over the same factor as cos u, which is then cos_0
        # Sine and cosine of u - u_0, the former without cancellation at small ratios.
        above = torch.atan2(cos_0 * ratio.square() / (sin_u + sin_0), cos_0**2 + sin_u * sin_0)
        return above / (0.5 * math.pi) * (1 + self.offset)

    def drift(self, t: Tensor) -> Tensor:  # noqa: D102
        return -0.5 * math.pi / (1 + self.offset) * self._u(t).tan()

    def diffusion(self, t: Tensor) -> Tensor:  # noqa: D102
        return (-2 * self.drift(t)).sqrt()


@lru_cache(maxsize=8)
def _log_alpha_bar(steps: int, beta_0: float, beta_1: float) -> Tensor:
    """Logarithms of alpha_bar_i for i = -1 (which is the data, 0) .. steps - 1: (steps + 1,) float64 on the CPU."""
    beta = torch.linspace(beta_0, beta_1, steps, dtype=torch.float64, device="cpu")
    return torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), torch.log1p(-beta).cumsum(0)])


@PROCESSES.register("vp_discrete")
@dataclass(frozen=True)
class DiscreteVariancePreserving(Process):
    """DDPM's chain of T steps with linear beta; its times are the indices i = 0 .. T - 1, and i = -1 is the data.

        alpha_i^2 = alpha_bar_i = (1 - beta_0) (1 - beta_1) .. (1 - beta_i),    sigma_i^2 = 1 - alpha_bar_i

    Between indices, where solvers with grids of their own may go, ln alpha_bar is joined by straight lines; beyond the
    last it goes on straight.

    Attributes:
        steps: T.
        beta_0: First beta.
        beta_1: Last beta.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), https://arxiv.org/abs/2006.11239, section 4
    """

    steps: int = 1000
    beta_0: float = 1e-4
    beta_1: float = 0.02

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.beta_0 <= self.beta_1 < 1:
            raise UsageError(
                f"process 'vp_discrete': steps={self.steps} and beta from {self.beta_0} to {self.beta_1}: give one step"
                " or more, and betas that rise between 0 and 1"
            )

    @property
    def t_max(self) -> float:  # type: ignore[override]
        """The last index."""
        return self.steps - 1.0

    def _table(self, like: Tensor) -> Tensor:
        return _log_alpha_bar(self.steps, self.beta_0, self.beta_1).to(like)

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Index into the table of the line that a time lies on, and the line's slope."""
        table = self._table(t)
        below = (t.detach() + 1).floor().clamp(0, self.steps - 1).long()
        return below, table[below + 1] - table[below]

    def _log_alpha_bar(self, t: Tensor) -> Tensor:
        below, slope = self._segment(t)
        return self._table(t)[below] + (t + 1 - below) * slope

    def alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return (0.5 * self._log_alpha_bar(t)).exp()

    def sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        return (-torch.expm1(self._log_alpha_bar(t))).sqrt()

    def time(self, ratio: Tensor) -> Tensor:  # noqa: D102
        log_alpha_bar, table = -torch.log1p(ratio.square()), self._table(ratio)
        below = (torch.searchsorted(-table, -log_alpha_bar, right=True) - 1).clamp(0, self.steps - 1)
        return below - 1 + (log_alpha_bar - table[below]) / (table[below + 1] - table[below])

    def drift(self, t: Tensor) -> Tensor:  # noqa: D102
        return 0.5 * self._segment(t)[1]

    def diffusion(self, t: Tensor) -> Tensor:  # noqa: D102
        return (-2 * self.drift(t)).sqrt()


@PROCESSES.register("ve")
@dataclass(frozen=True)
class VarianceExploding(Process):
    """VE with geometric sigma: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t; ratio 0 lies at t = -inf.

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
            f"process 've': sigma_min={self.sigma_min:g} and sigma_max={self.sigma_max:g}: give positive levels, "
            "sigma_min the smaller",
        )

    @property
    def _rate(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        return self.sigma_min * (self._rate * t).exp()

    def time(self, ratio: Tensor) -> Tensor:  # noqa: D102
        return (ratio / self.sigma_min).log() / self._rate

    def drift(self, t: Tensor) -> Tensor:  # noqa: D102
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:  # noqa: D102
        return self.sigma(t) * math.sqrt(2 * self._rate)


@PROCESSES.register("edm")
@dataclass(frozen=True)
class EDMVarianceExploding(Process):
    """EDM's VE: alpha = 1, sigma = t, so time is the noise level itself.

    Raises:
        UsageError: ``sigma_max`` is not positive and finite.

    References:
        Elucidating the Design Space (Karras et al., 2022), https://arxiv.org/abs/2206.00364, Table 1
    """

    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        require(0 < self.sigma_max < math.inf, f"process 'edm': sigma_max={self.sigma_max:g}: give a positive level")

    @property
    def t_max(self) -> float:  # type: ignore[override]
        """The largest noise level."""
        return self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        return t

    def time(self, ratio: Tensor) -> Tensor:  # noqa: D102
        return ratio

    def drift(self, t: Tensor) -> Tensor:  # noqa: D102
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:  # noqa: D102
        return (2 * t).sqrt()


@PROCESSES.register("decoupled")
@dataclass(frozen=True)
class Decoupled(Process):
    """Image to zero, zero to noise: x_t = x_0 + H(t; phi) + sigma_t eps, sigma^2 = v(t).

    The state is x_0 attenuated plus a Wiener path on the clock v, so x_s given x_t and x_0 is a Brownian bridge and not
    the Markov posterior of equal marginals. At t = 1 nothing is left of the image: the ratio is infinite and the state
    pure noise. With constant attenuation x_0 + H = alpha x_0, alpha = 1 - t. Any other one keeps that factor of x_0 and
    adds free parameters, which the state's mean depends on too: see :meth:`diffuse` and :meth:`mean`.

    Attributes:
        clock: v(t) = ``t`` (the paper) or ``t^2``.
        attenuation: h(t; phi), how the image goes to zero.

    References:
        Decoupled Diffusion Models (Huang et al., 2023), https://arxiv.org/abs/2306.13720
    """

    clock: Literal["t", "t^2"] = "t"
    attenuation: Attenuation = Constant()

    def __post_init__(self) -> None:
        if self.clock not in ("t", "t^2"):
            raise UsageError(f"process 'decoupled': clock {self.clock!r} is neither 't' nor 't^2'")

    @property
    def scales_data(self) -> bool:  # noqa: D102
        return not self.attenuation.free

    def _v(self, t: Tensor) -> Tensor:
        return t if self.clock == "t" else t.square()

    def alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        return self._v(t).sqrt()

    def time(self, ratio: Tensor) -> Tensor:  # noqa: D102
        inverse = 1 / ratio  # finite arithmetic at infinite ratio
        if self.clock == "t":
            return (2 / (inverse + (inverse.square() + 4).sqrt())).square()
        return 1 / (1 + inverse)

    def drift(self, t: Tensor) -> Tensor:  # noqa: D102
        self._require_scaled("an SDE of the state alone: take solver=ddim or bridge")
        return -1 / (1 - t)

    def diffusion(self, t: Tensor) -> Tensor:  # noqa: D102
        derivative = torch.ones_like(t) if self.clock == "t" else 2 * t
        return (derivative + 2 * self._v(t) / (1 - t)).sqrt()

    def posterior_std(self, t: Tensor, s: Tensor) -> Tensor:
        """Bridge deviation sqrt(v_s (v_t - v_s) / v_t), the paper's q(x_s | x_t, x_0)."""
        v_t, v_s = self._v(t), self._v(s)
        return (v_s * (v_t - v_s) / v_t).clamp_min(0).sqrt()

    def attenuated(self, phi: Tensor, t: Tensor) -> Tensor:
        """H(t; phi), what has been added to the image by time ``t`` (B,): (B, C, H, W)."""
        return self.attenuation.integral(phi, expand(t, phi))

    def diffuse(self, x_0: Tensor, phi: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = x_0 + H(t; phi) + sigma_t eps, (B, C, H, W)."""
        return x_0 + self.attenuated(phi, t) + expand(self.sigma(t), x_0) * eps

    def phi_of(self, prediction: Prediction) -> Tensor:
        """The attenuation's parameters of a prediction; those of its x_0 where it has none and that says all.

        Raises:
            UsageError: The denoiser predicts no free parameters.
        """
        if isinstance(prediction, DecoupledPrediction):
            return prediction.phi
        self._require_scaled("a denoiser that predicts no attenuation: take denoiser=decoupled")
        return self.attenuation.parameters(prediction.x_0, prediction.x_0[:, :0])

    def mean(self, prediction: Prediction, s: Tensor) -> Tensor:
        """x_0 + H(s; phi); alpha_s x_0 for constant attenuation."""
        if self.scales_data:
            return super().mean(prediction, s)
        return prediction.x_0 + self.attenuated(self.phi_of(prediction), s)

    def change(self, prediction: Prediction, t: Tensor, s: Tensor) -> Tensor:
        """H(s; phi) - H(t; phi) of the prediction's own phi."""
        phi = self.phi_of(prediction)
        return self.attenuated(phi, s) - self.attenuated(phi, t)

    def reprojected(self, prediction: Prediction, x_0: Tensor) -> Prediction:
        """Give a prediction another ``x_0``, and the C that takes it to zero."""
        free = self.phi_of(prediction)[:, : -x_0.shape[1]]
        return DecoupledPrediction(x_0, prediction.eps, self.attenuation.parameters(x_0, free))

    def marginal(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:  # noqa: D102
        self._require_scaled("a loss that draws none: take method=ddm")
        return super().marginal(x_0, t, eps)

    def from_ratio(self, y: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        self._require_scaled("states x / alpha: take prior=gaussian without ratio_star, and a solver that needs none")
        return super().from_ratio(y, ratio)

    def _require_scaled(self, what: str) -> None:
        if not self.scales_data:
            raise UsageError(
                f"process 'decoupled': the attenuation {type(self.attenuation).__name__} has free parameters, which "
                f"don't go with {what}, or process.attenuation=constant"
            )
