"""Predictions of denoisers."""

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
