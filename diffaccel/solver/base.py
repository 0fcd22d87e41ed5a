"""Base class of the solvers, with the sampling loop.

The step of each deterministic solver here is DDIM's step plus a correction. Both use predictions (x_0, eps) without
dividing by alpha, so solvers run on every process from any level. Steps from infinite ratio, where a correction is
undefined, and the last step to ratio 0 are DDIM's.
"""

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self, override

from diffaccel.condition import Condition
from diffaccel.deferred import check
from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams
from diffaccel.parts.registry import Registry
from diffaccel.process import Prediction, Process, batch_of, expand
from diffaccel.solver.grid import Grid, Karras

SOLVERS: Registry["Solver"] = Registry("solver", builtins=["diffaccel.solver"])


class Past(NamedTuple):
    """A prediction at an earlier time of the trajectory."""

    prediction: Prediction
    t: Tensor


@dataclass
class Trajectory:
    """State of the sampling loop that is passed from step to step.

    Attributes:
        noise: Noise streams of the samples.
        steps: Total number of steps.
        index: Number of steps before the current one.
        times: Times of all levels, (steps + 1, B); empty where a step is taken outside of the loop.
        final: Whether the current step ends at ratio 0.
        past: Earlier predictions, newest first. Each solver stores those that its next step needs.
    """

    noise: NoiseStreams
    steps: int
    index: int = 0
    times: Tensor = field(default_factory=lambda: torch.empty(0))
    final: bool = False
    past: list[Past] = field(default_factory=list)


