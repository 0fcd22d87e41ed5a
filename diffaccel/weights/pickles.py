"""Safe reading of untrusted pickles, without calling any function that they contain.

A pickle is a program for a stack machine, which looks up names (globals) and calls them. The machine in this module has
only the operations that checkpoints require. Known names stand for inert functions; any other name is an error. Keys
are strings and small integers, nesting and length are bounded, and nothing is hashed or compared in depth, so that
time and memory are bounded by the size of the file.
"""

import io
import itertools
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from diffaccel.errors import UsageError
from diffaccel.text.mistaken import what_it_is

MAX_BYTES = 16 << 30
"""Maximum size of a file, in bytes."""
MAX_OPERATIONS = 1_000_000
"""Maximum number of operations; published files have about ten thousand."""
MAX_DEPTH = 100
"""Maximum nesting of containers; that of EDM's modules is 30."""
MAX_KEY = 1 << 31
"""Upper bound of integer keys, because large integers could be chosen to collide."""

Globals = Mapping[tuple[str, str], Any]
"""(module, name) -> inert stand-in."""

DAMAGED = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    EOFError,
    OSError,
    struct.error,
    zipfile.BadZipFile,
)
"""Exceptions of Python's readers for damaged files."""


def refuse(origin: str, reason: str) -> UsageError:
    """Create the error for a file that is refused."""
    return UsageError(f"{origin} is refused: {reason}")


def short(value: Any) -> str:
    """Format a value of a file in few characters; containers, which may be large, are shown by type."""
    return (
        repr(value)[:40]
        if isinstance(value, int | float)
        else repr(value[:40])
        if isinstance(value, str)
        else (f"a {type(value).__name__}")
    )


@contextmanager
def damage(origin: str) -> Iterator[None]:
    """Convert exceptions for damaged files to a usage error.

    Raises:
        UsageError: An exception in ``DAMAGED`` was raised.
    """
    try:
        yield
    except UsageError:  # a ValueError, too
        raise
    except DAMAGED as error:
        reason = str(error).splitlines()[0][:100] if str(error).strip() else type(error).__name__
        raise refuse(origin, f"it is truncated or damaged ({reason})") from None


def open_file(path: Path, text: bool = False) -> BinaryIO:
    """Open a file after a check of its size and first bytes.

    Args:
        path: File.
        text: Whether the file contains text, and not binary data.

    Raises:
        UsageError: The file is missing, unreadable, empty, too large, or evidently of another type.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist: give a checkpoint's file, or a folder of diffusers")
    try:
        size, file = path.stat().st_size, path.open("rb")
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror or error}") from None
    if size > MAX_BYTES:
        raise refuse(str(path), f"it has {size} bytes, more than the maximum of {MAX_BYTES}")
    if not text and (found := what_it_is(path)):
        raise refuse(str(path), f"it is {found}")
    return file


def key_of(value: Any) -> Any:
    """Check and return a key of a mapping, or an element of a set.

    Raises:
        ValueError: The value is neither a string nor a small integer.
    """
    if type(value) is str or (type(value) is int and 0 <= value < MAX_KEY):
        return value
    raise ValueError(f"a key is {short(value)}, not a string or a small integer")


def make_dict(items: Iterable[Any] = ()) -> dict[Any, Any]:
    """Stand-in for dict and its subclasses."""
    pairs = items.items() if isinstance(items, dict) else items
    return {key_of(key): value for key, value in pairs}


def make_set(items: Iterable[Any] = ()) -> set[Any]:
    """Stand-in for set."""
    return {key_of(item) for item in items}


class Attributed:
    """Stand-in whose attributes a pickle may set."""

    def set_state(self, state: Any) -> None:
        """Set the state from the pickle."""


class _Bounded:
    """File whose reads are bounded by the remaining bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.tell = file, file.tell
        here = file.tell()
        self._end = file.seek(0, io.SEEK_END)
        file.seek(here)

    def read(self, count: int) -> bytes:
        if count > 8 and count > self._end - self._file.tell():
            raise ValueError(f"{count} bytes are announced where fewer are left")
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline(1000)


def run_pickle(
    file: BinaryIO,
    origin: str,
    known: Globals,
    storage: Callable[[tuple[Any, ...]], Any] | None = None,
    spent: Iterator[int] | None = None,
) -> Any:
    """Read the pickle at the position of a file, and advance the file to its end.

    Args:
        file: File in binary mode.
        origin: Name of the file in messages.
        known: Stand-ins for allowed names.
        storage: Function persistent id -> storage of tensors; None if persistent ids are not allowed.
        spent: Counter of operations from 0, which several pickles may share.

    Raises:
        UsageError: The pickle contains another name, or is damaged or malicious.
    """
    with damage(origin):
        return _Machine(origin, known, storage, spent or itertools.count()).run(file)


