"""Weights into the networks of an experiment: every file is compared with what it is wanted for before it is used."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from diffaccel.config import Config
from diffaccel.denoiser import Denoiser, NetworkDenoiser
from diffaccel.errors import UsageError
from diffaccel.experiment.headers import check_denoiser, check_header
from diffaccel.parts.overrides import as_given
from diffaccel.pretrained import Pretrained, files_sha256
from diffaccel.prior import Prior
from diffaccel.sampling import Sampler
from diffaccel.solver import Solver
from diffaccel.weights import Weights, assign_weights, check_finite, open_weights, read_checkpoint, read_description

if TYPE_CHECKING:
    from diffaccel.methods import Diffusion


def load_network(path: Path, network: nn.Module, kind: str, asked: Mapping[str, Any]) -> Weights:
    """Read a network's weights from a file of any format; those of a training state are its averaged ones.

    Args:
        path: The file, or a folder of diffusers.
        network: The network that takes the weights.
        kind: ``denoiser``, ``generator``, ``density`` or ``classifier``.
        asked: Key of the file's header -> its value in the experiment.

    Returns:
        The open file.

    Raises:
        UsageError: The file is missing, broken, holds code, or is of another kind or network; or its header differs.
    """
    weights = open_weights(path).of(kind)
    check_header(path, weights.header, asked)
    assign_weights(weights.read(), network, f"weights {path}")
    return weights


def load_denoiser(config: Config, path: Path, denoiser: NetworkDenoiser) -> dict[str, Any]:
    """Read a denoiser's weights and return the file's header.

    Raises:
        UsageError: See :func:`load_network`.
    """
    asked: dict[str, Any] = {"shape": config.shape, "network": config.network, "denoiser": config.denoiser}
    if not denoiser.any_process:
        asked["process"] = config.process
    said = dict(load_network(path, denoiser.network, "denoiser", asked).header)
    if said.get("label_drop") == 0:
        denoiser.network.null_class = False  # type: ignore[assignment]  # a network's own attribute
    return said


def load_prior(
    config: Config, path: Path, prior: Prior, node: Mapping[str, Any], denoiser: Denoiser | None = None
) -> None:
    """Read the weights of the one network that a prior has.

    Args:
        config: The run's.
        path: The file.
        prior: The prior.
        node: The prior's keys in the experiment.
        denoiser: The denoiser that the prior samples with; None if it may differ from that of the prior's fit, as
            where a fit only begins with the weights.

    Raises:
        UsageError: See :func:`load_network`; or a generator was trained over another denoiser.
    """
    ((name, network),) = prior.networks().items()
    asked: dict[str, Any] = {"shape": config.shape, "prior": dict(node)}
    weights = load_network(path, network, name, asked)
    if denoiser is not None and config.checkpoint:
        check_denoiser(weights, denoiser)


def check_shared_prior(config: Config, prior: Prior) -> None:
    """Compare a prior that is fitted in the denoiser's own weights with the header of their file.

    Raises:
        UsageError: They differ.
    """
    if prior.uses_denoiser_weights and config.checkpoint:
        path = Path(config.checkpoint)
        check_header(path, open_weights(path).of("denoiser").header, {"prior": config.prior})


def check_trained(config: Config, sampler: Sampler, fitted: bool = True) -> None:
    """Refuse networks without weights: what they sample says nothing.

    Args:
        config: The run's.
        sampler: Holds the networks.
        fitted: Whether a fit of the experiment trains its denoiser.

    Raises:
        UsageError: The denoiser, a prior that is fitted, or the classifier of a chain has no checkpoint.
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
            left = f"which `diffaccel fit {shlex.quote(config.experiment)}` leaves" if trains else "its fit trains none"
            raise UsageError(f"{config.experiment} names no weights for its {part}: set {key}=FILE, {left}")


def adopt(config: Config) -> Pretrained | None:
    """Take network and preconditioning from a checkpoint that brings its own; None if it brings none.

    A network's weights mean nothing under another preconditioning, so that the experiment's own two give way. Its
    process stays: what is read runs on any.

    Raises:
        UsageError: The checkpoint is refused, or makes images of another shape.
    """
    path = Path(config.checkpoint or "")
    if not config.checkpoint or not path.exists():
        return None
    if path.suffix == ".safetensors" and "source" not in read_description(path):
        return None  # where its weights are not needed, as in a fit, the file may be broken
    weights = open_weights(path)
    if not weights.brings_network:
        return None
    found = Pretrained.of(weights)
    channels, height, width = config.shape
    if found.shape != (channels, height, width):
        raise UsageError(
            f"checkpoint {config.checkpoint} makes images of shape {found.shape}, the experiment's are of shape "
            f"{(channels, height, width)}: take another experiment, or set shape="
        )
    config.network, config.denoiser = found.network, found.denoiser
    return found


def check_grid(solver: Solver, denoiser: Denoiser) -> None:
    """Refuse a grid of the experiment's that goes on below what a checkpoint was trained on.

    Raises:
        UsageError: It does.
    """
    least, low = solver.grid.ratio_min, denoiser.ratio_range[0]
    if least < 0.999 * low:
        raise UsageError(
            f"the solver's grid ends at ratio {least:.4g}, the checkpoint is trained down to {low:.4g}: set "
            f"solver.grid.ratio_min={low:.6g}"
        )


def check_resumable(path: Path, method: "Diffusion") -> dict[str, Any]:
    """Read a training state before a run goes on from it, and return its content.

    Raises:
        UsageError: The file is broken, holds code, is of another kind or of other networks, or holds NaN.
    """
    content = read_checkpoint(path)
    if "extractor" in content["diffaccel"]:
        raise UsageError(f"resume: {path} is the training state of an extractor, and this run trains a method")
    assign_weights(content["state_dict"], method, f"the weights of {path}")
    network = method.averaged()
    average = dict(network.named_parameters()) if network is not None else {}
    if content["diffaccel"].get("ema", {}).keys() != average.keys():
        raise UsageError(f"resume: {path} holds averages of other networks: go on with the settings that it had")
    for what, tensors in (("", content["state_dict"]), (" (average)", content["diffaccel"].get("ema", {}))):
        check_finite(tensors, f"resume: {path}{what}", "go on from an older checkpoint")
    return content


def describe_checkpoint(config: Config, denoiser: Denoiser) -> dict[str, Any] | None:
    """Path, hash and images seen of the denoiser's weights; None for an exact denoiser or one being trained."""
    if not config.checkpoint or not config.network or not Path(config.checkpoint).exists():
        return None
    path, given = Path(config.checkpoint), as_given(config.checkpoint)
    shown = given if given != config.checkpoint else os.path.relpath(path)
    if denoiser.source is not None:
        found = {"path": shown, "sha256": files_sha256(path), "images_seen": None}
        return {**found, "source": denoiser.source}
    weights = open_weights(path)
    return {"path": shown, "sha256": weights.sha256, "images_seen": weights.header.get("images_seen")}
