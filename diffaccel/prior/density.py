"""Density priors: sampling starts from a likelihood-trained law of the noisy data (small T, arXiv 2206.05173)."""

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
    """No autocast on the device of x: in bfloat16 a density's rotations would be none."""
    return torch.autocast(x.device.type, enabled=False)


@PRIORS.register("density")
class DensityPrior(Prior):
    """Start from a density of y = x / alpha at one level. Drawing from it is one evaluation, whatever it costs.

    Args:
        denoiser: Its process says at which level ``T`` lies.
        shape: Shape of an image, (C, H, W).
        density: The density, by name and keys.
        ratio_star: Noise-to-data ratio of the start.
        T: The same as a time of the denoiser's process; give one of the two.

    Raises:
        UsageError: Neither or both of ``ratio_star`` and ``T``, or a level out of range.
    """

    weight_keys = ("density",)

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
            raise UsageError("prior 'density': give its level as ratio_star or as T, a time of the process, not both")
        if T is not None:
            ratio_star = denoiser.process.ratio(torch.tensor(T, dtype=torch.float64, device="cpu")).item()
        assert ratio_star is not None
        if not 0 < ratio_star < math.inf:
            raise UsageError(
                f"prior 'density': the start's noise-to-data ratio is {ratio_star:g}, not positive and finite"
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
            raise UsageError("prior 'density' is not fitted: run `diffaccel fit`, and set prior.checkpoint to its file")
        z = noise.normal(torch.empty(len(noise), self.density.noise_size, device=denoiser.device))
        with torch.no_grad(), full_precision(z):
            y = self.density(z, noise.uniform().to(z.device))
        ratio = torch.full((len(y),), self.ratio_star, dtype=torch.float64, device=y.device)
        return denoiser.process.from_ratio(y, ratio)

    def log_prob(self, denoiser: Denoiser, x_t: Tensor) -> Tensor:
        """See :class:`Prior`: the density of y = x / alpha over alpha^D."""
        ratio = torch.full((len(x_t),), self.ratio_star, dtype=torch.float64, device=x_t.device)
        alpha = denoiser.process.alpha(denoiser.process.time(ratio))
        with full_precision(x_t):
            return self.density.log_prob(x_t / expand(alpha, x_t)) - x_t[0].numel() * alpha.log()
