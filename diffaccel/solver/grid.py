"""Grids of noise levels, one column per sample, from its own start level down.

A grid gives times of shape (steps + 1, B) in float64. With ``denoise`` its last row is ratio 0, reached from
``ratio_min``; without, it ends at ``ratio_min``.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from diffaccel.errors import UsageError
from diffaccel.parts.checks import positive
from diffaccel.parts.registry import Registry
from diffaccel.process import DiscreteVariancePreserving, Process

GRIDS: Registry["Grid"] = Registry("grid", builtins=["diffaccel.solver.grid"])


@GRIDS.base
@dataclass(frozen=True)
class Grid(ABC):
    """Levels between a start and the data.

    Attributes:
        ratio_min: Last positive noise-to-data ratio; half the start's where that is lower.
        ratio_cap: Ratio that a start above it is spaced from (on the decoupled process t = 1 lies at infinity).

    Raises:
        UsageError: ``ratio_min`` is not positive, or ``ratio_cap`` not above it.
    """

    ratio_min: float = 0.002
    ratio_cap: float = 80.0

    def __post_init__(self) -> None:
        positive("grid", ratio_min=self.ratio_min)
        if not self.ratio_cap > self.ratio_min:
            raise UsageError(f"grid: ratio_cap is {self.ratio_cap}, it must be more than ratio_min, {self.ratio_min}")

    @abstractmethod
    def interpolate(self, process: Process, start: Tensor, stop: Tensor, fraction: Tensor) -> Tensor:
        """Times (L, B) at ``fraction`` (L, 1) of the way between ratios ``start`` and ``stop`` (B,)."""

    def __call__(self, process: Process, t: Tensor, steps: int, denoise: bool = True) -> Tensor:
        """Space ``steps`` steps from times ``t`` (B,); returns (steps + 1, B) float64."""
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
        UsageError: rho lies outside [0.1, 1000].

    References:
        Elucidating the Design Space (Karras et al., 2022), https://arxiv.org/abs/2206.00364, Eq. 5
    """

    rho: float = 7.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.1 <= self.rho <= 1000:
            raise UsageError(f"grid 'karras': rho is {self.rho}, it must lie between 0.1 and 1000")

    def interpolate(self, process: Process, start: Tensor, stop: Tensor, fraction: Tensor) -> Tensor:  # noqa: D102
        a, b = start.clamp_max(self.ratio_cap) ** (1 / self.rho), stop ** (1 / self.rho)
        return process.time((a + fraction * (b - a)) ** self.rho)


@GRIDS.register("log_snr")
@dataclass(frozen=True)
class LogSNR(Grid):
    """Uniform in ln(ratio): geometric levels."""

    def interpolate(self, process: Process, start: Tensor, stop: Tensor, fraction: Tensor) -> Tensor:  # noqa: D102
        start = start.clamp_max(self.ratio_cap)
        return process.time(start * (stop / start) ** fraction)


@GRIDS.register("listed")
@dataclass(frozen=True)
class Listed(LogSNR):
    """Levels at given fractions of the way in ln(ratio), as `diffaccel search` finds them for a number of steps.

    Relative to the ends, so that a list found from one start is valid from any; joined by straight lines, so that it
    is valid for any number of steps.

    Attributes:
        fractions: From 0, the start, up to 1, ``ratio_min``.

    Raises:
        UsageError: The fractions don't rise from 0 to 1.
    """

    fractions: list[float] = field(default_factory=lambda: [0.0, 1.0])

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.fractions
        if len(given) < 2 or given[0] != 0 or given[-1] != 1 or any(a >= b for a, b in pairwise(given)):
            raise UsageError(f"grid 'listed': fractions is {given}, it must rise from 0 to 1")

    def interpolate(self, process: Process, start: Tensor, stop: Tensor, fraction: Tensor) -> Tensor:  # noqa: D102
        nodes = torch.tensor(self.fractions, dtype=fraction.dtype, device=fraction.device)
        position = fraction * (len(nodes) - 1)
        below = position.floor().clamp_max(len(nodes) - 2).long()
        fraction = torch.lerp(nodes[below], nodes[below + 1], position - below)
        return super().interpolate(process, start, stop, fraction)


