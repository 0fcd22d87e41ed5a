"""Loading of weights into the networks of an experiment; every file is compared with the experiment first."""

import os
import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from diffaccel.condition import Kinds
from diffaccel.config import Config, portable
from diffaccel.data.conditions import build_conditioner
from diffaccel.denoiser import Denoiser, NetworkDenoiser
from diffaccel.errors import UsageError
from diffaccel.experiment.headers import check_denoiser, check_header
from diffaccel.experiment.latents import check_latents, describe_latents, shape_of
from diffaccel.parts.overrides import as_given
from diffaccel.pretrained import Pretrained, files_sha256
from diffaccel.pretrained.checkpoint import mark_condition
from diffaccel.prior import Prior
from diffaccel.sampling import Sampler
from diffaccel.solver import Solver
from diffaccel.weights import Weights, assign_weights, check_finite, open_weights, read_checkpoint, read_description

if TYPE_CHECKING:
    from diffaccel.training.module import TrainedModule


def load_network(path: Path, key: str, network: nn.Module, kind: str, asked: Mapping[str, Any]) -> Weights:
    """Load a network's weights from a file of any format; from a training state, the averaged weights.

    Args:
        path: File, or folder in diffusers format.
        key: Setting of the path.
        network: Network to load the weights into.
        kind: Kind of the weights: ``denoiser``, ``generator``, ``density`` or ``classifier``.
        asked: Key of the file's header -> value in the experiment.

    Returns:
        Open file.

    Raises:
        UsageError: The file is missing, damaged, contains code, or is of another kind or network; or its header differs
            from the experiment.
    """
    weights = open_weights(path, key).of(kind)
    _check(path, weights.header, asked)
    assign_weights(weights.read(), network, f"weights {path}")
    return weights


