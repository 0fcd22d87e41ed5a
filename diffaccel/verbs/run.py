"""Running of commands: configuration, output folder, and settings of the machine."""

import os
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from importlib import import_module
from typing import Any

from diffaccel.errors import UsageError
from diffaccel.run.parent import end_with_parent
from diffaccel.verbs import VERBS
from diffaccel.verbs.names import check_names


def run(verb: str, experiment: str | None, settings: Iterable[str]) -> Any:
    """Run a command on an experiment.

    Args:
        verb: Name of a command on an experiment.
        experiment: Path, or ``<data>/<method>``; None for ``method=`` and ``data=`` in the settings.
        settings: ``key=value`` words.

    Returns:
        Result of the command.

    Raises:
        UsageError: The input is invalid.
    """
    experiment, settings = check_names(experiment, list(settings))
    quiet()
    end_with_parent()
    from diffaccel.config import load
    from diffaccel.run import launch
    from diffaccel.run.machine import settle

    # Statistics are written to OUT, so that those of the experiment are not overwritten.
    instead = {"reference": "", "floor": ""} if verb == "reference" else None
    config = load(experiment, settings, instead)
    check_dry_run(verb, config.dry_run)
    with nullcontext() if config.dry_run else launch.folder_of(config):
        settle(config)
        return getattr(import_module(VERBS[verb].path), VERBS[verb].function or verb)(config)


def check_dry_run(verb: str, dry_run: bool) -> None:
    """Check that a command that is to run dry has a dry run.

    Raises:
        UsageError: It has none.
    """
    if dry_run and not VERBS[verb].dry_run:
        others = ", ".join(one.name for one in VERBS.values() if one.dry_run)
        raise UsageError(f"dry_run: {verb} has no dry run, {others} have: leave it out")


def quiet() -> None:
    """Suppress messages of other packages on the terminal; for Lightning's log see :mod:`diffaccel.run.processes`."""
    os.environ.setdefault("WANDB_SILENT", "true")
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
