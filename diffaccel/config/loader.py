"""Configuration: schema, base file, experiment file, command line, in this order; the last word wins.

A file is a short difference over its ``base``. A part (solver, prior ...) is a mapping with a ``name``; the rest of its
keys are the parameters of the constructor registered under that name. A part given by a new name drops the old part's
keys. Paths in a file are relative to that file, paths on the command line to the working directory.
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # OmegaConf's parser

from diffaccel.config.keys import check_parts, holds_path, holds_text, map_paths, name_parts
from diffaccel.config.schema import PRECISIONS, TUNABLE, Config
from diffaccel.errors import UsageError, suggest
from diffaccel.parts import overrides
from diffaccel.parts.checks import check, check_finite, conform
from diffaccel.parts.overrides import FromEnvironment, as_given, as_plain, keep_references, refuse_references
from diffaccel.parts.trees import merge

_INSTALLED = Path(__file__).parents[1] / "experiments"  # in a wheel only: a clone has them at the top level
EXPERIMENTS = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2] / "experiments"


def load(
    experiment: str | None,
    settings: Iterable[str] = (),
    instead: Mapping[str, Any] | None = None,
    trains: bool = True,
) -> Config:
    """Read an experiment and apply overrides.

    Args:
        experiment: A path, or ``<data>/<method>`` under experiments/; None takes ``method=`` and ``data=`` from the
            overrides.
        settings: ``key=value`` words, see :mod:`diffaccel.parts.overrides`; keys may be dotted.
        instead: Keys of a command that does without the experiment's own values; the settings are laid over them.
        trains: Whether the keys of the method are kept. Sampling needs none of them, and to check them takes Lightning,
            which takes seconds to import.

    Returns:
        The typed configuration.

    Raises:
        UsageError: A missing or unreadable file, an unknown key, a value of the wrong type or out of range.
    """
    given = parse_overrides(settings, trains)
    if experiment is None:
        experiment = _chosen(given)
    file = find(experiment)
    tree = merge(merge(read(file, given=given, trains=trains), instead or {}), given)
    check_finite(tree, experiment)
    _check_keys(tree)
    tree["experiment"] = experiment if not Path(experiment).is_file() else str(file)
    _tune(tree, given)
    check_parts(tree)
    if "shape" not in tree:
        raise UsageError(f"{experiment}: the key 'shape' is missing: give [channels, height, width]")
    config = _typed(tree, experiment)
    _check(config)
    return config


def _check_keys(tree: dict[str, Any]) -> None:
    known = {item.name for item in dataclasses.fields(Config)}
    for key in tree:
        if key not in known:
            raise UsageError(f"no key is called {key!r}{suggest(str(key), known)}")


def _typed(tree: dict[str, Any], experiment: str) -> Config:
    """Bring a tree to the schema's types.

    Raises:
        UsageError: A value can't be.
    """
    if "nfe" in tree and tree["nfe"] in (None, "none", "None"):
        tree["nfe"] = [math.inf]
    if isinstance(tree.get("nfe"), int | float):
        tree["nfe"] = [tree["nfe"]]
    if "precision" in tree:
        tree["precision"] = PRECISIONS.get(str(tree["precision"]), tree["precision"])
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), as_plain(conform("", tree, Config))))
    except OmegaConfBaseException as error:
        where = f"{experiment}: the key {error.full_key!r}" if error.full_key else experiment
        raise UsageError(f"{where}: {str(error).splitlines()[0]}") from None
    assert isinstance(config, Config)
    keep_references(config, tree)
    return config


def _chosen(given: dict[str, Any]) -> str:
    """Take the names ``data`` and ``method``, which are an experiment's here, out of the overrides."""
    parts = [given[key] for key in ("data", "method") if isinstance(given.get(key), dict)]
    names = [part.pop("name", None) for part in parts]
    if len(names) < 2 or not all(isinstance(name, str) for name in names):
        raise UsageError("which experiment? Name one (digits/dlg, or a path), or give method=NAME data=NAME")
    return "/".join(names)


def find(experiment: str) -> Path:
    """Locate an experiment's file.

    Raises:
        UsageError: Neither a file nor a name under experiments/.
    """
    for path in (Path(os.path.expanduser(experiment)), EXPERIMENTS / f"{experiment}.yaml"):
        if path.is_file():
            return _nearby(path)
    names = sorted(p.relative_to(EXPERIMENTS).with_suffix("").as_posix() for p in EXPERIMENTS.glob("*/*.yaml"))
    names = [name for name in names if not name.endswith("/base")]
    raise UsageError(f"experiment {experiment!r} is neither a file nor under {EXPERIMENTS}{suggest(experiment, names)}")