def _check(path: Path, header: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Compare a header with an experiment."""
    if "latents" in asked:
        check_latents(path, header, asked["latents"])
    check_header(path, header, {key: value for key, value in asked.items() if key != "latents"})


def load_denoiser(config: Config, path: Path, denoiser: NetworkDenoiser) -> dict[str, Any]:
    """Load a denoiser's weights and return the file's header.

    Raises:
        UsageError: See :func:`load_network`.
    """
    weights = load_network(path, "checkpoint", denoiser.network, "denoiser", _asked_of(config, denoiser))
    mark_condition(weights.header, denoiser.network)
    return dict(weights.header)


def initialise_denoiser(config: Config, path: Path, denoiser: NetworkDenoiser) -> None:
    """Load the initial weights of a fit, which may be those of the same network without condition.

    Raises:
        UsageError: See :func:`load_network`.
    """
    weights, asked = open_weights(path, "init").of("denoiser"), _asked_of(config, denoiser)
    kinds = getattr(denoiser.network, "condition_keys", [one.name for one in fields(Kinds)])
    theirs = weights.header.get("network", config.network)
    widened = getattr(denoiser.network, "widened", None)
    if widened is None or any(theirs.get(key) for key in kinds) or not any(config.network.get(key) for key in kinds):
        load_network(path, "init", denoiser.network, "denoiser", asked)
        return
    asked["network"] = {key: value for key, value in config.network.items() if key not in kinds}
    asked.pop("condition")
    asked.pop("condition_sha256", None)
    _check(path, weights.header, asked)
    assign_weights(widened(weights.read()), denoiser.network, f"weights {path}")


def _asked_of(config: Config, denoiser: NetworkDenoiser) -> dict[str, Any]:
    """Key of a denoiser's header -> value in the experiment."""
    process = {} if denoiser.any_process else {"process": config.process}
    network = {"shape": list(shape_of(config)), "network": config.network, "denoiser": config.denoiser}
    own = {"condition": config.condition, "latents": describe_latents(config)}
    return {**network, **own, **process, **condition_fingerprint(config)}


def dropped_shares(config: Config) -> dict[str, float]:
    """Return the header entries with the shares of labels and other conditions that a fit replaces by null."""
    training = config.training
    labels = {"label_drop": training.label_drop} if config.network.get("classes") else {}
    return {**labels, **({"condition_drop": training.condition_drop} if config.condition else {})}


def condition_fingerprint(config: Config) -> dict[str, str]:
    """Return the header entry with the hash of files that determine the condition; empty for no such files.

    Raises:
        UsageError: A name or key is unknown, or the files are missing.
    """
    channels, height, width = config.shape
    conditioner = build_conditioner(config.condition, (channels, height, width))
    found = None if conditioner is None else conditioner.fingerprint
    return {} if found is None else {"condition_sha256": found}


def load_prior(
    config: Config, path: Path, key: str, prior: Prior, node: Mapping[str, Any], denoiser: Denoiser | None = None
) -> None:
    """Load the weights of a prior's network.

    Args:
        config: Configuration of the run.
        path: File.
        key: Setting of the path.
        prior: Prior with one network.
        node: Keys of the prior in the experiment.
        denoiser: Denoiser that the prior samples with; None if it may differ from that of the prior's fit, for example
            for the initial weights of a fit.

    Raises:
        UsageError: See :func:`load_network`; or a generator was trained with another denoiser.
    """
    ((name, network),) = prior.networks().items()
    asked: dict[str, Any] = {"shape": list(shape_of(config)), "prior": dict(node), "condition": config.condition}
    asked |= {"latents": describe_latents(config), **condition_fingerprint(config)}
    weights = load_network(path, key, network, name, asked)
    if denoiser is not None and config.checkpoint:
        check_denoiser(weights, denoiser)


def check_shared_prior(config: Config, prior: Prior) -> None:
    """Compare a prior that shares the denoiser's weights with the header of their file.

    Raises:
        UsageError: The prior differs from that of the fit.
    """
    if prior.uses_denoiser_weights and config.checkpoint:
        path = Path(config.checkpoint)
        check_header(path, open_weights(path).of("denoiser").header, {"prior": config.prior})


def check_trained(config: Config, sampler: Sampler, fitted: bool = True) -> None:
    """Check that all networks have trained weights.

    Args:
        config: Configuration of the run.
        sampler: Sampler with the networks.
        fitted: Whether a fit of the experiment trains its denoiser.

    Raises:
        UsageError: The denoiser, a fitted prior, or the classifier of a chain has no checkpoint.
    """
    for part, key, wanted, given, trains in (
        ("denoiser", "checkpoint", bool(config.network), config.checkpoint, fitted),
        ("prior", "prior.checkpoint", bool(sampler.prior.networks()), config.prior.get("checkpoint"), True),
        (
            "noise classifier",
            "posterior.checkpoint",
            bool(sampler.auxiliary_networks()),
            config.posterior.get("checkpoint"),
            True,
        ),
    ):
        if wanted and not given:
            fit = f"`diffaccel fit {shlex.quote(config.experiment)}`"
            origin = f"the output of {fit}" if trains else "which the experiment's fit does not train"
            raise UsageError(f"{config.experiment} has no weights for its {part}: set {key}=FILE, {origin}")


def adopt(config: Config) -> Pretrained | None:
    """Replace network and preconditioning by those of another codebase's checkpoint; None for other checkpoints.

    The weights are valid only with the network's own preconditioning, so that both replace the experiment's. The
    experiment's process is kept, because these denoisers run on any process.

    Raises:
        UsageError: The checkpoint is invalid, or makes images of another shape.
    """
    path = Path(config.checkpoint or "")
    if not config.checkpoint or not path.exists():
        return None
    if path.suffix == ".safetensors" and "source" not in read_description(path):
        return None  # where the weights are not used, as in a fit, the file may be damaged
    weights = open_weights(path)
    if not weights.brings_network:
        return None
    found = Pretrained.of(weights)
    shape = shape_of(config)
    if found.shape != shape:
        what = "latents" if config.latents else "images"
        raise UsageError(
            f"checkpoint {config.checkpoint} makes images of shape {found.shape}, but the experiment's {what} have "
            f"shape {shape}: choose another experiment, or set shape="
        )
    config.network, config.denoiser = found.network, found.denoiser
    return found


def feature_networks_of(*paths: str | None) -> list[str]:
    """Return the hashes of the feature networks that weights were trained with, sorted, by the headers of the files."""
    headers = (open_weights(path).header for path in paths if path and Path(path).exists())
    return sorted({one for header in headers for one in header.get("feature_networks", ())})


def check_grid(solver: Solver, denoiser: Denoiser) -> None:
    """Check that the solver's grid does not extend below the levels that a checkpoint was trained on.

    Raises:
        UsageError: The grid extends below them.
    """
    least, low = solver.grid.ratio_min, denoiser.ratio_range[0]
    if solver.grid.ends_at_ratio_min and least < 0.999 * low:
        raise UsageError(
            f"the solver's grid ends at ratio {least:.4g}, but the checkpoint was trained down to {low:.4g}: set "
            f"solver.grid.ratio_min={low:.6g}"
        )


def check_resumable(path: Path, method: "TrainedModule") -> dict[str, Any]:
    """Read and check a training state before a run is resumed from it, and return its content.

    Raises:
        UsageError: The file is damaged, contains code, is of another kind or of other networks, or contains NaN.
    """
    content = read_checkpoint(path)
    if "extractor" in content["diffaccel"]:
        raise UsageError(
            f"resume: {path} is the training state of an extractor, but this run trains a method: choose another file"
        )
    assign_weights(content["state_dict"], method, f"the weights of {path}")
    network = method.averaged()
    average = dict(network.named_parameters()) if network is not None else {}
    own = content["diffaccel"]
    averages = [own.get("ema", {}), *own.get("ema_others", {}).values()]
    if any(one.keys() != average.keys() for one in averages):
        raise UsageError(f"resume: {path} contains averages of other networks: resume with the settings of its run")
    _check_half_lives(path, own, method.training_plan.ema_half_life if average else [])
    for what, tensors in (("", content["state_dict"]), *((" (average)", one) for one in averages)):
        check_finite(tensors, f"resume: {path}{what}", "resume from an older checkpoint")
    return content


def _check_half_lives(path: Path, own: Mapping[str, Any], wanted: list[int]) -> None:
    """Check that a training state has the averages of the run; a single average may go on with another half-life.

    Raises:
        UsageError: The half-lives of several averages differ.
    """
    there = sorted({*map(int, own.get("ema_others", {})), *([own["ema_half_life"]] if "ema_half_life" in own else [])})
    if max(len(there), len(wanted)) > 1 and there != sorted(wanted):
        known = f"half-lives {there}" if there else "one half-life"
        raise UsageError(
            f"resume: {path} has averages with {known}, but this run has {sorted(wanted)}: resume with "
            "training.ema_half_life of that run, or choose another out="
        )


def describe_checkpoint(config: Config, denoiser: Denoiser) -> dict[str, Any] | None:
    """Return path, hash and images seen of the denoiser's weights; None if it is exact or in training."""
    if not config.checkpoint or not config.network or not Path(config.checkpoint).exists():
        return None
    path, given = Path(config.checkpoint), as_given(config.checkpoint)
    shipped = portable(config.checkpoint)
    shown = given if given != config.checkpoint else os.path.relpath(path) if shipped == config.checkpoint else shipped
    if denoiser.source is not None:
        found = {"path": shown, "sha256": files_sha256(path), "images_seen": None}
        return {**found, "source": denoiser.source}
    weights = open_weights(path)
    return {"path": shown, "sha256": weights.sha256, "images_seen": weights.header.get("images_seen")}
