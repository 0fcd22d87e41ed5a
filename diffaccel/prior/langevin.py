"""The Langevin-Gibbs chain on (y, sigma): Denoising Langevin Gibbs (Kim and Ye, 2022), arXiv 2209.14593.

A chain alternates a Langevin step on y = x / alpha at its present noise level with an update of the level by
p(sigma | y). Each state is by construction a sample at its own level, which is all that a solver needs to start from,
so levels are kept low and the integration is short.
"""

from typing import Annotated, Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.prior.base import PRIORS, GaussianPrior
from diffaccel.prior.chain import ChainPrior, ChainState, record, require
from diffaccel.prior.posterior import ClassifierPosterior, LevelPosterior, Update
from diffaccel.process import expand
from diffaccel.solver import SOLVERS, Karras
from diffaccel.solver.onestep import StochasticHeun


def langevin_step(y: Tensor, eps: Tensor, ratio: Tensor, eta: Tensor, z: Tensor, corrected: bool = False) -> Tensor:
    """One unadjusted Langevin step on y = x_0 + ratio * noise, whose score is -eps / ratio.

        y' = y + (eta / 2) score + sqrt(eta') z

    Discretisation adds eta^2 / (4 ratio^2) to the variance, so the level drifts upwards; ``corrected`` takes that off
    the injected noise, eta' = eta - eta^2 / (4 ratio^2) (not below 0), which cancels the drift to leading order. The
    reference has eta' = eta.

    Args:
        y: States, (B, C, H, W).
        eps: Predicted noise at them, (B, C, H, W).
        ratio: Levels, (B,).
        eta: Step sizes, (B,), in squared units of the data.
        z: Standard normal noise, (B, C, H, W).
        corrected: Whether to take the excess off.
    """
    variance = (eta - (eta / (2 * ratio)).square()).clamp_min(0) if corrected else eta
    return y - expand(eta / (2 * ratio), y) * eps + expand(variance.sqrt(), y) * z


