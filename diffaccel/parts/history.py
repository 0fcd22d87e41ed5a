"""Defaults that have changed, so that settings of points mean the same in every version.

A point records its settings as they were given. Where a default has changed, the value of the key is recorded too, and
a point without it was measured with the former default.
"""

from collections.abc import Mapping
from typing import Any

from diffaccel.parts.catalogue import registry_of
from diffaccel.parts.registry import Registry, part_of

FORMER: dict[str, dict[str, Any]] = {
    "dpmpp2m": {"lower_order_final": False},
    "dpmpp3m": {"lower_order_final": False, "D2": "parabola"},
    "unipc2": {"lower_order_final": False, "variant": "bh2"},
    "unipc3": {"lower_order_final": False, "variant": "bh2"},
    "deis": {"mode": "rhoab", "max_order": 3},
    "chain": {"chains": 100},
    "restart": {"chains": 500},
}
"""Name of a part -> defaults up to version 0.1 that have changed since."""


def explicit(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Add the present values of keys whose defaults have changed to the parts of settings, at any depth.

    Args:
        settings: Key -> node of a part: ``{"prior": ..., "solver": ...}``.
    """
    return {part: _explicit(registry_of(part), node) for part, node in settings.items()}


def _explicit(registry: Registry[Any], node: Mapping[str, Any]) -> dict[str, Any]:
    name, found = node.get("name"), dict(node)
    if registry in (registry_of("solver"), registry_of("prior")) and name in FORMER:
        found = {**found, **{key: value for key, value in _changed(registry, node).items() if key not in node}}
    for key, value in node.items():
        if isinstance(value, Mapping) and (inner := part_of(registry.annotation(key, name))) is not None:
            # A node without a name is recorded without the default that it is merged into.
            found[key] = _explicit(inner, registry.over_default(name, key, value) if "name" in value else value)
    return found


def _changed(registry: Registry[Any], node: Mapping[str, Any]) -> dict[str, Any]:
    """Present defaults of the keys of a part whose defaults have changed."""
    whole = registry.complete({"name": node["name"]})
    return {key: whole[key] for key in FORMER[node["name"]]}


def as_measured(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Add former defaults to the settings of a point that was measured before they changed, at any depth."""
    found = {key: as_measured(value) if isinstance(value, Mapping) else value for key, value in settings.items()}
    name = found.get("name")
    return {**found, **{key: value for key, value in _former(name).items() if key not in found}}


def _former(name: object) -> dict[str, Any]:
    return FORMER.get(name, {}) if isinstance(name, str) else {}
