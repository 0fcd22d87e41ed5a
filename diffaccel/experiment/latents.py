"""Latents of an experiment: the auto-encoder with its weights, its checks, and the data module of a fit."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffaccel.config import Config
from diffaccel.data.conditions import Conditioner
from diffaccel.errors import UsageError
from diffaccel.experiment.headers import check_header
from diffaccel.latents import AUTOENCODERS, AutoEncoder, Latents
from diffaccel.parts.checks import conform, positive
from diffaccel.pretrained.diffusers_autoencoder import folder_of
from diffaccel.solver import Solver
from diffaccel.weights import Weights, assign_weights, open_weights

if TYPE_CHECKING:
    from diffaccel.data import DataModule

FOLDER = "latents"
"""Folder of encoded images in runs/<data>."""
CLAMPS = ("clip", "clamp")
"""Keys of solvers that restrict samples to the range of images."""


def image_shape_of(config: Config) -> tuple[int, int, int]:
    """Return the image shape (C, H, W)."""
    channels, height, width = config.shape
    return channels, height, width


def shape_of(config: Config) -> tuple[int, int, int]:
    """Return the shape (C, H, W) of the samples: that of the latents, if the experiment has some, or the image shape.

    Raises:
        UsageError: The auto-encoder can't be built for these images.
    """
    if not config.latents:
        return image_shape_of(config)
    with torch.device("meta"):
        return _build(config).shape


def _build(config: Config) -> AutoEncoder:
    """Build the auto-encoder, with random weights."""
    return AUTOENCODERS.build(node_of(config), shape=image_shape_of(config))


def node_of(config: Config) -> dict[str, Any]:
    """Return name and keys of the auto-encoder's network."""
    return {key: value for key, value in config.latents.items() if key not in AUTOENCODERS.extra}


def options_of(config: Config) -> dict[str, Any]:
    """Return the other keys of ``latents``, with defaults, checked.

    Raises:
        UsageError: A value has the wrong type, or is out of range.
    """
    given: dict[str, Any] = {"checkpoint": None, "std": 1.0, "sample": True, "cache": None}
    for key in given:
        value = config.latents.get(key, given[key])
        given[key] = value if value is None else conform(f"latents.{key}", value, AUTOENCODERS.extra[key])
    positive("latents", std=given["std"])
    if not isinstance(given["sample"], bool):
        raise UsageError(f"latents.sample={given['sample']}: set true or false")
    return given


def build_latents(config: Config, load: bool = True) -> Latents | None:
    """Build the latents of an experiment; None for pixels.

    The network of a folder of diffusers replaces that of the experiment.

    Args:
        config: Configuration of the run.
        load: Whether to read the auto-encoder's weights.

    Raises:
        UsageError: A key is unknown, the images can't be encoded, or the weights are not configured, missing, damaged,
            or of another network.
    """
    if not config.latents:
        return None
    options = options_of(config)
    path = None if options["checkpoint"] is None else folder_of(Path(options["checkpoint"]))
    if not load and (path is None or not path.exists()):
        return Latents(_build(config), options["std"])
    weights = _open(config, path)
    if "source" in weights.header:
        kept = {key: value for key, value in config.latents.items() if key in AUTOENCODERS.extra}
        config.latents = {**weights.header["autoencoder"], **kept}
    autoencoder = _build(config)
    if load:
        check_header(weights.path, weights.header, {"autoencoder": node_of(config)})
        assign_weights(weights.read(), autoencoder, f"the auto-encoder {weights.path}")
    latents = Latents(autoencoder, options["std"])
    if load:
        config.autoencoder_sha256 = latents.sha256
    return latents


def _open(config: Config, path: Path | None) -> Weights:
    """Open the auto-encoder's weights.

    Raises:
        UsageError: They are not configured, missing, or of another kind.
    """
    fit = f"`diffaccel fit {shlex.quote(f'{config.data_name}/autoencoder')}`"
    if path is None:
        raise UsageError(f"{config.experiment} has no auto-encoder: set latents.checkpoint=FILE, the output of {fit}")
    if not path.exists():
        raise UsageError(
            f"the auto-encoder latents.checkpoint={path} does not exist: train it with {fit}, or give a file of such a "
            "fit, or a folder of diffusers' AutoencoderKL"
        )
    weights = open_weights(path)
    if weights.kind == "training state":
        raise UsageError(
            f"latents.checkpoint={path} is a training state: finish the fit, and give its autoencoder.safetensors"
        )
    return weights.of("autoencoder")