class _Machine:
    """Stack machine that runs a pickle."""

    def __init__(
        self, origin: str, known: Globals, storage: Callable[[tuple[Any, ...]], Any] | None, spent: Iterator[int]
    ) -> None:
        self.origin, self.known, self.storage, self.spent = origin, known, storage, spent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.alive: list[Any] = []  # keeps the ids below valid
        self.depth: dict[int, int] = {}
        self.closed: set[int] = set()

    def run(self, file: BinaryIO) -> Any:
        for count, (operation, argument, _) in enumerate(pickletools.genops(cast(Any, _Bounded(file)))):
            name = operation.name
            if next(self.spent) >= MAX_OPERATIONS:
                raise refuse(self.origin, f"it holds over {MAX_OPERATIONS} pickle operations")
            if name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _LITERALS:
                self.stack.append(argument)
            elif name in _STORES:
                if argument is not None and argument > count:
                    raise refuse(self.origin, f"it numbers an object {argument} after {count} operations")
                self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
            elif name in _OPERATIONS:
                _OPERATIONS[name](self, argument)
            elif name not in _IGNORED:
                raise refuse(self.origin, f"it holds the pickle operation {name}, which no checkpoint needs")
        return self.pop(1)[0]

    def pop(self, count: int | None = None) -> list[Any]:
        """Pop ``count`` values, or all values after the last mark, in order."""
        start = self.marks.pop() if count is None else len(self.stack) - count
        if start < (self.marks[-1] if self.marks else 0):
            raise ValueError("its stack is empty")
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def push(self, made: Any, parts: Iterable[Any] = ()) -> None:
        """Push an object that contains ``parts``."""
        if id(made) not in self.depth:  # a call may return one of its arguments
            self.alive.append(made)
            self.depth[id(made)] = 0
            self.hold(made, parts)
        self.stack.append(made)

    def push_tuple(self, count: int | None = None) -> None:
        parts = self.pop(count)
        self.push(tuple(parts), parts)

    def hold(self, holder: Any, parts: Iterable[Any]) -> None:
        """Record that ``holder`` contains ``parts``, which must not change afterwards.

        This excludes cycles, and depths remain valid.
        """
        inner = 0
        for part in parts:
            if id(part) in self.depth:
                self.closed.add(id(part))
                inner = max(inner, self.depth[id(part)])
        if id(holder) in self.closed:
            raise ValueError("something is written on after it was put into something else")
        self.depth[id(holder)] = max(self.depth[id(holder)], inner + 1)
        if inner >= MAX_DEPTH:
            raise refuse(self.origin, f"it is nested more than {MAX_DEPTH} deep")

    def top(self, kind: type) -> Any:
        """Return the mutable value on top of the stack, of a given type."""
        if type(self.stack[-1]) is not kind:
            raise TypeError(f"{short(self.stack[-1])} where a {kind.__name__} is written on")
        return self.stack[-1]

    def fill(self, values: list[Any]) -> None:
        made = self.top(dict)
        self.hold(made, values)
        made.update(zip(map(key_of, values[::2]), values[1::2], strict=True))

    def extend(self, values: list[Any]) -> None:
        made = self.top(list)
        self.hold(made, values)
        made.extend(values)

    def add(self, values: list[Any]) -> None:
        self.top(set).update(map(key_of, values))

    def look_up(self, module: str, name: str) -> None:
        if (module, name) not in self.known:
            called = f"{module[:60]}.{name[:60]}"
            raise refuse(self.origin, f"it names {called}, which no such checkpoint holds: code in a file is never run")
        self.stack.append(self.known[module, name])

    def call(self) -> None:
        function, arguments = self.pop(2)
        if not callable(function) or type(arguments) is not tuple:  # only stand-ins are callable
            raise TypeError(f"{short(function)} is called")
        self.push(function(*arguments), arguments)

    def build(self) -> None:
        (state,) = self.pop(1)
        target = self.stack[-1]
        if isinstance(target, Attributed):
            self.hold(target, [state])
            target.set_state(state)
        elif type(target) is not dict:  # attributes of a dict are ignored
            raise TypeError(f"attributes of {short(target)} are set")

    def persistent(self) -> None:
        (pid,) = self.pop(1)
        if self.storage is None or type(pid) is not tuple:
            raise refuse(self.origin, "it refers to data outside itself")
        self.push(self.storage(pid))


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_LITERALS |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_STORES = {"BINPUT", "LONG_BINPUT", "MEMOIZE"}
_IGNORED = {"PROTO", "FRAME", "STOP"}
_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": lambda self, _: self.marks.append(len(self.stack)),
    "BINGET": lambda self, index: self.stack.append(self.memo[index]),
    "LONG_BINGET": lambda self, index: self.stack.append(self.memo[index]),
    "EMPTY_TUPLE": lambda self, _: self.push(()),
    "TUPLE1": lambda self, _: self.push_tuple(1),
    "TUPLE2": lambda self, _: self.push_tuple(2),
    "TUPLE3": lambda self, _: self.push_tuple(3),
    "TUPLE": lambda self, _: self.push_tuple(),
    "EMPTY_LIST": lambda self, _: self.push([]),
    "APPEND": lambda self, _: self.extend(self.pop(1)),
    "APPENDS": lambda self, _: self.extend(self.pop()),
    "EMPTY_DICT": lambda self, _: self.push({}),
    "SETITEM": lambda self, _: self.fill(self.pop(2)),
    "SETITEMS": lambda self, _: self.fill(self.pop()),
    "EMPTY_SET": lambda self, _: self.push(set()),
    "ADDITEMS": lambda self, _: self.add(self.pop()),
    "FROZENSET": lambda self, _: self.push(make_set(self.pop())),
    "GLOBAL": lambda self, names: self.look_up(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda self, _: self.look_up(*self.pop(2)),
    "REDUCE": lambda self, _: self.call(),
    "NEWOBJ": lambda self, _: self.call(),
    "BUILD": lambda self, _: self.build(),
    "BINPERSID": lambda self, _: self.persistent(),
}
