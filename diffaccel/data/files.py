"""Sources of one file per image: folders and zip archives, checked once and then read by index.

Images are read as 8-bit grey if all of a split are grey, else as RGB; transparency is dropped. Hidden files and files
that aren't images by their extension are passed over.
"""

import json
import os
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from diffaccel.data.source import SOURCES, Images, Source, Split, path_of
from diffaccel.errors import UsageError

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
GREY_MODES = frozenset({"1", "L", "LA"})
COLOUR_MODES = frozenset({"P", "RGB", "RGBA", "CMYK", "YCbCr"})
NAMED_IN_ERRORS = 10
SHOW_PROGRESS_FROM = 20_000  # images; fewer take seconds

# What Pillow and zipfile raise on damaged or foreign files.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    Image.DecompressionBombError,
)

T = TypeVar("T")
R = TypeVar("R")


class Files(ABC):
    """Where image files lie.

    Attributes:
        path: The folder or archive.
        names: The image files in it, relative and with forward slashes, sorted.
    """

    path: str
    names: list[str]

    @abstractmethod
    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading."""


class FolderFiles(Files):
    """The image files under a folder, at any depth.

    Raises:
        UsageError: No such folder, or no images in it.
    """

    def __init__(self, path: str) -> None:
        if not os.path.isdir(path):
            raise UsageError(f"no folder {path}: give the source a folder of images")
        self.path = path
        found = (Path(folder, file) for folder, _, files in os.walk(path, followlinks=True) for file in files)
        self.names = _image_names(path, (file.relative_to(path).as_posix() for file in found))

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading."""
        return open(os.path.join(self.path, name), "rb")


class ZipFiles(Files):
    """The image files of a zip archive.

    Raises:
        UsageError: No such file, not a whole zip, or no images in it.
    """

    def __init__(self, path: str) -> None:
        if not os.path.isfile(path):
            raise UsageError(f"no file {path}: give the source a zip archive of images")
        self.path, self._owner = path, -1
        try:
            members = self._archive().namelist()
        except (OSError, RuntimeError, zipfile.BadZipFile) as error:
            raise UsageError(
                f"{path} can't be read as zip ({error}): it is truncated or no zip; write it anew"
            ) from None
        self.names = _image_names(path, members)
        self.has_labels = "dataset.json" in members

    def _archive(self) -> zipfile.ZipFile:
        """Return this process's own handle: a forked loader worker would share the parent's file position."""
        if self._owner != os.getpid():
            self._handle, self._owner = zipfile.ZipFile(self.path), os.getpid()
        return self._handle

    def __reduce__(self) -> tuple[type["ZipFiles"], tuple[str]]:
        """Travel to a spawned loader worker without the handle."""
        return ZipFiles, (self.path,)

    def open(self, name: str) -> IO[bytes]:
        """Open a member for reading."""
        return self._archive().open(name)


def _image_names(path: str, names: Iterable[str]) -> list[str]:
    def wanted(name: PurePosixPath) -> bool:
        return name.suffix.lower() in EXTENSIONS and not any(part.startswith((".", "__MACOSX")) for part in name.parts)

    if images := sorted(name for name in names if wanted(PurePosixPath(name))):
        return images
    raise UsageError(f"{path} holds no images: give one with files ending in {', '.join(sorted(EXTENSIONS))}")


