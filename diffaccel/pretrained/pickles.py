"""Pickles of strangers, read so that nothing they name is called.

A pickle is a program: names (globals) that it looks up, calls that it makes. Here every name stands for an inert object
made for this one reading, and any other name ends it. The program is walked through once before it runs, so that it
can't ask for more memory than it is long.
"""

import pickle
import pickletools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from diffaccel.errors import UsageError

MAX_BYTES = 16 << 30
"""Largest file that is read."""
MAX_OPERATIONS = 5_000_000
"""Longest program; published files have some ten thousand operations."""

Globals = Mapping[tuple[str, str], Any]
"""(module, name) -> its inert stand-in."""

DAMAGED = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    MemoryError,
)
"""What a pickle machine may raise on nonsense, as its documentation has it."""

_UNKNOWN = {"EXT1", "EXT2", "EXT4", "PERSID", "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER"}
"""Operations that no checkpoint needs."""


def refuse(origin: str, reason: str) -> UsageError:
    """Make the error for a file that is not read."""
    return UsageError(f"{origin} is refused: {reason}")


def short(value: Any) -> str:
    """Show a value of a file in a few characters; what holds others might be endless when written out."""
    return (
        repr(value)[:40]
        if isinstance(value, int | float)
        else repr(value[:40])
        if isinstance(value, str)
        else (f"a {type(value).__name__}")
    )


def open_file(path: Path) -> BinaryIO:
    """Open a file of a size that can be one.

    Raises:
        UsageError: The file is missing, empty or too large.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist: give a checkpoint's file, or a folder of diffusers")
    size = path.stat().st_size
    if not 0 < size <= MAX_BYTES:
        raise refuse(str(path), f"it has {size} bytes, readable are 1 to {MAX_BYTES}")
    return path.open("rb")


class _Machine(pickle.Unpickler):
    """Runs a pickle with stand-ins for the names that it may look up."""

    def __init__(
        self, file: BinaryIO, origin: str, known: Globals, storage: Callable[[tuple[Any, ...]], Any] | None
    ) -> None:
        super().__init__(file)
        self._origin, self._known, self._storage = origin, known, storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise refuse(
                self._origin,
                f"it names {module}.{name}, which is none of what such checkpoints hold and is never looked up",
            )
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        if self._storage is None or not isinstance(pid, tuple):
            raise refuse(self._origin, "it refers to data outside itself")
        return self._storage(pid)


def run_pickle(
    file: BinaryIO, origin: str, known: Globals, storage: Callable[[tuple[Any, ...]], Any] | None = None
) -> Any:
    """Read the pickle that starts at a file's position, and leave the file behind its end.

    Args:
        file: Open in binary mode.
        origin: What it is called in messages.
        known: Stand-ins for the names that may occur.
        storage: Makes tensors' storages of persistent ids; None if there may be none.

    Raises:
        UsageError: Another name occurs, or the pickle is damaged or hostile.
    """
    try:
        _walk(file, origin)
        return _Machine(file, origin, known, storage).load()
    except DAMAGED as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise refuse(origin, f"it is truncated or damaged ({reason})") from None


def _walk(file: BinaryIO, origin: str) -> None:
    """Refuse operations that no checkpoint needs, and numbers that would make the machine's memory larger than it."""
    start = file.tell()
    for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if operation.name in _UNKNOWN or count > MAX_OPERATIONS:
            raise refuse(origin, f"it holds the pickle operation {operation.name}, or over {MAX_OPERATIONS} operations")
        if "PUT" in operation.name and int(cast(Any, argument)) > count:
            raise refuse(origin, f"it numbers an object {argument} after {count} operations")
    file.seek(start)
