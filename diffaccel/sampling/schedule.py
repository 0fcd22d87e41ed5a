"""Noise levels of a sampling setting, and the same spacing between other ends."""

import dataclasses
import math
from itertools import pairwise

import torch
from torch import Tensor

from diffaccel.errors import UsageError
from diffaccel.prior import Plan
from diffaccel.process import Process
from diffaccel.sampling.sampler import Sampler
from diffaccel.solver import Grid

TOLERANCE = 1e-6
"""Relative deviation of the ends of a list from those requested above which a grid does not have these ends."""


@dataclasses.dataclass(frozen=True)
class Ends:
    """Requested ends of a list of levels.

    Attributes:
        low: Last positive noise-to-data ratio; None for that of the setting.
        high: First noise-to-data ratio; None for that of the setting.
    """

    low: float | None = None
    high: float | None = None


def levels(sampler: Sampler, plan: Plan, ends: Ends | None = None) -> list[float]:
    """Return the noise-to-data ratios at which a setting evaluates the denoiser, and the last one, 0 with ``denoise``.

    Other ends keep the spacing in the grid's own coordinate: ratio^(1 / rho) for ``karras``, ln(ratio) for ``log_snr``
    and ``listed``, the time of the experiment's process for ``time`` and ``quadratic``. The distance of ``ratio_cap``
    below the start is kept in ln(ratio).

    Args:
        sampler: Sampler of the experiment.
        plan: Plan of the budget.
        ends: Other ends; None for those of the setting.

    Raises:
        UsageError: The setting has no common levels for all images (an adaptive solver, a prior with levels of its
            own), or the grid does not have these ends.
    """
    if plan.solver.adaptive:
        raise UsageError(
            f"{type(plan.solver).__name__} chooses its levels while sampling: a list requires another solver"
        )
    start = plan.prior.start_ratio(sampler.denoiser)
    grid, process = plan.solver.grid, sampler.denoiser.process
    if ends is None or ends == Ends():
        return _ratios(process, grid(process, process.time(_scalar(start)), plan.steps, plan.solver.denoise))
    return _mapped(process, plan, start, ends)


def _scalar(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def _ratios(process: Process, times: Tensor) -> list[float]:
    return [max(0.0, value) for value in process.ratio(times[:, 0]).tolist()]


def _mapped(process: Process, plan: Plan, start: float, ends: Ends) -> list[float]:
    """Levels between other ends.

    Raises:
        UsageError: The ends are invalid, or the grid does not have these ends.
    """
    grid: Grid = plan.solver.grid
    low = grid.ratio_min if ends.low is None else ends.low
    high = start if ends.high is None else ends.high
    if not 0 < low < high < math.inf:
        raise UsageError(f"sigma_min={low:g} and sigma_max={high:g}: set 0 < sigma_min < sigma_max")
    if not math.isfinite(start):
        raise UsageError("the setting starts at an infinite noise-to-data ratio, which has no place in another range")
    cap = high * grid.ratio_cap / start if start > grid.ratio_cap else max(high, grid.ratio_cap)
    name = type(grid).__name__
    if not low < cap:
        raise UsageError(f"the grid {name} spaces levels from ratio_cap on, which would be below sigma_min={low:g}")
    moved = dataclasses.replace(grid, ratio_min=low, ratio_cap=cap)
    found = _ratios(process, moved(process, process.time(_scalar(high)), plan.steps, plan.solver.denoise))
    positive = [ratio for ratio in found if ratio > 0]
    fits = all(math.isfinite(ratio) for ratio in found) and all(a > b for a, b in pairwise(found))
    wanted = [(found[0], high)] + ([(positive[-1], low)] if len(positive) > 1 else [])
    if not fits or any(abs(ratio / end - 1) > TOLERANCE for ratio, end in wanted):
        raise UsageError(
            f"the grid {name} has no levels from {high:g} to {low:g} on {type(process).__name__}: set other ends, or "
            "another solver.grid (karras, log_snr or listed)"
        )
    return found
