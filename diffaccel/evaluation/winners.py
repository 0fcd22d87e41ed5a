"""Winners of a search: the experiment ``best.yaml``.

It is based on the searched experiment, keeps the settings of the command line, and has the winners in ``by_nfe``.
Because entries of ``by_nfe`` are merged into the experiment's keys, they also contain the defaults of the keys that the
experiment sets and the winner does not.
"""

import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from diffaccel.config import TUNABLE, Config, files_of, load
from diffaccel.config.keys import map_paths
from diffaccel.errors import UsageError
from diffaccel.evaluation.space import Settings
from diffaccel.parts.catalogue import registry_of
from diffaccel.parts.overrides import FromEnvironment, as_given
from diffaccel.parts.registry import Registry, part_of
from diffaccel.parts.trees import merge, renames
from diffaccel.storage import whole


class Winners:
    """Winners of each budget, on disk.

    Args:
        path: File, ``best.yaml``.
        base: Searched experiment.
        own: Budget -> prior and solver of the experiment; infinity for those of no budget.
        given: Settings of the command line that the file keeps.
        identity: Hash of everything that the search measures with, except for budget, settings, n and seed.
        references: Words of the command line with references to the environment, without which the file can't be read.

    Attributes:
        settings: Budget -> prior and solver, with absolute paths; at first those of earlier searches.
        tuned_for: Hashes of the weights that they were searched for; empty for a new file.

    Raises:
        UsageError: The file is not from a search of this experiment, or its winners were measured with anything else.
    """

    def __init__(
        self,
        path: Path,
        base: Path,
        own: Callable[[float], Settings],
        given: Mapping[str, Any],
        identity: str,
        references: Sequence[str] = (),
    ) -> None:
        self.path, self.base, self.own, self.given = path, base, own, given
        self.identity, self.references = identity, references
        self.settings: dict[int, Settings] = {}
        self.tuned_for: list[str] = []
        if path.is_file():
            self._read()

    def _read(self) -> None:
        try:
            _, tree = next(files_of(self.path))
        except UsageError:
            tree = {}
        if tree.get("base") != str(self.base.resolve()) or not isinstance(tree.get("by_nfe"), dict):
            raise UsageError(
                f"{self.path} is not from a search of {self.base} and would be replaced: choose another out="
            )
        config = self._load(self.path)
        if config.search.identity != self.identity:
            raise UsageError(
                f"{self.path} contains winners that were measured with other parts, weights or statistics, or by an "
                "earlier version: choose another out="
            )
        self.settings = {budget: _absolute(config.at(budget)) for budget in tree["by_nfe"]}
        self.tuned_for = config.tuned_for

    def write(self, budget: int, settings: Settings, weights: Sequence[str]) -> bool:
        """Write the winner of a budget; those of other budgets, and the experiment's own settings, are kept.

        Args:
            budget: Budget.
            settings: Prior and solver of the winner.
            weights: Hashes of the weights that the settings of all budgets use.

        Returns:
            Whether the file had another winner of this budget.

        Raises:
            UsageError: The file can't be written, or has other settings once it is read.
        """
        own, settings = _absolute(self.own(budget)), _absolute(settings)
        before = self.settings.get(budget, own)
        self.settings[budget], self.tuned_for = settings, list(weights)
        with whole(self.path) as part:
            tree = self._tree()
            _dump(tree, part)
            below = self._load(part)
            budgets = dict.fromkeys([*below.by_nfe, *self.settings])
            wanted = {one: self.settings.get(one) or _absolute(self.own(one)) for one in budgets}
            _dump({**tree, "by_nfe": {one: _entry(wanted[one], below, one) for one in wanted}}, part)
            written = self._load(part)
            if wrong := [one for one in wanted if not _same(_absolute(written.at(one)), wanted[one])]:
                raise UsageError(
                    f"{self.path} can't express the winner of nfe={wrong[0]}, which is in trials.jsonl, over by_nfe of "
                    f"{self.base}: give all parts there their names, or remove by_nfe"
                )
        return not any(_same(before, one) for one in (settings, own))

    def _tree(self) -> dict[str, Any]:
        """Keys of the file without ``by_nfe``.

        Prior and solver have the names of all parts, so that an entry with another name replaces a part as a whole.
        Weights that the searched experiment names are inherited from it.
        """
        own, parts = self.own(math.inf), {}
        for part in TUNABLE:
            registry, given = registry_of(part), self.given.get(part, {})
            named = _over(registry, own[part], own[part])
            parts[part] = {key: value for key, value in named.items() if key not in registry.extra or key in given}
        search = {**self.given.get("search", {}), "identity": self.identity}
        return {
            "base": str(self.base.resolve()), **self.given, **parts, "search": search, "tuned_for": self.tuned_for
        }  # fmt: skip

    def _load(self, path: Path) -> Config:
        return load(str(path), self.references, trains=False)


def _dump(tree: Mapping[str, Any], path: Path) -> None:
    """Write a tree whose paths are relative to the working directory."""
    copied = copy.deepcopy(dict(tree))
    map_paths(copied, lambda one: one if isinstance(one, FromEnvironment) else os.path.relpath(one, path.parent))
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(as_given(copied))))


def _absolute(settings: Settings) -> Settings:
    """Copy settings, with absolute paths."""
    found = copy.deepcopy(settings)
    map_paths(found, lambda path: path if isinstance(path, FromEnvironment) else os.path.abspath(path))
    return found


def _entry(settings: Settings, below: Config, budget: int) -> Settings:
    """Return the entry of ``by_nfe`` that means the settings in a file whose other keys are those of ``below``."""
    own = _absolute({part: getattr(below, part) for part in TUNABLE})
    inherited = _absolute(below.by_nfe.get(budget, {}))
    found = {}
    for part, node in settings.items():
        for layer in (inherited.get(part), own[part]):
            node = node if layer is None else _over(registry_of(part), node, layer)
        merged = merge(own, inherited)[part]
        if all(merged.get(key) == node.get(key) for key in ("name", "checkpoint")):
            node.pop("checkpoint", None)  # inherited, so that the file may be moved
        found[part] = node
    return found


def _same(one: Settings, other: Settings) -> bool:
    """Whether settings are equal when the defaults of missing keys are added."""
    return all(
        one[part]["name"] == other[part]["name"]
        and _over(registry_of(part), one[part], other[part]) == _over(registry_of(part), other[part], one[part])
        for part in TUNABLE
    )


def _over(registry: Registry[Any], node: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    """Name all parts of a node, and add the defaults of keys that it would get from ``below`` if merged into it."""
    found = dict(node)
    defaults = registry.complete({"name": node["name"]})
    below = {} if renames(below, node) else below
    for key in below:
        found.setdefault(key, defaults.get(key))
    for key, value in found.items():
        inner, default, other = part_of(registry.annotation(key, node["name"])), defaults.get(key), below.get(key)
        if inner is None or not isinstance(value, Mapping):
            continue
        if "name" not in value and isinstance(default, Mapping):
            value = {"name": default["name"], **value}
        found[key] = _over(inner, value, other if isinstance(other, Mapping) else {})
    return found
