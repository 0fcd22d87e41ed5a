"""Interfaces of data sets: sources, and splits of images that are read by index."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams
from diffaccel.parts.registry import Registry

Split = Literal["train", "test"]
SPLITS: tuple[str, ...] = get_args(Split)


class MissingSplit(UsageError):
    """A data set doesn't have the requested split."""


class Images(ABC):
    """One split of a data set.

    Attributes:
        labels: Class labels, (N,) int64, or None.
        classes: Number of classes; 0 without labels.
        notes: Sentences on skipped files and changed images, which the data module prints once.
        captions: One or more captions of each image, or None.
    """

    labels: Tensor | None
    classes: int
    notes: Sequence[str] = ()
    captions: Sequence[tuple[str, ...]] | None = None
    chosen: tuple[Tensor, int] | None = None
    """Indices of the images that :meth:`some` chose, (n,), and the number that it chose from; None for all images."""
    in_memory: ClassVar[bool] = False
    """Whether the images are already in memory, so that reading them is cheap."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of all images."""

    @abstractmethod
    def read(self, indices: Tensor) -> Tensor:
        """Read the images at ``indices`` (n,), (n, C, H, W) uint8, or float for data that are not images."""

    @abstractmethod
    def at(self, indices: Tensor) -> "Images":
        """Return the images at ``indices`` (n,), with the channels and the number of classes of all images."""

    def some(self, n: int) -> "Images":
        """Return n images in their order, or all if there are fewer: always the same random ones.

        Files are often sorted by class, so that the first ones are not typical of the others. The n images are among
        any larger number of images.
        """
        if n >= len(self):
            return self
        chosen = random_order(len(self))[:n].sort().values
        images = self.at(chosen)
        images.chosen = chosen, len(self)
        return images

    def fingerprint(self) -> str:
        """Return a hash that differs if an image differs, by default of all pixels."""
        digest = hashlib.sha256(repr((len(self), self.shape)).encode())
        for start in range(0, len(self), 500):
            digest.update(self.read(torch.arange(start, min(start + 500, len(self)))).numpy().tobytes())
        return digest.hexdigest()

    def identity(self) -> str:
        """Return a hash by which a resumed fit recognises the images, in any place, by default of all pixels."""
        return self.fingerprint()

    def check(self) -> None:  # noqa: B027  (optional: only images in separate files need checks)
        """Check every image, so that a damaged image is an error before a training starts.

        Raises:
            UsageError: Some images, named in the message, can't be used.
        """


def random_order(n: int, seed: int = 0) -> Tensor:
    """Return a random permutation of n images, (n,) int64, the same on all machines."""
    return NoiseStreams(seed, range(n), "order").uniform().argsort(stable=True)


class ArrayImages(Images):
    """Images in memory.

    Args:
        images: Images (N, C, H, W) uint8, or points in their own units, float.
        labels: Class labels, (N,) integers, or None.
        classes: Number of classes; None for the largest label plus 1.
        notes: See :class:`Images`.
        captions: See :class:`Images`.
    """

    in_memory = True

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        classes: int | None = None,
        notes: Sequence[str] = (),
        captions: Sequence[tuple[str, ...]] | None = None,
    ) -> None:
        self.images, self.notes, self.captions = images, notes, captions
        self.labels = None if labels is None else labels.long()
        self.classes = (0 if self.labels is None else int(self.labels.max()) + 1) if classes is None else classes

    def __len__(self) -> int:
        return len(self.images)

    @property
    @override
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of all images."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @override
    def read(self, indices: Tensor) -> Tensor:
        """Read the images at ``indices`` (n,), (n, C, H, W)."""
        return torch.index_select(self.images, 0, indices)

    @override
    def at(self, indices: Tensor) -> "ArrayImages":
        """See :meth:`Images.at`."""
        labels = None if self.labels is None else self.labels[indices]
        captions = None if self.captions is None else [self.captions[index] for index in indices.tolist()]
        return ArrayImages(self.images[indices], labels, self.classes, self.notes, captions)


class Source(ABC):
    """A data set with one or two splits.

    The arguments of a source's constructor are its YAML keys. Every source has a key ``label``, the name of the data in
    tables and plots ("CIFAR-10 (JPEG)"), with a default of its own.

    Attributes:
        label: Provenance, for tables and plots.
    """

    label: str

    discrete: ClassVar[bool | None] = None
    """Whether the data are uint8 images, as opposed to points in their own units; None if this depends on the data."""
    fixed_shape: ClassVar[tuple[int, int, int] | None] = None
    """Image shape (C, H, W), if it is the same for all data of this source."""

    def has_images(self) -> bool:
        """Whether the data are images, which are scored as 8-bit images; reads one image if ``discrete`` is None."""
        if self.discrete is not None:
            return self.discrete
        return self.split("train").read(torch.zeros(1, dtype=torch.int64)).dtype == torch.uint8

    @abstractmethod
    def split(self, name: Split) -> Images:
        """Open a split.

        Raises:
            MissingSplit: The data set has no such split.
            UsageError: The split can't be read.
        """


SOURCES: Registry[Source] = Registry(
    "source",
    builtins=["diffaccel.data.arrays", "diffaccel.data.files"],
    extra={"resident": bool | Literal["auto"]},  # of the data module, for any source
)
SOURCES.base(Source)


def build_source(node: Mapping[str, Any]) -> Source:
    """Build a source from its node, without the keys of the data module; reads no images.

    Raises:
        UsageError: An unknown source or key, or an invalid value.
    """
    return SOURCES.build({key: value for key, value in node.items() if key not in SOURCES.extra})


def path_of(split: Split, path: str, test_path: str | None) -> str:
    """Path of a split, for sources with an optional test split.

    Raises:
        MissingSplit: ``split`` is ``test``, and ``test_path`` is None.
    """
    if split == "train":
        return path
    if test_path is None:
        raise MissingSplit(f"{path} has no test split: set the source's key test_path, or use the split 'train'")
    return test_path
