"""One door to all files of weights: the content tells the format, and a reader names the kind that it needs."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from diffaccel.errors import UsageError
from diffaccel.parts.registry import Registry
from diffaccel.weights.files import file_sha256
from diffaccel.weights.header import check_types, name_of
from diffaccel.weights.pickles import open_file, refuse
from diffaccel.weights.torchfile import is_torch, read_torch


@dataclass(frozen=True)
class Weights:
    """An open file of weights: its header is read and checked, its tensors are read on demand.

    Attributes:
        path: The file, or the folder of a format of several files.
        format: Name of its format.
        kind: What the weights are, a key of :data:`~diffaccel.weights.header.KINDS`; None if nothing tells.
        header: See :mod:`~diffaccel.weights.header`.
        read: Reads the tensors by name: floating-point ones as float32, all of them finite.
        files: The files that determine the weights, where ``path`` is a folder.
        parts: Averaged networks of a training state, by kind.
        content: Reads the whole content of a training state; None for other kinds.
    """

    path: Path
    format: str
    kind: str | None
    header: Mapping[str, Any]
    read: Callable[[], dict[str, Tensor]]
    files: tuple[Path, ...] = ()
    parts: Mapping[str, "Weights"] = field(default_factory=dict)
    content: Callable[[], dict[str, Any]] | None = None

    @property
    def brings_network(self) -> bool:
        """Whether the file determines network and preconditioning, in place of the experiment's."""
        return "source" in self.header

    @cached_property
    def sha256(self) -> str:
        """Hash of the file, or of the hashes of a folder's files."""
        return hash_files(self.path, self.files)

    def of(self, kind: str) -> "Weights":
        """Return the weights of a kind: these, or the averaged network of that kind in a training state.

        Weights of unknown kind are returned for any network; names and shapes of their tensors are compared later.

        Raises:
            UsageError: The file holds another kind; the message shows both.
        """
        if self.kind == "training state" != kind:
            if kind not in self.parts:
                raise UsageError(
                    f"{self.path} is a training state that holds no averaged {kind}: give one of a run that trained "
                    f"{name_of(kind)}, or weights"
                )
            return self.parts[kind]
        if self.kind == kind or (self.kind is None and kind != "training state"):
            return self
        raise UsageError(f"{self.path} holds {name_of(self.kind)}, and {name_of(kind)} is needed: name another file")


class File:
    """A file or folder whose format is not known yet.

    Attributes:
        path: Where it is.
        head: Its first bytes; none of a folder.

    Args:
        path: Where it is.

    Raises:
        UsageError: It does not exist, can't be read, or can be no file of weights (a web page, an image ...).
    """

    def __init__(self, path: Path) -> None:
        self.path, self.head = path, b""
        if not path.exists():
            raise UsageError(f"weights {path} do not exist: train them with `diffaccel fit`, or set checkpoint=FILE")
        if not path.is_dir():
            with open_file(path) as opened:
                self.head = opened.read(64)

    @property
    def container(self) -> str | None:
        """``safetensors``, ``torch`` (of torch.save) or ``pickle``, by the first bytes; None for anything else."""
        # First: the length that begins a safetensors file may have any low bytes, those of a pickle among them.
        if self.head[4:9] == b"\x00\x00\x00\x00{":
            return "safetensors"
        if is_torch(self.head):
            return "torch"
        return "pickle" if self.head.startswith(b"\x80") else None

    @cached_property
    def archive(self) -> Any:
        """Content of a file of torch.save, whose tensors stay in the file; None for other files.

        Raises:
            UsageError: The file is damaged or hostile.
        """
        return read_torch(self.path) if self.container == "torch" else None


class Format(ABC):
    """A format of files of weights; a plugin adds one by an entry point in the group ``diffaccel.formats``."""

    @abstractmethod
    def recognises(self, file: File) -> bool:
        """Whether a file's content is of this format. A format that is registered later is tried earlier."""

    @abstractmethod
    def open(self, file: File, options: Mapping[str, Any]) -> Weights:
        """Read the header and leave the tensors.

        Args:
            file: A file that the format recognises.
            options: What the user says about a file that is not ours: ``weights``, ``size``, ``sigma_max``.

        Raises:
            UsageError: The file is damaged, hostile, or of a layout that is not built here.
        """


FORMATS: Registry[Format] = Registry("format", builtins=["diffaccel.weights.formats", "diffaccel.pretrained"])
FORMATS.base(Format)


def open_weights(path: Path | str, **options: Any) -> Weights:
    """Open weights of any format, ours and foreign.

    Args:
        path: A file, or a folder of diffusers.
        options: See :meth:`Format.open`.

    Raises:
        UsageError: The file is missing, damaged, hostile, or of no known format.
    """
    file = File(Path(path))
    for name in reversed(list(FORMATS)):
        format_ = FORMATS[name]()
        if format_.recognises(file):
            found = format_.open(file, options)
            check_types(str(path), found.header)
            return found
    raise refuse(str(path), f"its content is of none of the formats {', '.join(FORMATS)}")


def hash_files(path: Path, files: tuple[Path, ...] = ()) -> str:
    """Hash a file, or the hashes of a folder's files, in hexadecimal digits."""
    if path.is_file():
        return file_sha256(path)
    return hashlib.sha256("".join(file_sha256(file) for file in files).encode()).hexdigest()
