"""Base class of the chain priors, in which the state of an image continues that of an earlier image."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.deferred import as_numbers, is_deferring
from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.nfe import burn_in
from diffaccel.noise import NoiseStreams
from diffaccel.prior.base import Group, Plan, Prior
from diffaccel.solver import Solver

MOST = 100_000
"""Maximum number of consecutive steps of a chain."""


@dataclass
class ChainState:
    """State and diagnostics of chains that move in lockstep.

    Attributes:
        y: Current states x / alpha, (B, C, H, W).
        ratio: Noise-to-data ratios of the states, (B,) float64.
        noise: Noise streams of the chains.
        rounds: Number of rounds since the last start.
        restarts: Number of starts so far, including the first.
        trace: One record of diagnostics per round.
    """

    y: Tensor
    ratio: Tensor
    noise: NoiseStreams
    rounds: int = 0
    restarts: int = 1
    trace: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next round depends on."""
        return {
            "y": self.y,
            "ratio": self.ratio,
            "draws": self.noise.draws,
            "rounds": self.rounds,
            "restarts": self.restarts,
            "trace": list(self.trace),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state returned by :meth:`state_dict`."""
        self.y, self.ratio = state["y"].to(self.y), state["ratio"].to(self.ratio)
        self.noise.draws = state["draws"]
        self.rounds, self.restarts, self.trace = state["rounds"], state["restarts"], list(state["trace"])


class ChainPrior(Prior):
    """Chains that run through all images after one burn-in.

    Each image starts from the state at which its chain left the previous image.

    Args:
        images_per_chain: Number of images per chain. The number of chains follows from the number of images, so that
            burn-in per image and length of the chains do not depend on it.
        chains: Number of parallel chains for any number of images; overrides ``images_per_chain``.
        share: Fraction of the evaluations of an image that goes to the chain; the rest goes to the solver.
        chain_steps: Number of chain evaluations per image; overrides ``share``.
        init_steps: Number of solver steps from pure noise to the first states.
        init_solver: Solver for the first states.
        restart_every: Number of rounds after which ``chains`` restart from pure noise, with a burn-in that counts; null
            for no restarts. Chains of ``images_per_chain`` images end without it.
        burn_in_counted: Whether burn-in counts towards the NFE budget.

    Raises:
        UsageError: A value is out of range, or a solver of the chain is guided.
    """

    def __init__(
        self,
        images_per_chain: float,
        chains: int | None,
        share: float,
        chain_steps: int | None,
        init_steps: int,
        init_solver: Solver,
        restart_every: int | None,
        burn_in_counted: bool = True,
    ) -> None:
        super().__init__()
        require(
            1 <= images_per_chain < math.inf,
            f"images_per_chain is {images_per_chain}, it must be 1 or more, and finite",
        )
        require(chains is None or chains >= 1, f"chains is {chains}, it must be 1 or more")
        require(0 < share < 1, f"share is {share}, it must be between 0 and 1")
        require(
            chain_steps is None or 1 <= chain_steps <= MOST,
            f"chain_steps is {chain_steps}, it must be from 1 to {MOST}",
        )
        require(restart_every is None or restart_every >= 1, f"restart_every is {restart_every}, it must be 1 or more")
        require(
            restart_every is None or chains is not None,
            f"restart_every is {restart_every}, which has a meaning for a fixed number of chains only: set "
            f"prior.images_per_chain={restart_every} and prior.restart_every=null, or prior.chains",
        )
        require(1 <= init_steps <= MOST, f"init_steps is {init_steps}, it must be from 1 to {MOST}")
        self.images_per_chain, self.chains = images_per_chain, chains
        self.share, self.chain_steps = share, chain_steps
        self.init_steps, self.init_solver, self.restart_every = init_steps, init_solver, restart_every
        self.burn_in_counted = burn_in_counted
        for key, one in self.solvers().items():
            require(
                not one.guidance,
                f"{key}.guidance is {one.guidance:g}, but a chain samples without condition: remove "
                f"prior.{key}.guidance",
            )

    @override
    def solvers(self) -> dict[str, Solver]:
        return {"init_solver": self.init_solver}

    def chains_for(self, n: int) -> int:
        """Return the number of parallel chains for n images, independent of batch size and world size."""
        return self.chains or chains_of(n, self.images_per_chain)

    @property
    def burn_in_per_chain(self) -> float:
        """Number of evaluations from pure noise to the first round of a chain; NaN for an adaptive solver."""
        return math.nan if self.init_solver.adaptive else self.init_solver.evaluations(self.init_steps)

    @property
    def least_round(self) -> int:
        """Smallest number of evaluations of a round."""
        return 1

    def round_evaluations(self, chain_steps: int) -> int:
        """Return the number of evaluations of a round that may take ``chain_steps``, at least ``least_round``."""
        return chain_steps

    @abstractmethod
    def start(self, denoiser: Denoiser, state: ChainState) -> None:
        """Bring the chains to their first states, in place."""

    @abstractmethod
    def advance_round(self, denoiser: Denoiser, state: ChainState, chain_steps: int) -> tuple[Tensor, Tensor]:
        """Advance the chains by a round of ``chain_steps`` evaluations and record its diagnostics.

        Returns:
            Starting states x / alpha, (B, C, H, W), and their noise-to-data ratios, (B,).
        """

    def schedule(self, n: int, batch_size: int) -> list[Group]:
        """Assign image i to chain i mod C in round i // C; a group is ``batch_size`` chains and all their rounds."""
        groups, chains = [], self.chains_for(n)
        for first in range(0, min(chains, n), batch_size):
            last = min(first + batch_size, chains)
            rounds = (range(start + first, min(start + last, n)) for start in range(0, n, chains))
            groups.append([indices for indices in rounds if indices])
        return groups

    @override
    def burn_in_evaluations(self, n: int) -> float:
        return self.burn_in_per_chain * starts_of(n, self.chains_for(n), self.restart_every)[0]

    @override
    def plan(self, solver: Solver, budget: float, n: int, extra: int = 0) -> Plan:
        if math.isinf(budget):
            if self.chain_steps is None:
                raise UsageError("nfe is not set, so that the number of chain steps is unknown: set prior.chain_steps")
            steps = super().plan(solver, budget, n, extra).steps
            return Plan(self, solver, steps, self.round_evaluations(self.chain_steps))
        overhead = self.burn_in_evaluations(n) / n if self.burn_in_counted else 0.0
        if math.isnan(overhead):
            raise UsageError(
                f"nfe={budget:g} can't include a burn-in by {type(self.init_solver).__name__}, which is adaptive: set "
                "prior.burn_in_counted=false, another prior.init_solver, or nfe=null with an adaptive solver"
            )
        available = int(budget - overhead - extra + 1e-9)
        chain_steps = self.round_evaluations(self.chain_steps or self.least_round)
        least = chain_steps + solver.least_evaluations
        if available < least:
            minimum = math.ceil((least + extra + overhead) * 100 - 1e-6) / 100  # rounded up, so that it is enough
            parts = f"{chain_steps} chain step(s), {solver.least_evaluations} of the solver, {extra} after it"
            raise UsageError(
                f"nfe={budget:g} is below the minimum of {minimum:g} ({parts}, {overhead:.3g} of "
                f"burn-in with {self.chains_for(n)} chains for n={n}): raise nfe or n, or raise prior.images_per_chain"
            )
        wanted = chain_steps if self.chain_steps else max(self.least_round, round(self.share * available))
        steps = solver.steps_within(max(solver.least_evaluations, available - wanted))
        if self.chain_steps:
            return Plan(self, solver, steps, chain_steps)
        # Evaluations that the solver can't use (Heun's number is odd) go to the chain.
        return Plan(self, solver, steps, self.round_evaluations(available - solver.evaluations(steps)))

    def open(self, denoiser: Denoiser, seed: int, group: Group, shape: tuple[int, ...]) -> ChainState:
        """Start the chains of a group, with burn-in."""
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
        device = denoiser.device
        noise = NoiseStreams(seed, group[0], "chain", device)
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


def chains_of(n: int, images_per_chain: float) -> int:
    """Return the number of chains that n images are divided into.

    n / ``images_per_chain`` is rounded down, so that burn-in per image is at most that of ``images_per_chain`` images,
    and equal to it if n is a multiple. For fewer images there is one chain.
    """
    # The margin is for quotients such as 9 / 0.9 that are whole but for rounding.
    return max(1, int(n / images_per_chain * (1 + 1e-12)))


def starts_of(n: int, chains: int, restart_every: int | None) -> tuple[int, int]:
    """Return how often chains start, and the number of rounds from a start to the next.

    Images of chains that agree in both have the same distribution, however the chains are set.

    Args:
        n: Number of images.
        chains: Number of parallel chains.
        restart_every: Number of rounds after which they restart; None for never.
    """
    rounds = -(-n // chains)
    every = min(restart_every or rounds, rounds)
    # Chains without an image in the last round do not start anew for it.
    return sum(min(chains, n - start * chains) for start in range(0, rounds, every)), every


def record(
    state: ChainState, y: Tensor, ratio: Tensor, carried: float | Tensor = 0.0, at_end_levels: float | Tensor = 0.0
) -> None:
    """Append the diagnostics of a round.

    Args:
        state: Chains.
        y: Starting states x / alpha that the round returned, (B, C, H, W).
        ratio: Noise-to-data ratios of the starting states, (B,).
        carried: Fraction of the starting states that repeat the state of the previous round.
        at_end_levels: Fraction of the sweeps that ended at one of the two end levels.
    """
    found = {
        "rounds_since_start": state.rounds,
        "start_ratio": ratio,
        "mean": y.flatten(1).mean(1),
        "carried": carried,
        "at_end_levels": at_end_levels,
    }
    state.trace.append(found if is_deferring() else as_numbers(found))


def require(holds: bool, problem: str) -> None:
    """Check a condition on the keys of a chain.

    Raises:
        UsageError: The condition does not hold.
    """
    if not holds:
        raise UsageError(f"a chain's {problem}")
