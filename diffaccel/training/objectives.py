"""Objectives that train a generator with a frozen denoiser, in addition to the critic."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from diffaccel.condition import Condition, Kinds
from diffaccel.data import Batch
from diffaccel.denoiser import Denoiser, NetworkDenoiser
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams
from diffaccel.parts.checks import at_least, positive
from diffaccel.parts.registry import Registry
from diffaccel.prior import ImplicitPrior
from diffaccel.process import expand
from diffaccel.solver import DEFAULT, SOLVERS, Solver
from diffaccel.training.module import Phase

OBJECTIVES: Registry["Objective"] = Registry(
    "objective", builtins=["diffaccel.training.moment_matching", "diffaccel.training.objectives"]
)

Given = Callable[[Batch], Denoiser]
"""The frozen denoiser with a batch's condition bound."""


@OBJECTIVES.base
class Objective(nn.Module, ABC):
    """Phases that train a generator with a frozen denoiser, the teacher.

    Args:
        lr: Learning rate of the generator in these phases, as a factor on the run's.
        since: Number of images seen from which on the phases are active.
        until: Number of images seen from which on they are no longer active; null for the end of the run.
    """

    def __init__(self, lr: float, since: int, until: int | None) -> None:
        super().__init__()
        positive("objective", lr=lr)
        at_least(0, "objective", since=since)
        at_least(since + 1, "objective", until=until)
        self.lr, self.phase = lr, partial(Phase, since=since, until=math.inf if until is None else until)

    @abstractmethod
    def attach(self, denoiser: Denoiser, prior: ImplicitPrior, shape: tuple[int, int, int]) -> None:
        """Prepare the objective for a teacher, a prior and an image shape (C, H, W).

        Raises:
            UsageError: Teacher or prior are not suitable.
        """

    @abstractmethod
    def phases(self, prior: ImplicitPrior, given: Given, shape: tuple[int, ...]) -> list[Phase]:
        """Return the phases."""


def in_units(prior: ImplicitPrior, y: Tensor) -> Tensor:
    """Convert a prior's states x / alpha to units of variance preserving processes, (B, C, H, W)."""
    return y / (1 + prior.ratio_made**2) ** 0.5


