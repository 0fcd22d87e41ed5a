"""Parts by name: a registry per kind, open to users through ``@register`` and entry points.

A part's constructor is its schema: the keys that a YAML file may set are its parameters, their types are its
annotations, their defaults are its defaults. Nothing is imported because a file says so: names are looked up.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffaccel.checks import conform
from diffaccel.errors import UsageError, suggest
from diffaccel.overrides import as_plain, refuse_references

T = TypeVar("T")
Factory = TypeVar("Factory", bound=Callable[..., Any])


class Registry(Mapping[str, Callable[..., T]], Generic[T]):
    """Name -> factory for one kind of part (``solver``, ``prior``, ``process``, ``network`` ...).

    Args:
        kind: What the parts are, for error messages.
        group: Entry-point group that adds to them; ``diffaccel.<kind>s`` if not given.
        nested: Parts of a part: key -> their registry, so that ``solver: {name: heun, grid: {name: karras}}`` is built.

    Example:
        >>> solvers = Registry("solver")
        >>> @solvers.register("euler")
        ... class Euler: ...
    """

    def __init__(
        self, kind: str, group: str | None = None, nested: Mapping[str, "Registry[Any]"] | None = None
    ) -> None:
        self.kind, self.group, self.nested = kind, group or f"diffaccel.{kind}s", dict(nested or {})
        self._factories: dict[str, Callable[..., T]] = {}
        self._plugins_loaded = False

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

    def __getitem__(self, name: str) -> Callable[..., T]:
        if name not in self._factories and not self._plugins_loaded:
            self._plugins_loaded = True
            for plugin in entry_points(group=self.group):
                self._factories.setdefault(plugin.name, plugin.load())
        if name not in self._factories:
            raise UsageError(f"no {self.kind} is called {name!r}{suggest(str(name), self._factories)}")
        return self._factories[name]

    def __contains__(self, name: object) -> bool:
        try:
            return bool(self[str(name)])
        except UsageError:
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self._factories)

    def __len__(self) -> int:
        return len(self._factories)

    def keys_of(self, name: str) -> frozenset[str]:
        """Return the keys that a part of this name has, those of its own parts among them.

        Raises:
            UsageError: An unknown name.
        """
        return frozenset(inspect.signature(self[name]).parameters)

    def build(self, node: Mapping[str, Any] | str, **context: Any) -> T:
        """Construct the part that ``node['name']`` names from the node's other keys.

        Args:
            node: ``{"name": ..., key: value, ...}``, plain values as a YAML file holds them; or a name alone.
            context: Arguments that no file can give (the process of a denoiser, say); their names are no YAML keys.

        Raises:
            UsageError: An unknown name or key, a value of the wrong type, or a key without a value.
        """
        node = {"name": node} if isinstance(node, str) else dict(node)
        name = node.pop("name", None)
        if name is None:
            raise UsageError(f"{self.kind}: the key 'name' is missing{suggest('', self)}")
        factory = self[name]
        accepted = inspect.signature(factory).parameters
        for key, registry in self.nested.items():
            if key in node and key in accepted:
                context[key] = registry.build(registry.named(node.pop(key), accepted[key].default))
        schema = _schema(factory, frozenset(context) | frozenset(self.nested))
        where = f"{self.kind} {name!r}"
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
        return factory(**values, **{key: value for key, value in context.items() if key in accepted})

    def named(self, node: Mapping[str, Any] | str, default: Any) -> Mapping[str, Any] | str:
        """Name a part that is given by its keys alone: that of the default, whose keys they are."""
        if isinstance(node, str) or "name" in node:
            return node
        names = [name for name, factory in self._factories.items() if factory is type(default)]
        return {"name": names[0], **node} if names else node

    def _remedy(self, key: str, known: Iterable[str]) -> str:
        """Say which parts have a key that another one lacks."""
        others = [name for name in self if key in inspect.signature(self[name]).parameters]
        return f"; it is a key of {', '.join(others)}" if others else suggest(key, known)


def _schema(factory: Callable[..., Any], hidden: frozenset[str]) -> Any:
    """Make a dataclass of the parameters that a file may set."""
    fields = []
    for parameter in inspect.signature(factory, eval_str=True).parameters.values():
        if parameter.name in hidden or parameter.kind is parameter.VAR_KEYWORD:
            continue
        default: Any = dataclasses.field(default=parameter.default)
        if parameter.default is parameter.empty:
            default = dataclasses.field(default="???")
        elif isinstance(parameter.default, list | dict | tuple):
            default = dataclasses.field(default_factory=partial(copy.copy, parameter.default))
        elif (make := _default_factory(factory, parameter.name)) is not None:
            default = dataclasses.field(default_factory=make)
        annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
        fields.append((parameter.name, annotation, default))
    return dataclasses.make_dataclass(getattr(factory, "__name__", "Part"), fields)


def _default_factory(factory: Callable[..., Any], name: str) -> Callable[[], Any] | None:
    """What makes a dataclass field's default, which its signature doesn't show."""
    if not dataclasses.is_dataclass(factory):
        return None
    makers = {field.name: field.default_factory for field in dataclasses.fields(factory)}
    make = makers.get(name, dataclasses.MISSING)
    return None if make is dataclasses.MISSING else make
