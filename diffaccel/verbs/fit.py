"""``fit``: training of a method, of the feature network that scores images, or of an auto-encoder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffaccel import experiment
from diffaccel.config import Config
from diffaccel.data.module import check_labels
from diffaccel.errors import UsageError
from diffaccel.evaluation import Evaluator
from diffaccel.evaluation.callback import EvaluationCallback
from diffaccel.evaluation.validation import ValidationCallback
from diffaccel.experiment import loading
from diffaccel.experiment.build import is_subclass
from diffaccel.features.independence import check_independent
from diffaccel.latents.data import LatentData
from diffaccel.methods import METHODS, Diffusion
from diffaccel.prior import PRIORS
from diffaccel.report.table import print_points
from diffaccel.run import launch, loggers, trainer
from diffaccel.run.lines import SpeedLines
from diffaccel.run.machine import device_type
from diffaccel.run.targets import resume_from
from diffaccel.text.terminal import PlainConsole
from diffaccel.training.autoencoder import AutoEncoderTraining
from diffaccel.verbs.autoencoder import fit_autoencoder
from diffaccel.verbs.extractor import fit_features
from diffaccel.verbs.fit_cost import print_fit

HELP = """\
fit EXPERIMENT [resume=auto]
train; writes weights and the curve

Trains the networks of the experiment's method: a feature network if it is `extractor`, the auto-encoder of latents if
it is `autoencoder`. Weights, training state and points of the final evaluation are written to OUT.

Keys:
  resume=auto              resume from OUT/last.ckpt if it exists; or the path of a training state
  init=FILE                initial weights of the denoiser
  images=1000000           length of the training, in images
  training.batch_size=128 training.lr=0.001  settings of the training; `diffaccel list keys training` lists all
  training.evaluate_every=100000  images between evaluations
  nfe=5,10 n=5000          budgets and images per point of the evaluation
  seed=0                   seed of training and sampling
  dry_run=true             print the phases with their estimated time; train and write nothing
  logger=wandb|csv|tensorboard|none  W&B writes offline unless wandb_mode=online (or WANDB_MODE)
