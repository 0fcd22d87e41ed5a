"""Distributions of the training time t of a denoiser, as maps from one uniform number per sample."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from diffaccel.denoiser.base import Denoiser
from diffaccel.errors import UsageError
from diffaccel.parts.checks import positive
from diffaccel.parts.registry import Registry
from diffaccel.process import DiscreteVariancePreserving


class Levels(Protocol):
    """Map from uniform numbers to training times of a denoiser."""

    bounded: ClassVar[bool]
    """Whether the denoiser's range bounds the levels, so that the denoiser learns nothing outside."""

    def __call__(self, denoiser: Denoiser, u: Tensor) -> Tensor:
        """Map uniform numbers ``u`` in [0, 1), (B,) float64, to times (B,) in the denoiser's range."""
        ...


LEVELS: Registry[Levels] = Registry("level", builtins=["diffaccel.denoiser.levels"])
LEVELS.base(Levels)


@LEVELS.register("lognormal")
@dataclass(frozen=True)
class LogNormal:
    """ln(rho) ~ N(mean, std^2), clamped to the denoiser's range (EDM, arXiv 2206.00364, Table 1).

    Attributes:
        mean: Mean of ln(rho).
        std: Standard deviation of ln(rho).

    Raises:
        UsageError: std is not positive.
    """

    bounded: ClassVar[bool] = False

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        positive("levels 'lognormal'", std=self.std)

    def __call__(self, denoiser: Denoiser, u: Tensor) -> Tensor:
        """See :class:`Levels`."""
        low, high = denoiser.ratio_range
        ratio = (self.mean + self.std * torch.special.ndtri(u)).exp().clamp(low, high)
        return denoiser.process.time(ratio)


@LEVELS.register("uniform")
@dataclass(frozen=True)
class Uniform:
    """Time uniform over the denoiser's range (DDPM and score SDEs)."""

    bounded: ClassVar[bool] = True

    def __call__(self, denoiser: Denoiser, u: Tensor) -> Tensor:
        """See :class:`Levels`."""
        low, high = (denoiser.process.time(u.new_full((), ratio)) for ratio in denoiser.ratio_range)
        return low + u * (high - low)


@LEVELS.register("index")
@dataclass(frozen=True)
class Index:
    """Uniform over the indices {0 .. K - 1} of a discrete process in the denoiser's range (DDPM, TDPM).

    Raises:
        UsageError: The process has no indices; raised when training starts.
    """

    bounded: ClassVar[bool] = True

    def __call__(self, denoiser: Denoiser, u: Tensor) -> Tensor:
        """See :class:`Levels`."""
        if not isinstance(denoiser.process, DiscreteVariancePreserving):
            raise UsageError("levels=index needs process=vp_discrete: use this process, or levels=uniform or lognormal")
        top = denoiser.process.time(u.new_full((), denoiser.ratio_range[1])).round()
        return torch.minimum((u * (top + 1)).floor(), top)  # a mirrored u may be 1


@LEVELS.register("log_uniform")
@dataclass(frozen=True)
class LogUniform:
    """ln(rho) uniform over the denoiser's range: density of t proportional to g^2 / sigma^2 on every process.

    This is the importance sampling of maximum-likelihood training (Song et al., 2021, arXiv 2101.09258), because
    g^2 / sigma^2 dt = 2 d ln(rho): uniform in ln(e^B - 1) on VP, in 2 ln sinh(B / 2) on sub-VP, and in t on VE.
    """

    bounded: ClassVar[bool] = True

    def __call__(self, denoiser: Denoiser, u: Tensor) -> Tensor:
        """See :class:`Levels`."""
        low, high = denoiser.ratio_range
        return denoiser.process.time(low * (high / low) ** u)
