"""Types of the keys of an experiment, from the schema and the annotations of the parts' constructors."""

from collections.abc import Callable, Container, Mapping
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_origin

from diffaccel.config.schema import PARTS, SECTIONS, TUNABLE, Config
from diffaccel.errors import UsageError
from diffaccel.parts.catalogue import registry_of
from diffaccel.parts.checks import plain_type
from diffaccel.parts.registry import Registry, part_of
from diffaccel.parts.schema import FILE, is_path, is_text, options
from diffaccel.parts.trees import merge


def holds_path(key: str) -> bool:
    """Whether the value of a dotted key is a path."""
    return is_path(annotation_of(key))


def holds_text(key: str, value: str) -> bool:
    """Whether the value of a dotted key is text, and not None."""
    annotation = annotation_of(key)
    return is_text(annotation) and not (value == "null" and NoneType in options(annotation))


class Switches(Container[str]):
    """Keys that ``--key`` without a value sets to true: those whose values are true or false."""

    def __contains__(self, key: object) -> bool:
        """Whether a dotted key is a switch."""
        kinds = options(annotation_of(str(key)))
        return [plain_type(kind) for kind in kinds if kind is not NoneType] == [bool]


FLAGS = Switches()


def annotation_of(key: str) -> Any:
    """Return the annotation of a dotted key, for parts that of the first part with this key; None if unknown."""
    names = key.split(".")
    if names[0] == "by_nfe" and len(names) > 2 and names[2] in TUNABLE:
        names = names[2:]
    if names[:2] == ["validation", "judge"]:
        names = ["extractor", *names[2:]]
    return _in_part(registry_of(names[0]), names[1:]) if names[0] in PARTS else _in_schema(Config, names)


def _in_part(registry: Registry[Any], names: list[str]) -> Any:
    found = registry.annotation(names[0]) if names else None
    inner = part_of(found)
    return found if inner is None else _in_part(inner, names[1:])


def _in_schema(schema: Any, names: list[str]) -> Any:
    own: dict[str, Field[Any]] = {item.name: item for item in fields(schema)}
    if not names or names[0] not in own:
        return None
    item = own[names[0]]
    if is_dataclass(item.type):
        return _in_schema(item.type, names[1:])
    paths = "path" in item.metadata and (len(names) > 1 or get_origin(item.type) is not dict)  # each of a mapping's
    return Path if paths else item.type


def name_parts(tree: dict[str, Any]) -> None:
    """Replace each part of a tree that is given by its name by a mapping, in place."""
    if isinstance(judges := tree.get("judges"), str | Mapping):
        tree["judges"] = [judges] if isinstance(judges, Mapping) else judges.replace(",", " ").split()
    for nodes, key, part, _ in _parts(tree):
        nodes[key] = registry_of(part).normal(nodes[key])


def map_paths(tree: dict[str, Any], change: Callable[[str], str], below: Mapping[str, Any] | None = None) -> None:
    """Replace each path of a tree that is relative to its file, in place, including paths in nested parts.

    Args:
        tree: Tree of settings.
        change: Function path -> new path.
        below: Tree that ``tree`` is merged into, which contains the names of parts without a name in ``tree``.
    """
    for nodes, key, part, _ in _parts(tree):
        whole = merge({key: (below or {}).get(key)}, {key: tree.get(key, {})} if nodes is not tree else {})
        _map_part(registry_of(part), nodes[key], change, merge(whole, {key: nodes[key]})[key])
    _map_fields(Config, tree, change)


def check_parts(tree: dict[str, Any]) -> None:
    """Check that parts are mappings with names, and that sections are mappings.

    Raises:
        UsageError: A part or section has another type.
    """
    for key in SECTIONS:
        value = tree.get(key, {})
        if not isinstance(value, Mapping) or "name" in value:  # a name merged into a mapping
            shown = value["name"] if isinstance(value, Mapping) else value
            raise UsageError(f"{key}={shown!r}: give a mapping of keys to values")
    for nodes, key, part, where in _parts(tree):
        if nodes is tree or nodes[key] is not None:
            _check_part(registry_of(part), nodes[key], where)


def _parts(tree: dict[str, Any]) -> list[tuple[Any, Any, str, str]]:
    """Mapping or list that contains each part of a tree, with the part's key there, its kind, and its dotted key."""
    found: list[tuple[Any, Any, str, str]] = [(tree, key, key, key) for key in PARTS if key in tree]
    judges = tree.get("judges")
    found += [(judges, i, "extractor", f"judges.{i}") for i in range(len(judges) if isinstance(judges, list) else 0)]
    search = tree.get("search")
    if isinstance(search, dict) and isinstance(search.get("judge"), dict):
        found.append((search, "judge", "extractor", "search.judge"))
    validation = tree.get("validation")
    if isinstance(validation, dict) and "judge" in validation:
        found.append((validation, "judge", "extractor", "validation.judge"))
    by_nfe, candidates = tree.get("by_nfe"), search.get("candidates") if isinstance(search, dict) else None
    entries = [(entry, f"by_nfe.{budget}") for budget, entry in by_nfe.items()] if isinstance(by_nfe, dict) else []
    if isinstance(candidates, list):
        entries += [(entry, f"search.candidates.{number}") for number, entry in enumerate(candidates)]
    for entry, where in entries:
        own = [key for key in TUNABLE if isinstance(entry, dict) and key in entry]
        found += [(entry, key, key, f"{where}.{key}") for key in own]
    return found


def _check_part(registry: Registry[Any], node: Any, where: str) -> None:
    if not isinstance(node, Mapping):
        raise UsageError(f"{where}={node!r}: give a name, or a mapping of keys to values")
    if not isinstance(node.get("name", ""), str):
        raise UsageError(f"{where}.name={node['name']!r} is not a name")
    for key, value in node.items():
        inner = None if value is None else part_of(registry.annotation(key, node.get("name")))
        if inner is not None:
            for one in value if isinstance(value, list) else [value]:
                _check_part(inner, one, f"{where}.{key}")


def _map_part(registry: Registry[Any], node: Any, change: Callable[[str], str], whole: Any) -> None:
    for key, value in node.items() if isinstance(node, dict) else ():
        if key == "name" or not isinstance(value, str | dict | list):
            continue
        annotation = registry.annotation(key, whole.get("name"))
        if isinstance(value, str) and is_path(annotation):
            node[key] = change(value)
        elif (inner := part_of(annotation)) is not None and isinstance(value, list):
            for one in value:
                _map_part(inner, one, change, one)
        elif inner is not None:
            _map_part(inner, value, change, whole[key])


def _map_fields(schema: Any, tree: Any, change: Callable[[str], str]) -> None:
    for item in fields(schema):
        value = tree.get(item.name) if isinstance(tree, Mapping) else None
        if is_dataclass(item.type):
            _map_fields(item.type, value, change)
        elif item.metadata.get("path") == FILE["path"]:
            if isinstance(value, str):
                tree[item.name] = change(value)
            elif isinstance(value, dict):
                value.update({key: change(path) for key, path in value.items() if isinstance(path, str)})
