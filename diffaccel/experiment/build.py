"""Construction of samplers, models and methods from a configuration."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from diffaccel.condition import Kinds, check_kinds
from diffaccel.config import Config
from diffaccel.data import build_source
from diffaccel.data.conditions import Given, HeldOut, build_conditioner, sampling_keys
from diffaccel.denoiser import DENOISERS, Denoiser, NetworkDenoiser
from diffaccel.denoiser.levels import LEVELS
from diffaccel.density import Density
from diffaccel.errors import UsageError
from diffaccel.experiment.headers import check_ratios
from diffaccel.experiment.latents import (
    build_latents,
    check_combination,
    check_solver,
    describe_latents,
    image_shape_of,
    shape_of,
)
from diffaccel.experiment.loading import (
    adopt,
    check_grid,
    check_shared_prior,
    check_trained,
    dropped_shares,
    initialise_denoiser,
    load_denoiser,
    load_network,
    load_prior,
)
from diffaccel.methods import METHODS  # its methods, and Lightning, are imported at the first lookup
from diffaccel.methods.sampled import sampled
from diffaccel.nn import NETWORKS, UNet
from diffaccel.nn.compiling import compile_forward
from diffaccel.pretrained import Pretrained
from diffaccel.pretrained.checkpoint import mark_condition
from diffaccel.prior import PRIORS, LevelPosterior, Prior
from diffaccel.prior.posterior import POSTERIORS
from diffaccel.process import PROCESSES
from diffaccel.sampling import ImageKind, Sampler, Setting, Tweedie
from diffaccel.solver import SOLVERS, Solver
from diffaccel.text.terminal import say
from diffaccel.weights import assign_weights

if TYPE_CHECKING:
    from diffaccel.methods import Diffusion


def build_sampler(config: Config) -> Sampler:
    """Build the sampler of an experiment with its trained weights.

    Raises:
        UsageError: A part, key or value is unknown; or weights are not configured, missing, damaged, of another
            network, or trained on fewer noise levels than sampling uses.
    """
    sampler, header, posterior = _build_parts(config, load=True, load_start=True)
    check_trained(config, sampler)
    set_budgets(config, sampler, posterior, load=True)
    if isinstance(sampler.denoiser, NetworkDenoiser) and config.checkpoint:
        settings = (Setting(sampler.prior, sampler.solver), *sampler.by_nfe.values())
        low, high = sampler.denoiser.ratio_range
        highest = max(min(high, setting.prior.highest_ratio(sampler.denoiser)) for setting in settings)
        check_ratios(Path(config.checkpoint), header, (low, highest))
    _compile(config, sampler, training=False)
    return sampler.eval()


def build_method(
    config: Config, load: bool = True, frozen: bool = False, load_start: bool | None = None
) -> "Diffusion":
    """Build a method with its weights.

    Args:
        config: Configuration of the run.
        load: Whether to read the configured weights; otherwise networks are initialised randomly or from ``init``.
        frozen: Whether the weights are fixed, so that ``compile`` treats them as constants, which is faster.
        load_start: Whether to read those of priors and posterior; as ``load`` by default.

    Raises:
        UsageError: A part, key or value is unknown; or weights are missing, damaged or of another network, or, with
            ``frozen``, not configured.
    """
    _check_samples(config)
    load_start = load if load_start is None else load_start
    sampler, header, posterior = _build_parts(config, load, load_start)
    method = METHODS.build(
        {key: value for key, value in config.method.items() if key != "label"},
        sampler=sampler,
        levels=LEVELS.build(config.levels),
        training=config.training,
        seed=config.seed,
    )
    if load:
        _check_levels(config, sampler.denoiser, header)  # after the method has restricted the range
    if load and frozen:
        check_trained(config, sampler, "denoiser" in method.trained_networks())
    trained = () if frozen else method.trained_networks()
    if "denoiser" in trained:
        mark_condition(dropped_shares(config), sampler.denoiser.network)
    verify = load or not frozen  # a dry run reads no weights
    set_budgets(config, sampler, posterior, load_start, verify=verify, trained=trained)
    if load and frozen:
        check_start(config, sampler, method.starts_from)
    _compile(config, sampler, training=not frozen, frozen_denoiser=method.frozen)
    return method


def _check_samples(config: Config) -> None:
    """Check that the method is one of sampling.

    Raises:
        UsageError: It trains a network that is not sampled.
    """
    from diffaccel.methods import Diffusion  # imported here, because it requires Lightning, which takes seconds

    if not is_subclass(METHODS[config.method["name"]], Diffusion):
        raise UsageError(
            f"method {config.method['name']!r} makes no images: `diffaccel fit {config.experiment}` trains its network"
        )


def build_frozen(config: Config, load: bool = True) -> Sampler:
    """Build the sampler of an experiment that is measured and not trained, as :func:`build_method` does.

    The method is built only if its class has to check the experiment, because its import takes seconds.

    Args:
        config: Configuration of the run.
        load: Whether to read the configured weights.

    Raises:
        UsageError: See :func:`build_method`.
    """
    required = sampled(config.method)
    if required is None:
        return build_method(config, load, frozen=True).sampler.eval()
    sampler, header, posterior = _build_parts(config, load, load)
    if not isinstance(sampler.denoiser.process, required.process):
        return build_method(config, load, frozen=True).sampler.eval()  # raises the method's error
    if load:
        _check_levels(config, sampler.denoiser, header)
        check_trained(config, sampler, required.fits_denoiser)
    set_budgets(config, sampler, posterior, load, verify=load)
    if load:
        check_start(config, sampler, required.starts_from)
    _compile(config, sampler, training=False)
    return sampler.eval()


def _check_levels(config: Config, denoiser: Denoiser, header: Mapping[str, Any]) -> None:
    """Check that the weights were trained on the denoiser's range of levels."""
    if isinstance(denoiser, NetworkDenoiser) and config.checkpoint:
        check_ratios(Path(config.checkpoint), header, denoiser.ratio_range)


