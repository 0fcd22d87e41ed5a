"""``compare``: points of several runs in tables, pictures and a page, with differences under common noise.

Points that several judges scored are shown as one of them sees them; the page shows all judges. Pairs that another
judge orders differently are listed. See :mod:`~diffaccel.verbs.pairs`.
"""

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from diffaccel.errors import UsageError, suggest
from diffaccel.report.axes import COSTS, unequal_denoisers
from diffaccel.report.curves import places_of
from diffaccel.report.drawing import plot_curve, title_of
from diffaccel.report.files import frechet_key, write_csv
from diffaccel.report.logs import budget_name
from diffaccel.report.page import Shown, write_page
from diffaccel.report.points import Point, distance, undrawn
from diffaccel.report.published import published_for
from diffaccel.report.repetition import columns, room
from diffaccel.report.rows import Row, key_of
from diffaccel.report.sources import Line, Note, View, chosen, read_lines, views_of
from diffaccel.report.strips import plot_strip, strips_of
from diffaccel.report.tables import markdown, notes, table
from diffaccel.text.terminal import print_lines, wide_console
from diffaccel.verbs.pairs import Pairs

__all__ = ["Comparison", "Row", "compare", "compare_all", "markdown", "show", "table", "write"]

PICTURES = ("curve.png", "curve_dark.png", "strip.png", "strip_dark.png")
WRITTEN = ("compare.csv", "table.md", *PICTURES, "index.html")
ONLY_IN_FILES = ("kid_se", "precision", "density", "s/image")
"""Columns that the terminal has no room for."""


class Comparison(NamedTuple):
    """Result of a comparison.

    Attributes:
        rows: Rows of the judge that is shown.
        others: Rows of the other judges that scored a point.
        x: Cost on the horizontal axis of the picture.
        command: Command that makes the comparison.
        judge: Name of the judge that is shown.
    """

    rows: list[Row]
    others: list[Shown]
    x: str = "nfe"
    command: str = ""
    judge: str = ""


def compare(
    sources: Sequence[str],
    reference: str | None = None,
    note: Note = lambda said: None,
    judge: str | None = None,
    names: Sequence[str] = (),
) -> list[Row]:
    """Read points and pair those of each source with those of the first source.

    Args:
        sources: Folders of runs, or their points.jsonl. The points of all folders below are read too.
        reference: File of the points' reference, if the folders' config.yaml does not contain its path.
        note: Function called with a message about anything that is not shown.
        judge: Name of the judge whose metrics are shown; by default a published one before others, then that of most
            points.
        names: Name of each source for labels; empty strings, or no names, for labels from the settings.

    Returns:
        Rows in the order of source, curve and budget, without points that were measured again.

    Raises:
        UsageError: There are no sources or no points, ``judge`` scored none of them, or ``reference`` is not the
            reference of the points.
    """
    lines = read_lines(sources, names, note)
    return _rows_of(chosen(views_of(lines), lines, judge, note), reference, note)


def compare_all(
    sources: Sequence[str],
    reference: str | None = None,
    note: Note = lambda said: None,
    judge: str | None = None,
    names: Sequence[str] = (),
    x: str = "nfe",
    command: str = "",
    keys: Collection[str] | None = None,
) -> Comparison:
    """Compare as :func:`compare`, with the rows of the other judges for the page.

    Args:
        sources: See :func:`compare`; so are the next four arguments.
        reference: Reference.
        note: Function for messages.
        judge: Judge.
        names: Names of the sources.
        x: Cost on the horizontal axis of the picture: ``nfe``, ``seconds``, ``gflops`` or ``nfe_equivalent``, the
            FLOPs in evaluations of each point's own denoiser; for denoisers of different sizes, use ``gflops``.
        command: Command that makes the comparison, for the page.
        keys: Keys of the points to compare; None for all that the sources have.

    Raises:
        UsageError: See :func:`compare`; or there is no such cost.
    """
    if x not in COSTS:
        raise UsageError(f"x={x} is no cost{suggest(x, list(COSTS))}: choose one of {', '.join(COSTS)}")
    lines = [line for line in read_lines(sources, names, note) if keys is None or line.point["key"] in keys]
    views = views_of(lines)
    first = chosen(views, lines, judge, note)
    rows = _rows_of(first, reference, note)
    if x == "nfe_equivalent":
        for said in unequal_denoisers([row.point for row in rows]):
            note(said)
    others = [view for view in views if view is not first]
    further = [Shown(view.judge, _rows_of(view, None, lambda said: None)) for view in others]
    return Comparison(rows, further, x, command, first.judge)


