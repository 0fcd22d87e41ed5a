"""Points of folders, and the judges that see them.

A view is what one judge sees: the points that it scored, by the same features and reference.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from diffaccel.errors import UsageError
from diffaccel.report.files import read_points
from diffaccel.report.judges import is_published, judges_of, seen_by
from diffaccel.report.points import FORMER_NOISE, Point, normalised

Note = Callable[[str], None]

PASSED_OVER = {"features", "images", "partial", "wandb"}
"""Folders of a run that contain no points, but possibly many files."""


class Line(NamedTuple):
    """A point and where it comes from.

    Attributes:
        folder: Folder of the run.
        point: Normalised point.
        name: Name that the user gave to the source, or an empty string.
    """

    folder: Path
    point: Point
    name: str = ""


class View(NamedTuple):
    """Points that one judge scored.

    Attributes:
        judge: Name of the judge, followed by a hash if several judges have this name.
        lines: Points as the judge sees them.
    """

    judge: str
    lines: list[Line]


def read_lines(sources: Sequence[str], names: Sequence[str], note: Note) -> list[Line]:
    """Read the points of all folders at any depth below the sources.

    Args:
        sources: Folders, or files points.jsonl.
        names: Name of each source; empty strings, or no names, for names from the settings.
        note: Function called with a message about folders without points.

    Raises:
        UsageError: There are no sources or no points, a file can't be read, or there are not as many names as sources.
    """
    if not sources:
        raise UsageError("compare requires folders of runs: diffaccel compare runs/digits/edm runs/digits/dlg")
    if names and len(names) != len(sources):
        raise UsageError(
            f"label= has {len(names)} names for {len(sources)} folders: give one for each, in order, separated by "
            "commas (an empty one is made from the settings)"
        )
    found: dict[Path, str] = {}
    empty = []
    for source, name in zip(sources, names or [""] * len(sources), strict=True):
        folders = [Path(source).parent] if source.endswith(".jsonl") else folders_below(Path(source))
        if not folders:
            empty.append(Path(source))
        for folder in folders:
            found.setdefault(folder, name)
    if not found:
        raise UsageError(f"no points at {empty[0] / 'points.jsonl'}: measure some with `diffaccel bench`")
    for folder in empty:
        if not folder.is_dir():
            raise UsageError(f"{folder} does not exist: give folders of runs")
        note(f"{folder} is skipped: there is no points.jsonl in it or below it")
    return [Line(folder, point, name) for folder, name in found.items() for point in _points(folder)]


def folders_below(folder: Path) -> list[Path]:
    """Return the folders with points.jsonl: the folder itself, then those below it in alphabetical order."""
    found = []
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in PASSED_OVER and not name.startswith("."))
        if "points.jsonl" in files:
            found.append(Path(path))
    return found


def _points(folder: Path) -> list[Point]:
    points = read_points(folder / "points.jsonl")
    if not points:
        raise UsageError(f"there are no points in {folder / 'points.jsonl'}: measure some with `diffaccel bench`")
    return [normalised(point) for point in points]


def views_of(lines: Sequence[Line]) -> list[View]:
    """Return what each judge sees, in the order in which the judges first appear.

    Points of a judge with several references or versions of its features are not comparable, and give several views.
    A point without the hash of either, as of older versions, is part of the first view of its judge. Points without
    the name of a judge, which have no distance, are part of every view.
    """
    by_name: dict[str, dict[tuple[str | None, str | None], list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        for name in judges_of(line.point):
            point = normalised(seen_by(line.point, name))
            hashes = point["extractor"]["sha256"], point["reference"]["sha256"]
            by_name[name][hashes].append(line._replace(point=point))
    found = []
    nameless = [line for line in lines if not judges_of(line.point)]
    for name, groups in by_name.items():
        merged = _merged(groups)
        for (extractor, reference), seen in merged.items():
            alone = len(merged) == 1
            differing = extractor if len({key[0] for key in merged}) > 1 else reference
            found.append(
                View(name if alone else f"{name} {(differing or 'unknown')[:8]}", _in_order([*seen, *nameless], lines))
            )
    return found or [View("", nameless)]


def _merged(
    groups: dict[tuple[str | None, str | None], list[Line]],
) -> dict[tuple[str | None, str | None], list[Line]]:
    """Move the points of groups with unknown hashes to the first group that may be the same."""
    found = {hashes: list(lines) for hashes, lines in groups.items() if None not in hashes}
    for hashes, lines in groups.items():
        if None in hashes:
            fits = (one for one in found if all(b in (a, None) for a, b in zip(one, hashes, strict=True)))
            found.setdefault(next(fits, hashes), []).extend(lines)
    return found


def _in_order(seen: Sequence[Line], lines: Sequence[Line]) -> list[Line]:
    places = {folder: number for number, folder in enumerate(dict.fromkeys(line.folder for line in lines))}
    return sorted(seen, key=lambda line: places[line.folder])


def chosen(views: Sequence[View], lines: Sequence[Line], judge: str | None, note: Note) -> View:
    """Return the view to show, and note which points it lacks.

    Args:
        views: All views.
        lines: All points.
        judge: Name of a judge. By default, a view with points of the present noise, then of a published judge, then of
            the most points; of several, the first judge, with the last reference in the first folder, that of the
            present points.
        note: Function called with a message about the points that are left out.

    Raises:
        UsageError: The judge did not score any point.
    """
    named = [view for view in views if judge is None or judge in (view.judge, _name(view))]
    if not named:
        names = ", ".join(view.judge for view in views)
        raise UsageError(f"judge={judge} scored none of the points: choose one of {names}")
    best = max(map(_preference, named))
    tied = [view for view in named if _preference(view) == best]
    *_, first = (view for view in tied if _start(view) == _start(tied[0]))
    if len(first.lines) < len(lines):
        others = [f"judge='{view.judge}' shows {len(view.lines)}" for view in views if view is not first]
        counts = f"{len(lines) - len(first.lines)} of {len(lines)} points"
        folders = _missing(first, lines)
        note(f"{counts} were not scored by {first.judge} with the same reference and are left out: {folders}")
        if others:
            note(f"{'; '.join(others)}; index.html shows all judges")
    return first


def _preference(view: View) -> tuple[bool, bool, int]:
    """Sort key of the default view; a judge that was trained on the images has blind spots, however many it scored."""
    present = any(line.point["noise"] != FORMER_NOISE for line in view.lines)
    return present, is_published(_name(view)), len(view.lines)


def _name(view: View) -> str:
    """Name of a view's judge, without the hash that may follow it."""
    return view.judge.split(" ")[0]


def _start(view: View) -> tuple[str, list[Path]]:
    """Name of a view's judge, and folder of its first point."""
    return _name(view), [line.folder for line in view.lines[:1]]


def _missing(view: View, lines: Sequence[Line]) -> str:
    """Folders with points that a view lacks."""
    counts: dict[Path, int] = defaultdict(int)
    for line in lines:
        counts[line.folder] += 1
    for line in view.lines:
        counts[line.folder] -= 1
    return _listed(str(folder) for folder, count in counts.items() if count > 0)


def _listed(texts: Iterable[str], most: int = 4) -> str:
    listed = list(texts)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
