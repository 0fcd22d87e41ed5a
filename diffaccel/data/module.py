"""Data module: a source, its training stream, and its images in a fixed order for statistics."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from diffaccel.data.conditions import Conditioner
from diffaccel.data.resident import Chosen, ChosenSet, ResidentImages, stays_resident
from diffaccel.data.source import SPLITS, Images, MissingSplit, Source, Split, build_source, random_order
from diffaccel.data.stream import Batch, GlobalBatches, Stream, TrainingSet
from diffaccel.errors import UsageError
from diffaccel.text.terminal import say


def as_read(batch: Any) -> Any:
    """Return a batch unchanged, because the training set reads whole batches."""
    return batch


def check_labels(data: "DataModule", classes: int) -> None:
    """Check that the labels of the training images fit the number of classes of a network.

    More classes in the network than in the data are allowed, with a note, because a subset of the data may lack the
    last classes.

    Args:
        data: Data module.
        classes: Number of classes of the network; 0 for an unconditional network, which ignores labels.

    Raises:
        UsageError: The network is class-conditional, and the data have no labels or more classes than the network.
    """
    if not classes:
        return
    if data.images("train").labels is None:
        raise UsageError(
            f"{data.label}: the images have no labels, the network has {classes} classes: add labels, or set "
            f"network.classes=0"
        )
    if data.classes > classes:
        raise UsageError(
            f"{data.label}: the labels have {data.classes} classes, the network {classes}: set "
            f"network.classes={data.classes}, or use other data"
        )
    if data.classes < classes:
        say(f"{data.label}: the labels have {data.classes} classes, the network {classes}: the others are untrained")


def _resident(value: object) -> bool | None:
    """Convert the key ``resident`` to a choice; None for ``auto``.

    Raises:
        UsageError: The value is invalid.
    """
    known = {None: None, "auto": None, True: True, False: False, "true": True, "false": False}
    if not isinstance(value, str | bool | None) or value not in known:
        raise UsageError(f"data.resident={value}: set auto, true or false")
    return known[value]


class DataModule(LightningDataModule):
    """Data set for training and scoring.

    The training loader is endless: the method ends the training. Use ``Trainer(use_distributed_sampler=False)``.

    Args:
        source: Name and keys of a source, ``{"name": ..., key: value, ...}``; see ``SOURCES``. With ``resident: true``
            all training images stay on the device, as uint8, and batches are gathered there; by default, ``auto``,
            images in memory do so on a GPU, if they take at most a quarter of its free memory. Batches are the same.
        batch_size: Global batch size; each of W ranks has 1 / W of it.
        seed: Seed of the training order and of the flips.
        limit: Maximum number of images of each split, always the same random ones; None for all. The number of classes
            is that of the whole training split.
        flip: Whether to mirror training images left to right with probability 1/2.
        num_workers: Number of worker processes that read training images; 0 suits data in memory. Ignored for resident
            images.
        conditioner: Part that makes the conditions of the images, in addition to labels; None for none.

    Attributes:
        start: Position in the training stream at which iterations over the training loader start; set this to resume.
        mirrors: Whether the mirror image of a sample is a sample of the mirrored image.

    Raises:
        UsageError: An unknown source or key, or a number out of range.
    """

    mirrors: ClassVar[bool] = True

    def __init__(
        self,
        source: Mapping[str, Any],
        batch_size: int = 128,
        seed: int = 0,
        limit: int | None = None,
        flip: bool = False,
        num_workers: int = 0,
        conditioner: Conditioner | None = None,
    ) -> None:
        super().__init__()
        for key, value, least in (
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("limit", limit, 1),
            ("num_workers", num_workers, 0),
        ):
            if value is not None and value < least:
                raise UsageError(f"data.{key}={value}: set {least} or more")
        self.source: Source = build_source(source)
        self.source_name = str(source["name"])
        self.batch_size, self.seed, self.limit = batch_size, seed, limit
        self.flip, self.num_workers, self.conditioner = flip, num_workers, conditioner
        self.resident = _resident(source.get("resident"))
        if self.resident is None and conditioner is not None and not conditioner.on_device:
            self.resident = False
        elif self.resident and conditioner is not None and not conditioner.on_device:
            raise UsageError("data.resident=true: the conditions are read from files: set data.resident=auto")
        self.start = 0
        self._splits: dict[str, Images] = {}
        self._on_device: ResidentImages | None = None

    @property
    @override
    def name(self) -> str:  # type: ignore[override]
        """Registered name of the source."""
        return self.source_name

    @property
    def label(self) -> str:
        """Provenance of the data, for tables and plots."""
        return self.source.label

    @property
    def shape(self) -> tuple[int, int, int]:
        """Image shape (C, H, W)."""
        return self.images("train").shape

    @property
    def classes(self) -> int:
        """Number of classes; 0 for data without labels."""
        return self.images("train").classes

    def images(self, split: str) -> Images:
        """Open, check and cache a split, and print notes on skipped files and changed images.

        Raises:
            UsageError: The split is unknown or missing, has unreadable images, or doesn't fit the training split.
        """
        if split not in SPLITS:
            raise UsageError(f"no split is called {split!r}; known: {', '.join(SPLITS)}")
        if split not in self._splits:
            images = self.source.split(cast(Split, split))
            if self.limit is not None:
                images = images.some(self.limit)
            images.check()
            if split != "train":
                self._check_fit(split, images)
            self._splits[split] = images
            for note in images.notes:
                say(f"{self.label} ({split}): {note}")
        return self._splits[split]

    def _check_fit(self, split: str, images: Images) -> None:
        """Check that shape and classes of a split fit the training split."""
        if images.shape != self.shape:
            raise UsageError(
                f"{self.label}: the {split} images are {images.shape}, the training images {self.shape}: "
                f"convert both to one size and number of channels"
            )
        if images.labels is not None and self.classes and images.classes > self.classes:
            raise UsageError(
                f"{self.label}: the {split} split has {images.classes} classes, training {self.classes}: "
                f"use the same class numbers in both"
            )

    def has_split(self, split: str) -> bool:
        """Whether there is such a split; opens it."""
        try:
            return bool(self.images(split))
        except MissingSplit:
            return False

    def identify(self) -> dict[str, Any]:
        """Return number and hash of the training images and their labels, by which a resumed fit recognises them."""
        images = self.images("train")
        digest = hashlib.sha256(images.identity().encode())
        if images.labels is not None:
            digest.update(images.labels.numpy().tobytes())
        return {"n": len(images), "sha256": digest.hexdigest()[:16]}

    def size(self, split: str) -> int:
        """Number of images of a split, at most ``limit``."""
        return len(self.images(split))

    @override
    def setup(self, stage: str) -> None:
        """Open and check training images and conditions, so that damaged files are an error before the run starts."""
        images = self.images("train")
        if self.conditioner is not None:
            self.conditioner.open("train", images)
            self.conditioner.prepare()

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        """Endless loader of this rank's batches, from ``start`` on; with resident images, of what they consist of.

        Raises:
            UsageError: The batch size is not a multiple of the number of ranks, or images don't fit on the device.
        """
        rank, world, device = 0, 1, torch.device("cpu")
        if self.trainer is not None:
            rank, world = self.trainer.global_rank, self.trainer.world_size
            device = self.trainer.strategy.root_device
        images = self.images("train")
        batches = GlobalBatches(self.batch_size, rank, world, lambda: self.start)
        stream = Stream(len(images), self.seed)
        make = None if self.conditioner is None else self.conditioner.open("train", images)
        self._on_device = None  # frees that of an earlier loader
        if stays_resident(images, device, self.resident):
            self._on_device = ResidentImages(images, device, self.flip, self.seed, make=make)
        resident = self._on_device is not None
        chosen: Dataset[Any] = ChosenSet(stream) if resident else TrainingSet(images, stream, self.flip, make)
        return DataLoader(
            chosen,
            batch_sampler=batches,
            collate_fn=as_read,
            num_workers=0 if resident else self.num_workers,
            pin_memory=device.type == "cuda",  # for copies to the device that don't wait for it
        )

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Gather a batch of resident images."""
        if not isinstance(batch, Chosen):
            return batch
        assert self._on_device is not None
        gathered = self._on_device.gather(batch)
        return gathered if self.trainer is None else self.trainer.precision_plugin.convert_input(gathered)

    @override
    def val_dataloader(self) -> DataLoader[int]:
        """Loader of a single dummy batch: validation evaluates generated images (see the evaluator)."""
        return DataLoader([0])  # type: ignore[arg-type]

    def order(self, split: str, n: int | None = None) -> Tensor:
        """Return the images of a split in the order of :meth:`batches`."""
        found = len(self.images(split))
        return torch.arange(found) if n is None else random_order(found)[:n]

    def batches(
        self, split: str, batch_size: int, rank: int = 0, world: int = 1, n: int | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Iterate once over a split in a fixed order, for reference statistics and scoring.

        Batches are assigned to ranks without padding, batch b to rank b % world. The last batch may be shorter.

        Args:
            split: ``train`` or ``test``.
            batch_size: Images per batch.
            rank: Rank of this process.
            world: Number of ranks.
            n: Maximum number of images, which are the first of a random order; None for all, in the order of the files.

        Yields:
            The global batch index b; images (n, C, H, W) uint8, or float32 points of the source ``toy``; labels (n,)
            int64, or None.
        """
        images = self.images(split)
        order = self.order(split, n)
        for b in range(rank, -(-len(order) // batch_size), world):
            indices = order[b * batch_size : (b + 1) * batch_size]
            yield b, images.read(indices), None if images.labels is None else images.labels[indices]
