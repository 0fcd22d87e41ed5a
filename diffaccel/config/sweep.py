"""Sweeps in the format of W&B: files with parameters and their values, and the commands that they stand for.

The same file is run by ``wandb agent`` and by ``diffaccel sweep``. Both write the values of a run in place of
``${args}``, or another form of it, in the file's ``command``.
"""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from diffaccel.config.loader import EXPERIMENTS, SWEEPS
from diffaccel.errors import UsageError, suggest
from diffaccel.parts.checks import check_finite
from diffaccel.parts.overrides import ALIASES

KEYS = ("program", "command", "method", "parameters", "metric", "name", "description", "project", "entity", "run_cap")
METHODS = ("grid", "random", "bayes")
PROGRAM = "diffaccel"
COMMAND = 'command: [diffaccel, bench, "${args_no_hyphens}"]'

Values = dict[str, Any]
"""Values of the parameters of a run."""


@dataclass(frozen=True)
class Sweep:
    """Sweep, as read from a file.

    Attributes:
        name: Name of the sweep.
        command: Words after ``diffaccel``, with placeholders for the values.
        method: ``grid``, ``random`` or ``bayes``.
        parameters: Name -> W&B's description of the values.
        run_cap: Maximum number of runs; None for no limit.
        metric: Name of the value to optimise.
    """

    name: str
    command: tuple[str, ...]
    method: str
    parameters: Mapping[str, Any]
    run_cap: int | None = None
    metric: str | None = None

    def without(self, names: set[str]) -> "Sweep":
        """Remove the parameters with these names, or below them; short keys of parameters stand for their long ones."""
        kept = {
            key: spec
            for key, spec in self.parameters.items()
            if not any(f"{ALIASES.get(key, key)}.".startswith(f"{name}.") for name in names)
        }
        return replace(self, parameters=kept)

    def runs(self, count: int | None = None) -> list[Values]:
        """Return the values of each run: all combinations of a grid, or draws.

        Draws are determined by the parameters and their index, so that a longer sweep begins with a shorter one's runs.

        Args:
            count: Maximum number of runs; by default ``run_cap``.

        Raises:
            UsageError: A parameter has no list of values in a grid, or there is no number of draws.
        """
        count = self.run_cap if count is None else count
        if self.method == "grid":
            return list(itertools.islice(_combinations(self.parameters), count))
        if count is None:
            raise UsageError(f"{self.name}: the method {self.method} requires a number of runs: set count=, or run_cap")
        described = json.dumps(self.parameters, sort_keys=True, default=str)
        seed = int.from_bytes(hashlib.sha256(described.encode()).digest()[:8], "big")
        return [_draw(self.parameters, np.random.default_rng([seed, i])) for i in range(count)]

    def words(self, values: Values) -> list[str]:
        """Return the words of a run after ``diffaccel``, as W&B's agent writes them."""
        return [word for part in self.command for word in (FORMS[part](values) if part in FORMS else [part])]


FORMS: dict[str, Callable[[Values], list[str]]] = {
    "${args}": lambda values: [f"--{key}={value}" for key, value in values.items()],
    "${args_no_hyphens}": lambda values: [f"{key}={value}" for key, value in values.items()],
    "${args_no_equals}": lambda values: [word for key, value in values.items() for word in (f"--{key}", str(value))],
    "${args_no_boolean_flags}": lambda values: [
        f"--{key}" if value is True else f"--{key}={value}" for key, value in values.items() if value is not False
    ],
}
"""Placeholder in a command -> words for the values of a run."""


def sweep_names() -> list[str]:
    """Return the names of the shipped sweeps."""
    return sorted(file.stem for file in (EXPERIMENTS / SWEEPS).glob("*.yaml"))