def _rows_of(view: View, reference: str | None, note: Note) -> list[Row]:
    """Rows of a view, with their differences to the first row of the first folder."""
    points = [line.point for line in view.lines]
    for said in undrawn(points, frechet_key(points)):
        note(said)
    rows = _rows(view.lines, note)
    first: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row.folder == rows[0].folder:
            first.setdefault(key_of(row.point), row)
    return Pairs(rows, reference, note).paired(first)


def _rows(lines: Sequence[Line], note: Note) -> list[Row]:
    places = places_of(
        [line.point for line in lines], [str(line.folder) for line in lines], [line.name for line in lines]
    )
    # The grid of a budget is that of the last point.
    drawn = {path: number for number, line in enumerate(lines) if (path := _grid(line.folder, line.point))}
    grids = {number: path for path, number in drawn.items() if path.is_file()}
    rows = [
        Row(line.folder, line.point, place.label, grids.get(number))
        for number, (line, place) in enumerate(zip(lines, places, strict=True))
        if not place.replaced
    ]
    shown = {row.folder for row in rows}
    for folder in dict.fromkeys(line.folder for line in lines if line.folder not in shown):
        note(f"{folder} is skipped: an earlier folder contains the same points")
    folders = list(dict.fromkeys(row.folder for row in rows))
    curves = list(dict.fromkeys(row.label for row in rows))
    return sorted(
        rows, key=lambda row: (folders.index(row.folder), curves.index(row.label), row.point["nfe"] or math.inf)
    )


def _grid(folder: Path, point: Point) -> Path | None:
    return folder / f"samples_nfe{budget_name(point)}.png" if point["nfe"] else None


def check_out(out: Path) -> None:
    """Check that a comparison replaces only files of an earlier comparison.

    Raises:
        UsageError: The folder contains other files of the same name, such as the curve of a run.
    """
    found = [name for name in WRITTEN if (out / name).exists()]
    if found and "compare.csv" not in found:
        raise UsageError(f"{out / found[0]} is not from a comparison and would be replaced: choose another out=")


def write(
    rows: Sequence[Row],
    out: Path,
    others: Sequence[Shown] = (),
    x: str = "nfe",
    command: str = "",
    judge: str = "",
) -> list[str]:
    """Write compare.csv, table.md, the pictures of curves and samples, and the self-contained page index.html.

    The pictures of curves are not written if no point can be drawn, and those of samples not without sample grids.

    Args:
        rows: Rows of the judge that is shown.
        out: Folder to write to.
        others: Rows of the other judges, for the page.
        x: Cost on the horizontal axis of the pictures.
        command: Command that makes the comparison, for the page.
        judge: Name of the judge that is shown; by default that of the first point.

    Returns:
        Names of the files.

    Raises:
        UsageError: The folder can't be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"out={out} can't be written to ({error.strerror}): choose another out=") from None
    for name in PICTURES:
        (out / name).unlink(missing_ok=True)  # of an earlier comparison
    points = [row.point for row in rows]
    heads, lines = table(rows)
    write_csv([heads, *(["" if cell == "-" else cell for cell in line] for line in lines)], out / "compare.csv")
    (out / "table.md").write_text(markdown(rows), encoding="utf-8")
    title, key = title_of(points), frechet_key(points)
    cost = COSTS[x].key
    if any(distance(point, key) is not None and point[cost] for point in points):
        labels, published = [row.label for row in rows], published_for(points)
        for dark, name in ((False, "curve.png"), (True, "curve_dark.png")):
            plot_curve(points, out / name, title, published, labels=labels, x=x, dark=dark)
    strip, said = strips_of(rows)
    if strip:
        for dark, name in ((False, "strip.png"), (True, "strip_dark.png")):
            plot_strip(strip, out / name, said, dark=dark)
    shown = Shown(judge or str(points[0]["extractor"]["name"]), rows)
    write_page(out / "index.html", title, [shown, *others], x, command)
    return [name for name in WRITTEN if (out / name).exists()]


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
    further = room(columns([row.point for row in rows]))
    wide_console(108 + further + min(100, max(len(row.label) for row in rows))).print(found)
    print_lines(*notes(rows))