"""
console = PlainConsole(stderr=True, soft_wrap=True)


def fit(config: Config, evaluates: bool = True) -> Path:
    """Train a method, a feature network or an auto-encoder, and print the points of the final evaluation.

    Args:
        config: Configuration of the run.
        evaluates: Whether to measure the configured budgets at the end, and during the training if so configured.

    Returns:
        Folder of the weights, the training state, and the points; a dry run writes none.

    Raises:
        UsageError: The input is invalid, or a loss is NaN or infinite.
    """
    kind: Any = METHODS[config.method["name"]]
    if not is_subclass(kind, Diffusion):
        if config.init:
            raise UsageError(
                "init: this fit trains no denoiser: remove init (checkpoint= sets the weights of a frozen one)"
            )
        return fit_autoencoder(config) if is_subclass(kind, AutoEncoderTraining) else fit_features(config)
    frozen = kind.keeps_denoiser(config.method)
    if config.init and (frozen or not config.network):
        raise UsageError(
            "init: this fit trains no denoiser: remove init (checkpoint= sets the weights of a frozen one)"
        )
    _start_anew(config, kind)
    if config.dry_run:
        method = experiment.build_method(config, load=False)
        if evaluates and _has_reference(config):
            _plan(config, method)
        print_fit(method, method.shape, config)
        return config.folder
    latents = experiment.build_latents(config)
    method = experiment.build_method(config, load=frozen, load_start=True)
    if latents is not None:
        method.sampler.latents = latents
    data = experiment.build_fit_data(config, latents, device_type(config))
    check_labels(data, method.trained_classes)
    resume = resume_from(config, [*method.exports()], console)
    checkpointer = trainer.build_checkpointer(config, data)
    if launch.is_first(config):
        checkpointer.check_outputs(method)
    if resume is not None:
        checkpointer.check_same_run(resume, loading.check_resumable(resume, method))
    evaluator = _evaluator(config, method) if evaluates else None
    validator = experiment.build_validator(config, method.sampler, evaluator.judges if evaluator is not None else ())
    callbacks: list[Any] = [SpeedLines(), checkpointer]
    if validator is not None:
        look_n = min(config.validation.look_n, validator.n)
        # First, because the others write the weights that it chooses.
        callbacks.insert(0, ValidationCallback(validator, config.validation.looks, look_n))
    if evaluator is not None:
        callbacks.append(EvaluationCallback(evaluator))
        if config.training.keep_best is not None:
            callbacks.append(trainer.build_best(config, evaluator))
    phases = len(method.phases())
    judges = [judge for one in (evaluator, validator) if one is not None for judge in one.judges]
    check_independent([judge.extractor for judge in judges], method.feature_networks(), "this run")  # losses are built
    launch.write_config(config)
    if isinstance(data, LatentData):
        data.prepare()  # before there are other processes, which would wait for it only so long
    fitting = trainer.build_trainer(config, callbacks, phases=phases)
    try:
        fitting.fit(method, data, ckpt_path=resume, weights_only=True)
    finally:
        loggers.close_wandb(config)
    if method.interrupted:
        raise KeyboardInterrupt  # in the last step: the fit is complete, but what would follow is not to be run
    if fitting.is_global_zero:
        for line in method.describe_fit(data):
            console.print(line)
        if evaluator is not None:
            print_points(evaluator.points, evaluator.extractor.metric_name, evaluator.out)
        console.print(f"{method.images_seen} images seen; weights and training state are in {config.folder}")
    return config.folder


def _start_anew(config: Config, kind: type[Diffusion]) -> None:
    """Leave out the weights of what the fit trains: those that the experiment names are of an earlier fit.

    Raises:
        UsageError: The command line gives weights for the denoiser, which would not be used.
    """
    if not kind.keeps_denoiser(config.method):
        if config.checkpoint and any(word.startswith("checkpoint=") for word in config.words):
            raise UsageError(
                "checkpoint: this fit trains the denoiser from new weights: remove checkpoint, or give initial weights "
                "by init=FILE"
            )
        config.checkpoint = None
    if kind.fits_posterior:
        config.posterior.pop("checkpoint", None)
    by_budget = [(entry.get("prior", {}), config.at(nfe)["prior"]["name"]) for nfe, entry in config.by_nfe.items()]
    for node, name in [(config.prior, config.prior["name"]), *by_budget]:
        if is_subclass(PRIORS[name], kind.fitted_prior):
            node.pop("checkpoint", None)


def _check_kept(config: Config, method: Diffusion) -> None:
    """Check that what the fit does not train has weights; otherwise it would be evaluated with random ones.

    Raises:
        UsageError: Weights of the denoiser, a prior or the noise classifier are not configured.
    """
    sampler = method.sampler
    starts = [(sampler.prior, config.prior)]
    starts += [(setting.prior, config.at(nfe)["prior"]) for nfe, setting in sampler.by_nfe.items()]
    fixed = [(prior, node) for prior, node in starts if not isinstance(prior, method.fitted_prior)]
    lacks = {
        "checkpoint": method.frozen and config.network and not config.checkpoint,
        "prior.checkpoint": any(prior.networks() and not node.get("checkpoint") for prior, node in fixed),
        "posterior.checkpoint": not method.fits_posterior
        and any(prior.auxiliary_networks() for prior, _ in starts)
        and not config.posterior.get("checkpoint"),
    }
    if missing := [key for key, lack in lacks.items() if lack]:
        raise UsageError(
            f"{config.experiment}: set {missing[0]}=FILE, because this fit does not train these weights and would "
            "evaluate random ones"
        )


def _evaluator(config: Config, method: Diffusion) -> Evaluator | None:
    """Build the evaluator of a fit and plan its budgets; None without a reference."""
    if not _has_reference(config):
        console.print("no reference file: the fit is not evaluated (see `diffaccel reference`)")
        return None
    _check_kept(config, method)
    _plan(config, method)
    return experiment.build_evaluator(config, method.sampler, measured=False)


def _has_reference(config: Config) -> bool:
    files = config.reference.values() if isinstance(config.reference, Mapping) else [config.reference]
    return any(file and Path(file).is_file() for file in files)


def _plan(config: Config, method: Diffusion) -> None:
    """Plan the budgets of the evaluations, for the errors; a dry run needs no conditions."""
    for budget in config.nfe:
        method.sampler.plan(budget, config.n, given=config.dry_run)
        if config.training.evaluate_every is not None:
            method.sampler.plan(budget, config.training.evaluate_n, given=config.dry_run)
