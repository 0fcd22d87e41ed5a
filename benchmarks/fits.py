"""Fits and statistics for comparisons over seeds."""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from diffaccel.__main__ import main as diffaccel


def fit(experiment: str, out: Path, words: Sequence[str]) -> None:
    """Fit an experiment into a folder; a complete fit is reused, an interrupted one is resumed."""
    if not (out / "ema.safetensors").is_file():
        status = diffaccel(["fit", experiment, f"out={out}", "resume=auto", "logger=csv", *words])
        if status:
            sys.exit(status)


def over_seeds(values: Sequence[float]) -> str:
    """Mean ± standard error, as text."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


def arguments(words: Sequence[str]) -> tuple[int, list[str]]:
    """Number of seeds (3 by default), and the overrides ``key=value`` among the arguments."""
    seeds = [int(word) for word in words if word.isdigit()]
    return (seeds or [3])[0], [word for word in words if "=" in word]
