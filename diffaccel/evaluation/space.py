"""Search space: random settings of prior and solver, and listed candidates."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffaccel.config import TUNABLE
from diffaccel.errors import UsageError
from diffaccel.parts.registry import Registry
from diffaccel.parts.schema import suggest_key
from diffaccel.parts.trees import merge
from diffaccel.prior import PRIORS
from diffaccel.solver import GRIDS, SOLVERS, Listed

Settings = dict[str, dict[str, Any]]
"""``{"prior": ..., "solver": ...}``, with the name and keys of each part."""


def check_space(space: Mapping[str, Any]) -> None:
    """Check the keys, names and values of a search space.

    Args:
        space: Dotted key -> a list of values, or ``{low, high}`` with ``log: true`` or ``integer: true``. The key
            ``gamma`` applies to ``listed`` grids, whose levels are found by dynamic programming.

    Raises:
        UsageError: The space is empty, a key belongs to no prior or solver, a name is unknown, or values are neither a
            list nor a range.
    """
    if not space:
        raise UsageError("there is nothing to search, because the experiment has no search.space: set it")
    registries: dict[str, Registry[Any]] = {"prior": PRIORS, "solver": SOLVERS}
    for key, values in space.items():
        _value(key, values, np.random.default_rng(0))
        part, *path = key.split(".")
        registry = registries.get(part)
        if key == "gamma":
            if isinstance(values, list) and not all(map(_is_gamma, values)):
                raise UsageError(f"search.space.gamma={values!r}: give positive numbers")
            continue
        if registry is None or not path:
            raise UsageError(f"search.space: {key!r} is neither gamma nor a key of {' or '.join(TUNABLE)}")
        if key in ("prior.chains", "prior.restart_every"):
            raise UsageError(
                f"search.space.{key}: rounds have different numbers of images, so that chains would differ in length: "
                "replace it by prior.images_per_chain, n / chains"
            )
        while registry is not None and path:
            known = {"name"} | registry.known_keys()
            if path[0] not in known:
                raise UsageError(f"search.space: no {registry.kind} has a key {path[0]!r}{suggest_key(path[0], known)}")
            if path == ["name"]:
                for name in values:
                    registry[name]  # an unknown one is an error
            registry = registry.nested.get(path.pop(0))


def candidates_of(candidates: Sequence[Any], own: Settings) -> list[Settings]:
    """Complete listed candidates by the experiment's own settings, as entries of ``by_nfe`` are.

    Args:
        candidates: Mappings ``{prior: ..., solver: ...}``; a part with another name replaces the experiment's.
        own: Prior and solver of the experiment.

    Raises:
        UsageError: A candidate has other keys or an empty part, or ``gamma`` beside given levels or for another grid.
    """
    found = []
    for number, candidate in enumerate(candidates):
        where = f"search.candidates.{number}"
        if not isinstance(candidate, Mapping) or not candidate or not candidate.keys() <= {*TUNABLE}:
            raise UsageError(f"{where}={candidate!r}: give a mapping with {' and '.join(TUNABLE)}")
        for part, node in candidate.items():
            if not isinstance(node, str | Mapping):
                raise UsageError(f"{where}.{part}={node!r}: give a name, or a mapping of keys to values")
        tree = merge(own, candidate)
        solver = SOLVERS.normal(tree["solver"])
        if (gamma := gamma_of(solver)) is not None:
            given = SOLVERS.normal(candidate["solver"])["grid"]
            if not _is_listed(solver["grid"]) or given.keys() - {"name", "gamma"} or not _is_gamma(gamma):
                raise UsageError(
                    f"{where}.solver.grid={given}: gamma, a positive number, is for a listed grid whose levels are "
                    "searched: give {name: listed, gamma: 1.1}, or remove gamma"
                )
            solver = {**solver, "grid": _to_find(solver["grid"]["name"], gamma)}
        found.append({"prior": PRIORS.normal(tree["prior"]), "solver": solver})
    return found


def draw(space: Mapping[str, Any], own: Settings, rng: np.random.Generator) -> Settings:
    """Draw settings: the experiment's settings with drawn values, without keys that the drawn parts don't have.

    Args:
        space: Search space, see :func:`check_space`.
        own: Prior and solver of the experiment.
        rng: Random generator.
    """
    tree: dict[str, Any] = dict(own)
    gamma = None
    for key, values in space.items():
        value = _value(key, values, rng)
        if key == "gamma":
            gamma = value
            continue
        for name in reversed(key.split(".")):
            value = {name: value}
        tree = merge(tree, value)
    drawn = {"prior": _known(PRIORS, tree["prior"]), "solver": _known(SOLVERS, tree["solver"])}
    if "checkpoint" in own["prior"] and drawn["prior"]["name"] == own["prior"]["name"]:
        drawn["prior"]["checkpoint"] = own["prior"]["checkpoint"]  # not an argument of the prior, but read afterwards
    if _is_listed(grid := drawn["solver"].get("grid") or {}):
        drawn["solver"]["grid"] = _to_find(grid["name"], gamma or 1.0)
    return drawn


def _is_listed(grid: Mapping[str, Any]) -> bool:
    return "name" in grid and GRIDS[grid["name"]] is Listed


def _is_gamma(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _to_find(name: str, gamma: float) -> dict[str, Any]:
    """Node of a listed grid whose levels are found later."""
    return {"name": name, "gamma": gamma}


def gamma_of(solver: Mapping[str, Any]) -> Any:
    """Return the ``gamma`` of a solver's grid whose levels are to be found; None if they are given."""
    return (solver.get("grid") or {}).get("gamma")


