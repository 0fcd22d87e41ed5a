"""Table of points on the terminal."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from diffaccel.report.files import frechet_key
from diffaccel.report.floor import floor_lines
from diffaccel.report.judges import common_judges, seen_by
from diffaccel.report.points import Point, further_metrics, normalised
from diffaccel.report.repetition import columns, room, warnings_of
from diffaccel.text.terminal import WIDTH, number, print_lines, wide_console

NEIGHBOURHOODS = ("recall", "coverage")
"""Optional metrics in additional columns."""


FILES = "points.jsonl, curve.png, curve.csv, config.yaml and sample grids"
"""Output files of a bench."""


def print_points(points: Sequence[Point], name: str, out: Path, files: str = FILES) -> None:
    """Print a row for each point, the scores of real images, and the output folder; one table for each judge.

    Args:
        points: Points with the same extractor and reference.
        name: Key of the Frechet distance by the first judge.
        out: Output folder.
        files: Names of the files in it.
    """
    if not points:
        return
    _print_table([normalised(point) for point in points], name)
    for judge in common_judges(points)[1:]:
        seen = [normalised(seen_by(point, judge)) for point in points]
        print_lines(f"judge {judge}:")
        _print_table(seen, frechet_key(seen))
    print_lines(f"{files} are in {out}")


def _print_table(points: Sequence[Point], name: str) -> None:
    """Print a row for each normalised point, and the scores of real images."""
    n, last = points[-1]["n"], points[-1]["metrics"]
    likelihood = ("bits_per_dim", "bits_per_dim_se")
    standard = (name, f"{name}_se", f"{name}_inf", "kid", "kid_se", *NEIGHBOURHOODS, *columns(points), *likelihood)
    shown = [key for key in standard if key in last] + further_metrics(points, name)
    size = "" if n is None else f"@{number(n, 12)}"
    heads = {name: f"{name}{size}", "bits_per_dim": "bits/dim"}
    heads |= dict.fromkeys((f"{name}_se", "kid_se", "bits_per_dim_se"), "se")
    table = Table(box=None, header_style="bold")
    for head in ("budget", "nfe", "burn-in", *(heads.get(key, key) for key in shown), "s/image"):
        table.add_column(head, justify="right", no_wrap=True)
    for point in points:
        table.add_row(
            *(number(point[key]) for key in ("nfe_budget", "nfe", "nfe_burn_in")),
            *(number(point["metrics"].get(key)) for key in shown),
            number(point["seconds_per_image"], 3),
        )
    wide_console(WIDTH + room(columns(points))).print(table)
    if any((point["nfe"] or math.inf) < (point["nfe_budget"] or 0) - 1e-9 for point in points):
        print_lines("a budget that can't be met exactly was rounded down")
    floor = floor_lines(points, name, ("kid", *NEIGHBOURHOODS, "near_repeats"))
    print_lines(*warnings_of(points), *_decoding(points), *floor)


def _decoding(points: Sequence[Point]) -> list[str]:
    """Return a line on the cost of decoding latents, which is not in the table; none without latents."""
    found = [point for point in points if point.get("seconds_decoding") is not None]
    if not found:
        return []
    seconds = max(point["seconds_decoding"] for point in found)
    gflops = number(found[-1].get("gflops_decoding"), 3)
    return [f"decoding the latents takes {number(seconds, 3)} s and {gflops} GFLOP per image in addition"]
