"""Safe reading of files of torch.save, zip archives and older streams, without torch.load; tensors are loaded lazily.

Only a few names are allowed: storages by dtype, functions that build a tensor, and OrderedDict.

torch.load with ``weights_only``, with or without ``mmap``, does not run code either. However (torch 2.14), it does not
compare checksums, so that a flipped bit is loaded as another weight, and a file of a few hundred bytes can block it for
years (a key of nested tuples), fill the memory (a long ``bytearray``) or create tensors larger than the file. This
module compares the checksums of an archive, and bounds time and memory by the size of the file. Formats of other
codebases require this reader in any case.
"""

import io
import itertools
import math
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from diffaccel.weights.pickles import Globals, damage, make_dict, open_file, refuse, run_pickle, short

MAX_DIMENSIONS = 8
MAX_NUMBERS = 1 << 40
"""Maximum number of elements of a tensor, and of each dimension."""
ARCHIVE = b"PK\x03\x04"
"""First bytes of a newer file."""
MAGIC = 0x1950A86A20F9469CFC6C
"""First value of an older stream."""

DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class StorageType:
    """Stand-in for torch.FloatStorage and similar classes."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Storage:
    """Numbers in a file.

    Attributes:
        dtype: Data type of the numbers.
        count: Number of numbers.
        read: Function that reads the bytes.
    """

    dtype: torch.dtype
    count: int
    read: Callable[[], bytes]

    @cached_property
    def numbers(self) -> Tensor:
        """All numbers, (count,), read once."""
        data = bytearray(self.read())
        if len(data) != self.count * self.dtype.itemsize:
            raise ValueError(f"a storage of {self.count} numbers has {len(data)} bytes")
        return torch.frombuffer(data, dtype=self.dtype) if data else torch.empty(0, dtype=self.dtype)


@dataclass(frozen=True)
class Stored:
    """Tensor in a file that is not loaded.

    Attributes:
        dtype: Data type in the file.
        shape: Shape.
        load: Function that loads the tensor in its data type.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]


def torch_globals(origin: str) -> dict[tuple[str, str], Any]:
    """Create stand-ins for the names in files of torch.save."""

    def rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Stored:
        numbers = (offset, *size, *stride)
        if not isinstance(storage, Storage) or not all(type(n) is int and 0 <= n < MAX_NUMBERS for n in numbers):
            raise refuse(origin, "a tensor's shape or storage is none")
        if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
            raise refuse(origin, f"a tensor has {len(size)} dimensions and {len(stride)} strides")
        count = math.prod(size)
        end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if count else 0
        if max(count, end) > storage.count:
            raise refuse(
                origin,
                f"a tensor of shape {tuple(size)}, stride {tuple(stride)} and offset {offset} does not lie in its "
                f"storage of {storage.count} numbers",
            )
        shape, strides = tuple(size), tuple(stride)

        def load() -> Tensor:
            with damage(origin):
                return torch.as_strided(storage.numbers, shape, strides, offset if count else 0)

        return Stored(storage.dtype, shape, load)

    def rebuild_parameter(tensor: Any, *_: Any) -> Any:
        return tensor

    return {
        ("collections", "OrderedDict"): make_dict,
        ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): rebuild_parameter,
        **{("torch", name): StorageType(dtype) for name, dtype in DTYPES.items()},
    }


def is_torch(head: bytes) -> bool:
    """Whether the first bytes are those of a file of torch.save."""
    return head.startswith(ARCHIVE) or MAGIC.to_bytes(10, "little") in head[:32]


def read_torch(path: Path) -> Any:
    """Read a file of torch.save, with tensors as :class:`Stored`.

    Args:
        path: File.

    Raises:
        UsageError: The file is missing, damaged, or contains other objects than tensors and containers.
    """
    return read_stream(open_file(path), f"checkpoint {path}")


def load_all(content: Any) -> Any:
    """Load the tensors in a result of :func:`read_torch`; tensors with the same storage share memory."""
    return _loaded(content, {})


def _loaded(value: Any, done: dict[int, Any]) -> Any:
    """Load the tensors in nested containers."""
    if id(value) not in done:
        if isinstance(value, Stored):
            done[id(value)] = value.load()
        elif isinstance(value, dict):
            done[id(value)] = {key: _loaded(entry, done) for key, entry in value.items()}
        elif isinstance(value, list | tuple):
            done[id(value)] = type(value)(_loaded(entry, done) for entry in value)
        else:
            return value
    return done[id(value)]


def read_stream(file: BinaryIO, origin: str, spent: Iterator[int] | None = None) -> Any:
    """Read an open file of torch.save; for ``spent`` see :func:`~diffaccel.weights.pickles.run_pickle`."""
    spent = spent or itertools.count()
    start = file.read(9)
    file.seek(0)
    with damage(origin):
        if start.startswith(ARCHIVE):
            return _read_zip(file, origin, spent)
        if start[8:] == b"{":
            raise refuse(origin, "it is a safetensors file under another name: rename it to .safetensors")
        if start[:1] != b"\x80":
            raise refuse(origin, "it is no file of torch.save")
        return _read_older(file, origin, spent)


