"""Parts by name: a registry per kind, open to users through ``@register`` and entry points.

A part's constructor is its schema: the keys that a YAML file may set are its parameters, their types are its
annotations, their defaults are its defaults. Nothing is imported because a file says so: names are looked up.

Annotations also say what else there is to know of a key:

- ``Path`` or ``Path | None``: a path, relative to the file that sets it.
- ``str``, ``str | None`` or ``Literal``: text, whatever it looks like on the command line.
- The abstract class of a kind of parts (``Grid``): a part, which is built before its owner.
- ``Annotated[dict[str, Any], SOLVERS]``: a part that its owner builds from the mapping; ``Annotated[list[...], ...]``:
  several.
"""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.metadata import Distribution, EntryPoint, distributions, entry_points
from pkgutil import iter_modules
from typing import Any, Generic, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffaccel.errors import UsageError, suggest
from diffaccel.parts.checks import check_annotated, conform
from diffaccel.parts.overrides import as_plain, refuse_references
from diffaccel.parts.schema import options, schema_of, suggest_key
from diffaccel.text.escape import printable
from diffaccel.text.terminal import PlainConsole

T = TypeVar("T")
Factory = TypeVar("Factory", bound=Callable[..., Any])
Base = TypeVar("Base")

VARIADIC = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
"""Kinds of parameters that are no keys."""

_REGISTRIES: dict[type, "Registry[Any]"] = {}
"""Abstract class -> registry of its parts."""


