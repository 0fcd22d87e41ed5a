"""Exceptions with messages for users."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Error in the user's input: a mistyped key, a missing file, a budget that can't be met.

    The message is one sentence that states the problem and the remedy. The command line prints the message without a
    traceback and exits with status 2.
    """


class MissingError(UsageError):
    """A usage error for data that are not there, without which a dry run is possible."""


class SharedError(UsageError):
    """A usage error that is raised on every rank, so that only one rank needs to print it."""


def suggest(word: str, known: Iterable[str]) -> str:
    """End of a message about an unknown word: ``; did you mean 'x'?`` or, without a similar word, ``; known: a, b``.

    Args:
        word: Unknown word.
        known: Known words.
    """
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
