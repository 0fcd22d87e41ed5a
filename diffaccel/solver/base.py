"""The one sampling loop.

Every deterministic solver here is written as DDIM's step plus a correction. Both read predictions (x_0, eps) and never
divide by alpha, so they run on every process from any level: a step from infinite ratio, where a correction has no
meaning, is DDIM's, and so is the last one to ratio 0.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams
from diffaccel.parts.registry import Registry
from diffaccel.process import Prediction, Process, expand
from diffaccel.solver.grid import Grid, Karras

SOLVERS: Registry["Solver"] = Registry("solver", builtins=["diffaccel.solver"])


class Past(NamedTuple):
    """A prediction made earlier on the trajectory."""

    prediction: Prediction
    t: Tensor


@dataclass
class Trajectory:
    """What a step may know besides its state.

    Attributes:
        noise: The samples' streams.
        final: Whether this step ends at ratio 0.
        past: Earlier predictions, newest first; a step keeps what it needs.
        steps: Number of steps in all.
    """

    noise: NoiseStreams
    steps: int
    final: bool = False
    past: list[Past] = field(default_factory=list)


class AnalyticFirst(Denoiser):
    """A denoiser whose first prediction is that for N(0, std^2 I) data, which takes no evaluation.

    Args:
        denoiser: Makes the later ones.
        std: Deviation of the data.
    """

    def __init__(self, denoiser: Denoiser, std: float) -> None:
        super().__init__()
        self.process, self.ratio_range = denoiser.process, denoiser.ratio_range
        self.denoiser, self.std = denoiser, std
        self.used = False

    def forward(  # noqa: D102
        self, x_t: Tensor, t: Tensor, condition: Tensor | None = None, augment: Tensor | None = None
    ) -> Prediction:
        if self.used:
            return self.denoiser(x_t, t, condition)
        self.used = True
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        variance = (alpha * self.std).square() + sigma.square()
        return Prediction(expand(alpha * self.std**2 / variance, x_t) * x_t, expand(sigma / variance, x_t) * x_t)


@SOLVERS.base
@dataclass(frozen=True)
class Solver(ABC):
    """Reverse integrator, from each sample's own level to the data.

    Attributes:
        grid: Where the steps lie.
        denoise: Whether the last step goes from the grid's least level to ratio 0; if not, it ends at that level.
        analytic_first: Deviation of the data, to take the first prediction from N(0, analytic_first^2 I) instead of
            the network, which saves one evaluation; null evaluates. For starts at high levels, where the data are
            lost in noise (GENIE, arXiv 2210.05475, appendix; 1 there).
        guidance: Weight of classifier-free guidance by the images' labels, which doubles the evaluations; 0 for none. A
            prior is never guided.

    Raises:
        UsageError: ``analytic_first`` is not positive.
    """

    adaptive: ClassVar[bool] = False
    """Whether the number of evaluations follows from a tolerance, so that no budget can be kept."""
    any_mean: ClassVar[bool] = False
    """Whether it needs no more than the process's own transition, so that the mean of x_t need not be alpha x_0."""

    grid: Grid = Karras()
    denoise: bool = True
    analytic_first: float | None = None
    guidance: float = 0.0

    def __post_init__(self) -> None:
        if self.analytic_first is not None and not self.analytic_first > 0:
            raise UsageError(f"solver: analytic_first is {self.analytic_first}, it must be positive, or null")

    @abstractmethod
    def step(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, trajectory: Trajectory) -> Tensor:
        """Go from states ``x_t`` (B, C, H, W) at times ``t`` (B,) to ``s`` (B,), s < t."""

    def predictions(self, steps: int) -> int:
        """Predictions per sample that ``steps`` steps ask for."""
        return steps

    def evaluations(self, steps: int) -> int:
        """Network evaluations per sample that ``steps`` steps take."""
        return (self.predictions(steps) - (self.analytic_first is not None)) * (2 if self.guidance else 1)

    @property
    def least_steps(self) -> int:
        """Fewest steps that use the network at all."""
        return 1 if self.evaluations(1) else 2

    @property
    def least_evaluations(self) -> int:
        """Evaluations of ``least_steps`` steps."""
        return self.evaluations(self.least_steps)

    def steps_within(self, evaluations: int) -> int:
        """Return the largest number of steps that takes at most ``evaluations``.

        Raises:
            UsageError: Not even the fewest steps fit.
        """
        if evaluations < self.least_evaluations:
            raise UsageError(
                f"{type(self).__name__} needs {self.least_evaluations} evaluation(s), {evaluations} are left: raise nfe"
            )
        steps = self.least_steps
        while self.evaluations(steps + 1) <= evaluations:
            steps += 1
        return steps

    def check(self, process: Process) -> None:
        """Refuse a process that the steps can't run on.

        Raises:
            UsageError: The mean of its state is not alpha x_0.
        """
        if not process.scales_data and (self.analytic_first is not None or not self.any_mean):
            option = "" if self.analytic_first is None else " with analytic_first"
            raise UsageError(
                f"{type(self).__name__}{option} takes the mean of x_t to be alpha x_0, which it is not on {process}: "
                "take solver=bridge or ddim without analytic_first, or process.attenuation=constant"
            )

    @torch.no_grad()
    def __call__(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, noise: NoiseStreams, steps: int) -> Tensor:
        """Integrate to the data.

        Args:
            denoiser: The model, with its condition bound.
            x_t: States, (B, C, H, W).
            t: Their times on the denoiser's process, (B,).
            noise: The samples' streams, B of them.
            steps: Number of steps.

        Returns:
            Samples (B, C, H, W) in the units of x_0.

        Raises:
            UsageError: A start level out of the trained range, a process that :meth:`check` refuses, or NaN from the
                network.
        """
        return self.integrate(denoiser, x_t, t, noise, steps)

    def integrate(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, noise: NoiseStreams, steps: int) -> Tensor:
        """Do what a call does, and keep the gradients by x_t, for training through the steps."""
        self.check(denoiser.process)
        denoiser.check_range(denoiser.process.ratio(t.double()))
        if self.guidance:
            denoiser = denoiser.guided(self.guidance)
        if self.analytic_first is not None:
            denoiser = AnalyticFirst(denoiser, self.analytic_first)
        times = self.grid(denoiser.process, t, steps, self.denoise)
        trajectory = Trajectory(noise, steps)
        for i, (now, then) in enumerate(pairwise(times)):
            trajectory.final = self.denoise and i == steps - 1
            x_t = self.step(denoiser, x_t, now, then, trajectory)
        if not x_t.isfinite().all():
            raise UsageError(
                "the network returned NaN or infinity while sampling: check the weights, and that their units and "
                "precision fit (try precision=32-true)"
            )
        return x_t


def where_finite(coefficient: Tensor) -> Tensor:
    """Drop a correction (coefficient 0) where it would start from infinite or end at zero ratio."""
    return torch.where(coefficient.isfinite(), coefficient, torch.zeros_like(coefficient))