class Registry(Mapping[str, Callable[..., T]], Generic[T]):
    """Name -> factory for one kind of part (``solver``, ``prior``, ``process``, ``network`` ...).

    Args:
        kind: What the parts are, for error messages.
        group: Entry-point group that adds to them; ``diffaccel.<kind>s`` if not given.
        context: Parameters that the program gives and no file sets: the process of a denoiser, say.
        extra: Keys that a file may set besides the parameters, with their annotations; who builds the part takes them
            out of its node.
        builtins: Modules that register diffaccel's own parts, or packages of such modules; the first lookup imports
            them, so that the registry is complete whatever was imported before.

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
        self._modules = list(builtins)  # those still to be imported
        self._plugins_loaded = False
        self._installed: list[EntryPoint] | None = None
        self._origins: dict[str, str] = {}  # plugins by the names of their parts
        self._broken: dict[str, str] = {}  # plugins that bring nothing, and why
        self._said: set[str] = set()

    def base(self, abstract: Base) -> Base:
        """Decorate the abstract class of this kind: a parameter annotated with it is a part of this registry."""
        _REGISTRIES[cast(type, abstract)] = self
        return abstract

    def register(self, name: str) -> Callable[[Factory], Factory]:
        """Decorate a class or function so that YAML files can name it.

        Raises:
            UsageError: Another part already has that name.
        """

        def decorate(factory: Factory) -> Factory:
            if self._factories.get(name, factory) is not factory:
                raise UsageError(f"two {self.kind}s are called {name!r}: rename one")
            self._factories[name] = factory
            return factory

        return decorate

    def _load_builtins(self) -> None:
        """Import the modules of diffaccel's own parts, once; one of them may look up a part meanwhile."""
        while self._modules:
            name = self._modules.pop(0)
            for module in iter_modules(getattr(import_module(name), "__path__", ()), f"{name}."):
                import_module(module.name)

    def _load_plugins(self) -> None:
        """Add what installed packages bring, once; one that is broken is noted, and stops nothing else."""
        self._load_builtins()
        if self._plugins_loaded:
            return
        self._plugins_loaded = True
        own = set(self._factories)
        for plugin in self._plugins():
            others = [other for other in self._plugins() if other.name == plugin.name and other != plugin]
            if plugin.name in own:
                continue  # ``build`` says so when the name is used
            if others:
                self._broken[_origin(plugin)] = f"{_origin(others[0])} has the same name: uninstall one"
                continue
            try:
                factory = plugin.load()
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # an import runs anything, so anything may be raised
                self._broken[_origin(plugin)] = f"it can't be imported ({printable(repr(error)):.200})"
                continue
            if callable(factory) or plugin.name in self._factories:  # a module registers its parts as it is imported
                self._factories.setdefault(plugin.name, factory)
                self._origins[plugin.name] = _origin(plugin)
            else:
                reason = f"it is no class or function, and registers no {self.kind} {plugin.name!r}"
                self._broken[_origin(plugin)] = reason

    def _plugins(self) -> list[EntryPoint]:
        """Entry points of the group, read once; a package whose list of them can't be read is noted."""
        if self._installed is None:
            try:
                found = list(entry_points(group=self.group))
            except Exception:  # one package's metadata are broken: they are read one by one
                found = [plugin for package in distributions() for plugin in self._entry_points(package)]
            # A package that lies in two places of the path is one.
            self._installed = list({(plugin.name, _origin(plugin)): plugin for plugin in found}.values())
        return self._installed

    def _entry_points(self, package: Distribution) -> list[EntryPoint]:
        try:
            return [plugin for plugin in package.entry_points if plugin.group == self.group]
        except Exception as error:
            reason = f"its entry points can't be read ({printable(repr(error)):.200})"
            self._broken[f"package {package.metadata['Name']!r}"] = reason
            return []

    def __getitem__(self, name: str) -> Callable[..., T]:
        if name not in self:
            broken = "".join(f"; {origin}: {reason}" for origin, reason in self._broken.items())
            raise UsageError(f"no {self.kind} is called {name!r}{suggest(str(name), self._factories)}{broken}")
        return self._factories[name]

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):  # a file may hold anything
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
        return self is other  # a mapping's would import everything

    def __hash__(self) -> int:
        return id(self)

    def keys_of(self, name: str) -> frozenset[str]:
        """Return the keys that a part of this name has, those of its own parts among them.

        Raises:
            UsageError: An unknown name, or a part whose constructor can't be inspected.
        """
        return frozenset(key for key, one in self._parameters(name).items() if one.kind not in VARIADIC)

    def required(self, name: str) -> frozenset[str]:
        """Return the parameters without a default of a part of this name; none for an unknown name."""
        parameters = self._parameters(name).values() if name in self else ()
        return frozenset(one.name for one in parameters if one.default is one.empty)

    def known_keys(self) -> frozenset[str]:
        """Return the keys of all parts; one whose constructor can't be inspected has none."""
        return frozenset().union(*map(self._keys, self))

    def _keys(self, name: str) -> frozenset[str]:
        with suppress(UsageError):
            return self.keys_of(name)
        return frozenset()

    def _parameters(self, name: str, eval_str: bool = False) -> Mapping[str, inspect.Parameter]:
        """Parameters of a part's constructor.

        Raises:
            UsageError: It can't be inspected: a plugin may be anything that can be called.
        """
        factory = self[name]
        try:
            return inspect.signature(factory, eval_str=eval_str).parameters
        except Exception as error:  # annotations are code
            what = "annotations don't evaluate" if eval_str else "constructor can't be inspected"
            raise UsageError(f"{self._where(name)}: its {what} ({printable(repr(error)):.200})") from None

    def annotations(self, name: str) -> dict[str, Any]:
        """Return the keys that a file may set of the part of this name, with their annotations.

        Raises:
            UsageError: An unknown name, or a part whose constructor can't be inspected.
        """
        parameters = self._parameters(name, eval_str=True).values()
        own = {one.name: one.annotation for one in parameters if one.kind not in VARIADIC}
        return {key: annotation for key, annotation in own.items() if key not in self.context} | self.extra

    def annotation(self, key: str, name: object = None) -> Any:
        """Return the annotation of a key: of the part of this name, else of the first that has the key; None if none.

        Args:
            key: The key.
            name: Name of the part; None, or one that is not known, if that is still open.
        """
        if key == "name" or key in self.extra:
            return self.extra.get(key, str)
        for one in self._candidates(name):
            with suppress(UsageError):
                if key in (found := self.annotations(one)):
                    return found[key]
        return None

    def _candidates(self, name: object) -> Iterator[str]:
        """The name if it is a part's; else all names, those of plugins last, which are imported only then."""
        if isinstance(name, str) and name in self:
            yield name
            return
        self._load_builtins()
        yield from list(self._factories)
        yield from self

    def parts_of(self, name: str) -> dict[str, "Registry[Any]"]:
        """Return the parts of a part that are built before it: key -> registry; none if it can't be inspected."""
        with suppress(UsageError):
            found = {key: _built(annotation) for key, annotation in self.annotations(name).items()}
            return {key: registry for key, registry in found.items() if registry is not None}
        return {}

    def normal(self, node: Any) -> Any:
        """Return a part's node with a mapping for each part in it that is given by its name, at any depth."""
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

    @property
    def nested(self) -> dict[str, "Registry[Any]"]:
        """Parts of all parts: key -> registry."""
        return {key: registry for name in self for key, registry in self.parts_of(name).items()}

    def plugin_of(self, name: str) -> str | None:
        """Return the plugin, with its package, that brings the part of this name; None for one of diffaccel's own."""
        return self._origins.get(name)

    def schema(self, name: str) -> Any:
        """Return a dataclass whose fields are the keys of a part, with their types and defaults.

        Raises:
            UsageError: An unknown name, or a part whose constructor makes no schema.
        """
        return schema_of(self[name], self._parameters(name, eval_str=True), self.context, self._where(name))

    def _where(self, name: str) -> str:
        """Name a part for messages, with the package that brings it."""
        origin = self._origins.get(name)
        return f"{self.kind} {name!r}" + (f" of {origin}" if origin else "")

    def _say_ignored(self, name: str) -> None:
        """Say once of a plugin that has the name of a part of ours that it is not used."""
        if name in self._origins or name in self._said:
            return
        self._said.add(name)
        for plugin in self._plugins():
            if plugin.name == name:
                said = f"{_origin(plugin)} is ignored: {self.kind} {name!r} is another part's name; rename the plugin"
                PlainConsole(stderr=True, soft_wrap=True).print(said)

    def complete(self, node: Mapping[str, Any]) -> dict[str, Any]:
        """Return a part's node with the defaults of the keys that it leaves out, its own parts likewise.

        Raises:
            UsageError: An unknown name.
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
        """Return the node that builds a part which is a dataclass of this registry; None if it is none."""
        names = [name for name, factory in self._factories.items() if factory is type(part)]
        if not names or not dataclasses.is_dataclass(part) or isinstance(part, type):
            return None
        return {"name": names[0], **dataclasses.asdict(part)}

    def build(self, node: Mapping[str, Any] | str, **context: Any) -> T:
        """Construct the part that ``node['name']`` names from the node's other keys.

        Args:
            node: ``{"name": ..., key: value, ...}``, plain values as a YAML file holds them; or a name alone.
            context: Arguments that no file can give (the process of a denoiser, say); their names are no YAML keys. A
                constructor gets those that it has parameters for, one with ``**`` all of them.

        Raises:
            UsageError: An unknown name or key, a value of the wrong type, or a key without a value.
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
                raise UsageError(f"{where} needs a value for {', '.join(missing)}")
            values = cast(dict[str, Any], OmegaConf.to_container(merged))
        except OmegaConfBaseException as error:
            key = f"{error.full_key}: " if error.full_key else ""
            raise UsageError(f"{where}: {key}{str(error).splitlines()[0]}") from None
        check_annotated(where, values, {key: parameter.annotation for key, parameter in parameters.items()})
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
        return factory(**values, **{key: value for key, value in context.items() if takes_all or key in accepted})

    def named(self, node: Mapping[str, Any] | str, default: Any) -> Mapping[str, Any] | str:
        """Name a part that is given by its keys alone: that of the default, whose keys they are."""
        if not isinstance(node, Mapping) or "name" in node:
            return node
        names = [name for name, factory in self._factories.items() if factory is type(default)]
        return {"name": names[0], **node} if names else node

    def _remedy(self, key: str, known: Iterable[str]) -> str:
        """Say which parts have a key that another one lacks."""
        others = [name for name in self if key in self._keys(name)]
        return f"; it is a key of {', '.join(others)}" if others else suggest_key(key, known)


def part_of(annotation: Any) -> Registry[Any] | None:
    """Return the registry of the part, or the parts, that a parameter of this annotation takes; None for a value."""
    if (registry := _built(annotation)) is not None:
        return registry
    marks = (mark for one in options(annotation) for mark in getattr(one, "__metadata__", ()))
    return next((mark for mark in marks if isinstance(mark, Registry)), None)


def _built(annotation: Any) -> Registry[Any] | None:
    """The registry of a parameter that takes a part itself, not its mapping."""
    own = (_REGISTRIES.get(one) for one in options(annotation) if isinstance(one, type))
    return next((registry for registry in own if registry is not None), None)


def _origin(plugin: EntryPoint) -> str:
    """Where a plugin comes from, for messages."""
    package = getattr(getattr(plugin, "dist", None), "name", None)
    said = f"plugin {plugin.name!r} ({getattr(plugin, 'value', '?')})"
    return printable(f"{said} of package {package!r}" if package else said)
