"""Reading of weights files of any format, which is recognised by the content."""

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
from diffaccel.weights.header import check_types, is_foreign, name_of
from diffaccel.weights.pickles import open_file, refuse
from diffaccel.weights.torchfile import is_torch, read_torch


@dataclass(frozen=True)
class Weights:
    """Open weights file with a checked header, whose tensors are read on demand.

    Attributes:
        path: File, or folder for formats with several files.
        format: Name of the format.
        kind: Kind of the weights, a key of :data:`~diffaccel.weights.header.KINDS`; None if unknown.
        header: Header, see :mod:`~diffaccel.weights.header`.
        read: Function that reads the tensors by name. Floating-point tensors are float32, and all values are finite.
        files: Files that determine the weights, if ``path`` is a folder.
        parts: Averaged networks of a training state, by kind.
        content: Function that reads the whole content of a training state; None for other kinds.
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
        """Whether network and preconditioning of another codebase replace those of the experiment."""
        return is_foreign(self.header)

    @cached_property
    def sha256(self) -> str:
        """Hash of the file, or of the hashes of a folder's files."""
        return hash_files(self.path, self.files)

    def of(self, kind: str) -> "Weights":
        """Return weights of a kind: these, or the averaged network of this kind in a training state.

        Weights of unknown kind are accepted as any kind, because names and shapes of the tensors are compared later.

        Raises:
            UsageError: The file contains another kind; the message contains both.
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
    """File or folder of unknown format.

    Attributes:
        path: Path.
        head: First bytes of the file; empty for a folder.

    Args:
        path: Path.
        key: See :func:`open_weights`.

    Raises:
        UsageError: The path does not exist, can't be read, or is evidently not a weights file (a web page, an image
            ...).
    """

    def __init__(self, path: Path, key: str = "") -> None:
        self.path, self.head = path, b""
        if not path.exists():
            other = f"set {key}=FILE" if key else "give another file"
            raise UsageError(f"weights {path} do not exist: train them with `diffaccel fit`, or {other}")
        if not path.is_dir():
            with open_file(path) as opened:
                self.head = opened.read(64)

    @property
    def container(self) -> str | None:
        """``safetensors``, ``torch`` (of torch.save) or ``pickle``, by the first bytes; None for anything else."""
        # Tested first, because a safetensors file starts with a length whose low bytes may be those of a pickle.
        if self.head[4:9] == b"\x00\x00\x00\x00{":
            return "safetensors"
        if is_torch(self.head):
            return "torch"
        return "pickle" if self.head.startswith(b"\x80") else None

    @cached_property
    def archive(self) -> Any:
        """Content of a file of torch.save without its tensors, which are read later; None for other files.

        Raises:
            UsageError: The file is damaged or contains code.
        """
        return read_torch(self.path) if self.container == "torch" else None


class Format(ABC):
    """Base class of formats of weights files; plugins use entry points in the group ``diffaccel.formats``."""

    @abstractmethod
    def recognises(self, file: File) -> bool:
        """Whether the content of a file has this format. Formats that are registered later are tried first."""

    @abstractmethod
    def open(self, file: File, options: Mapping[str, Any]) -> Weights:
        """Read the header, without the tensors.

        Args:
            file: File that the format recognises.
            options: Information from the user about a file of another codebase: ``weights``, ``size``, ``sigma_max``.

        Raises:
            UsageError: The file is damaged, contains code, or has an unsupported layout.
        """


FORMATS: Registry[Format] = Registry("format", builtins=["diffaccel.weights.formats", "diffaccel.pretrained"])
FORMATS.base(Format)


def open_weights(path: Path | str, key: str = "", **options: Any) -> Weights:
    """Open weights of any format.

    Args:
        path: File, or folder in diffusers format.
        key: Setting of the path, for the message about a missing file; empty if no setting names it.
        options: See :meth:`Format.open`.

    Raises:
        UsageError: The file is missing, damaged, contains code, or has an unknown format.
    """
    file = File(Path(path), key)
    for name in reversed(list(FORMATS)):
        format_ = FORMATS[name]()
        if format_.recognises(file):
            found = format_.open(file, options)
            check_types(str(path), found.header)
            return found
    raise refuse(str(path), f"its content is of none of the formats {', '.join(FORMATS)}")


def hash_files(path: Path, files: tuple[Path, ...] = ()) -> str:
    """Compute the SHA-256 of a file, or of the hashes of a folder's files."""
    if path.is_file():
        return file_sha256(path)
    return hashlib.sha256("".join(file_sha256(file) for file in files).encode()).hexdigest()
