"""Arrays of an npz file, whose memory is bounded by the size of the file and not by what its headers declare."""

import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from diffaccel.data.decode import listed
from diffaccel.errors import UsageError
from diffaccel.text.escape import printable
from diffaccel.text.mistaken import what_it_is

MAX_RATIO = 100
"""Most bytes of an array for each byte of its file; images rarely compress by more than 10."""
ALWAYS_ALLOWED = 2**28
"""Bytes of an array that any file may hold, however small."""

# What zipfile and numpy raise on damaged files.
_BROKEN = (OSError, ValueError, EOFError, RuntimeError, LookupError, TypeError, MemoryError, tokenize.TokenError)


class ArrayFile:
    """The arrays of an npz file by name, read when they are asked for.

    Args:
        path: The file.

    Attributes:
        names: Of the arrays.

    Raises:
        UsageError: No such file, or one that is no whole npz.
    """

    def __init__(self, path: str) -> None:
        if not os.path.isfile(path):
            raise UsageError(f"no file {printable(path)}: give the source an npz file with an array 'images'")
        self.path, self.where = path, printable(path)
        try:
            with open(path, "rb") as stream:
                if stream.read(6) == b"\x93NUMPY":
                    raise UsageError(
                        f"{self.where} is one array (.npy) and no npz: write it anew with np.savez(FILE, images=array)"
                    )
            with zipfile.ZipFile(path) as archive:
                self._members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        except (*_BROKEN, zipfile.BadZipFile) as error:
            raise self._broken(error) from None
        self.names = list(self._members)

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """Read an array.

        Raises:
            UsageError: It is damaged, holds Python objects, or is larger than a file of this size can hold.
        """
        try:
            return self._read(name)
        except (*_BROKEN, zipfile.BadZipFile, zlib.error) as error:
            raise self._broken(error) from None

    def _read(self, name: str) -> np.ndarray[Any, Any]:
        member, size = self._members[name], os.path.getsize(self.path)
        if member.file_size > max(ALWAYS_ALLOWED, MAX_RATIO * size):
            raise UsageError(
                f"{self.where}: {name!r} takes {member.file_size} bytes, more than {MAX_RATIO} times its "
                f"file: save it without compression, if it is honest"
            )
        with zipfile.ZipFile(self.path) as archive, archive.open(member) as stream:  # yields no more than file_size
            shape, dtype = _header(stream)
            if dtype.hasobject:
                raise UsageError(f"{self.where}: {name!r} holds Python objects: save it as numbers or strings")
            size = dtype.itemsize
            for length in shape:  # in Python's integers: numpy's would overflow
                size *= length
            held = member.file_size - stream.tell()
            if size > held or min(shape, default=0) < 0:
                raise ValueError(f"{name!r} declares the shape {shape} of {dtype}, and holds {held} bytes")
            stream.seek(0)
            return np.lib.format.read_array(stream, allow_pickle=False)

    def _broken(self, error: Exception) -> UsageError:
        try:
            found = what_it_is(Path(self.path))
        except OSError:  # which is the error
            found = None
        reason = found or printable(str(error)) or type(error).__name__
        return UsageError(f"{self.where} can't be read as npz ({reason}): it is truncated or no npz; write it anew")

    def unread(self, read: Iterable[str]) -> list[str]:
        """Say which arrays are not among those that are read."""
        rest = sorted(set(self.names) - set(read))
        return [f"arrays that are not read: {listed(rest)}"] if rest else []


def _header(stream: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    return shape, dtype
