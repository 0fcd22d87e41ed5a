"""Adaptive solver, with a step size of its own for each sample of the batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams
from diffaccel.parts.checks import at_least, positive
from diffaccel.process import Process, expand
from diffaccel.solver.base import SOLVERS, Solver, Trajectory, ddim_step, log_step
from diffaccel.solver.grid import Grid, LogSNR

Slope = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Slope dy/du of some samples: indices in the batch (A,), u (A,), y (A, ...) -> (A, ...)."""


def dormand_prince(slope: Slope, y: Tensor, start: float, stop: float, tol: float, max_steps: int) -> Tensor:
    """Integrate dy/du = slope(u, y) by the Dormand-Prince pair of orders 5 and 4.

    Step-size control and initial step are those of scipy's RK45, applied to each sample separately. So a sample takes
    2 + 6 (accepted + rejected steps) evaluations in any batch, and is not evaluated after it has reached ``stop``.

    Args:
        slope: Right-hand side.
        y: States at ``start``, (B, ...) float64.
        start: Initial u.
        stop: Final u, above or below ``start``.
        tol: Relative and absolute tolerance of the root-mean-square error of a step.
        max_steps: Maximum number of accepted and rejected steps per sample.

    Returns:
        States at ``stop``, (B, ...); not finite for samples whose slope was not finite.

    Raises:
        UsageError: A sample did not reach ``stop`` in ``max_steps`` steps.

    References:
        Solving Ordinary Differential Equations I (Hairer, Norsett, Wanner, 1993), sections II.4 and II.5
    """
    active = torch.arange(len(y), device=y.device)
    u = torch.full((len(y),), start, dtype=y.dtype, device=y.device)
    y, k_1 = y.clone(), slope(active, u, y)
    step = _first_step(slope, y, k_1, start, stop, tol)
    rejected = torch.zeros_like(active, dtype=torch.bool)
    for _ in range(max_steps):
        u_now, y_now = u[active], y[active]
        u_next = u_now + step[active]
        u_next = u_next.clamp_min(stop) if stop < start else u_next.clamp_max(stop)
        h = u_next - u_now
        k = [k_1[active]]
        for node, weights in zip(_NODES, _STAGES, strict=True):
            k.append(slope(active, u_now + node * h, y_now + expand(h, y) * _combine(weights, k)))
        y_next = y_now + expand(h, y) * _combine(_FIFTH_ORDER, k)
        k.append(slope(active, u_next, y_next))
        error = _norm(expand(h, y) * _combine(_ERROR, k), torch.maximum(y_now.abs(), y_next.abs()), tol)
        accepted = ~(error >= 1)  # accepts NaN too: the caller handles NaN in the result
        factor = (0.9 * error**-0.2).clamp(0.2, 10.0)
        factor = torch.where(accepted & rejected[active], factor.clamp_max(1.0), factor)
        step[active], rejected[active] = h * factor, ~accepted
        done = active[accepted]
        u[done], y[done], k_1[done] = u_next[accepted], y_next[accepted], k[-1][accepted]
        active = active[(u[active] != stop) & ~error.isnan()]
        if not len(active):
            return y
    raise UsageError(f"solver 'rk45' did not reach the data in {max_steps} steps: raise tol (now {tol:g}) or max_steps")


def _combine(weights: tuple[float, ...], k: list[Tensor]) -> Tensor:
    """Weighted sum of slopes."""
    return torch.stack([weight * slope for weight, slope in zip(weights, k, strict=True)]).sum(0)


def _norm(x: Tensor, size: Tensor, tol: float) -> Tensor:
    """Root mean square of x / (tol (1 + size)) for each sample, (B,)."""
    return (x / (tol + tol * size)).flatten(1).square().mean(1).sqrt()


def _first_step(slope: Slope, y: Tensor, k_1: Tensor, start: float, stop: float, tol: float) -> Tensor:
    """Signed first step of each sample, (B,), such that an Euler step's error is about 1 % of the tolerance."""
    length, sign = abs(stop - start), 1.0 if stop > start else -1.0
    d_0, d_1 = _norm(y, y.abs(), tol), _norm(k_1, y.abs(), tol)
    h_0 = torch.where((d_0 < 1e-5) | (d_1 < 1e-5), 1e-6, 0.01 * d_0 / d_1).clamp_max(length)
    k_2 = slope(torch.arange(len(y), device=y.device), start + sign * h_0, y + sign * expand(h_0, y) * k_1)
    d_2 = _norm(k_2 - k_1, y.abs(), tol) / h_0
    largest = torch.maximum(d_1, d_2)
    h_1 = torch.where(largest <= 1e-15, (1e-3 * h_0).clamp_min(1e-6), (0.01 / largest) ** 0.2)
    return sign * torch.minimum(100 * h_0, h_1).clamp_max(length)