def read_sweep(source: str | Path) -> Sweep:
    """Read a sweep.

    Args:
        source: File, or name of a file under experiments/sweeps.

    Raises:
        UsageError: The file is missing, is not YAML, or is not a sweep of a diffaccel command.
    """
    name = str(source).removeprefix(f"{SWEEPS}/")
    files = (Path(source).expanduser(), EXPERIMENTS / SWEEPS / f"{name}.yaml")
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UsageError(
            f"sweep {str(source)!r} is neither a file nor under {EXPERIMENTS / SWEEPS}{suggest(name, sweep_names())}"
        )
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{file} is not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("parameters"), dict):
        raise UsageError(f"{file} is not a sweep: it has no mapping 'parameters'")
    for key in tree:
        if key not in KEYS:
            raise UsageError(f"{file}: a sweep has no key {key!r}{suggest(str(key), KEYS)}")
    method, cap = tree.get("method"), tree.get("run_cap")
    if method not in METHODS:
        raise UsageError(f"{file}: method={method!r}{suggest(str(method), METHODS)}")
    if cap is not None and (not isinstance(cap, int) or cap < 1):
        raise UsageError(f"{file}: run_cap={cap!r} is not a positive whole number")
    for key, spec in tree["parameters"].items():
        _check(spec, f"{file}: {key}", method)
    metric = tree.get("metric") or {}
    return Sweep(
        str(tree.get("name") or file.stem),
        _command(tree, file),
        method,
        tree["parameters"],
        cap,
        metric.get("name") if isinstance(metric, dict) else None,
    )


def _command(tree: Mapping[str, Any], file: Path) -> tuple[str, ...]:
    """Words of a sweep's command after ``diffaccel``."""
    given = tree.get("command")
    words = [str(word) for word in given] if isinstance(given, list) else []
    words = [str(tree.get("program")) if word == "${program}" else word for word in words]
    names = [os.path.basename(word) for word in words]
    own = words[names.index(PROGRAM) + 1 :] if PROGRAM in names else []
    unknown = [word for word in own if word.startswith("${") and word not in FORMS]
    if unknown:
        raise UsageError(f"{file}: command contains {unknown[0]}{suggest(unknown[0], FORMS)}")
    if not own or not FORMS.keys() & set(own):
        raise UsageError(f"{file} has no command of diffaccel: write `{COMMAND}`")
    return tuple(own)


# Values


def _uniform(rng: np.random.Generator, spec: Mapping[str, Any]) -> float:
    return float(rng.uniform(spec["min"], spec["max"]))


def _normal(rng: np.random.Generator, spec: Mapping[str, Any]) -> float:
    return float(rng.normal(spec.get("mu", 0.0), spec.get("sigma", 1.0)))


def _log_values(rng: np.random.Generator, spec: Mapping[str, Any]) -> float:
    return math.exp(rng.uniform(math.log(spec["min"]), math.log(spec["max"])))


CONTINUOUS: dict[str, Callable[[np.random.Generator, Mapping[str, Any]], float]] = {
    "uniform": _uniform,
    "log_uniform": lambda rng, spec: math.exp(_uniform(rng, spec)),
    "log_uniform_values": _log_values,
    "inv_log_uniform": lambda rng, spec: math.exp(-_uniform(rng, spec)),
    "inv_log_uniform_values": _log_values,  # log(1/X) is uniform where log(X) is
    "normal": _normal,
    "log_normal": lambda rng, spec: math.exp(_normal(rng, spec)),
    "beta": lambda rng, spec: float(rng.beta(spec.get("a", 1.0), spec.get("b", 1.0))),
}
"""Names of W&B's distributions of real numbers; with the prefix ``q_``, of multiples of ``q``."""
DISTRIBUTIONS = ("constant", "categorical", "int_uniform", *CONTINUOUS, *(f"q_{name}" for name in CONTINUOUS))
POSITIVE = ("log_uniform_values", "inv_log_uniform_values")


def _kind(spec: Mapping[str, Any]) -> str:
    """Distribution of a parameter, which W&B infers if it is not given."""
    if "distribution" in spec:
        return str(spec["distribution"])
    if "value" in spec or "values" in spec:
        return "constant" if "value" in spec else "categorical"
    return "int_uniform" if all(isinstance(spec.get(key), int) for key in ("min", "max")) else "uniform"


