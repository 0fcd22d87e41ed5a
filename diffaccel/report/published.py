"""Published results, for comparison with measured points.

``published.csv`` contains FID values with the network they were measured on and their source. FID depends on the number
of images, so that only points with at least as many images as is customary are comparable.
"""

import csv
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from diffaccel.report.points import Point

CUSTOMARY_N = 50_000
"""Number of generated images of published FID values."""
JUDGE = "inception"
"""Extractor of FID."""


class Published(NamedTuple):
    """A published result, drawn in grey for comparison."""

    label: str
    nfe: float
    value: float
    source: str = ""


@cache
def read_published() -> list[tuple[str, Published]]:
    """Return the names of the data and the published results."""
    text = files("diffaccel.report").joinpath("published.csv").read_text(encoding="utf-8")
    return [
        (
            _plain(row["data"]),
            Published(f"{row['method']}, {row['network']}", float(row["nfe"]), float(row["fid"]), row["source"]),
        )
        for row in csv.DictReader(text.splitlines())
    ]


def published_for(points: Sequence[Point]) -> list[Published]:
    """Return the published results that normalised points can be compared with.

    These are results on the data that the points' reference is named after, if the points are scored by Inception
    features (FID) of at least 50,000 images.
    """
    judged = {(point["extractor"]["name"], _plain(str(point["reference"]["name"]))) for point in points}
    if len(judged) != 1 or min(point["n"] or 0 for point in points) < CUSTOMARY_N:
        return []
    ((judge, data),) = judged
    return [figure for name, figure in read_published() if name == data] if judge == JUDGE else []


def _plain(name: str) -> str:
    """A name without case and punctuation: CIFAR-10 and cifar10 are the same data."""
    return "".join(c for c in name.lower() if c.isalnum())
