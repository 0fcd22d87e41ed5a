"""Search for the best grid by dynamic programming on trajectories of the model."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.process import expand
from diffaccel.solver.grid import Grid, Karras, Listed


class FineTrajectory:
    """Trajectories on a fine grid, and the error of an Euler step between any two of its levels.

    The fine steps are two-step Adams-Bashforth on dy/d(rho) = eps with y = x / alpha, one evaluation each.

    Args:
        denoiser: Denoiser with bound labels.
        x_t: Start states, (B, C, H, W). A few hundred are enough, because the cost is a mean over them.
        t: Times of the start states, (B,), at finite ratio.
        levels: Number of fine steps, including the step to ratio 0.
        spacing: Grid of the fine levels down to its ``ratio_min``; None for :class:`Karras` down to the lowest level
            that the denoiser is trained on, or 0.002 if this is higher.

    Attributes:
        ratio: Fine levels, (levels + 1, B) float64, decreasing to 0.
        cost: Matrix (levels + 1, levels + 1) float64 with, at [i, j] for i < j, the root-mean-square error at level j
            of one Euler step from level i.

    Raises:
        UsageError: A start at infinite ratio, where y is undefined.

    References:
        On the Trajectory Regularity of ODE-based Diffusion Sampling (Chen et al., 2024),
        https://arxiv.org/abs/2405.11326, section 4 (geometry-inspired time scheduling)
    """

    @torch.no_grad()
    def __init__(
        self, denoiser: Denoiser, x_t: Tensor, t: Tensor, levels: int = 60, spacing: Grid | None = None
    ) -> None:
        process = denoiser.process
        spacing = spacing or Karras(ratio_min=max(Karras.ratio_min, denoiser.ratio_range[0]))
        times = spacing(process, t, levels)
        self.ratio = process.ratio(times)
        if not self.ratio[0].isfinite().all():
            raise UsageError("can't search a grid from an infinite noise-to-data ratio: set prior.ratio_star")
        y, slopes = [x_t / expand(process.alpha(t), x_t)], []
        for i, (now, then) in enumerate(pairwise(self.ratio)):
            x, time = process.from_ratio(y[i], now)
            slopes.append(denoiser(x, time).eps)
            step = expand(then - now, x) * slopes[i]
            if i and i + 1 < levels:  # the last step, to ratio 0, is DDIM's, as in every solver
                change = (then - now).square() / (2 * (now - self.ratio[i - 1]))
                step = step + expand(change, x) * (slopes[i] - slopes[i - 1])
            y.append(y[i] + step)
        self.cost = torch.full((levels + 1, levels + 1), torch.inf, dtype=torch.float64)
        for i, slope in enumerate(slopes):
            for j in range(i + 1, levels + 1):
                error = y[i] + expand(self.ratio[j] - self.ratio[i], slope) * slope - y[j]
                self.cost[i, j] = error.double().square().flatten(1).mean(1).sqrt().mean()

    def path(self, steps: int, gamma: float, denoise: bool = True) -> list[int]:
        """Indices of the ``steps`` + 1 fine levels with the lowest total cost of the Euler steps between them.

        Minimises sum_k gamma^k cost_k over the steps k = 0, 1, ... from the start. gamma > 1 gives more weight to late
        errors, which fewer later steps contract.

        Args:
            steps: Number of steps, at least 1.
            gamma: Ratio of the weights of consecutive steps.
            denoise: Whether the path ends at ratio 0; otherwise it ends at the smallest positive level.

        Raises:
            UsageError: More steps than fine levels.
        """
        last = len(self.cost) - (1 if denoise else 2)
        if steps > last:
            raise UsageError(f"can't search a grid of {steps} steps among {last} levels: use more levels")
        cost = self.cost[: last + 1, : last + 1]
        best, choice = cost[:, last], []  # cost of reaching the end in one step
        for _ in range(steps - 1):
            best, following = (cost + gamma * best).min(dim=1)
            choice.append(following)
        path = [0]
        for following in reversed(choice):
            path.append(int(following[path[-1]]))
        return [*path, last]

    def grid(self, steps: int, gamma: float = 1.15, denoise: bool = True) -> Listed:
        """Best grid of ``steps`` steps, with levels relative to its ends, so that it is valid for any start."""
        path = self.path(steps, gamma, denoise)
        ratio = self.ratio[path[:-1] if denoise else path]  # without ratio 0
        if len(ratio) == 1:
            return Listed()
        distance = (ratio[0] / ratio).log()
        fractions = (distance / distance[-1]).mean(1).tolist()
        return Listed(
            ratio_min=float(ratio[-1].mean()),
            ratio_cap=max(
                Listed.ratio_cap, float(math.ceil(ratio[0].max()))
            ),  # the fractions are relative to the start
            fractions=[0.0, *(round(f, 4) for f in fractions[1:-1]), 1.0],
        )
