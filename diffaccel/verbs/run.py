"""Running of commands: configuration, output folder, and settings of the machine."""

import os
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from importlib import import_module
from typing import Any

from diffaccel.run.parent import end_with_parent

VERBS = ("bench", "fit", "search", "tradeoff", "sample", "reference")
"""Commands on an experiment; each is a function in the module of the same name in this package."""


def run(verb: str, experiment: str | None, settings: Iterable[str]) -> Any:
    """Run a command on an experiment.

    Args:
        verb: Command, one of ``VERBS``.
        experiment: Path, or ``<data>/<method>``; None for ``method=`` and ``data=`` in the settings.
        settings: ``key=value`` words.

    Returns:
        Result of the command.

    Raises:
        UsageError: The input is invalid.
    """
    quiet()
    end_with_parent()
    from diffaccel.config import load
    from diffaccel.run import launch
    from diffaccel.run.machine import settle

    # Statistics are written to OUT, so that those of the experiment are not overwritten.
    instead = {"reference": "", "floor": ""} if verb == "reference" else None
    config = load(experiment, settings, instead)
    writes = not (config.dry_run and verb in ("bench", "sample"))
    with launch.folder_of(config) if writes else nullcontext():
        settle(config)
        return getattr(import_module(f"diffaccel.verbs.{verb}"), verb)(config)


def quiet() -> None:
    """Suppress messages of other packages on the terminal; for Lightning's log see :mod:`diffaccel.run.processes`."""
    os.environ.setdefault("WANDB_SILENT", "true")
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
