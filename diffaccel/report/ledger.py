"""Record of the points that were logged to W&B, so that no run contains a point twice."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from diffaccel.report.points import Point, normalised
from diffaccel.storage import write_all

FILE = "wandb_points.jsonl"
"""File in OUT with a line for each run and each logged point."""


class Ledger:
    """W&B runs of an output folder, and the points that each of them contains.

    Args:
        out: Output folder.
    """

    def __init__(self, out: Path) -> None:
        self.path = out / FILE

    def run_of(self, curve: str) -> str | None:
        """Return the id of the last run of a curve; None without one."""
        return next((line["run"] for line in reversed(self._lines()) if line.get("curve") == curve), None)

    def missing(self, run: str, points: Sequence[Point]) -> list[Point]:
        """Return the points that a run does not contain."""
        logged = self._logged(run)
        return [point for point in points if identity(point) not in logged]

    def contained(self, run: str, points: Sequence[Point]) -> list[Point]:
        """Return the points that a run contains, each once."""
        logged = self._logged(run)
        return list({key: point for point in points if (key := identity(point)) in logged}.values())

    def _logged(self, run: str) -> set[Any]:
        """Identities of the points of a run."""
        return {line.get("point") for line in self._lines() if line["run"] == run}

    def start(self, run: str, curve: str, budgets: Sequence[float]) -> None:
        """Record the run of a curve, with the budgets that it is started for."""
        self._append([{"run": run, "curve": curve, "nfe": list(budgets)}])

    def budgets(self, run: str) -> list[float]:
        """Return all budgets that a run was started for."""
        return sorted({budget for line in self._lines() if line["run"] == run for budget in line.get("nfe", ())})

    def add(self, run: str, points: Iterable[Point]) -> None:
        """Record points that were logged to a run."""
        self._append([{"run": run, "point": identity(point)} for point in points])

    def _lines(self) -> list[dict[str, Any]]:
        lines = []
        for text in self.path.read_text(errors="replace").splitlines() if self.path.is_file() else ():
            try:
                line = json.loads(text)
            except ValueError:  # an incomplete line of a killed run
                continue
            if isinstance(line, dict) and isinstance(line.get("run"), str):
                lines.append(line)
        return lines

    def _append(self, lines: Sequence[dict[str, Any]]) -> None:
        content = self.path.read_bytes() if self.path.is_file() else b""
        text = "".join(json.dumps(line) + "\n" for line in lines)
        with self.path.open("ab", buffering=0) as file:
            write_all(file, (b"" if content[-1:] in (b"", b"\n") else b"\n") + text.encode())


def identity(point: Point) -> str:
    """Return a hash of a measurement: its key or, for weights in training, its images; and its metrics."""
    kept = ("key", "nfe_budget", "n", "seed", "images_sha256", "metrics")
    found = normalised(point)  # the same before and after it was written
    described = json.dumps([found.get(name) for name in kept], sort_keys=True, default=str)
    return hashlib.sha256(described.encode()).hexdigest()[:16]
