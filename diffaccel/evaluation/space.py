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
        UsageError: A candidate has other keys.
    """
    found = []
    for number, candidate in enumerate(candidates):
        if not isinstance(candidate, Mapping) or not candidate or not candidate.keys() <= {*TUNABLE}:
            raise UsageError(f"search.candidates.{number}={candidate!r}: give a mapping with {' and '.join(TUNABLE)}")
        tree = merge(own, candidate)
        found.append({"prior": PRIORS.normal(tree["prior"]), "solver": SOLVERS.normal(tree["solver"])})
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
    grid = drawn["solver"].get("grid", {})
    if "name" in grid and GRIDS[grid["name"]] is Listed:  # its levels are found later
        name = grid["name"]
        grid.clear()
        grid.update(name=name, gamma=gamma or 1.0)
    return drawn


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
    grid = {key: value for key, value in solver.get("grid", {}).items() if key != "gamma"}
    return {**solver, "grid": grid} if grid else dict(solver)


def in_words(node: Mapping[str, Any]) -> str:
    """Describe a part in one line: dpmpp2m (denoise False, karras (rho 5))."""
    keys = [
        in_words(value) if isinstance(value, Mapping) else f"{key} {value}"
        for key, value in node.items()
        if key != "name" and value is not None
    ]
    return str(node["name"]) + (f" ({', '.join(keys)})" if keys else "")
