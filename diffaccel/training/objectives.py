"""What a generator may learn from a frozen denoiser, beside its game against the critic: pairs, and gradients."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from diffaccel.data import Batch
from diffaccel.denoiser import Denoiser, NetworkDenoiser
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams
from diffaccel.parts.checks import at_least, positive
from diffaccel.parts.registry import Registry
from diffaccel.prior import ImplicitPrior
from diffaccel.process import expand
from diffaccel.solver import SOLVERS, Solver
from diffaccel.training.module import Phase

OBJECTIVES: Registry["Objective"] = Registry(
    "objective", builtins=["diffaccel.training.moment_matching", "diffaccel.training.objectives"]
)

Given = Callable[[Batch], Denoiser]
"""The frozen denoiser with a batch's labels bound."""


@OBJECTIVES.base
class Objective(nn.Module, ABC):
    """One or more phases of training that a frozen denoiser, the teacher, gives a generator.

    Args:
        lr: The generator's rate in these phases over the run's.
        since: Images seen from which they run,
        until: and before which they do; null for the end.
    """

    def __init__(self, lr: float, since: int, until: int | None) -> None:
        super().__init__()
        positive("objective", lr=lr)
        at_least(0, "objective", since=since)
        at_least(since + 1, "objective", until=until)
        self.lr, self.phase = lr, partial(Phase, since=since, until=math.inf if until is None else until)

    @abstractmethod
    def attach(self, denoiser: Denoiser, prior: ImplicitPrior, shape: tuple[int, int, int]) -> None:
        """Take from the teacher what the objective needs of its own, for images (C, H, W).

        Raises:
            UsageError: The objective can't be had from this teacher, or for this prior.
        """

    @abstractmethod
    def phases(self, prior: ImplicitPrior, given: Given, shape: tuple[int, ...]) -> list[Phase]:
        """What is trained."""


def in_units(prior: ImplicitPrior, y: Tensor) -> Tensor:
    """Bring states x / alpha at the level that a prior makes to variance preserving units, (B, C, H, W)."""
    return y / (1 + prior.ratio_made**2) ** 0.5


@OBJECTIVES.register("ode_pair")
class OdePair(Objective):
    """Regress the generator on where the probability-flow ODE takes the same noise.

    The denoiser's copy begins as one DDIM step from pure noise; this teaches it the many steps of a solver, on pairs
    made as training goes on. Squared error leaves detail blurred that the noise does not fix for a network of its size,
    so it is a warm-up for the critic and no substitute (pairs: Luhman and Luhman, 2021, arXiv 2101.02388).

    Args:
        solver: Integrates from ``ratio_init`` to the level that the prior makes; its grid's ``ratio_min`` and
            ``denoise`` are set here.
        steps: Its steps.
        pairs: Number of pairs, each integrated once and gone through again and again: the solver's steps cost more than
            the training. They are kept in memory in float16, and made anew when a run goes on. Null: all are fresh.
        lr: See :class:`Objective`.
        since: See :class:`Objective`.
        until: See :class:`Objective`.

    Raises:
        UsageError: No steps, or no pairs.
    """

    _ends: Tensor  # (pairs, C, H, W) on the CPU; untouched memory takes no room
    _made: Tensor  # (pairs,), which of them are there

    def __init__(
        self,
        solver: Annotated[dict[str, Any], SOLVERS] = {"name": "dpmpp2m"},  # noqa: B006 (read only; a mapping, for YAML)
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
                "objective 'ode_pair' follows the generator's noise from ratio_init down to ratio_star: set "
                "prior.generator=separate, a positive ratio_star, and ratio_init to twice that or more"
            )
        self.classes: int = getattr(denoiser.network, "classes", 0)
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
        """Put pairs that are kept in the places of a batch's images: their indices and classes, and their noise."""
        if self.pairs is None:
            return batch, noise
        index = batch.index % self.pairs
        condition = None if batch.condition is None else (index % max(1, self.classes)).to(batch.condition)
        return batch._replace(index=index, condition=condition), NoiseStreams(0, index, "ode pairs")

    def end(self, batch: Batch, prior: ImplicitPrior, given: Given, z: Tensor, noise: NoiseStreams) -> Tensor:
        """Where z (B, C, H, W) ends in units of variance preserving processes; integrated, unless that was kept."""
        index = batch.index.cpu()
        if self.pairs is not None and self._made[index].all():
            return self._ends[index].to(z)
        end = in_units(prior, self.integrate(given(batch), prior, z, noise))
        if self.pairs is None:
            return end
        self._ends[index], self._made[index] = end.to(self._ends), True
        return self._ends[index].to(z)  # rounded the first time too, so that a run that goes on sees the same

    @torch.no_grad()
    def integrate(self, denoiser: Denoiser, prior: ImplicitPrior, z: Tensor, noise: NoiseStreams) -> Tensor:
        """Follow noise z (B, C, H, W) from ``ratio_init`` to the states' level; returns x / alpha, (B, C, H, W)."""
        grid = dataclasses.replace(self.solver.grid, ratio_min=prior.ratio_made)
        solver = dataclasses.replace(self.solver, grid=grid, denoise=False)
        init, end = (torch.full((len(z),), ratio, dtype=torch.float64, device=z.device)
                     for ratio in (prior.ratio_init, prior.ratio_made))  # fmt: skip
        x_t, t = denoiser.process.from_ratio(prior.ratio_init * z, init)
        x_s = solver(denoiser, x_t, t, noise, self.steps)
        return x_s / expand(denoiser.process.alpha(denoiser.process.time(end)), x_s)