def _nearby(path: Path) -> Path:
    """The path from the working directory if it lies below, else as it is: short in messages and in points."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def read(
    file: Path, above: tuple[Path, ...] = (), given: Mapping[str, Any] | None = None, trains: bool = True
) -> dict[str, Any]:
    """Read a YAML file over its ``base``, with paths resolved.

    Args:
        file: The file.
        above: The files that it is a base of.
        given: What the command line sets.
        trains: See :func:`load`.

    Raises:
        UsageError: Not YAML, not a mapping, a reference, or a base that doesn't exist or is based on this file.
    """
    try:
        tree = OmegaConf.to_container(OmegaConf.load(file))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{file} is no valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{file} holds no mapping of keys to values")
    own = merge({}, {str(key): value for key, value in tree.items()})
    _drop_training(own, trains)
    name_parts(own)
    refuse_references(own, file, given)
    base = own.pop("base", None)

    def resolve(path: str) -> str:
        return os.path.normpath(file.parent / Path(path).expanduser())

    if base is None:
        map_paths(own, resolve)
        return own
    parent = file.parent / str(base)
    if not parent.is_file():
        raise UsageError(f"{file}: its base {parent} does not exist")
    if parent.resolve() in above or parent.samefile(file):
        raise UsageError(f"{file}: its base {parent} is in turn based on it: remove one of the two")
    below = read(parent, (*above, file.resolve()), given, trains)
    map_paths(own, resolve, below)
    return merge(below, own)


def _drop_training(tree: dict[str, Any], trains: bool) -> None:
    """Leave the method's name and label alone, in place, if nothing is trained."""
    if not trains and isinstance(method := tree.get("method"), Mapping):
        tree["method"] = {key: value for key, value in method.items() if key in ("name", "label")}


def parse_overrides(words: Iterable[str], trains: bool = True) -> dict[str, Any]:
    """Turn ``key=value`` words into a tree.

    Raises:
        UsageError: A word that is no setting, or whose value can't be read.
    """
    tree = overrides.parse(list(words), holds_path, holds_text)
    _drop_training(tree, trains)
    name_parts(tree)
    map_paths(tree, lambda path: path if isinstance(path, FromEnvironment) else os.path.expanduser(path))
    return tree


def _tune(tree: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Check ``by_nfe`` and lay what the command line says over each of its entries, in place.

    Raises:
        UsageError: A budget that is no positive whole number, or an entry with other keys than prior and solver.
    """
    entries = tree.get("by_nfe") or {}
    if not isinstance(entries, dict):
        raise UsageError(f"by_nfe={entries!r}: give budgets, each with a prior and a solver")
    tree["by_nfe"] = entries
    if "by_nfe" in given and "tuned_for" not in given:
        tree["tuned_for"] = []  # the user's own settings, for whatever weights
    own = {part: given[part] for part in TUNABLE if part in given}
    for budget, entry in entries.items():
        if not isinstance(budget, int) or budget < 1:
            raise UsageError(f"by_nfe: {budget!r} is no budget: give a positive whole number")
        if not isinstance(entry, dict) or not entry.keys() <= set(TUNABLE):
            raise UsageError(f"by_nfe.{budget}={entry!r}: give a mapping with the keys {' and '.join(TUNABLE)}")
        entries[budget] = merge(entry, own)


def _check(config: Config) -> None:
    """Refuse what no run can mean."""
    for key, part in (("method", config.method), ("data", config.data)):
        if "name" not in part:
            raise UsageError(f"{config.experiment}: the key '{key}' is missing: give its name")
    check(config)


def as_written(config: Config) -> dict[str, Any]:
    """Return the configuration as a tree to write: references to the environment stay references."""
    return cast(dict[str, Any], as_given(dataclasses.asdict(config)))


def to_yaml(config: Config, folder: Path = Path()) -> str:
    """Write the resolved configuration as YAML, which ``load`` reads back to the same from a file in ``folder``."""
    tree = as_written(config)
    if tree["nfe"] == [math.inf]:
        tree["nfe"] = None
    map_paths(tree, lambda path: path if os.path.isabs(path) or "${" in path else os.path.relpath(path, folder))
    return OmegaConf.to_yaml(OmegaConf.create(tree))
