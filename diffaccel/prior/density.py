"""Density priors: sampling starts from a density fitted to noisy data (small T, arXiv 2206.05173)."""

import math
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from diffaccel.denoiser import Denoiser
from diffaccel.density import DENSITIES, Density
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams
from diffaccel.prior.base import PRIORS, Prior
from diffaccel.process import expand


def full_precision(x: Tensor) -> torch.autocast:
    """Disable autocast on the device of x: in bfloat16 the rotations of a density are not orthogonal."""
    return torch.autocast(x.device.type, enabled=False)


@PRIORS.register("density")
class DensityPrior(Prior):
    """Density of y = x / alpha at a fixed noise level. A draw counts as one evaluation, whatever its cost.

    Args:
        denoiser: Denoiser whose process defines the noise level of ``T``.
        shape: Shape of an image, (C, H, W).
        density: Density, by name and keys.
        ratio_star: Noise-to-data ratio of the starting states.
        T: Time of the starting states on the denoiser's process, instead of ``ratio_star``.

    Raises:
        UsageError: Neither or both of ``ratio_star`` and ``T`` are given, or the level is out of range.
    """

    weight_keys = ("density",)
    fitted_name = "density"

    def __init__(
        self,
        denoiser: Denoiser,
        shape: tuple[int, int, int],
        density: Annotated[dict[str, Any], DENSITIES] = {"name": "gaussian"},  # noqa: B006 (read only; a mapping, for YAML)
        ratio_star: float | None = None,
        T: float | None = None,
    ) -> None:
        super().__init__()
        if (ratio_star is None) == (T is None):
            raise UsageError("prior 'density' requires either ratio_star or T: set one of them")
        if T is not None:
            ratio_star = denoiser.process.ratio(torch.tensor(T, dtype=torch.float64, device="cpu")).item()
        assert ratio_star is not None
        if not 0 < ratio_star < math.inf:
            raise UsageError(
                f"prior 'density': the start's noise-to-data ratio is {ratio_star:g}, it must be positive and finite"
            )
        self.ratio_star = ratio_star
        self.density: Density = DENSITIES.build(density, shape=shape, ratio=ratio_star)
        self.evaluations = self.density.evaluations

    @override
    def networks(self) -> dict[str, nn.Module]:
        return {"density": self.density} if self.evaluations else {}

    @override
    def share_weights(self, other: Prior) -> None:
        assert isinstance(other, DensityPrior)
        self.density = other.density.at(self.ratio_star)

    @override
    def start_ratio(self, denoiser: Denoiser) -> float:
        return self.ratio_star

    @override
    def forward(
        self, denoiser: Denoiser, noise: NoiseStreams, shape: tuple[int, ...], chain_steps: int = 0, state: Any = None
    ) -> tuple[Tensor, Tensor]:
        if not self.density.fitted:
            raise UsageError(
                "prior 'density' is not fitted: run `diffaccel fit`, and set prior.checkpoint to the file it writes"
            )
        z = noise.normal(torch.empty(len(noise), self.density.noise_size, device=denoiser.device))
        with torch.no_grad(), full_precision(z):
            y = self.density(z, noise.uniform().to(z.device))
        ratio = torch.full((len(y),), self.ratio_star, dtype=torch.float64, device=y.device)
        return denoiser.process.from_ratio(y, ratio)

    @override
    def warm_up(self, denoiser: Denoiser, noise: NoiseStreams, shape: tuple[int, ...]) -> None:
        self(denoiser, noise, shape)

    def log_prob(self, denoiser: Denoiser, x_t: Tensor) -> Tensor:
        """See :class:`Prior`; the density of x_t is the density of y = x_t / alpha, divided by alpha^D."""
        ratio = torch.full((len(x_t),), self.ratio_star, dtype=torch.float64, device=x_t.device)
        alpha = denoiser.process.alpha(denoiser.process.time(ratio))
        with full_precision(x_t):
            return self.density.log_prob(x_t / expand(alpha, x_t)) - x_t[0].numel() * alpha.log()