class FileImages(Images):
    """Images in files of their own, decoded when they are asked for.

    Args:
        files: Where they lie.
        names: Which of them, in order.
        labels: (N,) int64, or None.
        classes: Number of classes.
        image_size: Crop the middle square and resize it (Lanczos) to this many pixels a side; None takes the images as
            they are, which must then have one size.
    """

    def __init__(
        self, files: Files, names: Sequence[str], labels: Tensor | None, classes: int, image_size: int | None
    ) -> None:
        if image_size is not None and image_size < 1:
            raise UsageError(f"{files.path}: image_size={image_size}: give 1 or more")
        self.files, self.names, self.image_size = files, names, image_size
        self.labels, self.classes = labels, classes
        self._shape: tuple[int, int, int] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W); the first use checks all images."""
        if self._shape is None:
            self._shape = self._scan()
        return self._shape

    def check(self) -> None:
        """Decode every image once.

        Raises:
            UsageError: Names the broken images and those of another size than most, all in one.
        """
        self._shape = self._scan()

    def first(self, n: int) -> "FileImages":
        """Return the first ``n`` images by name; the number of classes stays that of the whole split."""
        labels = None if self.labels is None else self.labels[:n]
        return FileImages(self.files, self.names[:n], labels, self.classes, self.image_size)

    def read(self, indices: Tensor) -> Tensor:
        """Decode the images at ``indices`` (n,).

        Returns:
            (n, C, H, W) uint8.

        Raises:
            UsageError: A file changed or vanished since it was checked.
        """
        images = torch.empty((len(indices), *self.shape), dtype=torch.uint8)
        for image, index in zip(images, indices.tolist(), strict=True):
            try:
                image.copy_(self._decode(self.names[index]))
            except UNREADABLE as error:
                raise UsageError(
                    f"{self.files.path}: {self.names[index]} has changed since the run began ({error}): put it back"
                ) from None
        return images

    def _decode(self, name: str) -> Tensor:
        """Return one image as (C, H, W) uint8."""
        with self.files.open(name) as stream, Image.open(stream) as image:
            converted = image.convert("L" if self.shape[0] == 1 else "RGB")
        if self.image_size is not None:
            converted = _center_square(converted, self.image_size)
        return torch.from_numpy(np.array(converted)).view(converted.height, converted.width, -1).permute(2, 0, 1)

    def _probe(self, name: str) -> tuple[int, int, bool] | str:
        """Decode an image wholly and return its height, width and whether it is grey, or else what is wrong."""
        try:
            with self.files.open(name) as stream, Image.open(stream) as image:
                image.load()
        except UNREADABLE as error:
            return str(error) or type(error).__name__
        if image.mode not in GREY_MODES | COLOUR_MODES:
            return f"pixels of mode {image.mode}, not 8-bit"
        return image.height, image.width, image.mode in GREY_MODES

    def _scan(self) -> tuple[int, int, int]:
        """Decode every image and return the shape they share."""
        n = len(self.names)
        checks = _in_threads(self._probe, self.names)
        probes = list(
            track(checks, f"checking {self.files.path}", total=n, transient=True, disable=n < SHOW_PROGRESS_FROM)
        )
        whole = [probe for probe in probes if not isinstance(probe, str)]
        sizes = Counter((height, width) for height, width, _ in whole)
        size = sizes.most_common(1)[0][0] if sizes else None
        if faults := list(self._faults(probes, size)):
            raise UsageError(_faults_message(self.files.path, faults, n, resizable=len(sizes) > 1))
        assert size is not None
        height, width = size if self.image_size is None else (self.image_size, self.image_size)
        return (1 if all(grey for _, _, grey in whole) else 3), height, width

    def _faults(self, probes: list[tuple[int, int, bool] | str], size: tuple[int, int] | None) -> Iterator[str]:
        """Say of each image that can't be used why, given the size of most."""
        for name, probe in zip(self.names, probes, strict=True):
            if isinstance(probe, str):
                yield f"{name} ({probe})"
            elif self.image_size is None and probe[:2] != size and size is not None:
                yield f"{name} ({probe[1]}x{probe[0]}, most are {size[1]}x{size[0]})"


