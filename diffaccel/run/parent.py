"""Runs that end when the process that started them has ended."""

import os
import threading
import time

VARIABLE = "DIFFACCEL_PARENT"
"""Environment variable with the id of the process that a run ends with."""
INTERVAL = 0.2
"""Interval between checks of the parent, in seconds."""


def end_with_parent() -> None:
    """End this process soon after its parent, if the parent asks for it; finished results are on disk."""
    parent = os.environ.pop(VARIABLE, None)  # not for the processes that this one starts
    if parent is not None:
        threading.Thread(target=_watch, args=(int(parent),), name="parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(INTERVAL)
    os._exit(1)
