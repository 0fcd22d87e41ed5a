"""Training stream: an endless, deterministic sequence of images, divided into batches.

Each position p = 0, 1, 2, ... of the stream is one of the N images. Epoch p // N is a permutation of the images, with
(seed, epoch) as its seed. The batch of step k consists of positions k G to (k + 1) G, where G is the global batch size,
and each of W ranks has a slice of it. So the batch of a step depends neither on W nor on where a run was resumed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from diffaccel.condition import Condition, join
from diffaccel.data.source import Images
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams


class Batch(NamedTuple):
    """A rank's part of the batch of a training step.

    Attributes:
        image: Images in [-1, 1], or toy points in their own units, (B, C, H, W) float.
        condition: Condition, with the class labels of data that have some, or None.
        index: Positions in the training stream, (B,) int64, independent of the number of ranks.
    """

    image: Tensor
    condition: Condition | None
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which is not used


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 images to [-1, 1] by x / 127.5 - 1; float data (toy points) are unchanged."""
    if images.dtype == torch.uint8:
        return images.float().div_(127.5).sub_(1.0)
    return images


def coins(index: Tensor, seed: int) -> Tensor:
    """Choose the images that are mirrored, with probability 1/2, by their stream positions: (B,) -> (B,) bool."""
    return NoiseStreams(seed, index, "mirror").uniform() < 0.5


def mirrored(images: Tensor, index: Tensor, seed: int) -> Tensor:
    """Mirror images (B, C, H, W) left to right with probability 1/2, by their positions (B,) in the training stream."""
    return torch.where(coins(index, seed)[:, None, None, None], images.flip(-1), images)


class Conditions(Protocol):
    """Conditions of the images of one split."""

    def __call__(
        self, images: Tensor, chosen: Tensor, noise: NoiseStreams, mirrored: Tensor | None = None, /
    ) -> Condition:
        """Make the conditions of a batch.

        Args:
            images: Images as they are stored, (B, C, H, W) uint8, after mirroring.
            chosen: Indices of the images in the split, (B,).
            noise: Noise streams of the batch, for random degradations.
            mirrored: Which images are mirrored, (B,) bool; None for none.
        """


def batch_of(
    images: Tensor, labels: Tensor | None, chosen: Tensor, index: Tensor, flip: bool, seed: int, make: Conditions | None
) -> tuple[Tensor, Condition | None]:
    """Mirror the images of a batch, and make their condition.

    Args:
        images: Images as they are stored, (B, C, H, W).
        labels: Their class labels, (B,), or None.
        chosen: Their indices in the split, (B,).
        index: Positions in the training stream, (B,).
        flip: Whether to mirror images with probability 1/2.
        seed: Seed of the training stream.
        make: Conditions of the split, in addition to labels; None for none.

    Returns:
        Images as they are stored, mirrored, and their condition, or None.
    """
    if flip:
        images = mirrored(images, index, seed)
    own = None if labels is None else Condition(labels=labels)
    if make is None:
        return images, own
    noise = NoiseStreams(seed, index, "condition")
    return images, join(own, make(images, chosen, noise, coins(index, seed) if flip else None))


# A batch may span two epochs, and more if the data set is smaller than a batch.
@lru_cache(maxsize=8)
def _epoch(size: int, seed: int, epoch: int) -> Tensor:
    """Permutation of an epoch, (size,) int64."""
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(size))


@dataclass(frozen=True)
class Stream:
    """Map from stream positions to images.

    Args:
        size: Number of images, N.
        seed: Seed of the order.
    """

    size: int
    seed: int = 0

    def __call__(self, positions: Tensor) -> Tensor:
        """Look up the images at stream positions.

        Args:
            positions: Stream positions, (B,) int64.

        Returns:
            Image indices, (B,) int64.
        """
        indices = torch.empty_like(positions)
        epochs = positions // self.size
        for epoch in epochs.unique().tolist():
            inside = epochs == epoch
            indices[inside] = _epoch(self.size, self.seed, epoch)[positions[inside] % self.size]
        return indices


class TrainingSet(Dataset[Batch]):
    """Training stream as a PyTorch data set that reads whole batches, without Python work per image.

    Args:
        images: Training images.
        stream: Order of the images.
        flip: Whether to mirror images with probability 1/2, as determined by the stream position.
        make: Conditions of the images, in addition to labels; None for none.
    """

    def __init__(self, images: Images, stream: Stream, flip: bool = False, make: Conditions | None = None) -> None:
        self.images, self.stream, self.flip, self.make = images, stream, flip, make

    def __getitems__(self, positions: list[int]) -> Batch:
        """Return the batch at ``positions``."""
        index = torch.as_tensor(positions, dtype=torch.int64)
        chosen = self.stream(index)
        images = self.images.read(chosen)
        labels = None if self.images.labels is None else self.images.labels[chosen]
        images, condition = batch_of(images, labels, chosen, index, self.flip, self.stream.seed, self.make)
        return Batch(to_float(images), condition, index)


class GlobalBatches(Sampler[list[int]]):
    """Endless sequence of the batches of a rank, as stream positions.

    Args:
        batch_size: Global batch size G.
        rank: Rank of this process, 0 <= rank < world.
        world: Number of ranks W.
        start: Function that returns the first position of the stream, called when iteration starts.

    Raises:
        UsageError: G is not a multiple of W.
    """

    def __init__(self, batch_size: int, rank: int, world: int, start: Callable[[], int]) -> None:
        if batch_size % world:
            raise UsageError(
                f"batch_size={batch_size} is the global batch size and can't be divided among {world} processes: "
                f"set a multiple of {world}"
            )
        self.batch_size, self.share, self.rank, self.start = batch_size, batch_size // world, rank, start

    def __iter__(self) -> Iterator[list[int]]:
        start = self.start() + self.rank * self.share
        while True:
            yield list(range(start, start + self.share))
            start += self.batch_size
