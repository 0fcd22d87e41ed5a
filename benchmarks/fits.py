"""The fits that a comparison over seeds is made of."""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from diffaccel.__main__ import main as diffaccel


def fit(experiment: str, out: Path, words: Sequence[str]) -> None:
    """Fit an experiment into a folder unless that is done; one that was interrupted goes on."""
    if not (out / "ema.safetensors").is_file():
        status = diffaccel(["fit", experiment, f"out={out}", "resume=auto", "logger=csv", *words])
        if status:
            sys.exit(status)


def over_seeds(values: Sequence[float]) -> str:
    """Mean and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} +- {error:.3f}"


def arguments(words: Sequence[str]) -> tuple[int, list[str]]:
    """Number of seeds (three unless given), and what else is set."""
    seeds = [int(word) for word in words if word.isdigit()]
    return (seeds or [3])[0], [word for word in words if "=" in word]
