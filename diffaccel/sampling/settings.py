"""Settings of a sampler: prior and solver by budget, and the last denoising step."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffaccel.denoiser import Denoiser
from diffaccel.nfe import counted_apart
from diffaccel.prior import Prior
from diffaccel.solver import Solver


class Setting(NamedTuple):
    """Prior and solver of a budget."""

    prior: Prior
    solver: Solver


@dataclass(frozen=True)
class Tweedie:
    """Additional denoising step after the solver, x + e^2 score(x, e).

    Attributes:
        ratio: Noise-to-data ratio e of the step.
        counted: Whether the step counts towards the NFE budget; otherwise it is counted separately, as ``tweedie``.

    References:
        Denoising MCMC (Kim and Ye, 2022), https://arxiv.org/abs/2209.14593, reference code, which uses 0.02 (CIFAR-10)
        or 0.002 (CelebA-HQ) for data in [-1, 1] and does not count the step
    """

    ratio: float
    counted: bool = True

    def __call__(self, denoiser: Denoiser, x_0: Tensor) -> Tensor:
        """Denoise images (B, C, H, W)."""
        ratio = torch.full((len(x_0),), self.ratio, dtype=torch.float64, device=x_0.device)
        x_t, t = denoiser.process.from_ratio(x_0, ratio)
        with nullcontext() if self.counted else counted_apart("tweedie"):
            return denoiser(x_t, t).x_0
