"""Files of points and curves: JSON lines, with one point per line, and CSV."""

import csv
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffaccel.errors import UsageError
from diffaccel.features.names import distance_key
from diffaccel.parts.overrides import as_given
from diffaccel.report.curves import places_of
from diffaccel.report.points import Point, normalised
from diffaccel.storage import lock, unwritable, write_all
from diffaccel.text.escape import csv_cell

COLUMNS = (
    *("method", "process", "prior", "solver", "nfe_budget", "nfe", "nfe_marginal", "nfe_burn_in", "nfe_sequential"),
    *("nfe_equivalent", "gflops_per_image", "seconds_per_image", "n", "seed"),
)


def append_point(path: str | Path, point: Point) -> None:
    """Append a point as one line of JSON and flush the file to disk.

    NaN and infinity, which JSON doesn't support, are written as null. An incomplete last line of a killed run is
    removed first. The file is locked meanwhile, so that several processes can append to it.

    Raises:
        TypeError: The point contains a value that JSON doesn't support, such as a tensor.
        UsageError: The file can't be written; it is then unchanged.
    """
    path = Path(path)
    line = json.dumps(_finite(as_given(point)), allow_nan=False).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", buffering=0) as file:
            lock(file)
            file.seek(0)
            content = file.read()
            torn = _torn(content)
            end = file.truncate(len(content) - len(torn))
            lacks_newline = content and not torn and not content.endswith(b"\n")
            try:
                write_all(file, b"\n" + line if lacks_newline else line)
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        raise unwritable(path, error) from error


def read_points(path: str | Path) -> list[dict[str, Any]]:
    """Read the points of a file, except an incomplete last line of a killed run.

    Raises:
        UsageError: The file is missing, or has a complete line that is not a JSON object.
    """
    if not Path(path).is_file():
        raise UsageError(f"no points at {path}: measure some with `diffaccel bench`")
    content = Path(path).read_bytes()
    points = []
    for number, line in enumerate(content.removesuffix(_torn(content)).splitlines(), start=1):
        try:
            point = json.loads(line)
        except (ValueError, RecursionError):
            point = None
        if not isinstance(point, dict):
            raise UsageError(f"{path}, line {number}, is not a point: remove the line")
        points.append(point)
    return points


def _torn(content: bytes) -> bytes:
    """Incomplete line at the end of the content, or no bytes."""
    last = content[content.rfind(b"\n") + 1 :]
    try:
        json.loads(last)
    except (ValueError, RecursionError):
        return last
    return b""  # complete, without a newline


def _finite(value: Any) -> Any:
    """Replace NaN and infinity by None, at any depth."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_curve_csv(points: Sequence[Point], path: str | Path) -> None:
    """Write a table with a row per point: curve, settings of the sampling, cost, and all metrics."""
    points, labels = [normalised(point) for point in points], [place.label for place in places_of(points)]
    metrics = sorted({name for point in points for name in point["metrics"]})
    rows: list[list[Any]] = [["curve", *COLUMNS, "extractor", *metrics]]
    for label, point in zip(labels, points, strict=True):
        values = (point["metrics"].get(name) for name in metrics)
        rows.append([label, *(point[name] for name in COLUMNS), point["extractor"]["name"], *values])
    write_csv(rows, path)


def write_csv(rows: Iterable[Iterable[Any]], path: str | Path) -> None:
    """Write rows as CSV; text that a spreadsheet would interpret as a formula is escaped."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [csv_cell(value) if isinstance(value, str) else value for value in row] for row in rows
        )


def frechet_key(points: Iterable[Point]) -> str:
    """Return the metric that all these points can be compared by: their Frechet distance.

    Raises:
        UsageError: No point has an extractor's name, or points have different extractors.
    """
    keys = sorted({key for point in points if (key := _distance_of(normalised(point))) is not None})
    if not keys:
        raise UsageError("none of the points has the name of its extractor: bench them again")
    if len(keys) > 1:
        raise UsageError(f"one plot needs points of one extractor, these have {keys}: select points of one")
    return keys[0]


def _distance_of(point: Point) -> str | None:
    """The point's metric that is extrapolated; of an old point that has none, the one that its extractor gives."""
    if (extractor := point["extractor"]["name"]) is None:
        return None
    return next((name for name in point["metrics"] if f"{name}_inf" in point["metrics"]), distance_key(extractor))
