"""What a data set is to the rest of the project: splits of images that are read by index."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from diffaccel.errors import UsageError
from diffaccel.parts.registry import Registry

Split = Literal["train", "test"]
SPLITS: tuple[str, ...] = get_args(Split)


class MissingSplit(UsageError):
    """A data set has no such split."""


class Images(ABC):
    """One split of a data set.

    Attributes:
        labels: Class labels, (N,) int64, or None.
        classes: How many classes the labels are drawn from; 0 without labels.
        notes: Sentences on what was passed over or changed in reading, which the data module prints once.
    """

    labels: Tensor | None
    classes: int
    notes: Sequence[str] = ()

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W), the same for all images."""

    @abstractmethod
    def read(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices`` (n,) as (n, C, H, W): uint8, or float where the data are no images."""

    @abstractmethod
    def first(self, n: int) -> "Images":
        """Return the first ``n`` images, or all if there are fewer."""

    def check(self) -> None:  # noqa: B027  (nothing to check unless the images lie in files of their own)
        """Look at every image once, so that a broken one is an error now and not hours into a training.

        Raises:
            UsageError: Some images can't be used; names them.
        """


class ArrayImages(Images):
    """Images held in memory, so that a batch is one gather.

    Args:
        images: (N, C, H, W), uint8 for images, float for points that stay in their own units.
        labels: (N,) integers, or None.
        classes: Number of classes, if that is known better than from the largest label.
        notes: What the user should know of how they were read.
    """

    def __init__(
        self, images: Tensor, labels: Tensor | None = None, classes: int | None = None, notes: Sequence[str] = ()
    ) -> None:
        self.images, self.notes = images, notes
        self.labels = None if labels is None else labels.long()
        self.classes = (0 if self.labels is None else int(self.labels.max()) + 1) if classes is None else classes

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def read(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices`` (n,) as (n, C, H, W)."""
        return torch.index_select(self.images, 0, indices)

    def first(self, n: int) -> "ArrayImages":
        """Return the first ``n`` images; the number of classes stays that of the whole split."""
        return ArrayImages(self.images[:n], None if self.labels is None else self.labels[:n], self.classes, self.notes)


class Source(ABC):
    """A data set: up to two splits and where it comes from.

    A source's constructor is its YAML schema. Every source takes ``label``, the words by which figures name the data
    ("CIFAR-10 (JPEG)"); without it they use the source's own.

    Attributes:
        label: Provenance, for tables and plots.
    """

    label: str

    discrete: ClassVar[bool | None] = None
    """Whether its data are images, uint8, and not points in units of their own; None if the data have to tell."""
    fixed_shape: ClassVar[tuple[int, int, int] | None] = None
    """(C, H, W), of a source whose images have no other."""

    def has_images(self) -> bool:
        """Whether its data are images, which are scored as 8-bit ones; reads one if the class doesn't say."""
        if self.discrete is not None:
            return self.discrete
        return self.split("train").read(torch.zeros(1, dtype=torch.int64)).dtype == torch.uint8

    @abstractmethod
    def split(self, name: Split) -> Images:
        """Open a split.

        Raises:
            MissingSplit: The data set has no such split.
            UsageError: It can't be read.
        """


SOURCES: Registry[Source] = Registry("source", builtins=["diffaccel.data.arrays", "diffaccel.data.files"])
SOURCES.base(Source)


def path_of(split: Split, path: str, test_path: str | None) -> str:
    """Choose between the paths of a source whose test split is optional.

    Raises:
        MissingSplit: The test split was asked for and has no path.
    """
    if split == "train":
        return path
    if test_path is None:
        raise MissingSplit(f"{path} has no test split: give the source the key test_path, or use the split 'train'")
    return test_path
