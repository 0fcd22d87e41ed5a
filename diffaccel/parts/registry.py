"""Parts by name: a registry per kind, open to users through ``@register`` and entry points.

The constructor of a part is its schema: its parameters are the keys that a YAML file may set, with their annotations as
types and their defaults. A file can't import code; it can only contain registered names.

Annotations have special meanings for keys:

- ``Path`` or ``Path | None``: a path, relative to the file that sets it.
- ``str``, ``str | None`` or ``Literal``: text, whatever it looks like on the command line.
- The abstract class of a kind of parts (``Grid``): a part, which is built before its owner.
- ``Annotated[dict[str, Any], SOLVERS]``: a part that its owner builds; ``Annotated[list[...], ...]``: several parts.
"""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.metadata import EntryPoint
from pkgutil import iter_modules
from typing import Any, Generic, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffaccel.errors import UsageError, suggest
from diffaccel.parts.checks import check_annotated, conform
from diffaccel.parts.overrides import as_plain, refuse_references
from diffaccel.parts.plugins import installed, origin
from diffaccel.parts.schema import options, schema_of, suggest_key
from diffaccel.parts.trees import merge
from diffaccel.text.escape import printable
from diffaccel.text.terminal import PlainConsole

T = TypeVar("T")
Factory = TypeVar("Factory", bound=Callable[..., Any])
Base = TypeVar("Base")

VARIADIC = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
"""Kinds of parameters that are not keys."""

_REGISTRIES: dict[type, "Registry[Any]"] = {}
"""Abstract class -> registry of its parts."""


