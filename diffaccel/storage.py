"""Output files and folders: atomic writes, checks before work starts, and locks on the folders of runs."""

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
except ImportError:  # Windows
    fcntl = resource = None  # type: ignore[assignment]

LOCK = ".lock"
"""File in OUT that a run locks; it contains a description of the run."""
PART = ".part"
"""Infix of the names of files that are being written."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Error codes of file systems without locks."""

_held: list[IO[bytes]] = []


def _close_locks() -> None:
    """Close the parent's locks in a forked child, which would otherwise hold them after the end of the parent."""
    while _held:
        _held.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks)


def unwritable(path: str | Path, error: OSError) -> UsageError:
    """Make the error for a file that can't be written, with path, cause and remedy."""
    full = "make room (or raise the limit) and run the same command again"
    remedy = full if error.errno in FULL else "choose another path"
    return UsageError(f"{path} can't be written ({error.strerror or error}): {remedy}")


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Yield the name of a temporary file, which replaces ``path`` when the ``with`` block ends without an error.

    The name is unique and has the suffix of ``path``. Missing folders are created. After an error, the temporary file
    is removed.

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
    """Resolve links in the path of an existing or new file.

    Raises:
        UsageError: The path is a folder, a device, or a loop of links.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return Path(os.path.realpath(path))
    except OSError as error:
        raise unwritable(path, error) from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise UsageError(f"{path} is {kind}, not a file that can be written: choose another path")
    return Path(os.path.realpath(path))


def write_whole(path: str | Path, content: bytes | memoryview | str) -> None:
    """Write a file atomically.

    Raises:
        UsageError: The file can't be written.
    """
    with whole(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def write_all(file: IO[bytes], content: bytes) -> None:
    """Write all bytes to an unbuffered file, whose ``write`` may write only a part."""
    while content:
        content = content[file.write(content) :]


def lock(file: IO[bytes], wait: bool = True) -> bool:
    """Lock an open file until the file is closed or the process ends, normally or not.

    Args:
        file: File opened for writing, as network file systems require.
        wait: Whether to wait until another process releases the lock.

    Returns:
        Whether the file is locked; False on systems without locks.

    Raises:
        BlockingIOError: Another process holds the lock, and ``wait`` is false.
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
    """Create the folder of a run and lock it for the duration of a ``with`` block.

    The operating system releases the lock when the process ends, so that a run that was killed can be resumed at once.
    A folder that was created and is still empty is removed.

    Raises:
        UsageError: The folder can't be written to, or another run, named in the message, has locked it.
    """
    with ExitStack() as stack:
        with _usage_errors(folder):
            stack.enter_context(_created(folder))
            file = stack.enter_context(_hold(folder))
        try:
            yield
        finally:
            if file in _held:  # not in a child process
                _held.remove(file)
                with suppress(OSError):
                    (folder / LOCK).unlink()  # before the lock is released, so that no run locks the unlinked file


@contextmanager
def _created(folder: Path) -> Iterator[None]:
    """Create a folder for the duration of a ``with`` block, and remove the created folders that are empty then."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


@contextmanager
def _usage_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise UsageError(f"out={folder} is a file: choose another out=") from None
    except OSError as error:
        raise UsageError(f"out={folder} can't be written to ({error.strerror}): choose another out=") from None


def _hold(folder: Path) -> IO[bytes]:
    """Lock a folder and write a description of this run into the lock file."""
    path = folder / LOCK
    while True:
        file = path.open("a+b", buffering=0)
        try:
            locks = lock(file, wait=False)
            if not locks:
                warning = f"{folder}: the file system has no locks: don't start another run with this out= meanwhile"
                PlainConsole(stderr=True, soft_wrap=True).print(warning)
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                file.close()  # the previous run has removed the file
                continue
            file.truncate(0)
            write_all(file, json.dumps(_holder()).encode())
            if locks:
                for stale in (*folder.glob(f".*{PART}*"), *folder.glob(f"*/.*{PART}*")):
                    shutil.rmtree(stale) if stale.is_dir() else stale.unlink()  # files of a killed run
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
            process = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
            return f"{holder['command']!r:.200} ({process})"
        except (OSError, ValueError, LookupError, TypeError):  # the description is not written yet
            return "another run"


def check_target(path: str | Path) -> None:
    """Check that a file can be written, by writing and removing a temporary file in the same folder.

    Raises:
        UsageError: The path is not a file, or its folder is read-only, full, or a file.
    """
    path = _regular(path)
    try:
        if path.exists():
            path.open("ab").close()
        with _created(path.parent), suppress(_Checked), whole(path) as part:
            part.write_bytes(bytes(4096))
            raise _Checked
    except OSError as error:
        raise unwritable(path, error) from None


class _Checked(Exception):  # noqa: N818 (not an error: it ends the block before the temporary file replaces the path)
    pass


def check_room(folder: Path, size: int, largest: int, what: str) -> None:
    """Check that files fit into a folder.

    Args:
        folder: Existing folder.
        size: Total size of the files in bytes.
        largest: Size of the largest file in bytes.
        what: Name of the files in the message.

    Raises:
        UsageError: There is not enough free space, or the size of files is limited to less than ``largest``.
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
