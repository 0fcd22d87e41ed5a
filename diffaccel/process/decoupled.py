"""Decoupled process of DDM: the image is attenuated to zero while the noise grows from zero."""

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

    The state is the attenuated image plus a Wiener path with variance v(t). So x_s given x_t and x_0 is a Brownian
    bridge, not the posterior of a Markov process with the same marginals. At t = 1 the state is pure noise, at infinite
    ratio. With constant attenuation, x_0 + H = alpha x_0 with alpha = 1 - t. Other attenuations keep this factor of x_0
    and add free parameters, on which the mean of the state also depends: see :meth:`diffuse` and :meth:`mean`.

    Attributes:
        clock: Variance of the noise, v(t) = ``t`` (the paper) or ``t^2``.
        attenuation: Attenuation rate h(t; phi).

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
        self._require_scaled("SDE solvers: use solver=ddim or solver=bridge")
        return -1 / (1 - t)

    @override
    def diffusion(self, t: Tensor) -> Tensor:
        derivative = torch.ones_like(t) if self.clock == "t" else 2 * t
        return (derivative + 2 * self._v(t) / (1 - t)).sqrt()

    @override
    def posterior_std(self, t: Tensor, s: Tensor) -> Tensor:
        """Standard deviation of the bridge q(x_s | x_t, x_0): sqrt(v_s (v_t - v_s) / v_t)."""
        v_t, v_s = self._v(t), self._v(s)
        return (v_s * (v_t - v_s) / v_t).clamp_min(0).sqrt()

    def attenuated(self, phi: Tensor, t: Tensor) -> Tensor:
        """Attenuation H(t; phi) at times ``t`` (B,), (B, C, H, W)."""
        return self.attenuation.integral(phi, expand(t, phi))

    def diffuse(self, x_0: Tensor, phi: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = x_0 + H(t; phi) + sigma_t eps, (B, C, H, W)."""
        return x_0 + self.attenuated(phi, t) + expand(self.sigma(t), x_0) * eps

    def phi_of(self, prediction: Prediction) -> Tensor:
        """Attenuation parameters of a prediction, or of its x_0 if there are no free ones.

        Raises:
            UsageError: The attenuation has free parameters that the denoiser doesn't predict.
        """
        if isinstance(prediction, DecoupledPrediction):
            return prediction.phi
        self._require_scaled("denoisers that don't predict them: use denoiser=decoupled")
        return self.attenuation.parameters(prediction.x_0, prediction.x_0[:, :0])

    @override
    def mean(self, prediction: Prediction, s: Tensor) -> Tensor:
        """x_0 + H(s; phi); alpha_s x_0 for constant attenuation."""
        if self.scales_data:
            return super().mean(prediction, s)
        return prediction.x_0 + self.attenuated(self.phi_of(prediction), s)

    @override
    def change(self, prediction: Prediction, t: Tensor, s: Tensor) -> Tensor:
        """H(s; phi) - H(t; phi), with phi of the prediction."""
        phi = self.phi_of(prediction)
        return self.attenuated(phi, s) - self.attenuated(phi, t)

    @override
    def reprojected(self, prediction: Prediction, x_0: Tensor) -> Prediction:
        """Replace a prediction's ``x_0``, and C by the one that takes the new ``x_0`` to zero."""
        free = self.phi_of(prediction)[:, : -x_0.shape[1]]
        return DecoupledPrediction(x_0, prediction.eps, self.attenuation.parameters(x_0, free))

    @override
    def marginal(self, x_0: Tensor, t: Tensor | float, eps: Tensor) -> Tensor:
        self._require_scaled("losses that don't draw them: use method=ddm")
        return super().marginal(x_0, t, eps)

    @override
    def from_ratio(self, y: Tensor, ratio: Tensor | float) -> tuple[Tensor, Tensor]:
        self._require_scaled("x / alpha: use prior=gaussian without ratio_star and solver=ddim or solver=bridge")
        return super().from_ratio(y, ratio)

    def _require_scaled(self, what: str) -> None:
        if not self.scales_data:
            raise UsageError(
                f"process 'decoupled': the attenuation {type(self.attenuation).__name__} has free parameters, which "
                f"are not supported by {what}, or process.attenuation=constant"
            )
