"""``list`` and ``explain``: parts by name, described by their constructors and docstrings."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

from rich.table import Table

from diffaccel.errors import UsageError
from diffaccel.parts.catalogue import CATALOGUE, DESCRIPTIONS, registry_of
from diffaccel.parts.docstrings import documented_keys, first_line, first_paragraph, references
from diffaccel.parts.registry import Registry, part_of
from diffaccel.text.escape import printable
from diffaccel.text.terminal import print_lines, wide_console
from diffaccel.verbs.listed import Key, Listed, list_experiments, list_keys, list_sweeps, type_in_words

HELP = """\
list WHAT
list experiments, sweeps, weights, keys, or the parts of a group

`diffaccel list` prints what can be listed; `diffaccel list experiments` and `diffaccel list experiments digits` the
shipped experiments, `diffaccel list solver` the solvers, `diffaccel list solver heun` the keys of one, and
`diffaccel list keys` and `diffaccel list keys training` the keys of an experiment. `diffaccel list weights digits`
prints a model card of each weights file, from its header and the shipped points.

Keys:
  format=markdown          in `list weights`, a table in Markdown
"""
EXPLAIN_HELP = """\
explain GROUP NAME
describe a part: keys, defaults, references, experiments

The groups are those of `diffaccel list`: solver, prior, method, metric ...
"""
LIST_USAGE = "list accepts at most a group of parts and the name of a part: `diffaccel list solver heun`"
EXPLAIN_USAGE = "explain requires a group and a name: `diffaccel explain solver heun`"


WEIGHTS = "shipped weights, with their training and distances; `diffaccel list weights digits` those of a data set"

LISTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "experiments": ("shipped experiments; `diffaccel list experiments digits` those of a data set", list_experiments),
    "sweeps": ("shipped sweeps, for `diffaccel sweep`", list_sweeps),
    "keys": ("keys of an experiment; `diffaccel list keys training` those of a section", list_keys),
}
"""Lists besides those of parts: name -> description, and the function that makes the list."""

EXTRA = {
    "samples": "Number of samples per test image, in succession; 1 if not set.",
    "seed": "Seed of random degradations of the test images; 0 if not set.",
    "lpips": "Whether to measure LPIPS to the test images; false if not set.",
    "checkpoint": "Weights of the part's own networks.",
    "std": "Standard deviation of the latents that the diffusion sees; 1 if not set.",
    "sample": "Whether latents are draws from the encoder's posterior, or its means; true if not set.",
    "cache": "Folder of encoded training images; runs/<data>/latents if not set.",
    "init": "Initial weights of these networks in a fit.",
    "metric": "Name of the features in metrics; only for the method `extractor`.",
    "resident": "Whether training images stay on the device; auto: in memory, and a quarter of a GPU's at most.",
    "label": "Name in points and tables; the method's own by default.",
}
"""Descriptions of keys that are not parameters of constructors."""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Description of a part from its constructor and docstring.

    Attributes:
        group: Group of the part.
        name: Name of the part.
        what: First paragraph of the docstring.
        source: Definition of the part, ``module.Class``.
        plugin: Plugin of the part; None for built-in parts.
        keys: Keys of the part, in the order of the constructor.
        references: Lines of the references.
        experiments: Shipped experiments that use the part.
    """

    group: str
    name: str
    what: str
    source: str
    plugin: str | None
    keys: list[Key]
    references: list[str]
    experiments: list[str]


def list_parts(group: str | None = None) -> list[Listed]:
    """List the groups of parts, or the parts of a group.

    Raises:
        UsageError: There is no such group.
    """
    if group is None:
        return [Listed(name, DESCRIPTIONS[name]) for name in CATALOGUE]
    registry = registry_of(group)
    return [Listed(name, first_line(registry[name]), registry.plugin_of(name)) for name in sorted(registry)]


def explain(group: str, name: str) -> Explanation:
    """Describe a part.

    Raises:
        UsageError: The group or part is unknown, or the constructor of the part can't be inspected.
    """
    registry = registry_of(group)
    factory: Any = registry[name]
    return Explanation(
        group,
        name,
        first_paragraph(factory),
        f"{factory.__module__}.{factory.__qualname__}",
        registry.plugin_of(name),
        _keys(registry, name),
        references(factory),
        _experiments(group, name),
    )


