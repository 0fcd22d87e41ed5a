"""Packages that only some parts need: extras of the installation, imported when such a part is built."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffaccel.errors import UsageError


@contextmanager
def extra(name: str, needed_by: str) -> Iterator[None]:
    """Wrap the imports of the packages that an extra installs.

    Args:
        name: The extra, as pyproject.toml calls it.
        needed_by: The part that imports them, for the message.

    Raises:
        UsageError: One of the packages is not installed.

    Example:
        >>> with extra("flow", needed_by="density 'flow'"):
        ...     import zuko
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise UsageError(
            f"{needed_by} needs {package}, which is not installed: pip install 'diffaccel[{name}]'"
        ) from None
