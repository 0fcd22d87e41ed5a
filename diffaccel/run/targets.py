"""Checks of output files before a command starts, so that no results are lost."""

import os
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from diffaccel.config import Config
from diffaccel.errors import UsageError
from diffaccel.storage import check_target


def check_new(paths: Iterable[Path], again: bool = False) -> None:
    """Check that files can be written and do not exist, and create their folders.

    Args:
        paths: Files.
        again: Whether existing files may be replaced.

    Raises:
        UsageError: A file exists or can't be written, or a file is given twice.
    """
    paths = list(paths)
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise UsageError(f"{paths[0]} is given twice: give two files")
    for path in paths:
        if path.is_dir():
            raise UsageError(f"{path} is a folder: give a file")
        if path.exists() and not again:
            raise UsageError(f"{path} exists: set again=true to replace it, or choose another path")
        check_target(path)


def resume_from(config: Config, weights: list[str], console: Console) -> Path | None:
    """Return the training state that a fit is resumed from; None for a new fit.

    Files of another fit in OUT are never overwritten.

    Args:
        config: Configuration of the run.
        weights: Names of the weights files of the fit.
        console: Console for messages.

    Raises:
        UsageError: OUT contains files of another fit, or the training state does not exist.
    """
    last = Path(config.folder, "last.ckpt")
    files = [last, Path(config.folder, "best.ckpt"), *(Path(config.folder, f"{name}.safetensors") for name in weights)]
    left = next((file for file in files if file.is_file()), None)
    if config.resume == "auto" and last.is_file():
        console.print(f"resuming from {last}")
        return last
    given = None if config.resume in (None, "auto") else Path(str(config.resume))
    inside = given is not None and os.path.realpath(given.parent) == os.path.realpath(config.folder)
    if left is not None and not inside:
        remedy = "resume with resume=auto, or choose" if left == last else "choose"
        raise UsageError(f"{left} exists: {remedy} another out=")
    if config.resume == "auto":
        console.print(f"{last} does not exist: starting a new run")
        return None
    if config.resume is not None and not Path(config.resume).is_file():
        raise UsageError(f"resume={config.resume} does not exist: give a file, or resume=auto for {last} if it exists")
    return Path(config.resume) if config.resume else None
