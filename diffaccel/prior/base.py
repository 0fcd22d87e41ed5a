"""Base class of the priors: distributions of the states that sampling starts from, each at its own noise level."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from diffaccel.condition import Kinds
from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams
from diffaccel.parts.registry import Registry
from diffaccel.process import expand
from diffaccel.solver import Solver

PRIORS: Registry["Prior"] = Registry(
    "prior",
    builtins=["diffaccel.prior"],
    context=["denoiser", "shape", "posterior"],
    extra={"checkpoint": Path | None, "init": Path | None},
)

Group = list[range]
"""Batches of image indices that one rank samples one after the other: the rounds of a group of chains."""


@dataclass(frozen=True)
class Plan:
    """How the budget of an image is split between prior and solver.

    Attributes:
        prior: Prior of the starting state.
        solver: Solver that integrates from the starting state.
        steps: Number of solver steps.
        chain_steps: Number of chain evaluations before the solver; 0 without a chain.
    """

    prior: "Prior"
    solver: Solver
    steps: int
    chain_steps: int = 0


@PRIORS.base
class Prior(nn.Module, ABC):
    """Distribution of the starting states.

    A prior may use the denoiser (a chain needs its score) and may keep state between calls.
    """

    evaluations = 0
    """Number of evaluations per starting state, without those of a chain."""
    pure_noise = False
    """Whether the starting states are noise without data, N(0, sigma_t^2 I) at one level, as other tools start."""
    burn_in_counted = True
    """Whether burn-in counts towards the NFE budget."""

    weight_keys: tuple[str, ...] = ()
    """Names of keys that the weights depend on; weights fitted with other values are refused."""
    fitted_name = ""
    """Name of the file of the prior's own weights that a fit writes; empty if the prior has none."""
    uses_denoiser_weights = False
    """Whether fitting the prior trains the denoiser's own weights."""

    def networks(self) -> dict[str, nn.Module]:
        """Return the prior's own networks whose forward passes count as evaluations, by name."""
        return {}

    def solvers(self) -> dict[str, Solver]:
        """Return the prior's own solvers, by their keys."""
        return {}

    def share_weights(self, other: "Prior") -> None:
        """Share fitted weights with another prior of the same type, for budgets that differ only in the start level.

        Args:
            other: Prior that holds the weights.
        """

    def auxiliary_networks(self) -> dict[str, nn.Module]:
        """Return the prior's own networks that count towards FLOPs but not towards evaluations, by name."""
        return {}

    def takes(self, denoiser: Denoiser) -> Kinds:
        """Return the kinds of conditions of the images that are sampled."""
        return Kinds.taken_by(denoiser.network)

    @abstractmethod
    def forward(
        self, denoiser: Denoiser, noise: NoiseStreams, shape: tuple[int, ...], chain_steps: int = 0, state: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Draw one starting state per noise stream.

        Args:
            denoiser: Denoiser with its condition bound.
            noise: Noise streams of the B images.
            shape: Shape of an image, (C, H, W).
            chain_steps: Number of evaluations by which a chain advances before it returns the states; ignored by other
                priors.
            state: State returned by :meth:`open`; a chain advances it in place.

        Returns:
            x_t (B, C, H, W) and t (B,) on the denoiser's process.
        """

    def start_ratio(self, denoiser: Denoiser) -> float:
        """Return the noise-to-data ratio of the starting states.

        Raises:
            UsageError: The level differs from state to state.
        """
        raise UsageError(
            f"{type(self).__name__} starts each image at its own noise level, which excludes a likelihood: set "
            "prior=gaussian or prior=density"
        )

    def highest_ratio(self, denoiser: Denoiser) -> float:
        """Return the highest noise-to-data ratio at which sampling evaluates the denoiser."""
        try:
            return self.start_ratio(denoiser)
        except UsageError:
            return denoiser.ratio_range[1]

    def known_start(self, denoiser: Denoiser) -> float | None:
        """Return the noise-to-data ratio at which the solver starts; None if it differs from state to state."""
        try:
            return self.start_ratio(denoiser)
        except UsageError:
            return None

    def log_prob(self, denoiser: Denoiser, x_t: Tensor) -> Tensor:
        """Compute the normalised log-density of starting states.

        Args:
            denoiser: Denoiser whose process the states are on.
            x_t: States, (B, C, H, W).

        Returns:
            Log-density in nats, (B,) float64.

        Raises:
            UsageError: The prior has no tractable density.
        """
        raise UsageError(
            f"{type(self).__name__} has no density, which a likelihood requires: set prior=gaussian or prior=density"
        )

    def schedule(self, n: int, batch_size: int) -> list[Group]:
        """Split image indices 0 .. n - 1 into batches, and the batches into groups that must be sampled on one rank."""
        return [[range(a, min(a + batch_size, n))] for a in range(0, n, batch_size)]

    def warm_up(self, denoiser: Denoiser, noise: NoiseStreams, shape: tuple[int, ...]) -> None:  # noqa: B027
        """Evaluate the prior's own networks once, so that they are compiled before sampling is timed."""

    def open(self, denoiser: Denoiser, seed: int, group: Group, shape: tuple[int, ...]) -> Any:
        """Create the state shared by a group's batches, including burn-in; None for independent images."""
        return None

    def restore(self, denoiser: Denoiser, seed: int, group: Group, shape: tuple[int, ...], saved: Any) -> Any:
        """Recreate the state of a group of which some batches are done, without evaluations.

        Args:
            denoiser: Denoiser, as for :meth:`open`.
            seed: Seed, as for :meth:`open`.
            group: Batches of image indices.
            shape: Shape of an image, (C, H, W).
            saved: The ``state_dict`` of the state after the last batch that is done.
        """
        return None

    def burn_in_evaluations(self, n: int) -> float:
        """Return the total number of burn-in evaluations for n images; NaN if a tolerance determines it."""
        return 0

    def plan(self, solver: Solver, budget: float, n: int, extra: int = 0) -> Plan:
        """Split a budget of evaluations per image between prior and solver.

        Args:
            solver: Solver that integrates from the starting state.
            budget: Maximum number of evaluations per image, including burn-in; infinite for an adaptive solver.
            n: Number of images that share the burn-in.
            extra: Number of evaluations per image after the solver.

        Raises:
            UsageError: The budget is below the minimum, which the message contains.
        """
        if math.isinf(budget):
            return Plan(self, solver, _only_adaptive(solver))
        extra += self.evaluations
        least = solver.least_evaluations + extra
        if budget < least:
            raise UsageError(f"nfe={budget:g} is below the minimum of {least} for this solver: raise nfe")
        return Plan(self, solver, solver.steps_within(int(budget) - extra))


def _only_adaptive(solver: Solver) -> int:
    """Return the number of steps to plan without a budget.

    Raises:
        UsageError: The solver is not adaptive and requires a budget.
    """
    if not solver.adaptive:
        raise UsageError(f"nfe is not set, but {type(solver).__name__} requires a budget: set nfe, for example nfe=10")
    return 1


@PRIORS.register("gaussian")
class GaussianPrior(Prior):
    """Gaussian N(0, sigma_t^2 I) at the highest noise level the denoiser is trained on, or at ``ratio_star``.

    Args:
        ratio_star: Noise-to-data ratio of the starting states; None for the highest one the denoiser is trained on.

    Raises:
        UsageError: ``ratio_star`` is not positive.
    """

    pure_noise = True

    def __init__(self, ratio_star: float | None = None) -> None:
        super().__init__()
        if ratio_star is not None and not ratio_star > 0:
            raise UsageError(f"prior 'gaussian': ratio_star is {ratio_star}, it must be positive")
        self.ratio_star = ratio_star

    @override
    def forward(
        self, denoiser: Denoiser, noise: NoiseStreams, shape: tuple[int, ...], chain_steps: int = 0, state: Any = None
    ) -> tuple[Tensor, Tensor]:
        t = self._start(denoiser, len(noise))
        z = noise.normal(torch.empty(len(noise), *shape, device=denoiser.device))
        return expand(denoiser.process.sigma(t), z) * z, t

    def _start(self, denoiser: Denoiser, count: int, device: torch.device | str | None = None) -> Tensor:
        """Time of the starting states, (count,), by default on the denoiser's device."""
        process = denoiser.process
        t = torch.full((count,), process.t_max, dtype=torch.float64, device=device or denoiser.device)
        if self.ratio_star is not None:
            return process.time(torch.full_like(t, self.ratio_star))
        highest, trained = process.ratio(t), denoiser.ratio_range[1]
        return torch.where(highest > trained, process.time(highest.clamp_max(trained)), t)

    @override
    def start_ratio(self, denoiser: Denoiser) -> float:
        return denoiser.process.ratio(self._start(denoiser, 1, "cpu")).item()  # also for weights on the device "meta"

    @override
    def log_prob(self, denoiser: Denoiser, x_t: Tensor) -> Tensor:
        sigma = denoiser.process.sigma(self._start(denoiser, 1))
        square = x_t.flatten(1).double().square().sum(1)
        return -0.5 * (square / sigma.square() + x_t[0].numel() * (2 * math.pi * sigma.square()).log())
