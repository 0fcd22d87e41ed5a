"""``list`` and ``explain``: parts by name, described by their constructors and docstrings."""

import dataclasses
import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from rich.table import Table

from diffaccel.errors import UsageError
from diffaccel.parts.catalogue import CATALOGUE, DESCRIPTIONS, registry_of
from diffaccel.parts.checks import FILLED, Range
from diffaccel.parts.docstrings import documented_keys, first_line, first_paragraph, references
from diffaccel.parts.registry import Registry, part_of
from diffaccel.parts.schema import options
from diffaccel.text.escape import printable
from diffaccel.text.terminal import print_lines, wide_console

LIST_USAGE = "list accepts at most one group of parts: `diffaccel list solver`"
EXPLAIN_USAGE = "explain requires a group and a name: `diffaccel explain solver heun`"


EXTRA = {
    "samples": "Number of samples per test image, in succession; 1 if not set.",
    "seed": "Seed of random degradations of the test images; 0 if not set.",
    "lpips": "Whether to measure LPIPS to the test images; false if not set.",
    "checkpoint": "Weights of the part's own networks.",
    "init": "Initial weights of these networks in a fit.",
    "metric": "Name of the features in metrics; only for the method `extractor`.",
    "resident": "Whether training images stay on the device; auto: in memory, and a quarter of a GPU's at most.",
    "label": "Name in points and tables; the method's own by default.",
}
"""Descriptions of keys that are not parameters of constructors."""


class Listed(NamedTuple):
    """One line of a list.

    Attributes:
        name: Name of a group, or of a part.
        what: Description in one line.
        plugin: Plugin of the part; None for built-in parts.
    """

    name: str
    what: str
    plugin: str | None = None


class Key(NamedTuple):
    """A key of a part.

    Attributes:
        name: Name of the key.
        type: Description of valid values.
        default: Default as written in a file; None if the key is required.
        what: Description from the docstring.
    """

    name: str
    type: str
    default: str | None
    what: str


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
        found.append(Key(item.name, _type(annotations[item.name]), shown, said.get(item.name, "")))
    return found + [Key(key, _type(kind), "null", EXTRA[key]) for key, kind in registry.extra.items()]


def _type(annotation: Any) -> str:
    """Describe an annotation."""
    own = [one for one in options(annotation) if one is not NoneType]
    end = " or null" if len(own) < len(options(annotation)) else ""
    return " or ".join(_one_type(one) for one in own) + end


def _one_type(annotation: Any) -> str:
    arguments = get_args(annotation)
    if (registry := part_of(annotation)) is not None:
        several = get_origin(getattr(annotation, "__origin__", None)) is list
        return f"list of {registry.kind}s" if several else registry.kind
    if marks := getattr(annotation, "__metadata__", ()):
        rules = [mark.rule for mark in marks if isinstance(mark, Range)]
        return ", ".join([_type(arguments[0]), *rules, *(["one or more"] if FILLED in marks else [])])
    if get_origin(annotation) is Literal:
        return " or ".join(map(str, arguments))
    if get_origin(annotation) is list:
        return f"list of {_type(arguments[0])}"
    if get_origin(annotation) is dict or annotation is dict:
        return "mapping"
    words = {str: "text", Path: "path", bool: "true or false", Any: "anything", inspect.Parameter.empty: "anything"}
    return words.get(annotation) or str(getattr(annotation, "__name__", annotation))


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
    # Imported here, because it takes seconds and a list does not use it.
    from diffaccel.config import experiment_names, find, read

    return [one for one in experiment_names() if _uses(read(find(one)), group, name)]


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


def show_list(words: list[str]) -> list[Listed]:
    """Print and return the groups of parts, or the parts of a group.

    Raises:
        UsageError: The group is unknown, or several are given.
    """
    if len(words) > 1:
        raise UsageError(LIST_USAGE)
    found = list_parts(*words)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for one in found:
        table.add_row(printable(one.name), printable(one.what) + (f" [{one.plugin}]" if one.plugin else ""))
    wide_console().print(table)
    if not words:
        print_lines("`diffaccel list GROUP` lists the parts of a group, `diffaccel explain GROUP NAME` describes one")
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
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for head in ("key", "type", "default", ""):
        table.add_column(head, vertical="top")
    for key in found.keys:
        table.add_row(*map(printable, (key.name, key.type, key.default or "(required)", key.what)))
    if found.keys:
        wide_console().print(table)
    for head, lines in (("References", found.references), ("Experiments", [", ".join(found.experiments)])):
        if any(lines):
            print_lines("", f"{head}:", *(printable(f"  {line}") for line in lines))
    return found
