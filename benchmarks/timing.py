"""Timing of two functions in turns, so that other load on the machine affects both equally.

Times are processor time with one thread, because wall time on a shared machine depends on other users.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table


class Ratio(NamedTuple):
    """Processor times of two functions, measured in turns, and their ratio.

    Attributes:
        ours: Median time of ours in seconds.
        bare: Median time of the baseline in seconds.
        ratio: Median ratio of our time to the mean of the baseline's times before and after.
        low: Lower quartile of the ratio.
        high: Upper quartile of the ratio.
    """

    ours: float
    bare: float
    ratio: float
    low: float
    high: float


clock = time.process_time
"""Processor time of this process in seconds, summed over threads."""


def timed(function: Callable[[], object]) -> Callable[[], float]:
    """Wrap a function to return its processor time in seconds."""

    def run() -> float:
        started = clock()
        function()
        return clock() - started

    return run


def timed_on_gpu(function: Callable[[], object]) -> Callable[[], float]:
    """Wrap a function to return its wall time in seconds, with all work that it queues on the GPU."""

    def run() -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    return run


def compare(ours: Callable[[], float], bare: Callable[[], float], repeats: int) -> Ratio:
    """Run baseline and ours in turns, bare, ours, bare ... bare, after one warm-up run of each.

    A linear drift of the machine's speed over three calls cancels in the ratio, and the median ignores repeats that are
    affected by other load.

    Args:
        ours: Function that returns its processor time.
        bare: Baseline that returns its processor time.
        repeats: Number of runs of ours.
    """
    ours(), bare()
    b, a = [bare()], []
    for _ in range(repeats):
        a.append(ours())
        b.append(bare())
    ratios = [2 * own / (before + after) for own, before, after in zip(a, b, b[1:], strict=False)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return Ratio(statistics.median(a), statistics.median(b), ratio, low, high)


class Stopwatch:
    """Processor time inside some functions, for comparison with the time of the run that calls them.

    Both times are from the same calls, so other load on the machine affects both equally. If the run slows down the
    functions themselves, only :func:`compare` shows this.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, owner: object, name: str) -> None:
        """Start timing all calls of a method of ``owner``, an object or a class."""
        function = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            started = clock()
            result = function(*arguments, **options)
            self.seconds += clock() - started
            return result

        setattr(owner, name, watched)

    def ratio(self, function: Callable[[], float], repeats: int) -> float:
        """Median over runs of the ratio of the run's time to the time inside the watched functions."""
        ratios = []
        for _ in range(repeats):
            self.seconds = 0.0
            ratios.append(function() / self.seconds)
        return statistics.median(ratios)


def show(title: str, rows: dict[str, tuple[Ratio, float, float | None]]) -> None:
    """Print a table of ratios, in green within the limit and in red above.

    Args:
        title: Title of the table.
        rows: By name, the measured ratio, its limit, and the ratio within the runs or None. The limit applies to the
            ratio within the runs if there is one, because other load hardly affects it.
    """
    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    for column in ("", "ours, s", "bare, s", "ratio", "quartiles", "within", "at most"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, (found, limit, within) in rows.items():
        limited, inside = (found.ratio, "") if within is None else (within, f"{within:.3f}")
        spread = f"{found.low:.3f} .. {found.high:.3f}"
        most = f"[{'green' if limited <= limit else 'red'}]{limit:.2f}[/]"
        table.add_row(name, f"{found.ours:.3f}", f"{found.bare:.3f}", f"{found.ratio:.3f}", spread, inside, most)
    Console(width=100).print(table)
