"""Lists of the image files in a folder or a zip archive, with counts of skipped files.

Files are recognised as images by their suffix (``decode.SUFFIXES``, case-insensitive), or without a suffix by their
content. Hidden files and folders are skipped. Links to files and folders are followed, but no folder is read twice, and
no parent of the listed folder is read.
"""

import io
import os
import stat
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from typing_extensions import override

from diffaccel.data.decode import MAX_BYTES, SUFFIXES, UNREADABLE, has_image_suffix, is_image, listed
from diffaccel.errors import MissingError, UsageError
from diffaccel.text.escape import printable

LABELS_FILE = "dataset.json"

HIDDEN = "hidden"
NO_SUFFIX = "without a suffix and no images"
NO_FILE = "broken links, pipes or devices"
READ_TWICE = "links to folders that are already read"
OLDER = "older files of the same name"
OUTSIDE = "with .. in the name"


class Files(ABC):
    """Image files in a folder or an archive.

    Attributes:
        path: Path of the folder or archive.
        names: Sorted names of the image files, relative to ``path`` and with forward slashes.
        labels_file: Name of the least deeply nested ``dataset.json``, or None.
        skipped: Number of skipped files by reason.

    Raises:
        UsageError: The place can't be listed, or contains no images.
    """

    def __init__(self, path: str) -> None:
        self.path, self.skipped = path, Counter[str]()
        self.names: list[str] = []
        labels_files: list[str] = []
        for name in self._walk():
            if os.path.basename(name) == LABELS_FILE:
                labels_files.append(name)
            elif (reason := self._reason(name)) is None:
                self.names.append(name)
            else:
                self.skipped[reason] += 1
        self.names.sort()
        labels_files.sort(key=lambda name: (name.count("/"), name))
        self.labels_file = next(iter(labels_files), None)
        if len(labels_files) > 1:
            self.skipped[f"deeper {LABELS_FILE}"] = len(labels_files) - 1
        if not self.names:
            others = f" (skipped: {_counted(self.skipped)})" if self.skipped else ""
            raise UsageError(
                f"{printable(path)} contains no images{others}: use one with files ending in {', '.join(SUFFIXES)}"
            )

    @property
    def notes(self) -> list[str]:
        """Note on skipped files, or an empty list."""
        if not self.skipped:
            return []
        return [f"{len(self.names)} files used, {self.skipped.total()} skipped: {_counted(self.skipped)}"]

    @abstractmethod
    def open(self, name: str) -> IO[bytes]:
        """Open a file as a seekable stream.

        Raises:
            UNREADABLE: The file is damaged, or larger than ``MAX_BYTES``.
        """

    @abstractmethod
    def state(self, name: str) -> tuple[int, int]:
        """Return numbers that change if a file changes: size, and time of change or checksum."""

    @abstractmethod
    def _walk(self) -> Iterator[str]:
        """Yield the names of regular files, and count hidden and other skipped files."""

    def _reason(self, name: str) -> str | None:
        """Reason to skip a file; None for an image."""
        if has_image_suffix(name):
            return None
        if suffix := os.path.splitext(name)[1].lower():
            return suffix
        try:
            with self.open(name) as stream:
                return None if is_image(stream) else NO_SUFFIX
        except UNREADABLE:
            return NO_SUFFIX


