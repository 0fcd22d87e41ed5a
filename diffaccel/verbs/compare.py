"""``compare``: points of several runs in a table and a page, with curves and differences under common noise.

Two points are a pair if their budget, number of images, seed, noise, reference and extractor are equal. Image i of both
then comes from the same noise, so that the difference of the distances has a smaller error than each distance.
"""

import base64
import html
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from diffaccel.config import read
from diffaccel.errors import UsageError
from diffaccel.evaluation.scores import blocks_of
from diffaccel.metrics import Frechet, Moments, paired_difference
from diffaccel.metrics.reference import read_reference
from diffaccel.report import frechet_key, plot_curve, read_points, title_of, write_csv
from diffaccel.report.curves import places_of
from diffaccel.report.logs import budget_name
from diffaccel.report.points import Point, distance, further_metrics, normalised, undrawn
from diffaccel.text.escape import markdown_cell, printable
from diffaccel.text.terminal import number, print_lines, wide_console

WRITTEN = ("compare.csv", "table.md", "curve.png", "index.html")
SHOWN = ("kid", "precision", "recall", "density", "coverage")

Note = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """Point with its difference to its pair, the first measured point of the first folder.

    Attributes:
        folder: Folder of the run.
        point: Normalised point; unknown values are None.
        label: Label of the curve.
        grid: File of the sample grid; None if a later point of the same budget replaced it.
        difference: Distance minus that of the pair; None without a pair.
    """

    folder: Path
    point: Point
    label: str
    grid: Path | None = None
    difference: Frechet | None = None


def compare(sources: Sequence[str], reference: str | None = None, note: Note = lambda said: None) -> list[Row]:
    """Read points and pair those of each source with those of the first source.

    Args:
        sources: Folders of runs, or their points.jsonl. A folder without points.jsonl is skipped if there are others.
        reference: File of the points' reference, if the folders' config.yaml does not contain its path.
        note: Function called with a message about anything that is not shown.

    Returns:
        Rows in the order of source, curve and budget, without points that were measured again.

    Raises:
        UsageError: There are no sources or no points, the points have several extractors or references, or
            ``reference`` is not the reference of the points.
    """
    if not sources:
        raise UsageError("compare requires folders of runs: diffaccel compare runs/digits/edm runs/digits/dlg")
    folders = dict.fromkeys(Path(source).parent if source.endswith(".jsonl") else Path(source) for source in sources)
    lines = [(folder, point) for folder in _with_points(list(folders), note) for point in _points(folder)]
    _check(lines)
    for said in undrawn([point for _, point in lines], frechet_key([point for _, point in lines])):
        note(said)
    rows = _rows(lines, note)
    first: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row.folder == rows[0].folder:
            first.setdefault(_pair(row.point), row)
    return _Pairs(rows, reference, note).paired(first)


def _with_points(folders: Sequence[Path], note: Note) -> list[Path]:
    """Skip folders without points, which a pattern of the shell may include."""
    empty = [folder for folder in folders if folder.is_dir() and not (folder / "points.jsonl").is_file()]
    if not empty or len(empty) == len(folders):
        return list(folders)
    for folder in empty:
        below = sorted(str(path.parent) for path in folder.glob("*/points.jsonl"))
        some = f" ({', '.join(below[:2])}{' ...' if len(below) > 2 else ''} below it)" if below else ""
        note(f"{folder} is skipped: it has no points.jsonl{some}")
    return [folder for folder in folders if folder not in empty]


def _points(folder: Path) -> list[dict[str, Any]]:
    points = read_points(folder / "points.jsonl")
    if not points:
        raise UsageError(f"there are no points in {folder / 'points.jsonl'}: measure some with `diffaccel bench`")
    return [normalised(point) for point in points]


def _rows(lines: Sequence[tuple[Path, dict[str, Any]]], note: Note) -> list[Row]:
    places = places_of([point for _, point in lines], [str(folder) for folder, _ in lines])
    # The grid of a budget is that of the last point.
    drawn = {path: number for number, (folder, point) in enumerate(lines) if (path := _grid(folder, point))}
    grids = {number: path for path, number in drawn.items() if path.is_file()}
    rows = [
        Row(folder, point, place.label, grids.get(number))
        for number, ((folder, point), place) in enumerate(zip(lines, places, strict=True))
        if not place.replaced
    ]
    shown = {row.folder for row in rows}
    for folder in dict.fromkeys(folder for folder, _ in lines if folder not in shown):
        note(f"{folder} is skipped: an earlier folder contains the same points")
    folders = list(dict.fromkeys(row.folder for row in rows))
    curves = list(dict.fromkeys(row.label for row in rows))
    return sorted(
        rows, key=lambda row: (folders.index(row.folder), curves.index(row.label), row.point["nfe"] or math.inf)
    )


def _grid(folder: Path, point: Point) -> Path | None:
    return folder / f"samples_nfe{budget_name(point)}.png" if point["nfe"] else None


