"""The one exception that a user is meant to read."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Bad input: a mistyped key, a missing file, a budget that can't be met.

    The message is one sentence that names the thing and the remedy. The command line prints it without a traceback and
    exits with status 2; library users catch it as any exception.
    """


class SharedError(UsageError):
    """One that every process raises, so that one of them is to print it."""


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the closest of ``known``, else ``; known: a, b, c``."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
