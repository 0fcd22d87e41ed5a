"""Command line of ``sweep``. The file is read before PyTorch is imported."""

import os
from collections.abc import Mapping
from typing import Any

from diffaccel.config import FLAGS
from diffaccel.config.sweep import read_sweep
from diffaccel.errors import UsageError
from diffaccel.parts.overrides import sort_words
from diffaccel.verbs.run import quiet

HELP = """\
sweep FILE [processes=2] [count=20]
run a W&B sweep file here; repeat it for the runs that are left

FILE is a sweep of W&B, or the name of one in experiments/sweeps. Other keys are settings of an experiment for every
run, in place of the sweep's parameters.

Keys:
  processes=2              simultaneous runs
  count=20                 maximum number of runs; by default the file's run_cap
  out=DIR                  folder for the folders of the curves; runs/sweeps/NAME by default
"""
OPTIONS = ("processes", "count", "out")
"""Keys of the command itself; other keys are settings of every run."""


def sweep_command(words: list[str]) -> list[Mapping[str, Any]]:
    """Run a sweep from the words of a command line: a file, options, and settings of all runs.

    Raises:
        UsageError: There is not exactly one file, or an option is not a number.
    """
    quiet()
    files, settings = sort_words(words, FLAGS, lambda word: word.endswith((".yaml", ".yml")) and os.path.isfile(word))
    if len(files) != 1:
        raise UsageError("sweep requires a file: diffaccel sweep experiments/sweeps/solvers.yaml processes=2")
    pairs = [word.split("=", 1) for word in settings]
    options: dict[str, str] = {key: value for key, value in pairs if key in OPTIONS}
    for key in ("processes", "count"):
        if key in options and not options[key].isdecimal():
            raise UsageError(f"{key}={options[key]} is not a positive whole number")
    read_sweep(files[0])
    from diffaccel.verbs.sweep import sweep  # imports PyTorch

    count = int(options["count"]) if "count" in options else None
    others = [f"{key}={value}" for key, value in pairs if key not in OPTIONS]
    return sweep(files[0], others, int(options.get("processes", 1)), count, options.get("out"))