def _check(lines: Sequence[tuple[Path, Point]]) -> None:
    """Check that all points have the same extractor and reference; older points may lack them."""
    for kind, key in (("extractor", "name"), ("extractor", "sha256"), ("reference", "sha256")):
        found = {value: folder for folder, point in lines if (value := point[kind][key]) is not None}
        if len(found) > 1:
            said = "; ".join(
                f"{folder}: {kind} {value if key == 'name' else value[:8]}" for value, folder in found.items()
            )
            raise UsageError(
                f"the points were scored differently ({said}): bench them with the same extractor and reference"
            )


def _pair(point: Point) -> tuple[Any, ...]:
    return point["nfe_budget"], point["n"], point["seed"], point["noise"]


class _Pairs:
    """Pairing of rows under common noise.

    Args:
        rows: All rows, in whose folders the reference is looked up.
        reference: File of the reference; None to look it up.
        note: See :func:`compare`.
    """

    def __init__(self, rows: Sequence[Row], reference: str | None, note: Note) -> None:
        self.rows, self.file, self.note = rows, reference, note
        self.moments: Moments | None = None
        self.sought = False

    def paired(self, first: dict[tuple[Any, ...], Row]) -> list[Row]:
        """Return the rows with their differences to the rows in ``first``."""
        return [self._paired(row, first.get(_pair(row.point))) for row in self.rows]

    def _paired(self, row: Row, first: Row | None) -> Row:
        if first is None or first is row or None in _pair(row.point)[1:]:
            return row
        files = [one.folder / "features" / f"{one.point['key']}.npy" for one in (row, first)]
        if not all(one.point["key"] and one.point["key"].isalnum() for one in (row, first)):
            return row
        if not all(file.is_file() for file in files):
            return row
        moments = self._moments(row)
        if moments is None:
            return row
        try:
            own, others = map(_features, files)
        except UsageError as error:
            self.note(f"{error}; until then its differences are not shown")
            return row
        if own.shape != others.shape or len(own) < row.point["n"]:  # only the features of the first images are kept
            return row
        # Images of the same chain, in either row, must be in the same block; gcd(c, 0) is c.
        chains = math.gcd(row.point["chains"] or 0, first.point["chains"] or 0)
        block = blocks_of(torch.arange(len(own)), chains or None)
        return replace(row, difference=paired_difference(own, others, block, moments))

    def _moments(self, row: Row) -> Moments | None:
        """Moments of the reference; None, with a single message, if there is no reference."""
        if not self.sought:
            self.sought = True
            sha256, found = row.point["reference"]["sha256"], None
            if self.file is not None:
                self.moments = _reference(Path(self.file).expanduser(), sha256)
                return self.moments
            for folder in dict.fromkeys(one.folder for one in (row, *self.rows)):
                try:
                    self.moments = _reference(_named_reference(folder), sha256)
                    break
                except UsageError as error:
                    found = found or error
            if self.moments is None:
                self.note(f"differences are not shown: {found}; set reference= to the reference of the points")
        return self.moments


