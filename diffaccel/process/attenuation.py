"""How the decoupled process takes the image to zero: x_0 + H(t; phi), with x_0 + H(1; phi) = 0.

phi are the parameters of the rate h = dH/dt, images each, side by side in the channels. The last of them, C, follows
from the image and from the others, which are free and drawn anew for each training sample. Times come in the state's
dtype, with axes to broadcast over it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffaccel.noise import NoiseStreams
from diffaccel.parts.registry import Registry

ATTENUATIONS: Registry["Attenuation"] = Registry("attenuation", builtins=["diffaccel.process.attenuation"])


@ATTENUATIONS.base
class Attenuation(ABC):
    """An attenuation rate h(t; phi).

    Attributes:
        free: How many free parameters phi has besides C.
        variance: Variance of an element of a free parameter.
    """

    free: ClassVar[int] = 0
    variance: ClassVar[float] = 0.0

    @abstractmethod
    def integral(self, phi: Tensor, t: Tensor) -> Tensor:
        """H(t; phi): (B, (free + 1) C, H, W), (B, 1, 1, 1) -> (B, C, H, W)."""

    @abstractmethod
    def parameters(self, x_0: Tensor, free: Tensor) -> Tensor:
        """Complete phi by the C that takes ``x_0`` (B, C, H, W) to zero at t = 1: ``free`` is (B, free C, H, W)."""

    def gain(self, t: Tensor) -> Tensor:
        """What an element of a free parameter, C completed, adds to the state at t."""
        return torch.zeros_like(t)

    def draw(self, x_0: Tensor, noise: NoiseStreams) -> Tensor:
        """Draw phi for images ``x_0``: (B, C, H, W) -> (B, (free + 1) C, H, W)."""
        return self.parameters(x_0, x_0[:, :0])

    def confine(self, phi: Tensor) -> Tensor:
        """Bring a predicted phi to where drawn ones lie."""
        return phi


@ATTENUATIONS.register("constant")
@dataclass(frozen=True)
class Constant(Attenuation):
    """h = C, so H = C t with C = -x_0 and the state's mean is (1 - t) x_0: the paper's default."""

    def integral(self, phi: Tensor, t: Tensor) -> Tensor:  # noqa: D102
        return phi * t

    def parameters(self, x_0: Tensor, free: Tensor) -> Tensor:  # noqa: D102
        return -x_0


@ATTENUATIONS.register("linear")
@dataclass(frozen=True)
class Linear(Attenuation):
    """h = K t + C, so H = K t^2 / 2 + C t with C = -x_0 - K / 2; phi is K, then C.

    K ~ N(0, 1) clamped to [-1, 1], of variance 0.516, adds (t^2 - t) / 2 K to the state: an eighth at most.
    """

    free = 1
    variance = 0.516

    def integral(self, phi: Tensor, t: Tensor) -> Tensor:  # noqa: D102
        k, c = phi.chunk(2, dim=1)
        return 0.5 * t.square() * k + t * c

    def parameters(self, x_0: Tensor, free: Tensor) -> Tensor:  # noqa: D102
        return torch.cat([free, -x_0 - 0.5 * free], dim=1)

    def gain(self, t: Tensor) -> Tensor:  # noqa: D102
        return 0.5 * (t.square() - t)

    def draw(self, x_0: Tensor, noise: NoiseStreams) -> Tensor:  # noqa: D102
        return self.parameters(x_0, noise.normal(x_0).clamp(-1, 1))

    def confine(self, phi: Tensor) -> Tensor:  # noqa: D102
        k, c = phi.chunk(2, dim=1)
        return torch.cat([k.clamp(-1, 1), c], dim=1)