def _check(spec: Any, where: str, method: str) -> None:
    """Check the description of a parameter.

    Raises:
        UsageError: It is not one of W&B's, or it has no list of values, which a grid requires.
    """
    if not isinstance(spec, dict):
        raise UsageError(f"{where}={spec!r}: give a mapping, {{value: {spec!r}}} for example")
    if "parameters" in spec:
        for key, inner in spec["parameters"].items():
            _check(inner, f"{where}.{key}", method)
        return
    kind = _kind(spec)
    if kind not in DISTRIBUTIONS:
        raise UsageError(f"{where}: distribution={kind!r}{suggest(kind, DISTRIBUTIONS)}")
    required = {"constant": ["value"], "categorical": ["values"]}.get(kind, ["min", "max"] if "uniform" in kind else [])
    if missing := [key for key in required if key not in spec]:
        raise UsageError(f"{where}: the distribution {kind} requires {' and '.join(missing)}")
    if kind == "categorical":
        values, probabilities = spec["values"], spec.get("probabilities")
        if not isinstance(values, list) or not values:
            raise UsageError(f"{where}: values={values!r}: give a list")
        if probabilities is not None and (len(probabilities) != len(values) or abs(sum(probabilities) - 1) > 1e-6):
            raise UsageError(f"{where}: probabilities={probabilities}: give one for each value, with the sum 1")
        return
    if kind == "constant":
        return
    if method == "grid" and kind != "int_uniform":
        raise UsageError(f"{where}: a grid requires a list of values, not the distribution {kind}")
    numbers = {key: spec[key] for key in ("min", "max", "mu", "sigma", "a", "b", "q") if key in spec}
    if wrong := [key for key, value in numbers.items() if type(value) not in (int, float)]:
        raise UsageError(f"{where}: {wrong[0]}={numbers[wrong[0]]!r} is not a number (YAML requires 1.0e-3 for 1e-3)")
    check_finite(numbers, where)
    if required and not spec["min"] <= spec["max"]:
        raise UsageError(f"{where}: min={spec['min']} is above max={spec['max']}")
    if kind.removeprefix("q_") in POSITIVE and spec["min"] <= 0:
        raise UsageError(f"{where}: min={spec['min']} has no logarithm: give a positive one")


def _combinations(parameters: Mapping[str, Any]) -> Iterator[Values]:
    """Yield all combinations of a grid, the last parameter varying fastest."""
    choices = [_choices(spec) for spec in parameters.values()]
    for values in itertools.product(*choices):
        yield dict(zip(parameters, values, strict=True))


def _choices(spec: Mapping[str, Any]) -> list[Any]:
    if "parameters" in spec:
        return list(_combinations(spec["parameters"]))
    if _kind(spec) == "int_uniform":
        return list(range(spec["min"], spec["max"] + 1))
    return [spec["value"]] if _kind(spec) == "constant" else list(spec["values"])


def _draw(parameters: Mapping[str, Any], rng: np.random.Generator) -> Values:
    return {key: _draw_one(spec, rng) for key, spec in parameters.items()}


def _draw_one(spec: Mapping[str, Any], rng: np.random.Generator) -> Any:
    if "parameters" in spec:
        return _draw(spec["parameters"], rng)
    kind = _kind(spec)
    if kind == "constant":
        return spec["value"]
    if kind == "categorical":
        return spec["values"][rng.choice(len(spec["values"]), p=spec.get("probabilities"))]
    if kind == "int_uniform":
        return int(rng.integers(spec["min"], spec["max"], endpoint=True))
    drawn = CONTINUOUS[kind.removeprefix("q_")](rng, spec)
    if not kind.startswith("q_"):
        return drawn
    step = spec.get("q", 1)
    return round(drawn / step) * step
