"""Schema of a part from its constructor's parameters, and tests of annotations."""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from diffaccel.errors import UsageError, suggest
from diffaccel.parts.checks import plain_type
from diffaccel.text.escape import printable

FILE = {"path": "file"}
"""Metadata of a dataclass field with a path, or a mapping to paths, relative to the file that sets it."""
PLACE = {"path": "place"}
"""Metadata of a dataclass field with a path relative to the working directory."""

RENAMED = {"told": "level_scale", "skips": "chain_steps"}
"""Old names of keys -> their present names."""


def suggest_key(key: str, known: Iterable[str]) -> str:
    """End of a message about an unknown key: its present name if it was renamed, else the most similar known key.

    Args:
        key: Unknown key.
        known: Known keys.
    """
    known = set(known)
    renamed = RENAMED.get(key)
    return f"; {key!r} is now called {renamed!r}" if renamed in known else suggest(key, known)


def options(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def is_path(annotation: Any) -> bool:
    """Whether parameters with this annotation are paths."""
    return Path in map(plain_type, options(annotation))


def is_text(annotation: Any) -> bool:
    """Whether parameters with this annotation are text, apart from None."""
    own = [plain_type(one) for one in options(annotation) if one is not NoneType]
    return bool(own) and all(one is str or _names_texts(one) for one in own)


def _names_texts(annotation: Any) -> bool:
    return get_origin(annotation) is Literal and all(isinstance(one, str) for one in get_args(annotation))


def schema_of(
    factory: Callable[..., Any], parameters: Mapping[str, inspect.Parameter], hidden: frozenset[str], where: str
) -> Any:
    """Create a dataclass of the parameters that a file may set.

    Raises:
        UsageError: A parameter can't be set by a key, or the defaults do not make a schema.
    """
    fields = []
    for parameter in parameters.values():
        if parameter.name in hidden or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise UsageError(f"{where}: its parameter {parameter.name!r} is positional only, so no key can set it")
        default: Any = dataclasses.field(default=parameter.default)
        if parameter.default is parameter.empty:
            default = dataclasses.field(default="???")
        elif isinstance(parameter.default, list | dict | tuple):
            default = dataclasses.field(default_factory=partial(copy.copy, parameter.default))
        elif (make := _default_factory(factory, parameter.name)) is not None:
            default = dataclasses.field(default_factory=make)
        annotation = Any if parameter.annotation is parameter.empty else plain_type(parameter.annotation)
        fields.append((parameter.name, annotation, default))
    try:
        return dataclasses.make_dataclass("Part", fields)
    except ValueError as error:
        raise UsageError(f"{where}: its defaults do not make a schema ({printable(str(error))})") from None


def _default_factory(factory: Callable[..., Any], name: str) -> Callable[[], Any] | None:
    """Default factory of a dataclass field, which is not in the signature."""
    if not dataclasses.is_dataclass(factory):
        return None
    makers = {field.name: field.default_factory for field in dataclasses.fields(factory)}
    make = makers.get(name, dataclasses.MISSING)
    return None if make is dataclasses.MISSING else make
