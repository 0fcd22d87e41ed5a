"""Plots of quality against cost."""

import math
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diffaccel.errors import UsageError
from diffaccel.report.axes import COSTS, Cost, Mean, means, pareto, seeds_of
from diffaccel.report.curves import places_of
from diffaccel.report.files import frechet_key
from diffaccel.report.floor import Floor, floor_of
from diffaccel.report.points import Point, distance, normalised
from diffaccel.report.published import Published
from diffaccel.report.styles import BACKGROUND, Style, styles_of
from diffaccel.text.escape import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_DIRECT = 10
"""Maximum number of curves that are labelled at their ends; a legend outside the axes labels more."""
LABEL_HEIGHT = 0.052
"""Height of a label at the end of a curve, as a fraction of the axes."""


class Ink(NamedTuple):
    """Colours of everything but the curves, by brightness.

    Attributes:
        ground: Background.
        text: Text.
        faint: Published figures, front and frame.
        grid: Grid lines.
    """

    ground: str
    text: str
    faint: str
    grid: str


INKS = {
    False: Ink(BACKGROUND[False], "#1F2328", "#8A8F98", "#E6E8EB"),
    True: Ink(BACKGROUND[True], "#E6EDF3", "#8B949E", "#262C36"),
}


def title_of(points: Sequence[Point]) -> str:
    """Title with the names of data and reference, as far as the first point has them."""
    first = normalised(points[0])
    return ": ".join(dict.fromkeys(name for name in (first["data"], first["reference"]["name"]) if name))


def plot_curve(
    points: Sequence[Point],
    path: str | Path,
    title: str,
    published: Sequence[Published] = (),
    floor: float | None = None,
    labels: Sequence[str] | None = None,
    x: str = "nfe",
    dark: bool = False,
) -> None:
    """Plot the Frechet distance against the cost per image on logarithmic axes, with a line per curve.

    Each seed of a budget has a marker and an error bar (± one standard error); the line connects the means over seeds.
    If a measurement is repeated, the last one is plotted. A method has a colour, and a solver a line style and a
    marker. Few curves are labelled at their ends, more in a legend outside the axes.

    Args:
        points: Points with the same extractor. Points without a positive distance or cost are skipped.
        path: PNG file to write; missing folders are created.
        title: Title of the plot.
        published: Published results to draw in grey; only against NFE.
        floor: Distance of the same number of real images; None for that of the points.
        labels: Label of each point's curve; None for labels from the settings in which the curves differ.
        x: Cost on the horizontal axis, a key of :data:`~diffaccel.report.axes.COSTS`.
        dark: Whether the picture is for dark pages.

    Raises:
        UsageError: No points, points of several extractors, or no point that can be plotted.
    """
    from matplotlib.figure import Figure  # imported here, because only drawing requires it

    key, cost, ink = frechet_key(points), COSTS[x], INKS[dark]
    series = _series([normalised(point) for point in points], key, labels)
    lines = {label: found for label, members in series.items() if (found := means(members, key, cost))}
    drawn = [point for line in lines.values() for mean in line for point in mean.points]
    if not drawn:
        raise UsageError(f"no point has the metric {key!r} and {cost.key}: nothing to plot")
    many = len(lines) > MAX_DIRECT
    size = (11, max(4.8, 0.2 * len(lines) + 1)) if many else (8.4, 4.6)
    figure = Figure(figsize=size, dpi=150, layout="constrained", facecolor=ink.ground)
    axes = figure.add_subplot(facecolor=ink.ground)
    styles = styles_of({label: series[label] for label in lines})
    for label, line in lines.items():
        _draw_line(axes, line, key, cost, f"{label}{seeds_of(series[label])}", styles[label], dark)
    front = pareto((mean.x, mean.y) for line in lines.values() for mean in line)
    if len(lines) > 1 and len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=ink.faint, linewidth=7, alpha=0.22, zorder=1, gid="Pareto front",
                  solid_capstyle="round", solid_joinstyle="round")  # fmt: skip
    _draw_floor(axes, floor, drawn, key, ink)
    if x == "nfe":
        _draw_published(axes, published, ink)
    spent = [*(mean.x for line in lines.values() for mean in line), *(one.nfe for one in published if x == "nfe")]
    budgets = [point["nfe_budget"] for point in drawn if point["nfe_budget"]]
    ticks = (budgets or [point["nfe"] for point in drawn]) if x in ("nfe", "nfe_equivalent") else []
    _finish(axes, spent, ticks, ink)
    sizes = sorted({point["n"] for point in drawn if point["n"] is not None})
    axes.set_xlabel(cost.label)
    axes.set_ylabel(f"{key}@{sizes[0]}" if len(sizes) == 1 else key, parse_math=False)
    axes.set_title(_title(title), loc="left", fontsize=11, parse_math=False)
    _legend(axes, many, ink)
    save(figure, path)