class FolderFiles(Files):
    """Image files in a folder, at any depth.

    Raises:
        UsageError: The folder is missing, can't be read, or contains no images.
    """

    def __init__(self, path: str) -> None:
        if not os.path.isdir(path):
            remedy = "it is a file: use the source zip or npz" if os.path.exists(path) else "use a folder of images"
            raise MissingError(f"no folder {printable(path)}: {remedy}")
        super().__init__(path)

    @override
    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading."""
        stream = open(os.path.join(self.path, name), "rb")  # noqa: SIM115 (the caller closes it)
        if (size := os.fstat(stream.fileno()).st_size) > MAX_BYTES:
            stream.close()
            raise ValueError(f"{size} bytes, the limit is {MAX_BYTES}")
        return stream

    @override
    def state(self, name: str) -> tuple[int, int]:
        """Return size and time of change of a file."""
        found = os.stat(os.path.join(self.path, name))
        return found.st_size, found.st_mtime_ns

    @override
    def _walk(self) -> Iterator[str]:
        """Walk through real folders before links, so that names of images contain no links if possible."""
        real = Path(self.path).resolve()
        seen = {_identity(folder) for folder in real.parents}
        folders, links = [""], list[str]()
        while folders or links:
            folder = folders.pop() if folders else links.pop(0)
            here = os.path.join(self.path, folder)
            try:
                if (identity := _identity(here)) in seen:
                    self.skipped[READ_TWICE] += 1
                    continue
                seen.add(identity)
                with os.scandir(here) as entries:
                    found = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                raise UsageError(f"{printable(here)} can't be read ({error.strerror}): check its permissions") from None
            for entry in found:
                if _is_hidden(entry.name):
                    self.skipped[HIDDEN] += 1
                elif _is(entry.is_dir):
                    (links if entry.is_symlink() else folders).append(f"{folder}{entry.name}/")
                elif _is(entry.is_file):
                    yield folder + entry.name
                else:
                    self.skipped[NO_FILE] += 1


class ZipFiles(Files):
    """Image files in a zip archive; names may contain backslashes.

    Raises:
        UsageError: The file is missing, not a complete zip archive, or contains no images.
    """

    def __init__(self, path: str) -> None:
        if not os.path.isfile(path):
            remedy = "it is a folder: use the source folder" if os.path.isdir(path) else "use a zip archive of images"
            raise MissingError(f"no file {printable(path)}: {remedy}")
        self.path, self._owner = path, -1
        self._members: dict[str, zipfile.ZipInfo] = {}
        super().__init__(path)

    @override
    def open(self, name: str) -> IO[bytes]:
        """Unpack a member into memory, because every seek in an archive would unpack the member again."""
        member = self._members[name]
        if member.file_size > MAX_BYTES:  # zipfile unpacks at most file_size bytes
            raise ValueError(f"{member.file_size} bytes, the limit is {MAX_BYTES}")
        return io.BytesIO(self._archive().read(member))

    @override
    def state(self, name: str) -> tuple[int, int]:
        """Return size and checksum of a member."""
        member = self._members[name]
        return member.file_size, member.CRC

    def _archive(self) -> zipfile.ZipFile:
        """Handle of this process, because a forked worker would share the file position of the parent's handle."""
        if self._owner != os.getpid():
            self._handle, self._owner = zipfile.ZipFile(self.path), os.getpid()
        return self._handle

    def __getstate__(self) -> dict[str, Any]:
        """State without the handle, for spawned workers."""
        return {**{key: value for key, value in self.__dict__.items() if key != "_handle"}, "_owner": -1}

    @override
    def _walk(self) -> Iterator[str]:
        try:
            members = self._archive().infolist()
        except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
            raise UsageError(_no_zip(self.path, error)) from None
        for member in members:
            name = "/".join(part for part in member.filename.replace("\\", "/").split("/") if part not in ("", "."))
            if member.filename.endswith(("/", "\\")):
                continue
            if ".." in name.split("/") or any(map(_is_hidden, name.split("/"))):
                self.skipped[OUTSIDE if ".." in name.split("/") else HIDDEN] += 1
            elif stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
                self.skipped[NO_FILE] += 1
            else:
                self.skipped[OLDER] += name in self._members
                self._members[name] = member
        self.skipped += Counter()  # removes zero counts
        yield from self._members


def _identity(path: str | Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _is(test: Any) -> bool:
    """Result of a test of a folder's entry; False for loops of links, for which the test fails."""
    try:
        return bool(test())
    except OSError:
        return False


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _counted(reasons: Counter[str]) -> str:
    """Counter(hidden=3, .txt=2) -> '3 hidden, 2 .txt'."""
    return listed(f"{count} {reason}" for reason, count in sorted(reasons.items()))


def _no_zip(path: str, error: Exception) -> str:
    if any(suffix in os.path.basename(path).lower() for suffix in (".tar", ".tgz")):
        return f"{printable(path)} is a tar archive, not zip: unpack it and use the source folder"
    return f"{printable(path)} can't be read as zip ({error}): it is truncated or not zip; write it again"
