"""What runs an experiment: the trainer with its processes, loggers and checkpoints, and the folder it writes to."""

import os
import secrets
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from diffaccel.checkpoint import Checkpointer
from diffaccel.collective import all_gather
from diffaccel.config import Config, as_written, to_yaml
from diffaccel.errors import SharedError, UsageError
from diffaccel.evaluator import Evaluator
from diffaccel.machine import announce, device_type
from diffaccel.overrides import as_given
from diffaccel.terminal import say
from diffaccel.weights import file_sha256


def build_loggers(config: Config) -> list[Logger]:
    """Build the logger that the configuration asks for.

    Raises:
        UsageError: W&B refuses to go online (without a key, say).
    """
    out = config.folder
    if config.logger == "csv":
        return [CSVLogger(out, name="csv")]
    if config.logger == "tensorboard":
        try:
            return [TensorBoardLogger(out, name="tensorboard")]
        except ModuleNotFoundError:
            raise UsageError("logger=tensorboard: `pip install tensorboard`, or take csv or wandb") from None
    if config.logger == "none":
        return []
    import wandb  # imported late: it takes a second that runs without it needn't wait

    wandb.setup()  # reads WANDB_SILENT before there is anything to say
    mode, variables = wandb_mode(config), os.environ
    logger = WandbLogger(
        project=variables.get("WANDB_PROJECT", "diffaccel"),
        name=variables.get("WANDB_NAME", f"{config.data_name}/{Path(config.experiment).stem}"),
        save_dir=variables.get("WANDB_DIR", out),
        mode=cast(Any, mode),
        log_model=False,
        id=variables.get("WANDB_RUN_ID") or _run_id(out, config.resume),
        resume=variables.get("WANDB_RESUME", "allow"),
        config=as_written(config),
    )
    if mode in ("online", "shared"):
        try:
            logger.experiment  # noqa: B018 (starts the run, on rank zero)
        except wandb.errors.Error as error:
            raise UsageError(f"W&B can't go online ({error}): log in, or take wandb_mode=offline") from None
    return [logger]


def wandb_mode(config: Config) -> str:
    """Return W&B's mode: the configuration's, else WANDB_MODE, else offline; a conflict of the two is said.

    Raises:
        UsageError: WANDB_MODE is no mode.
    """
    modes = {mode: mode for mode in ("offline", "online", "shared", "disabled")}
    modes |= {"dryrun": "offline", "run": "online"}  # W&B's older words
    given = os.environ.get("WANDB_MODE", "offline")
    if config.wandb_mode is None:
        if given not in modes:
            raise UsageError(f"WANDB_MODE={given} in the environment is none of {', '.join(sorted(modes))}")
        return modes[given]
    if "WANDB_MODE" in os.environ and modes.get(given) != config.wandb_mode:
        say(f"wandb_mode={config.wandb_mode} overrides WANDB_MODE={given} of the environment")
    return config.wandb_mode


@rank_zero_only
def _run_id(out: Path, resume: str | None) -> str:
    """Return the id of the W&B run: of the one that is resumed, or a new one, kept in OUT for that."""
    file = out / "wandb_run_id"
    if resume is None or not file.is_file():
        file.write_text(secrets.token_hex(4))
    return file.read_text().strip()


