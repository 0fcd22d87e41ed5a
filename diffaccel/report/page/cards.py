"""Provenance cards: what a point was measured on, and the command that repeats it."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from diffaccel.report.commands import command_of, differs
from diffaccel.report.points import Point
from diffaccel.report.rows import Row
from diffaccel.text.terminal import number

Entries = list[tuple[str, str]]
"""Names and texts of a section."""


def card_of(row: Row, key: str) -> dict[str, Any]:
    """Return the card of a point as plain JSON: sections of names and texts, and the command.

    Args:
        row: Row of the point.
        key: Key of the Frechet distance.
    """
    point = row.point
    sections: dict[str, Entries] = {
        "scores": list(_scores(point, key)),
        "sampling": list(_sampling(point)),
        "cost": list(_cost(point)),
        "weights": list(_weights(point)),
        "judge": list(_judge(point)),
        "machine": list(_machine(point)),
        "file": list(_known({"folder": str(row.folder), "key": point["key"], "images": point["images_sha256"]})),
    }
    return {
        "sections": [[name, entries] for name, entries in sections.items() if entries],
        "command": command_of(point),
        "warning": differs(point),
    }


def _known(values: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if value is not None and value != "":
            yield name, value if isinstance(value, str) else json.dumps(value, default=str)


def _scores(point: Point, key: str) -> Iterator[tuple[str, str]]:
    metrics = point["metrics"]
    ends = ("_se", "_inf", "_floor", "_real")
    for name, value in metrics.items():
        if value is None or any(name.endswith(end) and name.removesuffix(end) in metrics for end in ends):
            continue
        text = number(value)
        if (error := metrics.get(f"{name}_se")) is not None:
            text += f" ± {number(error, 2)}"
        known = [(label, metrics.get(name + end)) for end, label in (("_inf", "n → ∞"), ("_floor", "real images"),
                                                                     ("_real", "real images"))]  # fmt: skip
        said = [f"{label} {number(one)}" for label, one in known if one is not None]
        yield (f"{name}@{point['n']}" if name == key else name), text + (f" ({', '.join(said)})" if said else "")


def _sampling(point: Point) -> Iterator[tuple[str, str]]:
    settings = point["settings"]
    yield from _known(
        {
            "method": point["method"],
            "experiment": point["experiment"],
            "data": point["data"],
            "process": point["process"],
            "solver": _flow(settings["solver"]) or None,
            "prior": _flow(settings["prior"]) or None,
            "settings": "searched for each NFE" if point["tuned"] else None,
            "images": point["n"],
            "seed": point["seed"],
            "noise": point["noise"],
            "chains": point["chains"],
            "source": point.get("source"),
        }
    )


def _flow(node: Mapping[str, Any]) -> str:
    """Settings of a part on one line: ``heun (grid: karras (rho: 7))``."""
    rest = [f"{key}: {_value(value)}" for key, value in node.items() if key != "name"]
    return str(node.get("name") or "") + (f" ({', '.join(rest)})" if rest else "")


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return _flow(value)
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _cost(point: Point) -> Iterator[tuple[str, str]]:
    names = {
        "nfe_budget": "budget",
        "nfe": "NFE",
        "nfe_marginal": "of it for the image",
        "nfe_burn_in": "of it burn-in",
        "nfe_sequential": "sequential",
        "nfe_equivalent": "NFE of equal FLOPs",
        "gflops_per_image": "GFLOPs per image",
        "seconds_per_image": "seconds per image",
    }
    yield from ((label, number(point[key])) for key, label in names.items() if point[key] is not None)


def _weights(point: Point) -> Iterator[tuple[str, str]]:
    checkpoint = point["checkpoint"] or {}
    yield from _known(
        {
            "file": checkpoint.get("path"),
            "SHA-256": checkpoint.get("sha256"),
            "images seen": checkpoint.get("images_seen"),
            **{f"SHA-256 of the {name}'s tensors": known for name, known in point["weights"].items()},
        }
    )


def _judge(point: Point) -> Iterator[tuple[str, str]]:
    extractor, reference, floor = point["extractor"], point["reference"], point["floor"] or {}
    yield from _known(
        {
            "extractor": extractor["name"],
            "features": extractor.get("dim"),
            "SHA-256": extractor["sha256"],
            "reference": " ".join(str(part) for part in (reference["name"], reference.get("split")) if part) or None,
            "reference images": reference.get("n"),
            "reference SHA-256": reference["sha256"],
            "held-out images": floor.get("n"),
            "held-out SHA-256": floor.get("sha256"),
        }
    )


def _machine(point: Point) -> Iterator[tuple[str, str]]:
    versions = point.get("versions")
    listed = ", ".join(f"{name} {one}" for name, one in versions.items()) if isinstance(versions, Mapping) else None
    yield from _known(
        {
            "device": point["device"],
            "precision": point["precision"],
            "threads": point.get("threads"),
            "processes": point.get("world_size"),
            "versions": listed,
            "commit": point.get("git"),
        }
    )
