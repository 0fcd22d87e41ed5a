"""Points on disk, and what is drawn from them: tables, curves of quality against evaluations, pictures of samples."""

import csv
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange, repeat
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffaccel.errors import UsageError
from diffaccel.overrides import as_given

Point = Mapping[str, Any]

# Okabe and Ito's colours, which colour-blind readers can tell apart; its yellow is too faint for a line
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
COLUMNS = (
    *("method", "process", "prior", "solver", "nfe_budget", "nfe", "nfe_marginal", "nfe_burn_in", "nfe_sequential"),
    *("nfe_equivalent", "gflops_per_image", "seconds_per_image", "n", "seed"),
)
CELL = 64  # pixels that the longer side of a small image is magnified to, about


class Published(NamedTuple):
    """A figure from a paper, to be drawn faintly beside ours."""

    label: str
    nfe: float
    value: float


def append_point(path: str | Path, point: Point) -> None:
    """Append a point as one line of JSON and bring it to the disk before returning.

    Numbers that JSON does not have (NaN, infinity) become null. What a killed run has left of a line is removed first.

    Raises:
        TypeError: The point holds something that is no JSON, a tensor say.
    """
    path = Path(path)
    line = json.dumps(_finite(as_given(point)), allow_nan=False).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:  # the system appends one write as a whole, so two runs may share a file
        content = path.read_bytes()
        torn = _torn(content)
        file.truncate(len(content) - len(torn))
        lacks_newline = content and not torn and not content.endswith(b"\n")
        file.write(b"\n" + line if lacks_newline else line)
        file.flush()
        os.fsync(file.fileno())


def read_points(path: str | Path) -> list[dict[str, Any]]:
    """Read the points of a file, all but a last line that a killed run has not finished.

    Raises:
        UsageError: No such file, or a finished line that is no JSON object.
    """
    if not Path(path).is_file():
        raise UsageError(f"no points at {path}: measure some with `diffaccel bench`")
    content = Path(path).read_bytes()
    points = []
    for number, line in enumerate(content.removesuffix(_torn(content)).splitlines(), start=1):
        try:
            point = json.loads(line)
        except ValueError:
            point = None
        if not isinstance(point, dict):
            raise UsageError(f"{path}, line {number}, is no point: remove it")
        points.append(point)
    return points


def _torn(content: bytes) -> bytes:
    """Return the beginning of a line that the content ends with, if it does."""
    last = content[content.rfind(b"\n") + 1 :]
    try:
        json.loads(last)
    except ValueError:
        return last
    return b""  # whole: someone's editor has left out the newline


