"""Trees of settings: merging of nested mappings."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

STATISTICS = ("reference", "floor")
"""Keys of files, or of mappings from judges to files, of which text does not name a part."""


def leaves(tree: Any, *above: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the values of nested mappings and lists, each with the keys that lead to it."""
    pairs = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else None
    if pairs is None:
        yield above, tree
        return
    for key, value in pairs:
        yield from leaves(value, *above, key)


def merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Merge ``new`` into ``old`` key by key; a part with another name replaces the old part as a whole.

    Text that is merged with a mapping is the name of a part, except under a key of :data:`STATISTICS`, where either
    replaces the other.
    """
    merged = dict(old)
    for key, value in new.items():
        before = merged.get(key)
        if key == "by_nfe" and not value:  # an empty mapping removes all entries, like null
            before = None
        if key in STATISTICS and not (isinstance(value, Mapping) and isinstance(before, Mapping)):
            before = None
        if isinstance(value, str) and isinstance(before, Mapping):
            value = {"name": value}
        if isinstance(before, str) and isinstance(value, Mapping):
            before = {"name": before}
        if key == "data" and isinstance(value, Mapping) and isinstance(before, Mapping) and _moves(before, value):
            before = {name: item for name, item in before.items() if name != "label"}
        renamed = isinstance(value, Mapping) and isinstance(before, Mapping) and renames(before, value)
        nests = isinstance(value, Mapping) and isinstance(before, Mapping) and not renamed
        if isinstance(value, Mapping):
            value = merge(cast(Mapping[str, Any], before) if nests else {}, value)
        merged[key] = value
    return merged


def renames(before: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    """Whether a part has another name than before."""
    return "name" in value and "name" in before and value["name"] != before["name"]


def _moves(before: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    """Whether data have another location than before, to which the old label does not apply."""
    return any(key in value and before.get(key, value[key]) != value[key] for key in ("path", "root"))
