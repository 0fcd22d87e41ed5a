"""Whether a point was measured with given settings, however they were written."""

from collections.abc import Mapping
from typing import Any

from diffaccel.parts.catalogue import registry_of
from diffaccel.parts.history import as_measured, explicit
from diffaccel.parts.schema import is_path
from diffaccel.prior.chain import chains_of, starts_of
from diffaccel.report.points import Point

CHAINS = frozenset({"images_per_chain", "chains", "restart_every"})
"""Keys of a chain prior that set the number of chains and their lengths."""


def same_settings(point: Point, settings: Mapping[str, Any]) -> bool:
    """Whether a normalised point was measured with settings of prior and solver.

    A key that is not set has its default, and chains count by their number and length for the point's n: 100 chains are
    20 ``images_per_chain`` of 2,000 images. Paths are not compared.

    Args:
        point: Normalised point.
        settings: Key -> node of a part, as :meth:`~diffaccel.config.Config.at` returns them.
    """
    own, n = point["settings"], point["n"]
    # The names are compared first, because those of a point may be of plugins that are not installed.
    return all(
        own[part].get("name") == node["name"] and _compared(part, own[part], n) == _compared(part, node, n)
        for part, node in as_measured(explicit(settings)).items()
    )


def _compared(part: str, node: Mapping[str, Any], n: int | None) -> dict[str, Any]:
    registry = registry_of(part)
    found = {
        key: value
        for key, value in registry.complete(node).items()
        if not is_path(registry.annotation(key, node["name"]))
    }
    if n is not None and found.keys() >= CHAINS:
        given, chains, every = (found.pop(key) for key in ("images_per_chain", "chains", "restart_every"))
        found["starts"] = starts_of(n, chains or chains_of(n, given), every)
    return found
