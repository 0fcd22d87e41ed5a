"""What the terminal shows of points."""

import math
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from diffaccel.report import Point

NEIGHBOURHOODS = ("recall", "coverage")
"""Metrics that stand beside the distances, if they were computed."""


def number(value: float | None, digits: int = 4) -> str:
    """Round to significant digits; "-" for what is not known."""
    return "-" if value is None or value != value else f"{value:.{digits}g}"


def print_points(points: Sequence[Point], name: str, out: Path) -> None:
    """Print a row for each point, what real images score, and where the files are, last.

    Args:
        points: Of one extractor and reference.
        name: Metric key of the Frechet distance.
        out: Folder of the files.
    """
    if not points:
        return
    n, last = points[-1]["n"], points[-1]["metrics"]
    likelihood = ("bits_per_dim", "bits_per_dim_se")
    shown = [key for key in (name, f"{name}_se", f"{name}_inf", "kid", *NEIGHBOURHOODS, *likelihood) if key in last]
    heads = {name: f"{name}@{n}", f"{name}_se": "se", "bits_per_dim": "bits/dim", "bits_per_dim_se": "se"}
    table = Table(box=None, header_style="bold")
    for head in ("budget", "nfe", "burn-in", *(heads.get(key, key) for key in shown), "s/image"):
        table.add_column(head, justify="right", no_wrap=True)
    for point in points:
        table.add_row(
            *(number(point[key]) for key in ("nfe_budget", "nfe", "nfe_burn_in")),
            *(number(point["metrics"].get(key)) for key in shown),
            number(point["seconds_per_image"], 3),
        )
    wide = Console()
    wide.width = max(wide.width, 130)  # a pipe has 80 columns, which cut the names of metrics
    wide.print(table)
    if any(point["nfe"] < (point["nfe_budget"] or 0) - 1e-9 for point in points):
        print("a budget that can't be met exactly was rounded down")
    if f"{name}_floor" in last:
        beside = "".join(f", {key} {number(last[f'{key}_real'])}" for key in NEIGHBOURHOODS if f"{key}_real" in last)
        held_out = f"{points[-1]['floor']['n']} held-out real images"
        print(f"floor: {held_out} are at {name} {number(last[f'{name}_floor'])}{beside}")
    print(f"points.jsonl, curve.png, curve.csv, config.yaml and sample grids are in {out}")


def human(number: float, unit: str) -> str:
    """1234567, 'FLOP' -> '1.23 MFLOP'."""
    power = min(5, max(0, int(math.log10(max(number, 1)) // 3)))
    return f"{number / 1000**power:.3g} {'kMGTP'[power - 1] if power else ''}{unit}"


@rank_zero_only
def say(text: str) -> None:
    """Print a line on stderr, once a run: stdout holds results alone."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)