def _in_threads(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Map in order; Pillow decodes without the interpreter lock."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(items), 1024):  # in blocks: a future per image of a large data set takes gigabytes
            yield from pool.map(function, items[start : start + 1024])


def _faults_message(path: str, faults: list[str], n: int, resizable: bool) -> str:
    named = ", ".join(faults[:NAMED_IN_ERRORS]) + (", ..." if len(faults) > NAMED_IN_ERRORS else "")
    remedy = "remove or replace them" + (", or set image_size to bring all to one size" if resizable else "")
    return f"{path}: {len(faults)} of {n} images can't be used: {named}; {remedy}"


def _center_square(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


@SOURCES.register("folder")
class Folder(Source):
    """Image files under a folder, sorted by relative path.

    The class of an image is the first-level subfolder it lies in, numbered in sorted order over the training folder; a
    folder without subfolders has no labels.

    Args:
        path: The training images.
        test_path: The test images, if any, in subfolders of the same names.
        image_size: Crop the middle square and resize it to this many pixels a side; without it, all must have one size.
        labels: Make labels of the subfolders.
        label: Provenance, for tables and plots; the folder's name by default.
    """

    def __init__(
        self,
        path: str,
        test_path: str | None = None,
        image_size: int | None = None,
        labels: bool = True,
        label: str | None = None,
    ) -> None:
        self.path, self.test_path, self.image_size, self.labels = path, test_path, image_size, labels
        self.label = label or os.path.basename(os.path.normpath(path))

    def split(self, name: Split) -> FileImages:
        """List a split.

        Raises:
            UsageError: No such folder, no images in it, or images both in subfolders and beside them.
        """
        files = FolderFiles(path_of(name, self.path, self.test_path))
        folders = _subfolders(files) if self.labels else []
        known = _subfolders(FolderFiles(self.path)) if self.labels and name == "test" else folders
        classes = {folder: k for k, folder in enumerate(dict.fromkeys(known))}
        if unknown := sorted(set(folders) - set(classes)):
            raise UsageError(
                f"{files.path} has subfolders that {self.path} lacks ({', '.join(unknown[:NAMED_IN_ERRORS])}): "
                f"name the classes alike, or set labels: false"
            )
        labels = torch.tensor([classes[folder] for folder in folders]) if folders else None
        return FileImages(files, files.names, labels, len(classes), self.image_size)


def _subfolders(files: FolderFiles) -> list[str]:
    """Return the first-level subfolder of each image, or an empty list where there are none."""
    folders = [name.partition("/")[0] for name in files.names if "/" in name]
    if folders and len(folders) < len(files.names):
        stray = next(name for name in files.names if "/" not in name)
        raise UsageError(f"{files.path}: {stray} lies in no class's subfolder, others do: move it or set labels: false")
    return folders


@SOURCES.register("zip")
class Zip(Source):
    """A zip archive of images, as EDM's ``dataset_tool.py`` writes it.

    Labels come from the archive's ``dataset.json``, ``{"labels": [[name, integer], ...]}``; without it, or with
    ``null`` there, the images have none.

    Args:
        path: The training images.
        test_path: The test images, if any.
        image_size: Crop the middle square and resize it to this many pixels a side; without it, all must have one size.
        labels: Read the labels.
        label: Provenance, for tables and plots; the archive's name by default.

    References:
        Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
        https://github.com/NVlabs/edm#preparing-datasets
    """

    def __init__(
        self,
        path: str,
        test_path: str | None = None,
        image_size: int | None = None,
        labels: bool = True,
        label: str | None = None,
    ) -> None:
        self.path, self.test_path, self.image_size, self.labels = path, test_path, image_size, labels
        self.label = label or os.path.basename(path)

    def split(self, name: Split) -> FileImages:
        """List a split.

        Raises:
            UsageError: No such archive, a broken one, no images in it, or labels that don't fit them.
        """
        files = ZipFiles(path_of(name, self.path, self.test_path))
        labels = _zip_labels(files) if self.labels and files.has_labels else None
        return FileImages(files, files.names, labels, 0 if labels is None else int(labels.max()) + 1, self.image_size)


def _zip_labels(files: ZipFiles) -> Tensor | None:
    """Read ``dataset.json``: (N,) int64 in the order of ``files.names``, or None where it says null."""
    where = f"{files.path}: dataset.json"
    remedy = 'write {"labels": [[name, integer], ...]} or {"labels": null}, or set labels: false'
    try:
        with files.open("dataset.json") as stream:
            pairs: Any = json.load(stream)["labels"]
        labels = None if pairs is None else dict(pairs)
    except (*UNREADABLE, KeyError, TypeError) as error:
        raise UsageError(f"{where} can't be read ({type(error).__name__}: {error}): {remedy}") from None
    if labels is None:
        return None
    for name in files.names:
        if type(labels.get(name)) is not int or labels[name] < 0:
            raise UsageError(f"{where} gives {name} the label {labels.get(name)}, no class number: {remedy}")
    return torch.tensor([labels[name] for name in files.names])
