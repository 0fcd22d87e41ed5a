"""Warnings about points whose images repeat one another, which a Frechet distance does not show."""

from collections.abc import Sequence

from diffaccel.report.points import Point
from diffaccel.text.terminal import number

LEAST_EFFECTIVE = 0.25
"""Least effective number of images, relative to their number, without a warning: below it, standard errors are more
than twice those of as many independent images."""
MOST_REPEATS = 0.1
"""Largest fraction of near repeats without a warning: ten times that of real images."""
NAMES = ("effective_n", "near_repeats")


def columns(points: Sequence[Point]) -> list[str]:
    """Names of the metrics of repetition that a table of points should have: none without chains."""
    if not any(point["chains"] for point in points):
        return []
    return [name for name in NAMES if any(point["metrics"].get(name) is not None for point in points)]


def room(names: Sequence[str]) -> int:
    """Number of characters of columns in a table."""
    return sum(2 + len(name) for name in names)


def in_words(points: Sequence[Point]) -> str:
    """Describe recall and repetition of the chains of a cell of a table, as means over seeds; empty without chains."""
    if not points or not all(point["chains"] for point in points):
        return ""
    means = {
        key: sum(values) / len(values)
        for key in ("recall", "effective_n", "near_repeats")
        if (values := [value for point in points if (value := point["metrics"].get(key)) is not None])
    }
    return ", ".join(f"{key} {number(value, 3)}" for key, value in means.items())


def warnings_of(points: Sequence[Point], labels: Sequence[str] | None = None) -> list[str]:
    """Return a line for each point of chains below :data:`LEAST_EFFECTIVE` or above :data:`MOST_REPEATS`.

    Args:
        points: Normalised points.
        labels: Curve of each point, if there are several.
    """
    lines = []
    for index, point in enumerate(points):
        n, metrics, chains = point["n"], point["metrics"], point["chains"]
        if not chains or not n:
            continue
        effective, repeats = metrics.get("effective_n"), metrics.get("near_repeats")
        found = []
        if effective is not None and effective < LEAST_EFFECTIVE * n:
            found.append(f"its {number(n, 12)} images are worth {effective:.0f} independent ones")
        if repeats is not None and repeats > MOST_REPEATS:
            found.append(f"{100 * repeats:.0f} % of them are as close to another one as 1 % of real images are")
        if found:
            curve = f"{labels[index]} at " if labels else ""
            lines.append(
                f"warning: {curve}budget {number(point['nfe_budget'])}, {number(chains, 12)} chains: "
                f"{', and '.join(found)}; the distance hardly shows it: compare recall, or lower prior.images_per_chain"
            )
    return lines
