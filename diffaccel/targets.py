"""Files that a command is about to write: looked at before the work, so that nothing is lost after it."""

import os
from collections.abc import Iterable
from pathlib import Path

from diffaccel.errors import UsageError


def check_new(paths: Iterable[Path], again: bool = False) -> None:
    """Refuse files that can't be written, or that would replace others unasked; their folders are made.

    Raises:
        UsageError: So it is.
    """
    paths = list(paths)
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError(f"{paths[0]} is named twice: name two files")
    for path in paths:
        if path.is_dir():
            raise UsageError(f"{path} is a folder: name a file")
        if path.exists() and not again:
            raise UsageError(f"{path} exists: again=true replaces it, or write elsewhere")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{path} can't be written ({error.strerror}): write elsewhere") from None
        if not os.access(path.parent, os.W_OK):
            raise UsageError(f"{path} can't be written: write elsewhere")
