"""Text from files (labels, names, quoted content) made inert for where it is written: terminal, CSV, Markdown."""

import re

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def printable(text: str) -> str:
    r"""Return text of one line that no terminal acts on, and that any encoding of Unicode can write.

    Controls (ESC, CR, BEL), bidirectional overrides, surrogates and all else that is not seen are given as escapes.

    Example:
        >>> printable("a\x1b[31mb")
        'a\\x1b[31mb'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def csv_cell(text: str) -> str:
    """Return text that no spreadsheet takes for a formula; numbers are left as they are.

    An apostrophe marks text in a spreadsheet, which does not show it.
    """
    text = printable(text)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") and not NUMBER.fullmatch(text) else text


def markdown_cell(text: str) -> str:
    """Return text that fits a cell of a Markdown table, with nothing in it that formats or is HTML."""
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\|`*$~\[\]])", r"\\\1", text)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)  # within a word it does not emphasise
