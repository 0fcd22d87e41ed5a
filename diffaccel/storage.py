"""Files and folders that runs write: whole or not at all, checked before work starts, held by one run at a time."""

import errno
import json
import os
import secrets
import shlex
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from diffaccel.errors import UsageError
from diffaccel.text.terminal import PlainConsole

try:
    import fcntl
    import resource
except ImportError:  # Windows has neither
    fcntl = resource = None  # type: ignore[assignment]

LOCK = ".lock"
"""File in OUT that the run holds, with the holder's name in it."""
PART = ".part"
"""Part of the names of files that are being written."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""How file systems without locks answer."""

_held: list[IO[bytes]] = []


def _let_go() -> None:
    """Close the parent's locks in a forked child, which would hold them after the parent's death."""
    while _held:
        _held.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def unwritable(path: str | Path, error: OSError) -> UsageError:
    """Return the one line for a file that can't be written: path, cause, remedy."""
    full = "make room (or raise the limit) and run the same command again"
    remedy = full if error.errno in FULL else "choose another path"
    return UsageError(f"{path} can't be written ({error.strerror or error}): {remedy}")


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Give the name of a file to write, which replaces ``path`` when the ``with`` block ends without an error.

    The name is unique to the call and has the suffix of ``path``. Folders are made; a failure leaves nothing behind.

    Raises:
        UsageError: The file can't be written.
    """
    path = _regular(path)
    part = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}{PART}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):
            part.unlink()


def _regular(path: str | Path) -> Path:
    """Follow links to where a file is, or may come to be.

    Raises:
        UsageError: There is a folder, a device or a loop.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return Path(os.path.realpath(path))
    except OSError as error:
        raise unwritable(path, error) from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise UsageError(f"{path} is {kind} where a file is to be written: choose another path")
    return Path(os.path.realpath(path))


def write_whole(path: str | Path, content: bytes | memoryview | str) -> None:
    """Write a file whole or not at all.

    Raises:
        UsageError: It can't be written.
    """
    with whole(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def write_all(file: IO[bytes], content: bytes) -> None:
    """Write all of the bytes to an unbuffered file, which may take them in parts."""
    while content:
        content = content[file.write(content) :]


def lock(file: IO[bytes], wait: bool = True) -> bool:
    """Lock an open file until it is closed or the process ends, however it ends.

    Args:
        file: Open for writing, as file systems over a network want it.
        wait: Whether to wait for another holder.

    Returns:
        Whether the system has such locks; without them nothing is locked.

    Raises:
        BlockingIOError: Another process holds it, and ``wait`` is false.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in LOCKLESS:
            raise
        return False
    return True


@contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Make a run's folder and keep other runs out of it for the length of a ``with`` block.

    The lock is the system's: it goes with the process, so that a run that was killed can be resumed at once. A folder
    that was made and stays empty is removed.

    Raises:
        UsageError: The folder can't be written to, or another run, which the message names, writes to it.
    """
    with ExitStack() as stack:
        with _taking(folder):
            stack.enter_context(_made(folder))
            file = stack.enter_context(_hold(folder))
        try:
            yield
        finally:
            if file in _held:  # not in a child process
                _held.remove(file)
                with suppress(OSError):
                    (folder / LOCK).unlink()  # while it is locked, so that nobody locks a file without a name


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder for the length of a ``with`` block; what was made and is not empty then stays."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


@contextmanager
def _taking(folder: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise UsageError(f"out={folder} is a file: choose another out=") from None
    except OSError as error:
        raise UsageError(f"out={folder} can't be written to ({error.strerror}): choose another out=") from None


def _hold(folder: Path) -> IO[bytes]:
    """Lock a folder and write the holder's name into the lock's file."""
    path = folder / LOCK
    while True:
        file = path.open("a+b", buffering=0)
        try:
            locks = lock(file, wait=False)
            if not locks:
                said = f"{folder}: its file system has no locks: start no other run with this out= meanwhile"
                PlainConsole(stderr=True, soft_wrap=True).print(said)
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                file.close()  # the last holder has removed it
                continue
            file.truncate(0)
            write_all(file, json.dumps(_holder()).encode())
            if locks:
                for stale in (*folder.glob(f".*{PART}*"), *folder.glob(f"*/.*{PART}*")):
                    shutil.rmtree(stale) if stale.is_dir() else stale.unlink()  # a killed run's: no other is here
        except BlockingIOError:
            raise UsageError(f"out={folder} is in use by {_read_holder(file)}: choose another out=, or wait") from None
        except OSError:
            file.close()
            raise
        _held.append(file)
        return file


def _holder() -> dict[str, Any]:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "since": since}


def _read_holder(file: IO[bytes]) -> str:
    with file:
        try:
            file.seek(0)
            holder = json.loads(file.read(1 << 16))
            said = f"{holder['command']!r:.200} (process {holder['pid']} on {holder['host']}, since {holder['since']})"
            return said
        except (OSError, ValueError, LookupError, TypeError):  # it has only just been locked
            return "another run"


def check_target(path: str | Path) -> None:
    """Refuse a path that no file can be written to, by writing one beside it, of which nothing is left.

    Raises:
        UsageError: It is no file, or its folder is read-only, full or a file.
    """
    path = _regular(path)
    try:
        if path.exists():
            path.open("ab").close()
        with _made(path.parent), suppress(_Checked), whole(path) as part:
            part.write_bytes(bytes(4096))
            raise _Checked
    except OSError as error:
        raise unwritable(path, error) from None


class _Checked(Exception):  # noqa: N818 (no error: it ends the block before the file gets its name)
    pass


def check_room(folder: Path, size: int, largest: int, what: str) -> None:
    """Refuse a folder without room.

    Args:
        folder: It exists.
        size: Bytes of all files.
        largest: Bytes of the largest of them.
        what: The files, for the message.

    Raises:
        UsageError: Fewer bytes are free, or files must not become so large.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UsageError(
            f"out={folder} has {free / 1e6:.3g} MB free, and the {what} take {size / 1e6:.3g} MB: make room, or choose "
            "another out="
        )
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0] if resource is not None else -1
    if 0 <= limit < largest:
        raise UsageError(
            f"files are limited to {limit / 1e6:.3g} MB here (ulimit -f), and the {what} take {largest / 1e6:.3g} MB: "
            "raise the limit"
        )