def _title(title: str) -> str:
    return "\n".join(line for line in (wrapped(title), "lower is better, bars are ± one standard error") if line)


def _series(points: Sequence[Point], key: str, labels: Sequence[str] | None) -> dict[str, list[Point]]:
    """Group the points that can be plotted into curves, in the order of first appearance."""
    chosen = [number for number, point in enumerate(points) if distance(point, key) is not None]
    if labels is None:
        places = places_of([points[number] for number in chosen])
        chosen = [number for number, place in zip(chosen, places, strict=True) if not place.replaced]
        names = [place.label for place in places if not place.replaced]
    else:
        names = [labels[number] for number in chosen]
    series: dict[str, list[Point]] = defaultdict(list)
    for number, label in zip(chosen, names, strict=True):
        series[label].append(points[number])
    return series


def _draw_line(axes: "Axes", line: Sequence[Mean], key: str, cost: Cost, label: str, style: Style, dark: bool) -> None:
    colour = style.colour(dark)
    look: dict[str, Any] = {"color": colour, "linewidth": 1.6}
    if style.dashes:
        look["dashes"] = style.dashes
    marker: dict[str, Any] = {"markersize": 5.5, "markeredgecolor": BACKGROUND[dark], "markeredgewidth": 0.8}
    every = sorted((point[cost.key], point["metrics"][key]) for mean in line for point in mean.points)
    bars = [
        (point[cost.key], point["metrics"][key], error)
        for mean in line
        for point in mean.points
        if (error := point["metrics"].get(f"{key}_se")) is not None and error >= 0
    ]
    if bars:
        x, y, errors = zip(*bars, strict=True)
        axes.errorbar(x, y, errors, fmt="none", ecolor=colour, capsize=2, elinewidth=1)
    axes.plot([mean.x for mean in line], [mean.y for mean in line], zorder=2, **look)
    axes.plot(*zip(*every, strict=True), style.marker, color=colour, zorder=3, **marker)
    # For the legend, which shows line and marker in one; the end is where a direct label points to.
    (sample,) = axes.plot([], [], marker=style.marker, gid=label, **look, **marker)
    sample.end = (line[-1].x, line[-1].y)  # type: ignore[attr-defined]


def _draw_floor(axes: "Axes", floor: float | None, drawn: Sequence[Point], key: str, ink: Ink) -> None:
    """Draw the distance of real images as a line, or only in the legend if the line would be far below the points."""
    found = floor_of(drawn, key) if floor is None else Floor(floor)
    if found is None:
        return
    near = 10 * found.value > min(point["metrics"][key] for point in drawn)
    label = f"{found.label} ({found.value:.3g}{'' if near else ', below'})"
    style: dict[str, Any] = {"color": ink.faint, "linestyle": "--", "linewidth": 1, "gid": label}
    if near:
        axes.axhline(found.value, zorder=1, **style)
    else:
        axes.plot([], [], **style)


def _legend(axes: "Axes", many: bool, ink: Ink) -> None:
    """Label the curves: at their ends, or in a legend with ``gid`` as the labels of lines.

    A legend's own labels would be ignored by matplotlib if they begin with ``_``.
    """
    lines = [line for line in axes.lines if line.get_gid()]
    if not many:
        _label_ends(axes, [line for line in lines if hasattr(line, "end")])
        lines = [line for line in lines if not hasattr(line, "end")]
    if not lines:
        return
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.01), "borderaxespad": 0}
    legend = axes.legend(
        lines, [str(number) for number in range(len(lines))], frameon=False, fontsize=8, handlelength=3.2,
        **(place if many else {"loc": "best"}),
    )  # fmt: skip
    for text, line in zip(legend.get_texts(), lines, strict=True):
        text.set_parse_math(False)  # show dollar signs
        text.set_text(wrapped(str(line.get_gid())))
        text.set_color(ink.text)


