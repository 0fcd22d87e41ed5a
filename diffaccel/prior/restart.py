"""A chain at one level that goes up by noise and comes down by a solver: restarts, shared between images."""

import dataclasses
from typing import Annotated, Any

import torch
from torch import Tensor

from diffaccel.denoiser import Denoiser
from diffaccel.prior.base import PRIORS, GaussianPrior
from diffaccel.prior.chain import ChainPrior, ChainState, record, require
from diffaccel.process import expand
from diffaccel.solver import SOLVERS, Solver


@PRIORS.register("restart")
class RestartPrior(ChainPrior):
    """Start from a chain at the level ``ratio_star``, renewed by noise up to ``ratio_up`` and a solver's way down.

    A Langevin step adds noise of variance eta and takes the score's half of it off again, to first order in eta. Here
    the noise is the forward process's, which is exact, and the way down is a solver's over as many evaluations as the
    round has: the level is known without a classifier, does not drift, and steps can be long, so that chains mix.
    Restart sampling takes such turns on the way of every image; here images share them, and the way from pure noise.

    Args:
        ratio_star: Level of the chain's states.
        ratio_up: Level that a round goes up to: mixes better the higher it is, and leaves more to the way down.
        solver: For the way down, and first from pure noise; its grid's ``ratio_min`` and ``denoise`` are set here.
        chains: Number of parallel chains, fixed whatever the batch or world size.
        share: Part of an image's evaluations that the chain gets, the solver from ``ratio_star`` to the data the rest.
        chain_steps: Evaluations of the chain an image, instead of ``share``.
        init_steps: Steps from pure noise to the first states.
        restart_every: Rounds after which chains start anew from pure noise (their burn-in counts); null for never.

    Raises:
        UsageError: A value out of range; ``ratio_up`` less than twice ``ratio_star``.

    References:
        Restart Sampling for Improving Generative Processes (Xu et al., 2023), https://arxiv.org/abs/2306.14878
    """

    def __init__(
        self,
        ratio_star: float = 1.0,
        ratio_up: float = 8.0,
        solver: Annotated[dict[str, Any], SOLVERS] = {"name": "dpmpp2m"},  # noqa: B006 (read only; a mapping, for YAML)
        chains: int = 500,
        share: float = 0.5,
        chain_steps: int | None = None,
        init_steps: int = 8,
        restart_every: int | None = None,
    ) -> None:
        require(ratio_star > 0, f"ratio_star is {ratio_star}, it must be positive")
        require(ratio_up >= 2 * ratio_star, f"ratio_up is {ratio_up}, it must be twice ratio_star or more")
        down: Solver = SOLVERS.build(solver)
        down = dataclasses.replace(
            down, grid=dataclasses.replace(down.grid, ratio_min=ratio_star), denoise=False, analytic_first=None
        )
        super().__init__(chains, share, chain_steps, init_steps, down, restart_every)
        self.ratio_star, self.ratio_up = ratio_star, ratio_up

    def start(self, denoiser: Denoiser, state: ChainState) -> None:
        """Integrate pure noise down to ``ratio_star``."""
        x_t, t = GaussianPrior()(denoiser, state.noise, tuple(state.y.shape[1:]))
        state.ratio = torch.full_like(state.ratio, self.ratio_star)
        state.y = self._down(denoiser, state, x_t, t, self.init_steps)

    def advance_round(self, denoiser: Denoiser, state: ChainState, chain_steps: int) -> tuple[Tensor, Tensor]:
        """Go up, and down again in as many steps as ``chain_steps`` evaluations allow."""
        up = torch.full_like(state.ratio, self.ratio_up)
        added = (self.ratio_up**2 - self.ratio_star**2) ** 0.5
        x_t, t = denoiser.process.from_ratio(state.y + added * state.noise.normal(state.y), up)
        state.y = self._down(denoiser, state, x_t, t, self.init_solver.steps_within(chain_steps))
        record(state, state.y, state.ratio)
        return state.y, state.ratio

    def _down(self, denoiser: Denoiser, state: ChainState, x_t: Tensor, t: Tensor, steps: int) -> Tensor:
        x_s = self.init_solver(denoiser, x_t, t, state.noise, steps)
        s = denoiser.process.time(state.ratio)
        return x_s / expand(denoiser.process.alpha(s), x_s)
