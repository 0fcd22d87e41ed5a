"""From a configuration to the objects of a run."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
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
from diffaccel.evaluator import BitsPerDim, Evaluator, Identity
from diffaccel.headers import check_ratios
from diffaccel.levels import LEVELS
from diffaccel.loading import (
    adopt,
    check_grid,
    check_shared_prior,
    check_trained,
    describe_checkpoint,
    load_denoiser,
    load_network,
    load_prior,
    weights_sha256,
)
from diffaccel.methods import METHODS, Diffusion
from diffaccel.nn import NETWORKS, UNet
from diffaccel.nn.features import EXTRACTORS, Extractor
from diffaccel.nn.jpeg import AsJPEG
from diffaccel.overrides import as_given
from diffaccel.pretrained import Pretrained, files_sha256
from diffaccel.prior import PRIORS, DensityPrior, LevelPosterior, Prior
from diffaccel.prior.posterior import POSTERIORS
from diffaccel.process import PROCESSES
from diffaccel.reference import Reference, check_same_data, load_reference
from diffaccel.search import Searcher
from diffaccel.solver import SOLVERS, Solver
from diffaccel.terminal import say
from diffaccel.weights import assign_weights


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
    if isinstance(denoiser, NetworkDenoiser):
        if network is None:
            raise UsageError(f"denoiser {config.denoiser['name']!r} needs a network: set network=unet, say")
        said = _fill_denoiser(config, denoiser, pretrained, solver, load)
    posterior = build_posterior(config, denoiser, load)
    method = METHODS.build(
        config.method,
        denoiser=denoiser,
        prior=build_prior(config, config.prior, posterior, denoiser, load),
        solver=solver,
        levels=LEVELS.build(config.levels),
        training=config.training,
        shape=shape,
        seed=config.seed,
    )
    if load and isinstance(denoiser, NetworkDenoiser) and config.checkpoint:
        check_ratios(Path(config.checkpoint), said, denoiser)  # now that the method has cut what it doesn't use
    if load and frozen:
        check_trained(config, method)
    set_budgets(config, method, posterior, load, verify=load or not frozen)  # a dry run reads no weights
    if load and frozen:
        check_start(config, method)
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


def _fill_denoiser(
    config: Config, denoiser: NetworkDenoiser, pretrained: Pretrained | None, solver: Solver, load: bool
) -> dict[str, Any]:
    """Give a denoiser the weights that the configuration names; returns the header of their file."""
    if pretrained is not None:
        check_grid(solver, denoiser)
    if pretrained is not None and load:
        denoiser.source = pretrained.source
        assign_weights(pretrained.tensors, denoiser.network, f"the weights of {config.checkpoint}")
    elif weights := config.checkpoint if load else config.init:
        return load_denoiser(config, Path(weights), denoiser)
    return {}


def set_budgets(
    config: Config, method: Diffusion, posterior: LevelPosterior | None, load: bool, verify: bool = True
) -> None:
    """Build the settings by budget; those that were searched for other weights are set aside, and that is said."""
    if config.by_nfe and config.tuned_for and verify:
        others = sorted({one.partition("=")[0] for one in set(config.tuned_for) - set(weights_sha256(method))})
        if others:
            say(
                f"the settings by budget were searched for another {' and '.join(others)}, so they are left out: "
                "`diffaccel search` finds new ones, by_nfe= sets some"
            )
            config.by_nfe = {}
        method.tuned = not others
    for budget in config.by_nfe:
        parts = config.at(budget)
        prior: Prior = method.prior
        if parts["prior"] != config.prior:
            prior = build_prior(config, parts["prior"], posterior, method.denoiser, load)
            if _same_weights(parts["prior"], config.prior):
                prior.share_weights(method.prior)  # it may be in training
        method.by_nfe[budget] = prior, SOLVERS.build(parts["solver"])


def _same_weights(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two priors are the same but for their level and what acts in sampling alone."""
    levels = ("ratio_star", "K", "prior_level_offset")
    keys = {"name", "checkpoint", "init", *getattr(PRIORS[one["name"]], "weight_keys", ())} - {*levels}
    return all(one.get(key) == other.get(key) for key in keys)


def check_start(config: Config, method: Diffusion) -> None:
    """Refuse to call samples a method's that start from another prior than the one it is about.

    Raises:
        UsageError: None of the experiment's priors is of that kind.
    """
    priors = [method.prior, *(prior for prior, _ in method.by_nfe.values())]
    if not any(isinstance(prior, method.starts_from) for prior in priors):
        known = [name for name in PRIORS if _is_subclass(PRIORS[name], method.starts_from)]
        raise UsageError(
            f"method {config.method_name!r} starts from prior={' or '.join(known)}, and {config.experiment} has "
            f"{config.prior['name']!r}: name the method's own experiment, or set prior="
        )


def _is_subclass(factory: object, kind: type) -> bool:
    return isinstance(factory, type) and issubclass(factory, kind)


def keeps_denoiser(config: Config) -> bool:
    """Whether a fit leaves the denoiser's weights as they are."""
    probe = getattr(METHODS[config.method_name], "keeps_denoiser", Diffusion.keeps_denoiser)
    return bool(probe(config.method))


