"""Solvers of score SDEs, and the deterministic twin of one of them.

They are written on y = x / alpha, whose law at ratio rho is that of a variance exploding process at sigma = rho, so
that they run on any process. There x_0 = y - rho eps, and the score is -eps / rho.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffaccel.denoiser import Denoiser
from diffaccel.process import Prediction, Process, expand
from diffaccel.solver.base import SOLVERS, Past, Solver, Trajectory, where_finite
from diffaccel.solver.grid import Grid, LogSNR


def _state(process: Process, prediction: Prediction, s: Tensor, noise_left: Tensor) -> Tensor:
    """State alpha_s (x_0 + noise_left eps); a DDIM step where ``noise_left`` (B,), from infinite ratio, is not finite.

    Like every step here it is written without y, which is infinite where alpha is 0.
    """
    noise_left = torch.where(noise_left.isfinite(), noise_left, process.ratio(s))
    x_0, eps = prediction
    return expand(process.alpha(s), x_0) * (x_0 + expand(noise_left, eps) * eps)


def _removed(process: Process, t: Tensor, s: Tensor) -> Tensor:
    """D = rho_t^2 - rho_s^2, the variance of y that a step takes away, (B,)."""
    return process.ratio(t).square() - process.ratio(s).square()


@SOLVERS.register("probability_flow")
@dataclass(frozen=True)
class ProbabilityFlow(Solver):
    """Reverse diffusion's predictor in its ODE form: y_s = y_t + D / 2 score.

    First order. Half of the last level's noise stays in the sample, as in the reference code.

    Attributes:
        grid: See :class:`Solver`; the published levels are geometric.

    References:
        Score-Based Generative Modeling through SDEs (Song et al., 2021), https://arxiv.org/abs/2011.13456, appendix D.3
    """

    grid: Grid = LogSNR()

    def step(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, trajectory: Trajectory) -> Tensor:  # noqa: D102
        process = denoiser.process
        rho = process.ratio(t)
        return _state(process, denoiser(x_t, t), s, rho - _removed(process, t, s) / (2 * rho))


@SOLVERS.register("reverse_diffusion")
@dataclass(frozen=True)
class ReverseDiffusion(Solver):
    """Discretised reverse SDE: y_s = y_t + D score + sqrt(D) z, without noise in the step to ratio 0.

    Attributes:
        grid: See :class:`Solver`; the published levels are geometric.

    References:
        Score-Based Generative Modeling through SDEs (Song et al., 2021), https://arxiv.org/abs/2011.13456, appendix E
    """

    grid: Grid = LogSNR()

    def step(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, trajectory: Trajectory) -> Tensor:  # noqa: D102
        process = denoiser.process
        rho, removed = process.ratio(t), _removed(process, t, s)
        mean = _state(process, denoiser(x_t, t), s, rho - removed / rho)
        if trajectory.final:
            return mean
        return mean + expand(process.alpha(s) * where_finite(removed.sqrt()), x_t) * trajectory.noise.normal(x_t)


@SOLVERS.register("euler_maruyama")
@dataclass(frozen=True)
class EulerMaruyama(Solver):
    """Euler-Maruyama on the reverse SDE in h = ln(rho_t / rho_s): y_s = y_t + V score + sqrt(V) z, V = 2 h rho_t^2.

    The reference code takes N steps of length 1 / N from N levels that lie 1 / (N - 1) apart, so each V is (N - 1) / N
    of the above, and the last step, to ratio 0, repeats the h of the one before without its noise. Kept, to reproduce
    its figures; ``denoise=False`` gives the plain scheme. A lone step is DDIM's.

    Attributes:
        grid: See :class:`Solver`; the published levels are geometric.

    References:
        Score-Based Generative Modeling through SDEs (Song et al., 2021), https://arxiv.org/abs/2011.13456, appendix E
        Denoising MCMC (Kim and Ye, 2022), https://arxiv.org/abs/2209.14593
    """

    grid: Grid = LogSNR()

    def step(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, trajectory: Trajectory) -> Tensor:  # noqa: D102
        process = denoiser.process
        prediction = denoiser(x_t, t)
        above, below = (trajectory.past[0].t, t) if trajectory.final and trajectory.past else (t, s)
        h = (process.ratio(above) / process.ratio(below)).log()
        rho = process.ratio(t)
        variance = 2 * h * rho.square() * ((trajectory.steps - 1) / trajectory.steps if self.denoise else 1)
        mean = _state(process, prediction, s, rho - variance / rho)
        if trajectory.final:
            return mean
        trajectory.past = [Past(prediction, t)]
        return mean + expand(process.alpha(s) * where_finite(variance.sqrt()), x_t) * trajectory.noise.normal(x_t)
