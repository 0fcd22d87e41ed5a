"""From a configuration to the objects of a run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from diffaccel.config import Config
from diffaccel.data import SOURCES
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
from diffaccel.nn import NETWORKS, UNet
from diffaccel.pretrained import Pretrained
from diffaccel.prior import PRIORS, LevelPosterior, Prior
from diffaccel.prior.posterior import POSTERIORS
from diffaccel.process import PROCESSES
from diffaccel.sampling import ImageKind, Model, Part, Sampler, Setting, Tweedie
from diffaccel.solver import SOLVERS, Solver
from diffaccel.text.terminal import say
from diffaccel.weights import assign_weights, open_weights

if TYPE_CHECKING:
    from diffaccel.methods import Diffusion


def shape_of(config: Config) -> tuple[int, int, int]:
    """(C, H, W)."""
    channels, height, width = config.shape
    return channels, height, width


def build_sampler(config: Config) -> Sampler:
    """Build the sampler of an experiment with its weights, which will not change any more.

    Raises:
        UsageError: Unknown parts, keys or values; weights that are missing, broken, of another network, trained on
            fewer noise levels than sampling uses, or not named.
    """
    sampler, header, posterior = _build_parts(config, load=True)
    check_trained(config, sampler)
    set_budgets(config, sampler, posterior, load=True)
    if isinstance(sampler.denoiser, NetworkDenoiser) and config.checkpoint:
        settings = (Setting(sampler.prior, sampler.solver), *sampler.by_nfe.values())
        low, high = sampler.denoiser.ratio_range
        highest = max(min(high, setting.prior.highest_ratio(sampler.denoiser)) for setting in settings)
        check_ratios(Path(config.checkpoint), header, (low, highest))
    _compile(config, sampler, training=False)
    return sampler.eval()


def build_model(config: Config, again: Callable[[Mapping[str, Any]], Config]) -> Model:
    """Build an experiment's model, whose samplers share one denoiser.

    Args:
        config: The experiment's.
        again: Settings -> the experiment's configuration with these laid over it.

    Raises:
        UsageError: See :func:`build_sampler`.
    """
    own = build_sampler(config)
    denoiser = own.denoiser
    posterior = build_posterior(config, denoiser)

    def derive(prior: Part, solver: Part) -> Sampler:
        given = {part: node for part, node in (("prior", prior), ("solver", solver)) if node is not None}
        if not given:
            return own.using(own.prior, by_nfe=own.by_nfe)
        other = again(given)
        made = own.using(build_prior(other, other.prior, posterior, denoiser), SOLVERS.build(other.solver))
        check_trained(other, made)
        set_budgets(other, made, posterior, load=True)
        return made.eval()

    return Model(config.experiment, denoiser, own.shape, derive)


def build_checkpoint(path: Path) -> Model:
    """Build the model of a checkpoint that describes itself, on the process that it was trained on.

    Raises:
        UsageError: The file is damaged, hostile, or no denoiser's, or its header doesn't determine the network.
    """
    found = Pretrained.of(open_weights(path))
    network = NETWORKS.build(found.network, shape=found.shape)
    process = PROCESSES.build(found.process)
    denoiser = DENOISERS.build(found.denoiser, process=process, network=network)
    assign_weights(found.tensors, network, f"the weights of {path}")
    denoiser.eval()

    def derive(prior: Part, solver: Part) -> Sampler:
        low = max(denoiser.ratio_range[0], 0.002)
        return Sampler(denoiser, prior, solver or {"name": "dpmpp2m", "grid": {"ratio_min": low}}, found.shape).eval()

    return Model(str(path), denoiser, found.shape, derive)


def build_method(config: Config, load: bool = True, frozen: bool = False) -> "Diffusion":
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
    from diffaccel.methods import METHODS  # late: Lightning takes seconds to import, and sampling needs none of it

    sampler, header, posterior = _build_parts(config, load)
    method = METHODS.build(
        {key: value for key, value in config.method.items() if key != "label"},
        sampler=sampler,
        levels=LEVELS.build(config.levels),
        training=config.training,
        seed=config.seed,
    )
    denoiser = sampler.denoiser
    if load and isinstance(denoiser, NetworkDenoiser) and config.checkpoint:
        # Now that the method has cut what it doesn't use.
        check_ratios(Path(config.checkpoint), header, denoiser.ratio_range)
    if load and frozen:
        check_trained(config, sampler, "denoiser" in method.trained_networks())
    set_budgets(config, sampler, posterior, load, verify=load or not frozen)  # a dry run reads no weights
    if load and frozen:
        check_start(config, method)
    _compile(config, sampler, training=not frozen, frozen_denoiser=method.frozen)
    return method


def _build_parts(config: Config, load: bool) -> tuple[Sampler, dict[str, Any], LevelPosterior | None]:
    """Build an experiment's sampler without its settings by budget; return it, the header of its weights, a posterior.

    Raises:
        UsageError: See :func:`build_method`.
    """
    shape = shape_of(config)
    torch.manual_seed(config.seed)
    solver = SOLVERS.build(config.solver)  # first: a mistyped name shouldn't wait for weights to be read
    pretrained = adopt(config)
    process = PROCESSES.build(config.process)
    network = NETWORKS.build(config.network, shape=shape) if config.network else None
    denoiser: Denoiser = DENOISERS.build(config.denoiser, process=process, network=network)
    header: dict[str, Any] = {}
    if isinstance(denoiser, NetworkDenoiser):
        if network is None:
            raise UsageError(f"denoiser {config.denoiser['name']!r} needs a network: set network=unet, say")
        header = _fill_denoiser(config, denoiser, pretrained, solver, load)
    posterior = build_posterior(config, denoiser, load)
    sampler = Sampler(
        denoiser,
        build_prior(config, config.prior, posterior, denoiser, load),
        solver,
        shape,
        tweedie=Tweedie(config.tweedie_ratio, config.tweedie_counted) if config.tweedie_ratio is not None else None,
        kind=ImageKind(SOURCES.build(config.data).has_images(), config.truncate),
        precision=None if config.precision == "auto" else config.precision,  # which a run replaces before it builds
        batch_size=config.batch_size,
    )
    return sampler, header, posterior


def _compile(config: Config, sampler: Sampler, training: bool, frozen_denoiser: bool = False) -> None:
    """Compile the networks and set their memory format, if the configuration says so."""
    for name, network in sampler.evaluated_networks().items() if config.network else ():
        if config.channels_last:
            network.to(memory_format=torch.channels_last)
        if config.compile and not isinstance(network, Density):  # a few matrix products, and copied to other levels
            # The forward and not the module: names in checkpoints stay, and the counter's hooks run outside the graph.
            constant = not training or (frozen_denoiser and name == "denoiser")  # holds where no gradient is taken
            network.forward = torch.compile(network.forward, options={"freezing": constant})
            if training and isinstance(network, UNet):
                network.encode = torch.compile(network.encode)  # type: ignore[method-assign]  # a critic may use it alone


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
    config: Config, sampler: Sampler, posterior: LevelPosterior | None, load: bool, verify: bool = True
) -> None:
    """Build the settings by budget; those that were searched for other weights are left out, and a line says so."""
    if config.by_nfe and config.tuned_for and verify:
        others = sorted({one.partition("=")[0] for one in set(config.tuned_for) - set(sampler.weights_sha256())})
        if others:
            say(
                f"the settings by budget were searched for another {' and '.join(others)}, so they are left out: "
                "`diffaccel search` finds new ones, by_nfe= sets some"
            )
            config.by_nfe = {}
        sampler.tuned = not others
    for budget in config.by_nfe:
        parts = config.at(budget)
        prior: Prior = sampler.prior
        if parts["prior"] != config.prior:
            prior = build_prior(config, parts["prior"], posterior, sampler.denoiser, load)
            if _same_weights(parts["prior"], config.prior):
                prior.share_weights(sampler.prior)  # it may be in training
        sampler.by_nfe[budget] = Setting(prior, SOLVERS.build(parts["solver"]))


def _same_weights(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two priors are the same but for their level and what acts in sampling alone."""
    levels = ("ratio_star", "K", "prior_level_offset")
    keys = {"name", "checkpoint", "init", *getattr(PRIORS[one["name"]], "weight_keys", ())} - {*levels}
    return all(one.get(key) == other.get(key) for key in keys)