def build_posterior(config: Config, denoiser: Denoiser, load: bool = True) -> LevelPosterior | None:
    """Build what a chain asks for its levels, with its weights; None if the experiment has none.

    Raises:
        UsageError: An unknown name or key, or weights that are missing or of another network.
    """
    if not config.posterior:
        return None
    node = dict(config.posterior)
    checkpoint = node.pop("checkpoint", None)
    posterior = POSTERIORS.build(node, denoiser=denoiser, shape=shape_of(config))
    if load and checkpoint:
        network = cast(nn.Module, posterior.network)
        load_network(Path(checkpoint), network, "classifier", {"shape": config.shape, "posterior": node})
    return posterior


def build_prior(
    config: Config,
    node: Mapping[str, Any],
    posterior: LevelPosterior | None,
    denoiser: Denoiser,
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
    prior = PRIORS.build(node, denoiser=denoiser, shape=shape_of(config), **context)
    for key, given in (("checkpoint", checkpoint), ("init", init)):
        if given and not prior.networks():
            raise UsageError(f"prior {node['name']!r} has no network: remove prior.{key}")
    if weights := (checkpoint if load else None) or init:
        load_prior(config, Path(weights), prior, node)
    elif load and denoiser.source is None:
        check_shared_prior(config, prior)
    return prior


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


def identify(
    config: Config, extractor: Extractor, reference: Reference, floor: Reference | None
) -> Callable[[float], Identity]:
    """Say, for each budget, all that a point's images and their scores follow from."""
    scores: dict[str, Any] = {"extractor": extractor.sha256, "reference": reference.sha256}
    scores["floor"] = floor and floor.sha256
    if config.likelihood:
        scores["likelihood"] = config.likelihood_n
    images = identify_images(config)
    return lambda budget: Identity(images(budget), scores)


def identify_images(config: Config) -> Callable[[float], dict[str, Any]]:
    """Say, for each budget, all that generated images follow from; files by what is in them."""
    parts = _identify_parts(config)

    def at(budget: float) -> dict[str, Any]:
        settings = {part: _by_content(node) for part, node in config.at(budget).items()}
        return {**parts, "budget": budget, "settings": settings}

    return at


def _identify_parts(config: Config) -> dict[str, Any]:
    parts, arithmetic = ("method", "shape", "process", "network", "denoiser"), ("precision", "compile", "channels_last")
    keys = (*parts, *arithmetic, "n", "seed", "batch_size")
    return {
        **{key: getattr(config, key) for key in keys},
        **({"truncate": True} if config.truncate else {}),
        "checkpoint": _content(config.checkpoint),
        "posterior": _by_content(config.posterior),
        "version": __version__,
    }


def _by_content(node: Mapping[str, Any]) -> dict[str, Any]:
    """A part whose weights go by what is in the file and not by where it lies."""
    return {key: _content(value) if key in ("checkpoint", "init") else value for key, value in node.items()}


def _content(path: str | None) -> str | None:
    return files_sha256(Path(path)) if path and Path(path).exists() else None


def _configuration(config: Config, measured: bool) -> dict[str, Any]:
    """Record what a point follows from besides budget, settings, n and seed: it tells curves apart in a comparison.

    Args:
        config: The run's.
        measured: Whether with the weights that the configuration names, and not with some in training.
    """
    found = _identify_parts(config)
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
    source = SOURCES.build(config.data)  # reads nothing
    if source.fixed_shape not in (None, shape_of(config)):
        raise UsageError(
            f"data={config.data['name']}: images have shape {source.fixed_shape}, the experiment's is "
            f"{shape_of(config)}: set shape= (and a network that fits), or another data set"
        )
    extractor = build_extractor(config)
    if config.reference is None:
        raise UsageError(f"{config.experiment} names no reference: make one with `diffaccel reference EXPERIMENT`")
    reference = load_reference(config.reference, extractor)
    floor: Reference | None = load_reference(config.floor, extractor) if config.floor else None
    for path, found in ((config.reference, reference), (config.floor, floor)):
        if path is not None and found is not None:
            check_same_data(path, found, source.label, shape_of(config))
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
            "data": as_given(config.data.get("label")) or source.label,
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
        discrete=source.has_images(),
    )


def build_likelihood(config: Config, method: Diffusion) -> BitsPerDim | None:
    """Build what measures bits per dimension, if that is asked for.

    Raises:
        UsageError: The prior has no density.
    """
    if not config.likelihood:
        return None
    method.prior.start_ratio(method.denoiser)
    identity = {**_identify_parts(config), "data": config.data, "prior": _by_content(config.prior)}
    return BitsPerDim(build_data(config), config.likelihood_n, config.seed, config.batch_size, config.folder, identity)


def build_fitted(config: Config, method: Diffusion) -> list[DensityPrior]:
    """Build the experiment's density prior at the further times that it was fitted at, ``tradeoff.densities``.

    Raises:
        UsageError: Weights that are missing, broken, or of another level or density.
    """
    node = {key: value for key, value in config.prior.items() if key != "ratio_star"}
    found = []
    for T, checkpoint in config.tradeoff.densities.items():
        prior = build_prior(config, {**node, "T": T, "checkpoint": checkpoint}, None, method.denoiser)
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
        prior=lambda node: build_prior(config, node, posterior, method.denoiser),
        evaluator=lambda n: build_evaluator(dataclasses.replace(config, n=n), method, measured=False),
    )