def _build_parts(config: Config, load: bool, load_start: bool) -> tuple[Sampler, dict[str, Any], LevelPosterior | None]:
    """Build an experiment's sampler without settings by budget, the header of its weights, and its posterior.

    Raises:
        UsageError: See :func:`build_method`.
    """
    inputs = build_inputs(config)
    solver = build_solver(config, config.solver)  # first, so that a mistyped name is reported before weights are read
    discrete = build_source(config.data).has_images()
    check_combination(config, None if inputs is None else inputs.conditioner, discrete)
    latents = build_latents(config, load)
    shape = image_shape_of(config) if latents is None else latents.shape
    torch.manual_seed(config.seed)
    pretrained = adopt(config)
    process = PROCESSES.build(config.process)
    network = NETWORKS.build(config.network, shape=shape) if config.network else None
    denoiser: Denoiser = DENOISERS.build(config.denoiser, process=process, network=network)
    header: dict[str, Any] = {}
    if isinstance(denoiser, NetworkDenoiser):
        if network is None:
            raise UsageError(
                f"denoiser {config.denoiser['name']!r} requires a network: set network=, for example to unet"
            )
        header = _fill_denoiser(config, denoiser, pretrained, solver, load)
    posterior = build_posterior(config, denoiser, load_start)
    sampler = Sampler(
        denoiser,
        build_prior(config, config.prior, posterior, denoiser, load_start),
        solver,
        shape,
        tweedie=Tweedie(config.tweedie_ratio, config.tweedie_counted) if config.tweedie_ratio is not None else None,
        kind=ImageKind(discrete, config.truncate),
        precision=None if config.precision == "auto" else config.precision,  # which a run replaces before it builds
        batch_size=config.images_per_batch,
        inputs=inputs,
        latents=latents,
    )
    by = f"condition={config.condition['name']}" if config.condition else "the experiment"
    check_kinds(sampler.takes, Kinds() if inputs is None else inputs.kinds, by)
    return sampler, header, posterior


def build_solver(config: Config, node: Mapping[str, Any]) -> Solver:
    """Build a solver, and check that it suits the samples."""
    solver = SOLVERS.build(node)
    check_solver(config, solver)
    return solver


def build_inputs(config: Config) -> HeldOut | Given | None:
    """Build the conditions of sampled images, whose files are opened when they are needed; None for no condition.

    Raises:
        UsageError: A name or key is unknown, a value is out of range, or the images can't be degraded.
    """
    conditioner = build_conditioner(config.condition, image_shape_of(config))
    if conditioner is None:
        return None
    own = sampling_keys(config.condition)
    return conditioner.given() or HeldOut(conditioner, build_source(config.data), config.limit, **own)


def _compile(config: Config, sampler: Sampler, training: bool, frozen_denoiser: bool = False) -> None:
    """Compile the networks and set their memory format, if configured.

    In training, a noise classifier is included. A critic is not, because R1 differentiates it twice, which compiled
    graphs do not support.
    """
    networks = {**sampler.evaluated_networks(), **(sampler.auxiliary_networks() if training else {})}
    for name, network in networks.items() if config.network else ():
        if config.channels_last:
            network.to(memory_format=torch.channels_last)
        if config.compile and not isinstance(network, Density):  # which is copied to other levels
            compile_forward(network, constant=not training or (frozen_denoiser and name == "denoiser"))
            if training and isinstance(network, UNet):
                network.encode = torch.compile(network.encode)  # type: ignore[method-assign]  # a critic may use it alone


def _fill_denoiser(
    config: Config, denoiser: NetworkDenoiser, pretrained: Pretrained | None, solver: Solver, load: bool
) -> dict[str, Any]:
    """Load a denoiser's configured weights, and return the header of their file."""
    if pretrained is not None:
        check_grid(solver, denoiser)
    if pretrained is not None and load:
        denoiser.source = pretrained.source
        assign_weights(pretrained.tensors, denoiser.network, f"the weights of {config.checkpoint}")
    elif load and config.checkpoint:
        return load_denoiser(config, Path(config.checkpoint), denoiser)
    elif not load and config.init:
        initialise_denoiser(config, Path(config.init), denoiser)
    return {}


