"""Training images that stay on the device, from which batches are gathered there."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffaccel.data.source import Images
from diffaccel.data.stream import Batch, Conditions, Stream, batch_of, to_float
from diffaccel.errors import UsageError

SHARE = 0.25
"""Largest part of a GPU's free memory that images take unless ``data.resident`` is true."""


class Chosen(NamedTuple):
    """Images of a batch that is gathered later.

    Attributes:
        image: Numbers of the images in the split, (B,) int64.
        index: Positions in the training stream, (B,) int64.
    """

    image: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which is not used


class ChosenSet(Dataset[Chosen]):
    """Training stream as a PyTorch data set that chooses whole batches and reads no images.

    Args:
        stream: Order of the images.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __getitems__(self, positions: list[int]) -> Chosen:
        """Choose the batch at ``positions``."""
        index = torch.as_tensor(positions, dtype=torch.int64)
        return Chosen(self.stream(index), index)


class ResidentImages:
    """All images of a split on a device, as they are stored: uint8, or float for points.

    Args:
        images: Images.
        device: Device.
        flip: Whether to mirror images with probability 1/2, as determined by the stream position.
        seed: Seed of the training stream.
        chunk: Images read at once.
        make: Conditions that depend on the images alone; None for none.
    """

    def __init__(
        self,
        images: Images,
        device: torch.device,
        flip: bool = False,
        seed: int = 0,
        chunk: int = 4096,
        make: Conditions | None = None,
    ) -> None:
        n, self.flip, self.seed, self.make = len(images), flip, seed, make
        first = images.read(torch.arange(min(1, n)))
        self.images = torch.empty(n, *images.shape, dtype=first.dtype, device=device)
        for start in range(0, n, chunk):
            self.images[start : start + chunk] = images.read(torch.arange(start, min(start + chunk, n)))
        self.labels = None if images.labels is None else images.labels.to(device)
        # A GPU divides by a number by multiplying by its reciprocal, which rounds differently. So the values are
        # computed on the CPU, and a batch is the same, bit for bit, as one that is read there.
        self.values = to_float(torch.arange(256, dtype=torch.uint8)).to(device)

    def gather(self, chosen: Chosen) -> Batch:
        """Gather a batch whose numbers are on the device."""
        images = torch.index_select(self.images, 0, chosen.image)
        labels = None if self.labels is None else torch.index_select(self.labels, 0, chosen.image)
        images, condition = batch_of(images, labels, chosen.image, chosen.index, self.flip, self.seed, self.make)
        if images.dtype == torch.uint8:
            images = self.values[images.int()]
        return Batch(images, condition, chosen.index)


def stays_resident(images: Images, device: torch.device, wanted: bool | None) -> bool:
    """Whether training images are kept on the device.

    Args:
        images: Training images.
        device: Device of the training.
        wanted: The configured choice; None for images in memory on a GPU with enough free memory.

    Raises:
        UsageError: ``wanted`` is true, and the images are larger than the free memory of the device.
    """
    if wanted is False or (wanted is None and (device.type != "cuda" or not images.in_memory)):
        return False
    size, free = size_in_bytes(images), free_memory(device)
    if wanted and size > free:
        raise UsageError(
            f"data.resident=true: the images take {size / 2**30:.1f} GiB, but {device} has {free / 2**30:.1f} GiB "
            "of free memory: set data.resident=false, or limit= to use fewer images"
        )
    return size <= (free if wanted else SHARE * free)


def size_in_bytes(images: Images) -> int:
    """Return the size of all images, as they are stored; reads one image."""
    return len(images) * math.prod(images.shape) * images.read(torch.zeros(1, dtype=torch.int64)).element_size()


def free_memory(device: torch.device) -> float:
    """Return the number of free bytes on a GPU; infinity for the CPU, where images are in memory already."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
