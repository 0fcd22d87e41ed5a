"""Predictions of denoisers."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Prediction(NamedTuple):
    """Denoiser output at x_t: both conditional means, so that no caller divides by a coefficient of 0."""

    x_0: Tensor
    """E[x_0 | x_t], (B, C, H, W)."""
    eps: Tensor
    """E[eps | x_t], (B, C, H, W)."""


class DecoupledPrediction(Prediction):
    """Denoiser output on the decoupled process, which includes the parameters of the attenuation.

    Attributes:
        phi: E[phi | x_t], (B, (free + 1) C, H, W).
    """

    phi: Tensor

    def __new__(cls, x_0: Tensor, eps: Tensor, phi: Tensor) -> "DecoupledPrediction":
        """Make a prediction of x_0 and eps, with ``phi`` as an attribute."""
        prediction = super().__new__(cls, x_0, eps)
        prediction.phi = phi
        return prediction


def combined(function: Callable[..., Tensor], first: Prediction, *others: Prediction) -> Prediction:
    """Apply a function to x_0, eps, and the attenuation's parameters, if all have them, of several predictions."""
    x_0, eps = (function(*parts) for parts in zip(first, *others, strict=True))
    if isinstance(first, DecoupledPrediction) and all(isinstance(other, DecoupledPrediction) for other in others):
        return DecoupledPrediction(x_0, eps, function(first.phi, *(other.phi for other in others)))  # type: ignore[attr-defined]
    return Prediction(x_0, eps)