def _identify(pid: tuple[Any, ...], origin: str) -> tuple[torch.dtype, str, int]:
    """Dtype, key and count in the persistent id of a storage."""
    if len(pid) not in (5, 6) or pid[0] != "storage" or not isinstance(pid[1], StorageType) or any(pid[5:]):
        raise refuse(origin, f"it refers to {short(pid[0] if pid else None)}, which is no storage of numbers")
    key, count = pid[2], pid[4]
    if type(key) is not str or type(count) is not int or not 0 <= count < MAX_NUMBERS:
        raise refuse(origin, "a storage has no key or no size")
    return pid[1].dtype, key, count


def _records(archive: zipfile.ZipFile, size: int, origin: str) -> dict[str, zipfile.ZipInfo]:
    """Records by name, which must not be compressed, so that their size is bounded by that of the file."""
    records = {info.filename: info for info in archive.infolist()}
    if len(records) < len(archive.infolist()):
        raise refuse(origin, "it holds two records of one name")
    if any(info.compress_type or info.compress_size != info.file_size for info in records.values()):
        raise refuse(origin, "it is a compressed archive, which torch.save does not write")
    if sum(info.file_size for info in records.values()) > size:
        raise refuse(origin, "its records are longer than it is: it is truncated or damaged")
    return records


def _read_zip(file: BinaryIO, origin: str, spent: Iterator[int]) -> Any:
    """Read an archive of a pickle and its storages."""
    archive = zipfile.ZipFile(file)
    records = _records(archive, _end_of(file), origin)
    (root, *others) = [name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")] or [""]
    if others or not root:
        raise refuse(origin, "it is an archive, but not one of torch.save")
    if f"{root}byteorder" in records and archive.read(f"{root}byteorder") != b"little":
        raise refuse(origin, "its numbers are not little-endian")
    storages: dict[str, Storage] = {}

    def storage(pid: tuple[Any, ...]) -> Storage:
        dtype, key, count = _identify(pid, origin)
        record = records.get(f"{root}data/{key}")
        if record is None or record.file_size != count * dtype.itemsize:
            size = "no record" if record is None else f"{record.file_size} bytes"
            raise refuse(origin, f"storage {key[:40]!r} of {count} {dtype} has {size}: it is truncated or oversized")
        return _same(storages.setdefault(key, Storage(dtype, count, lambda: archive.read(record))), dtype, origin)

    return run_pickle(io.BytesIO(archive.read(f"{root}data.pkl")), origin, torch_globals(origin), storage, spent)


def _same(storage: Storage, dtype: torch.dtype, origin: str, count: int | None = None) -> Storage:
    """Check that all references to a storage have the same type and size."""
    if storage.dtype != dtype or (count is not None and storage.count != count):
        raise refuse(origin, "one of its storages has two types or sizes")
    return storage


def _read_older(file: BinaryIO, origin: str, spent: Iterator[int]) -> Any:
    """Read a stream of pickles (magic number, version, machine, object, keys of storages) and bytes of storages."""
    known: Globals = torch_globals(origin)
    positions: dict[str, int] = {}
    storages: dict[str, Storage] = {}

    def run(storage: Callable[[tuple[Any, ...]], Any] | None = None) -> Any:
        return run_pickle(file, origin, known, storage, spent)

    def storage(pid: tuple[Any, ...]) -> Storage:
        dtype, key, count = _identify(pid, origin)

        def read() -> bytes:
            file.seek(positions[key])
            return file.read(count * dtype.itemsize)

        return _same(storages.setdefault(key, Storage(dtype, count, read)), dtype, origin, count)

    if run() != MAGIC:
        raise refuse(origin, "it is a pickle, but not one of torch.save")
    version, machine = run(), run()
    if version != 1001 or not isinstance(machine, Mapping) or machine.get("little_endian") is not True:
        raise refuse(origin, f"its version is {short(version)}, or its numbers are not little-endian")
    content, keys = run(storage), run()
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise refuse(origin, "it lists other storages than its tensors have")
    end = _end_of(file)
    for key in keys:
        made, header = storages[key], file.read(8)
        positions[key] = file.tell()
        after = positions[key] + made.count * made.dtype.itemsize
        if header != struct.pack("<q", made.count) or after > end:
            raise refuse(origin, f"storage {key[:40]!r} of {made.count} numbers is truncated or oversized")
        file.seek(after)
    return content


def _end_of(file: BinaryIO) -> int:
    here = file.tell()
    end = file.seek(0, io.SEEK_END)
    file.seek(here)
    return end
