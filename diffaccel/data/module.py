"""The data module: a source by name, its training stream, and its images in fixed order for statistics."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from diffaccel.data.source import SOURCES, SPLITS, Images, Source, Split
from diffaccel.data.stream import Batch, GlobalBatches, Stream, TrainingSet
from diffaccel.errors import UsageError
from diffaccel.text.terminal import say


def _as_read(batch: Any) -> Any:
    """Collate nothing: the training set reads whole batches."""
    return batch


def check_labels(data: "DataModule", classes: int) -> None:
    """Compare the labels of the training images with the classes of a network that is to be trained on them.

    More classes in the network than in the data are allowed, and said: a subset of the data may lack the last ones.

    Args:
        data: The data.
        classes: Number of classes of the network; 0 for an unconditional one, which ignores labels.

    Raises:
        UsageError: A class-conditional network and data without labels, or with more classes.
    """
    if not classes:
        return
    if data.images("train").labels is None:
        raise UsageError(
            f"{data.label}: the images have no labels, the network has {classes} classes: give labels, or set "
            f"network.classes=0"
        )
    if data.classes > classes:
        raise UsageError(
            f"{data.label}: the labels have {data.classes} classes, the network {classes}: set "
            f"network.classes={data.classes}, or give other data"
        )
    if data.classes < classes:
        say(f"{data.label}: the labels have {data.classes} classes, the network {classes}: the others are not trained")


class DataModule(LightningDataModule):
    """A data set for training and for scoring.

    The training loader never ends: the method stops by itself. Use ``Trainer(use_distributed_sampler=False)``.

    Args:
        source: ``{"name": ..., key: value, ...}``, a source of ``SOURCES`` and its keys.
        batch_size: Global batch size; each of W processes gets 1 / W of it.
        seed: Seed of the training order and of the flips.
        limit: Use no more than the first ``limit`` images of each split, in the source's order. The number of classes
            stays that of the whole training split.
        flip: Mirror training images left to right with probability 1/2.
        num_workers: Processes that read the training images; 0 suits data in memory.

    Attributes:
        start_step: The step that the training loader starts from; set it before the loader is iterated, to resume.

    Raises:
        UsageError: An unknown source or key, or a number out of range.
    """

    def __init__(
        self,
        source: Mapping[str, Any],
        batch_size: int = 128,
        seed: int = 0,
        limit: int | None = None,
        flip: bool = False,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for key, value, least in (
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("limit", limit, 1),
            ("num_workers", num_workers, 0),
        ):
            if value is not None and value < least:
                raise UsageError(f"data.{key}={value}: give {least} or more")
        self.source: Source = SOURCES.build(source)
        self.source_name = str(source["name"])
        self.batch_size, self.seed, self.limit = batch_size, seed, limit
        self.flip, self.num_workers = flip, num_workers
        self.start_step = 0
        self._splits: dict[str, Images] = {}

    @property
    @override
    def name(self) -> str:  # type: ignore[override]
        """The source's registered name."""
        return self.source_name

    @property
    def label(self) -> str:
        """Where the data come from, in the words that tables and plots use."""
        return self.source.label

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.images("train").shape

    @property
    def classes(self) -> int:
        """Number of classes; 0 without labels."""
        return self.images("train").classes

    def images(self, split: str) -> Images:
        """Open a split, check it, and keep it open; what was passed over or changed in reading it is printed.

        Raises:
            UsageError: An unknown or missing split, unreadable images, or splits that don't fit together.
        """
        if split not in SPLITS:
            raise UsageError(f"no split is called {split!r}; known: {', '.join(SPLITS)}")
        if split not in self._splits:
            images = self.source.split(cast(Split, split))
            if self.limit is not None:
                images = images.first(self.limit)
            images.check()
            if split != "train":
                self._check_fit(split, images)
            self._splits[split] = images
            for one in images.notes:
                say(f"{self.label} ({split}): {one}")
        return self._splits[split]

    def _check_fit(self, split: str, images: Images) -> None:
        """Compare a split with the training images."""
        if images.shape != self.shape:
            raise UsageError(
                f"{self.label}: the {split} images are {images.shape}, the training images {self.shape}: "
                f"make them one size and colour"
            )
        if images.labels is not None and self.classes and images.classes > self.classes:
            raise UsageError(
                f"{self.label}: the {split} split has {images.classes} classes, training {self.classes}: "
                f"number both alike"
            )

    def size(self, split: str) -> int:
        """Return the number of images of a split, after ``limit``."""
        return len(self.images(split))

    @override
    def setup(self, stage: str) -> None:
        """Open and check the training images, so that a broken one stops the run before it starts."""
        self.images("train")

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        """Return this process's endless loader of ``Batch``, from ``start_step`` on.

        Raises:
            UsageError: The batch size isn't a multiple of the number of processes.
        """
        rank, world = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        images = self.images("train")
        return DataLoader(
            TrainingSet(images, Stream(len(images), self.seed), self.flip),
            batch_sampler=GlobalBatches(self.batch_size, rank, world, lambda: self.start_step),
            collate_fn=_as_read,
            num_workers=self.num_workers,
        )

    @override
    def val_dataloader(self) -> DataLoader[int]:
        """Return one empty batch: what is evaluated is made, not read (see the evaluator)."""
        return DataLoader([0])  # type: ignore[arg-type]

    def batches(
        self, split: str, batch_size: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Walk through a split in fixed order, once, for reference statistics and scoring.

        Whole batches go to processes by their index, without padding: batch b to rank b % world. The last may be short.

        Args:
            split: ``train`` or ``test``.
            batch_size: Images a batch.
            rank: This process.
            world: Number of processes.

        Yields:
            The global batch index b; images (n, C, H, W) uint8, or float32 points of the source ``toy``; labels (n,)
            int64, or None.
        """
        images = self.images(split)
        for b in range(rank, -(-len(images) // batch_size), world):
            indices = torch.arange(b * batch_size, min((b + 1) * batch_size, len(images)))
            yield b, images.read(indices), None if images.labels is None else images.labels[indices]
