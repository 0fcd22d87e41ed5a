"""Forward processes x_t = alpha_t x_0 + sigma_t eps.

The noise-to-data ratio rho = sigma_t / alpha_t is a noise level common to all processes: at equal rho, x_t / alpha_t
has the same distribution on every process. Times and coefficients are (B,) tensors, float64 where they come from a
grid.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffaccel.errors import UsageError
from diffaccel.parts.registry import Registry
from diffaccel.process.prediction import Prediction


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """Cast a (B,) coefficient to the dtype and device of ``x``, and reshape it to broadcast over ``x`` (B, ...)."""
    return coefficient.to(x).reshape(-1, *(1,) * (x.ndim - 1))


def batch_of(value: Tensor | float, x: Tensor) -> Tensor:
    """Repeat a time or level given as a number for each sample of ``x`` (B, ...); a (B,) tensor stays as it is."""
    if isinstance(value, Tensor) and value.ndim:
        return value
    return torch.as_tensor(value, dtype=torch.float64, device=x.device).expand(len(x))


def require(condition: bool, message: str) -> None:
    """Raise an error unless a condition holds. A comparison with NaN is false, so NaN is rejected too.

    Args:
        condition: Condition that must hold.
        message: Message of the error.

    Raises:
        UsageError: The condition is false.
    """
    if not condition:
        raise UsageError(message)


def _of_number(coefficient: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor | float], Tensor]:
    @wraps(coefficient)
    def call(process: Any, t: Tensor | float) -> Tensor:
        return coefficient(process, t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64))

    return call


class Process(ABC):
    """A Gaussian forward process, from data at ratio 0 to noise at ``t_max``.

    Times and levels may be given as numbers, which stand for a batch of equal values.
    """

    t_max: float = 1.0
    preserves_variance: ClassVar[bool] = False
    """Whether alpha^2 + sigma^2 is 1 at all times."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Let coefficients take a number in place of a tensor."""
        super().__init_subclass__(**keywords)
        for name in ("alpha", "sigma", "time", "drift", "diffusion"):
            if name in vars(cls):
                setattr(cls, name, _of_number(vars(cls)[name]))

    @property
    def scales_data(self) -> bool:
        """Whether the mean of q(x_t | x_0) is alpha_t x_0, as required by everything that works with x / alpha."""
        return True

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the data at time ``t``, shaped like ``t``."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at time ``t``, shaped like ``t``."""

    @abstractmethod
    def time(self, ratio: Tensor) -> Tensor:
        """Time at a noise-to-data ratio, the inverse of :meth:`ratio`, shaped like ``ratio``."""

    @abstractmethod
    def drift(self, t: Tensor) -> Tensor:
        """Drift f(t) of dx = f(t) x dt + g(t) dw: the logarithmic derivative of alpha."""

    @abstractmethod
    def diffusion(self, t: Tensor) -> Tensor:
        """Diffusion g(t) of dx = f(t) x dt + g(t) dw, where g^2 = alpha^2 d(rho^2)/dt."""

    def ratio(self, t: Tensor) -> Tensor:
        """Noise-to-data ratio sigma / alpha at time ``t``; infinite where alpha is 0."""
        return self.sigma(t) / self.alpha(t)

    def marginal(self, x_0: Tensor, t: Tensor | float, eps: Tensor) -> Tensor:
        """Diffuse ``x_0`` (B, C, H, W) to time ``t``, (B,) or a number, with noise ``eps``."""
        t = batch_of(t, x_0)
        return expand(self.alpha(t), x_0) * x_0 + expand(self.sigma(t), x_0) * eps

    def from_ratio(self, y: Tensor, ratio: Tensor | float) -> tuple[Tensor, Tensor]:
        """Convert ``y = x / alpha`` (B, C, H, W) at ``ratio``, (B,) or a number, to a state and its time: (x_t, t)."""
        t = self.time(batch_of(ratio, y))
        return expand(self.alpha(t), y) * y, t

    def posterior_std(self, t: Tensor, s: Tensor) -> Tensor:
        """Standard deviation of q(x_s | x_t, x_0) for s < t.

        On a Markov process with these marginals: sigma_s sqrt(1 - rho_s^2 / rho_t^2) (DDPM, arXiv 2006.11239, Eq. 7).
        """
        return self.sigma(s) * (1 - (self.ratio(s) / self.ratio(t)).square()).clamp_min(0).sqrt()

    def mean(self, prediction: Prediction, s: Tensor) -> Tensor:
        """Predicted mean of the state at time ``s`` (B,), without its noise, (B, C, H, W)."""
        return expand(self.alpha(s), prediction.x_0) * prediction.x_0

    def change(self, prediction: Prediction, t: Tensor, s: Tensor) -> Tensor:
        """Difference of the predicted means at ``s`` and ``t``, (B, C, H, W)."""
        return expand(self.alpha(s) - self.alpha(t), prediction.x_0) * prediction.x_0

    def reprojected(self, prediction: Prediction, x_0: Tensor) -> Prediction:
        """Replace a prediction's ``x_0`` (B, C, H, W), and adapt the other parameters of the mean to the new one."""
        return Prediction(x_0, prediction.eps)

    def transition(self, prediction: Prediction, t: Tensor, s: Tensor, eta: float = 0.0) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a step from t to s < t, given the prediction at t.

            mean = alpha_s x_0 + sqrt(sigma_s^2 - c^2) eps,    std = c = eta * posterior_std(t, s)

        eta = 0 is DDIM's deterministic step. eta = 1 is ancestral sampling: DDPM's on a variance preserving process,
        DDM's bridge on the decoupled one. Nothing is divided by alpha_t, so a step may start at infinite ratio.

        Args:
            prediction: Output of the denoiser at t.
            t: Current times, (B,).
            s: Target times, (B,).
            eta: Stochasticity in [0, 1].

        Returns:
            The mean (B, C, H, W) and the standard deviation (B,).

        References:
            Denoising Diffusion Implicit Models (Song et al., 2021), https://arxiv.org/abs/2010.02502, Eq. 12
        """
        std = eta * self.posterior_std(t, s) if eta else torch.zeros_like(s)
        remaining = (self.sigma(s).square() - std.square()).clamp_min(0).sqrt()
        return self.mean(prediction, s) + expand(remaining, prediction.eps) * prediction.eps, std


PROCESSES: Registry[Process] = Registry("process", group="diffaccel.processes", builtins=["diffaccel.process"])
PROCESSES.base(Process)