def _features(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, EOFError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({error!r:.80}): remove it, or bench with again=true") from None


def _named_reference(folder: Path) -> Path:
    """Return the file of the reference in a run's configuration.

    Raises:
        UsageError: There is no configuration, or it has no reference, for example after a fit without evaluation.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        raise UsageError(f"{config} does not exist")
    named = read(config).get("reference")
    if not isinstance(named, str):
        raise UsageError(f"{config} has no reference")
    return Path(named)


def _reference(path: Path, sha256: str | None) -> Moments:
    """Read the moments of a reference and check its hash.

    Raises:
        UsageError: The file is missing or damaged, or its hash differs.
    """
    reference = read_reference(path)
    if reference.sha256 != sha256:
        raise UsageError(f"{path} is not the reference of the points")
    return reference.moments


def check_out(out: Path) -> None:
    """Check that a comparison replaces only files of an earlier comparison.

    Raises:
        UsageError: The folder contains other files of the same name, such as the curve of a run.
    """
    found = [name for name in WRITTEN if (out / name).exists()]
    if found and "compare.csv" not in found:
        raise UsageError(f"{out / found[0]} is not from a comparison and would be replaced: choose another out=")


def write(rows: Sequence[Row], out: Path) -> None:
    """Write compare.csv, table.md, curve.png, and the self-contained page index.html.

    curve.png is not written if no point can be drawn.

    Raises:
        UsageError: The folder can't be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"out={out} can't be written to ({error.strerror}): choose another out=") from None
    points = [row.point for row in rows]
    heads, lines = table(rows)
    write_csv([heads, *(["" if cell == "-" else cell for cell in line] for line in lines)], out / "compare.csv")
    (out / "table.md").write_text(markdown(rows), encoding="utf-8")
    title, curve = title_of(points), out / "curve.png"
    curve.unlink(missing_ok=True)  # of an earlier comparison
    if any(distance(point, frechet_key(points)) is not None for point in points):
        plot_curve(points, curve, title, labels=[row.label for row in rows])
    (out / "index.html").write_text(_page(title, heads, lines, rows, curve), encoding="utf-8")


def markdown(rows: Sequence[Row]) -> str:
    """Format a table of distances with a line per curve and a column per budget.

    A cell contains the distance, its standard error and, in parentheses, the NFE if it differs from the budget. For
    several seeds, the cell contains the mean, the standard error from the spread of the seeds and, in parentheses, the
    standard error within seeds.
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
    floors = [row.point for row in rows if row.point["metrics"].get(f"{key}_floor") is not None]
    if floors:
        n, floor = (floors[-1]["floor"] or {}).get("n"), floors[-1]["metrics"][f"{key}_floor"]
        lines.append([f"{number(n, 12)} held-out real images", *[number(floor, 2)] * len(budgets)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(points: Sequence[Point], key: str) -> str:
    """Format the distance of a budget, see :func:`markdown`."""
    known = [point["metrics"] for point in points if point["metrics"].get(key) is not None]
    if not known:
        return "-"
    values, errors = [metrics[key] for metrics in known], [metrics.get(f"{key}_se") for metrics in known]
    mean, said = float(np.mean(values)), []
    within = math.sqrt(sum(error**2 for error in errors)) / len(errors) if None not in errors else None
    error = within
    if len(values) > 1:
        error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
        said.append(f"{len(values)} seeds, within ± {number(within, 2)}")
    spent = [point["nfe"] for point in points if point["nfe"] is not None]
    if spent and (points[0]["nfe_budget"] is None or float(np.mean(spent)) != points[0]["nfe_budget"]):
        said.append(f"{np.mean(spent):.4g}")
    return f"{number(mean, 4)} ± {number(error, 2)}" + (f" ({'; '.join(said)})" if said else "")


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return the column heads, and a list of texts per row."""
    key = frechet_key([row.point for row in rows])
    shown = [name for name in SHOWN if any(row.point["metrics"].get(name) is not None for row in rows)]
    shown += further_metrics([row.point for row in rows], key)
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


def show(rows: Sequence[Row]) -> None:
    """Print the table, followed by the floor."""
    heads, lines = table(rows)
    alike = [head for head in ("n", "seed") if len({line[heads.index(head)] for line in lines}) == 1]
    left_out = [heads.index(head) for head in (*alike, "precision", "density", "s/image") if head in heads]
    found = Table(box=None, header_style="bold")
    for column, head in enumerate(heads):
        if column not in left_out:  # the others are in compare.csv
            found.add_column(head, justify="right" if column else "left", no_wrap=bool(column), overflow="fold")
    for line in lines:
        found.add_row(*(text for column, text in enumerate(line) if column not in left_out))
    wide_console(108 + min(100, max(len(row.label) for row in rows))).print(found)
    print_lines(*_floor(rows))


def _floor(rows: Sequence[Row]) -> list[str]:
    key = frechet_key([row.point for row in rows])
    pair = f"the first row of {rows[0].folder} at the same budget, n and seed"
    said = f"difference: {key} minus that of {pair} (paired jackknife)"
    floors = [row.point for row in rows if row.point["metrics"].get(f"{key}_floor") is not None]
    if not floors:
        return [said]
    point = floors[-1]
    real = [f"{name} {number(point['metrics'].get(f'{name}_real'))}" for name in SHOWN[1:]]
    n, floor = number((point["floor"] or {}).get("n"), 12), number(point["metrics"][f"{key}_floor"])
    return [said, f"floor: {n} held-out real images are at {key} {floor}, {', '.join(real)}"]


def _page(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]], rows: Sequence[Row], curve: Path) -> str:
    def escaped(text: str) -> str:
        return html.escape(printable(text))

    def image(path: Path) -> str:
        content = base64.b64encode(path.read_bytes()).decode()
        return f'<img alt="{escaped(path.name)}" src="data:image/png;base64,{content}">'

    def cells(kind: str, texts: Iterable[str]) -> str:
        return "<tr>" + "".join(f"<{kind}>{escaped(text)}</{kind}>" for text in texts) + "</tr>"

    grids = []
    for row in rows:
        if row.grid is not None:
            caption = f"{row.label}, NFE {number(row.point['nfe'])}"
            grids.append(f"<figure>{image(row.grid)}<figcaption>{escaped(caption)}</figcaption></figure>")
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{escaped(title)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }}
th, td {{ padding: .2rem .6rem; text-align: right; white-space: nowrap }} th {{ border-bottom: 1px solid #999 }}
th:first-child, td:first-child {{ text-align: left }} tr:nth-child(even) td {{ background: #f5f5f5 }}
img {{ max-width: 100% }} figure {{ display: inline-block; margin: 0 1rem 1rem 0; max-width: 20rem }}
</style>
<h1>{escaped(title)}</h1>
{image(curve) if curve.is_file() else "<p>no point can be drawn</p>"}
<table>{cells("th", heads)}{"".join(cells("td", line) for line in lines)}</table>
<p>{"<br>".join(escaped(line) for line in _floor(rows))}</p>
{"".join(grids)}
</html>
"""
