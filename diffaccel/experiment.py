"""From a configuration to the objects of a run."""

import dataclasses
import hashlib
import json
import os
import shlex
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from diffaccel import __version__
from diffaccel.config import Config, find
from diffaccel.data import SOURCES, DataModule
from diffaccel.denoiser import DENOISERS, Denoiser, NetworkDenoiser
from diffaccel.density import Density
from diffaccel.errors import UsageError
from diffaccel.evaluator import BitsPerDim, Evaluator
from diffaccel.levels import LEVELS
from diffaccel.methods import METHODS, Diffusion
from diffaccel.methods.ema import of_network
from diffaccel.nn import NETWORKS, UNet
from diffaccel.nn.features import EXTRACTORS, Extractor
from diffaccel.nn.jpeg import AsJPEG
from diffaccel.overrides import as_given
from diffaccel.pretrained import Pretrained, files_sha256, is_pretrained
from diffaccel.pretrained import read as read_pretrained
from diffaccel.prior import PRIORS, DensityPrior, LevelPosterior, Prior
from diffaccel.prior.posterior import POSTERIORS
from diffaccel.process import PROCESSES
from diffaccel.reference import Reference, load_reference
from diffaccel.search import Searcher
from diffaccel.solver import SOLVERS, Solver
from diffaccel.weights import assign_weights, check_finite, file_sha256, load_weights, read_checkpoint, read_description

WEIGHT_KEYS = ("name", "generator", "network", "density", "checkpoint", "init")
"""Keys of a prior that say what is fitted in it, and whose weights it has."""


def shape_of(config: Config) -> tuple[int, int, int]:
    """(C, H, W)."""
    channels, height, width = config.shape
    return channels, height, width


def build_method(config: Config, load: bool = True, frozen: bool = False) -> Diffusion:
    """Build a method with its weights.

    Args:
        config: The run's.
        load: Whether to read the weights that the configuration names; without, networks start at random, or from
            ``init``.
        frozen: Whether weights will not change any more: ``compile`` then takes them for constants, which is faster.

    Raises:
        UsageError: Unknown parts, keys or values; weights that are missing, broken or of another network, or, where
            they will not change any more, not named.
    """
    shape = shape_of(config)
    torch.manual_seed(config.seed)
    solver = SOLVERS.build(config.solver)  # first: a mistyped name shouldn't wait for weights to be read
    pretrained = adopt(config)
    process = PROCESSES.build(config.process)
    network = NETWORKS.build(config.network, shape=shape) if config.network else None
    denoiser: Denoiser = DENOISERS.build(config.denoiser, process=process, network=network)
    if isinstance(denoiser, NetworkDenoiser) and network is None:
        raise UsageError(f"denoiser {config.denoiser['name']!r} needs a network: set network=unet, say")
    if pretrained is not None and network is not None:
        check_grid(solver, denoiser)
    if pretrained is not None and network is not None and load:
        denoiser.source = pretrained.source
        assign_weights(pretrained.tensors, network, f"the weights of {config.checkpoint}")
    elif network is not None and (weights := config.checkpoint if load else config.init):
        load_denoiser(Path(weights), network)
    posterior = None
    if config.posterior:
        node = dict(config.posterior)
        checkpoint = node.pop("checkpoint", None)
        posterior = POSTERIORS.build(node, denoiser=denoiser, shape=shape)
        if load and checkpoint:
            load_weights(Path(checkpoint), cast(nn.Module, posterior.network))
    method = METHODS.build(
        config.method,
        denoiser=denoiser,
        prior=build_prior(config.prior, posterior, denoiser, shape, load),
        solver=solver,
        levels=LEVELS.build(config.levels),
        training=config.training,
        shape=shape,
        seed=config.seed,
    )
    if load and frozen:
        check_trained(config, method)
    for budget in config.by_nfe:
        parts = config.at(budget)
        prior: Prior = method.prior
        if parts["prior"] != config.prior:
            prior = build_prior(parts["prior"], posterior, denoiser, shape, load)
            if all(parts["prior"].get(key) == config.prior.get(key) for key in WEIGHT_KEYS):
                prior.share_weights(method.prior)  # it may be in training
        method.by_nfe[budget] = prior, SOLVERS.build(parts["solver"])
    for name, network in method.evaluated_networks().items() if config.network else ():
        if config.channels_last:
            network.to(memory_format=torch.channels_last)
        if config.compile and not isinstance(network, Density):  # a few matrix products, and copied to other levels
            # The forward and not the module: names in checkpoints stay, and the counter's hooks run outside the graph.
            constant = frozen or (method.frozen and name == "denoiser")  # holds where no gradient is taken
            network.forward = torch.compile(network.forward, options={"freezing": constant})
            if not frozen and isinstance(network, UNet):
                network.encode = torch.compile(network.encode)  # type: ignore[method-assign]  # a critic may use it alone
    return method


