"""Cache keys: everything that determines the images of a point and their scores."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffaccel.config import STANDARD, Config, parse_overrides, portable
from diffaccel.config.keys import map_paths
from diffaccel.data.conditions import CONDITIONERS, Given, HeldOut, sampling_keys
from diffaccel.evaluation import Identity
from diffaccel.evaluation.judges import Judge
from diffaccel.experiment.build import build_inputs
from diffaccel.experiment.latents import node_of, options_of
from diffaccel.metrics.base import build_metrics
from diffaccel.parts.catalogue import registry_of
from diffaccel.parts.history import explicit
from diffaccel.parts.registry import Registry, part_of
from diffaccel.parts.schema import is_path
from diffaccel.pretrained import files_sha256
from diffaccel.pretrained.diffusers_autoencoder import folder_of
from diffaccel.version import __version__
from diffaccel.weights import tensors_sha256

DETERMINING = (
    *("method", "data", "limit", "shape", "condition", "latents", "process", "network", "denoiser", "posterior"),
    *("by_nfe", "tweedie_ratio", "tweedie_counted", "truncate", "compile", "channels_last"),
    *("extractor", "judges", "reference", "floor", "jpeg", "metrics", "likelihood", "likelihood_n"),
)
"""Keys that determine images or scores, without those that a point has as they are: budget, n, seed, prior ..."""


def identify(config: Config, judges: Sequence[Judge]) -> Callable[[float], Identity]:
    """Return a function budget -> everything that determines the images and metrics of a point."""
    of = identify_settings(config, judges)
    return lambda budget: of(budget, config.at(budget))


def identify_settings(
    config: Config, judges: Sequence[Judge]
) -> Callable[[float, Mapping[str, Mapping[str, Any]]], Identity]:
    """Return a function of budget, and prior and solver -> everything that determines their images and metrics."""
    inputs = build_inputs(config)
    images = _images(config, inputs)
    by_class = any(metric.needs_labels for metric in build_metrics(config.metrics))
    scores = judges[0].identity(by_class)
    if len(judges) > 1:
        scores["judges"] = [judge.identity(by_class) for judge in judges[1:]]
    if by_class and (labels := _labels(config, inputs)) is not None:
        scores["classes"] = labels
    if config.likelihood:
        scores["likelihood"] = {"n": config.likelihood_n, "order": "random"}  # earlier points: the first of the file
    if sampling_keys(config.condition)["samples"] > 1:
        scores["blocks"] = "conditions"  # earlier points: samples of a condition are in several blocks
    if config.metrics != list(STANDARD):
        scores["metrics"] = [one if isinstance(one, str) else by_content("metric", one) for one in config.metrics]
    return lambda budget, settings: Identity(images(budget, settings), scores)


def identify_images(config: Config) -> Callable[[float], dict[str, Any]]:
    """Return a function budget -> everything that determines the images, with hashes in place of files."""
    images = _images(config, build_inputs(config))
    return lambda budget: images(budget, config.at(budget))


def _images(
    config: Config, inputs: HeldOut | Given | None
) -> Callable[[float, Mapping[str, Mapping[str, Any]]], dict[str, Any]]:
    """Return a function of budget, and prior and solver -> everything that determines the images."""
    parts = identify_parts(config)
    if inputs is not None:
        parts["inputs"] = inputs.identity(config.n)
        if config.network.get("classes"):
            parts["labels"] = _labels(config, inputs)

    def of(budget: float, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        whole = {part: by_content(part, node) for part, node in explicit(settings).items()}
        return {**parts, "budget": budget, "settings": whole}

    return of


def _labels(config: Config, inputs: HeldOut | Given | None) -> str | None:
    """Return a hash of the class labels of the inputs; None for no labels."""
    labels = None if inputs is None else inputs.labels(range(config.n))
    return None if labels is None else tensors_sha256({"labels": labels})


def identify_parts(config: Config) -> dict[str, Any]:
    """Collect the parts and settings that determine images, except for budget, prior and solver."""
    keys = ("method", "shape", "precision", "compile", "channels_last", "n", "seed", "batch_size")
    return {
        **{key: getattr(config, key) for key in keys},
        **{part: by_content(part, getattr(config, part)) for part in ("process", "network", "denoiser", "posterior")},
        **({"condition": _condition(config.condition)} if config.condition else {}),
        **({"latents": _latents(config)} if config.latents else {}),
        # Earlier points: index mod classes, also beside another condition.
        **({"labels": "of the condition" if config.condition else "rotated"} if config.network.get("classes") else {}),
        **({"truncate": True} if config.truncate else {}),
        **({} if config.tweedie_ratio is None else {"tweedie": [config.tweedie_ratio, config.tweedie_counted]}),
        "checkpoint": _content(config.checkpoint),
        "version": __version__,
    }


def _condition(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the node of a condition by content, without the paths of files that the identity of the inputs covers."""
    hashed = getattr(CONDITIONERS[node["name"]], "hashed", False)
    return _without_paths(CONDITIONERS, node) if hashed else by_content("condition", node)


def _without_paths(registry: Registry[Any], node: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in node.items():
        annotation = registry.annotation(key, node.get("name"))
        inner = part_of(annotation)
        if not is_path(annotation):
            found[key] = _without_paths(inner, value) if inner is not None and isinstance(value, Mapping) else value
    return found


def _latents(config: Config) -> dict[str, Any]:
    """Return what determines the decoded images: the auto-encoder's weights, and the scale of the latents."""
    options = options_of(config)
    path = None if options["checkpoint"] is None else str(folder_of(Path(options["checkpoint"])))
    return {**node_of(config), "std": options["std"], "checkpoint": _content(path)}


def by_content(part: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part's node with the hash of each file in place of its path, those of its own parts included."""
    return _by_content(registry_of(part), node)


def _by_content(registry: Registry[Any], node: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(node)
    for key, value in node.items():
        annotation = registry.annotation(key, node.get("name"))
        if isinstance(value, str) and is_path(annotation) and (key in registry.extra or Path(value).is_file()):
            found[key] = _content(value)  # a checkpoint may be a folder of diffusers; other folders are not hashed
        elif isinstance(value, Mapping) and (inner := part_of(annotation)) is not None:
            found[key] = _by_content(inner, value)
    return found


def _content(path: str | None) -> str | None:
    return files_sha256(Path(path)) if path and Path(path).exists() else None


def settings_of(config: Config, budget: float) -> dict[str, dict[str, Any]]:
    """Return prior and solver of a budget as a point records them: changed defaults are explicit, paths portable."""
    settings = explicit(config.at(budget))
    map_paths(settings, portable)
    return settings


def searched_with(config: Config) -> dict[str, Any]:
    """Return the settings of the command line that the experiment of a search's winners keeps."""
    kept = {*DETERMINING, "checkpoint", "precision", "prior", "solver", "search"} - {"by_nfe"}
    return {key: value for key, value in parse_overrides(config.words, trains=False).items() if key in kept}


def words_of(config: Config) -> list[str]:
    """Return the settings of the command line that a point follows from and no other key of the point contains."""
    return [word for word in config.words if word.partition("=")[0].partition(".")[0] in DETERMINING]


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
        found["tuning"] = {str(budget): settings_of(config, budget) for budget in config.by_nfe}
    if not measured:
        found |= {"training": dataclasses.asdict(config.training), "levels": config.levels, "data": config.data}
        found["limit"] = config.limit
        found["init"] = files_sha256(Path(config.init)) if config.init else None
    return found
