"""Warm start: sampling starts from the degraded image itself, at a noise level that covers its error."""

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams
from diffaccel.prior.base import PRIORS, Plan, Prior
from diffaccel.solver import Solver


@PRIORS.register("warm")
class WarmPrior(Prior):
    """Image of the condition with noise at ``ratio_star``, in no evaluation.

    This is small T's start, from the degraded image in place of a density. The state has the distribution of a diffused
    image, except for the error of the degraded image, which must be small against the noise. In inpainting, holes are
    0. At ratio 0 the result is the degraded image itself, in no evaluation at all.

    Args:
        ratio_star: Noise-to-data ratio of the starting states.

    Raises:
        UsageError: ``ratio_star`` is negative or infinite.

    References:
        Warm-Start Diffusion, https://arxiv.org/abs/2507.09212, which learns the mean and the deviation of the start
    """

    def __init__(self, ratio_star: float) -> None:
        super().__init__()
        if not 0 <= ratio_star < math.inf:
            raise UsageError(f"prior 'warm': ratio_star is {ratio_star}, it must be 0 or more, and finite")
        self.ratio_star = ratio_star

    @override
    def start_ratio(self, denoiser: Denoiser) -> float:
        return self.ratio_star

    @override
    def plan(self, solver: Solver, budget: float, n: int, extra: int = 0) -> Plan:
        return super().plan(solver, budget, n, extra) if self.ratio_star else Plan(self, solver, 0)

    @override
    def forward(
        self, denoiser: Denoiser, noise: NoiseStreams, shape: tuple[int, ...], chain_steps: int = 0, state: Any = None
    ) -> tuple[Tensor, Tensor]:
        condition = denoiser.condition
        if condition is None or condition.image is None or condition.image.shape[1:] != shape:
            raise UsageError(
                f"prior 'warm' starts from a condition's image of shape {tuple(shape)}, which there is not: set "
                "condition=super_resolution, inpainting or colourisation, or another prior"
            )
        z = noise.normal(torch.empty(len(noise), *shape, device=denoiser.device))
        ratio = torch.full((len(z),), self.ratio_star, dtype=torch.float64, device=z.device)
        return denoiser.process.from_ratio(condition.image.to(z) + self.ratio_star * z, ratio)
