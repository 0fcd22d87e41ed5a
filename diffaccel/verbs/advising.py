"""Command line of ``advise``. Words are checked before PyTorch is imported."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffaccel.errors import UsageError
from diffaccel.parts.overrides import paths_and_options, scalar
from diffaccel.text.terminal import print_lines, say

if TYPE_CHECKING:
    from diffaccel.verbs.advise import Advice

HELP = """\
advise DIR DIR ... nfe=10
the best measured setting within a budget, with its errors

DIR is the folder of a run, or its points.jsonl. Only points with the same reference, judge, number of images and noise
are compared. A difference of less than two standard errors is a tie.

Keys:
  nfe=10                   budget: evaluations per image
  seconds=0.02             or seconds per image, as measured
  gflops=3                 or GFLOPs per image
  judge=inception          judge whose distance is minimised; by default a published one
  n=5000                   number of images of the points; by default that of most settings
  reference=FILE           statistics of the points' reference, if the folders' config.yaml does not lead to them
"""
COSTS = ("nfe", "seconds", "gflops")
OPTIONS = (*COSTS, "judge", "n", "reference")
"""Options of the command."""


def advise_command(words: list[str]) -> "Advice":
    """Print and return advice on the points that the words of a command line name.

    Raises:
        UsageError: There is not exactly one budget, or see :func:`diffaccel.verbs.advise.advise`.
    """
    sources, options = paths_and_options(words, OPTIONS, "advise")
    for path in sources:
        if not Path(path).exists():
            raise UsageError(f"{path} does not exist: give folders of runs, such as runs/digits/edm")
    given: dict[str, Any] = {key: scalar(value) if key in (*COSTS, "n") else value for key, value in options.items()}
    check_budget({key: given.get(key) for key in COSTS})
    from diffaccel.verbs.advise import advise  # imports PyTorch

    found = advise(sources, note=say, **given)
    print_lines(*found.lines())
    return found


def check_budget(given: dict[str, Any]) -> tuple[str, float]:
    """Return the name and the value of the one budget that is given.

    Raises:
        UsageError: There is not exactly one budget, or it is not a positive number.
    """
    found = {key: value for key, value in given.items() if value is not None}
    if len(found) != 1:
        raise UsageError("advise requires one budget: nfe=10, seconds=0.02 or gflops=3 per image")
    ((key, value),) = found.items()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UsageError(f"{key}={value!r}: give a positive number")
    return key, float(value)