@OBJECTIVES.register("distribution_matching")
class DistributionMatching(Objective):
    """Move the generator's states along the difference of two scores: the data's, and their own.

        y_r = y + s n,    r^2 = ratio_made^2 + s^2,    dL/dy = (D_made(y_r; r) - D(y_r; r)) / mean |y - D(y_r; r)|

    D is the teacher, D_made one that begins as its copy and learns, in a phase of its own, the law of the generator's
    states: y_r + r^2 score. The scales s are log-uniform; the gradient is 0 where both laws agree at all of them.

    Args:
        scale_min: Least s over the states' ratio. Far below 1 the target of D_made, whose variance is (r / s)^2, gets
            noisy.
        scale_max: Largest s, in units of the data.
        fake_lr: Rate of D_made over the run's.
        lr: See :class:`Objective`.
        since: See :class:`Objective`.
        until: See :class:`Objective`.

    Raises:
        UsageError: Scales that are not positive.

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
            raise UsageError("objective 'distribution_matching' learns the generator's law with a copy of the denoiser"
                             "'s network, and this denoiser is exact: remove it")  # fmt: skip
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
        """Add noise s n to states: y_r (B, C, H, W), r (B,), s (B,), n."""
        low, high = math.log(self.scale_min * prior.ratio_made), math.log(self.scale_max)
        s = (low + (high - low) * noise.uniform().to(y.device)).exp()
        n = noise.normal(y)
        return y + expand(s, y) * n, (s.square() + prior.ratio_made**2).sqrt(), s, n

    def fake_loss(self, y: Tensor, prior: ImplicitPrior, condition: Tensor | None, noise: NoiseStreams) -> Tensor:
        """Denoising score matching of generated states (B, C, H, W), weighted to unit variance of the target, (B,)."""
        y_r, r, s, n = self.diffuse(y, prior, noise)
        x_r, t = self.fake.process.from_ratio(y_r, r)
        eps = expand(r / s, y) * n  # -r score: what the noise of level r would have to be
        target = self.fake.target(y_r - expand(r, y) * eps, eps, t)
        error = self.fake.output(x_r, t, condition) - target
        return (s / r).square().to(error) * error.square().flatten(1).mean(1)

    def gradient(self, y: Tensor, prior: ImplicitPrior, denoiser: Denoiser, noise: NoiseStreams) -> Tensor:
        """Direction in which the states are more likely among generated than among real ones, (B, C, H, W)."""
        y_r, r, _, _ = self.diffuse(y, prior, noise)
        x_r, t = denoiser.process.from_ratio(y_r, r)
        real, made = denoiser(x_r, t).x_0, self.fake(x_r, t, denoiser.condition).x_0
        scale = (y - real).abs().flatten(1).mean(1)
        return (made - real) / expand(scale, y)
