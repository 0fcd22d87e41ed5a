"""Base class of the multistep solvers, and those with fixed coefficients.

A multistep solver takes one evaluation per step and reuses earlier predictions.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.process import expand
from diffaccel.solver.base import SOLVERS, Past, Solver, Trajectory, ddim_step, eps_step, log_step, where_finite

DEFAULT: dict[str, Any] = {"name": "dpmpp2m", "lower_order_final": False}
"""Solver where none is given. In few steps it is better without the authors' lower order in the last one."""


@dataclass(frozen=True)
class Multistep(Solver):
    """Base class, with the number of predictions that each step combines.

    The step to ratio 0 of ``denoise`` is DDIM's and doesn't count. Of the S steps before it, or of all S steps without
    it, step k = 1 .. S combines at most k predictions, because there are no more (the start-up). With
    ``lower_order_final`` it combines at most S + 1 - k, so that the last one is DDIM's.

    Attributes:
        lower_order_final: Whether to lower the order in the last steps.
    """

    lowers_below: ClassVar[float] = math.inf
    """Number S of steps from which on ``lower_order_final`` is ignored."""

    lower_order_final: bool = False

    def combined(self, trajectory: Trajectory, latest: Past, order: int) -> list[Past]:
        """Predictions that the current step combines, newest first, which are kept for the next step.

        Args:
            trajectory: State of the sampling loop.
            latest: Prediction at the current state.
            order: Largest number of predictions.
        """
        steps = trajectory.steps - self.denoise
        if self.lower_order_final and steps < self.lowers_below:
            order = min(order, steps - trajectory.index)
        trajectory.past = [latest, *trajectory.past][:order]
        return trajectory.past


@SOLVERS.register("dpmpp2m")
@dataclass(frozen=True)
class DPMSolverPP2M(Multistep):
    """DPM-Solver++(2M): second order in lambda = -ln(rho), with data prediction.

        x_s = DDIM(x_0) + alpha_s (1 - rho_s / rho_t) h / (2 h_last) (x_0 - x_0_last),    h = lambda_s - lambda_t

    Attributes:
        lower_order_final: Whether the last of S steps combines one prediction, if S < 10: the rule and the default of
            the authors' code (dpm_solver_pytorch.py, ``sample``).

    References:
        DPM-Solver++ (Lu et al., 2022), https://arxiv.org/abs/2211.01095, Algorithm 2
    """

    lowers_below = 10

    lower_order_final: bool = True

    @override
    def step(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, trajectory: Trajectory) -> Tensor:
        process, (prediction, x_s) = denoiser.process, ddim_step(denoiser, x_t, t, s)
        past = self.combined(trajectory, Past(prediction, t), 2)
        if len(past) > 1 and not trajectory.final:
            last, u = past[1]
            h, h_last = log_step(process, t, s), log_step(process, u, t)
            weight = where_finite(process.alpha(s) * -torch.expm1(-h) * h / (2 * h_last))
            x_s = x_s + expand(weight, x_s) * (prediction.x_0 - last.x_0)
        return x_s


@SOLVERS.register("ipndm")
@dataclass(frozen=True)
class IPNDM(Multistep):
    """Improved pseudo-numerical method: Adams-Bashforth of up to fourth order on d(x / alpha) / d(rho) = eps.

    The coefficients are those of equal steps, as published, and the start-up increases the order step by step. The
    method is of order ``max_order`` on grids uniform in rho given exact starting values, and of second order otherwise.

    Attributes:
        max_order: Number of predictions combined, 1 to 4; 4 in the authors' code.
        lower_order_final: Whether step k of S combines at most S + 1 - k predictions; the authors' code (qsh-zh/deis,
            ``ipndm``) has no such rule.

    Raises:
        UsageError: max_order is not 1, 2, 3 or 4.

    References:
        Fast Sampling with Exponential Integrator (Zhang and Chen, 2022), https://arxiv.org/abs/2204.13902
        Pseudo Numerical Methods (Liu et al., 2022), https://arxiv.org/abs/2202.09778, Eq. 9
    """

    max_order: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_order not in _ADAMS_BASHFORTH:
            raise UsageError(f"solver 'ipndm': max_order is {self.max_order}, it must be 1, 2, 3 or 4")

    @override
    def step(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, trajectory: Trajectory) -> Tensor:
        prediction, x_s = ddim_step(denoiser, x_t, t, s)
        past = self.combined(trajectory, Past(prediction, t), self.max_order)
        if len(past) > 1 and not trajectory.final:
            weights = _ADAMS_BASHFORTH[len(past)]
            slope = sum(weight * earlier.prediction.eps for weight, earlier in zip(weights, past, strict=True))
            x_s = x_s + expand(eps_step(denoiser.process, t, s), x_s) * (slope - prediction.eps)
        return x_s


_ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