@GRIDS.register("time")
@dataclass(frozen=True)
class UniformTime(Grid):
    """Uniform in the process's own time, which is finite at any ratio: there is no cap."""

    def interpolate(self, process: Process, start: Tensor, stop: Tensor, fraction: Tensor) -> Tensor:  # noqa: D102
        a, b = process.time(start), process.time(stop)
        return a + fraction * (b - a)


@GRIDS.register("quadratic")
@dataclass(frozen=True)
class Quadratic(Grid):
    """Uniform in the square root of the process's own time, which is finite at any ratio: there is no cap.

    DDIM's quadratic sub-sequence, between this grid's ends. Where time is the ratio, as on EDM's process, it is
    Karras's of rho = 2.

    Raises:
        UsageError: ``ratio_min`` lies at a negative time, as low levels of geometric VE do.

    References:
        Denoising Diffusion Implicit Models (Song et al., 2021), https://arxiv.org/abs/2010.02502, appendix D.2
    """

    def interpolate(self, process: Process, start: Tensor, stop: Tensor, fraction: Tensor) -> Tensor:  # noqa: D102
        a, b = process.time(start), process.time(stop)
        if (b < 0).any():
            raise UsageError(
                f"grid 'quadratic': the last level, ratio {stop[b < 0].min().item():.4g}, lies at a negative time on"
                " this process: raise ratio_min, or take the grid 'karras', 'log_snr' or 'time'"
            )
        return (a.sqrt() + fraction * (b.sqrt() - a.sqrt())).square()


@GRIDS.register("ddm")
@dataclass(frozen=True)
class TimeToZero(Grid):
    """Equal steps in time to 0, the last of which stops at ``ratio_min``: the grid of DDM's reference code.

    Its n steps with the least time 1e-4 and a final evaluation are n + 1 here, on the decoupled process; without that
    evaluation they are n, and the last goes from 1 / n to 0. The later code's grid of n levels is ``time``.

    Attributes:
        final_evaluation: Whether there is a level ``ratio_min``; if not, that counts for nothing.

    Raises:
        UsageError: The steps are shorter than the time of ``ratio_min``, so that the last would go up.

    References:
        Decoupled Diffusion Models (Huang et al., 2023), https://arxiv.org/abs/2306.13720
    """

    ratio_min: float = 1e-2 / (1 - 1e-4)  # t = 1e-4 on the decoupled process
    final_evaluation: bool = True

    def interpolate(self, process: Process, start: Tensor, stop: Tensor, fraction: Tensor) -> Tensor:  # noqa: D102
        if not self.final_evaluation:
            return process.time(start) * (1 - fraction * (len(fraction) / (len(fraction) + 1)))
        last, levels = process.time(stop), process.time(start) * (1 - fraction)
        if (levels[:-1] <= last).any():
            raise UsageError(
                f"grid 'ddm': {len(levels)} equal steps in time pass ratio_min {self.ratio_min:.4g} before the last:"
                " take fewer steps, a lower ratio_min, or the grid 'time'"
            )
        return torch.maximum(levels, last)


@GRIDS.register("index")
@dataclass(frozen=True)
class Indices(Grid):
    """Indices of a discrete process, evenly spread from the start to 0 and rounded, as DDIM's linear sub-sequence.

    The start is always among them: 5 steps from index 99 are evaluated at 99, 74, 50, 25 and 0. ``ratio_min`` and
    ``ratio_cap`` have no part in it.

    Raises:
        UsageError: The process has no indices, or fewer than steps.
    """

    def interpolate(self, process: Process, start: Tensor, stop: Tensor, fraction: Tensor) -> Tensor:  # noqa: D102
        if not isinstance(process, DiscreteVariancePreserving):
            raise UsageError("grid 'index' needs the indices of process=vp_discrete: take it, or another grid")
        top = process.time(start).round()
        if (len(fraction) > top).any():
            raise UsageError(
                f"grid 'index': more than {int(top.min()) + 1} steps from index {int(top.min())}: lower nfe, or take "
                "another grid"
            )
        return (top * (1 - fraction)).round()
