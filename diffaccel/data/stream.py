"""The training stream: an endless, deterministic order of images, and the loader that cuts it into batches.

Position p = 0, 1, 2, ... of the stream holds one image: epoch p // N walks through a permutation of its own, made from
(seed, epoch). Step k takes positions k G to (k + 1) G of it, G the global batch size, and each of W processes takes
its slice of those. So the batch of a step depends neither on where a run was resumed nor on W.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from diffaccel.data.source import Images
from diffaccel.errors import UsageError


class Batch(NamedTuple):
    """One process's share of a training step.

    Attributes:
        image: (B, C, H, W) float, images in [-1, 1]; toy points in their own units.
        condition: (B,) int64 class labels, or None.
        index: (B,) int64 positions in the training stream, the same for any number of processes.
    """

    image: Tensor
    condition: Tensor | None
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which a batch has no use for


def to_float(images: Tensor) -> Tensor:
    """Bring uint8 images to [-1, 1] as x / 127.5 - 1; what is float already (toy points) is left in its units."""
    if images.dtype == torch.uint8:
        return images.float().div_(127.5).sub_(1.0)
    return images


# Two epochs meet within a batch, and a batch larger than a tiny data set meets several.
@lru_cache(maxsize=8)
def _epoch(size: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Return an epoch's permutation (size,) int64 and its coin tosses (size,) bool."""
    rng = np.random.default_rng((seed, epoch))
    return torch.from_numpy(rng.permutation(size)), torch.from_numpy(rng.integers(2, size=size, dtype=bool))


@dataclass(frozen=True)
class Stream:
    """Stream positions -> images.

    Args:
        size: Number of images, N.
        seed: Seed of the order.
    """

    size: int
    seed: int = 0

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Look up positions.

        Args:
            positions: (B,) int64.

        Returns:
            Image indices (B,) int64 and one fair coin toss each (B,) bool, for augmentation.
        """
        indices, coins = torch.empty_like(positions), torch.empty_like(positions, dtype=torch.bool)
        epochs = positions // self.size
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            order, tosses = _epoch(self.size, self.seed, epoch)
            within = positions[here] % self.size
            indices[here], coins[here] = order[within], tosses[within]
        return indices, coins


class TrainingSet(Dataset[Batch]):
    """The stream as PyTorch's loader reads it: whole batches by position, without per-image Python work.

    Args:
        images: What to train on.
        stream: Their order.
        flip: Mirror every image with probability 1/2, decided by its stream position.
    """

    def __init__(self, images: Images, stream: Stream, flip: bool = False) -> None:
        self.images, self.stream, self.flip = images, stream, flip

    def __getitems__(self, positions: list[int]) -> Batch:
        """Return the batch at ``positions``."""
        index = torch.as_tensor(positions, dtype=torch.int64)
        where, coins = self.stream(index)
        images = self.images.read(where)
        if self.flip:
            images = torch.where(coins[:, None, None, None], images.flip(-1), images)
        labels = self.images.labels
        return Batch(to_float(images), None if labels is None else labels[where], index)


class GlobalBatches(Sampler[list[int]]):
    """The endless sequence of stream positions that one process trains on.

    Args:
        batch_size: Global batch size G.
        rank: This process, 0 <= rank < world.
        world: Number of processes W.
        start_step: Called when iteration starts, for the step to start from.

    Raises:
        UsageError: G isn't a multiple of W.
    """

    def __init__(self, batch_size: int, rank: int, world: int, start_step: Callable[[], int]) -> None:
        if batch_size % world:
            raise UsageError(
                f"batch_size={batch_size} is the global batch and can't be shared by {world} processes: "
                f"give a multiple of {world}"
            )
        self.batch_size, self.share, self.rank, self.start_step = batch_size, batch_size // world, rank, start_step

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step()
        while True:
            start = step * self.batch_size + self.rank * self.share
            yield list(range(start, start + self.share))
            step += 1
