"""The header of a file of weights (:mod:`~diffaccel.weights.header`), compared with the experiment that uses the file.

Keys that a header lacks are not compared.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffaccel.denoiser import DENOISERS, Denoiser, NetworkDenoiser
from diffaccel.density import DENSITIES
from diffaccel.errors import UsageError
from diffaccel.nn import NETWORKS
from diffaccel.parts.registry import Registry
from diffaccel.prior import PRIORS
from diffaccel.prior.posterior import POSTERIORS
from diffaccel.process import PROCESSES
from diffaccel.weights import Weights, tensors_sha256

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
OVER_A_DENOISER = ("generator",)
"""Kinds of weights that belong to the denoiser that they were trained over."""


def check_header(path: Path, said: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Compare a header with what is asked of the file.

    Args:
        path: The file.
        said: Its header.
        asked: Key of the header -> the value that the experiment has there.

    Raises:
        UsageError: The file has another value of a key; the message shows both.
    """
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


def check_denoiser(weights: Weights, denoiser: Denoiser) -> None:
    """Refuse a generator that was trained over another denoiser than the experiment's.

    Weights of other kinds serve any denoiser, whatever ``stands_on`` records: a density and a noise-level classifier
    are fitted to noisy data and never evaluate the denoiser. A generator learns from it (as its start, in the features
    of a critic, in objectives such as pairs of the ODE), so that its states suit the denoiser that it was trained over.

    Raises:
        UsageError: The hashes differ; the message shows both.
    """
    trained = weights.header.get("stands_on")
    if weights.kind not in OVER_A_DENOISER or trained is None or not isinstance(denoiser, NetworkDenoiser):
        return
    if (own := tensors_sha256(denoiser.network.state_dict())) != trained:
        raise UsageError(
            f"{weights.path} holds a {weights.kind} that was trained over the denoiser {trained[:16]}, and the "
            f"experiment's denoiser is {own[:16]} (hashes of their tensors): set checkpoint= to the denoiser "
            "that it was trained over, or fit it anew"
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
