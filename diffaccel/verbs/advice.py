"""Advice on the setting to use within a budget, and its text."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from diffaccel.report.points import Point
from diffaccel.report.rows import CLEAR, Row
from diffaccel.text.terminal import number

UNITS = {"nfe": "evaluations", "seconds": "s", "gflops": "GFLOP"}


@dataclass(frozen=True)
class Candidate:
    """Setting of a strategy at a budget, with its points for one or more seeds.

    Attributes:
        label: Label of the strategy.
        rows: Row of each seed.
        key: Key of the Frechet distance.
        cost: Cost per image, the highest of the seeds.
    """

    label: str
    rows: list[Row]
    key: str
    cost: float

    @property
    def point(self) -> Point:
        """Point of the first seed."""
        return self.rows[0].point

    @property
    def fd(self) -> float:
        """Mean distance."""
        return mean([row.point["metrics"][self.key] for row in self.rows])

    @property
    def se(self) -> float:
        """Standard error of the mean distance, from the errors within the seeds; NaN if unknown."""
        own = [row.point["metrics"].get(f"{self.key}_se") for row in self.rows]
        return math.nan if None in own else math.sqrt(sum(value**2 for value in own)) / len(own)

    def metric(self, name: str) -> float | None:
        """Return the mean of a metric; None if a point lacks it."""
        own = [row.point["metrics"].get(name) for row in self.rows]
        return None if None in own else mean(own)


@dataclass(frozen=True)
class Difference:
    """Distance of another candidate minus that of the best.

    Attributes:
        other: Other candidate.
        fd: Difference.
        se: Standard error; NaN if unknown.
        paired: Whether the images come from the same noise.
        judges: The same by other judges, paired only: judge -> difference and standard error.
    """

    other: Candidate
    fd: float
    se: float
    paired: bool
    judges: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def z(self) -> float:
        """Difference in standard errors; NaN if unknown."""
        return self.fd / self.se if self.se else math.nan

    @property
    def clear(self) -> bool:
        """Whether the best is better by more than two standard errors."""
        return self.z > CLEAR

    def __str__(self) -> str:
        """Describe the difference with its error."""
        kind = "paired by common noise" if self.paired else "independent errors"
        error = "without an error" if math.isnan(self.se) else f"± {number(self.se, 2)} (z = {self.z:.1f}, {kind})"
        return f"{number(self.fd, 3)} {error}"


@dataclass(frozen=True)
class Advice:
    """Best setting within a budget.

    Attributes:
        kind: ``nfe``, ``seconds`` or ``gflops``.
        budget: Budget per image.
        judge: Judge whose distance is minimised.
        best: Best candidate.
        others: Differences of the best candidates of the other strategies, closest first.
        more: Candidate at the lowest cost above the budget that is better by more than two standard errors.
        command: Command that repeats the best setting; None for images from elsewhere.
        warnings: What limits the advice.
    """

    kind: str
    budget: float
    judge: str
    best: Candidate
    others: list[Difference]
    more: Difference | None
    command: str | None
    warnings: list[str]

    @property
    def ties(self) -> list[Difference]:
        """Strategies that are not worse by more than two standard errors."""
        return [other for other in self.others if not other.clear]

    def lines(self) -> Iterator[str]:
        """Describe the advice in lines of text."""
        best, point = self.best, self.best.point
        seeds = f", mean of {len(best.rows)} seeds" if len(best.rows) > 1 else ""
        yield (
            f"best within {self.budget:g} {UNITS[self.kind]} per image by {self.judge} (n={point['n']}{seeds}): "
            f"{best.label}, {_value(best)} {_costs(point)}"
        )
        if not self.others:
            yield "no other strategy was measured within the budget"
        for other in self.ties:
            yield f"tie: {other.other.label}, {_value(other.other)} {_costs(other.other.point)}: difference {other}"
        if clear := [other for other in self.others if other.clear]:
            yield f"better than {clear[0].other.label} by {clear[0]}"
            if further := clear[1:]:
                named = f"{len(further)} further strategies" if len(further) > 1 else further[0].other.label
                yield f"and than {named} by more than {CLEAR} standard errors"
        yield "repeat: " + (self.command or "no command is known, because the images were made elsewhere")
        if self.more is None:
            yield "no measured point with a larger budget is better by more than two standard errors"
        else:
            more = self.more.other
            yield f"for more: {more.label}, {_value(more)} {_costs(more.point)}: lower by {_negated(self.more)}"
        for warning in self.warnings:
            yield f"warning: {warning}"


def average(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean of values, and its standard error."""
    return mean([value for value, _ in pairs]), math.sqrt(sum(se**2 for _, se in pairs)) / len(pairs)


def mean(values: Sequence[float]) -> float:
    """Return the mean of values."""
    return sum(values) / len(values)


# Text


def _value(candidate: Candidate) -> str:
    error = "" if math.isnan(candidate.se) else f" ± {number(candidate.se, 2)}"
    return f"{candidate.key} {number(candidate.fd)}{error}"


def _costs(point: Point) -> str:
    parts = [f"at {number(point['nfe'])} evaluations"]
    if point["seconds_per_image"]:
        parts.append(f"{number(point['seconds_per_image'], 3)} s")
    if point["gflops_per_image"]:
        parts.append(f"{number(point['gflops_per_image'], 3)} GFLOP")
    return f"({', '.join(parts)} per image)"


def _negated(difference: Difference) -> Difference:
    return Difference(difference.other, -difference.fd, difference.se, difference.paired)
