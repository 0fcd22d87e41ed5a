"""Arrays of npz files, with memory bounded by the size of the file instead of the declared size of the arrays."""

import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from diffaccel.data.decode import listed
from diffaccel.errors import MissingError, UsageError
from diffaccel.text.escape import printable
from diffaccel.text.mistaken import what_it_is

MAX_RATIO = 100
"""Maximum number of bytes of an array per byte of the file; images rarely compress by more than 10."""
ALWAYS_ALLOWED = 2**28
"""Number of bytes of an array that are allowed in a file of any size."""

# Exceptions of zipfile and numpy for damaged files.
_BROKEN = (OSError, ValueError, EOFError, RuntimeError, LookupError, TypeError, MemoryError, tokenize.TokenError)


class ArrayFile:
    """Arrays of an npz file, read on demand.

    Args:
        path: Path of the file.

    Attributes:
        names: Names of the arrays.

    Raises:
        UsageError: The file is missing or not a complete npz file.
    """

    def __init__(self, path: str) -> None:
        if not os.path.isfile(path):
            raise MissingError(f"no file {printable(path)}: use an npz file with an array 'images'")
        self.path, self.where = path, printable(path)
        try:
            with open(path, "rb") as stream:
                if stream.read(6) == b"\x93NUMPY":
                    raise UsageError(
                        f"{self.where} is a single array (.npy): save it as npz with np.savez(FILE, images=array)"
                    )
            with zipfile.ZipFile(path) as archive:
                self._members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        except UsageError:  # a ValueError, too
            raise
        except (*_BROKEN, zipfile.BadZipFile) as error:
            raise self._broken(error) from None
        self.names = list(self._members)

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """Read an array.

        Raises:
            UsageError: The array is damaged, contains Python objects, or is too large for the size of the file.
        """
        try:
            return self._read(name)
        except UsageError:  # a ValueError, too
            raise
        except (*_BROKEN, zipfile.BadZipFile, zlib.error) as error:
            raise self._broken(error) from None

    def _read(self, name: str) -> np.ndarray[Any, Any]:
        member, size = self._members[name], os.path.getsize(self.path)
        if member.file_size > max(ALWAYS_ALLOWED, MAX_RATIO * size):
            raise UsageError(
                f"{self.where}: {name!r} takes {member.file_size} bytes, more than {MAX_RATIO} times the size of its "
                f"file: save it without compression if this is intended"
            )
        with zipfile.ZipFile(self.path) as archive, archive.open(member) as stream:  # yields no more than file_size
            shape, dtype = _header(stream)
            if dtype.hasobject:
                raise UsageError(f"{self.where}: {name!r} contains Python objects: save it as numbers or strings")
            size = dtype.itemsize
            for length in shape:  # Python integers, which don't overflow
                size *= length
            available = member.file_size - stream.tell()
            if size > available or min(shape, default=0) < 0:
                raise ValueError(f"{name!r} declares the shape {shape} of {dtype}, but has {available} bytes")
            stream.seek(0)
            return np.lib.format.read_array(stream, allow_pickle=False)

    def _broken(self, error: Exception) -> UsageError:
        try:
            found = what_it_is(Path(self.path))
        except OSError:  # the same error
            found = None
        reason = found or printable(str(error)) or type(error).__name__
        return UsageError(f"{self.where} can't be read as npz ({reason}): it is truncated or not npz; write it again")

    def unread(self, read: Iterable[str]) -> list[str]:
        """Note on the arrays that are not in ``read``, or an empty list."""
        rest = sorted(set(self.names) - set(read))
        return [f"arrays that are not read: {listed(rest)}"] if rest else []


def _header(stream: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    return shape, dtype
