"""Points side by side: a table, the curves, and differences under common noise, as a terminal prints and a page shows.

Two points are a pair if their budget, number of images, seed, reference and extractor are equal: then image i of both
came from the same noise, and the difference of their distances is known better than either.
"""

import base64
import csv
import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from diffaccel.config import load
from diffaccel.errors import UsageError
from diffaccel.evaluator.logs import budget_name
from diffaccel.evaluator.scores import blocks_of
from diffaccel.metrics import Frechet, Moments, paired_difference
from diffaccel.reference import read_reference
from diffaccel.report import Point, frechet_key, label_of, plot_curve, read_points
from diffaccel.terminal import number

WRITTEN = ("compare.csv", "table.md", "curve.png", "index.html")
SHOWN = ("kid", "precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class Row:
    """A point, where it lies, and how it differs from its pair, the first measured of the first folder.

    Attributes:
        folder: Of the run.
        point: As in ``points.jsonl``.
        grid: Its picture of samples; None if a later point of the same budget has drawn over it.
        difference: Distance less that of the pair; None without one.
    """

    folder: Path
    point: Point
    grid: Path | None = None
    difference: Frechet | None = None

    @property
    def label(self) -> str:
        """What the rows of one curve have in common."""
        return label_of(self.point)


def compare(sources: Sequence[str]) -> list[Row]:
    """Read points and pair those of each source with the first one's.

    Args:
        sources: Folders of runs, or their points.jsonl.

    Returns:
        The rows, by source, curve (as measured) and budget; of points measured again, the last.

    Raises:
        UsageError: Fewer than one source, no points, points of several extractors or references, or files of a run
            that are damaged.
    """
    if not sources:
        raise UsageError("compare what? Give folders of runs: diffaccel compare runs/digits/edm runs/digits/dlg")
    folders = dict.fromkeys(Path(source).parent if source.endswith(".jsonl") else Path(source) for source in sources)
    rows = [row for folder in folders for row in _rows(folder)]
    _check(rows)
    first: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row.folder == rows[0].folder:
            first.setdefault(_pair(row.point), row)
    moments: dict[Path, Moments] = {}
    return [_paired(row, first.get(_pair(row.point)), moments) for row in rows]


def _rows(folder: Path) -> list[Row]:
    points = read_points(folder / "points.jsonl")
    if not points:
        raise UsageError(f"no points at {folder / 'points.jsonl'}: measure some with `diffaccel bench`")
    latest = {point.get("key") or id(point): point for point in points}
    grids = {folder / f"samples_nfe{budget_name(point)}.png": point for point in points}  # the last to draw there
    drawn = {id(point): path for path, point in grids.items() if path.is_file()}
    rows = [Row(folder, point, drawn.get(id(point))) for point in latest.values()]
    curves = list(dict.fromkeys(row.label for row in rows))
    return sorted(rows, key=lambda row: (curves.index(row.label), row.point["nfe"]))


def _check(rows: Iterable[Row]) -> None:
    """Refuse to put distances beside each other that mean different things."""
    kinds = {
        (row.point["extractor"]["name"], row.point["extractor"]["sha256"], row.point["reference"]["sha256"]): row
        for row in rows
    }
    if len(kinds) > 1:
        said = "; ".join(f"{row.folder}: {kind[0]}, reference {kind[2][:8]}" for kind, row in kinds.items())
        raise UsageError(f"these points were not scored alike, so they don't compare ({said}): bench them alike")


def _pair(point: Point) -> tuple[Any, ...]:
    return point["nfe_budget"], point["n"], point["seed"]


def _paired(row: Row, first: Row | None, moments: dict[Path, Moments]) -> Row:
    if first is None or first is row:
        return row
    files = [one.folder / "features" / f"{one.point.get('key')}.npy" for one in (row, first)]
    if not all(file.is_file() for file in files):
        return row
    own, others = map(_features, files)
    if own.shape != others.shape or len(own) < row.point["n"]:  # features of the first images alone are kept
        return row
    if row.folder not in moments:
        moments[row.folder] = _reference(row)
    # Images of one chain belong to one block, be it a chain of the one or of the other; gcd(c, 0) is c.
    chains = math.gcd(row.point["chains"] or 0, first.point["chains"] or 0)
    block = blocks_of(torch.arange(len(own)), chains or None)
    return replace(row, difference=paired_difference(own, others, block, moments[row.folder]))


def _features(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, EOFError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({error!r:.80}): remove it, or bench with again=true") from None


def _reference(row: Row) -> Moments:
    """The statistics that a run was scored with.

    Raises:
        UsageError: They are not what they were.
    """
    config = row.folder / "config.yaml"
    path = load(str(config)).reference
    if path is None:
        raise UsageError(f"{config} names no reference, so it is not the one of this run's points: bench it again")
    reference = read_reference(path)
    if reference.sha256 != row.point["reference"]["sha256"]:
        raise UsageError(f"{path} is not the reference that {row.folder} was scored with: bench it again")
    return reference.moments


def check_out(out: Path) -> None:
    """Refuse a folder whose files aren't those of an earlier comparison.

    Raises:
        UsageError: So it is, as in the folder of a run, whose curve would be replaced.
    """
    found = [name for name in WRITTEN if (out / name).exists()]
    if found and "compare.csv" not in found:
        raise UsageError(f"{out / found[0]} is not of a comparison and would be replaced: choose another out=")


def write(rows: Sequence[Row], out: Path) -> None:
    """Write compare.csv, table.md, curve.png and index.html, which holds everything and needs no other file.

    Raises:
        UsageError: The folder can't be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"out={out} can't be written to ({error.strerror}): choose another out=") from None
    points = [row.point for row in rows]
    heads, lines = table(rows)
    with (out / "compare.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([heads, *lines])
    (out / "table.md").write_text(markdown(rows), encoding="utf-8")
    title = f"{points[0]['data']}: {points[0]['reference']['name']}"
    plot_curve(points, out / "curve.png", title)
    (out / "index.html").write_text(_page(title, heads, lines, rows, out / "curve.png"), encoding="utf-8")


def markdown(rows: Sequence[Row]) -> str:
    """Lay distances out with a line per curve and a column per budget: value, standard error, nfe where it is less."""
    key = frechet_key([row.point for row in rows])
    budgets = sorted({row.point["nfe_budget"] for row in rows}, key=lambda budget: budget or math.inf)
    found: dict[str, dict[float | None, str]] = {}
    for row in rows:
        point, metrics = row.point, row.point["metrics"]
        spent = "" if point["nfe"] == point["nfe_budget"] else f" ({point['nfe']:.4g})"
        value = f"{number(metrics[key], 3)} +- {number(metrics.get(f'{key}_se'), 2)}{spent}"
        found.setdefault(row.label, {})[point["nfe_budget"]] = value
    heads = [key, *("adaptive" if budget is None else f"NFE {budget:g}" for budget in budgets)]
    lines = [heads, ["---"] * len(heads)]
    lines += [[label, *(values.get(budget, "") for budget in budgets)] for label, values in found.items()]
    if (floor := rows[-1].point["metrics"].get(f"{key}_floor")) is not None:
        lines.append([f"{rows[-1].point['floor']['n']} held-out real images", *[number(floor, 2)] * len(budgets)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return column heads and a line of text per row."""
    key = frechet_key([row.point for row in rows])
    shown = [name for name in SHOWN if any(row.point["metrics"].get(name) is not None for row in rows)]
    heads = ["run", "budget", "nfe", "n", "seed", key, "se", f"{key}_inf", *shown, "difference", "its se", "s/image"]
    lines = []
    for row in rows:
        point, metrics, difference = row.point, row.point["metrics"], row.difference
        lines.append(
            [
                row.label,
                *(number(point[name]) for name in ("nfe_budget", "nfe")),
                *(str(point[name]) for name in ("n", "seed")),
                *(number(metrics.get(name)) for name in (key, f"{key}_se", f"{key}_inf", *shown)),
                f"{float(difference.fd):+.3g}" if difference else "-",
                number(float(difference.se), 2) if difference else "-",
                number(point["seconds_per_image"], 3),
            ]
        )
    return heads, lines


def show(rows: Sequence[Row]) -> None:
    """Print the table, and the floor below it."""
    heads, lines = table(rows)
    left_out = [heads.index(head) for head in ("n", "seed", "precision", "density", "s/image") if head in heads]
    found = Table(box=None, header_style="bold")
    for column, head in enumerate(heads):
        if column not in left_out:  # they stand in compare.csv
            found.add_column(head, justify="right" if column else "left", no_wrap=True)
    for line in lines:
        found.add_row(*(text for column, text in enumerate(line) if column not in left_out))
    wide = Console()
    wide.width = max(wide.width, 130)  # a pipe has 80 columns, which cut the names
    wide.print(found)
    print(_floor(rows))


def _floor(rows: Sequence[Row]) -> str:
    point = rows[-1].point
    key = frechet_key([point])
    pair = f"the first row of {rows[0].folder} at the same budget, n and seed"
    said = f"difference: {key} less that of {pair} (jackknife over both at once)"
    if point["metrics"].get(f"{key}_floor") is None:
        return said
    real = [f"{name} {number(point['metrics'].get(f'{name}_real'))}" for name in SHOWN[1:]]
    floor = f"{point['floor']['n']} held-out real images are at {key} {number(point['metrics'][f'{key}_floor'])}"
    return f"{said}\nfloor: {floor}, {', '.join(real)}"


def _page(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]], rows: Sequence[Row], curve: Path) -> str:
    def image(path: Path) -> str:
        content = base64.b64encode(path.read_bytes()).decode()
        return f'<img alt="{html.escape(path.name)}" src="data:image/png;base64,{content}">'

    def cells(kind: str, texts: Iterable[str]) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(text)}</{kind}>" for text in texts) + "</tr>"

    grids = []
    for row in rows:
        if row.grid is not None:
            caption = f"{row.label}, NFE {row.point['nfe']:.4g}"
            grids.append(f"<figure>{image(row.grid)}<figcaption>{html.escape(caption)}</figcaption></figure>")
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }}
th, td {{ padding: .2rem .6rem; text-align: right; white-space: nowrap }} th {{ border-bottom: 1px solid #999 }}
th:first-child, td:first-child {{ text-align: left }} tr:nth-child(even) td {{ background: #f5f5f5 }}
img {{ max-width: 100% }} figure {{ display: inline-block; margin: 0 1rem 1rem 0; max-width: 20rem }}
</style>
<h1>{html.escape(title)}</h1>
{image(curve)}
<table>{cells("th", heads)}{"".join(cells("td", line) for line in lines)}</table>
<p>{"<br>".join(html.escape(line) for line in _floor(rows).splitlines())}</p>
{"".join(grids)}
</html>
"""
