"""Loggers of a run: W&B, CSV, TensorBoard. They and Lightning are imported when they are used, which takes seconds."""

import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffaccel.config import TUNABLE, Config, as_written
from diffaccel.config.keys import map_paths
from diffaccel.errors import UsageError
from diffaccel.experiment.identity import by_content, identify_parts
from diffaccel.parts.overrides import as_plain
from diffaccel.report import Point
from diffaccel.report.ledger import Ledger
from diffaccel.report.logs import unfailing
from diffaccel.run.launch import is_first
from diffaccel.text.terminal import say, side_output
from diffaccel.weights import file_sha256

UNRELATED = (
    *("nfe", "out", "resume", "again", "dry_run", "logger", "wandb_mode", "format", "keep_features", "keep_images"),
    *("accelerator", "devices", "num_nodes", "threads", "search", "tradeoff", "training"),
    *("validation", "init"),
)
"""Keys in which runs of the same curve may differ."""


class WandbRun:
    """W&B run of a command without training, with the methods of Lightning's logger that such a command uses.

    Args:
        settings: Arguments of ``wandb.init``.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    @cached_property
    def experiment(self) -> Any:
        """The run, which is started by the first access."""
        import wandb

        return wandb.run or wandb.init(**self.settings)

    def log_image(self, key: str, images: list[str]) -> None:
        """Log image files."""
        import wandb

        self.experiment.log({key: [wandb.Image(image) for image in images]})

    def finalize(self, status: str) -> None:
        """Do nothing; :func:`close_wandb` ends the run."""


def build_loggers(config: Config, training: bool = True) -> list[Any]:
    """Build the configured logger.

    Args:
        config: Configuration of the run.
        training: Whether the logger is for a trainer, which requires a logger of Lightning.

    Raises:
        UsageError: W&B can't go online, for example without a key.
    """
    mode = wandb_mode(config) if config.logger == "wandb" else ""
    if config.logger == "none":
        return []
    if config.logger == "tensorboard" and find_spec("tensorboard") is None:
        raise UsageError("logger=tensorboard requires tensorboard: `pip install tensorboard`, or set logger=csv")
    wandb = partial(_wandb, mode=mode, training=training)
    if mode in ("online", "shared"):
        return [unfailing(_online(config, wandb))]
    builders: dict[str, Callable[[Config], Any]] = {"csv": _csv, "tensorboard": _tensorboard, "wandb": wandb}
    with side_output(f"logger={config.logger}"):
        logger = builders[config.logger](config)
        if is_first(config):
            logger.experiment  # noqa: B018 (starts it now, because Lightning would end the run after a failure)
        return [unfailing(logger)]
    return []


def _csv(config: Config) -> Any:
    from lightning.pytorch.loggers import CSVLogger

    return CSVLogger(config.folder, name="csv")


def _tensorboard(config: Config) -> Any:
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(config.folder, name="tensorboard")


def _online(config: Config, build: Callable[[Config], Any]) -> Any:
    import wandb

    logger = build(config)
    try:
        if is_first(config):
            logger.experiment  # noqa: B018 (starts the run)
    except wandb.errors.Error as error:
        raise UsageError(f"W&B can't go online ({error}): log in, or set wandb_mode=offline") from None
    return logger


def _wandb(config: Config, mode: str, training: bool) -> Any:
    import wandb

    wandb.setup()  # reads WANDB_SILENT before the first message
    variables = os.environ
    folder = variables.get("WANDB_DIR", str(config.folder))
    run = variables.get("WANDB_RUN_ID") or _run_id(config, training)
    settings: dict[str, Any] = {
        "project": variables.get("WANDB_PROJECT", "diffaccel"),
        "name": variables.get("WANDB_NAME") or run_name(config, Ledger(config.folder).budgets(run or "")),
        "mode": mode,
        "id": run,
        "resume": variables.get("WANDB_RESUME", "allow"),
        "config": as_written(config),
    }
    if not training:
        return WandbRun({**settings, "dir": folder})
    from lightning.pytorch.loggers import WandbLogger

    return WandbLogger(**settings, save_dir=folder, log_model=False)


def run_name(config: Config, earlier: Iterable[float] = ()) -> str:
    """Return the name of the W&B run: experiment, prior, solver, budgets and seed.

    Args:
        config: Configuration of the run.
        earlier: Budgets that the run contains already.
    """
    budgets = sorted({*config.nfe, *earlier})
    settings = [config.at(nfe) for nfe in budgets]
    names = ["/".join(dict.fromkeys(str(one[part].get("name")) for one in settings)) for part in TUNABLE]
    shown = ",".join("adaptive" if math.isinf(nfe) else f"{nfe:g}" for nfe in budgets)
    experiment = f"{config.data_name}/{Path(config.experiment).stem}"
    return " ".join([experiment, *names, f"NFE {shown}", f"seed {config.seed}"])


def wandb_mode(config: Config) -> str:
    """Return W&B's mode: that of the configuration, else WANDB_MODE, else offline; conflicts are reported.

    A run of a sweep is online by default, because the sweep's server needs its results.

    Raises:
        UsageError: WANDB_MODE is invalid.
    """
    modes = {mode: mode for mode in ("offline", "online", "shared", "disabled")}
    modes |= {"dryrun": "offline", "run": "online"}  # older names of W&B
    given = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_SWEEP_ID") else "offline")
    if config.wandb_mode is None:
        if given not in modes:
            raise UsageError(f"WANDB_MODE={given} in the environment is not one of {', '.join(sorted(modes))}")
        return modes[given]
    if "WANDB_MODE" in os.environ and modes.get(given) != config.wandb_mode:
        say(f"wandb_mode={config.wandb_mode} overrides WANDB_MODE={given} of the environment")
    return config.wandb_mode


def _run_id(config: Config, training: bool) -> str | None:
    """Return the id of the W&B run, on rank zero: of a resumed fit, of a bench of the same curve in OUT, or new."""
    if not is_first(config):
        return None
    file = config.folder / "wandb_run_id"
    if not training:
        ledger, curve = Ledger(config.folder), _curve(config)
        run = (None if config.again else ledger.run_of(curve)) or secrets.token_hex(4)
        ledger.start(run, curve, config.nfe)
        return run
    if config.resume is None or not file.is_file():
        file.write_text(secrets.token_hex(4))
    return file.read_text().strip()


def _curve(config: Config) -> str:
    """Hash of a configuration, except for the budgets and for keys that only affect how a run is carried out.

    Files of weights and statistics are identified by their content: a refit into the same file is another curve.
    """
    tree = {key: value for key, value in as_written(config).items() if key not in (*UNRELATED, "extractor", "judges")}
    tree |= {key: value for key, value in identify_parts(config).items() if key != "version"}
    tree["extractors"] = [by_content("extractor", node) for node in config.extractors]
    tree |= {part: by_content(part, getattr(config, part)) for part in TUNABLE}
    budgets = {str(budget): config.at(budget) for budget in config.by_nfe}
    tree["by_nfe"] = {
        budget: {part: by_content(part, node) for part, node in parts.items()} for budget, parts in budgets.items()
    }
    statistics = as_plain({"reference": config.reference, "floor": config.floor})
    map_paths(statistics, lambda path: file_sha256(Path(path)) if Path(path).is_file() else path)
    tree |= statistics
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()[:16]


@contextmanager
def logging(config: Config, measured: Sequence[Point] = ()) -> Iterator[list[Any]]:
    """Build the loggers of a command without training for a ``with`` block, and close them at its end.

    Args:
        config: Configuration of the run.
        measured: All points of the run, if they were measured before. If W&B has them, no run is started.
    """
    if config.logger == "wandb" and (run := _complete(config, measured)):
        say(f"W&B run {run} has these points: they are not logged again")
        yield []
        return
    loggers, status = build_loggers(config, training=False), "failed"
    try:
        yield loggers
        status = "success"
    finally:
        for logger in loggers:
            logger.finalize(status)
        close_wandb(config)


def _complete(config: Config, measured: Sequence[Point]) -> str | None:
    """Return the id of the W&B run that contains all points; None if there is no such run."""
    if not measured:
        return None
    ledger = Ledger(config.folder)
    run = os.environ.get("WANDB_RUN_ID") or ledger.run_of(_curve(config))
    return run if run is not None and not ledger.missing(run, measured) else None


def close_wandb(config: Config) -> None:
    """Close the W&B run, so that a later run in this process does not write to it."""
    if config.logger == "wandb":
        with side_output("W&B, as it closed,"):
            import wandb

            wandb.finish()
