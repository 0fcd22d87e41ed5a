"""Optional packages, required by some parts and imported when these are built."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffaccel.errors import UsageError


@contextmanager
def extra(name: str, needed_by: str) -> Iterator[None]:
    """Wrap the imports of the packages that an extra installs.

    Args:
        name: Name of the extra in pyproject.toml.
        needed_by: Part that requires the packages, for the message.

    Raises:
        UsageError: A package is not installed.

    Example:
        >>> with extra("flow", needed_by="density 'flow'"):
        ...     import zuko
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise UsageError(
            f"{needed_by} requires {package}, which is not installed: pip install 'diffaccel[{name}]'"
        ) from None
