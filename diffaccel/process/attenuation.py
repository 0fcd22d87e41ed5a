"""Attenuation of the image on the decoupled process: x_0 + H(t; phi), with x_0 + H(1; phi) = 0.

phi holds the parameters of the rate h = dH/dt, each shaped like an image and concatenated along the channels. The last
parameter, C, is determined by the image and the other parameters, which are free and drawn for each training sample.
Times have the state's dtype and the axes to broadcast over the state.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.noise import NoiseStreams
from diffaccel.parts.registry import Registry

ATTENUATIONS: Registry["Attenuation"] = Registry("attenuation", builtins=["diffaccel.process.attenuation"])


@ATTENUATIONS.base
class Attenuation(ABC):
    """An attenuation rate h(t; phi).

    Attributes:
        free: Number of free parameters in phi, besides C.
        variance: Variance of an element of a free parameter.
    """

    free: ClassVar[int] = 0
    variance: ClassVar[float] = 0.0

    @abstractmethod
    def integral(self, phi: Tensor, t: Tensor) -> Tensor:
        """H(t; phi): (B, (free + 1) C, H, W), (B, 1, 1, 1) -> (B, C, H, W)."""

    @abstractmethod
    def parameters(self, x_0: Tensor, free: Tensor) -> Tensor:
        """Append to the free parameters the C that takes the image to zero at t = 1.

        Args:
            x_0: Images, (B, C, H, W).
            free: Free parameters, (B, free C, H, W).

        Returns:
            phi, (B, (free + 1) C, H, W).
        """

    def gain(self, t: Tensor) -> Tensor:
        """Derivative of the state at t with respect to a free parameter, including its effect on C."""
        return torch.zeros_like(t)

    def draw(self, x_0: Tensor, noise: NoiseStreams) -> Tensor:
        """Draw phi for images ``x_0``: (B, C, H, W) -> (B, (free + 1) C, H, W)."""
        return self.parameters(x_0, x_0[:, :0])

    def confine(self, phi: Tensor) -> Tensor:
        """Clamp a predicted phi to the range of drawn ones."""
        return phi


@ATTENUATIONS.register("constant")
@dataclass(frozen=True)
class Constant(Attenuation):
    """h = C: H = C t with C = -x_0, so the mean of the state is (1 - t) x_0. The paper's default."""

    @override
    def integral(self, phi: Tensor, t: Tensor) -> Tensor:
        return phi * t

    @override
    def parameters(self, x_0: Tensor, free: Tensor) -> Tensor:
        return -x_0


@ATTENUATIONS.register("linear")
@dataclass(frozen=True)
class Linear(Attenuation):
    """h = K t + C: H = K t^2 / 2 + C t with C = -x_0 - K / 2; phi is K, then C.

    K ~ N(0, 1) is clamped to [-1, 1], which gives a variance of 0.516. K adds (t^2 - t) / 2 K to the state, at most 1/8
    in absolute value.
    """

    free = 1
    variance = 0.516

    @override
    def integral(self, phi: Tensor, t: Tensor) -> Tensor:
        k, c = phi.chunk(2, dim=1)
        return 0.5 * t.square() * k + t * c

    @override
    def parameters(self, x_0: Tensor, free: Tensor) -> Tensor:
        return torch.cat([free, -x_0 - 0.5 * free], dim=1)

    @override
    def gain(self, t: Tensor) -> Tensor:
        return 0.5 * (t.square() - t)

    @override
    def draw(self, x_0: Tensor, noise: NoiseStreams) -> Tensor:
        return self.parameters(x_0, noise.normal(x_0).clamp(-1, 1))

    @override
    def confine(self, phi: Tensor) -> Tensor:
        k, c = phi.chunk(2, dim=1)
        return torch.cat([k.clamp(-1, 1), c], dim=1)
