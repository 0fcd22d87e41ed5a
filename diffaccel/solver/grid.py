"""Grids of noise levels, which decrease from the start level of each sample.

A grid returns times of shape (steps + 1, B) in float64. With ``denoise``, the last two rows are at ``ratio_min`` and
ratio 0. Without, the last row is at ``ratio_min``.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.deferred import check, to_device
from diffaccel.errors import UsageError
from diffaccel.parts.checks import positive
from diffaccel.parts.registry import Registry
from diffaccel.process import DiscreteVariancePreserving, Process

GRIDS: Registry["Grid"] = Registry("grid", builtins=["diffaccel.solver.grid"])


@GRIDS.base
@dataclass(frozen=True)
class Grid(ABC):
    """Grid of noise levels between the start and the data.

    Attributes:
        ratio_min: Last positive noise-to-data ratio, or half the ratio of the start if this is lower.
        ratio_cap: Upper bound on the ratio from which levels are spaced, for starts at a higher or infinite ratio (such
            as t = 1 on the decoupled process).

    Raises:
        UsageError: Not 0 < ratio_min < ratio_cap.
    """

    ratio_min: float = 0.002
    ratio_cap: float = 80.0

    @property
    def ends_at_ratio_min(self) -> bool:
        """Whether the last positive level is ``ratio_min``; a grid may ignore it."""
        return True

    @property
    def requires_denoise(self) -> bool:
        """Whether the last positive level is far from the data, so that a step to ratio 0 must follow."""
        return False

    def __post_init__(self) -> None:
        positive("grid", ratio_min=self.ratio_min)
        if not self.ratio_cap > self.ratio_min:
            raise UsageError(f"grid: ratio_cap is {self.ratio_cap}, it must be more than ratio_min, {self.ratio_min}")

    @abstractmethod
    def interpolate(self, process: Process, start: Tensor, stop: Tensor, fraction: Tensor) -> Tensor:
        """Interpolate between two noise levels.

        Args:
            process: Forward process.
            start: Noise-to-data ratios of the starts, (B,).
            stop: Noise-to-data ratios of the ends, (B,).
            fraction: Positions between start (0) and stop (1), (L, 1).

        Returns:
            Times, (L, B).
        """

    def __call__(self, process: Process, t: Tensor, steps: int, denoise: bool = True) -> Tensor:
        """Times of ``steps`` steps that start at times ``t`` (B,), (steps + 1, B) float64."""
        t = t.double()
        start = process.ratio(t)
        levels = steps - 1 if denoise else steps
        stop = torch.minimum(torch.full_like(start, self.ratio_min), 0.5 * start)
        fraction = torch.arange(1, levels + 1, dtype=t.dtype, device=t.device)[:, None] / max(levels, 1)
        rows = [t[None], self.interpolate(process, start, stop, fraction)]
        if denoise:
            rows.append(process.time(torch.zeros_like(start))[None])
        return torch.cat(rows)


@GRIDS.register("karras")
@dataclass(frozen=True)
class Karras(Grid):
    """Uniform in ratio^(1 / rho).

    Attributes:
        rho: Exponent; larger values put more levels near the data.

    Raises:
        UsageError: rho is outside [0.1, 1000].

    References:
        Elucidating the Design Space (Karras et al., 2022), https://arxiv.org/abs/2206.00364, Eq. 5
    """

    rho: float = 7.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.1 <= self.rho <= 1000:
            raise UsageError(f"grid 'karras': rho is {self.rho}, it must be between 0.1 and 1000")

    @override
    def interpolate(self, process: Process, start: Tensor, stop: Tensor, fraction: Tensor) -> Tensor:
        a, b = start.clamp_max(self.ratio_cap) ** (1 / self.rho), stop ** (1 / self.rho)
        return process.time((a + fraction * (b - a)) ** self.rho)


@GRIDS.register("log_snr")
@dataclass(frozen=True)
class LogSNR(Grid):
    """Uniform in ln(ratio): geometric levels."""

    @override
    def interpolate(self, process: Process, start: Tensor, stop: Tensor, fraction: Tensor) -> Tensor:
        start = start.clamp_max(self.ratio_cap)
        return process.time(start * (stop / start) ** fraction)


@GRIDS.register("listed")
@dataclass(frozen=True)
class Listed(LogSNR):
    """Listed levels, as fractions of the distance in ln(ratio), found by `diffaccel search` for a number of steps.

    The fractions are relative to both ends, so a list is valid for any start. They are interpolated linearly, so a list
    is valid for any number of steps.

    Attributes:
        fractions: Increasing numbers from 0, the start, to 1, ``ratio_min``.

    Raises:
        UsageError: The fractions don't increase from 0 to 1.
    """

    fractions: list[float] = field(default_factory=lambda: [0.0, 1.0])

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.fractions
        if len(given) < 2 or given[0] != 0 or given[-1] != 1 or any(a >= b for a, b in pairwise(given)):
            raise UsageError(f"grid 'listed': fractions is {given}, it must increase from 0 to 1")

    @override
    def interpolate(self, process: Process, start: Tensor, stop: Tensor, fraction: Tensor) -> Tensor:
        nodes = to_device(torch.tensor(self.fractions, dtype=fraction.dtype), fraction.device)
        position = fraction * (len(nodes) - 1)
        below = position.floor().clamp_max(len(nodes) - 2).long()
        fraction = torch.lerp(nodes[below], nodes[below + 1], position - below)
        return super().interpolate(process, start, stop, fraction)


@GRIDS.register("time")
@dataclass(frozen=True)
class UniformTime(Grid):
    """Uniform in the time of the process. ``ratio_cap`` is ignored, because time is finite at infinite ratio."""

    @override
    def interpolate(self, process: Process, start: Tensor, stop: Tensor, fraction: Tensor) -> Tensor:
        a, b = process.time(start), process.time(stop)
        return a + fraction * (b - a)


def _check_last(name: str, last: Tensor, stop: Tensor) -> None:
    """Check that the last level is not at a negative time.

    Args:
        name: Name of the grid.
        last: Times of the last levels, (B,).
        stop: Noise-to-data ratios of the last levels, (B,).

    Raises:
        UsageError: A time is negative.
    """
    check(
        last >= 0,
        lambda: UsageError(
            f"grid '{name}': the last level, ratio {stop[last < 0].min().item():.4g}, is at a negative time on this "
            "process: raise ratio_min, or use the grid 'karras', 'log_snr' or 'time'"
        ),
    )


@GRIDS.register("quadratic")
@dataclass(frozen=True)
class Quadratic(Grid):
    """Uniform in the square root of the time of the process: DDIM's quadratic sub-sequence, between this grid's ends.

    ``ratio_cap`` is ignored, because time is finite at infinite ratio. On EDM's process, where time is the ratio, the
    grid equals :class:`Karras` with rho = 2.

    Raises:
        UsageError: ``ratio_min`` is at a negative time, as low levels of geometric VE are.

    References:
        Denoising Diffusion Implicit Models (Song et al., 2021), https://arxiv.org/abs/2010.02502, appendix D.2
    """

    @override
    def interpolate(self, process: Process, start: Tensor, stop: Tensor, fraction: Tensor) -> Tensor:
        a, b = process.time(start), process.time(stop)
        _check_last("quadratic", b, stop)
        return (a.sqrt() + fraction * (b.sqrt() - a.sqrt())).square()


@GRIDS.register("ddm")
@dataclass(frozen=True)
class TimeToZero(Grid):
    """Equal steps in time to 0, the last of which stops at ``ratio_min``: the grid of DDM's reference code.

    The reference's n steps to a smallest time of 1e-4, followed by a final evaluation, are n + 1 steps here, on the
    decoupled process. Without that evaluation they are n steps, the last one from 1 / n to 0. The grid of n levels in
    the later code is ``time``.

    Attributes:
        final_evaluation: Whether there is a level at ``ratio_min``; otherwise ``ratio_min`` is ignored.

    Raises:
        UsageError: The steps are shorter than the time of ``ratio_min``, so that the last step would increase time, or
            this time is negative, as at low levels of geometric VE.

    References:
        Decoupled Diffusion Models (Huang et al., 2023), https://arxiv.org/abs/2306.13720
    """

    ratio_min: float = 1e-2 / (1 - 1e-4)  # t = 1e-4 on the decoupled process
    final_evaluation: bool = True

    @property
    @override
    def ends_at_ratio_min(self) -> bool:
        return self.final_evaluation

    @property
    @override
    def requires_denoise(self) -> bool:
        return not self.final_evaluation

    @override
    def interpolate(self, process: Process, start: Tensor, stop: Tensor, fraction: Tensor) -> Tensor:
        if not self.final_evaluation:
            return process.time(start) * (1 - fraction * (len(fraction) / (len(fraction) + 1)))
        last, levels = process.time(stop), process.time(start) * (1 - fraction)
        _check_last("ddm", last, stop)
        check(
            levels[:-1] > last,
            lambda: UsageError(
                f"grid 'ddm': {len(levels)} equal steps in time pass ratio_min {self.ratio_min:.4g} before the last:"
                " use fewer steps, a lower ratio_min, or the grid 'time'"
            ),
        )
        return torch.maximum(levels, last)


@GRIDS.register("index")
@dataclass(frozen=True)
class Indices(Grid):
    """Rounded indices of a discrete process, evenly spaced from the start to 0: DDIM's linear sub-sequence.

    The start is always included: 5 steps from index 99 are evaluated at 99, 74, 50, 25 and 0. ``ratio_min`` and
    ``ratio_cap`` are ignored.

    Raises:
        UsageError: The process has no indices, or fewer indices than steps.
    """

    @property
    @override
    def ends_at_ratio_min(self) -> bool:
        return False

    @override
    def interpolate(self, process: Process, start: Tensor, stop: Tensor, fraction: Tensor) -> Tensor:
        if not isinstance(process, DiscreteVariancePreserving):
            raise UsageError("grid 'index' needs process=vp_discrete: use this process, or another grid")
        top = process.time(start).round()
        check(
            top >= len(fraction),
            lambda: UsageError(
                f"grid 'index': more than {int(top.min()) + 1} steps from index {int(top.min())}: lower nfe, or use "
                "another grid"
            ),
        )
        return (top * (1 - fraction)).round()
