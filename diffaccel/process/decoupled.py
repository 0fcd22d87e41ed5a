"""The decoupled process of DDM: the image is attenuated to zero while the noise grows from zero."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.errors import UsageError
from diffaccel.process.attenuation import Attenuation, Constant
from diffaccel.process.base import PROCESSES, Process, expand
from diffaccel.process.prediction import DecoupledPrediction, Prediction


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
    @override
    def scales_data(self) -> bool:
        return not self.attenuation.free

    def _v(self, t: Tensor) -> Tensor:
        return t if self.clock == "t" else t.square()

    @override
    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    @override
    def sigma(self, t: Tensor) -> Tensor:
        return self._v(t).sqrt()

    @override
    def time(self, ratio: Tensor) -> Tensor:
        inverse = 1 / ratio  # finite arithmetic at infinite ratio
        if self.clock == "t":
            return (2 / (inverse + (inverse.square() + 4).sqrt())).square()
        return 1 / (1 + inverse)

    @override
    def drift(self, t: Tensor) -> Tensor:
        self._require_scaled("an SDE of the state alone: take solver=ddim or bridge")
        return -1 / (1 - t)

    @override
    def diffusion(self, t: Tensor) -> Tensor:
        derivative = torch.ones_like(t) if self.clock == "t" else 2 * t
        return (derivative + 2 * self._v(t) / (1 - t)).sqrt()

    @override
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

    @override
    def mean(self, prediction: Prediction, s: Tensor) -> Tensor:
        """x_0 + H(s; phi); alpha_s x_0 for constant attenuation."""
        if self.scales_data:
            return super().mean(prediction, s)
        return prediction.x_0 + self.attenuated(self.phi_of(prediction), s)

    @override
    def change(self, prediction: Prediction, t: Tensor, s: Tensor) -> Tensor:
        """H(s; phi) - H(t; phi) of the prediction's own phi."""
        phi = self.phi_of(prediction)
        return self.attenuated(phi, s) - self.attenuated(phi, t)

    @override
    def reprojected(self, prediction: Prediction, x_0: Tensor) -> Prediction:
        """Give a prediction another ``x_0``, and the C that takes it to zero."""
        free = self.phi_of(prediction)[:, : -x_0.shape[1]]
        return DecoupledPrediction(x_0, prediction.eps, self.attenuation.parameters(x_0, free))

    @override
    def marginal(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        self._require_scaled("a loss that draws none: take method=ddm")
        return super().marginal(x_0, t, eps)

    @override
    def from_ratio(self, y: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
        self._require_scaled("states x / alpha: take prior=gaussian without ratio_star, and a solver that needs none")
        return super().from_ratio(y, ratio)

    def _require_scaled(self, what: str) -> None:
        if not self.scales_data:
            raise UsageError(
                f"process 'decoupled': the attenuation {type(self.attenuation).__name__} has free parameters, which "
                f"don't go with {what}, or process.attenuation=constant"
            )
