"""Tables of a comparison: a row per point, and a row per curve with a column per budget."""

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from diffaccel.jackknife import Frechet
from diffaccel.report.axes import mean_error
from diffaccel.report.files import frechet_key
from diffaccel.report.floor import floor_lines, floor_of
from diffaccel.report.judges import common_judges
from diffaccel.report.points import Point, further_metrics
from diffaccel.report.repetition import columns, in_words, warnings_of
from diffaccel.report.rows import Row
from diffaccel.text.escape import markdown_cell
from diffaccel.text.terminal import number

REAL = ("kid", "precision", "recall", "density", "coverage", "near_repeats")
"""Metrics whose values for real images are shown."""
SHOWN = ("recall", "coverage"), ("kid", "kid_se", "precision", "density")
"""Metrics beside the distance, before and after those of repetition."""


def markdown(rows: Sequence[Row]) -> str:
    """Format a table of distances with a line per curve and a column per budget.

    A cell contains the distance, its standard error and, in parentheses, the NFE if it differs from the budget and, for
    chains, recall, effective number of images and fraction of near repeats. For several seeds, the cell contains the
    mean, the standard error from the spread of the seeds and, in parentheses, the standard error within seeds.
    """
    key = frechet_key([row.point for row in rows])
    budgets = sorted({row.point["nfe_budget"] for row in rows}, key=lambda budget: budget or math.inf)
    found: dict[str, dict[float | None, list[Point]]] = {}
    for row in rows:
        found.setdefault(row.label, defaultdict(list))[row.point["nfe_budget"]].append(row.point)
    adaptive = any(row.point["nfe"] for row in rows if row.point["nfe_budget"] is None)
    heads = [key, *(f"NFE {budget:g}" if budget else "adaptive" if adaptive else "no NFE" for budget in budgets)]
    lines = [[markdown_cell(head) for head in heads], ["---"] * len(heads)]
    for label, at in found.items():
        lines.append([markdown_cell(label), *(_cell(at[budget], key) if budget in at else "" for budget in budgets)])
    if floor := floor_of([row.point for row in rows], key):
        lines.append([floor.label, *[number(floor.value, 2)] * len(budgets)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(points: Sequence[Point], key: str) -> str:
    """Format the distance of a budget, see :func:`markdown`."""
    known = [point for point in points if point["metrics"].get(key) is not None]
    if not known:
        return "-"
    mean, error, within = mean_error(known, key)
    said = [f"{len(known)} seeds, within ± {number(within, 2)}"] if len(known) > 1 else []
    spent = [point["nfe"] for point in points if point["nfe"] is not None]
    if spent and (points[0]["nfe_budget"] is None or float(np.mean(spent)) != points[0]["nfe_budget"]):
        said.append(f"{np.mean(spent):.4g}")
    if chained := in_words(points):
        said.append(chained)
    return f"{number(mean, 4)} ± {number(error, 2)}" + (f" ({'; '.join(said)})" if said else "")


def metrics_of(points: Sequence[Point], key: str) -> list[str]:
    """Return the names of the metrics that stand beside the distance ``key`` of points, if any of them has it."""
    names = [*SHOWN[0], *columns(points), *SHOWN[1], *further_metrics(points, key)]
    return [name for name in dict.fromkeys(names) if any(point["metrics"].get(name) is not None for point in points)]


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return the column heads, and a list of texts per row."""
    key = frechet_key([row.point for row in rows])
    shown = metrics_of([row.point for row in rows], key)
    heads = ["run", "budget", "nfe", "n", "seed", key, "se", f"{key}_inf", *shown, "difference", "its se", "s/image"]
    lines = []
    for row in rows:
        point, metrics, difference = row.point, row.point["metrics"], row.difference
        lines.append(
            [
                row.label,
                *(number(point[name]) for name in ("nfe_budget", "nfe")),
                *(number(point[name], 12) for name in ("n", "seed")),
                *(number(metrics.get(name)) for name in (key, f"{key}_se", f"{key}_inf", *shown)),
                f"{float(difference.fd):+.3g}" if difference else "-",
                number(float(difference.se), 2) if difference else "-",
                number(point["seconds_per_image"], 3),
            ]
        )
    return heads, lines


def notes(rows: Sequence[Row]) -> list[str]:
    """Return lines on the differences, on the judges, and with the scores of real images."""
    points = [row.point for row in rows]
    key = frechet_key(points)
    pair = f"the first row of {rows[0].folder} at the same budget, n and seed"
    said = f"difference: {key} minus that of {pair} (paired jackknife)"
    lines = [said, *_opposed(rows), *warnings_of(points, [row.label for row in rows]), *_unequal_neighbourhoods(points)]
    return [*lines, *floor_lines(points, key, REAL)]


def _unequal_neighbourhoods(points: Sequence[Point]) -> list[str]:
    """A line if recall and the like are of different numbers of images, on which their values depend."""
    counts = sorted({count for point in points if isinstance(count := point.get("neighbourhoods"), int)})
    if len(counts) < 2:
        return []
    several = ", ".join(f"{count:,}" for count in counts[:-1])
    return [
        f"precision, recall, density and coverage are of {several} or {counts[-1]:,} images: they depend on this "
        "number, which is the point's key neighbourhoods, and compare only if it is equal"
    ]


def _opposed(rows: Sequence[Row]) -> list[str]:
    """Lines with the judge that is shown, if there are others, and the pairs that others order differently."""
    shown, common = rows[0].point["extractor"]["name"], common_judges([row.point for row in rows])
    others = [name for name in common if name != shown]
    lines = [f"judge: {shown}; also scored by {', '.join(others)} (judge=NAME)"] if others else []
    for row in rows:
        for name in row.opposed:
            own, other = row.difference, row.others[name]
            assert own is not None
            lines.append(
                f"judges disagree on {row.label} at budget {number(row.point['nfe_budget'])}: "
                f"{_signed(own)} by {shown}, {_signed(other)} by {name}"
            )
    return lines


def _signed(difference: Frechet) -> str:
    return f"{float(difference.fd):+.3g} ± {number(float(difference.se), 2)}"
