"""One-step solvers, whose step depends on the current state only."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.parts.checks import at_least
from diffaccel.process import expand
from diffaccel.solver.base import SOLVERS, Solver, Trajectory, ddim_step, eps_step


@SOLVERS.register("ddim")
@dataclass(frozen=True)
class DDIM(Solver):
    """Denoising diffusion implicit model, x_s = mean + std z, with the mean and std of the process's transition.

    eta = 0 integrates the probability-flow ODE to first order. eta = 1 is ancestral sampling (DDPM's on a variance
    preserving process, DDM's on the decoupled one).

    Attributes:
        eta: Stochasticity, in [0, 1].

    Raises:
        UsageError: eta is outside [0, 1].

    References:
        Denoising Diffusion Implicit Models (Song et al., 2021), https://arxiv.org/abs/2010.02502, Eq. 12
    """

    any_mean = True

    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise UsageError(f"{type(self).__name__}: eta is {self.eta}, it must be in [0, 1]")

    @override
    def step(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, trajectory: Trajectory) -> Tensor:
        mean, std = denoiser.process.transition(denoiser(x_t, t), t, s, self.eta)
        if self.eta == 0:
            return mean
        return mean + expand(std, x_t) * trajectory.noise.normal(x_t)


@SOLVERS.register("euler")
@dataclass(frozen=True)
class Euler(Solver):
    """Euler's method on d(x / alpha) / d(rho) = eps: EDM's Algorithm 1 without the second-order correction.

    The step is that of :class:`DDIM` with eta = 0; ``euler`` is its name in EDM.

    References:
        Elucidating the Design Space (Karras et al., 2022), https://arxiv.org/abs/2206.00364, Eq. 4
    """

    @override
    def step(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, trajectory: Trajectory) -> Tensor:
        return ddim_step(denoiser, x_t, t, s)[1]


@SOLVERS.register("heun")
@dataclass(frozen=True)
class Heun(Solver):
    """Heun's method on d(x / alpha) / d(rho) = eps: second order, two evaluations per step, one in the last step.

    References:
        Elucidating the Design Space (Karras et al., 2022), https://arxiv.org/abs/2206.00364, Algorithm 1
    """

    @override
    def predictions(self, steps: int) -> int:
        return 2 * steps - 1 if self.denoise else 2 * steps

    @override
    def step(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, trajectory: Trajectory) -> Tensor:
        prediction, x_s = ddim_step(denoiser, x_t, t, s)
        if trajectory.final:
            return x_s
        return x_s + expand(0.5 * eps_step(denoiser.process, t, s), x_s) * (denoiser(x_s, s).eps - prediction.eps)


@SOLVERS.register("dpm2")
@dataclass(frozen=True)
class DPMSolver2(Heun):
    """DPM-Solver-2: the midpoint method in lambda = -ln(rho), second order, as many evaluations as Heun's method.

        x_s = DDIM(eps) + alpha_s (rho_s - rho_t) (eps_m - eps),    eps_m at rho_m = sqrt(rho_t rho_s)

    References:
        DPM-Solver (Lu et al., 2022), https://arxiv.org/abs/2206.00927, Algorithm 1
    """

    @override
    def step(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, trajectory: Trajectory) -> Tensor:
        process, (prediction, x_s) = denoiser.process, ddim_step(denoiser, x_t, t, s)
        if trajectory.final:
            return x_s
        middle = process.time((process.ratio(t) * process.ratio(s)).sqrt())
        x_m, _ = process.transition(prediction, t, middle)
        return x_s + expand(eps_step(process, t, s), x_s) * (denoiser(x_m, middle).eps - prediction.eps)


@SOLVERS.register("edm_stochastic")
@dataclass(frozen=True)
class StochasticHeun(Heun):
    """EDM's stochastic sampler: each step first raises the noise level, then takes Heun's step from the raised level.

    Attributes:
        S_churn: Total amount of stochasticity; a step raises the ratio by the factor 1 + min(S_churn / steps,
            sqrt(2) - 1).
        S_min: Smallest ratio that is raised.
        S_max: Largest ratio that is raised.
        S_noise: Standard deviation of the added noise, relative to the exact one.
        S_churn_over_N: Whether to divide S_churn by steps + 1, the number of levels including ratio 0, as DLG's
            reference code does.

    Raises:
        UsageError: A negative value, or S_max below S_min.

    References:
        Elucidating the Design Space (Karras et al., 2022), https://arxiv.org/abs/2206.00364, Algorithm 2
    """

    S_churn: float = 80.0
    S_min: float = 0.05
    S_max: float = 50.0
    S_noise: float = 1.003
    S_churn_over_N: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "solver 'edm_stochastic'"
        at_least(0, where, S_churn=self.S_churn, S_min=self.S_min, S_noise=self.S_noise)
        at_least(self.S_min, where, S_max=self.S_max)

    @override
    def step(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, trajectory: Trajectory) -> Tensor:
        process = denoiser.process
        ratio = process.ratio(t)
        churned = (self.S_min <= ratio) & (ratio <= self.S_max)
        raised = ratio * (1 + min(self.S_churn / (trajectory.steps + self.S_churn_over_N), math.sqrt(2) - 1))
        t_hat = torch.where(churned, process.time(raised), t)
        scale = torch.where(churned, process.alpha(t_hat) / process.alpha(t), torch.ones_like(t))
        added = self.S_noise * process.alpha(t_hat) * (raised.square() - ratio.square()).sqrt()
        added = torch.where(churned, added, torch.zeros_like(added))
        x_hat = expand(scale, x_t) * x_t + expand(added, x_t) * trajectory.noise.normal(x_t)
        return super().step(denoiser, x_hat, t_hat, s, trajectory)
