"""Images at a path of any kind: a folder, a zip archive or an npz file, recognised by content."""

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffaccel.data.source import SOURCES, Images
from diffaccel.errors import UsageError
from diffaccel.text.escape import printable
from diffaccel.text.mistaken import what_it_is
from diffaccel.text.terminal import say

REMEDY = "give a folder or a zip archive of images, or an npz file"


def kind_of(path: str) -> str:
    """Return the name of the source that reads a path: ``folder``, ``zip`` or ``npz``.

    Raises:
        UsageError: The path does not exist, or is a file that none of them reads.
    """
    where = printable(path)
    if os.path.isdir(path):
        return "folder"
    if not os.path.isfile(path):
        raise UsageError(f"{where} does not exist: {REMEDY}")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile):
        names = None
    if names is not None:
        if any(name.endswith("/data.pkl") for name in names):
            raise _may_contain_code(where, "a file of torch.save")
        return "npz" if any(name.endswith(".npy") for name in names) else "zip"
    with open(path, "rb") as file:
        head = file.read(6)
    if head == b"\x93NUMPY" or os.path.splitext(path)[1].lower() == ".npz":
        return "npz"  # whose reader names the problem
    if head[:1] == b"\x80":
        raise _may_contain_code(where, "a pickle")
    if found := what_it_is(Path(path)):
        raise UsageError(f"{where} can't be read, it is {found} ({REMEDY})")
    return "zip"  # whose reader names the problem


def _may_contain_code(where: str, what: str) -> UsageError:
    return UsageError(
        f"{where} is {what}, which may contain code and is not opened: where you trust the file, read it with Python "
        "and save its arrays with np.savez, statistics as 'mu' and 'sigma'"
    )


class GivenImages:
    """Images at a path, checked, in the order of the file names, as a single split.

    Args:
        path: Folder, zip archive or npz file; labels are ignored.
        image_size: Height and width that the central square of each image is resized to; None to keep the images, which
            must then have one size. Not supported for npz files.

    Attributes:
        name: Registered name of the source.
        label: Name of the images in tables.
        images: Images.

    Raises:
        UsageError: The path has no images, or some can't be used.
    """

    limit: int | None = None

    def __init__(self, path: str, image_size: int | None = None) -> None:
        self.name = kind_of(path)
        node: dict[str, Any] = {"name": self.name, "path": path}
        if "labels" in SOURCES.keys_of(self.name):
            node["labels"] = False
        if image_size is not None:
            node["image_size"] = image_size
        source = SOURCES.build(node)
        self.label, self.images = source.label, source.split("train")
        self.images.check()
        for note in self.images.notes:
            say(f"{self.label}: {note}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of an image, (C, H, W)."""
        return self.images.shape

    @property
    def resizable(self) -> bool:
        """Whether the source takes ``image_size``."""
        return "image_size" in SOURCES.keys_of(self.name)

    def batches(
        self, split: str, batch_size: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Yield global index, images (n, C, H, W) and None for each batch of a rank; batch b is on rank b % world."""
        for number, indices in list(enumerate(batches_of(len(self), batch_size)))[rank::world]:
            yield number, read(self.images, indices), None


def batches_of(n: int, size: int) -> list[range]:
    """Split the indices of n images into batches; the last one may be smaller."""
    return [range(first, min(first + size, n)) for first in range(0, n, size)]


def read(images: Images, indices: range) -> Tensor:
    """Read the images of a batch, (b, C, H, W)."""
    return images.read(torch.arange(indices.start, indices.stop))
