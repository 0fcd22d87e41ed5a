"""What a denoiser says of a state."""

from typing import NamedTuple

from torch import Tensor


class Prediction(NamedTuple):
    """What a denoiser says of x_t: both means, so that no caller divides by a coefficient that may be 0."""

    x_0: Tensor
    """E[x_0 | x_t], (B, C, H, W)."""
    eps: Tensor
    """E[eps | x_t], (B, C, H, W)."""


class DecoupledPrediction(Prediction):
    """A prediction with the parameters of the attenuation, for the decoupled process.

    Attributes:
        phi: E[phi | x_t], (B, (free + 1) C, H, W).
    """

    phi: Tensor

    def __new__(cls, x_0: Tensor, eps: Tensor, phi: Tensor) -> "DecoupledPrediction":  # noqa: D102
        prediction = super().__new__(cls, x_0, eps)
        prediction.phi = phi
        return prediction