def check_trained(config: Config, method: Diffusion) -> None:
    """Refuse networks without weights: what they sample says nothing.

    Raises:
        UsageError: The denoiser, or a prior that is fitted, has no checkpoint.
    """
    prior = method.prior.networks()
    for part, key, wanted, given, fitted in (
        ("denoiser", "checkpoint", bool(config.network), config.checkpoint, "denoiser" in method.trained_networks()),
        ("prior", "prior.checkpoint", bool(prior), config.prior.get("checkpoint"), True),
    ):
        if wanted and not given:
            source = (
                f"which `diffaccel fit {shlex.quote(config.experiment)}` leaves" if fitted else "its fit trains none"
            )
            raise UsageError(f"{config.experiment} names no weights for its {part}: set {key}=FILE, {source}")


def adopt(config: Config) -> Pretrained | None:
    """Take network and preconditioning from a checkpoint that brings its own; None if it brings none.

    A network's weights mean nothing under another preconditioning, so that the experiment's own two give way. Its
    process stays: what is read runs on any.

    Raises:
        UsageError: The checkpoint is refused, or makes images of another shape.
    """
    if not config.checkpoint or not is_pretrained(Path(config.checkpoint)):
        return None
    found = read_pretrained(config.checkpoint)
    if found.shape != shape_of(config):
        raise UsageError(
            f"checkpoint {config.checkpoint} makes images of shape {found.shape}, the experiment's are of shape "
            f"{shape_of(config)}: take another experiment, or set shape="
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


def build_prior(
    node: dict[str, Any],
    posterior: LevelPosterior | None,
    denoiser: Denoiser,
    shape: tuple[int, int, int],
    load: bool = True,
) -> Prior:
    """Build a prior, with its own weights if it has any (``checkpoint``), or the first ones of a fit (``init``).

    Raises:
        UsageError: An unknown name or key, a value out of range, a chain without anything that reads noise levels, or
            weights that are missing or of another network.
    """
    if node.get("name") == "chain" and posterior is None:
        raise UsageError("prior 'chain' needs something that reads noise levels: set posterior=classifier or exact")
    node = dict(node)
    checkpoint, init = node.pop("checkpoint", None), node.pop("init", None)
    context: dict[str, Any] = {} if posterior is None else {"posterior": posterior}
    prior = PRIORS.build(node, denoiser=denoiser, shape=shape, **context)
    for key, given in (("checkpoint", checkpoint), ("init", init)):
        if given and not prior.networks():
            raise UsageError(f"prior {node['name']!r} has no network: remove prior.{key}")
    if weights := (checkpoint if load else None) or init:
        ((name, network),) = prior.networks().items()
        load_denoiser(Path(weights), network, name)
    return prior


def load_denoiser(path: Path, network: nn.Module, name: str = "denoiser") -> dict[str, Any]:
    """Read a network's weights from safetensors or from a checkpoint of ``fit`` (its averaged weights).

    Args:
        path: The file.
        network: What they are for.
        name: Which network of the run, ``denoiser``, ``generator`` or ``density``.

    Raises:
        UsageError: The file is missing, broken, holds code, or belongs to another network.
    """
    if path.suffix == ".safetensors" or not path.is_file():
        return load_weights(path, network)
    content = read_checkpoint(path)
    own = of_network(content["diffaccel"].get("ema", {}), name)
    if not own:
        raise UsageError(f"checkpoint {path} holds no averaged {name}: give one of a run that trained it")
    check_finite(own, f"checkpoint {path}", "get or train the file anew")
    assign_weights(own, network, f"the weights of {path}")
    return {"images_seen": content["diffaccel"]["images_seen"]}


def check_resumable(path: Path, method: Diffusion) -> dict[str, Any]:
    """Read a checkpoint before a run goes on from it, and return its content.

    Raises:
        UsageError: As :func:`read_checkpoint`, or it belongs to other networks, or holds NaN.
    """
    content = read_checkpoint(path)
    assign_weights(content["state_dict"], method, f"the weights of {path}")
    network = method.averaged()
    average = dict(network.named_parameters()) if network is not None else {}
    if content["diffaccel"].get("ema", {}).keys() != average.keys():
        raise UsageError(f"resume: {path} holds averages of other networks: go on with the settings that it had")
    for what, tensors in (("", content["state_dict"]), (" (average)", content["diffaccel"].get("ema", {}))):
        check_finite(tensors, f"resume: {path}{what}", "go on from an older checkpoint")
    return content


def build_data(config: Config) -> DataModule:
    """Build the data module and check that its images have the experiment's shape.

    Raises:
        UsageError: Missing or broken data, or images of another shape.
    """
    training = config.training
    data = DataModule(
        config.data,
        batch_size=training.batch_size,
        seed=config.seed,
        limit=config.limit,
        flip=training.flip,
        num_workers=training.workers,
    )
    if "label" in config.data:
        data.source.label = as_given(config.data["label"]) or data.source.label
    if data.shape != shape_of(config):
        raise UsageError(
            f"{data.label}: images have shape {data.shape}, the experiment's is {shape_of(config)}: "
            "set shape= (and a network that fits), or another data set"
        )
    return data


def build_extractor(config: Config) -> Extractor:
    """Build the extractor that scores."""
    return EXTRACTORS.build(config.extractor)


def identify(config: Config, extractor: Extractor, reference: Reference, floor: Reference | None) -> dict[str, Any]:
    """Say all that a point's images, and their scores, follow from besides budget and settings."""
    scores: dict[str, Any] = {"extractor": extractor.sha256, "reference": reference.sha256}
    scores["floor"] = floor and floor.sha256
    if config.likelihood:
        scores["likelihood"] = config.likelihood_n
    return {"images": identify_images(config), "scores": scores}


def identify_images(config: Config) -> dict[str, Any]:
    """Say all that generated images follow from besides budget and settings."""
    parts, arithmetic = ("method", "shape", "process", "network", "denoiser"), ("precision", "compile", "channels_last")
    keys = (*parts, *arithmetic, "n", "seed", "batch_size")
    weights = {
        name: files_sha256(Path(path)) if path and Path(path).exists() else None
        for name, path in (
            ("denoiser", config.checkpoint),
            ("posterior", config.posterior.get("checkpoint")),
            ("prior", config.prior.get("checkpoint")),
        )
    }
    return {
        **{key: getattr(config, key) for key in keys},
        **({"truncate": True} if config.truncate else {}),
        "posterior": {key: value for key, value in config.posterior.items() if key != "checkpoint"},
        "weights": weights,
        "version": __version__,
    }


def _configuration(config: Config, measured: bool) -> dict[str, Any]:
    """Record what a point follows from besides budget, settings, n and seed: it tells curves apart in a comparison.

    Args:
        config: The run's.
        measured: Whether with the weights that the configuration names, and not with some in training.
    """
    found = identify_images(config)
    for key in ("n", "seed", "batch_size", "precision", "compile", "channels_last", "version"):
        found.pop(key, None)  # they have keys of their own, or change nothing beyond rounding
    if config.by_nfe:
        tuning = json.dumps([config.prior, config.solver, config.by_nfe], sort_keys=True, default=str)
        found["tuning"] = hashlib.sha256(tuning.encode()).hexdigest()
    if not measured:
        found |= {"training": dataclasses.asdict(config.training), "levels": config.levels, "data": config.data}
        found["limit"] = config.limit
        found["init"] = files_sha256(Path(config.init)) if config.init else None
    return found


def build_evaluator(config: Config, method: Diffusion, measured: bool = True) -> Evaluator:
    """Build the evaluation callback.

    Args:
        config: The run's.
        method: What is measured.
        measured: Whether with the weights that the configuration names, and not with some in training.

    Raises:
        UsageError: A single image, or the extractor's weights or the reference are missing or don't fit each other.
    """
    if config.n < 2:
        raise UsageError(f"n={config.n}: a distance needs at least 2 images")
    SOURCES.build(config.data)  # reads nothing; a mistyped key is an error all the same
    extractor = build_extractor(config)
    if config.reference is None:
        raise UsageError(f"{config.experiment} names no reference: make one with `diffaccel reference EXPERIMENT`")
    reference = load_reference(config.reference, extractor)
    floor: Reference | None = load_reference(config.floor, extractor) if config.floor else None
    if config.jpeg is not None:
        extractor = AsJPEG(extractor, config.jpeg)
    likelihood = build_likelihood(config, method) if measured else None
    return Evaluator(
        budgets=config.nfe,
        n=config.n,
        seed=config.seed,
        batch_size=config.batch_size,
        extractor=extractor,
        reference=reference,
        floor=floor,
        out=config.folder,
        provenance={
            "method": config.method_name,
            "experiment": config.experiment,
            "process": config.process["name"],
            "data": config.data_name,
            "checkpoint": describe_checkpoint(config, method),
            "configuration": _configuration(config, measured),
        },
        settings=config.at,
        identity=identify(config, extractor, reference, floor) if measured else None,
        again=config.again,
        keep_features=config.keep_features,
        keep_images=config.keep_images,
        likelihood=likelihood,
        truncate=config.truncate,
        discrete=config.data["name"] != "toy",
    )


def build_likelihood(config: Config, method: Diffusion) -> BitsPerDim | None:
    """Build what measures bits per dimension, if that is asked for.

    Raises:
        UsageError: The prior has no density.
    """
    if not config.likelihood:
        return None
    method.prior.start_ratio(method.denoiser)
    identity = {**identify_images(config), "data": config.data, "prior": config.prior}
    return BitsPerDim(build_data(config), config.likelihood_n, config.seed, config.batch_size, config.folder, identity)


def build_fitted(config: Config, method: Diffusion) -> list[DensityPrior]:
    """Build the experiment's density prior at the further times that it was fitted at, ``tradeoff.densities``.

    Raises:
        UsageError: Weights that are missing, broken, or of another level or density.
    """
    node = {key: value for key, value in config.prior.items() if key != "ratio_star"}
    found = []
    for T, checkpoint in config.tradeoff.densities.items():
        prior = build_prior({**node, "T": T, "checkpoint": checkpoint}, None, method.denoiser, method.shape)
        assert isinstance(prior, DensityPrior)
        found.append(prior)
    return found


def build_searcher(config: Config, method: Diffusion) -> Searcher:
    """Build the search of ``config.search``.

    Raises:
        UsageError: As :func:`build_evaluator`, or a search that is out of range.
    """
    posterior = getattr(method.prior, "posterior", None)
    return Searcher(
        config.search,
        {"prior": config.prior, "solver": config.solver},
        config.nfe,
        config.n,
        config.seed,
        find(config.experiment),
        prior=lambda node: build_prior(node, posterior, method.denoiser, method.shape),
        evaluator=lambda n: build_evaluator(dataclasses.replace(config, n=n), method, measured=False),
    )


def describe_checkpoint(config: Config, method: Diffusion) -> dict[str, Any] | None:
    """Path, hash and images seen of the denoiser's weights; None for an exact denoiser or one being trained."""
    if not config.checkpoint or not config.network or not Path(config.checkpoint).exists():
        return None
    path = Path(config.checkpoint)
    given = as_given(config.checkpoint)
    shown = given if given != config.checkpoint else os.path.relpath(path)
    if method.denoiser.source is not None:
        found = {"path": shown, "sha256": files_sha256(path), "images_seen": None}
        return {**found, "source": method.denoiser.source}
    seen: int | None
    if path.suffix == ".safetensors":
        seen = read_description(path).get("images_seen")
    else:
        seen = read_checkpoint(path)["diffaccel"]["images_seen"]
    return {"path": shown, "sha256": file_sha256(path), "images_seen": seen}
