"""From a configuration to the objects of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from diffaccel.config import Config
from diffaccel.data import DataModule
from diffaccel.denoiser import DENOISERS, Denoiser, NetworkDenoiser
from diffaccel.denoiser.levels import LEVELS
from diffaccel.density import Density
from diffaccel.errors import UsageError
from diffaccel.experiment.headers import check_ratios
from diffaccel.experiment.loading import (
    adopt,
    check_grid,
    check_shared_prior,
    check_trained,
    load_denoiser,
    load_network,
    load_prior,
)
from diffaccel.methods import METHODS, Diffusion
from diffaccel.nn import NETWORKS, UNet
from diffaccel.parts.overrides import as_given
from diffaccel.pretrained import Pretrained
from diffaccel.prior import PRIORS, LevelPosterior, Prior
from diffaccel.prior.posterior import POSTERIORS
from diffaccel.process import PROCESSES
from diffaccel.solver import SOLVERS, Solver
from diffaccel.text.terminal import say
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
        others = sorted({one.partition("=")[0] for one in set(config.tuned_for) - set(method.weights_sha256())})
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
        load_prior(config, Path(weights), prior, node, denoiser if load and checkpoint else None)
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
