"""Comparison of the header of a weights file (:mod:`~diffaccel.weights.header`) with an experiment.

Keys that are missing from a header are not compared.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffaccel.captions.encoders import TEXT_ENCODERS
from diffaccel.data.conditions import CONDITIONERS
from diffaccel.denoiser import DENOISERS, Denoiser, NetworkDenoiser
from diffaccel.density import DENSITIES
from diffaccel.errors import UsageError
from diffaccel.latents import AUTOENCODERS
from diffaccel.nn import NETWORKS
from diffaccel.parts.registry import Registry
from diffaccel.prior import PRIORS
from diffaccel.prior.posterior import POSTERIORS
from diffaccel.process import PROCESSES
from diffaccel.weights import Weights, tensors_sha256

REGISTRIES: dict[str, Registry[Any]] = {
    "autoencoder": AUTOENCODERS,
    "condition": CONDITIONERS,
    "encoder": TEXT_ENCODERS,
    "network": NETWORKS,
    "denoiser": DENOISERS,
    "process": PROCESSES,
    "prior": PRIORS,
    "posterior": POSTERIORS,
    "density": DENSITIES,
}
FREE = {
    "condition": ("samples", "seed", "lpips"),  # of sampling
    "network": ("dropout",),  # affects training only
    "denoiser": ("ratio_min", "ratio_max"),  # the range of training is in `trained_ratios`
}
"""Keys of a part that do not affect its weights, and may differ from those in the file."""
NAMED = 4
"""Maximum number of differences in an error message."""
OVER_A_DENOISER = ("generator",)
"""Kinds of weights that are valid only with the denoiser that they were trained with."""


def check_header(path: Path, header: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Compare a header with the values of an experiment.

    Args:
        path: File.
        header: Header of the file.
        asked: Key of the header -> value in the experiment.

    Raises:
        UsageError: The file has another value; the message contains both.
    """
    differences = [
        f"{key} is {_short(theirs)} in the file and {_short(ours)} in the experiment"
        for part, value in asked.items()
        if part in header
        for key, theirs, ours in _compare(part, header[part], value)
    ]
    if differences:
        more = f", and {len(differences) - NAMED} more" if len(differences) > NAMED else ""
        origin = f" ({header['experiment']} by its header)" if header.get("experiment") else ""
        raise UsageError(
            f"{path} does not fit the experiment: {'; '.join(differences[:NAMED])}{more}: use the experiment that the "
            f"file was made with{origin}, or another file"
        )


def check_ratios(path: Path, header: Mapping[str, Any], used: tuple[float, float]) -> None:
    """Check that weights were trained on all noise levels at which they are used.

    Args:
        path: File.
        header: Header of the file.
        used: Lowest and highest noise-to-data ratio in use.

    Raises:
        UsageError: ``used`` exceeds the range in the header; 0.1 % is allowed for rounding.
    """
    if (trained := header.get("trained_ratios")) is None:
        return
    (low, high), (least, most) = used, trained
    if low < 0.999 * least or high > 1.001 * most:
        raise UsageError(
            f"{path} was trained on noise-to-data ratios from {least:.4g} to {most:.4g}, but the experiment's denoiser "
            f"covers {low:.4g} to {high:.4g}: set denoiser.ratio_min={least:.6g} and denoiser.ratio_max={most:.6g}, or "
            "use a file trained on the whole range"
        )


def check_denoiser(weights: Weights, denoiser: Denoiser) -> None:
    """Check that a generator was trained with the experiment's denoiser.

    Weights of other kinds are valid with any denoiser, whatever ``stands_on`` contains: densities and noise-level
    classifiers are fitted to noisy data and do not use the denoiser. A generator is trained with the denoiser (by its
    initialisation, the features of a critic, and objectives such as ODE pairs), so that its states suit this denoiser.

    Raises:
        UsageError: The hashes of the denoisers differ; the message contains both.
    """
    trained = weights.header.get("stands_on")
    if weights.kind not in OVER_A_DENOISER or trained is None or not isinstance(denoiser, NetworkDenoiser):
        return
    if (own := tensors_sha256(denoiser.network.state_dict())) != trained:
        raise UsageError(
            f"{weights.path} contains a {weights.kind} that was trained with the denoiser {trained[:16]}, but the "
            f"experiment's denoiser is {own[:16]} (hashes of the tensors): set checkpoint= to the former denoiser, or "
            f"fit the {weights.kind} again"
        )


def _compare(part: str, theirs: Any, ours: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted keys at which two values differ, with both values."""
    theirs, ours = _completed(part, theirs), _completed(part, ours)
    if not (isinstance(theirs, Mapping) and isinstance(ours, Mapping)):
        if theirs != ours:
            yield part, theirs, ours
        return
    if theirs.get("name") != ours.get("name"):  # the other keys are of different parts
        yield part, theirs.get("name"), ours.get("name")
        return
    for key in sorted(theirs.keys() | ours.keys()):
        if theirs.get(key) != ours.get(key):
            yield f"{part}.{key}", theirs.get(key), ours.get(key)


def _completed(part: str, value: Any) -> Any:
    """Add the defaults of missing keys to a part, as plain JSON, so that files and experiments are comparable."""
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