def _keys(registry: Registry[Any], name: str) -> list[Key]:
    said, annotations = documented_keys(registry[name]), registry.annotations(name)
    found = []
    for item in dataclasses.fields(registry.schema(name)):
        factory = item.default_factory
        default = item.default if factory is dataclasses.MISSING else factory()
        shown = None if default == "???" else _value(default, part_of(annotations[item.name]))
        found.append(Key(item.name, type_in_words(annotations[item.name]), shown, said.get(item.name, "")))
    return found + [Key(key, type_in_words(kind), "null", EXTRA[key]) for key, kind in registry.extra.items()]


def _value(value: Any, registry: Registry[Any] | None) -> str:
    """Write a default as in a YAML file, in one line."""
    if registry is not None and (node := registry.node_of(value)) is not None:
        value = node
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_value(item, None)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item, None) for item in value) + "]"
    if isinstance(value, float):
        return f".{value}" if math.isinf(value) else f"{value:.6g}"
    return (value if value else "''") if isinstance(value, str) else json.dumps(value, default=str)


def _experiments(group: str, name: str) -> list[str]:
    """Names of the shipped experiments that use a part."""
    return [one for one, tree in _shipped() if _uses(tree, group, name)]


@cache
def _shipped() -> list[tuple[str, Any]]:
    """Names of the shipped experiments with their contents."""
    # Imported here, because it takes seconds and a list does not use it.
    from diffaccel.config import experiment_names, find, read

    return [(one, read(find(one))) for one in experiment_names()]


def _uses(tree: Any, group: str, name: str) -> bool:
    if isinstance(tree, list):
        return any(_uses(one, group, name) for one in tree)
    if not isinstance(tree, Mapping):
        return False
    part = tree.get(group)
    return (isinstance(part, Mapping) and part.get("name") == name) or any(
        _uses(one, group, name) for one in tree.values()
    )


# Commands


def show_list(words: list[str]) -> list[Any]:
    """Print and return what can be listed, or a list: experiments, sweeps, keys, parts of a group, keys of a part.

    Raises:
        UsageError: There is no such list, or there are further words.
    """
    if words[:1] == ["weights"]:
        from diffaccel.verbs.weights import show_weights

        return show_weights(words[1:])
    if len(words) > 2:
        raise UsageError(LIST_USAGE)
    if words and words[0] in LISTS:
        return _printed(LISTS[words[0]][1](*words[1:]))
    if len(words) == 2:
        return _printed(_keys(registry_of(words[0]), words[1]))
    found = list_parts(*words)
    if not words:
        found = [*(Listed(name, what) for name, (what, _) in LISTS.items()), Listed("weights", WEIGHTS), *found]
    _printed(found)
    if not words:
        print_lines(
            "`diffaccel list GROUP` lists the parts of a group, `diffaccel list GROUP NAME` the keys of a part, and "
            "`diffaccel explain GROUP NAME` describes a part"
        )
    return found


T = TypeVar("T", list[Listed], list[Key])


def _printed(found: T) -> T:
    """Print a table, and return its rows."""
    keys = bool(found) and isinstance(found[0], Key)
    table = Table(box=None, header_style="bold", show_header=keys, padding=(0, 2, 0, 0))
    for head in ("key", "type", "default", "") if keys else ("", ""):
        table.add_column(head, vertical="top")
    for one in found:
        if isinstance(one, Key):
            table.add_row(
                *map(printable, (one.name, one.type, "(required)" if one.default is None else one.default, one.what))
            )
        else:
            table.add_row(printable(one.name), printable(one.what) + (f" [{one.plugin}]" if one.plugin else ""))
    if found:
        wide_console().print(table)
    return found


def show_explanation(words: list[str]) -> Explanation:
    """Print and return the description of a part, with its keys, references and experiments.

    Raises:
        UsageError: The group or name is unknown, or not exactly one of each is given.
    """
    if len(words) != 2:
        raise UsageError(EXPLAIN_USAGE)
    found = explain(*words)
    origin = f", {found.plugin}" if found.plugin else ""
    print_lines(*map(printable, (f"{found.group} {found.name} ({found.source}{origin})", "", found.what, "")))
    _printed(found.keys)
    for head, lines in (("References", found.references), ("Experiments", [", ".join(found.experiments)])):
        if any(lines):
            print_lines("", f"{head}:", *(printable(f"  {line}") for line in lines))
    return found