def _finite(value: Any) -> Any:
    """Replace numbers that JSON does not have by None, at any depth."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_curve_csv(points: Sequence[Point], path: str | Path) -> None:
    """Write a table with a row per point: how it was sampled, what that cost, and every metric."""
    metrics = sorted({name for point in points for name in point["metrics"]})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, "extractor", *metrics], extrasaction="ignore")
        writer.writeheader()
        for point in points:
            writer.writerow({**point, "extractor": point["extractor"]["name"], **point["metrics"]})


def frechet_key(points: Iterable[Point]) -> str:
    """Return the metric that all these points can be compared by: ``fid``, or ``fd_<extractor>``.

    Raises:
        UsageError: No points, or points scored by several extractors.
    """
    keys = {"fid" if point["extractor"]["name"] == "inception" else f"fd_{_extractor(point)}" for point in points}
    if len(keys) != 1:
        raise UsageError(f"one plot needs points of one extractor, these have {sorted(keys)}: select some")
    return keys.pop()


def _extractor(point: Point) -> str:
    return str(point["extractor"]["name"])


def plot_curve(
    points: Sequence[Point],
    path: str | Path,
    title: str,
    published: Sequence[Published] = (),
    floor: float | None = None,
) -> None:
    """Draw the Frechet distance against evaluations per image, a line per (method, solver, prior), logarithmic axes.

    Repeated measurements each have their marker and their error bar (one standard error); the line joins their means.

    Args:
        points: Scored by one extractor. Those without a finite distance are left out.
        path: The PNG to write; folders are made.
        title: Heading.
        published: Figures of papers, drawn faintly.
        floor: The distance of as many real images; by default the points' own metric ``<key>_floor``, if they have it.

    Raises:
        UsageError: No points, points of several extractors, or none that can be drawn.
    """
    key = frechet_key(points)
    drawn = [point for point in points if point["metrics"].get(key) is not None]
    if not drawn:
        raise UsageError(f"no point has the metric {key!r}: nothing to plot")
    sizes = sorted({point["n"] for point in drawn})
    figure = Figure(figsize=(7.2, 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    series = _series(drawn, len(sizes) > 1)
    for number, (label, members) in enumerate(series.items()):
        line = "-" if number < len(COLOURS) else ":"  # the colours begin anew
        style = {"color": COLOURS[number % len(COLOURS)], "linestyle": line}
        _draw_series(axes, members, key, label, MARKERS[number % len(MARKERS)], style)
    if floor is None:
        floor = next((point["metrics"][f"{key}_floor"] for point in drawn if f"{key}_floor" in point["metrics"]), None)
    if floor is not None:
        near = 10 * floor > min(point["metrics"][key] for point in drawn)  # one far below would squeeze all else
        said = f"real images ({floor:.3g}{'' if near else ', below'})"
        look: dict[str, Any] = {"color": "0.35", "linestyle": "--", "linewidth": 1, "label": said}
        if near:
            axes.axhline(floor, zorder=1, **look)
        else:
            axes.plot([], [], **look)
    _draw_published(axes, published)
    spent = [*(point["nfe"] for point in drawn), *(figure.nfe for figure in published)]
    _finish(axes, spent, [point.get("nfe_budget") or point["nfe"] for point in drawn])
    axes.set_xlabel("evaluations per image (NFE)")
    axes.set_ylabel(f"{key}@{sizes[0]}" if len(sizes) == 1 else key)
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def label_of(point: Point) -> str:
    """Name the curve that a point belongs to; settings searched for each budget are one, whatever their solvers."""
    parts = "tuned for each NFE" if point.get("tuned") else f"{point['solver']}, {point['prior']}"
    return f"{point['method']} ({parts})"


def _series(points: Sequence[Point], several_sizes: bool) -> dict[str, list[Point]]:
    """Group points into labelled lines, in the order of their first appearance."""
    series: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        label = label_of(point)
        series[f"{label} @{point['n']}" if several_sizes else label].append(point)
    return series


def _draw_series(
    axes: Axes, points: Sequence[Point], key: str, label: str, marker: str, style: Mapping[str, Any]
) -> None:
    colour = style["color"]
    at: dict[float, list[float]] = defaultdict(list)
    for point in points:
        at[point["nfe"]].append(point["metrics"][key])
        error = point["metrics"].get(f"{key}_se")
        if error is not None:
            axes.errorbar(point["nfe"], point["metrics"][key], error, color=colour, capsize=2.5, linewidth=1)
    nfes = sorted(at)
    axes.plot(nfes, [float(np.mean(at[nfe])) for nfe in nfes], **style, linewidth=1.5, zorder=2)
    every = sorted((nfe, value) for nfe, values in at.items() for value in values)
    axes.plot(*zip(*every, strict=True), marker, color=colour, markersize=5, markeredgecolor="white", zorder=3)
    axes.plot([], [], **style, marker=marker, linewidth=1.5, markersize=5, markeredgecolor="white", label=label)


def _draw_published(axes: Axes, published: Sequence[Published]) -> None:
    for figure in published:
        axes.plot(figure.nfe, figure.value, "x", color="0.6", markersize=5, zorder=1)
        axes.annotate(
            figure.label,
            xy=(figure.nfe, figure.value),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color="0.6",
        )


def _finish(axes: Axes, nfes: Sequence[float], ticks: Sequence[float]) -> None:
    """Logarithmic axes with plain numbers, wide enough for all ``nfes``."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(min(nfes) / 1.25, max(nfes) * 1.25)
    axes.set_xticks(_apart(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    low, high = axes.get_ylim()
    if high < 10 * low:  # less than a decade: a power of ten alone would leave the axis without numbers
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.tick_params(axis="y", which="minor", labelsize=8)
    elif high < 1000 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.grid(which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _apart(values: Iterable[float], ratio: float = 1.2) -> list[float]:
    """Leave out of the sorted values those too close to the one before to be labelled."""
    kept: list[float] = []
    for value in sorted(set(values)):
        if not kept or value >= ratio * kept[-1]:
            kept.append(value)
    return kept


def sample_grid(images: Tensor, path: str | Path, rows: int = 8) -> None:
    """Write images as one PNG, row by row; small ones are magnified pixel by pixel so that they can be looked at.

    Args:
        images: (N, C, H, W) uint8, C = 1 or 3.
        path: The PNG to write; folders are made.
        rows: Number of rows; cells left over stay white.
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
    """Draw points of the plane, over real ones if these are given.

    Args:
        points: (N, 2) or (N, 2, 1, 1), float.
        path: The PNG to write; folders are made.
        reference: Real points, of the same shape but for their number.
        title: Heading.
    """
    figure = Figure(figsize=(4.6, 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if reference is not None:
        x, y = reference.flatten(1).cpu().numpy().T
        axes.scatter(x, y, s=7, color="0.75", linewidths=0, label="real")
    x, y = points.flatten(1).cpu().numpy().T
    axes.scatter(x, y, s=7, color=COLOURS[0], alpha=0.5, linewidths=0, label="sampled")
    axes.set_aspect("equal", adjustable="datalim")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=11)
    if reference is not None:
        axes.legend(frameon=False, fontsize=8, markerscale=2)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
