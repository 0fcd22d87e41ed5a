"""DDM's own step: an analytic attenuation and a Brownian bridge, from one prediction of both."""

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
    """DDM's step, which keeps the state and adds what lies between t and s.

        x_s = x_t + H(s; phi) - H(t; phi) - (sigma_t - sqrt(sigma_s^2 - c^2)) eps + c z,    c = eta * posterior_std

    For eta = 1 the factor of eps is (v_t - v_s) / sigma_t, as published. On other processes (alpha_s - alpha_t) x_0
    stands for H(s) - H(t). Where x_t = alpha_t x_0 + sigma_t eps, as for every denoiser with one head, this is
    ``ddim``: it differs if two heads disagree, or if x_0 is clamped.

    Attributes:
        eta: 1 is the paper's stochastic step, 0 the deterministic one; in between, see ``ddim``.
        grid: See :class:`Solver`; the reference's.
        clamp: Whether x_0 is brought to [-1, 1] first, as the reference does for pixels.
        reproject: Whether C is taken anew from x_0, as the reference does for constant attenuation; if not, the
            heads' own phi counts, as it does for the linear one.

    Raises:
        UsageError: ``clamp`` without ``reproject``, which then reads no x_0.

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
            raise UsageError("solver 'bridge': clamp changes nothing without reproject: set one of them otherwise")

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