class Registry(Mapping[str, Callable[..., T]], Generic[T]):
    """Name -> factory for one kind of part (``solver``, ``prior``, ``process``, ``network`` ...).

    Args:
        kind: Name of the kind of part, for messages.
        group: Entry-point group of plugins; ``diffaccel.<kind>s`` by default.
        context: Parameters that are set by the program and not by files, such as the process of a denoiser.
        extra: Further keys that a file may set, with their annotations; they are removed before the part is built.
        builtins: Modules, or packages of modules, that register built-in parts. The first lookup imports them, so that
            the registry is complete.

    Example:
        >>> solvers = Registry("solver")
        >>> @solvers.register("euler")
        ... class Euler: ...
    """

    def __init__(
        self,
        kind: str,
        group: str | None = None,
        builtins: Collection[str] = (),
        context: Collection[str] = (),
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.kind, self.group = kind, group or f"diffaccel.{kind}s"
        self.context, self.extra = frozenset(context), dict(extra or {})
        self._factories: dict[str, Callable[..., T]] = {}
        self._modules = list(builtins)  # not imported yet
        self._plugins_loaded = False
        self._installed: list[EntryPoint] | None = None
        self._origins: dict[str, str] = {}  # name of a part -> plugin
        self._broken: dict[str, str] = {}  # plugin that can't be used -> reason
        self._said: set[str] = set()

    def base(self, abstract: Base) -> Base:
        """Decorate the base class of the parts; parameters annotated with it are parts of this registry."""
        _REGISTRIES[cast(type, abstract)] = self
        return abstract

    def register(self, name: str) -> Callable[[Factory], Factory]:
        """Decorate a class or function to register it under a name.

        Raises:
            UsageError: Another part has this name.
        """

        def decorate(factory: Factory) -> Factory:
            if self._factories.get(name, factory) is not factory:
                raise UsageError(f"two {self.kind}s are called {name!r}: rename one")
            self._factories[name] = factory
            return factory

        return decorate

    def _load_builtins(self) -> None:
        """Import the modules of built-in parts, once; such a module may look up a part meanwhile."""
        while self._modules:
            name = self._modules.pop(0)
            for module in iter_modules(getattr(import_module(name), "__path__", ()), f"{name}."):
                import_module(module.name)

    def _load_plugins(self) -> None:
        """Add the plugins of installed packages, once; broken plugins are noted and skipped."""
        self._load_builtins()
        if self._plugins_loaded:
            return
        self._plugins_loaded = True
        own = set(self._factories)
        for plugin in self._plugins():
            others = [other for other in self._plugins() if other.name == plugin.name and other != plugin]
            if plugin.name in own:
                continue  # reported by ``build`` when the name is used
            if others:
                self._broken[origin(plugin)] = f"{origin(others[0])} has the same name: uninstall one"
                continue
            try:
                factory = plugin.load()
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # an import may raise anything
                self._broken[origin(plugin)] = f"it can't be imported ({printable(repr(error)):.200})"
                continue
            if callable(factory) or plugin.name in self._factories:  # importing a module registers its parts
                self._factories.setdefault(plugin.name, factory)
                self._origins[plugin.name] = origin(plugin)
            else:
                reason = f"it is not a class or function, and registers no {self.kind} {plugin.name!r}"
                self._broken[origin(plugin)] = reason

    def _plugins(self) -> list[EntryPoint]:
        """Entry points of the group, read once; packages with unreadable entry points are noted."""
        if self._installed is None:
            self._installed, broken = installed(self.group)
            self._broken |= broken
        return self._installed

    def __getitem__(self, name: str) -> Callable[..., T]:
        if name not in self:
            broken = "".join(f"; {origin}: {reason}" for origin, reason in self._broken.items())
            raise UsageError(f"no {self.kind} is called {name!r}{suggest(str(name), self._factories)}{broken}")
        return self._factories[name]

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):  # a file may contain any type
            return False
        for load in (self._load_builtins, self._load_plugins):
            if name not in self._factories:
                load()
        return name in self._factories

    def __iter__(self) -> Iterator[str]:
        self._load_plugins()
        return iter(dict(self._factories))

    def __len__(self) -> int:
        self._load_plugins()
        return len(self._factories)

    def __eq__(self, other: object) -> bool:
        return self is other  # comparing mappings would import everything

    def __hash__(self) -> int:
        return id(self)

    def keys_of(self, name: str) -> frozenset[str]:
        """Return the names of a part's keys; see :meth:`annotations` for errors."""
        return frozenset(key for key, one in self._parameters(name).items() if one.kind not in VARIADIC)

    def required(self, name: str) -> frozenset[str]:
        """Return the names of a part's required parameters; empty for an unknown name."""
        parameters = self._parameters(name).values() if name in self else ()
        return frozenset(one.name for one in parameters if one.default is one.empty)

    def known_keys(self) -> frozenset[str]:
        """Return the keys of all parts whose constructors can be inspected."""
        return frozenset().union(*map(self._keys, self))

    def _keys(self, name: str) -> frozenset[str]:
        with suppress(UsageError):
            return self.keys_of(name)
        return frozenset()

    def _parameters(self, name: str, eval_str: bool = False) -> Mapping[str, inspect.Parameter]:
        """Parameters of a part's constructor.

        Raises:
            UsageError: The constructor can't be inspected; a plugin may be any callable.
        """
        factory = self[name]
        try:
            return inspect.signature(factory, eval_str=eval_str).parameters
        except Exception as error:  # annotations are code
            what = "annotations don't evaluate" if eval_str else "constructor can't be inspected"
            raise UsageError(f"{self._where(name)}: its {what} ({printable(repr(error)):.200})") from None

    def annotations(self, name: str) -> dict[str, Any]:
        """Return the keys of a part that a file may set, with their annotations.

        Raises:
            UsageError: The name is unknown, or the constructor of the part can't be inspected.
        """
        parameters = self._parameters(name, eval_str=True).values()
        own = {one.name: one.annotation for one in parameters if one.kind not in VARIADIC}
        return {key: annotation for key, annotation in own.items() if key not in self.context} | self.extra

    def annotation(self, key: str, name: object = None) -> Any:
        """Return the annotation of a key in a part, or in the first part with the key; None if no part has it.

        Args:
            key: Key.
            name: Name of the part; None or unknown for any part.
        """
        if key == "name" or key in self.extra:
            return self.extra.get(key, str)
        for one in self._candidates(name):
            with suppress(UsageError):
                if key in (found := self.annotations(one)):
                    return found[key]
        return None

    def _candidates(self, name: object) -> Iterator[str]:
        """Yield the name of a known part, or else all names, with those of plugins last to delay their import."""
        if isinstance(name, str) and name in self:
            yield name
            return
        self._load_builtins()
        yield from list(self._factories)
        yield from self

    def parts_of(self, name: str) -> dict[str, "Registry[Any]"]:
        """Return the nested parts that are built before a part: key -> registry; empty if it can't be inspected."""
        with suppress(UsageError):
            found = {key: _built(annotation) for key, annotation in self.annotations(name).items()}
            return {key: registry for key, registry in found.items() if registry is not None}
        return {}

    def normal(self, node: Any) -> Any:
        """Return a part's node in which nested parts given by name are replaced by mappings, at any depth."""
        if isinstance(node, str):
            return {"name": node}
        if not isinstance(node, Mapping):
            return node
        whole = dict(node)
        for key, value in node.items():
            if key == "name" or not isinstance(value, str | Mapping | list):
                continue
            if (registry := part_of(self.annotation(key, node.get("name")))) is not None:
                several = isinstance(value, list)
                whole[key] = [registry.normal(one) for one in value] if several else registry.normal(value)
        return whole

    def over_default(self, name: object, key: str, node: Mapping[str, Any]) -> Mapping[str, Any]:
        """Merge the node of a nested part into its default, if that is a mapping; another part replaces the default."""
        parameter = self._parameters(name).get(key) if isinstance(name, str) and name in self else None
        default = None if parameter is None else parameter.default
        return merge({"part": default}, {"part": node})["part"] if isinstance(default, Mapping) else node

    @property
    def nested(self) -> dict[str, "Registry[Any]"]:
        """Nested parts of all parts: key -> registry."""
        return {key: registry for name in self for key, registry in self.parts_of(name).items()}

    def plugin_of(self, name: str) -> str | None:
        """Return the plugin of a part, with its package; None for built-in parts."""
        return self._origins.get(name)

    def schema(self, name: str) -> Any:
        """Return a dataclass whose fields are the keys of a part, with their types and defaults.

        Raises:
            UsageError: The name is unknown, or the constructor of the part does not make a schema.
        """
        return schema_of(self[name], self._parameters(name, eval_str=True), self.context, self._where(name))

    def _where(self, name: str) -> str:
        """Name of a part for messages, with the package of a plugin."""
        origin = self._origins.get(name)
        return f"{self.kind} {name!r}" + (f" of {origin}" if origin else "")

    def _say_ignored(self, name: str) -> None:
        """Report, once, a plugin that is ignored because a built-in part has its name."""
        if name in self._origins or name in self._said:
            return
        self._said.add(name)
        for plugin in self._plugins():
            if plugin.name == name:
                said = f"{origin(plugin)} is ignored, because there is another {self.kind} {name!r}: rename the plugin"
                PlainConsole(stderr=True, soft_wrap=True).print(said)

    def complete(self, node: Mapping[str, Any]) -> dict[str, Any]:
        """Return a part's node with the defaults of missing keys, including those of nested parts.

        Raises:
            UsageError: The name is unknown.
        """
        parameters = inspect.signature(self[node["name"]]).parameters.values()
        whole = {one.name: one.default for one in parameters if one.default is not one.empty} | dict(node)
        for key, registry in self.parts_of(node["name"]).items():
            if key in whole and not isinstance(whole[key], Mapping):
                whole[key] = registry.node_of(whole[key])
            if isinstance(whole.get(key), Mapping) and "name" in whole[key]:
                whole[key] = registry.complete(whole[key])
        return whole

    def node_of(self, part: Any) -> dict[str, Any] | None:
        """Return the node of a part that is a dataclass of this registry; None for other objects."""
        names = [name for name, factory in self._factories.items() if factory is type(part)]
        if not names or not dataclasses.is_dataclass(part) or isinstance(part, type):
            return None
        return {"name": names[0], **dataclasses.asdict(part)}

    def build(self, node: Mapping[str, Any] | str, **context: Any) -> T:
        """Build a part from its name and keys.

        Args:
            node: ``{"name": ..., key: value, ...}`` with plain values, as in a YAML file; or a name.
            context: Arguments that a file can't set, such as the process of a denoiser. A constructor gets those that
                it has parameters for; a constructor with ``**`` gets all of them.

        Raises:
            UsageError: The name or a key is unknown, a value has the wrong type, or a value is missing.
        """
        if not isinstance(node, str | Mapping):
            raise UsageError(f"{self.kind}={node!r}: give a name, or a mapping of keys to values")
        node = dict(self.normal(node))
        name = node.pop("name", None)
        if name is None:
            raise UsageError(f"{self.kind}: the key 'name' is missing{suggest('', self)}")
        factory, accepted = self[name], self._parameters(name)
        parts = {key: part for key, part in self.parts_of(name).items() if key not in context}
        for key, registry in parts.items():
            if node.get(key, "") is None:
                del node[key]  # the default
            if key in node:
                context[key] = registry.build(registry.named(node.pop(key), accepted[key].default))
        self._say_ignored(name)
        where = self._where(name)
        parameters = self._parameters(name, eval_str=True)
        schema = schema_of(factory, parameters, frozenset(context) | frozenset(parts), where)
        for key in node:
            if key not in schema.__dataclass_fields__:
                raise UsageError(f"{where} has no key {key!r}{self._remedy(str(key), schema.__dataclass_fields__)}")
        plain: dict[str, Any] = as_plain(node)
        refuse_references(plain, where)
        types = {key: field.type for key, field in schema.__dataclass_fields__.items()}
        node = {key: conform(f"{where}: {key}", value, types[key]) for key, value in plain.items()}
        try:
            merged = OmegaConf.merge(OmegaConf.structured(schema), node)
            if missing := sorted(OmegaConf.missing_keys(merged)):
                raise UsageError(f"{where} requires a value for {', '.join(missing)}")
            values = cast(dict[str, Any], OmegaConf.to_container(merged))
            values |= {  # OmegaConf keeps the keys of a default of another name
                key: self.over_default(name, key, value)
                for key, value in node.items()
                if isinstance(value, Mapping) and part_of(parameters[key].annotation) is not None
            }
        except OmegaConfBaseException as error:
            key = f"{error.full_key}: " if error.full_key else ""
            raise UsageError(f"{where}: {key}{str(error).splitlines()[0]}") from None
        check_annotated(where, values, {key: parameter.annotation for key, parameter in parameters.items()})
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
        return factory(**values, **{key: value for key, value in context.items() if takes_all or key in accepted})

    def named(self, node: Mapping[str, Any] | str, default: Any) -> Mapping[str, Any] | str:
        """Add the name of the default to a part that is given without a name."""
        if not isinstance(node, Mapping) or "name" in node:
            return node
        names = [name for name, factory in self._factories.items() if factory is type(default)]
        return {"name": names[0], **node} if names else node

    def _remedy(self, key: str, known: Iterable[str]) -> str:
        """End of a message about an unknown key: the parts that have the key, or a suggestion."""
        others = [name for name in self if key in self._keys(name)]
        return f"; it is a key of {', '.join(others)}" if others else suggest_key(key, known)


def part_of(annotation: Any) -> Registry[Any] | None:
    """Return the registry of the part or parts of a parameter with this annotation; None for a value."""
    if (registry := _built(annotation)) is not None:
        return registry
    marks = (mark for one in options(annotation) for mark in getattr(one, "__metadata__", ()))
    return next((mark for mark in marks if isinstance(mark, Registry)), None)


def _built(annotation: Any) -> Registry[Any] | None:
    """Registry of a parameter that is a built part, not its mapping."""
    own = (_REGISTRIES.get(one) for one in options(annotation) if isinstance(one, type))
    return next((registry for registry in own if registry is not None), None)
