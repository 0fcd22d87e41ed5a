"""Cache keys: everything that determines the images of a point and their scores."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffaccel.config import STANDARD, Config
from diffaccel.evaluation import Identity
from diffaccel.features.extractors import Extractor
from diffaccel.metrics.reference import Reference
from diffaccel.pretrained import files_sha256
from diffaccel.version import __version__


def identify(
    config: Config, extractor: Extractor, reference: Reference, floor: Reference | None
) -> Callable[[float], Identity]:
    """Return a function budget -> everything that determines the images and metrics of a point."""
    scores: dict[str, Any] = {"extractor": extractor.sha256, "reference": reference.sha256}
    scores["floor"] = floor and floor.sha256
    if config.likelihood:
        scores["likelihood"] = config.likelihood_n
    if config.metrics != list(STANDARD):
        scores["metrics"] = config.metrics
    images = identify_images(config)
    return lambda budget: Identity(images(budget), scores)


def identify_images(config: Config) -> Callable[[float], dict[str, Any]]:
    """Return a function budget -> everything that determines the images, with hashes in place of files."""
    parts = identify_parts(config)

    def at(budget: float) -> dict[str, Any]:
        settings = {part: by_content(node) for part, node in config.at(budget).items()}
        return {**parts, "budget": budget, "settings": settings}

    return at


def identify_parts(config: Config) -> dict[str, Any]:
    """Collect the parts and settings that determine images, except for budget, prior and solver."""
    parts, arithmetic = ("method", "shape", "process", "network", "denoiser"), ("precision", "compile", "channels_last")
    keys = (*parts, *arithmetic, "n", "seed", "batch_size")
    return {
        **{key: getattr(config, key) for key in keys},
        **({"truncate": True} if config.truncate else {}),
        **({} if config.tweedie_ratio is None else {"tweedie": [config.tweedie_ratio, config.tweedie_counted]}),
        "checkpoint": _content(config.checkpoint),
        "posterior": by_content(config.posterior),
        "version": __version__,
    }


def by_content(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part with hashes in place of the paths of its weights."""
    return {key: _content(value) if key in ("checkpoint", "init") else value for key, value in node.items()}


def _content(path: str | None) -> str | None:
    return files_sha256(Path(path)) if path and Path(path).exists() else None


def describe_configuration(config: Config, measured: bool) -> dict[str, Any]:
    """Collect what determines a point besides budget, settings, n and seed, to distinguish curves in a comparison.

    Args:
        config: Configuration of the run.
        measured: Whether the point is of the configured weights, and not of weights in training.
    """
    found = identify_parts(config)
    for key in ("n", "seed", "batch_size", "precision", "compile", "channels_last", "version"):
        found.pop(key, None)  # separate keys of the point, or irrelevant beyond rounding
    if config.by_nfe:
        tuning = json.dumps([config.prior, config.solver, config.by_nfe], sort_keys=True, default=str)
        found["tuning"] = hashlib.sha256(tuning.encode()).hexdigest()
    if not measured:
        found |= {"training": dataclasses.asdict(config.training), "levels": config.levels, "data": config.data}
        found["limit"] = config.limit
        found["init"] = files_sha256(Path(config.init)) if config.init else None
    return found
