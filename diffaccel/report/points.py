"""Normalisation of points from points.jsonl for tables and plots: missing values and wrong types become unknown."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffaccel.parts.history import as_measured
from diffaccel.parts.schema import RENAMED

Point = Mapping[str, Any]

TEXTS = ("method", "experiment", "process", "data", "prior", "solver", "images_sha256", "device", "precision", "key")
NUMBERS = (
    *("nfe", "nfe_marginal", "nfe_burn_in", "nfe_sequential", "nfe_equivalent"),
    *("gflops_per_image", "seconds_per_image", "seconds_scoring"),
)
UNKNOWN = "unknown"
"""Noise of images whose origin is not known; equal seeds don't make them pairs."""
FORMER_NOISE = "mt19937"
"""Random number generator of points that do not name theirs, up to version 0.1."""
COUNTS = ("n", "seed", "chains")
MAPPINGS = ("metrics", "extractor", "reference", "configuration", "settings", "weights")

STANDARD = ("kid", "precision", "recall", "density", "coverage", "effective_n", "near_repeats", "bits_per_dim")
"""Metrics that tables place themselves."""
DERIVED = ("_inf", "_se", "_floor", "_real")
"""Ends of the names of values that belong to a metric: its limit, standard error, and value of held-out images."""


def normalised(point: Point) -> dict[str, Any]:
    """Return a point with every key and the right types, where unknown values are None or an empty mapping.

    Points written by this version are unchanged. The budget of a point without one is its NFE.
    """
    found = dict(point)
    found |= {name: _text(point.get(name)) for name in TEXTS}
    found |= {name: _number(point.get(name)) for name in NUMBERS}
    found |= {name: _count(point.get(name)) for name in COUNTS}
    found |= {name: _mapping(point.get(name)) for name in MAPPINGS}
    found["noise"] = _text(point.get("noise")) or FORMER_NOISE
    found["tuned"] = point.get("tuned") is True
    found["metrics"] = {name: _number(value) for name, value in found["metrics"].items()}
    for name, keys in (("extractor", ("name", "sha256")), ("reference", ("name", "sha256"))):
        found[name] = {**found[name], **{key: _text(found[name].get(key)) for key in keys}}
    found["words"] = _texts(point.get("words"))
    for name in ("floor", "checkpoint"):  # optional
        found[name] = _mapping(point.get(name)) or None
    if found["floor"]:
        found["floor"]["n"] = _count(found["floor"].get("n"))
    found["settings"] = {**found["settings"], **_parts(found)}
    if isinstance(point.get("plan"), Mapping):
        found["plan"] = _renamed(point["plan"])
    budget = point.get("nfe_budget", found["nfe"])
    found["nfe_budget"] = None if budget is None else _number(budget) or found["nfe"]
    return found


def _parts(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings of prior and solver, or only their names for points of older versions."""
    nodes = {}
    for part in ("prior", "solver"):
        node = _mapping(found["settings"].get(part))
        name = found[part] or _text(node.get("name"))
        nodes[part] = {**node, **({"name": name} if name else {})}
    return settings_of(nodes)


def settings_of(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return prior and solver with present names of keys, and the former defaults of keys without value."""
    prior, solver = _renamed(_mapping(settings.get("prior"))), _mapping(settings.get("solver"))
    return {"prior": as_measured(prior), "solver": as_measured(solver)}


def _renamed(node: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the key names of older versions."""
    return {RENAMED.get(key, key): value for key, value in node.items()}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _texts(value: object) -> list[str] | None:
    return value if isinstance(value, list) and all(isinstance(one, str) for one in value) else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < 1e300 else None  # None for infinity and NaN


def _count(value: object) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number == int(number) else None


def _mapping(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def further_metrics(points: Sequence[Point], key: str) -> list[str]:
    """Names of the metrics besides the standard ones, in order: tables have a column for each.

    Args:
        points: Normalised points.
        key: Key of the Frechet distance.
    """
    names = list(
        dict.fromkeys(name for point in points for name, value in point["metrics"].items() if value is not None)
    )
    own = {key, *STANDARD, *(f"{name}{end}" for name in (*names, key) for end in DERIVED)}
    return [name for name in names if name not in own]


def distance(point: Point, key: str) -> float | None:
    """Frechet distance of a normalised point; None if the point can't be plotted, for lack of a distance or NFE."""
    value = point["metrics"].get(key)
    known = value is not None and value > 0 and point["nfe"] is not None and point["nfe"] > 0
    return value if known else None


def lacking(point: Point, key: str) -> list[str]:
    """Names of the unknown values of a normalised point, among those that every point should have.

    Args:
        point: Normalised point.
        key: Key of the Frechet distance.
    """
    extractor, settings = point["extractor"], point["settings"]
    sampled = not point.get("source")  # by diffaccel; otherwise given images, of which these values may be unknown
    values = {
        key: point["metrics"].get(key),
        **{name: point[name] for name in ("nfe", "method", *(("n", "seed") if sampled else ()))},
        **{part: settings[part].get("name") for part in ("prior", "solver") if sampled},
        "extractor": extractor["name"] and (extractor["sha256"] or not sampled),
        "reference": point["reference"]["sha256"],
    }
    return [name for name, value in values.items() if value is None]


def undrawn(points: Sequence[Point], key: str) -> list[str]:
    """Lines with the number of points that can't be drawn, and the number of drawn points with unknown values.

    Args:
        points: Points as read.
        key: Key of the Frechet distance.
    """
    hidden, partly = [], []
    for point in map(normalised, points):
        names = lacking(point, key)
        if distance(point, key) is None:
            hidden.append([name for name in names if name in (key, "nfe")] or [f"a positive {key} and nfe"])
        elif names:
            partly.append(names)
    lines = []
    for found, end in ((hidden, "not drawn"), (partly, "shown without them")):
        if found:
            names = list(dict.fromkeys(name for each in found for name in each))
            verb = "lacks" if len(found) == 1 else "lack"
            lines.append(f"{len(found)} of {len(points)} points {verb} {' or '.join(names)}: {end}")
    return lines
