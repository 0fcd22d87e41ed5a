"""Data module whose training batches are latents."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from diffaccel.condition import Condition, join
from diffaccel.data.module import DataModule, as_read
from diffaccel.data.source import Images
from diffaccel.data.stream import Batch, Conditions, GlobalBatches, Stream, coins, to_float
from diffaccel.errors import UsageError
from diffaccel.latents.base import Latents
from diffaccel.latents.cache import EncodedImages, LatentCache
from diffaccel.noise import NoiseStreams

POSTERIOR = "posterior"
"""Purpose of the noise streams of draws from the encoder's posterior."""


class LatentSet(Dataset[Batch]):
    """Training stream of latents, in whole batches; see :class:`~diffaccel.data.stream.TrainingSet`.

    The draw from an image's posterior follows from the position in the stream, so that it is a new one in each epoch.

    Args:
        encoded: Encoded training images.
        images: Training images, for their labels.
        stream: Order of the images.
        flip: Whether images are mirrored with probability 1/2.
        make: Conditions of the images, in addition to labels; None for none.
    """

    def __init__(
        self, encoded: EncodedImages, images: Images, stream: Stream, flip: bool, make: Conditions | None = None
    ) -> None:
        self.encoded, self.images, self.stream, self.flip, self.make = encoded, images, stream, flip, make

    def __getitems__(self, positions: list[int]) -> Batch:
        """Return the batch at ``positions``."""
        index = torch.as_tensor(positions, dtype=torch.int64)
        chosen, seed = self.stream(index), self.stream.seed
        mirrored = coins(index, seed) if self.flip else None
        posterior = self.encoded.read(chosen, mirrored)
        latents = posterior.draw(NoiseStreams(seed, index, POSTERIOR).normal(posterior.mean))
        condition = None if self.images.labels is None else Condition(labels=self.images.labels[chosen])
        if self.make is not None:
            made = self.make(latents, chosen, NoiseStreams(seed, index, "condition"), mirrored)
            condition = join(condition, made)
        return Batch(latents, condition, index)


class LatentData(DataModule):
    """Data set whose training images are encoded once, and whose batches are latents.

    Args:
        latents: Latents of a frozen auto-encoder.
        folder: Folder of the encoded images.
        sample: Whether latents are drawn from the encoder's posterior, and not its means.
        device: Device of the auto-encoder.
        options: Arguments of :class:`~diffaccel.data.module.DataModule`.

    Raises:
        UsageError: Images are to stay on the device, or see :class:`~diffaccel.data.module.DataModule`.
    """

    mirrors = False

    def __init__(
        self, latents: Latents, folder: Path, sample: bool, device: torch.device | str = "cpu", **options: Any
    ) -> None:
        super().__init__(**options)
        if self.resident:
            raise UsageError("data.resident=true: latents are read from files: set data.resident=auto")
        self.latents, self.folder, self.sample, self.device = latents, folder, sample, torch.device(device)
        self._encoded: EncodedImages | None = None

    def prepare(self) -> EncodedImages:
        """Encode the training images that are not encoded yet, once.

        Raises:
            UsageError: The images don't have the auto-encoder's shape, or the latents can't be written.
        """
        if self._encoded is None:
            images = self.images("train")
            if images.shape != self.latents.image_shape:
                raise UsageError(
                    f"{self.label}: images have shape {images.shape}, but the auto-encoder encodes "
                    f"{self.latents.image_shape}: use other data, or another auto-encoder"
                )
            cache = LatentCache(self.latents, images, self.folder, self.flip, self.sample)
            self._encoded = cache.open(self.device)
        return self._encoded

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        """Endless loader of this rank's batches, from ``start`` on."""
        rank, world = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        images = self.images("train")
        make = None if self.conditioner is None else self.conditioner.open("train", images)
        chosen = LatentSet(self.prepare(), images, Stream(len(images), self.seed), self.flip, make)
        return DataLoader(
            chosen,
            batch_sampler=GlobalBatches(self.batch_size, rank, world, lambda: self.start),
            collate_fn=as_read,
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
        )

    @override
    def batches(
        self, split: str, batch_size: int, rank: int = 0, world: int = 1, n: int | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Iterate once over the latents of a split in a fixed order; see the base class.

        An image has one draw from its posterior, and is mirrored with probability 1/2 if ``flip`` is set and the split
        is ``train``. Images of the other split are encoded in each call.

        Yields:
            The global batch index b; latents (n, c, h, w) float32; labels (n,) int64, or None.
        """
        encoded = self.prepare() if split == "train" else None
        order = self.order(split, n)
        for b, images, labels in super().batches(split, batch_size, rank, world, n):
            index = order[b * batch_size : (b + 1) * batch_size]
            if encoded is None:
                found = self.latents.to(self.device).encode(to_float(images).to(self.device))
                posterior = type(found)(*(part.cpu() for part in found))
            else:
                posterior = encoded.read(index, coins(index, self.seed) if self.flip else None)
            z = NoiseStreams(self.seed, index, f"{POSTERIOR} of {split}").normal(posterior.mean)
            yield b, posterior.draw(z) if self.sample else posterior.mean, labels
