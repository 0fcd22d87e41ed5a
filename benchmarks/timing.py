"""Two things timed in turns, so that what else the machine does falls on both alike.

Seconds are of processor time, with one thread: wall time on a shared machine says more about its other users.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table


class Ratio(NamedTuple):
    """Seconds of A and of B, and A over B, of repeats taken in turns.

    Attributes:
        ours: Median processor seconds of A.
        bare: Median processor seconds of B.
        ratio: Median over the repeats of A over the mean of the two B that enclose it.
        low: Lower quartile of that.
        high: Upper quartile.
    """

    ours: float
    bare: float
    ratio: float
    low: float
    high: float


clock = time.process_time
"""Seconds of processor time of this process, all threads together."""


def timed(function: Callable[[], object]) -> Callable[[], float]:
    """Make a function return the seconds that it took."""

    def run() -> float:
        started = clock()
        function()
        return clock() - started

    return run


def compare(ours: Callable[[], float], bare: Callable[[], float], repeats: int) -> Ratio:
    """Run B A B A ... B, each of which returns its seconds, after one run of each that doesn't count.

    A drift of the machine's speed that is linear over three calls cancels in the ratio, and the median forgets the
    repeats that something else fell on.
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
    """Processor seconds inside some functions, to set against those of the run that calls them.

    The two come from the same calls at the same moments, so nothing else that the machine does gets between them; a
    caller that slows the functions themselves down shows in :func:`compare` alone.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, owner: object, name: str) -> None:
        """Time every call of a method of ``owner``, an object or a class, from now on."""
        function = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            started = clock()
            result = function(*arguments, **options)
            self.seconds += clock() - started
            return result

        setattr(owner, name, watched)

    def ratio(self, function: Callable[[], float], repeats: int) -> float:
        """Median over runs of the run's seconds over the module's in it."""
        ratios = []
        for _ in range(repeats):
            self.seconds = 0.0
            ratios.append(function() / self.seconds)
        return statistics.median(ratios)


def show(title: str, rows: dict[str, tuple[Ratio, float, float | None]]) -> None:
    """Print a table: name -> (what was measured, the most that the ratio may be, the ratio within the runs).

    The limit is of the ratio within the runs, where there is one: it is the one that other load hardly moves.
    """
    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    for column in ("", "ours, s", "bare, s", "ratio", "quartiles", "within", "at most"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, (found, limit, within) in rows.items():
        judged, inside = (found.ratio, "") if within is None else (within, f"{within:.3f}")
        spread = f"{found.low:.3f} .. {found.high:.3f}"
        most = f"[{'green' if judged <= limit else 'red'}]{limit:.2f}[/]"
        table.add_row(name, f"{found.ours:.3f}", f"{found.bare:.3f}", f"{found.ratio:.3f}", spread, inside, most)
    Console(width=100).print(table)
