"""Chains of states: what all share that start an image from the state that the one before it left."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.nfe import burn_in
from diffaccel.noise import NoiseStreams
from diffaccel.prior.base import Group, Plan, Prior
from diffaccel.solver import Solver

MOST = 100_000
"""Steps that a chain may be asked to take at once."""


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


class ChainPrior(Prior):
    """Chains that run through all images, so that each starts from where the one before it was, after one burn-in.

    Args:
        chains: Number of parallel chains, fixed whatever the batch or world size.
        share: Part of an image's evaluations that the chain gets, the solver the rest.
        chain_steps: Evaluations of the chain an image, instead of ``share``.
        init_steps: Steps of the solver that makes the first states from pure noise.
        init_solver: That solver.
        restart_every: Rounds after which chains start anew from pure noise (their burn-in counts); null for never.
        burn_in_counted: Whether a budget bounds the burn-in too.

    Raises:
        UsageError: A value out of range.
    """

    def __init__(
        self,
        chains: int,
        share: float,
        chain_steps: int | None,
        init_steps: int,
        init_solver: Solver,
        restart_every: int | None,
        burn_in_counted: bool = True,
    ) -> None:
        super().__init__()
        require(chains >= 1, f"chains is {chains}, it must be 1 or more")
        require(0 < share < 1, f"share is {share}, it must lie between 0 and 1")
        require(
            chain_steps is None or 1 <= chain_steps <= MOST,
            f"chain_steps is {chain_steps}, it must be from 1 to {MOST}",
        )
        require(restart_every is None or restart_every >= 1, f"restart_every is {restart_every}, not 1 or more")
        require(1 <= init_steps <= MOST, f"init_steps is {init_steps}, it must be from 1 to {MOST}")
        self.chains, self.share, self.chain_steps = chains, share, chain_steps
        self.init_steps, self.init_solver, self.restart_every = init_steps, init_solver, restart_every
        self.burn_in_counted = burn_in_counted

    @property
    def burn_in_per_chain(self) -> int:
        """Evaluations from pure noise to a chain's first round."""
        return self.init_solver.evaluations(self.init_steps)

    @abstractmethod
    def start(self, denoiser: Denoiser, state: ChainState) -> None:
        """Bring chains to their first state, in place."""

    @abstractmethod
    def advance_round(self, denoiser: Denoiser, state: ChainState, chain_steps: int) -> tuple[Tensor, Tensor]:
        """Take a round of ``chain_steps`` evaluations and record it.

        Returns:
            The states x / alpha to start from, (B, C, H, W), and their ratios (B,).
        """

    def schedule(self, n: int, batch_size: int) -> list[Group]:
        """Image i is made by chain i mod C in round i // C; a group is ``batch_size`` chains and all their rounds."""
        groups = []
        for first in range(0, min(self.chains, n), batch_size):
            last = min(first + batch_size, self.chains)
            rounds = (range(start + first, min(start + last, n)) for start in range(0, n, self.chains))
            groups.append([indices for indices in rounds if indices])
        return groups

    @override
    def burn_in_evaluations(self, n: int) -> int:
        rounds = -(-n // self.chains)
        # Chains without an image in the last round do not start anew for it.
        starts = range(0, rounds, self.restart_every or rounds)
        return self.burn_in_per_chain * sum(min(self.chains, n - start * self.chains) for start in starts)

    @override
    def plan(self, solver: Solver, budget: float, n: int, extra: int = 0) -> Plan:
        if math.isinf(budget):
            if self.chain_steps is None:
                raise UsageError("without a budget the chain's length must be given: set prior.chain_steps")
            return Plan(self, solver, super().plan(solver, budget, n, extra).steps, self.chain_steps)
        overhead = self.burn_in_evaluations(n) / n if self.burn_in_counted else 0.0
        available = int(budget - overhead - extra + 1e-9)
        least = (self.chain_steps or 1) + solver.least_evaluations
        if available < least:
            minimum = math.ceil((least + extra + overhead) * 100 - 1e-6) / 100  # rounded up, so that it is enough
            parts = f"{self.chain_steps or 1} chain step(s), {solver.least_evaluations} of the solver, {extra} after it"
            raise UsageError(
                f"nfe={budget:g} is below the minimum of {minimum:g} ({parts}, {overhead:.3g} of "
                f"burn-in with {self.chains} chains for n={n}): raise nfe or n, or take fewer chains"
            )
        wanted = self.chain_steps or max(1, round(self.share * available))
        steps = solver.steps_within(max(solver.least_evaluations, available - wanted))
        # What the solver can't use (an even budget for Heun's odd one) goes to the chain, unless its length is set.
        return Plan(self, solver, steps, self.chain_steps or available - solver.evaluations(steps))

    def open(self, denoiser: Denoiser, seed: int, group: Group, shape: tuple[int, ...]) -> ChainState:
        """Start a group's chains: integrate pure noise, add some noise back, warm up."""
        state = self._empty(denoiser, seed, group, shape)
        self._begin(denoiser, state)
        return state

    @override
    def restore(
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
    def _begin(self, denoiser: Denoiser, state: ChainState) -> None:
        with burn_in():
            self.start(denoiser, state)
        state.rounds = 0

    @torch.no_grad()
    @override
    def forward(
        self, denoiser: Denoiser, noise: NoiseStreams, shape: tuple[int, ...], chain_steps: int = 0, state: Any = None
    ) -> tuple[Tensor, Tensor]:
        chains: ChainState = state
        if len(noise) < len(chains.y):  # the last round of n images needs fewer chains than there are
            chains.y, chains.ratio = chains.y[: len(noise)], chains.ratio[: len(noise)]
            chains.noise = chains.noise.first(len(noise))
        if self.restart_every is not None and chains.rounds == self.restart_every:
            self._begin(denoiser, chains)
            chains.restarts += 1
        chains.rounds += 1
        y, ratio = self.advance_round(denoiser, chains, chain_steps)
        return denoiser.process.from_ratio(y, ratio)


def record(state: ChainState, y: Tensor, ratio: Tensor, carried: float = 0.0, at_end_levels: float = 0.0) -> None:
    """Add a round to the diagnostics: the states that were chosen, and shares of what should not happen often."""
    state.trace.append(
        {
            "rounds_since_start": state.rounds,
            "start_ratio": ratio.tolist(),
            "mean": y.flatten(1).mean(1).tolist(),
            "carried": carried,
            "at_end_levels": at_end_levels,
        }
    )


def require(holds: bool, problem: str) -> None:
    """Refuse a chain's value.

    Raises:
        UsageError: It does not hold.
    """
    if not holds:
        raise UsageError(f"a chain's {problem}")
