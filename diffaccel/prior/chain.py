"""The Langevin-Gibbs chain on (y, sigma): Denoising Langevin Gibbs (Kim and Ye, 2022), arXiv 2209.14593.

A chain alternates a Langevin step on y = x / alpha at its present noise level with an update of the level by
p(sigma | y). Each state is by construction a sample at its own level, which is all that a solver needs to start from,
so levels are kept low and the integration is short.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.nfe import burn_in
from diffaccel.noise import NoiseStreams
from diffaccel.prior.base import PRIORS, GaussianPrior, Group, Plan, Prior
from diffaccel.prior.posterior import LevelPosterior, Update
from diffaccel.process import expand
from diffaccel.solver import SOLVERS, Karras, Solver
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


@dataclass
class ChainState:
    """Chains that move in lockstep, and what was seen of them.

    Attributes:
        y: Present states x / alpha, (B, C, H, W).
        ratio: Their levels, (B,) float64.
        noise: The chains' own streams.
        rounds: Rounds since the last start.
        restarts: Starts so far, the first included.
        trace: One record of diagnostics a round.
    """

    y: Tensor
    ratio: Tensor
    noise: NoiseStreams
    rounds: int = 0
    restarts: int = 1
    trace: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next round depends on."""
        return {
            "y": self.y,
            "ratio": self.ratio,
            "noise": self.noise.state_dict(),
            "rounds": self.rounds,
            "restarts": self.restarts,
            "trace": list(self.trace),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.y, self.ratio = state["y"].to(self.y), state["ratio"].to(self.ratio)
        self.noise.load_state_dict(state["noise"])
        self.rounds, self.restarts, self.trace = state["rounds"], state["restarts"], list(state["trace"])


@PRIORS.register("chain")
class LangevinGibbsPrior(Prior):
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
        skips: Langevin-Gibbs steps an image, instead of ``share``.
        init_steps: Steps of the solver that makes the first states from pure noise.
        init_solver: That solver; EDM's stochastic one by default.
        renoise: Deviation of the noise added to the first samples.
        warmup: Langevin-Gibbs steps after that, as [steps, eta] pairs; null stands for the run's eta.
        restart_every: Rounds after which chains start anew from pure noise (their burn-in counts); null for never.

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
        skips: int | None = None,
        init_steps: int = 19,
        init_solver: dict[str, Any] | None = None,
        renoise: float = 1.0,
        warmup: list[Any] = [[10, 2.0], [10, None]],  # noqa: B006 (read only; a list, for YAML)
        restart_every: int | None = None,
    ) -> None:
        super().__init__()
        _require(chains >= 1, f"chains is {chains}, it must be 1 or more")
        _require(eta > 0, f"eta is {eta}, it must be positive")
        _require(update in ("argmax", "sample", "mean"), f"update is {update!r}: take argmax, sample or mean")
        _require(select in ("minimum", "last"), f"select is {select!r}: take minimum or last")
        _require(0 < share < 1, f"share is {share}, it must lie between 0 and 1")
        _require(skips is None or skips >= 1, f"skips is {skips}, it must be 1 or more")
        _require(restart_every is None or restart_every >= 1, f"restart_every is {restart_every}, not 1 or more")
        _require(init_steps >= 1, f"init_steps is {init_steps}, it must be 1 or more")
        _require(renoise >= 0, f"renoise is {renoise}, it must not be negative")
        self.posterior = posterior
        self.chains, self.eta, self.corrected, self.update = chains, eta, corrected, update
        self.carry, self.select, self.share, self.skips = carry, select, share, skips
        self.init_steps, self.renoise, self.restart_every = init_steps, renoise, restart_every
        self.init_solver: Solver = (
            SOLVERS.build(init_solver) if init_solver else StochasticHeun(Karras(0.02), S_max=2.0, S_min=0.1)
        )
        self.warmup = [_warmup_pair(pair, eta) for pair in warmup]

    @property
    def burn_in_per_chain(self) -> int:
        """Evaluations from pure noise to a chain's first round."""
        return self.init_solver.evaluations(self.init_steps) + sum(steps for steps, _ in self.warmup)

    def schedule(self, n: int, batch_size: int) -> list[Group]:
        """Image i is made by chain i mod C in round i // C; a group is ``batch_size`` chains and all their rounds."""
        groups = []
        for first in range(0, min(self.chains, n), batch_size):
            last = min(first + batch_size, self.chains)
            rounds = (range(start + first, min(start + last, n)) for start in range(0, n, self.chains))
            groups.append([indices for indices in rounds if indices])
        return groups

    def burn_in_evaluations(self, n: int) -> int:  # noqa: D102
        rounds = -(-n // self.chains)
        # Chains without an image in the last round do not start anew for it.
        starts = range(0, rounds, self.restart_every or rounds)
        return self.burn_in_per_chain * sum(min(self.chains, n - start * self.chains) for start in starts)

    def plan(self, solver: Solver, budget: float, n: int, extra: int = 0) -> Plan:  # noqa: D102
        if math.isinf(budget):
            if self.skips is None:
                raise UsageError("without a budget the chain's length must be given: set prior.skips")
            return Plan(super().plan(solver, budget, n, extra).steps, self.skips)
        overhead = self.burn_in_evaluations(n) / n
        available = int(budget - overhead - extra + 1e-9)
        least = (self.skips or 1) + solver.least_evaluations
        if available < least:
            minimum = math.ceil((least + extra + overhead) * 100 - 1e-6) / 100  # rounded up, so that it is enough
            parts = f"{self.skips or 1} chain step(s), {solver.least_evaluations} of the solver, {extra} after it"
            raise UsageError(
                f"nfe={budget:g} is below the minimum of {minimum:g} ({parts}, {overhead:.3g} of "
                f"burn-in with {self.chains} chains for n={n}): raise nfe or n, or take fewer chains"
            )
        wanted = self.skips or max(1, round(self.share * available))
        steps = solver.steps_within(max(solver.least_evaluations, available - wanted))
        # What the solver can't use (an even budget for Heun's odd one) goes to the chain, unless its length is set.
        return Plan(steps, self.skips or available - solver.evaluations(steps))

    def open(self, denoiser: Denoiser, seed: int, group: Group, shape: tuple[int, ...]) -> ChainState:
        """Start a group's chains: integrate pure noise, add some noise back, warm up."""
        state = self._empty(denoiser, seed, group, shape)
        self._start(denoiser, state)
        return state

    def restore(  # noqa: D102
        self, denoiser: Denoiser, seed: int, group: Group, shape: tuple[int, ...], saved: Mapping[str, Any]
    ) -> ChainState:
        state = self._empty(denoiser, seed, group, shape)
        state.load_state_dict(saved)
        return state

    def _empty(self, denoiser: Denoiser, seed: int, group: Group, shape: tuple[int, ...]) -> ChainState:
        noise, device = NoiseStreams(seed, group[0], "chain"), denoiser.device
        ratio = torch.empty(len(noise), dtype=torch.float64, device=device)
        return ChainState(torch.empty(len(noise), *shape, device=device), ratio, noise)

    @torch.no_grad()
    def _start(self, denoiser: Denoiser, state: ChainState) -> None:
        with burn_in():
            shape = tuple(state.y.shape[1:])
            x_t, t = GaussianPrior()(denoiser, state.noise, shape, Plan(self.init_steps))
            y = self.init_solver(denoiser, x_t, t, state.noise, self.init_steps)
            state.y = y + self.renoise * state.noise.normal(y)
            state.ratio, _ = self.posterior(state.y, self.update, state.noise)
            for steps, eta in self.warmup:
                for _ in range(steps):
                    self.advance(denoiser, state, eta)
        state.rounds = 0

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

    def forward(  # noqa: D102
        self, denoiser: Denoiser, noise: NoiseStreams, shape: tuple[int, ...], plan: Plan, state: Any = None
    ) -> tuple[Tensor, Tensor]:
        chains: ChainState = state
        if len(noise) < len(chains.y):  # the last round of n images needs fewer chains than there are
            chains.y, chains.ratio = chains.y[: len(noise)], chains.ratio[: len(noise)]
            chains.noise = chains.noise.first(len(noise))
        if self.restart_every is not None and chains.rounds == self.restart_every:
            self._start(denoiser, chains)
            chains.restarts += 1
        best = (chains.y, chains.ratio if self.carry else torch.full_like(chains.ratio, float("inf")))
        moved = torch.zeros_like(chains.ratio, dtype=torch.bool)
        ends = torch.zeros_like(chains.ratio)
        for _ in range(plan.skips):
            ends += self.advance(denoiser, chains, self.eta)
            best, lower = keep_lower(best, chains.y, chains.ratio)
            moved |= lower
        chains.rounds += 1
        y, ratio = best if self.select == "minimum" else (chains.y, chains.ratio)
        self._record(chains, y, ratio, ~moved, ends / max(1, plan.skips))
        return denoiser.process.from_ratio(y, ratio)

    def _record(self, chains: ChainState, y: Tensor, ratio: Tensor, carried: Tensor, ends: Tensor) -> None:
        chains.trace.append(
            {
                "rounds_since_start": chains.rounds,
                "start_ratio": ratio.tolist(),
                "mean": y.flatten(1).mean(1).tolist(),
                "carried": float(carried.double().mean()) if self.select == "minimum" else 0.0,
                "at_end_levels": float(ends.mean()),
            }
        )


def _warmup_pair(pair: Any, eta: float) -> tuple[int, float]:
    """Check one [steps, eta] of a file; null stands for the run's ``eta``."""
    steps, value = pair if isinstance(pair, list | tuple) and len(pair) == 2 else (None, None)
    value = eta if value is None else value
    _require(
        isinstance(steps, int) and steps >= 0 and isinstance(value, int | float) and value > 0,
        f"warmup has {pair!r}: give pairs [steps, eta], eta positive or null",
    )
    return cast(int, steps), float(value)


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise UsageError(f"prior 'chain': {problem}")