def _value(key: str, values: Any, rng: np.random.Generator) -> Any:
    if isinstance(values, list) and values:
        return values[rng.integers(len(values))]
    if not isinstance(values, Mapping) or not {"low", "high"} <= values.keys() <= {"low", "high", "log", "integer"}:
        raise UsageError(f"search.space.{key}={values!r}: give a list of values, or {{low, high}} with log or integer")
    low, high = values["low"], values["high"]
    whole, log = bool(values.get("integer")), bool(values.get("log"))
    if not all(type(end) is int or (type(end) is float and not whole) for end in (low, high)):
        raise UsageError(f"search.space.{key}={values!r}: low and high must be {'whole ' * whole}numbers")
    if low > high or (log and (low <= 0 or whole)):
        rule = "low must not exceed high" if low > high else "log requires a positive low, and excludes integer"
        raise UsageError(f"search.space.{key}={values!r}: {rule}")
    if values.get("integer"):
        return int(rng.integers(low, high + 1))
    drawn = math.exp(rng.uniform(math.log(low), math.log(high))) if values.get("log") else rng.uniform(low, high)
    return float(f"{drawn:.3g}")


def _known(registry: Registry[Any], node: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a part, and the parts in it, without the keys that parts of their names don't have."""
    node = registry.normal(node)
    keys = registry.keys_of(node["name"])
    known = {key: value for key, value in node.items() if key == "name" or key in keys}
    for key, nested in registry.nested.items():
        if isinstance(known.get(key), Mapping) and "name" in known[key]:
            known[key] = _known(nested, known[key])
    return known


def without_gamma(solver: Mapping[str, Any]) -> dict[str, Any]:
    """Return a solver's node without the key of a grid that is to be found."""
    if gamma_of(solver) is None:
        return dict(solver)
    return {**solver, "grid": {key: value for key, value in solver["grid"].items() if key != "gamma"}}


def in_words(node: Mapping[str, Any], kind: str = "") -> str:
    """Describe a part in one line: dpmpp2m (denoise False, karras (rho 5)); ``kind`` stands for a missing name."""
    keys = [
        in_words(value, key) if isinstance(value, Mapping) else f"{key} {value}"
        for key, value in node.items()
        if key != "name" and value is not None
    ]
    return str(node.get("name", kind)) + (f" ({', '.join(keys)})" if keys else "")
