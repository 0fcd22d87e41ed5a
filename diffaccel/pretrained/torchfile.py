"""Files of torch.save, zip archives and older streams alike, without torch.load: tensors stay in the file until asked.

What a name may stand for is a handful: storages by dtype, the functions that put a tensor together, OrderedDict.
"""

import io
import math
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from diffaccel.pretrained.pickles import Globals, open_file, refuse, run_pickle, short

MAGIC = 0x1950A86A20F9469CFC6C
"""What an older stream starts with."""

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
    """Stands for torch.FloatStorage and the like."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Storage:
    """Numbers somewhere in a file.

    Attributes:
        dtype: Their type.
        count: How many.
        read: Reads their bytes.
    """

    dtype: torch.dtype
    count: int
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, not loaded yet.

    Attributes:
        dtype: Its type there.
        shape: Its shape.
        load: Loads it, in its own type.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]


def _load(storage: Storage, offset: int, shape: tuple[int, ...]) -> Tensor:
    size, count = storage.dtype.itemsize, math.prod(shape)
    own = bytearray(storage.read()[offset * size : (offset + count) * size])
    return torch.frombuffer(own, dtype=storage.dtype).reshape(shape) if own else torch.empty(shape)


def torch_globals(origin: str) -> dict[tuple[str, str], Any]:
    """Make stand-ins for the names that files of torch.save hold; new ones each time, as a pickle may write on them."""

    def rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Stored:
        numbers = (offset, *size, *stride)
        if not isinstance(storage, Storage) or not all(type(n) is int and n >= 0 for n in numbers):
            raise refuse(origin, "a tensor's shape or storage is none")
        expected = [math.prod(size[i + 1 :]) for i in range(len(size))]
        laid_out = len(size) == len(stride) and all(
            n == 1 or a == b for n, a, b in zip(size, stride, expected, strict=True)
        )
        if not laid_out or offset + math.prod(size) > storage.count:
            raise refuse(
                origin,
                f"a tensor of shape {tuple(size)[:8]}, stride {tuple(stride)[:8]} and offset {offset} does not lie "
                f"row by row in its storage of {storage.count} numbers",
            )
        return Stored(storage.dtype, tuple(size), partial(_load, storage, offset, tuple(size)))

    def rebuild_parameter(tensor: Any, *_: Any) -> Any:
        return tensor

    return {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): rebuild_parameter,
        **{("torch", name): StorageType(dtype) for name, dtype in DTYPES.items()},
    }


def read_torch(path: Path) -> Any:
    """Read a file of torch.save; its tensors become :class:`Stored`.

    Raises:
        UsageError: The file is missing, damaged, or names anything but tensors and containers.
    """
    return read_stream(open_file(path), str(path))


def read_stream(file: BinaryIO, origin: str) -> Any:
    """Read an open one."""
    if zipfile.is_zipfile(file):
        return _read_zip(file, origin)
    file.seek(0)
    return _read_older(file, origin)


def _identify(pid: tuple[Any, ...], origin: str) -> tuple[torch.dtype, str, int]:
    """Dtype, key and count of a storage's persistent id."""
    if len(pid) not in (5, 6) or pid[0] != "storage" or not isinstance(pid[1], StorageType) or any(pid[5:]):
        raise refuse(origin, f"it refers to {short(pid[0] if pid else None)}, which is no storage of numbers")
    key, count = pid[2], pid[4]
    if type(key) is not str or type(count) is not int or count < 0:
        raise refuse(origin, "a storage has no key or no size")
    return pid[1].dtype, key, count


def _read_zip(file: BinaryIO, origin: str) -> Any:
    """Records of the archive, none of them compressed: nothing in it is larger than in the file."""
    try:
        archive = zipfile.ZipFile(file)
        records = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise refuse(origin, f"it is truncated or damaged ({error})") from None
    stored = all(info.compress_type == zipfile.ZIP_STORED for info in records.values())
    if not stored or sum(info.file_size for info in records.values()) > _end_of(file):
        raise refuse(origin, "it is a compressed archive, which torch.save does not write")
    (root, *others) = [name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")] or [""]
    if others or not root:
        raise refuse(origin, "it is an archive, but not one of torch.save")
    order = records.get(f"{root}byteorder")

    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, struct.error) as error:
            raise refuse(origin, f"its record {name} is damaged ({error})") from None

    if order is not None and read(order.filename) != b"little":
        raise refuse(origin, "its numbers are not little-endian")

    def storage(pid: tuple[Any, ...]) -> Storage:
        dtype, key, count = _identify(pid, origin)
        record = records.get(f"{root}data/{key}")
        if record is None or record.file_size != count * dtype.itemsize:
            size = "no record" if record is None else f"{record.file_size} bytes"
            raise refuse(origin, f"storage {key[:40]!r} of {count} {dtype} has {size}: it is truncated or oversized")
        return Storage(dtype, count, lambda: read(record.filename))

    return run_pickle(io.BytesIO(read(f"{root}data.pkl")), origin, torch_globals(origin), storage)


def _read_older(file: BinaryIO, origin: str) -> Any:
    """A stream of pickles: magic number, version, machine, the object, the storages' keys; then their bytes."""
    known: Globals = torch_globals(origin)
    if file.read(2)[:1] != b"\x80":
        raise refuse(origin, "it is no file of torch.save")
    file.seek(0)
    if run_pickle(file, origin, known) != MAGIC:
        raise refuse(origin, "it is a pickle, but not one of torch.save")
    version, machine = run_pickle(file, origin, known), run_pickle(file, origin, known)
    if version != 1001 or not isinstance(machine, Mapping) or machine.get("little_endian") is not True:
        raise refuse(origin, f"its version is {short(version)}, or its numbers are not little-endian")
    positions: dict[str, int] = {}
    storages: dict[str, Storage] = {}

    def storage(pid: tuple[Any, ...]) -> Storage:
        dtype, key, count = _identify(pid, origin)

        def read() -> bytes:
            file.seek(positions[key])
            return file.read(count * dtype.itemsize)

        made = storages.setdefault(key, Storage(dtype, count, read))
        if (made.dtype, made.count) != (dtype, count):
            raise refuse(origin, f"storage {key[:40]!r} has two sizes")
        return made

    content = run_pickle(file, origin, known, storage)
    keys = run_pickle(file, origin, known)
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
