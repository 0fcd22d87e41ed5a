"""Trainer and callbacks of a fit."""

import shlex
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from typing_extensions import override

from diffaccel.config import Config, holds_path
from diffaccel.data import DataModule
from diffaccel.errors import UsageError
from diffaccel.evaluation import Evaluator
from diffaccel.experiment.latents import describe_latents, node_of, shape_of
from diffaccel.experiment.loading import condition_fingerprint, dropped_shares, feature_networks_of
from diffaccel.methods import METHODS
from diffaccel.parts.overrides import as_given
from diffaccel.pretrained import files_sha256
from diffaccel.run.checkpoint import Checkpointer, WholeFiles
from diffaccel.run.loggers import build_loggers
from diffaccel.run.machine import announce, device_type
from diffaccel.run.processes import Processes


class BestCheckpoint(ModelCheckpoint):
    """Callback that keeps the best state of a run, also if the run is resumed in another folder."""

    @property
    @override
    def state_key(self) -> str:
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__)  # of earlier versions

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore score and path of the best state, whose file may have been moved with the folder.

        Without the file, the next state is the best one.
        """
        former = state_dict["best_model_path"]
        best = Path(self.dirpath or "", Path(former).name)
        if not former or not best.is_file():
            return
        score, path = state_dict["best_model_score"], str(best)
        here = {"dirpath": self.dirpath, "best_model_path": path, "kth_best_model_path": path, "kth_value": score}
        super().load_state_dict({**state_dict, **here, "best_k_models": {path: score}, "last_model_path": ""})


class StepsBar(RichProgressBar):
    """Lightning's progress bar over the steps of a run without epochs."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"


def build_trainer(config: Config, callbacks: list[L.Callback], phases: int = 1) -> L.Trainer:
    """Build the trainer of a fit: processes, precision, logger.

    Args:
        config: Configuration of the run.
        callbacks: Callbacks for evaluation and checkpoints.
        phases: Number of phases of a training step. With several phases, each trains only some of the parameters,
            which the strategy must find.

    Raises:
        UsageError: A GPU is required by the configuration and not visible.
    """
    world = config.devices * config.num_nodes
    every = evaluation_steps(config)
    trainer = L.Trainer(
        accelerator=device_type(config),  # Lightning's own auto includes devices without float64
        devices=config.devices,
        num_nodes=config.num_nodes,
        plugins=[WholeFiles()],
        strategy=Processes(find_unused_parameters=phases > 1) if world > 1 else "auto",
        precision=cast(Any, config.precision),
        max_epochs=-1,  # the method stops by images; the limit sets the length of the progress bar
        limit_train_batches=-(-config.training.images // config.training.batch_size),
        logger=build_loggers(config),
        callbacks=[*callbacks, StepsBar()],
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        limit_val_batches=int(every is not None),
        val_check_interval=every,
        check_val_every_n_epoch=None,
        enable_model_summary=False,
        enable_progress_bar=True,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        log_every_n_steps=config.training.log_every,
    )
    announce(config)  # after everything that may raise an error
    return trainer


def evaluation_steps(config: Config) -> int | None:
    """Return the number of steps between evaluations during training; None for no such evaluations.

    Raises:
        UsageError: The interval is shorter than a step, or ``keep_best`` is set without evaluations.
    """
    training = config.training
    if training.evaluate_every is None:
        if training.keep_best is not None:
            raise UsageError("training.keep_best requires evaluations during training: set training.evaluate_every")
        return None
    if training.evaluate_every < training.batch_size:
        raise UsageError(f"training.evaluate_every={training.evaluate_every} is below training.batch_size: raise it")
    return training.evaluate_every // training.batch_size


def build_best(config: Config, evaluator: Evaluator) -> ModelCheckpoint:
    """Build the callback that keeps the state with the smallest distance as best.ckpt.

    Raises:
        UsageError: The budget of ``keep_best`` is not evaluated.
    """
    budget = config.training.keep_best
    if budget not in config.nfe:
        raise UsageError(f"training.keep_best={budget:g} is not among the budgets nfe={config.nfe}: add it to nfe")
    monitor = f"eval/nfe_{budget:03g}/{evaluator.extractor.metric_name}"
    return BestCheckpoint(config.folder, "best", monitor=monitor, save_top_k=1, enable_version_counter=False)


def build_checkpointer(config: Config, data: DataModule) -> Checkpointer:
    """Build the callback that saves the training state and, at the end, the weights of a fit to ``data``."""
    prior = {key: value for key, value in _without_path(config.prior).items() if key != "init"}
    if init := config.prior.get("init"):  # identified by content, not by path
        prior["init_sha256"] = files_sha256(Path(init))
    description = {
        **_origin(config, data),
        "shape": list(shape_of(config)),
        **({"latents": latents} if (latents := describe_latents(config)) else {}),
        "network": config.network,
        "denoiser": config.denoiser,
        "process": config.process,
        "levels": config.levels,
        "prior": prior,
        **({"posterior": posterior} if (posterior := _without_path(config.posterior)) else {}),
        "condition": config.condition,
        **condition_fingerprint(config),
        **dropped_shares(config),
        **({"init_sha256": files_sha256(Path(config.init))} if config.init else {}),
        **({"feature_networks": used} if (used := _feature_networks(config)) else {}),
    }
    return _checkpointer(config, description)


def build_autoencoder_checkpointer(config: Config, data: DataModule) -> Checkpointer:
    """Build the callback that saves the training state and the weights of the fit of an auto-encoder to ``data``."""
    description = {**_origin(config, data), "shape": config.shape, "autoencoder": node_of(config)}
    return _checkpointer(config, description)


def _checkpointer(config: Config, description: dict[str, Any]) -> Checkpointer:
    training = config.training
    return Checkpointer(config.folder, training.checkpoint_minutes, as_given(description), as_given(_recipe(config)))


def _recipe(config: Config) -> dict[str, Any]:
    """Return the settings of the loss by dotted keys, with defaults; learning rates may change in a resumed run."""
    training, left_out = config.training, {*METHODS.extra, *METHODS.context}
    method = {key: value for key, value in METHODS.complete(config.method).items() if key not in left_out}
    return {
        **{f"method.{key}": value for key, value in method.items() if not key.endswith("_lr")},
        "training.flip": training.flip,
        "training.augment": training.augment,
        "training.pixel_sum": training.pixel_sum,
    }


def _origin(config: Config, data: DataModule) -> dict[str, Any]:
    """Return the header entries that describe the fit of weights."""
    return {
        "method": config.method_name,
        "experiment": config.experiment,
        "command": command_of(config),
        "data": data.label,
        "training_images": data.identify(),
        "seed": config.seed,
    }


def _feature_networks(config: Config) -> list[str]:
    """Hashes of the feature networks that trained the weights that a fit starts from or uses."""
    autoencoder = config.latents.get("checkpoint")
    own = autoencoder if autoencoder and Path(autoencoder).is_file() else None
    return feature_networks_of(config.init, config.prior.get("init"), own)


def command_of(config: Config) -> str:
    """Return the command of a fit, for the header of its weights: without output folders, and with names of files only.

    The paths of files are those of one machine.
    """
    words = []
    for word in config.words:
        key, _, value = word.partition("=")
        if key in ("out", "resume"):
            continue
        words.append(f"{key}={Path(value).name}" if holds_path(key) and "${" not in value else word)
    return shlex.join(["diffaccel", "fit", config.experiment, *words])


def _without_path(node: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in node.items() if key != "checkpoint"}
