"""The command that repeats a point."""

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from diffaccel.config import located
from diffaccel.parts.catalogue import names_of
from diffaccel.parts.plugins import installed
from diffaccel.report.experiments import has_weights, is_own_judge, own_part
from diffaccel.report.judges import judges_of
from diffaccel.report.points import FORMER_NOISE, Point

HASH = re.compile("[0-9a-f]{64}")
"""Hash in place of a file, in the configuration of a point."""


def command_of(point: Point) -> str | None:
    """Return the command that measures a normalised point again, with all settings of its prior and solver.

    Settings that points of earlier versions lack are those of the experiment; see :func:`differs`.

    Returns:
        The command; None for points that ``bench`` did not make, or that do not contain their experiment.
    """
    if point.get("source") or not point["experiment"]:
        return None
    words = ["diffaccel", "bench", point["experiment"]]
    budget = point["nfe_budget"]
    words += [f"nfe={'null' if budget is None else f'{budget:g}'}"]
    words += [f"{name}={point[name]}" for name in ("n", "seed", "precision") if point[name] is not None]
    words += _weights(point)
    for part in ("solver", "prior"):
        words += _words(part, point["settings"][part])
    words += _inferred(point) if point["words"] is None else point["words"]
    return " ".join(shlex.quote(word) for word in words)


def differs(point: Point) -> str | None:
    """Return why the command gives other images or scores than those of a normalised point; None if it does not."""
    return "; ".join(_differences(point)) or None


def _differences(point: Point) -> Iterator[str]:
    if point["noise"] == FORMER_NOISE:
        yield "measured by version 0.1, whose noise was another: this version draws other images from the same seed"
    if "training" in point["configuration"]:
        yield "measured with the weights of a fit: set checkpoint= to them"
    if point["words"] is not None or not point["experiment"]:
        return
    judges = judges_of(point)
    if (foreign := _foreign(judges, point)) and not _registered().issuperset(judges):
        yield (
            f"scored by {', '.join(foreign)} in place of the experiment's judges: set judges= with the keys of each, "
            "and reference= and floor="
        )
    condition, own = _conditions(point)
    if condition and condition.get("name") != own.get("name"):
        yield "measured with another condition than that of the experiment: set its files, if it has any"


def _weights(point: Point) -> Iterator[str]:
    """Setting of the weights; none for those of the experiment whose path was that of another folder or machine."""
    checkpoint = point["checkpoint"] or {}
    path = checkpoint.get("path")
    if not isinstance(path, str) or not path:
        return
    if Path(path).exists() or not has_weights(point["experiment"], checkpoint.get("sha256")):
        yield f"checkpoint={path}"


def _inferred(point: Point) -> Iterator[str]:
    """Settings of a point of an earlier version, which does not contain the words of its command."""
    configuration, judges = point["configuration"], judges_of(point)
    if configuration.get("truncate"):
        yield "truncate=true"
    tweedie = configuration.get("tweedie")
    if isinstance(tweedie, list) and len(tweedie) == 2:
        yield from (f"tweedie_{key}={_text(value)}" for key, value in zip(("ratio", "counted"), tweedie, strict=True))
    condition, own = _conditions(point)
    if not _alike(condition, own):
        yield from _words("condition", condition)
    if _foreign(judges, point) and _registered().issuperset(judges):
        yield f"judges={','.join(judges)}"


def _foreign(judges: Iterable[str], point: Point) -> list[str]:
    """Names of judges that are not those of the experiment of a point."""
    return [name for name in judges if not is_own_judge(point["experiment"], name)]


@cache
def _registered() -> frozenset[str]:
    """Names of extractors that ``judges=`` takes."""
    return names_of("extractor") | {plugin.name for plugin in installed("diffaccel.extractors")[0]}


def _conditions(point: Point) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Condition of a point, and that of its experiment; empty for none."""
    condition = point["configuration"].get("condition")
    if not isinstance(condition, Mapping):
        return {}, {}
    return condition, own_part(point["experiment"], "condition")


def _alike(value: Any, own: Any) -> bool:
    """Whether an experiment sets a value, of which a point may have the hash of a file or no file at all."""
    if isinstance(value, Mapping):
        node = own if isinstance(own, Mapping) else {"name": own}
        return all(_alike(inner, node.get(key)) for key, inner in value.items())
    return value == own or (own is not None and isinstance(value, str) and HASH.fullmatch(value) is not None)


def _words(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        if "name" in value:
            yield f"{key}={_text(value['name'])}"
        for name, inner in value.items():
            if name != "name":
                yield from _words(f"{key}.{name}", inner)
    elif not (isinstance(value, str) and HASH.fullmatch(value)):
        yield f"{key}={_text(value)}"


def _text(value: Any) -> str:
    return located(value) if isinstance(value, str) else json.dumps(value)
