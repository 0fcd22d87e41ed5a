"""Lists of experiments, sweeps, and keys of an experiment, from the files and the schema."""

import ast
import dataclasses
import inspect
import json
import re
from collections.abc import Iterable
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin

import yaml

from diffaccel.config import EXPERIMENTS, Config, experiment_names
from diffaccel.config.sweep import SWEEPS, sweep_names
from diffaccel.errors import UsageError, suggest
from diffaccel.parts.checks import FILLED, Range
from diffaccel.parts.overrides import ALIASES
from diffaccel.parts.registry import part_of
from diffaccel.parts.schema import options


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


def type_in_words(annotation: Any) -> str:
    """Describe an annotation: ``float | None`` is "float or null"."""
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
        return ", ".join([type_in_words(arguments[0]), *rules, *(["one or more"] if FILLED in marks else [])])
    if get_origin(annotation) is Literal:
        return " or ".join(map(str, arguments))
    if get_origin(annotation) is list:
        return f"list of {type_in_words(arguments[0])}"
    if get_origin(annotation) is dict or annotation is dict:
        return "mapping"
    words = {str: "text", Path: "path", bool: "true or false", Any: "anything", inspect.Parameter.empty: "anything"}
    return words.get(annotation) or str(getattr(annotation, "__name__", annotation))


def list_experiments(data: str | None = None) -> list[Listed]:
    """List the shipped experiments, or those of a data set, with the first sentence of their files.

    Raises:
        UsageError: There is no such data set.
    """
    names = experiment_names()
    folders = {name.partition("/")[0] for name in names}
    if data is not None and data not in folders:
        raise UsageError(f"there are no experiments of {data!r}{suggest(data, folders)}")
    chosen = [name for name in names if data in (None, name.partition("/")[0])]
    return [Listed(name, _sentence(EXPERIMENTS / f"{name}.yaml")) for name in chosen]


def list_sweeps() -> list[Listed]:
    """List the shipped sweeps, with the first sentence of their files."""
    return [Listed(name, _sentence(EXPERIMENTS / SWEEPS / f"{name}.yaml")) for name in sweep_names()]


def _sentence(file: Path) -> str:
    """First sentence of the comment at the top of a file; its method without one."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    if lines:
        return re.split(r"(?<!\.)\.\s+(?=[A-Z])", " ".join(lines))[0].rstrip(".:")
    method = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("method", "")
    return f"method {method['name'] if isinstance(method, dict) else method}"


def list_keys(section: str | None = None) -> list[Key]:
    """List the keys of an experiment, or of one of its sections (training, search, search.confirm).

    Raises:
        UsageError: There is no such section.
    """
    if section is None:
        short = [Key(name, "", "", f"short for {key}") for name, key in sorted(ALIASES.items())]
        return sorted([*_keys(Config, ""), *short])
    sections = dict(_sections(Config))
    if section not in sections:
        raise UsageError(f"no section of keys is called {section!r}{suggest(section, sections)}")
    return list(_keys(sections[section], f"{section}."))


def _sections(schema: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Sections at any depth, by their dotted keys."""
    for item in dataclasses.fields(schema):
        if dataclasses.is_dataclass(item.type):
            yield f"{prefix}{item.name}", item.type
            yield from _sections(item.type, f"{prefix}{item.name}.")


def _keys(schema: Any, prefix: str) -> Iterable[Key]:
    said = _documented(schema)
    for item in dataclasses.fields(schema):
        if item.name == "experiment":  # set by the loader
            continue
        name = f"{prefix}{item.name}"
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        if dataclasses.is_dataclass(default):
            yield Key(name, "section", "", f"{said[item.name]} `diffaccel list keys {name}` lists its keys.")
        else:
            kind = "path" if "path" in item.metadata and item.type != dict[float, str] else type_in_words(item.type)
            yield Key(name, kind, _shown(default), said[item.name])


def _shown(default: Any) -> str | None:
    """Write a default in one line; None for a required key."""
    if default == "???":
        return None
    return default or "''" if isinstance(default, str) else json.dumps(default)


def _documented(schema: Any) -> dict[str, str]:
    """Return the texts below the fields of a dataclass."""
    (body,) = ast.parse(inspect.getsource(schema)).body
    lines: list[Any] = getattr(body, "body", [])
    return {
        field.target.id: " ".join(str(text.value.value).replace("``", "`").split())
        for field, text in zip(lines, lines[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }
