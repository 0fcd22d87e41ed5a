"""What the terminal shows. Whatever prints does it from here, so that text from files is shown and never acted on."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from typing_extensions import override

from diffaccel.text.escape import printable

T = TypeVar("T")

WIDTH = 130
"""Least columns of a table: a pipe has 80, which cut the names."""


class PlainConsole(Console):
    """Console that shows text as it is: no markup, no emoji codes, control characters as their escapes.

    This holds for whatever is printed as a string, cells of tables among them.

    Args:
        stderr: Whether to print to stderr; stdout holds results alone.
        options: Of rich's console.
    """

    def __init__(self, stderr: bool = False, **options: Any) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, **options)

    @override
    def render_str(self, text: str, **options: Any) -> Text:
        """Turn a string into what is shown."""
        shown = "\n".join(printable(line) for line in text.split("\n"))
        return super().render_str(shown, **{**options, "markup": False, "emoji": False, "highlight": False})


def print_lines(*lines: str) -> None:
    """Print lines to stdout, each on one line whatever is in it."""
    for line in lines:
        print(printable(line))


def say(text: str) -> None:
    """Print a line on stderr, once a run: stdout holds results alone."""
    from lightning.pytorch.utilities import rank_zero_only  # late: it takes seconds to import, and help needs none

    rank_zero_only(PlainConsole(stderr=True, soft_wrap=True).print)(printable(text))


@contextmanager
def side_output(what: str) -> Iterator[None]:
    """Turn a failure to write what a run can do without (a log, a picture, a copy) into one line on stderr.

    Everything but an interrupt is caught, for loggers and drawing raise whatever they like: only such output belongs
    into the ``with`` block, never the result itself.

    Args:
        what: Name of the output, for the message.
    """
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        said = f"diffaccel: {what} failed ({reason:.200}); the results are not affected"
        PlainConsole(stderr=True, soft_wrap=True).print(printable(said))


def wide_console(least: int = WIDTH) -> PlainConsole:
    """Make a console on stdout that is wide enough for a table of so many columns."""
    console = PlainConsole()
    console.width = max(console.width, WIDTH, least)
    return console


def description_column(template: str = "{task.description}") -> TextColumn:
    """Make a column of a progress bar whose text is not markup; descriptions go through ``printable``."""
    return TextColumn(template, markup=False)


def track(items: Iterable[T], description: str, total: float, shown: bool = True) -> Iterable[T]:
    """Yield the items, with a bar on stderr that is gone at the end.

    Args:
        items: What to go through.
        description: Stands before the bar.
        total: Number of items.
        shown: Whether to show it, if stderr is a terminal.
    """
    console = PlainConsole(stderr=True)
    columns = (description_column(), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not (shown and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        yield from progress.track(items, total, description=printable(description))


def number(value: float | None, digits: int = 4) -> str:
    """Round to significant digits; "-" for what is not known."""
    return "-" if value is None or value != value else f"{value:.{digits}g}"


def human(number: float, unit: str) -> str:
    """1234567, 'FLOP' -> '1.23 MFLOP'."""
    power = min(5, max(0, int(math.log10(max(number, 1)) // 3)))
    return f"{number / 1000**power:.3g} {'kMGTP'[power - 1] if power else ''}{unit}"