def describe_latents(config: Config) -> dict[str, Any]:
    """Return the header entry of weights that are trained on latents: hash and standard deviation; empty for pixels.

    Raises:
        UsageError: See :func:`build_latents`.
    """
    if not config.latents:
        return {}
    if config.autoencoder_sha256 is None:
        build_latents(config)
    return {"sha256": config.autoencoder_sha256, "std": options_of(config)["std"]}


def check_latents(path: Path, header: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Check that weights were trained on the latents that an experiment samples.

    Weights without a header, and those of other codebases, are not compared.

    Args:
        path: File.
        header: Header of the file.
        own: Entry of the experiment, see :func:`describe_latents`.

    Raises:
        UsageError: They were trained on other latents, or one of the two has pixels.
    """
    if not header or "source" in header:
        return
    theirs = header.get("latents") or {}
    if theirs == own:
        return
    if not own:
        said, remedy = "was trained on latents, but the experiment samples pixels", "use its own experiment"
    elif not theirs:
        said, remedy = "was trained on pixels, but the experiment samples latents", "fit it on latents"
    elif theirs.get("sha256") != own["sha256"]:
        hashes = f"{str(theirs.get('sha256'))[:16]}, the experiment's is {str(own['sha256'])[:16]}"
        said = f"was trained on latents of another auto-encoder ({hashes}, hashes of the tensors)"
        remedy = "set latents.checkpoint= to the auto-encoder of its fit, or fit it again"
    else:
        said = f"was trained on latents of standard deviation {theirs.get('std')}, the experiment has {own['std']}"
        remedy = "set latents.std= to the former"
    raise UsageError(f"{path} {said}: {remedy}")


def check_combination(config: Config, conditioner: Conditioner | None, discrete: bool) -> None:
    """Check that everything that the experiment does is defined for latents.

    Args:
        config: Configuration of the run.
        conditioner: Part that makes the conditions of the images.
        discrete: Whether the data are images.

    Raises:
        UsageError: A condition or an augmentation acts on pixels, the data are not images, or a likelihood of images is
            required.
    """
    if not config.latents:
        return
    if not discrete:
        raise UsageError(f"data={config.data['name']} has points instead of images: leave latents out")
    if conditioner is not None and conditioner.kinds.pixels:
        raise UsageError(
            f"condition={config.condition['name']} acts on pixels, and the experiment samples latents: leave out "
            "condition= or latents="
        )
    if config.likelihood:
        raise UsageError(
            "likelihood=true: a diffusion in latents has no likelihood of images: set likelihood=false, or leave "
            "latents out"
        )
    if config.training.augment:
        raise UsageError("training.augment moves pixels, and the experiment trains on latents: set training.augment=0")


def check_solver(config: Config, solver: Solver) -> None:
    """Check that a solver does not restrict latents to the range of images.

    Raises:
        UsageError: It does.
    """
    if config.latents and (key := next((key for key in CLAMPS if getattr(solver, key, False)), None)):
        raise UsageError(
            f"solver.{key}=true restricts samples to [-1, 1], the range of images, which latents exceed: set "
            f"solver.{key}=false"
        )


def build_fit_data(config: Config, latents: Latents | None, device: str = "cpu") -> "DataModule":
    """Build the data module of a fit: of images, or of their latents.

    Args:
        config: Configuration of the run.
        latents: Latents, with the auto-encoder's weights; None for pixels.
        device: Device of the auto-encoder.

    Raises:
        UsageError: The data are missing or damaged, or the images have another shape.
    """
    from diffaccel.experiment.evaluation import build_data

    if latents is None:
        return build_data(config)
    from diffaccel.latents.data import LatentData  # imported here, because it requires Lightning, which takes seconds

    options = options_of(config)
    folder = Path(options["cache"] or Path("runs", config.data_name, FOLDER))
    own = {"latents": latents, "folder": folder, "sample": options["sample"], "device": device}
    return build_data(config, lambda **keys: LatentData(**own, **keys))