def _label_ends(axes: "Axes", samples: Sequence[Any]) -> None:
    """Write the labels of curves to the right of the axes, in the order of their ends, with lines to them."""
    to_axes = axes.transAxes.inverted()
    ends = [to_axes.transform(axes.transData.transform(sample.end)) for sample in samples]
    texts = [wrapped(str(sample.get_gid()), 34) for sample in samples]
    heights = [LABEL_HEIGHT * (1 + 0.75 * text.count("\n")) for text in texts]
    places = _spread([float(end[1]) for end in ends], heights)
    for sample, end, text, y in zip(samples, ends, texts, places, strict=True):
        colour = sample.get_color()
        axes.plot([float(end[0]), 1.015, 1.04], [float(end[1]), y, y], transform=axes.transAxes, color=colour,
                  linewidth=0.6, alpha=0.6, clip_on=False, zorder=1)  # fmt: skip
        axes.plot([1.055], [y], sample.get_marker(), transform=axes.transAxes, color=colour, markersize=5,
                  clip_on=False)  # fmt: skip
        axes.text(1.075, y, text, transform=axes.transAxes, color=colour, fontsize=8.5, va="center", gid="label",
                  parse_math=False, linespacing=1.05)  # fmt: skip


def _spread(wanted: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Return positions in the order of the wanted ones without overlap, as close to them as a few passes make them.

    Args:
        wanted: Wanted centres.
        heights: Heights of the labels.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    found = [min(max(wanted[i], 0.0), 1.0) for i in order]
    for _ in range(200):
        for k in range(len(order) - 1):
            least = (heights[order[k]] + heights[order[k + 1]]) / 2
            lack = least - (found[k + 1] - found[k])
            if lack > 0:
                found[k] -= lack / 2
                found[k + 1] += lack / 2
    return [found[order.index(i)] for i in range(len(order))]


def wrapped(text: str, width: int = 70) -> str:
    """Text for a plot, without control characters, wrapped to at most three lines."""
    lines = textwrap.wrap(printable(text), width)
    return "\n".join(lines[:3]) + (" ..." if len(lines) > 3 else "")


def save(figure: "Figure", path: str | Path) -> None:
    """Save a figure, with boxes for characters that the font lacks; missing folders are created."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(path)


def _draw_published(axes: "Axes", published: Sequence[Published], ink: Ink) -> None:
    for figure in published:
        axes.plot(figure.nfe, figure.value, "x", color=ink.faint, markersize=4, zorder=1, alpha=0.7)
        axes.annotate(
            wrapped(figure.label, 40), xy=(figure.nfe, figure.value), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=6, color=ink.faint, parse_math=False,
        )  # fmt: skip


def _finish(axes: "Axes", spent: Sequence[float], ticks: Sequence[float], ink: Ink) -> None:
    """Set up logarithmic axes with plain numbers.

    Args:
        axes: Axes of the plot.
        spent: All costs that the axes must include.
        ticks: Positions of ticks on the horizontal axis; empty for round numbers.
        ink: Colours.
    """
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(min(spent) / 1.25, max(spent) * 1.25)
    axes.set_ylim(*axes.get_ylim())
    for axis, places in (
        (axes.xaxis, _spaced(ticks) or ticks_of(*axes.get_xlim())),
        (axes.yaxis, ticks_of(*axes.get_ylim())),
    ):
        axis.set_minor_locator(NullLocator())
        axis.set_ticks(places, [f"{place:.4g}" for place in places])
    axes.grid(which="major", color=ink.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(ink.faint)
    axes.tick_params(which="both", color=ink.faint, labelcolor=ink.text)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title, axes._left_title):  # type: ignore[attr-defined]
        text.set_color(ink.text)


def ticks_of(low: float, high: float) -> list[float]:
    """Return round numbers from ``low`` to ``high`` for a logarithmic axis."""
    if high > 3 * low:
        steps = (1, 2, 5) if high > 12 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [step * 10.0**power for power in powers for step in steps]
    else:
        raw = (high - low) / 6
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(step for step in (1, 2, 5, 10) if step * unit >= raw) * unit
        found = [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [tick for tick in found if low <= tick <= high]


def _spaced(values: Iterable[float], ratio: float = 1.2) -> list[float]:
    """Sort values, and drop values whose ratio to the previous one is too small for separate labels."""
    kept: list[float] = []
    for value in sorted(set(values)):
        if not kept or value >= ratio * kept[-1]:
            kept.append(value)
    return kept
