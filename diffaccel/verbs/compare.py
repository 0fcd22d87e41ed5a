"""``compare``: points of several runs in a table and a page, with curves and differences under common noise.

Points that several judges scored are shown as one of them sees them. Pairs that another judge orders differently are
listed. See :mod:`~diffaccel.verbs.pairs`.
"""

import base64
import html
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from diffaccel.errors import UsageError
from diffaccel.metrics import Frechet
from diffaccel.report import frechet_key, plot_curve, read_points, title_of, write_csv
from diffaccel.report.curves import places_of
from diffaccel.report.judges import common_judges, judges_of, seen_by
from diffaccel.report.logs import budget_name
from diffaccel.report.points import Point, distance, further_metrics, normalised, undrawn
from diffaccel.report.repetition import columns, in_words, warnings_of
from diffaccel.text.escape import markdown_cell, printable
from diffaccel.text.terminal import number, print_lines, wide_console
from diffaccel.verbs.pairs import Note, Pairs, Row, key_of

OPTIONS = ("out", "reference", "judge")
"""Options of the command."""
WRITTEN = ("compare.csv", "table.md", "curve.png", "index.html")
SHOWN = ("kid", "kid_se", "precision", "recall", "density", "coverage")
ONLY_IN_FILES = ("precision", "density", "s/image")
"""Columns that the terminal has no room for."""


def compare(
    sources: Sequence[str],
    reference: str | None = None,
    note: Note = lambda said: None,
    judge: str | None = None,
) -> list[Row]:
    """Read points and pair those of each source with those of the first source.

    Args:
        sources: Folders of runs, or their points.jsonl. A folder without points.jsonl is skipped if there are others.
        reference: File of the points' reference, if the folders' config.yaml does not contain its path.
        note: Function called with a message about anything that is not shown.
        judge: Name of the judge whose metrics are shown; by default the first of the first point.

    Returns:
        Rows in the order of source, curve and budget, without points that were measured again.

    Raises:
        UsageError: There are no sources or no points, the points have several extractors or references, ``judge`` did
            not score some of them, or ``reference`` is not the reference of the points.
    """
    if not sources:
        raise UsageError("compare requires folders of runs: diffaccel compare runs/digits/edm runs/digits/dlg")
    folders = dict.fromkeys(Path(source).parent if source.endswith(".jsonl") else Path(source) for source in sources)
    lines = _seen([(folder, point) for folder in _with_points(list(folders), note) for point in _points(folder)], judge)
    for said in undrawn([point for _, point in lines], frechet_key([point for _, point in lines])):
        note(said)
    rows = _rows(lines, note)
    first: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row.folder == rows[0].folder:
            first.setdefault(key_of(row.point), row)
    return Pairs(rows, reference, note).paired(first)


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


def _rows(lines: Sequence[tuple[Path, Point]], note: Note) -> list[Row]:
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


def _seen(lines: Sequence[tuple[Path, Point]], judge: str | None) -> list[tuple[Path, Point]]:
    """Return the points as a judge sees them, by default the first of the first point that has one.

    Raises:
        UsageError: The judge did not score some points, or the points have several extractors or references.
    """
    judges = [judges_of(point) for _, point in lines]
    common = common_judges([point for _, point in lines])
    for (folder, _), names in zip(lines, judges, strict=True):
        if judge is not None and judge not in names:
            shown = f"choose judge={common[0]}" if common else "bench them with the same judges"
            raise UsageError(f"judge={judge}: a point of {folder} was scored by {' and '.join(names)} only: {shown}")
    first = judge or next((names[0] for names in judges if names), "")
    found: list[tuple[Path, Point]] = [(folder, normalised(seen_by(point, first))) for folder, point in lines]
    _check(found, [name for name in common if name != first])
    return found


def _check(lines: Sequence[tuple[Path, Point]], common: Sequence[str]) -> None:
    """Check that all points have the same extractor and reference; older points may lack them.

    Args:
        lines: Folders and points.
        common: Further judges of all points, for the message.
    """
    remedy = f", or set judge={common[0]}" if common else ""
    for kind, key in (("extractor", "name"), ("extractor", "sha256"), ("reference", "sha256")):
        found = {value: folder for folder, point in lines if (value := point[kind][key]) is not None}
        if len(found) > 1:
            said = "; ".join(
                f"{folder}: {kind} {value if key == 'name' else value[:8]}" for value, folder in found.items()
            )
            raise UsageError(
                f"the points were scored differently ({said}): bench them with the same extractor and reference{remedy}"
            )


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
    if chained := in_words(points):
        said.append(chained)
    return f"{number(mean, 4)} ± {number(error, 2)}" + (f" ({'; '.join(said)})" if said else "")


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return the column heads, and a list of texts per row."""
    key = frechet_key([row.point for row in rows])
    shown = [name for name in SHOWN if any(row.point["metrics"].get(name) is not None for row in rows)]
    shown += columns([row.point for row in rows])
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
    left_out = [heads.index(head) for head in (*alike, *ONLY_IN_FILES) if head in heads]
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
    lines = [said, *_opposed(rows), *warnings_of([row.point for row in rows], [row.label for row in rows])]
    if not floors:
        return lines
    point = floors[-1]
    real = [f"{name} {number(point['metrics'].get(f'{name}_real'))}" for name in SHOWN[2:]]
    if (repeats := point["metrics"].get("near_repeats_real")) is not None:
        real.append(f"near_repeats {number(repeats)}")
    if point["metrics"].get("kid_floor") is not None:
        real = [f"kid {number(point['metrics']['kid_floor'])}", *real]
    n, floor = number((point["floor"] or {}).get("n"), 12), number(point["metrics"][f"{key}_floor"])
    return [*lines, f"floor: {n} held-out real images are at {key} {floor}, {', '.join(real)}"]


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
