"""The header of a file of weights, compared with what an experiment asks of the file.

A header is the JSON description that ``fit`` and ``convert`` leave in a file: ``kind`` (denoiser, generator, density,
classifier), ``shape``, and the parts that the weights were trained in. Keys that it lacks are not compared.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffaccel.denoiser import DENOISERS
from diffaccel.density import DENSITIES
from diffaccel.errors import UsageError
from diffaccel.nn import NETWORKS
from diffaccel.parts.registry import Registry
from diffaccel.prior import PRIORS
from diffaccel.prior.posterior import POSTERIORS
from diffaccel.process import PROCESSES

REGISTRIES: dict[str, Registry[Any]] = {
    "network": NETWORKS,
    "denoiser": DENOISERS,
    "process": PROCESSES,
    "prior": PRIORS,
    "posterior": POSTERIORS,
    "density": DENSITIES,
}
FREE = {
    "network": ("dropout",),  # acts in training alone
    "denoiser": ("ratio_min", "ratio_max"),  # a claim; `trained_ratios` is what training did
}
"""Keys of a part that may differ from the file's: its weights do not depend on them."""
NAMED = 4
"""Differences that an error shows."""


def kind_of(said: Mapping[str, Any]) -> str | None:
    """Return what a file holds by its header; None if that doesn't tell.

    Files of version 0.1 have no ``kind``: it follows from what else they say.
    """
    if "kind" in said:
        return str(said["kind"])
    if {"channels", "widths", "dim"} <= said.keys():
        return "extractor"
    if "density" in said:
        return "density"
    prior = said.get("prior")
    if isinstance(prior, dict) and prior.get("name") == "implicit" and prior.get("generator", "separate") != "shared":
        return "generator"
    if "module" in said and "averaged" not in said:
        return "classifier"
    return "denoiser" if said.get("network") and ("averaged" in said or "source" in said) else None


def check_header(path: Path, said: Mapping[str, Any], kind: str, asked: Mapping[str, Any]) -> None:
    """Compare a header with what is asked of the file.

    Args:
        path: The file.
        said: Its header.
        kind: What it is wanted as.
        asked: Key of the header -> the value that the experiment has there.

    Raises:
        UsageError: The file is of another kind, or of another value where it has one; the message shows both.
    """
    found = kind_of(said)
    if found is not None and found != kind:
        raise UsageError(f"{path} holds a {found}, and the experiment takes it for a {kind}: name another file")
    differences = [
        f"{key} is {_short(theirs)} in the file and {_short(ours)} in the experiment"
        for part, value in asked.items()
        if part in said
        for key, theirs, ours in _compare(part, said[part], value)
    ]
    if differences:
        more = f", and {len(differences) - NAMED} more" if len(differences) > NAMED else ""
        origin = f" ({said['experiment']}, by its header)" if said.get("experiment") else ""
        raise UsageError(
            f"{path} does not fit the experiment: {'; '.join(differences[:NAMED])}{more}: take the experiment that the "
            f"file was made with{origin}, or another file"
        )


def check_ratios(path: Path, said: Mapping[str, Any], used: tuple[float, float]) -> None:
    """Refuse weights trained on fewer noise levels than the denoiser is used at.

    Args:
        path: The file.
        said: Its header.
        used: Least and largest noise-to-data ratio in use.

    Raises:
        UsageError: ``used`` extends beyond the range in the header; 0.1 % is allowed for rounding.
    """
    if (trained := said.get("trained_ratios")) is None:
        return
    (low, high), (least, most) = used, trained
    if low < 0.999 * least or high > 1.001 * most:
        raise UsageError(
            f"{path} was trained on noise-to-data ratios from {least:.4g} to {most:.4g}, and the experiment's denoiser "
            f"covers {low:.4g} to {high:.4g}: set denoiser.ratio_min={least:.6g} and denoiser.ratio_max={most:.6g}, or "
            "take a file trained on all of them"
        )


def _compare(part: str, theirs: Any, ours: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted keys at which two values differ, with both."""
    theirs, ours = _completed(part, theirs), _completed(part, ours)
    if not (isinstance(theirs, Mapping) and isinstance(ours, Mapping)):
        if theirs != ours:
            yield part, theirs, ours
        return
    if theirs.get("name") != ours.get("name"):  # other keys are then another part's
        yield part, theirs.get("name"), ours.get("name")
        return
    for key in sorted(theirs.keys() | ours.keys()):
        if theirs.get(key) != ours.get(key):
            yield f"{part}.{key}", theirs.get(key), ours.get(key)


def _completed(part: str, value: Any) -> Any:
    """Give a part the defaults of the keys it leaves out; plain JSON, so that files and experiments compare."""
    if not isinstance(value, Mapping):
        return json.loads(json.dumps(value))
    registry = REGISTRIES.get(part)
    if registry is not None and value.get("name") in registry:
        value = registry.complete(value)
        kept = getattr(registry[value["name"]], "weight_keys", None)
        value = {key: item for key, item in value.items() if kept is None or key in (*kept, "name")}
    return {key: _completed(key, item) for key, item in value.items() if key not in FREE.get(part, ())}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
