"""From a command and its settings to its run: the configuration, the folder, the machine."""

import logging
import os
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from importlib import import_module
from typing import Any

VERBS = ("bench", "fit", "search", "tradeoff", "sample", "reference")
"""Commands on an experiment, each a function of that name in a module of that name beside this one."""


def run(verb: str, experiment: str | None, settings: Iterable[str]) -> Any:
    """Run a command on an experiment.

    Args:
        verb: One of ``VERBS``.
        experiment: A path, or ``<data>/<method>``; None takes ``method=`` and ``data=`` from the settings.
        settings: ``key=value`` words.

    Returns:
        What the command made.

    Raises:
        UsageError: Bad input.
    """
    quiet()
    from diffaccel.config import load
    from diffaccel.run import launch
    from diffaccel.run.machine import settle

    # Statistics are written to OUT, and not over those that the experiment reads.
    instead = {"reference": "", "floor": ""} if verb == "reference" else None
    config = load(experiment, settings, instead)
    writes = not (config.dry_run and verb in ("bench", "sample"))
    with launch.folder_of(config) if writes else nullcontext():
        settle(config)
        return getattr(import_module(f"diffaccel.verbs.{verb}"), verb)(config)


def quiet() -> None:
    """Leave the terminal to this package's own lines."""
    os.environ.setdefault("WANDB_SILENT", "true")
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    import lightning.pytorch  # first: its import sets the levels that are set here

    for name in ("lightning.pytorch", "lightning.fabric", lightning.pytorch.utilities.rank_zero.__name__):
        logging.getLogger(name).setLevel(logging.ERROR)