@OBJECTIVES.register("ode_pair")
class OdePair(Objective):
    """Regression of the generator on the solution of the probability-flow ODE from the same noise.

    The generator is initialised as one DDIM step from pure noise, and learns to reproduce many steps of a solver, on
    pairs of noise and solution. Squared error blurs detail that a network of this size can't predict from the noise, so
    that this objective is a warm-up for the critic and not a substitute (pairs: Luhman and Luhman, 2021,
    arXiv 2101.02388).

    Args:
        solver: Solver from ``ratio_init`` to the level of the prior; its ``denoise`` and the ``ratio_min`` of its grid
            are set by the objective.
        steps: Number of solver steps.
        pairs: Number of pairs, which are integrated once and reused, because a solution costs more than a training
            step. They are kept in memory in float16, and recomputed after resuming. Null uses each pair only once.
        lr: See :class:`Objective`.
        since: See :class:`Objective`.
        until: See :class:`Objective`.

    Raises:
        UsageError: ``steps`` or ``pairs`` is less than 1.
    """

    _ends: Tensor  # (pairs, C, H, W) on the CPU; unwritten memory is not allocated
    _made: Tensor  # (pairs,), whether each pair has been integrated

    def __init__(
        self,
        solver: Annotated[dict[str, Any], SOLVERS] = DEFAULT,
        steps: int = 8,
        pairs: int | None = None,
        lr: float = 1.0,
        since: int = 0,
        until: int | None = None,
    ) -> None:
        super().__init__(lr, since, until)
        for name, value in (("steps", steps), ("pairs", pairs)):
            if value is not None and value < 1:
                raise UsageError(f"objective 'ode_pair': {name} is {value}, it must be 1 or more")
        self.solver: Solver = SOLVERS.build(solver)
        self.steps, self.pairs = steps, pairs

    @override
    def attach(self, denoiser: Denoiser, prior: ImplicitPrior, shape: tuple[int, int, int]) -> None:
        if prior.kind != "separate" or not 0 < 2 * prior.ratio_made <= prior.ratio_init:
            raise UsageError(
                "objective 'ode_pair' integrates from ratio_init to ratio_star: set prior.generator=separate, a "
                "positive ratio_star, and ratio_init to at least twice ratio_star"
            )
        self.solver.ending_at(prior.ratio_made)  # checks the grid before the training
        takes = prior.takes(denoiser)
        if self.pairs is not None and takes.required:
            raise UsageError(
                f"objective 'ode_pair' keeps pairs of noise and labels, but the network takes {takes}: leave out "
                "its key 'pairs'"
            )
        self.classes: int = Kinds.taken_by(denoiser.network).classes
        if self.pairs is not None:
            self._ends = torch.empty(self.pairs, *shape, dtype=torch.float16, device="cpu")
            self._made = torch.zeros(self.pairs, dtype=torch.bool, device="cpu")

    @override
    def phases(self, prior: ImplicitPrior, given: Given, shape: tuple[int, ...]) -> list[Phase]:
        generator = prior.generator
        assert generator is not None

        def loss(batch: Batch, noise: NoiseStreams) -> Tensor:
            batch, noise = self.drawn(batch, noise)
            z = prior.latent(given(batch), noise, shape)
            end = self.end(batch, prior, given, z, noise)
            made = prior.generate(given(batch), noise, shape, z)
            return (in_units(prior, made) - end).square().flatten(1).mean(1)

        return [self.phase("ode_pair", generator.parameters(), loss, lr=self.lr)]

    def drawn(self, batch: Batch, noise: NoiseStreams) -> tuple[Batch, NoiseStreams]:
        """Replace indices, classes and noise of a batch by those of the kept pairs."""
        if self.pairs is None:
            return batch, noise
        index = batch.index % self.pairs
        condition = Condition(labels=index % self.classes) if self.classes else None
        return batch._replace(index=index, condition=condition), NoiseStreams(0, index, "ode pairs")

    def end(self, batch: Batch, prior: ImplicitPrior, given: Given, z: Tensor, noise: NoiseStreams) -> Tensor:
        """Return the solution from z (B, C, H, W), kept or integrated, in units of variance preserving processes."""
        if self.pairs is None:
            return in_units(prior, self.integrate(given(batch), prior, z, noise))
        index = batch.index.cpu()  # waits for the device
        if self._made[index].all():
            return self._ends[index].to(z)
        end = in_units(prior, self.integrate(given(batch), prior, z, noise))
        self._ends[index], self._made[index] = end.to(self._ends), True
        return self._ends[index].to(z)  # rounded the first time too, so that a resumed run uses the same values

    @torch.no_grad()
    def integrate(self, denoiser: Denoiser, prior: ImplicitPrior, z: Tensor, noise: NoiseStreams) -> Tensor:
        """Integrate from noise z (B, C, H, W) at ``ratio_init`` to the level of the states; returns x / alpha."""
        solver = self.solver.ending_at(prior.ratio_made)
        init, end = (torch.full((len(z),), ratio, dtype=torch.float64, device=z.device)
                     for ratio in (prior.ratio_init, prior.ratio_made))  # fmt: skip
        x_t, t = denoiser.process.from_ratio(prior.ratio_init * z, init)
        x_s = solver(denoiser, x_t, t, noise, self.steps)
        return x_s / expand(denoiser.process.alpha(denoiser.process.time(end)), x_s)