class StepsBar(RichProgressBar):
    """Lightning's bar over the steps of a run, which has no epochs."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"


class Processes(DDPStrategy):
    """DDP, also for a fit without gradients, which has nothing to wrap: that of a density in closed form."""

    def setup_environment(self) -> None:
        """Start the process group, and check that ``precision: auto`` means the same on every node.

        Raises:
            SharedError: It doesn't.
        """
        super().setup_environment()
        chosen = set(all_gather(self.precision_plugin.precision))
        if len(chosen) > 1:
            raise SharedError(f"processes compute in {' and in '.join(sorted(chosen))}: set precision=32-true")

    def configure_ddp(self) -> None:
        """Wrap the module if there are gradients to sum."""
        assert self.lightning_module is not None
        if any(parameter.requires_grad for parameter in self.lightning_module.parameters()):
            super().configure_ddp()


def build_trainer(config: Config, callbacks: list[L.Callback], training: bool = False, phases: int = 1) -> L.Trainer:
    """Build the trainer: processes, precision, logger.

    Args:
        config: The run's.
        callbacks: Evaluator, checkpoints.
        training: Whether for a fit.
        phases: Of a training step; each of several trains a part of the parameters, which processes must look for.

    Raises:
        UsageError: A GPU was asked for and there is none.
    """
    make_folder(config)
    processes = config.devices * config.num_nodes
    every = evaluation_steps(config) if training else None
    trainer = L.Trainer(
        accelerator=device_type(config),  # Lightning's own auto takes devices without float64, which levels need
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=Processes(find_unused_parameters=phases > 1) if processes > 1 else "auto",
        precision=cast(Any, config.precision),
        max_epochs=-1,  # the method says when to stop, by images; the limit gives the bar its length
        limit_train_batches=-(-config.training.images // config.training.batch_size),
        logger=build_loggers(config),
        callbacks=[*callbacks, StepsBar()] if training else callbacks,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        limit_val_batches=int(every is not None),
        val_check_interval=every,
        check_val_every_n_epoch=None,
        enable_model_summary=False,
        enable_progress_bar=training,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        log_every_n_steps=config.training.log_every,
    )
    announce(config)  # the last that may be refused is built
    return trainer


def evaluation_steps(config: Config) -> int | None:
    """Steps between evaluations while training; None for none.

    Raises:
        UsageError: They would be less than a step apart, or nothing of them is to be followed.
    """
    training = config.training
    if training.evaluate_every is None:
        if training.keep_best is not None:
            raise UsageError("training.keep_best follows evaluations while training: set training.evaluate_every")
        return None
    if training.evaluate_every < training.batch_size:
        raise UsageError(f"training.evaluate_every={training.evaluate_every} is less than a batch of images: raise it")
    return training.evaluate_every // training.batch_size


def build_best(config: Config, evaluator: Evaluator) -> ModelCheckpoint:
    """Build the callback that keeps the state of the least distance as best.ckpt.

    Raises:
        UsageError: The budget that it follows is none of those evaluated.
    """
    budget = config.training.keep_best
    if budget not in config.nfe:
        raise UsageError(f"training.keep_best={budget:g} is none of the budgets nfe={config.nfe}: add it there")
    monitor = f"eval/nfe_{budget:03g}/{evaluator.extractor.metric_name}"
    return ModelCheckpoint(config.folder, "best", monitor=monitor, save_top_k=1, enable_version_counter=False)


def build_checkpointer(config: Config) -> Checkpointer:
    """Build the callback that saves training state and, at its end, weights."""
    prior = {key: value for key, value in config.prior.items() if key != "init"}
    if init := config.prior.get("init"):  # which weights, and not where they lay
        prior["init_sha256"] = file_sha256(Path(init))
    description = {
        "method": config.method_name,
        "experiment": config.experiment,
        "data": config.data.get("label") or config.data["name"],
        "seed": config.seed,
        "shape": config.shape,
        "network": config.network,
        "denoiser": config.denoiser,
        "process": config.process,
        "prior": prior,
        **({"init_sha256": file_sha256(Path(config.init))} if config.init else {}),
    }
    return Checkpointer(config.folder, config.training.checkpoint_minutes, as_given(description))


def make_folder(config: Config) -> None:
    """Make the folder that a run writes to.

    Raises:
        UsageError: It can't be made or written to.
    """
    folder = config.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"out={folder} can't be written to ({error.strerror}): choose another out=") from None
    if not os.access(folder, os.W_OK):
        raise UsageError(f"out={folder} can't be written to: choose another out=")


def write_config(config: Config) -> None:
    """Leave the resolved configuration beside the results."""
    make_folder(config)
    (config.folder / "config.yaml").write_text(to_yaml(config, config.folder))
