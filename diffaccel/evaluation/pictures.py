"""Plots of points. A failure is reported in one line and not raised, because the points are already on disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from diffaccel.report import plot_curve, read_points, title_of, write_curve_csv
from diffaccel.report.judges import seen_by
from diffaccel.report.logs import budget_name
from diffaccel.report.pictures import sample_grid, scatter
from diffaccel.report.points import Point, normalised
from diffaccel.storage import whole
from diffaccel.text.terminal import side_output


def draw_samples(shown: Tensor, images: bool, point: Point, out: Path) -> None:
    """Draw the first samples of a point.

    Args:
        shown: Samples, (N, C, H, W).
        images: Whether the samples are uint8 images, and not points in the plane.
        point: Point.
        out: Folder of ``samples_nfe<budget>.png``.
    """
    budget = budget_name(point)
    path = out / f"samples_nfe{budget}.png"
    with side_output(str(path)), whole(path) as part:
        if images:
            sample_grid(shown, part)
        else:
            scatter(shown.flatten(1), part, title=f"NFE {budget}")


def draw_curve(point: Point, out: Path) -> None:
    """Write ``curve.csv`` and ``curve.png`` of the points in a folder that are comparable with ``point``."""
    table, picture = out / "curve.csv", out / "curve.png"
    points = comparable(read_points(out / "points.jsonl"), point)
    with side_output(str(table)), whole(table) as part:
        write_curve_csv(points, part)
    with side_output(str(picture)), whole(picture) as part:
        plot_curve(points, part, title_of([point]))


def comparable(points: Sequence[dict[str, Any]], point: Point) -> list[dict[str, Any]]:
    """Return the points that are comparable with ``point``, as its first judge sees them.

    They have the same extractor and reference.
    """
    judge = str(point["extractor"]["name"])
    return [
        other
        for other in (seen_by(one, judge) for one in points)
        if all(
            normalised(other)[kind]["sha256"] in (point[kind]["sha256"], None) for kind in ("extractor", "reference")
        )
    ]
