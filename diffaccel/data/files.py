"""Sources of image files: folders and zip archives, checked once and then read by index.

``places.py`` lists image files, ``decode.py`` reads a file, and ``labels.py`` reads labels. Images are 8-bit grey if
all images of a split are grey, otherwise RGB; ``limit`` doesn't affect this.
"""

import copy
import hashlib
import os
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from typing_extensions import override

from diffaccel.data import held_out
from diffaccel.data.decode import UNREADABLE, decode, is_colour, listed
from diffaccel.data.labels import Labels, read_labels
from diffaccel.data.places import Files, FolderFiles, ZipFiles
from diffaccel.data.source import SOURCES, Images, Source, Split, path_of
from diffaccel.errors import UsageError
from diffaccel.text.escape import printable
from diffaccel.text.terminal import track

NAMED_IN_ERRORS = 10
SHOW_PROGRESS_FROM = 20_000  # images; fewer take seconds
MAX_SIDE = 8192  # pixels

T = TypeVar("T")
R = TypeVar("R")


class MixedSizes(UsageError):
    """Images of one split have several sizes."""


class Probe(NamedTuple):
    """Result of the check of an image: size after rotation, whether it is grey, changes by decoding, hash of pixels."""

    height: int
    width: int
    grey: bool
    changes: tuple[str, ...]
    digest: int


class FileImages(Images):
    """Images in separate files, decoded on demand.

    Args:
        files: Place of the files.
        names: Names of the files, in order.
        labels: Labels of the files, with notes.
        image_size: Height and width to resize the central square to, by a Lanczos filter; None to keep the images,
            which must then have one size.
        hashed: Whether the check computes the hashes that :meth:`part` requires.

    Raises:
        UsageError: ``image_size`` is out of range.
    """

    def __init__(
        self,
        files: Files,
        names: Sequence[str],
        labels: Labels,
        image_size: int | None,
        hashed: bool = False,
    ) -> None:
        if image_size is not None and not 1 <= image_size <= MAX_SIDE:
            raise UsageError(f"{printable(files.path)}: image_size={image_size}: set 1 to {MAX_SIDE}")
        self.files, self.names, self.image_size = files, names, image_size
        self.others: Sequence[str] = ()  # of the split, which only affect whether the images are grey or RGB
        self.labels, self.classes, label_notes = labels
        self._listing_notes = [*files.notes, *label_notes]
        self._shape: tuple[int, int, int] | None = None
        self._hashed, self._digests = hashed, list[int]()
        self._checked = False  # by another split of the same files

    def __len__(self) -> int:
        return len(self.names)

    @property
    @override
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of all images; the first access checks all images."""
        if self._shape is None:
            self.check()
        assert self._shape is not None
        return self._shape

    @override
    def check(self) -> None:
        """Decode every image once, and add the changes by decoding to ``notes``.

        Raises:
            UsageError: Some images, named in the message, are damaged or differ in size from most images.
        """
        if self._checked:
            return
        probes = self._probes()
        sizes = Counter((probe.height, probe.width) for probe in probes if not isinstance(probe, str))
        size = sizes.most_common(1)[0][0] if sizes else None
        if faults := list(self._faults(probes, size)):
            mixed = len(sizes) > 1
            raise (MixedSizes if mixed else UsageError)(_faults_message(self.files.path, faults, len(probes), mixed))
        whole = [probe for probe in probes if not isinstance(probe, str)]
        grey = sum(probe.grey for probe in whole)
        colour = grey < len(whole) or any(_in_threads(self._is_colour, self.others))
        assert size is not None
        height, width = size if self.image_size is None else (self.image_size, self.image_size)
        self._shape = 3 if colour else 1, height, width
        self._digests = [probe.digest for probe in whole]
        changes = Counter(change for probe in whole for change in probe.changes)
        if colour and grey:
            changes["grey among colour images, read as RGB"] = grey
        counted = [f"{count} of {len(whole)} images {text}" for text, count in changes.items()]
        self.notes = [*self._listing_notes, *counted]

    def part(self, share: float, split: Split) -> "FileImages":
        """Return the images of a split by the hash of the pixels, with the channels and classes of all images.

        Raises:
            UsageError: An image can't be used, or the split has no images.
        """
        if self._shape is None:
            self.check()
        indices = held_out.chosen(self._digests, share, split, self.files.path)
        images = self.at(indices)
        images.notes = []  # of the training split alone, for all images
        if split == "train":
            images.notes = [*self.notes, held_out.note(len(self), len(self) - len(images))]
        images._checked = True
        return images

    @override
    def at(self, indices: Tensor) -> "FileImages":
        """See :meth:`Images.at`."""
        images = copy.copy(self)
        images.names = [self.names[index] for index in indices.tolist()]
        images.labels = None if self.labels is None else self.labels[indices]
        images.others = sorted({*self.names, *self.others}.difference(images.names))
        return images

    @override
    def read(self, indices: Tensor) -> Tensor:
        """Decode the images at ``indices`` (n,), (n, C, H, W) uint8.

        Raises:
            UsageError: A file has changed since the check.
        """
        images = torch.empty((len(indices), *self.shape), dtype=torch.uint8)
        for image, index in zip(images, indices.tolist(), strict=True):
            try:
                image.copy_(self._pixels(self.names[index]))
            except UNREADABLE as error:
                raise UsageError(
                    f"{printable(self.files.path)}: {printable(self.names[index])} has changed since the run began "
                    f"({printable(str(error))}): put it back"
                ) from None
        return images

    @override
    def fingerprint(self) -> str:
        """Return a hash of the names of the files, their sizes and times of change (in archives checksums)."""
        return self._hash(self.files.state)

    @override
    def identity(self) -> str:
        """Return a hash of the names of the files and their sizes, without times of change, which copies differ in."""
        return self._hash(lambda name: self.files.state(name)[0])

    def _hash(self, state: Callable[[str], object]) -> str:
        digest = hashlib.sha256(repr((len(self), self.shape, self.image_size)).encode())
        for name in self.names:
            digest.update(repr((name, state(name))).encode())
        return digest.hexdigest()

    def _pixels(self, name: str) -> Tensor:
        """Read one image, (C, H, W) uint8."""
        with self.files.open(name) as stream:
            image = decode(stream).image.convert("L" if self.shape[0] == 1 else "RGB")
        if self.image_size is not None:
            image = _center_square(image, self.image_size)
        return torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1)

    def _probe(self, name: str) -> Probe | str:
        """Decode an image and return its properties, or the reason why it can't be decoded."""
        try:
            with self.files.open(name) as stream:
                image, changes = decode(stream)
        except UNREADABLE as error:
            return str(error) or type(error).__name__
        return Probe(
            image.height, image.width, image.mode == "L", changes, held_out.digest_of(image) if self._hashed else 0
        )

    def _is_colour(self, name: str) -> bool:
        try:
            with self.files.open(name) as stream:
                return is_colour(stream)
        except UNREADABLE:
            return False

    def _probes(self) -> list[Probe | str]:
        n = len(self.names)
        probes = _in_threads(self._probe, self.names)
        checks = track(probes, f"checking {self.files.path}", n, shown=n >= SHOW_PROGRESS_FROM)
        with warnings.catch_warnings():  # decode() raises an error at a lower limit
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return list(checks)

    def _faults(self, probes: list[Probe | str], size: tuple[int, int] | None) -> Iterator[tuple[str, str]]:
        """Yield name and reason for each image that can't be used, given the most common size."""
        for name, probe in zip(self.names, probes, strict=True):
            if isinstance(probe, str):
                yield name, probe
            elif self.image_size is None and (probe.height, probe.width) != size and size is not None:
                yield name, f"{probe.width}x{probe.height}, most are {size[1]}x{size[0]}"


