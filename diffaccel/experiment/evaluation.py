"""Construction of data, extractor, evaluator, likelihood and search from a configuration."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffaccel.condition import trained_without
from diffaccel.config import Config, find
from diffaccel.data import build_source
from diffaccel.data.conditions import HeldOut, build_conditioner
from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.evaluation import BitsPerDim, Evaluator, Identity
from diffaccel.evaluation.judges import Judge
from diffaccel.evaluation.provenance import identity_hash
from diffaccel.evaluation.search import Searcher
from diffaccel.evaluation.space import Settings
from diffaccel.evaluation.winners import Winners
from diffaccel.experiment.build import build_posterior, build_prior
from diffaccel.experiment.identity import (
    by_content,
    describe_configuration,
    identify,
    identify_parts,
    identify_settings,
    searched_with,
    settings_of,
    words_of,
)
from diffaccel.experiment.judges import build_extractors, build_judges
from diffaccel.experiment.latents import image_shape_of
from diffaccel.experiment.loading import describe_checkpoint, feature_networks_of
from diffaccel.features.extractors import EXTRACTORS
from diffaccel.features.independence import check_independent
from diffaccel.metrics.base import METRICS, Metric, Real, build_metrics
from diffaccel.metrics.reference import check_same_data, load_reference
from diffaccel.parts.overrides import as_given
from diffaccel.prior import DensityPrior, Prior
from diffaccel.sampling import Sampler

if TYPE_CHECKING:
    from diffaccel.data import DataModule


def build_data(config: Config, make: "Callable[..., DataModule] | None" = None) -> "DataModule":
    """Build the data module and check that its images have the experiment's shape.

    Args:
        config: Configuration of the run.
        make: Function of the arguments of a data module; by default the class of images.

    Raises:
        UsageError: The data are missing or damaged, or the images have another shape.
    """
    from diffaccel.data import DataModule  # imported here, because it requires Lightning, which takes seconds

    training = config.training
    data = (make or DataModule)(
        source=config.data,
        batch_size=training.batch_size,
        seed=config.seed,
        limit=config.limit,
        flip=training.flip,
        num_workers=training.workers,
        conditioner=build_conditioner(config.condition, image_shape_of(config)),
    )
    if "label" in config.data:
        data.source.label = as_given(config.data["label"]) or data.source.label
    if data.shape != image_shape_of(config):
        raise UsageError(
            f"{data.label}: images have shape {data.shape}, but the experiment has {image_shape_of(config)}: set "
            "shape= (and a suitable network), or another data set"
        )
    return data


def build_evaluator(
    config: Config,
    sampler: Sampler,
    measured: bool = True,
    only: str | None = None,
    metrics: Sequence[Metric] | None = None,
) -> Evaluator:
    """Build the evaluator.

    Args:
        config: Configuration of the run.
        sampler: Sampler to measure.
        measured: Whether the sampler has the configured weights, and not weights in training.
        only: Name of the only judge; None for all.
        metrics: All metrics to compute; by default those of the configuration or, in training, some of them.

    Raises:
        UsageError: ``n`` is less than 2; the weights or the reference of an extractor are missing or don't match; or an
            extractor's weights trained the model.
    """
    if config.n < 2:
        raise UsageError(f"n={config.n}: a distance requires at least 2 images")
    source = build_source(config.data)  # reads nothing
    if source.fixed_shape not in (None, image_shape_of(config)):
        raise UsageError(
            f"data={config.data['name']}: images have shape {source.fixed_shape}, but the experiment has "
            f"{image_shape_of(config)}: set shape= (and a suitable network), or another data set"
        )
    judges = build_judges(config, source.label, only)
    trained_with = feature_networks_of(*own_weights(config, sampler))
    check_independent([judge.extractor for judge in judges], trained_with, config.experiment)
    chosen, inputs = build_metrics(config.metrics) if metrics is None else metrics, sampler.inputs
    check_classes(config, sampler, judges, chosen)
    likelihood = build_likelihood(config, sampler) if measured else None
    return Evaluator(
        budgets=config.nfe,
        n=config.n,
        seed=config.seed,
        batch_size=config.images_per_batch,
        judges=judges,
        out=config.folder,
        provenance={
            "method": config.method_name,
            "experiment": config.experiment,
            "process": config.process["name"],
            "data": as_given(config.data.get("label")) or source.label,
            "checkpoint": describe_checkpoint(config, sampler.denoiser),
            "configuration": describe_configuration(config, measured),
            "words": words_of(config),
        },
        settings=lambda budget: settings_of(config, budget),
        identity=identify(config, judges) if measured else None,
        again=config.again,
        keep_features=config.keep_features,
        keep_images=config.keep_images,
        likelihood=likelihood,
        metrics=chosen,
        in_training=None if metrics is None else False,
        restores=inputs if isinstance(inputs, HeldOut) and inputs.conditioner.restores else None,
    )


def check_classes(config: Config, sampler: Sampler, judges: Sequence[Judge], metrics: Sequence[Metric]) -> None:
    """Check that metrics that require classes have those of the samples and of the training images.

    Raises:
        UsageError: The samples are of no class, or the statistics of no judge have the labels of training images.
    """
    if not any(metric.needs_labels for metric in metrics):
        return
    inputs = sampler.inputs
    known = bool(sampler.classes) if inputs is None else inputs.labels(range(1)) is not None
    if not known:
        raise UsageError(
            f"metrics: 'accuracy' requires samples of known classes, but those of {config.experiment} have none: "
            "remove it, or use a class-conditional experiment, or captions of images with labels"
        )
    if all(judge.real.reference.labels is None for judge in judges):  # others are left out of the metric
        names = " and ".join(repr(judge.name) for judge in judges)
        raise UsageError(
            f"metrics: 'accuracy' requires the labels of training images, but the reference of {names} has none: "
            "compute it again with `diffaccel reference EXPERIMENT`, or remove the metric"
        )


def build_validator(config: Config, sampler: Sampler, judges: Sequence[Judge] = ()) -> Evaluator | None:
    """Build the evaluator of ``config.validation``, which writes nothing; None without a reference.

    Args:
        config: Configuration of the run.
        sampler: Sampler to measure.
        judges: Judges of the run's points.

    Raises:
        UsageError: The validation has no extractor or that of a judge, or the seed of the run; or a budget is below the
            minimum; or its files are missing, damaged, or don't match.
    """
    validation = config.validation
    if not validation.reference:
        return None
    if not validation.judge:
        raise UsageError("validation.reference is set, but validation.judge is not: name its extractor")
    if validation.seed == config.seed:
        raise UsageError(f"validation.seed={validation.seed} is also the seed of the run: set another one")
    extractor = EXTRACTORS.build(validation.judge)
    if extractor.sha256 in [judge.extractor.sha256 for judge in judges]:
        raise UsageError(f"validation.judge: the extractor {extractor.name!r} is also a judge: set another one")
    check_independent([extractor], feature_networks_of(*own_weights(config, sampler)), config.experiment)
    reference = load_reference(validation.reference, extractor)
    check_same_data(validation.reference, reference, build_source(config.data).label, image_shape_of(config))
    n = validation.n or config.n
    for budget in validation.nfe:
        for images in (n, min(n, validation.look_n)) if validation.looks else (n,):
            sampler.plan(budget, images)
    return Evaluator(
        budgets=validation.nfe,
        n=n,
        seed=validation.seed,
        batch_size=config.images_per_batch,
        judges=[Judge(extractor, Real(reference, None))],
        out=config.folder,
        provenance={},
        settings=lambda budget: settings_of(config, budget),
        metrics=build_metrics(["frechet"]),
    )


def own_weights(config: Config, sampler: Sampler) -> list[str | None]:
    """Weights files of the sampler that diffaccel trained."""
    nodes = [config.prior, config.posterior, *(entry.get("prior", {}) for entry in config.by_nfe.values())]
    own = config.checkpoint if sampler.denoiser.source is None else None
    autoencoder = config.latents.get("checkpoint")
    trained = autoencoder if autoencoder and Path(autoencoder).is_file() else None
    return [own, trained, *(node.get("checkpoint") for node in nodes)]


def build_likelihood(config: Config, sampler: Sampler) -> BitsPerDim | None:
    """Build the measurement of bits per dimension; None if it is not configured.

    Raises:
        UsageError: The prior of a budget has no fixed level or no density, the network can't be evaluated without
            condition, or there are fewer than two images.
    """
    if not config.likelihood:
        return None
    check_unconditional("likelihood=true", sampler)
    if config.likelihood_n < 2:
        raise UsageError(f"likelihood_n={config.likelihood_n}: a standard error requires at least 2 images")
    for prior in (sampler.prior, *(sampler.setting(budget).prior for budget in config.nfe)):
        check_log_density(prior, sampler.denoiser)
    identity = {**identify_parts(config), "data": config.data, "prior": by_content("prior", config.prior)}
    identity["order"] = "random"  # of the test images
    n, batch_size, data = config.likelihood_n, config.images_per_batch, build_data(config)
    if data.size("test") < 2:
        raise UsageError(
            f"likelihood=true: {data.label} has a single test image, but a standard error requires at least 2: use "
            "other data, or leave it out"
        )
    return BitsPerDim(data, n, config.seed, batch_size, config.folder, identity)


def check_log_density(prior: Prior, denoiser: Denoiser) -> None:
    """Check that the likelihood from the starting states of a prior is defined.

    Raises:
        UsageError: The states have several levels, an infinite noise-to-data ratio, or no log-density.
    """
    ratio = prior.start_ratio(denoiser)
    if not denoiser.process.scales_data:
        raise UsageError(
            f"likelihood=true takes the mean of x_t to be alpha x_0, which it is not on {denoiser.process}: leave it "
            "out, or set process.attenuation=constant"
        )
    if not math.isfinite(ratio):
        raise UsageError(
            "likelihood=true: sampling starts at an infinite noise-to-data ratio, from which the density of an image "
            "is not defined: set prior.ratio_star to a finite level, or leave it out"
        )
    if type(prior).log_prob is Prior.log_prob or (isinstance(prior, DensityPrior) and not prior.density.normalised):
        lacking = type(prior.density if isinstance(prior, DensityPrior) else prior).__name__
        raise UsageError(
            f"likelihood=true requires a log-density of the starting states, which {lacking} lacks: set prior=gaussian "
            "or prior.density.name=gaussian, or leave it out"
        )


def check_unconditional(what: str, sampler: Sampler) -> None:
    """Check that a network can be evaluated without condition.

    Raises:
        UsageError: It takes a condition other than labels, or was trained with labels only.
    """
    if sampler.takes.required:
        raise UsageError(f"{what} is unconditional, but the network takes {sampler.takes}: leave it out")
    if sampler.classes and not trained_without(sampler.denoiser.network):
        raise UsageError(
            f"{what} is unconditional, but this conditional network was trained with labels only: leave it out, or use "
            "a network fitted with training.label_drop"
        )


def build_fitted(config: Config, sampler: Sampler) -> list[DensityPrior]:
    """Build the experiment's density prior at further times of a fit, ``tradeoff.densities``.

    Raises:
        UsageError: Weights are missing, damaged, or of another level or density.
    """
    node = {key: value for key, value in config.prior.items() if key != "ratio_star"}
    found = []
    for T, checkpoint in config.tradeoff.densities.items():
        prior = build_prior(config, {**node, "T": T, "checkpoint": checkpoint}, None, sampler.denoiser)
        assert isinstance(prior, DensityPrior)
        found.append(prior)
    return found


def build_searcher(config: Config, sampler: Sampler) -> Searcher:
    """Build the search of ``config.search``.

    Raises:
        UsageError: See :func:`build_evaluator`; or the search is out of range.
    """
    posterior = build_posterior(config, sampler.denoiser)  # which the experiment's own prior may do without
    judged, judge, note = search_judge(config)
    metrics = [metric for metric in build_metrics(config.metrics) if metric.in_training]
    metrics += [METRICS.build(name) for name in ("manifold", "repetition")]

    def own(budget: float) -> Settings:
        return config.at(budget) if math.isfinite(budget) else {"prior": config.prior, "solver": config.solver}

    def evaluator(n: int, seed: int) -> Evaluator:
        sized = dataclasses.replace(judged, n=n, seed=seed)
        return build_evaluator(sized, sampler, measured=False, only=judge, metrics=metrics)

    def identity(measured: Evaluator) -> Callable[[float, Settings], Identity]:
        sized = dataclasses.replace(judged, n=measured.n, seed=measured.seed)
        return identify_settings(sized, measured.judges)

    def winners(scores: Mapping[str, Any]) -> Winners:
        parts = describe_configuration(config, measured=True)
        common = {key: value for key, value in parts.items() if key not in ("method", "tuning")}
        references = [word for word in config.words if "${" in word]
        file, base = config.folder / "best.yaml", find(config.experiment)
        return Winners(file, base, own, searched_with(config), identity_hash({**common, **scores}), references)

    return Searcher(
        config.search,
        own,
        config.nfe,
        config.n,
        config.seed,
        prior=lambda node: build_prior(config, node, posterior, sampler.denoiser).eval(),
        evaluator=evaluator,
        identity=identity,
        winners=winners,
        again=config.again,
        note=note,
    )


def search_judge(config: Config) -> tuple[Config, str, str]:
    """Return the configuration with the judge of a search, its name, and a message if points report its distances.

    Raises:
        UsageError: The judge is neither among the judges nor an extractor.
    """
    reported, node = build_extractors(config), config.search.judge
    given = node.get("name") if isinstance(node, dict) and len(node) == 1 else node
    name = reported[0].name if node is None else given
    if name not in [extractor.name for extractor in reported]:
        if isinstance(name, str) and name not in EXTRACTORS:
            names = ", ".join(extractor.name for extractor in reported)
            raise UsageError(
                f"search.judge={name!r}: neither a judge ({names}) nor an extractor: choose one, or give an extractor "
                "with its keys"
            )
        extractor = EXTRACTORS.build(node)
        config = dataclasses.replace(config, extractor=EXTRACTORS.normal(node), judges=[])
        if extractor.sha256 not in [one.sha256 for one in reported]:
            return config, extractor.name, ""
        name = extractor.name
    return (
        config,
        name,
        f"search.judge: the search minimises the distance by {name}, which points report too: the winners' distance by "
        f"{name} is too low, as the lowest of many; set search.judge to an extractor that is not in judges",
    )
