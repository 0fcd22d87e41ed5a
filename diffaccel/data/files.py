"""Sources of one file per image: folders and zip archives, checked once and then read by index.

``places.py`` lists image files, ``decode.py`` reads one, ``labels.py`` finds labels. Images are 8-bit grey if all
images of a split are grey, else RGB; ``limit`` does not change that.
"""

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


class Probe(NamedTuple):
    """What the check of an image finds: its upright size, whether it is grey, and what reading changes in it."""

    height: int
    width: int
    grey: bool
    changes: tuple[str, ...]


class FileImages(Images):
    """Images in files of their own, decoded when they are asked for.

    Args:
        files: Where they lie.
        names: Which of them, in order.
        labels: Their labels, and the line that reports them.
        image_size: Crop the middle square and resize it (Lanczos) to this many pixels a side; None takes the images as
            they are, which must then have one size.
        others: Further images of the split, which count only in deciding whether the images are grey.
    """

    def __init__(
        self,
        files: Files,
        names: Sequence[str],
        labels: Labels,
        image_size: int | None,
        others: Sequence[str] = (),
    ) -> None:
        if image_size is not None and not 1 <= image_size <= MAX_SIDE:
            raise UsageError(f"{printable(files.path)}: image_size={image_size}: give 1 to {MAX_SIDE}")
        self.files, self.names, self.image_size, self.others = files, names, image_size, others
        self.labels, self.classes, label_notes = labels
        self._said = [*files.notes, *label_notes]
        self._shape: tuple[int, int, int] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W); the first use checks all images."""
        if self._shape is None:
            self.check()
        assert self._shape is not None
        return self._shape

    def check(self) -> None:
        """Decode every image once; ``notes`` then say what is changed in them.

        Raises:
            UsageError: Names the broken images and those of another size than most, all in one.
        """
        probes = self._probes()
        sizes = Counter((probe.height, probe.width) for probe in probes if not isinstance(probe, str))
        size = sizes.most_common(1)[0][0] if sizes else None
        if faults := list(self._faults(probes, size)):
            raise UsageError(_faults_message(self.files.path, faults, len(probes), resizable=len(sizes) > 1))
        whole = [probe for probe in probes if not isinstance(probe, str)]
        grey = sum(probe.grey for probe in whole)
        colour = grey < len(whole) or any(_in_threads(self._is_colour, self.others))
        assert size is not None
        height, width = size if self.image_size is None else (self.image_size, self.image_size)
        self._shape = 3 if colour else 1, height, width
        changes = Counter(change for probe in whole for change in probe.changes)
        if colour and grey:
            changes["grey among colour images, read as RGB"] = grey
        self.notes = [*self._said, *(f"{count} of {len(whole)} images {text}" for text, count in changes.items())]

    def first(self, n: int) -> "FileImages":
        """Return the first ``n`` images by name; colour and the number of classes stay those of the whole split."""
        labels = None if self.labels is None else self.labels[:n]
        some = FileImages(self.files, self.names[:n], Labels(labels, self.classes, []), self.image_size, self.names[n:])
        some._said = self._said
        return some

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
                image.copy_(self._pixels(self.names[index]))
            except UNREADABLE as error:
                raise UsageError(
                    f"{printable(self.files.path)}: {printable(self.names[index])} has changed since the run began "
                    f"({printable(str(error))}): put it back"
                ) from None
        return images

    def _pixels(self, name: str) -> Tensor:
        """Return one image as (C, H, W) uint8."""
        with self.files.open(name) as stream:
            image = decode(stream).image.convert("L" if self.shape[0] == 1 else "RGB")
        if self.image_size is not None:
            image = _center_square(image, self.image_size)
        return torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1)

    def _probe(self, name: str) -> Probe | str:
        """Decode an image wholly and return what it is, or else what is wrong."""
        try:
            with self.files.open(name) as stream:
                image, changes = decode(stream)
        except UNREADABLE as error:
            return str(error) or type(error).__name__
        return Probe(image.height, image.width, image.mode == "L", changes)

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
        with warnings.catch_warnings():  # decode() has a lower limit, and an error
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return list(checks)

    def _faults(self, probes: list[Probe | str], size: tuple[int, int] | None) -> Iterator[tuple[str, str]]:
        """Say of each image that can't be used why, given the size of most."""
        for name, probe in zip(self.names, probes, strict=True):
            if isinstance(probe, str):
                yield name, probe
            elif self.image_size is None and (probe.height, probe.width) != size and size is not None:
                yield name, f"{probe.width}x{probe.height}, most are {size[1]}x{size[0]}"


def _in_threads(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Map in order; Pillow decodes without the interpreter lock."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(items), 1024):  # in blocks: a future per image of a large data set takes gigabytes
            yield from pool.map(function, items[start : start + 1024])


def _faults_message(path: str, faults: list[tuple[str, str]], n: int, resizable: bool) -> str:
    remedy = "remove or replace them" + (", or set image_size to bring all to one size" if resizable else "")
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
    """Image files of a place, sorted by name, with labels by ``dataset.json`` or else by folder.

    Args:
        path: The training images.
        test_path: The test images, if any, in class folders of the same names.
        image_size: Crop the middle square and resize it to this many pixels a side; without it, all must have one size.
        labels: Read the labels.
        label: Provenance, for tables and plots; the place's name by default.
    """

    discrete = True

    def __init__(
        self,
        path: Path,
        test_path: Path | None = None,
        image_size: int | None = None,
        labels: bool = True,
        label: str | None = None,
    ) -> None:
        self.path, self.test_path = str(path), None if test_path is None else str(test_path)
        self.image_size, self.labels = image_size, labels
        self.label = label or os.path.basename(os.path.normpath(path))

    @abstractmethod
    def files(self, path: str) -> Files:
        """List a place.

        Raises:
            UsageError: No such place, a broken one, or no images in it.
        """

    def split(self, name: Split) -> FileImages:
        """List a split.

        Raises:
            UsageError: It can't be listed, or its labels don't fit the images or the training split.
        """
        files = self.files(path_of(name, self.path, self.test_path))
        labels = Labels(None, 0, [])
        if self.labels:
            labels = read_labels(files, files if name == "train" else self.files(self.path))
        return FileImages(files, files.names, labels, self.image_size)


@SOURCES.register("folder")
class Folder(FileSource):
    """Image files under a folder; the keys are those of ``FileSource``.

    Reads what EDM's ``dataset_tool.py`` writes into a folder, and the class folders of torchvision's ``ImageFolder``.
    """

    def files(self, path: str) -> Files:  # noqa: D102
        return FolderFiles(path)


@SOURCES.register("zip")
class Zip(FileSource):
    """A zip archive of images, as EDM's ``dataset_tool.py`` writes it; the keys are those of ``FileSource``.

    References:
        Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
        https://github.com/NVlabs/edm#preparing-datasets
    """

    def files(self, path: str) -> Files:  # noqa: D102
        return ZipFiles(path)