_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
_FIFTH_ORDER = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
_ERROR = (-71 / 57600, 0.0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)


@SOLVERS.register("rk45")
@dataclass(frozen=True)
class RK45(Solver):
    """Adaptive Runge-Kutta on the probability flow dy/du = ln(r) rho eps with y = x / alpha, rho = rho_min r^u.

    u decreases from 1 to 0. The reference code integrates the whole batch as one ODE. Here each sample has its own
    steps and doesn't depend on its batch. The state is float64; the network runs in the precision of x. A sample that
    starts at infinite ratio first takes one DDIM step to ``grid.ratio_cap``.

    Attributes:
        grid: Grid that defines ``ratio_min`` and ``ratio_cap``; its spacing is not used.
        denoise: Whether to end with a DDIM step from ``ratio_min`` to ratio 0; the reference code does not.
        tol: Relative and absolute tolerance, in units of y.
        max_steps: Maximum number of steps per sample, including rejected steps.

    References:
        Score-Based Generative Modeling through SDEs (Song et al., 2021), https://arxiv.org/abs/2011.13456, appendix D.4
    """

    adaptive = True

    grid: Grid = LogSNR()
    denoise: bool = False
    tol: float = 1e-4
    max_steps: int = 1000

    def __post_init__(self) -> None:
        if self.analytic_first is not None:
            raise UsageError("solver 'rk45' doesn't support analytic_first: remove it")
        super().__post_init__()
        positive("solver 'rk45'", tol=self.tol)
        at_least(1, "solver 'rk45'", max_steps=self.max_steps)

    @override
    def evaluations(self, steps: int) -> NoReturn:
        """Raise an error, because the tolerance determines the number of evaluations.

        Raises:
            UsageError: Always.
        """
        raise UsageError("solver 'rk45' is adaptive and can't keep to a budget: set solver.tol, and nfe=null")

    @override
    def check_steps(self, process: Process, t: Tensor, steps: int) -> None:
        super().check_steps(process, t, self._levels)

    @property
    def _levels(self) -> int:
        """Number of steps of the loop: the adaptive integration, and the step to ratio 0."""
        return 2 if self.denoise else 1

    @override
    def __call__(
        self, denoiser: Denoiser, x_t: Tensor, t: Tensor | float, noise: NoiseStreams, steps: int = 0
    ) -> Tensor:
        """See :class:`Solver`; ``steps`` is ignored."""
        return super().__call__(denoiser, x_t, t, noise, self._levels)

    @override
    def step(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, trajectory: Trajectory) -> Tensor:
        """Integrate from ``t`` to ``s``, in one DDIM step if ``s`` is at ratio 0, otherwise adaptively."""
        process = denoiser.process
        if trajectory.final:
            return ddim_step(denoiser, x_t, t, s)[1]
        x_t, t = self._from_infinity(denoiser, x_t, t)
        rho_min, ln_r = process.ratio(s), log_step(process, t, s)

        def slope(index: Tensor, u: Tensor, y: Tensor) -> Tensor:
            rho = rho_min[index] * (u * ln_r[index]).exp()
            x, time = process.from_ratio(y, rho)
            return expand(ln_r[index] * rho, y) * denoiser.select(index)(x.to(x_t), time).eps.to(y)

        y = x_t.double() / expand(process.alpha(t), x_t.double())
        y = dormand_prince(slope, y, 1.0, 0.0, self.tol, self.max_steps)
        return (expand(process.alpha(s), y) * y).to(x_t)

    def _from_infinity(self, denoiser: Denoiser, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Take samples at infinite ratio to ``grid.ratio_cap``; other samples are unchanged."""
        process = denoiser.process
        index = process.ratio(t).isinf().nonzero()[:, 0]
        if not len(index):
            return x_t, t
        cap = process.time(torch.full_like(t[index], self.grid.ratio_cap))
        _, x_cap = ddim_step(denoiser.select(index), x_t[index], t[index], cap)
        return x_t.index_copy(0, index, x_cap), t.index_copy(0, index, cap)
