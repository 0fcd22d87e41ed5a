"""Terminal output. Everything is printed through this module, so that text from files is always escaped."""

import errno
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from typing_extensions import override

from diffaccel.text.escape import printable

T = TypeVar("T")

RANKS = {"RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"}
"""Variables by which a launcher tells a process its rank, and from which Lightning reads it."""
WIDTH = 130
"""Minimum width of a table; the default of 80 columns for pipes would cut off names."""


class PlainConsole(Console):
    """Console that prints text verbatim: without markup and emoji codes, and with control characters escaped.

    This applies to everything that is printed as a string, including cells of tables.

    Args:
        stderr: Whether to print to stderr; stdout is for results only.
        options: Options of rich's console.
    """

    def __init__(self, stderr: bool = False, **options: Any) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, **options)

    @override
    def render_str(self, text: str, **options: Any) -> Text:
        """Convert a string to escaped text without markup."""
        shown = "\n".join(printable(line) for line in text.split("\n"))
        return super().render_str(shown, **{**options, "markup": False, "emoji": False, "highlight": False})

    @override
    def on_broken_pipe(self) -> None:
        """Leave a broken pipe to the caller; rich would end the program."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def print_lines(*lines: str) -> None:
    """Print lines to stdout, with control characters escaped."""
    for line in lines:
        print(printable(line))


def say(text: str) -> None:
    """Print a line on stderr, on rank zero; stdout is for results only."""
    show = PlainConsole(stderr=True, soft_wrap=True).print
    if "lightning" in sys.modules or RANKS & os.environ.keys():  # else one process, and the import takes seconds
        from lightning.pytorch.utilities import rank_zero_only

        show = rank_zero_only(show)
    show(printable(text))


@cache
def say_once(text: str) -> None:
    """Print a line as :func:`say`, but only the first time in a process."""
    say(text)


@contextmanager
def side_output(what: str) -> Iterator[None]:
    """Print one line on stderr if optional output of a run (a log, a picture, a copy) fails.

    All exceptions except interrupts are caught, because loggers and plots raise exceptions of many types. The ``with``
    block must not compute results.

    Args:
        what: Name of the output, for the message.
    """
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        message = f"diffaccel: {what} failed ({reason:.200}); the results are not affected"
        PlainConsole(stderr=True, soft_wrap=True).print(printable(message))


def wide_console(least: int = WIDTH) -> PlainConsole:
    """Make a console on stdout with a width of at least ``least`` characters, for wide tables."""
    console = PlainConsole()
    console.width = max(console.width, WIDTH, least)
    return console


def description_column(template: str = "{task.description}") -> TextColumn:
    """Make a column of a progress bar without markup; callers escape descriptions by :func:`printable`."""
    return TextColumn(template, markup=False)


def track(items: Iterable[T], description: str, total: float, shown: bool = True) -> Iterable[T]:
    """Iterate over items with a progress bar on stderr, which is removed at the end.

    Args:
        items: Items to iterate over.
        description: Text before the bar.
        total: Number of items.
        shown: Whether to show the bar if stderr is a terminal.
    """
    console = PlainConsole(stderr=True)
    columns = (description_column(), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not (shown and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        yield from progress.track(items, total, description=printable(description))


def number(value: float | None, digits: int = 4) -> str:
    """Format a number with significant digits; "-" for None and NaN."""
    return "-" if value is None or value != value else f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """Format a duration: 95 -> '95 s', 5400 -> '1.5 h'."""
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (120.0, "min")):
        if seconds >= 2 * size if unit == "days" else seconds >= size:
            return f"{seconds / (60.0 if unit == 'min' else size):.3g} {unit}"
    return f"{seconds:.3g} s"


def human(number: float, unit: str) -> str:
    """Format a number with an SI prefix: 1234567, 'FLOP' -> '1.23 MFLOP'."""
    power = min(5, max(0, int(math.log10(max(number, 1)) // 3)))
    return f"{number / 1000**power:.3g} {'kMGTP'[power - 1] if power else ''}{unit}"
