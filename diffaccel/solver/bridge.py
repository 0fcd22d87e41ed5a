"""DDM's solver: analytic attenuation of the image and a Brownian bridge of the noise."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.process import expand
from diffaccel.solver.base import SOLVERS, Trajectory
from diffaccel.solver.grid import Grid, TimeToZero
from diffaccel.solver.onestep import DDIM


@SOLVERS.register("bridge")
@dataclass(frozen=True)
class Bridge(DDIM):
    """DDM's step, which adds to the state the change of its mean and of its noise from t to s.

        x_s = x_t + H(s; phi) - H(t; phi) - (sigma_t - sqrt(sigma_s^2 - c^2)) eps + c z,    c = eta * posterior_std

    For eta = 1 the factor of eps is (v_t - v_s) / sigma_t, as published. On other processes H(s) - H(t) is
    (alpha_s - alpha_t) x_0. The step equals that of ``ddim`` where x_t = alpha_t x_0 + sigma_t eps, as for every
    denoiser with one head. It differs if the predictions of two heads are inconsistent, or if x_0 is clamped.

    Attributes:
        eta: Stochasticity in [0, 1]: 1 for the paper's stochastic step, 0 for the deterministic step.
        grid: See :class:`Solver`; the default is the reference code's.
        clamp: Whether to clamp x_0 to [-1, 1], as the reference code does for pixels.
        reproject: Whether to compute C from x_0, as the reference code does for constant attenuation. Otherwise the
            predicted phi is used, as it does for linear attenuation.

    Raises:
        UsageError: ``clamp`` without ``reproject``, in which case x_0 is not used.

    References:
        Decoupled Diffusion Models (Huang et al., 2023), https://arxiv.org/abs/2306.13720, and its reference code
    """

    eta: float = 1.0
    grid: Grid = TimeToZero()
    clamp: bool = False
    reproject: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clamp and not self.reproject:
            raise UsageError("solver 'bridge': clamp has no effect without reproject: set both or neither")

    @override
    def step(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, trajectory: Trajectory) -> Tensor:
        process, prediction = denoiser.process, denoiser(x_t, t)
        if self.reproject:
            x_0 = prediction.x_0.clamp(-1, 1) if self.clamp else prediction.x_0
            prediction = process.reprojected(prediction, x_0)
        std = self.eta * process.posterior_std(t, s) if self.eta else torch.zeros_like(s)
        removed = process.sigma(t) - (process.sigma(s).square() - std.square()).clamp_min(0).sqrt()
        mean = x_t + process.change(prediction, t, s) - expand(removed, x_t) * prediction.eps
        return mean + expand(std, x_t) * trajectory.noise.normal(x_t) if self.eta else mean
