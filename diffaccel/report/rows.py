"""Rows of a comparison: points with their differences to the points that they are compared with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffaccel.jackknife import Frechet, Resampled, resampled
from diffaccel.report.files import frechet_key
from diffaccel.report.points import UNKNOWN, Point

CLEAR = 2
"""Number of standard errors from which a judge counts as ordering a pair."""


@dataclass(frozen=True)
class Row:
    """Point with its difference to its pair, the first measured point of the first folder.

    Attributes:
        folder: Folder of the run.
        point: Normalised point as the shown judge sees it; unknown values are None.
        label: Label of the curve.
        grid: File of the sample grid; None if a later point of the same budget replaced it.
        difference: Distance minus that of the pair; None without a pair.
        others: The same by each other judge of both points.
    """

    folder: Path
    point: Point
    label: str
    grid: Path | None = None
    difference: Frechet | None = None
    others: Mapping[str, Frechet] = field(default_factory=dict)

    @property
    def opposed(self) -> list[str]:
        """Names of the judges that order the pair differently, each by more than two standard errors."""
        shown = self.difference
        if shown is None or not _clear(shown):
            return []
        return [name for name, other in self.others.items() if _clear(other) and (other.fd > 0) != (shown.fd > 0)]


def _clear(difference: Frechet) -> bool:
    return bool(abs(difference.fd) > CLEAR * difference.se)


def key_of(point: Point) -> tuple[Any, ...]:
    """Return what is equal for the points of a pair, besides extractor, reference and samples of a condition."""
    return point["nfe_budget"], point["n"], point["seed"], point["noise"]


def pair_of(point: Point) -> tuple[Any, ...] | None:
    """Return what is equal for the points of a pair, as one judge sees them; None for a point without any pair."""
    key = key_of(point)
    if None in key[1:] or point["noise"] == UNKNOWN:
        return None
    return (*key, *(point[kind]["sha256"] for kind in ("extractor", "reference")), samples_of(point))


def samples_of(point: Point) -> int:
    """Return the number of images in succession that share a condition; 1 for images without conditions."""
    condition = point["configuration"].get("condition")
    samples = condition.get("samples") if isinstance(condition, Mapping) else None
    return samples if isinstance(samples, int) else 1


def parts_of(point: Point) -> Resampled | None:
    """Return the distances of parts of a normalised point's images; None if the point does not contain them."""
    if point["extractor"]["name"] is None:
        return None
    return resampled(point["metrics"].get(frechet_key([point])), point.get("jackknife"))
