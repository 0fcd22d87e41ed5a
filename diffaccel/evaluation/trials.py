"""Trials of a search on disk, from which an interrupted search is resumed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffaccel.config import TUNABLE
from diffaccel.report import append_point, read_points

Trial = dict[str, Any]


class Trials:
    """Measured settings, each a line of ``trials.jsonl``.

    Args:
        path: File.
        again: Whether to ignore the lines of earlier searches; they remain in the file.

    Attributes:
        measured: Trials by ``key``, the hash of everything that determines the trial.
        unusable: Number of earlier lines that are incomplete or have no key.
    """

    def __init__(self, path: Path, again: bool = False) -> None:
        self.path = path
        lines = read_points(path) if path.is_file() and not again else []
        self.measured: dict[str, Trial] = {line["key"]: line for line in lines if _usable(line)}
        self.unusable = sum(not _usable(line) for line in lines)

    def add(self, trial: Trial, write: bool) -> None:
        """Add a trial, and append its line if this process writes."""
        if write:
            append_point(self.path, trial)
        self.measured[trial["key"]] = trial


def _usable(line: Mapping[str, Any]) -> bool:
    """Whether a line has a key and is complete."""
    drawn, found = line.get("drawn"), line.get("settings")
    known = isinstance(drawn, Mapping) and all(isinstance(drawn.get(part), Mapping) for part in TUNABLE)
    measured = isinstance(found, Mapping) and isinstance(line.get("metrics"), Mapping)
    whole = isinstance(line.get("error"), str) or (measured and isinstance(line.get("nfe"), int | float))
    return isinstance(line.get("key"), str) and known and whole
