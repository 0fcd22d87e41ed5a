"""Priors: the law of the state that sampling starts from, at a noise level of its own for each sample."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

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
"""Batches of image indices that one process makes one after the other: the rounds of a group of chains."""


@dataclass(frozen=True)
class Plan:
    """How a budget is spent on one image.

    Attributes:
        prior: Makes the starting state.
        solver: Integrates from there.
        steps: Number of steps of the solver.
        chain_steps: Evaluations of the chain before them (0 without a chain).
    """

    prior: "Prior"
    solver: Solver
    steps: int
    chain_steps: int = 0


@PRIORS.base
class Prior(nn.Module, ABC):
    """Makes starting states. A prior may use the denoiser (a chain needs its score) and keep state between calls."""

    evaluations = 0
    """Evaluations that a starting state takes, besides those of a chain."""
    burn_in_counted = True
    """Whether a budget bounds the burn-in too."""

    weight_keys: tuple[str, ...] = ()
    """Keys that its weights depend on: a file made with other values of them is another prior's."""
    uses_denoiser_weights = False
    """Whether what is fitted in it are the denoiser's own weights."""

    def networks(self) -> dict[str, nn.Module]:
        """Its own networks whose forwards are evaluations, by name."""
        return {}

    def share_weights(self, other: "Prior") -> None:
        """Take over what is fitted in another of its kind, as where a budget changes only the start's level."""

    def auxiliary_networks(self) -> dict[str, nn.Module]:
        """Its own networks whose FLOPs count and whose forwards are no evaluations, by name."""
        return {}

    def classes(self, denoiser: Denoiser) -> int:
        """Number of classes of the images that it starts; 0 if no label is used."""
        return getattr(denoiser.network, "classes", 0)

    @abstractmethod
    def forward(
        self, denoiser: Denoiser, noise: NoiseStreams, shape: tuple[int, ...], chain_steps: int = 0, state: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Draw one state per stream.

        Args:
            denoiser: The model, with its condition bound.
            noise: The images' streams, B of them.
            shape: Shape of an image, (C, H, W).
            chain_steps: Evaluations that a chain takes before it gives the states; others ignore it.
            state: What :meth:`open` returned; a chain advances it.

        Returns:
            x_t (B, C, H, W) and t (B,) on the denoiser's process.
        """

    def start_ratio(self, denoiser: Denoiser) -> float:
        """Noise-to-data ratio of all its states.

        Raises:
            UsageError: They have levels of their own.
        """
        raise UsageError(f"{type(self).__name__} starts each image at a level of its own: there is no likelihood")

    def highest_ratio(self, denoiser: Denoiser) -> float:
        """Return the highest noise-to-data ratio that sampling from the prior uses the denoiser at."""
        try:
            return self.start_ratio(denoiser)
        except UsageError:
            return denoiser.ratio_range[1]

    def log_prob(self, denoiser: Denoiser, x_t: Tensor) -> Tensor:
        """Normalised log-density of its states x_t (B, C, H, W) on the denoiser's process, in nats: (B,) float64.

        Raises:
            UsageError: It has none.
        """
        raise UsageError(f"{type(self).__name__} has no density: set prior=gaussian or density for a likelihood")

    def schedule(self, n: int, batch_size: int) -> list[Group]:
        """Cut image indices 0 .. n - 1 into batches, and batches into groups that must stay on one process."""
        return [[range(a, min(a + batch_size, n))] for a in range(0, n, batch_size)]

    def open(self, denoiser: Denoiser, seed: int, group: Group, shape: tuple[int, ...]) -> Any:
        """Make what a group's batches share, burn-in included; None for independent images."""
        return None

    def restore(self, denoiser: Denoiser, seed: int, group: Group, shape: tuple[int, ...], saved: Any) -> Any:
        """Make that again as it was after some of the batches, from its ``state_dict``; no evaluations."""
        return None

    def burn_in_evaluations(self, n: int) -> int:
        """Evaluations spent on burn-in for n images in all."""
        return 0

    def plan(self, solver: Solver, budget: float, n: int, extra: int = 0) -> Plan:
        """Spend a budget of evaluations per image.

        Args:
            solver: The integrator that follows.
            budget: Most evaluations per image, burn-in included; infinite for an adaptive solver, which keeps to none.
            n: Number of images that share the burn-in.
            extra: Evaluations per image that the method spends after the solver.

        Raises:
            UsageError: The budget is below the minimum, which the message names.
        """
        if math.isinf(budget):
            return Plan(self, solver, _only_adaptive(solver))
        extra += self.evaluations
        least = solver.least_evaluations + extra
        if budget < least:
            raise UsageError(f"nfe={budget:g} is below the minimum of {least} for this solver: raise nfe")
        return Plan(self, solver, solver.steps_within(int(budget) - extra))


def _only_adaptive(solver: Solver) -> int:
    """Return the steps of a solver that needs no budget.

    Raises:
        UsageError: The solver needs one.
    """
    if not solver.adaptive:
        raise UsageError(f"nfe is not set, and {type(solver).__name__} steps as often as it allows: give nfe=10, say")
    return 1


@PRIORS.register("gaussian")
class GaussianPrior(Prior):
    """N(0, sigma_t^2 I) at the top of what the denoiser is trained on, or at ``ratio_star``.

    Args:
        ratio_star: Noise-to-data ratio of the start; None for the top.

    Raises:
        UsageError: ``ratio_star`` is not positive.
    """

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

    def _start(self, denoiser: Denoiser, count: int) -> Tensor:
        """The start's time, (count,)."""
        process = denoiser.process
        t = torch.full((count,), process.t_max, dtype=torch.float64, device=denoiser.device)
        top = process.ratio(t).clamp_max(denoiser.ratio_range[1])
        if self.ratio_star is not None:
            t = process.time(torch.full_like(t, self.ratio_star))
        elif (top < process.ratio(t)).any():
            t = process.time(top)
        return t

    @override
    def start_ratio(self, denoiser: Denoiser) -> float:
        return denoiser.process.ratio(self._start(denoiser, 1)).item()

    @override
    def log_prob(self, denoiser: Denoiser, x_t: Tensor) -> Tensor:
        sigma = denoiser.process.sigma(self._start(denoiser, 1))
        square = x_t.flatten(1).double().square().sum(1)
        return -0.5 * (square / sigma.square() + x_t[0].numel() * (2 * math.pi * sigma.square()).log())