def keep_lower(best: tuple[Tensor, Tensor], y: Tensor, ratio: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Replace, chain by chain, the least noisy state seen by a strictly less noisy one; also say which."""
    lower = ratio < best[1]
    # torch.where and no product with a mask: a NaN in one branch must not spread into the other.
    return (torch.where(expand(lower, y).bool(), y, best[0]), torch.where(lower, ratio, best[1])), lower


@PRIORS.register("chain")
class LangevinGibbsPrior(ChainPrior):
    """Start from the least noisy state of a window of a Langevin-Gibbs chain.

    Lengths are in data units of [-1, 1]: the paper's, in [0, 1], are half of these for levels and a quarter for eta.

    Args:
        posterior: p(level | y).
        chains: Number of parallel chains, fixed whatever the batch or world size.
        eta: Langevin step size.
        corrected: Whether the step takes its discretisation's excess variance off the noise (see
            :func:`langevin_step`); the reference does not.
        update: How a level follows from the posterior: ``argmax`` (reference), ``sample`` or ``mean``.
        carry: Whether the state left over from the last round may be chosen again (reference). It repeats some 3 to
            10 % of the starting points exactly.
        select: ``minimum`` takes the least noisy state of the window (reference), ``last`` the last one, which is an
            unbiased draw of the chain.
        share: Part of an image's evaluations that the chain gets, the solver the rest.
        chain_steps: Langevin-Gibbs steps an image, instead of ``share``.
        init_steps: Steps of the solver that makes the first states from pure noise.
        init_solver: That solver; EDM's stochastic one by default.
        renoise: Deviation of the noise added to the first samples.
        warmup: Langevin-Gibbs steps after that, as [steps, eta] pairs; null stands for the run's eta.
        restart_every: Rounds after which chains start anew from pure noise (their burn-in counts); null for never.
        burn_in_counted: Whether a budget bounds the burn-in too; the paper's figures leave it out. Points always tell
            both (``nfe``, ``nfe_marginal``).

    Raises:
        UsageError: A value out of range.

    References:
        Denoising MCMC for Accelerating Diffusion-Based Generative Models (Kim and Ye, 2022),
        https://arxiv.org/abs/2209.14593
    """

    def __init__(
        self,
        posterior: LevelPosterior,
        chains: int = 100,
        eta: float = 2.0,
        corrected: bool = False,
        update: Update = "argmax",
        carry: bool = True,
        select: str = "minimum",
        share: float = 0.5,
        chain_steps: int | None = None,
        init_steps: int = 19,
        init_solver: Annotated[dict[str, Any], SOLVERS] | None = None,
        renoise: float = 1.0,
        warmup: list[Any] = [[10, 2.0], [10, None]],  # noqa: B006 (read only; a list, for YAML)
        restart_every: int | None = None,
        burn_in_counted: bool = True,
    ) -> None:
        solver = SOLVERS.build(init_solver) if init_solver else StochasticHeun(Karras(0.02), S_max=2.0, S_min=0.1)
        super().__init__(chains, share, chain_steps, init_steps, solver, restart_every, burn_in_counted)
        require(eta > 0, f"eta is {eta}, it must be positive")
        require(update in ("argmax", "sample", "mean"), f"update is {update!r}: take argmax, sample or mean")
        require(select in ("minimum", "last"), f"select is {select!r}: take minimum or last")
        require(renoise >= 0, f"renoise is {renoise}, it must not be negative")
        self.posterior = posterior
        self.eta, self.corrected, self.update = eta, corrected, update
        self.carry, self.select, self.renoise = carry, select, renoise
        self.warmup = [_warmup_pair(pair, eta) for pair in warmup]

    def auxiliary_networks(self) -> dict[str, nn.Module]:
        """The noise-level classifier, if the posterior is one."""
        return {"classifier": self.posterior.network} if isinstance(self.posterior, ClassifierPosterior) else {}

    @property
    @override
    def burn_in_per_chain(self) -> int:
        return super().burn_in_per_chain + sum(steps for steps, _ in self.warmup)

    def start(self, denoiser: Denoiser, state: ChainState) -> None:
        """Integrate pure noise, add some noise back, warm up."""
        shape = tuple(state.y.shape[1:])
        x_t, t = GaussianPrior()(denoiser, state.noise, shape)
        y = self.init_solver(denoiser, x_t, t, state.noise, self.init_steps)
        state.y = y + self.renoise * state.noise.normal(y)
        state.ratio, _ = self.posterior(state.y, self.update, state.noise)
        for steps, eta in self.warmup:
            for _ in range(steps):
                self.advance(denoiser, state, eta)

    @torch.no_grad()
    def advance(self, denoiser: Denoiser, state: ChainState, eta: float | Tensor) -> Tensor:
        """One Gibbs sweep: a Langevin step at the present level, then a new level; returns which are at an end level.

        Raises:
            UsageError: The chain left the denoiser's range or turned to NaN.
        """
        denoiser.check_range(state.ratio)
        x_t, t = denoiser.process.from_ratio(state.y, state.ratio)
        eps = denoiser(x_t, t).eps
        step = torch.as_tensor(eta, dtype=state.ratio.dtype, device=state.ratio.device).expand_as(state.ratio)
        state.y = langevin_step(state.y, eps, state.ratio, step, state.noise.normal(state.y), self.corrected)
        if not state.y.isfinite().all():
            raise UsageError("the chain turned to NaN or infinity: lower prior.eta, or check the network's weights")
        state.ratio, at_end = self.posterior(state.y, self.update, state.noise)
        return at_end

    def advance_round(self, denoiser: Denoiser, state: ChainState, chain_steps: int) -> tuple[Tensor, Tensor]:
        """Take ``chain_steps`` sweeps and select one of their states."""
        best = (state.y, state.ratio if self.carry else torch.full_like(state.ratio, float("inf")))
        moved = torch.zeros_like(state.ratio, dtype=torch.bool)
        ends = torch.zeros_like(state.ratio)
        for _ in range(chain_steps):
            ends += self.advance(denoiser, state, self.eta)
            best, lower = keep_lower(best, state.y, state.ratio)
            moved |= lower
        y, ratio = best if self.select == "minimum" else (state.y, state.ratio)
        carried = float((~moved).double().mean()) if self.select == "minimum" else 0.0
        record(state, y, ratio, carried, float(ends.mean()) / max(1, chain_steps))
        return y, ratio


def _warmup_pair(pair: Any, eta: float) -> tuple[int, float]:
    """Check one [steps, eta] of a file; null stands for the run's ``eta``."""
    steps, value = pair if isinstance(pair, list | tuple) and len(pair) == 2 else (None, None)
    value = eta if value is None else value
    require(
        isinstance(steps, int) and steps >= 0 and isinstance(value, int | float) and value > 0,
        f"warmup has {pair!r}: give pairs [steps, eta], eta positive or null",
    )
    return cast(int, steps), float(value)
