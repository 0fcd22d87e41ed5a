"""The command that repeats a point."""

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from diffaccel.report.judges import judges_of
from diffaccel.report.points import FORMER_NOISE, Point


def command_of(point: Point) -> str | None:
    """Return the command that measures a normalised point again, with all settings of its prior and solver.

    Images of another version's noise differ from those of the point; see :func:`differs`.

    Returns:
        The command; None for points that ``bench`` did not make, or that do not contain their experiment.
    """
    if point.get("source") or not point["experiment"]:
        return None
    words = ["diffaccel", "bench", point["experiment"]]
    budget = point["nfe_budget"]
    words += [f"nfe={'null' if budget is None else f'{budget:g}'}"]
    words += [f"{name}={point[name]}" for name in ("n", "seed", "precision") if point[name] is not None]
    checkpoint = (point["checkpoint"] or {}).get("path")
    if isinstance(checkpoint, str) and checkpoint:
        words.append(f"checkpoint={checkpoint}")
    for part in ("solver", "prior"):
        words += _words(part, point["settings"][part])
    if len(judges := judges_of(point)) > 1:
        words.append(f"judges={','.join(judges)}")
    return " ".join(shlex.quote(word) for word in words)


def differs(point: Point) -> str | None:
    """Return why the command gives other images than those of a normalised point; None if it gives the same."""
    if point["noise"] == FORMER_NOISE:
        return "measured by version 0.1, whose noise was another: this version draws other images from the same seed"
    return None


def _words(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        if "name" in value:
            yield f"{key}={_text(value['name'])}"
        for name, inner in value.items():
            if name != "name":
                yield from _words(f"{key}.{name}", inner)
    else:
        yield f"{key}={_text(value)}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
