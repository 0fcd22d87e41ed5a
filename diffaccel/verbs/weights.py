"""``list weights``: model cards from the headers of weights files."""

from rich.table import Table

from diffaccel.errors import UsageError
from diffaccel.parts.overrides import paths_and_options
from diffaccel.report.cards import Card, markdown, read_cards, rows
from diffaccel.text.escape import printable
from diffaccel.text.terminal import print_lines, wide_console

FORMATS = ("text", "markdown")
WIDE = 250
"""Width of the table on the terminal, in characters."""


def show_weights(words: list[str]) -> list[Card]:
    """Print and return the cards of the weights of a folder, or of all shipped weights.

    Raises:
        UsageError: Several folders are given, the format is unknown, or there are no weights.
    """
    folders, options = paths_and_options(words, ("format",), "list weights")
    if len(folders) > 1:
        raise UsageError("list weights accepts at most one folder: `diffaccel list weights cifar10_small`")
    form = options.get("format", "text")
    if form not in FORMATS:
        raise UsageError(f"format={form} is not one of {', '.join(FORMATS)}")
    cards = read_cards(*folders)
    if form == "markdown":
        print_lines(*markdown(cards).splitlines())
        return cards
    heads, cells, notes = rows(cards)
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for head in heads:
        table.add_column(head, vertical="top")
    for row in cells:
        table.add_row(*map(printable, row))
    wide_console(WIDE).print(table)
    print_lines(*notes)
    return cards