def check_start(config: Config, method: "Diffusion") -> None:
    """Refuse to call samples a method's that start from another prior than the one it is about.

    Raises:
        UsageError: None of the experiment's priors is of that kind.
    """
    priors = [method.prior, *(setting.prior for setting in method.sampler.by_nfe.values())]
    if not any(isinstance(prior, method.starts_from) for prior in priors):
        known = [name for name in PRIORS if is_subclass(PRIORS[name], method.starts_from)]
        raise UsageError(
            f"method {config.method_name!r} starts from prior={' or '.join(known)}, and {config.experiment} has "
            f"{config.prior['name']!r}: name the method's own experiment, or set prior="
        )


def is_subclass(factory: object, kind: type) -> bool:
    """Whether what a registry has under a name is a class of this kind."""
    return isinstance(factory, type) and issubclass(factory, kind)


def keeps_denoiser(config: Config) -> bool:
    """Whether a fit leaves the denoiser's weights as they are."""
    from diffaccel.methods import METHODS, Diffusion

    probe = getattr(METHODS[config.method["name"]], "keeps_denoiser", Diffusion.keeps_denoiser)
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
    if posterior is None and "posterior" in PRIORS.required(node.get("name", "")):
        raise UsageError(
            f"prior {node['name']!r} needs something that reads noise levels: set posterior=classifier or exact"
        )
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
