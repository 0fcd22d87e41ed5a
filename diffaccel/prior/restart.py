"""Restart chain: each round adds noise and denoises with a solver, with chains shared between images."""

from typing import Annotated, Any

import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.denoiser import Denoiser
from diffaccel.prior.base import PRIORS, GaussianPrior
from diffaccel.prior.chain import ChainPrior, ChainState, record, require
from diffaccel.process import expand
from diffaccel.solver import DEFAULT, SOLVERS, Solver


@PRIORS.register("restart")
class RestartPrior(ChainPrior):
    """Distribution of a chain's states at ``ratio_star``, where a round adds noise up to ``ratio_up`` and denoises.

    A Langevin step adds noise of variance eta and removes it again by means of the score, to first order in eta. Here
    the noise is added by the forward process, which is exact, and removed by a solver with as many evaluations as the
    round has. The level is therefore known without a classifier and does not drift, and steps can be long, so that the
    chains mix. Restart sampling does the same within the trajectory of each image; here images share the chains and the
    trajectory from pure noise.

    Args:
        ratio_star: Noise-to-data ratio of the chain's states.
        ratio_up: Noise-to-data ratio that a round goes up to. Higher values mix better, but make denoising longer.
        solver: Solver from ``ratio_up`` and, for the first states, from pure noise to ``ratio_star``. The prior sets
            its ``denoise`` and the ``ratio_min`` of its grid.
        images_per_chain: Number of images per chain. The number of chains follows from the number of images, so that
            burn-in per image and length of the chains do not depend on it.
        chains: Number of parallel chains for any number of images; overrides ``images_per_chain``.
        share: Fraction of the evaluations of an image that goes to the chain; the rest goes to the experiment's solver.
        chain_steps: Number of chain evaluations per image; overrides ``share``.
        init_steps: Number of solver steps from pure noise to the first states.
        restart_every: Number of rounds after which ``chains`` restart from pure noise, with a burn-in that counts; null
            for no restarts. Chains of ``images_per_chain`` images end without it.

    Raises:
        UsageError: A value is out of range, ``ratio_up`` is less than twice ``ratio_star``, or the solver is adaptive,
            is guided, has ``analytic_first``, or has a grid that can't end at ``ratio_star``.

    References:
        Restart Sampling for Improving Generative Processes (Xu et al., 2023), https://arxiv.org/abs/2306.14878
    """

    def __init__(
        self,
        ratio_star: float = 1.0,
        ratio_up: float = 8.0,
        solver: Annotated[dict[str, Any], SOLVERS] = DEFAULT,
        images_per_chain: float = 10,
        chains: int | None = None,
        share: float = 0.5,
        chain_steps: int | None = None,
        init_steps: int = 8,
        restart_every: int | None = None,
    ) -> None:
        require(ratio_star > 0, f"ratio_star is {ratio_star}, it must be positive")
        require(ratio_up >= 2 * ratio_star, f"ratio_up is {ratio_up}, it must be at least twice ratio_star")
        down: Solver = SOLVERS.build(solver).ending_at(ratio_star)
        require(
            down.analytic_first is None,
            f"solver.analytic_first is {down.analytic_first}, but a round starts from images with noise, for which the "
            "first prediction takes the network: remove prior.solver.analytic_first",
        )
        require(not down.adaptive, f"solver is {type(down).__name__}, which is adaptive, but a round has a fixed cost")
        super().__init__(images_per_chain, chains, share, chain_steps, init_steps, down, restart_every)
        require(
            chain_steps is None or chain_steps >= self.least_round,
            f"chain_steps is {chain_steps}, but {type(down).__name__} takes at least {down.least_evaluations}",
        )
        self.ratio_star, self.ratio_up = ratio_star, ratio_up

    @override
    def solvers(self) -> dict[str, Solver]:
        return {"solver": self.init_solver}

    @override
    def known_start(self, denoiser: Denoiser) -> float:
        return self.ratio_star

    @property
    @override
    def least_round(self) -> int:
        return self.init_solver.least_evaluations

    @override
    def round_evaluations(self, chain_steps: int) -> int:
        return self.init_solver.evaluations(self.init_solver.steps_within(chain_steps))

    def start(self, denoiser: Denoiser, state: ChainState) -> None:
        """Integrate from pure noise to ``ratio_star``."""
        x_t, t = GaussianPrior()(denoiser, state.noise, tuple(state.y.shape[1:]))
        state.ratio = torch.full_like(state.ratio, self.ratio_star)
        state.y = self._down(denoiser, state, x_t, t, self.init_steps)

    def advance_round(self, denoiser: Denoiser, state: ChainState, chain_steps: int) -> tuple[Tensor, Tensor]:
        """Add noise up to ``ratio_up``, and denoise in as many steps as ``chain_steps`` evaluations allow."""
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