def set_budgets(
    config: Config,
    sampler: Sampler,
    posterior: LevelPosterior | None,
    load: bool,
    verify: bool = True,
    trained: Collection[str] = (),
) -> None:
    """Build the settings by budget; settings that were searched for other weights are ignored, with a message.

    The weights include those of priors that only some budgets have.

    Args:
        config: Configuration of the run.
        sampler: Sampler whose settings are set.
        posterior: Posterior of a chain's levels.
        load: Whether to read configured weights.
        verify: Whether the sampler has weights to compare with those of the search.
        trained: Networks that a fit trains: these will be other weights than those of the search, also if the fit
            begins with them (``init``).
    """
    for budget in config.by_nfe:
        parts = config.at(budget)
        prior: Prior = sampler.prior
        if parts["prior"] != config.prior:
            prior = build_prior(config, parts["prior"], posterior, sampler.denoiser, load)
            if _same_weights(parts["prior"], config.prior):
                prior.share_weights(sampler.prior)  # which may be in training
        sampler.by_nfe[budget] = Setting(prior, build_solver(config, parts["solver"]))
    if config.by_nfe and config.tuned_for and verify:
        own = {one for one in sampler.weights_sha256() if one.partition("=")[0] not in trained}
        others = sorted({one.partition("=")[0] for one in set(config.tuned_for) - own})
        if others:
            say(
                f"the settings by budget were searched for another {' and '.join(others)} and are ignored: "
                "`diffaccel search` finds new ones, by_nfe= sets them"
            )
            config.by_nfe = {}
            sampler.by_nfe.clear()
        sampler.tuned = not others and config.searched


def _same_weights(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two priors differ only in their level and in keys that do not affect the weights."""
    levels = ("ratio_star", "K", "prior_level_offset")
    keys = {"name", "checkpoint", "init", *getattr(PRIORS[one["name"]], "weight_keys", ())} - {*levels}
    return all(one.get(key) == other.get(key) for key in keys)


def check_start(config: Config, sampler: Sampler, starts_from: type) -> None:
    """Check that samples start from the type of prior that defines the method.

    Raises:
        UsageError: None of the experiment's priors has this type.
    """
    priors = [sampler.prior, *(setting.prior for setting in sampler.by_nfe.values())]
    if not any(isinstance(prior, starts_from) for prior in priors):
        known = [name for name in PRIORS if is_subclass(PRIORS[name], starts_from)]
        raise UsageError(
            f"method {config.method_name!r} starts from prior={' or '.join(known)}, but {config.experiment} has "
            f"{config.prior['name']!r}: use the method's own experiment, or set prior="
        )


def is_subclass(factory: object, kind: type | tuple[()]) -> bool:
    """Whether a factory of a registry is a subclass of ``kind``."""
    return isinstance(factory, type) and issubclass(factory, kind)


def build_posterior(config: Config, denoiser: Denoiser, load: bool = True) -> LevelPosterior | None:
    """Build the posterior of a chain's noise levels, with its weights; None if the experiment has no posterior.

    Raises:
        UsageError: A name or key is unknown, or weights are missing or of another network.
    """
    if not config.posterior:
        return None
    node = dict(config.posterior)
    checkpoint = node.pop("checkpoint", None)
    posterior = POSTERIORS.build(node, denoiser=denoiser, shape=shape_of(config))
    if load and checkpoint:
        network = cast(nn.Module, posterior.network)
        load_network(
            Path(checkpoint),
            "posterior.checkpoint",
            network,
            "classifier",
            {"shape": list(shape_of(config)), "posterior": node, "latents": describe_latents(config)},
        )
    return posterior


def build_prior(
    config: Config,
    node: Mapping[str, Any],
    posterior: LevelPosterior | None,
    denoiser: Denoiser,
    load: bool = True,
) -> Prior:
    """Build a prior, with its trained weights (``checkpoint``) or the initial weights of a fit (``init``), if any.

    Raises:
        UsageError: A name or key is unknown, a value is out of range, a chain has no posterior, or weights are missing
            or of another network.
    """
    if posterior is None and "posterior" in PRIORS.required(node.get("name", "")):
        raise UsageError(
            f"prior {node['name']!r} requires a posterior of noise levels: set posterior=classifier or posterior=exact"
        )
    node = dict(node)
    checkpoint, init = node.pop("checkpoint", None), node.pop("init", None)
    context: dict[str, Any] = {} if posterior is None else {"posterior": posterior}
    prior = PRIORS.build(node, denoiser=denoiser, shape=shape_of(config), **context)
    for key, given in (("checkpoint", checkpoint), ("init", init)):
        if given and not prior.networks():
            raise UsageError(f"prior {node['name']!r} has no network: remove prior.{key}")
    if load and checkpoint:
        load_prior(config, Path(checkpoint), "prior.checkpoint", prior, node, denoiser)
    elif init:
        load_prior(config, Path(init), "prior.init", prior, node)
    elif load and denoiser.source is None:
        check_shared_prior(config, prior)
    return prior
