"""Plots of quality against NFE, and pictures of samples."""

import textwrap
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffaccel.errors import UsageError
from diffaccel.report.curves import places_of
from diffaccel.report.files import frechet_key
from diffaccel.report.points import Point, distance, normalised
from diffaccel.text.escape import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette for colour-blind readers, without its yellow, which is too light for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

MAX_LEGEND_INSIDE = 8
"""Maximum number of curves with the legend inside the axes."""

CELL = 64  # approximate size in pixels that the longer side of a small image is magnified to


class Published(NamedTuple):
    """A published result, drawn in grey for comparison."""

    label: str
    nfe: float
    value: float


def title_of(points: Sequence[Point]) -> str:
    """Title with the names of data and reference, as far as the first point has them."""
    first = normalised(points[0])
    return ": ".join(name for name in (first["data"], first["reference"]["name"]) if name)


def plot_curve(
    points: Sequence[Point],
    path: str | Path,
    title: str,
    published: Sequence[Published] = (),
    floor: float | None = None,
    labels: Sequence[str] | None = None,
) -> None:
    """Plot the Frechet distance against NFE per image on logarithmic axes, with a line per curve.

    Each seed of a budget has a marker and an error bar (± one standard error); the line connects the means over seeds.
    If a measurement is repeated, the last one is plotted.

    Args:
        points: Points with the same extractor. Points without a positive distance or NFE are skipped.
        path: PNG file to write; missing folders are created.
        title: Title of the plot.
        published: Published results to draw in grey.
        floor: Distance of the same number of real images; None for the metric ``<key>_floor`` of the points.
        labels: Label of each point's curve; None for labels from the settings in which the curves differ.

    Raises:
        UsageError: No points, points of several extractors, or no point that can be plotted.
    """
    from matplotlib.figure import Figure  # imported here, because only drawing requires it

    key = frechet_key(points)
    series = _series([normalised(point) for point in points], key, labels)
    drawn = [point for members in series.values() for point in members]
    if not drawn:
        raise UsageError(f"no point has the metric {key!r}: nothing to plot")
    sizes = sorted({point["n"] for point in drawn if point["n"] is not None})
    many = len(series) > MAX_LEGEND_INSIDE
    figure = Figure(figsize=(11, max(4.6, 0.22 * len(series))) if many else (7.2, 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for number, (label, members) in enumerate(series.items()):
        line = "-" if number < len(COLOURS) else ":"  # colours repeat
        style = {"color": COLOURS[number % len(COLOURS)], "linestyle": line}
        _draw_series(axes, members, key, f"{label}{_seeds(members)}", MARKERS[number % len(MARKERS)], style)
    _draw_floor(axes, floor, drawn, key)
    _draw_published(axes, published)
    spent = [*(point["nfe"] for point in drawn), *(figure.nfe for figure in published)]
    _finish(axes, spent, [point["nfe_budget"] or point["nfe"] for point in drawn])
    axes.set_xlabel("evaluations per image (NFE)")
    axes.set_ylabel(f"{key}@{sizes[0]}" if len(sizes) == 1 else key, parse_math=False)
    axes.set_title(_wrapped(title), loc="left", fontsize=11, parse_math=False)
    _legend(axes, figure if many else axes)
    _save(figure, path)


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


def _seeds(members: Sequence[Point]) -> str:
    """Suffix of a curve's label with the number of seeds, or an empty string for one seed."""
    counts = {len(group) for group in _by_budget(members).values()}
    if counts == {1}:
        return ""
    return f", {max(counts)} seeds" if len(counts) == 1 else f", {min(counts)} to {max(counts)} seeds"


def _by_budget(members: Iterable[Point]) -> dict[float | None, list[Point]]:
    found: dict[float | None, list[Point]] = defaultdict(list)
    for point in members:
        found[point["nfe_budget"]].append(point)
    return found


def _draw_series(
    axes: "Axes", points: Sequence[Point], key: str, label: str, marker: str, style: Mapping[str, Any]
) -> None:
    colour = style["color"]
    for point in points:
        error = point["metrics"].get(f"{key}_se")
        if error is not None and error >= 0:
            axes.errorbar(point["nfe"], point["metrics"][key], error, color=colour, capsize=2.5, linewidth=1)
    pairs = [[(point["nfe"], point["metrics"][key]) for point in group] for group in _by_budget(points).values()]
    means = sorted(tuple(np.mean(group, axis=0).tolist()) for group in pairs)
    axes.plot(*zip(*means, strict=True), **style, linewidth=1.5, zorder=2)
    every = sorted(pair for group in pairs for pair in group)
    axes.plot(*zip(*every, strict=True), marker, color=colour, markersize=5, markeredgecolor="white", zorder=3)
    axes.plot([], [], **style, marker=marker, linewidth=1.5, markersize=5, markeredgecolor="white", gid=label)


def _draw_floor(axes: "Axes", floor: float | None, drawn: Sequence[Point], key: str) -> None:
    """Draw the distance of real images as a line, or only in the legend if the line would be far below the points."""
    if floor is None:
        floor = next((value for point in drawn if (value := point["metrics"].get(f"{key}_floor")) is not None), None)
    if floor is None:
        return
    near = 10 * floor > min(point["metrics"][key] for point in drawn)
    label = f"real images ({floor:.3g}{'' if near else ', below'})"
    style: dict[str, Any] = {"color": "0.35", "linestyle": "--", "linewidth": 1, "gid": label}
    if near:
        axes.axhline(floor, zorder=1, **style)
    else:
        axes.plot([], [], **style)


def _legend(axes: "Axes", where: "Axes | Figure") -> None:
    """Draw the legend with ``gid`` as the labels of lines, because matplotlib ignores labels that begin with ``_``."""
    place: dict[str, Any] = {"loc": "outside right upper"} if where is not axes else {}
    lines = [line for line in axes.lines if line.get_gid()]
    legend = where.legend(lines, [str(number) for number in range(len(lines))], frameon=False, fontsize=8, **place)
    for text, line in zip(legend.get_texts(), lines, strict=True):
        text.set_parse_math(False)  # show dollar signs
        text.set_text(_wrapped(str(line.get_gid())))


def _wrapped(text: str) -> str:
    """Text for a plot, without control characters, wrapped to at most three lines."""
    lines = textwrap.wrap(printable(text), 70)
    return "\n".join(lines[:3]) + (" ..." if len(lines) > 3 else "")


def _save(figure: "Figure", path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # drawn as boxes
        figure.savefig(path)


def _draw_published(axes: "Axes", published: Sequence[Published]) -> None:
    for figure in published:
        axes.plot(figure.nfe, figure.value, "x", color="0.6", markersize=5, zorder=1)
        axes.annotate(
            _wrapped(figure.label),
            parse_math=False,
            xy=(figure.nfe, figure.value),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color="0.6",
        )


def _finish(axes: "Axes", nfes: Sequence[float], ticks: Sequence[float]) -> None:
    """Set up logarithmic axes with plain numbers.

    Args:
        axes: "Axes" of the plot.
        nfes: All NFE that the axes must include.
        ticks: Positions of ticks on the NFE axis.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(min(nfes) / 1.25, max(nfes) * 1.25)
    axes.set_xticks(_spaced(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    low, high = axes.get_ylim()
    if high < 10 * low:  # less than a decade: there may be no power of ten to label
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        axes.tick_params(axis="y", which="minor", labelsize=8)
    elif high < 1000 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.grid(which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _spaced(values: Iterable[float], ratio: float = 1.2) -> list[float]:
    """Sort values, and drop values whose ratio to the previous one is too small for separate labels."""
    kept: list[float] = []
    for value in sorted(set(values)):
        if not kept or value >= ratio * kept[-1]:
            kept.append(value)
    return kept


def sample_grid(images: Tensor, path: str | Path, rows: int = 8) -> None:
    """Write a grid of images as one PNG, row by row; small images are magnified by an integer factor.

    Args:
        images: Images, (N, C, H, W) uint8, C = 1 or 3.
        path: PNG file to write; missing folders are created.
        rows: Number of rows; empty cells are white.
    """
    scale, gap = max(1, CELL // max(images.shape[-2:])), 2
    columns = -(-len(images) // rows)
    cells = repeat(images.cpu(), "n c h w -> n c (h y) (w x)", y=scale, x=scale)
    cells = F.pad(cells, (0, gap, 0, gap), value=255)
    cells = F.pad(cells, (0, 0) * 3 + (0, rows * columns - len(images)), value=255)
    grid = rearrange(cells, "(r k) c h w -> (r h) (k w) c", r=rows)
    picture = F.pad(grid, (0, 0, gap, 0, gap, 0), value=255).numpy()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(path)


def scatter(points: Tensor, path: str | Path, reference: Tensor | None = None, title: str = "") -> None:
    """Draw a scatter plot of points of the plane, optionally on top of real points.

    Args:
        points: Points, (N, 2) or (N, 2, 1, 1), float.
        path: PNG file to write; missing folders are created.
        reference: Real points, (M, 2) or (M, 2, 1, 1), float, or None.
        title: Title of the plot.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if reference is not None:
        x, y = reference.flatten(1).cpu().numpy().T
        axes.scatter(x, y, s=7, color="0.75", linewidths=0, label="real")
    x, y = points.flatten(1).cpu().numpy().T
    axes.scatter(x, y, s=7, color=COLOURS[0], alpha=0.5, linewidths=0, label="sampled")
    axes.set_aspect("equal", adjustable="datalim")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(_wrapped(title), loc="left", fontsize=11, parse_math=False)
    if reference is not None:
        axes.legend(frameon=False, fontsize=8, markerscale=2)
    _save(figure, path)