class AnalyticFirst(Denoiser):
    """A denoiser whose first prediction is exact for N(0, std^2 I) data and takes no network evaluation.

    Args:
        denoiser: Denoiser for all later predictions.
        std: Standard deviation of the data.
    """

    def __init__(self, denoiser: Denoiser, std: float) -> None:
        super().__init__()
        self.process, self.ratio_range = denoiser.process, denoiser.ratio_range
        self.denoiser, self.std = denoiser, std
        self.used = False

    @override
    def forward(
        self, x_t: Tensor, t: Tensor, condition: Condition | None = None, augment: Tensor | None = None
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
    """Integrator of the reverse process, from the start level of each sample to the data.

    Attributes:
        grid: Grid of noise levels between the steps.
        denoise: Whether the last step goes from the grid's smallest positive ratio to ratio 0; otherwise, sampling
            ends at that ratio.
        analytic_first: Standard deviation of the data, to compute the first prediction for N(0, analytic_first^2 I)
            data instead of by the network, which saves one evaluation. Suits starts at high noise levels (GENIE, arXiv
            2210.05475, appendix, with a standard deviation of 1). None to use the network.
        guidance: Weight w of classifier-free guidance by the images' condition, (1 + w) prediction(condition) - w
            prediction(no condition), which doubles the number of evaluations; 0 for no guidance. Priors are not guided.
        guidance_interval: Lowest and highest noise-to-data ratio at which guidance acts, so that evaluations double
            there only; None for all.

    Raises:
        UsageError: ``analytic_first`` is not positive, ``guidance_interval`` is no interval, or the grid ends far from
            the data without ``denoise``.
    """

    adaptive: ClassVar[bool] = False
    """Whether a tolerance determines the number of evaluations, so that the solver can't keep to a budget."""
    any_mean: ClassVar[bool] = False
    """Whether the solver supports processes on which the mean of x_t is not alpha x_0."""

    grid: Grid = Karras()
    denoise: bool = True
    analytic_first: float | None = None
    guidance: float = 0.0
    guidance_interval: list[float] | None = None
    counted: Callable[[int], int] | None = field(default=None, init=False, repr=False, compare=False)
    """Number of evaluations by number of steps, where it depends on the levels; see :meth:`counting`."""

    def __post_init__(self) -> None:
        if self.analytic_first is not None and not self.analytic_first > 0:
            raise UsageError(f"solver: analytic_first is {self.analytic_first}, it must be positive or null")
        ends = self.guidance_interval
        if ends is not None and not (len(ends) == 2 and 0 <= ends[0] < ends[1]):
            raise UsageError(f"solver: guidance_interval is {ends}, it must be two ratios, 0 <= low < high, or null")
        if ends is not None and not self.guidance:
            raise UsageError("solver: guidance_interval has no effect without guidance: set guidance, or remove it")
        if self.grid.requires_denoise and not self.denoise:
            raise UsageError(
                f"solver: without denoise, sampling would end at the last level of the grid {self.grid}, far from the "
                "data: set denoise=true or grid.final_evaluation=true, or use another grid"
            )

    @abstractmethod
    def step(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, trajectory: Trajectory) -> Tensor:
        """Take one step.

        Args:
            denoiser: Denoiser with its condition bound.
            x_t: Current states, (B, C, H, W).
            t: Current times, (B,).
            s: Target times, (B,), s < t.
            trajectory: State of the sampling loop.

        Returns:
            States at ``s``, (B, C, H, W).
        """

    def predictions(self, steps: int) -> int:
        """Number of predictions per sample in ``steps`` steps."""
        return steps

    def evaluations(self, steps: int) -> int:
        """Number of network evaluations per sample in ``steps`` steps."""
        if self.counted is not None:
            return self.counted(steps)
        return (self.predictions(steps) - (self.analytic_first is not None)) * (2 if self.guidance else 1)

    def counts_by_level(self, process: Process) -> bool:
        """Whether the number of evaluations depends on the levels, because guidance acts in an interval."""
        guided = bool(self.guidance) and self.guidance_interval is not None
        return guided and not self.adaptive and process.scales_data

    def counting(self, process: Process, ratio: float) -> Self:
        """Return the solver with exact counts of evaluations for starts at a noise-to-data ratio.

        They depend on the levels if guidance acts in an interval; the solver is then run on a denoiser that counts.
        """
        if not self.counts_by_level(process):
            return self
        from diffaccel.solver.rehearsal import evaluations  # which runs solvers

        found = copy.copy(self)
        counts = cache(partial(evaluations, self, process, ratio))
        object.__setattr__(found, "counted", counts)
        return found

    def ending_at(self, ratio: float) -> Self:
        """Return the solver that ends at a positive noise-to-data ratio instead of at the data.

        Raises:
            UsageError: The grid does not end at a given level.
        """
        if not self.grid.ends_at_ratio_min:
            raise UsageError(
                f"{type(self).__name__} has to end at the noise-to-data ratio {ratio:g}, but its grid {self.grid} "
                "ignores ratio_min: use the grid 'karras', 'log_snr' or 'time'"
            )
        return dataclasses.replace(self, grid=dataclasses.replace(self.grid, ratio_min=ratio), denoise=False)

    @property
    def least_steps(self) -> int:
        """Smallest number of steps with a network evaluation."""
        return 1 if self.evaluations(1) else 2

    @property
    def least_evaluations(self) -> int:
        """Number of evaluations in ``least_steps`` steps."""
        return self.evaluations(self.least_steps)

    def steps_within(self, evaluations: int) -> int:
        """Largest number of steps with at most this many evaluations.

        Raises:
            UsageError: ``evaluations`` is less than ``least_evaluations``.
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
        """Check that the solver supports a process.

        Raises:
            UsageError: The mean of x_t is not alpha x_0, and the solver requires it.
        """
        if not process.scales_data and (self.analytic_first is not None or not self.any_mean):
            option = "" if self.analytic_first is None else " with analytic_first"
            raise UsageError(
                f"{type(self).__name__}{option} takes the mean of x_t to be alpha x_0, which it is not on {process}: "
                "use solver=bridge or ddim without analytic_first, or process.attenuation=constant"
            )

    def check_steps(self, process: Process, t: Tensor, steps: int) -> None:
        """Check that ``steps`` steps from times ``t`` (B,) have levels that the solver supports, without evaluations.

        Raises:
            UsageError: The grid has no such levels on the process, or the solver does not support them.
        """
        self.grid(process, t, steps, self.denoise)

    @torch.no_grad()
    def __call__(self, denoiser: Denoiser, x_t: Tensor, t: Tensor | float, noise: NoiseStreams, steps: int) -> Tensor:
        """Sample from the start states, without gradients.

        Args:
            denoiser: Denoiser with its condition bound.
            x_t: Start states, (B, C, H, W).
            t: Times of the start states on the denoiser's process, (B,), or a number.
            noise: Noise streams of the B samples.
            steps: Number of steps.

        Returns:
            Samples (B, C, H, W), in units of x_0.

        Raises:
            UsageError: A start level is outside the trained range, :meth:`check` rejects the process, or the network
                returned NaN or infinity.
        """
        return self.integrate(denoiser, x_t, batch_of(t, x_t), noise, steps)

    def integrate(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, noise: NoiseStreams, steps: int) -> Tensor:
        """Same as a call, with gradients with respect to x_t, for training through the steps."""
        self.check(denoiser.process)
        denoiser.check_range(denoiser.process.ratio(t.double()))
        if self.guidance:
            denoiser = denoiser.guided(self.guidance, self.guidance_interval)
        if self.analytic_first is not None:
            denoiser = AnalyticFirst(denoiser, self.analytic_first)
        times = self.grid(denoiser.process, t, steps, self.denoise)
        trajectory = Trajectory(noise, steps, times=times)
        for i, (now, then) in enumerate(pairwise(times)):
            trajectory.index, trajectory.final = i, self.denoise and i == steps - 1
            x_t = self.step(denoiser, x_t, now, then, trajectory)
        check(
            x_t.isfinite(),
            lambda: UsageError(
                "the network returned NaN or infinity while sampling: check the weights, and that their units and "
                "precision fit (try precision=32-true)"
            ),
        )
        return x_t


def ddim_step(denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor) -> tuple[Prediction, Tensor]:
    """Predict at ``t`` and take DDIM's deterministic step to ``s``: the prediction and x_s (B, C, H, W)."""
    prediction = denoiser(x_t, t)
    return prediction, denoiser.process.transition(prediction, t, s)[0]


def eps_step(process: Process, t: Tensor, s: Tensor) -> Tensor:
    """Coefficient alpha_s (rho_s - rho_t) of a change of eps in x_s, (B,); 0 from infinite ratio."""
    return where_finite(process.alpha(s) * (process.ratio(s) - process.ratio(t)))


def log_step(process: Process, t: Tensor, s: Tensor) -> Tensor:
    """Step lambda_s - lambda_t = ln(rho_t / rho_s) in lambda = -ln(rho), (B,)."""
    return (process.ratio(t) / process.ratio(s)).log()


def where_finite(coefficient: Tensor) -> Tensor:
    """Set infinite and NaN coefficients to 0, which drops the correction of a step from infinite or to zero ratio."""
    return torch.where(coefficient.isfinite(), coefficient, torch.zeros_like(coefficient))
