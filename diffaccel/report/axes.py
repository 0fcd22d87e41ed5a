"""Costs that curves are plotted against, means over seeds, and the Pareto front."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from diffaccel.report.points import Point
from diffaccel.text.terminal import number


class Cost(NamedTuple):
    """Cost of an image.

    Attributes:
        key: Key of the point.
        label: Label of the axis.
    """

    key: str
    label: str


COSTS: Mapping[str, Cost] = {
    "nfe": Cost("nfe", "evaluations per image (NFE)"),
    "seconds": Cost("seconds_per_image", "seconds per image"),
    "gflops": Cost("gflops_per_image", "GFLOPs per image"),
    "nfe_equivalent": Cost(
        "nfe_equivalent", "evaluations of the curve's own denoiser with the same FLOPs (nfe_equivalent)"
    ),
}
"""Costs by the name that ``x=`` takes."""

EQUAL = 1.01
"""Ratio of the FLOPs of two denoisers up to which they count as equal."""


class Mean(NamedTuple):
    """Mean over the seeds of a curve at one budget.

    Attributes:
        x: Mean cost per image.
        y: Mean distance.
        points: Points, one per seed.
    """

    x: float
    y: float
    points: list[Point]


def by_budget(points: Iterable[Point]) -> dict[float | None, list[Point]]:
    """Group points by their budgets."""
    found: dict[float | None, list[Point]] = defaultdict(list)
    for point in points:
        found[point["nfe_budget"]].append(point)
    return found


def means(points: Iterable[Point], key: str, cost: Cost) -> list[Mean]:
    """Average a curve's points over seeds, in the order of the cost.

    Args:
        points: Normalised points of one curve with a distance.
        key: Key of the Frechet distance.
        cost: Cost; points in which it is unknown are left out.
    """
    known = [point for point in points if (point[cost.key] or 0) > 0]
    found = [
        Mean(float(np.mean([point[cost.key] for point in group])), mean_error(group, key)[0], group)
        for group in by_budget(known).values()
    ]
    return sorted(found, key=lambda mean: mean.x)


def mean_error(points: Sequence[Point], key: str) -> tuple[float, float | None, float | None]:
    """Return the mean over seeds, its standard error, and the standard error within seeds.

    The standard error of several seeds is that of their spread; that of one seed is the jackknife's. An error is None
    if it is unknown.
    """
    values = [point["metrics"][key] for point in points]
    errors = [point["metrics"].get(f"{key}_se") for point in points]
    within = math.sqrt(sum(error**2 for error in errors)) / len(errors) if None not in errors else None
    if len(values) == 1:
        return values[0], within, within
    return float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values)), within


def seeds_of(points: Iterable[Point]) -> str:
    """Return ``, 3 seeds`` for a label, or an empty string for one seed."""
    counts = {len(group) for group in by_budget(points).values()}
    if counts == {1}:
        return ""
    return f", {max(counts)} seeds" if len(counts) == 1 else f", {min(counts)} to {max(counts)} seeds"


def pareto(pairs: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the pairs of cost and distance that no other pair improves upon in both, by increasing cost."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(pairs):
        if not found or y < found[-1][1]:
            found.append((x, y))
    return found


def unequal_denoisers(points: Iterable[Point]) -> list[str]:
    """Return a line if ``nfe_equivalent`` of normalised points refers to denoisers with different FLOPs; else none."""
    known = [point for point in points if point["nfe_equivalent"] and point["gflops_per_image"]]
    own = [point["gflops_per_image"] / point["nfe_equivalent"] for point in known]
    if not own or max(own) <= EQUAL * min(own):
        return []
    return [
        f"nfe_equivalent refers to the denoiser of each curve, which takes {number(min(own), 3)} to "
        f"{number(max(own), 3)} GFLOP per evaluation here: compare by gflops instead (x=gflops)"
    ]
