"""Files that a command is about to write: looked at before the work, so that nothing is lost after it."""

import os
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from diffaccel.config import Config
from diffaccel.errors import UsageError
from diffaccel.storage import check_target


def check_new(paths: Iterable[Path], again: bool = False) -> None:
    """Refuse files that can't be written, or that would replace others unasked; their folders are made.

    Raises:
        UsageError: So it is.
    """
    paths = list(paths)
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise UsageError(f"{paths[0]} is named twice: name two files")
    for path in paths:
        if path.is_dir():
            raise UsageError(f"{path} is a folder: name a file")
        if path.exists() and not again:
            raise UsageError(f"{path} exists: again=true replaces it, or write elsewhere")
        check_target(path)


def resume_from(config: Config, weights: list[str], console: Console) -> Path | None:
    """Return the state that a fit goes on from, if it does; what another fit has left in OUT is never overwritten.

    Args:
        config: The run's.
        weights: Names of the files of weights that the fit leaves.
        console: Says where it begins.

    Raises:
        UsageError: OUT has another fit's files, or there is no such state.
    """
    last = Path(config.folder, "last.ckpt")
    files = [last, Path(config.folder, "best.ckpt"), *(Path(config.folder, f"{name}.safetensors") for name in weights)]
    left = next((file for file in files if file.is_file()), None)
    if config.resume == "auto" and last.is_file():
        console.print(f"going on from {last}")
        return last
    given = None if config.resume in (None, "auto") else Path(str(config.resume))
    inside = given is not None and os.path.realpath(given.parent) == os.path.realpath(config.folder)
    if left is not None and not inside:
        remedy = "go on with resume=auto, or choose" if left == last else "choose"
        raise UsageError(f"{left} exists: {remedy} another out=")
    if config.resume == "auto":
        console.print(f"no {last} yet: starting anew")
        return None
    if config.resume is not None and not Path(config.resume).is_file():
        raise UsageError(f"resume={config.resume}: no such file; resume=auto takes {last} if there is one")
    return Path(config.resume) if config.resume else None
