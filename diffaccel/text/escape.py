"""Escapes for text from files (labels, names, quoted content) in terminals, CSV and Markdown."""

import re

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def printable(text: str) -> str:
    r"""Escape text to one line without control sequences, which can be printed in any encoding of Unicode.

    Control characters (ESC, CR, BEL), bidirectional overrides, surrogates and other invisible characters are escaped.

    Example:
        >>> printable("a\x1b[31mb")
        'a\\x1b[31mb'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def csv_cell(text: str) -> str:
    """Escape text that a spreadsheet would interpret as a formula; numbers are unchanged.

    The escape is an apostrophe, which marks text in a spreadsheet and is not shown.
    """
    text = printable(text)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") and not NUMBER.fullmatch(text) else text


def markdown_cell(text: str) -> str:
    """Escape text for a cell of a Markdown table, without formatting and HTML."""
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\|`*$~\[\]])", r"\\\1", text)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)  # not emphasis within a word
