"""Settings of a sampler: prior and solver by budget, and the last denoising step."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.nfe import counted_apart
from diffaccel.parts.checks import positive
from diffaccel.prior import ChainPrior, GaussianPrior, Plan, Prior
from diffaccel.solver import Solver
from diffaccel.text.terminal import say_once


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

    Raises:
        UsageError: ``ratio`` is not positive.

    References:
        Denoising MCMC (Kim and Ye, 2022), https://arxiv.org/abs/2209.14593, reference code, which uses 0.02 (CIFAR-10)
        or 0.002 (CelebA-HQ) for data in [-1, 1] and does not count the step
    """

    ratio: float
    counted: bool = True

    def __post_init__(self) -> None:
        positive("Tweedie", ratio=self.ratio)

    def __call__(self, denoiser: Denoiser, x_0: Tensor) -> Tensor:
        """Denoise images (B, C, H, W)."""
        ratio = torch.full((len(x_0),), self.ratio, dtype=torch.float64, device=x_0.device)
        x_t, t = denoiser.process.from_ratio(x_0, ratio)
        with nullcontext() if self.counted else counted_apart("tweedie"):
            return denoiser(x_t, t).x_0


def check_steps(denoiser: Denoiser, plan: Plan) -> None:
    """Check the levels of a plan's steps, so that an error comes before other budgets are sampled.

    Nothing is drawn or evaluated. Starts whose level differs from image to image are checked when they are drawn.

    Raises:
        UsageError: The start is outside the trained range, or the grid or the solver does not support the steps.
    """
    prior = plan.prior
    todo = [(plan.solver, prior.known_start(denoiser), plan.steps)]
    if isinstance(prior, ChainPrior):
        todo.insert(0, (prior.init_solver, GaussianPrior().start_ratio(denoiser), prior.init_steps))
    for solver, ratio, steps in todo:
        if ratio is None or not steps:
            continue
        level = torch.tensor([ratio], dtype=torch.float64, device="cpu")
        denoiser.check_range(level)
        solver.check_steps(denoiser.process, denoiser.process.time(level), steps)


def check_levels(denoiser: Denoiser, solvers: Mapping[str, Solver], tweedie: Tweedie | None) -> None:
    """Check solvers, by their keys, and last denoising step.

    A level below those of the training, where networks are poor, is reported.

    Raises:
        UsageError: A solver or the last step does not support the process, or the level of the last step is above the
            trained ones.
    """
    for solver in solvers.values():
        solver.check(denoiser.process)
    low, high = denoiser.ratio_range
    if tweedie is not None and not denoiser.process.scales_data:
        raise UsageError(
            f"tweedie_ratio={tweedie.ratio:g} takes the mean of x_t to be alpha x_0, which it is not on "
            f"{denoiser.process}: remove tweedie_ratio, or set process.attenuation=constant"
        )
    if tweedie is not None and tweedie.ratio > 1.001 * high:
        raise UsageError(
            f"tweedie_ratio={tweedie.ratio:g} is above {high:.4g}, the highest noise-to-data ratio that the denoiser "
            "is trained on: lower it"
        )
    ends = {f"{key}.grid.ratio_min": one.grid.ratio_min for key, one in solvers.items() if one.grid.ends_at_ratio_min}
    ends |= {} if tweedie is None else {"tweedie_ratio": tweedie.ratio}
    for key, ratio in ends.items():
        if ratio < 0.999 * low:
            # Without the ratio, so that the draws of a search are reported once.
            say_once(
                f"{key} is below {low:.4g}, the lowest noise-to-data ratio that the denoiser is trained on, where its "
                f"predictions may be wrong: {key}={low:.6g} stays within"
            )
