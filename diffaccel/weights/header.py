"""Header of a weights file: a JSON object that describes the tensors, to which all formats are converted.

| key | meaning |
|---|---|
| ``kind`` | one of :data:`KINDS` |
| ``network``, ``denoiser``, ``process`` | parts that the weights were trained with, as in an experiment |
| ``prior``, ``posterior``, ``density`` | the same for a generator, a density or a classifier |
| ``shape`` | shape of the samples that are denoised, images or latents, [channels, height, width] |
| ``latents`` | hash of the auto-encoder (``sha256``) and standard deviation of the latents; empty for pixels |
| ``autoencoder`` | network of an auto-encoder, as in an experiment's ``latents`` |
| ``condition`` | condition of the images in addition to labels, as in an experiment; empty for none |
| ``condition_sha256`` | hash of the files that determine the condition, such as those of a text encoder |
| ``classes`` | number of class labels of the network, 0 for none |
| ``trained_ratios`` | lowest and highest noise-to-data ratio of a denoiser's training |
| ``data``, ``images_seen`` | label of the training data, and number of images seen |
| ``training_images`` | number (``n``) and hash (``sha256``) of the training images and their labels |
| ``levels`` | distribution of the noise levels of a fit, as in an experiment |
| ``stands_on`` | :func:`~diffaccel.weights.tensors_sha256` of the frozen denoiser's network during the fit |
| ``feature_networks`` | SHA-256 of the weights of the frozen feature networks that losses and critics used, sorted |
| ``ema_half_life`` | half-life of averaged weights, in images |
| ``chosen_by`` | distances by which this average was chosen among several, with their metric, seed and n |
| ``steps``, ``hours``, ``device``, ``command`` | steps, duration, device and command of the fit |
| ``source`` | provenance of weights imported from another codebase |

Keys that are missing from a file are not compared with an experiment.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from diffaccel.weights.pickles import refuse

KINDS = {
    "denoiser": "a denoiser",
    "generator": "a generator",
    "density": "a density",
    "classifier": "a classifier",
    "extractor": "an extractor",
    "autoencoder": "an auto-encoder",
    "training state": "a training state",
}
"""Kind of weights -> phrase for messages."""


def name_of(kind: str | None) -> str:
    """Return the phrase of a kind for messages."""
    return "weights of unknown kind" if kind is None else KINDS.get(kind, f"the unknown kind {kind[:40]!r}")


def kind_of(header: Mapping[str, Any]) -> str | None:
    """Return the kind of weights from their header; None if it is unknown.

    Files of version 0.1 have no ``kind``, which then follows from other keys.
    """
    if "kind" in header:
        return str(header["kind"])
    if {"channels", "widths", "dim"} <= header.keys():
        return "extractor"
    if "density" in header:
        return "density"
    prior = header.get("prior")
    if isinstance(prior, dict) and prior.get("name") == "implicit" and prior.get("generator", "separate") != "shared":
        return "generator"
    if "module" in header and "averaged" not in header:
        return "classifier"
    return "denoiser" if header.get("network") and ("averaged" in header or "source" in header) else None


def is_foreign(header: Mapping[str, Any]) -> bool:
    """Whether weights are from another codebase; ``convert`` of earlier versions wrote a source for its own, too."""
    return bool(header.get("source", {}).get("format", "diffaccel") != "diffaccel")


def check_types(origin: str, header: Mapping[str, Any]) -> None:
    """Check the types of the values of a header.

    Raises:
        UsageError: A value has another type; the message contains its key.
    """
    for key, (holds, expected) in _TYPES.items():
        if key in header and not holds(header[key]):
            raise refuse(origin, f"its header's {key} is not {expected}")


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and (not value or isinstance(value.get("name"), str))


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(size) is int and size > 0 for size in value)


def _is_range(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2 or not all(type(end) in (int, float) for end in value):
        return False
    return not any(math.isnan(end) for end in value)


def _are_hashes(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


_PART = (_is_part, "a part's name and keys")
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("network", "denoiser", "process", "prior", "posterior", "condition", "autoencoder"), _PART),
    "shape": (_is_shape, "[channels, height, width]"),
    "trained_ratios": (_is_range, "[least, largest]"),
    "classes": (lambda value: type(value) is int and value >= 0, "a number of classes"),
    "images_seen": (lambda value: value is None or type(value) is int, "a number of images"),
    "ema_half_life": (lambda value: type(value) in (int, float) and value > 0, "a number of images"),
    **dict.fromkeys(("stands_on", "condition_sha256"), (lambda value: isinstance(value, str), "a hash")),
    "feature_networks": (_are_hashes, "a list of hashes"),
    "latents": (lambda value: isinstance(value, dict), "a mapping"),
    "training_images": (lambda value: isinstance(value, dict) and type(value.get("n")) is int, "a number and a hash"),
    "source": (lambda value: isinstance(value, dict), "a mapping"),
}