@OBJECTIVES.register("distribution_matching")
class DistributionMatching(Objective):
    """Move the generator's states along the difference between the scores of the data and of the states.

        y_r = y + s n,    r^2 = ratio_made^2 + s^2,    dL/dy = (D_made(y_r; r) - D(y_r; r)) / mean |y - D(y_r; r)|

    D is the teacher. D_made is initialised as its copy and learns, in a separate phase, the distribution of the
    generator's states, y_r + r^2 score. The scales s are log-uniform. The gradient is 0 where both distributions agree
    at all scales.

    Args:
        scale_min: Minimum of s, as a factor on the ratio of the states. Far below 1, the target of D_made, whose
            variance is (r / s)^2, is noisy.
        scale_max: Maximum of s, in units of the data.
        fake_lr: Learning rate of D_made, as a factor on the run's.
        lr: See :class:`Objective`.
        since: See :class:`Objective`.
        until: See :class:`Objective`.

    Raises:
        UsageError: A scale is not positive.

    References:
        One-step Diffusion with Distribution Matching Distillation (Yin et al., 2024), https://arxiv.org/abs/2311.18828
    """

    fake: NetworkDenoiser

    def __init__(
        self,
        scale_min: float = 1.0,
        scale_max: float = 10.0,
        fake_lr: float = 1.0,
        lr: float = 1.0,
        since: int = 0,
        until: int | None = None,
    ) -> None:
        super().__init__(lr, since, until)
        if not (scale_min > 0 and scale_max > 0):
            raise UsageError("objective 'distribution_matching': scale_min and scale_max must be positive")
        self.scale_min, self.scale_max, self.fake_lr = scale_min, scale_max, fake_lr

    @override
    def attach(self, denoiser: Denoiser, prior: ImplicitPrior, shape: tuple[int, int, int]) -> None:
        if not isinstance(denoiser, NetworkDenoiser):
            raise UsageError("objective 'distribution_matching' copies the denoiser's network, but this denoiser is "
                             "exact: remove the objective")  # fmt: skip
        if not self.scale_min * prior.ratio_made < self.scale_max:
            raise UsageError("objective 'distribution_matching': scale_max must be above scale_min times ratio_star")
        self.fake = denoiser.copy().requires_grad_(True)
        denoiser.check_range(torch.tensor([math.hypot(prior.ratio_made, self.scale_max)]))

    @override
    def phases(self, prior: ImplicitPrior, given: Given, shape: tuple[int, ...]) -> list[Phase]:
        generator = prior.generator
        assert generator is not None

        def fake_loss(batch: Batch, noise: NoiseStreams) -> Tensor:
            with torch.no_grad():
                y = prior.generate(given(batch), noise, shape)
            return self.fake_loss(y, prior, given(batch).condition, noise)

        def loss(batch: Batch, noise: NoiseStreams) -> Tensor:
            y = prior.generate(given(batch), noise, shape)
            with torch.no_grad():
                gradient = self.gradient(y, prior, given(batch), noise)
            return (gradient * y).flatten(1).mean(1)

        return [
            self.phase("fake_denoiser", self.fake.network.parameters(), fake_loss, lr=self.fake_lr),
            self.phase("matching", generator.parameters(), loss, lr=self.lr),
        ]

    def diffuse(self, y: Tensor, prior: ImplicitPrior, noise: NoiseStreams) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Add noise s n to states and return y_r (B, C, H, W), r (B,), s (B,) and n (B, C, H, W)."""
        low, high = math.log(self.scale_min * prior.ratio_made), math.log(self.scale_max)
        s = (low + (high - low) * noise.uniform().to(y.device)).exp()
        n = noise.normal(y)
        return y + expand(s, y) * n, (s.square() + prior.ratio_made**2).sqrt(), s, n

    def fake_loss(self, y: Tensor, prior: ImplicitPrior, condition: Condition | None, noise: NoiseStreams) -> Tensor:
        """Compute the denoising score matching loss of generated states, (B,), for unit variance of the target."""
        y_r, r, s, n = self.diffuse(y, prior, noise)
        x_r, t = self.fake.process.from_ratio(y_r, r)
        eps = expand(r / s, y) * n  # -r score, the noise that corresponds to level r
        target = self.fake.target(y_r - expand(r, y) * eps, eps, t)
        error = self.fake.output(x_r, t, condition) - target
        return (s / r).square().to(error) * error.square().flatten(1).mean(1)

    def gradient(self, y: Tensor, prior: ImplicitPrior, denoiser: Denoiser, noise: NoiseStreams) -> Tensor:
        """Compute the direction in which generated states become more likely than real states, (B, C, H, W)."""
        y_r, r, _, _ = self.diffuse(y, prior, noise)
        x_r, t = denoiser.process.from_ratio(y_r, r)
        real, made = denoiser(x_r, t).x_0, self.fake(x_r, t, denoiser.condition).x_0
        scale = (y - real).abs().flatten(1).mean(1)
        return (made - real) / expand(scale, y)
