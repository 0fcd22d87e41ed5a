"""Trainer, processes, loggers, checkpoints and output folder of a run."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from diffaccel.collective import World
from diffaccel.config import Config, as_written, to_yaml
from diffaccel.errors import UsageError
from diffaccel.evaluation import Evaluator
from diffaccel.experiment.loading import feature_networks_of
from diffaccel.parts.overrides import as_given
from diffaccel.pretrained import files_sha256
from diffaccel.report.logs import unfailing
from diffaccel.run.checkpoint import Checkpointer, WholeFiles
from diffaccel.run.machine import announce, device_type
from diffaccel.run.processes import Processes, Workers, check_agreed
from diffaccel.storage import check_target, occupied, write_whole
from diffaccel.text.terminal import say, side_output


def build_loggers(config: Config) -> list[Logger]:
    """Build the configured logger.

    Raises:
        UsageError: W&B can't go online, for example without a key.
    """
    mode = wandb_mode(config) if config.logger == "wandb" else ""
    if config.logger == "none":
        return []
    builders: dict[str, Callable[[Config], Logger]]
    builders = {"csv": _csv, "tensorboard": _tensorboard, "wandb": partial(_wandb, mode=mode)}
    if config.logger == "tensorboard" and find_spec("tensorboard") is None:
        raise UsageError("logger=tensorboard requires tensorboard: `pip install tensorboard`, or set logger=csv")
    if mode in ("online", "shared"):
        return [unfailing(_online(config, mode))]
    with side_output(f"logger={config.logger}"):
        logger: Any = builders[config.logger](config)
        if is_first(config):
            logger.experiment  # noqa: B018 (starts it now, because Lightning would end the run after a failure)
        return [unfailing(logger)]
    return []


def _csv(config: Config) -> Logger:
    return CSVLogger(config.folder, name="csv")


def _tensorboard(config: Config) -> Logger:
    return TensorBoardLogger(config.folder, name="tensorboard")


def _online(config: Config, mode: str) -> Logger:
    import wandb

    logger = _wandb(config, mode)
    try:
        logger.experiment  # noqa: B018 (starts the run, on rank zero)
    except wandb.errors.Error as error:
        raise UsageError(f"W&B can't go online ({error}): log in, or set wandb_mode=offline") from None
    return logger


def _wandb(config: Config, mode: str) -> WandbLogger:
    import wandb  # imported here, because it takes a second

    wandb.setup()  # reads WANDB_SILENT before the first message
    variables, out = os.environ, config.folder
    return WandbLogger(
        project=variables.get("WANDB_PROJECT", "diffaccel"),
        name=variables.get("WANDB_NAME", f"{config.data_name}/{Path(config.experiment).stem}"),
        save_dir=variables.get("WANDB_DIR", out),
        mode=cast(Any, mode),
        log_model=False,
        id=variables.get("WANDB_RUN_ID") or _run_id(out, config.resume),
        resume=variables.get("WANDB_RESUME", "allow"),
        config=as_written(config),
    )


def wandb_mode(config: Config) -> str:
    """Return W&B's mode: that of the configuration, else WANDB_MODE, else offline; conflicts are reported.

    Raises:
        UsageError: WANDB_MODE is invalid.
    """
    modes = {mode: mode for mode in ("offline", "online", "shared", "disabled")}
    modes |= {"dryrun": "offline", "run": "online"}  # older names of W&B
    given = os.environ.get("WANDB_MODE", "offline")
    if config.wandb_mode is None:
        if given not in modes:
            raise UsageError(f"WANDB_MODE={given} in the environment is not one of {', '.join(sorted(modes))}")
        return modes[given]
    if "WANDB_MODE" in os.environ and modes.get(given) != config.wandb_mode:
        say(f"wandb_mode={config.wandb_mode} overrides WANDB_MODE={given} of the environment")
    return config.wandb_mode


@rank_zero_only
def _run_id(out: Path, resume: str | None) -> str:
    """Return the id of the W&B run, from OUT if the run is resumed, otherwise new and written to OUT."""
    file = out / "wandb_run_id"
    if resume is None or not file.is_file():
        file.write_text(secrets.token_hex(4))
    return file.read_text().strip()


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


def everywhere(config: Config, work: Callable[[World, torch.device], object]) -> bool:
    """Call a function on every rank of a run without training, on the rank's device.

    Args:
        config: Configuration of the run.
        work: Function of the world and the device.

    Returns:
        Whether this is the first rank, which prints the results.

    Raises:
        UsageError: A GPU is required by the configuration and not visible, or the port is in use.
        SharedError: Another process has ended.
    """
    world = config.devices * config.num_nodes
    fabric = Fabric(
        accelerator=device_type(config),  # Lightning's own auto includes devices without float64
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=Workers() if world > 1 else "auto",
    )
    announce(config)  # after everything that may raise an error

    def run(fabric: Fabric) -> bool:
        check_agreed(config.precision)
        world = World(fabric.global_rank, fabric.world_size)
        with torch.inference_mode():
            work(world, fabric.device)
        return world.first

    return bool(fabric.launch(run))


@contextmanager
def logging(config: Config) -> Iterator[list[Logger]]:
    """Build the loggers for a ``with`` block, and close them at its end."""
    loggers, status = build_loggers(config), "failed"
    try:
        yield loggers
        status = "success"
    finally:
        for logger in loggers:
            logger.finalize(status)
        close_wandb(config)


def close_wandb(config: Config) -> None:
    """Close the W&B run, so that a later run in this process does not write to it."""
    if config.logger == "wandb":
        with side_output("W&B, as it closed,"):
            import wandb

            wandb.finish()


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
    return ModelCheckpoint(config.folder, "best", monitor=monitor, save_top_k=1, enable_version_counter=False)


def build_checkpointer(config: Config) -> Checkpointer:
    """Build the callback that saves the training state and, at the end, the weights."""
    prior = {key: value for key, value in _without_path(config.prior).items() if key != "init"}
    if init := config.prior.get("init"):  # identified by content, not by path
        prior["init_sha256"] = files_sha256(Path(init))
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
        **({"posterior": posterior} if (posterior := _without_path(config.posterior)) else {}),
        **({"label_drop": config.training.label_drop} if config.network.get("classes") else {}),
        **({"init_sha256": files_sha256(Path(config.init))} if config.init else {}),
        **({"feature_networks": used} if (used := feature_networks_of(config.init, config.prior.get("init"))) else {}),
    }
    return Checkpointer(config.folder, config.training.checkpoint_minutes, as_given(description))


def _without_path(node: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in node.items() if key != "checkpoint"}


def folder_of(config: Config) -> AbstractContextManager[None]:
    """Lock the output folder of a run against other runs, on the first rank.

    Raises:
        UsageError: The folder can't be written to, or is in use.
    """
    return occupied(config.folder) if is_first(config) else nullcontext()


def is_first(config: Config) -> bool:
    """Whether this process has rank zero, also before there is a trainer.

    Rank zero creates and checks the output folder for all ranks, which may be ahead of it or on other disks.
    """
    node = int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", 0)))
    return config.devices * config.num_nodes == 1 or (rank_zero_only.rank == 0 and node == 0)  # type: ignore[attr-defined]


def write_config(config: Config, *results: str) -> None:
    """Write the resolved configuration to config.yaml in OUT; earlier ones are renamed to config.1.yaml and so on.

    Several configurations may share a folder, because points contain their own settings.

    Args:
        config: Configuration of the run.
        results: Files in OUT that the run will write.

    Raises:
        UsageError: A file can't be written.
    """
    if not is_first(config):
        return
    for name in results:
        check_target(config.folder / name)
    path, text = config.folder / "config.yaml", to_yaml(config, config.folder)
    if path.is_file() and (settings := _settings(path.read_text(errors="replace"))) != _settings(text):
        earlier = config.folder.glob("config.*.yaml")
        if all(_settings(file.read_text(errors="replace")) != settings for file in earlier):
            numbered = (config.folder / f"config.{number}.yaml" for number in count(1))
            path.replace(next(file for file in numbered if not file.exists()))
    write_whole(path, text)


def _settings(text: str) -> list[str]:
    """Lines of a configuration, except for keys that only affect the start of a run."""
    return [line for line in text.splitlines() if not line.startswith(("resume:", "again:"))]