def _in_threads(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Map a function over items in threads, in order; Pillow releases the interpreter lock to decode."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(items), 1024):  # in blocks, because a future per image would take gigabytes
            yield from pool.map(function, items[start : start + 1024])


def _faults_message(path: str, faults: list[tuple[str, str]], n: int, resizable: bool) -> str:
    remedy = "remove or replace them" + (", or set image_size to resize all images" if resizable else "")
    reasons: dict[str, list[str]] = {}
    for name, reason in faults[:NAMED_IN_ERRORS]:
        reasons.setdefault(reason, []).append(name)
    named = ", ".join(f"{listed(names)} ({printable(reason)})" for reason, names in reasons.items())
    named += ", ..." if len(faults) > NAMED_IN_ERRORS else ""
    return f"{printable(path)}: {len(faults)} of {n} images can't be used: {named}; {remedy}"


def _center_square(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


class FileSource(Source):
    """Image files of a folder or an archive, sorted by name, with labels from ``dataset.json`` or else from folders.

    Args:
        path: Place of the training images.
        test_path: Place of the test images, with the same names of class folders; None for no test split.
        image_size: Height and width to resize the central square to; None to keep the images, which must then have one
            size.
        labels: Whether to read labels.
        test_share: Expected share of the images of ``path`` that are the test split, chosen by the hash of their
            pixels; None for no such split. No image is in both splits, copies included.
        label: Provenance, for tables and plots; the name of the place by default.

    Raises:
        UsageError: ``test_share`` is not between 0 and 1, or ``test_path`` is set too.
    """

    discrete = True

    def __init__(
        self,
        path: Path,
        test_path: Path | None = None,
        image_size: int | None = None,
        labels: bool = True,
        test_share: float | None = None,
        label: str | None = None,
    ) -> None:
        held_out.check_share(test_share, test_path)
        self.path, self.test_path = str(path), None if test_path is None else str(test_path)
        self.image_size, self.labels, self.test_share = image_size, labels, test_share
        self._all: FileImages | None = None  # whose check serves both splits
        self.label = label or os.path.basename(os.path.normpath(path))

    @abstractmethod
    def files(self, path: str) -> Files:
        """List the files of a place.

        Raises:
            UsageError: The place is missing, damaged, or without images.
        """

    @override
    def split(self, name: Split) -> FileImages:
        """Open a split.

        Raises:
            UsageError: The files can't be listed, or the labels don't fit the images or the training split.
        """
        if self.test_share is not None:
            self._all = self._all or self._read("train")
            return self._all.part(self.test_share, name)
        return self._read(name)

    def _read(self, name: Split) -> FileImages:
        files = self.files(path_of(name, self.path, self.test_path))
        labels = Labels(None, 0, [])
        if self.labels:
            labels = read_labels(files, files if name == "train" else self.files(self.path))
        return FileImages(files, files.names, labels, self.image_size, hashed=self.test_share is not None)


@SOURCES.register("folder")
class Folder(FileSource):
    """Image files in a folder; the keys are those of :class:`FileSource`.

    Supports folders written by EDM's ``dataset_tool.py``, and the class folders of torchvision's ``ImageFolder``.
    """

    @override
    def files(self, path: str) -> Files:
        return FolderFiles(path)


@SOURCES.register("zip")
class Zip(FileSource):
    """Image files in a zip archive, as written by EDM's ``dataset_tool.py``; the keys are those of :class:`FileSource`.

    References:
        Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
        https://github.com/NVlabs/edm#preparing-datasets
    """

    @override
    def files(self, path: str) -> Files:
        return ZipFiles(path)
