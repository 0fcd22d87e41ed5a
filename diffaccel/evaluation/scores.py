"""Sums over the images of a point, on all ranks, from which its metrics are computed."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from diffaccel.collective import all_gather, all_reduce
from diffaccel.deferred import Checks, runs_ahead, to_device
from diffaccel.evaluation.partial import Chunk
from diffaccel.jackknife import BLOCKS
from diffaccel.metrics import FrechetDistance
from diffaccel.metrics.base import Made, Real

KEPT = 10_000
"""Number of first images whose features are kept, for metrics that are not computed from sums; bounds memory."""


def digests(images: Tensor) -> Tensor:
    """Compute the SHA-256 of each image, (B, C, H, W) -> (B, 32) uint8."""
    found = [hashlib.sha256(image.numpy().tobytes()).digest() for image in images.cpu()]
    return torch.frombuffer(bytearray(b"".join(found)), dtype=torch.uint8).reshape(-1, 32)


def blocks_of(indices: Tensor, chains: int | None, samples: int = 1) -> Tensor:
    """Return the jackknife block of each image, (B,).

    Blocks contain whole chains, and all samples of a condition, because these images depend on one another.

    Args:
        indices: Indices of the images, (B,).
        chains: Number of chains, image i by chain i modulo this number; None for independent images.
        samples: Number of images in succession that share a condition.
    """
    return (indices % chains if chains else indices // samples) % BLOCKS


class FeatureSums:
    """Sums over the features of a point's images in one extractor, and the features of its first images.

    Args:
        n: Number of images.
        dim: Number of features.
        real: Statistics of real images.
        chains: Number of chains; None for independent images.
        device: Device of the sums.
        samples: Number of images in succession that share a condition.
    """

    def __init__(
        self, n: int, dim: int, real: Real, chains: int | None, device: torch.device, samples: int = 1
    ) -> None:
        self.n, self.chains, self.device, self.samples = n, chains, device, samples
        self.frechet = FrechetDistance(dim, real.reference.moments, blocks=BLOCKS).to(device)
        self.features = torch.zeros(min(n, KEPT), dim)
        self.checks = Checks()

    def add(self, indices: Tensor, features: Tensor) -> None:
        """Add the features (b, dim) of a batch of this rank, by the indices of its images, (b,)."""
        own, blocks = to_device(features, self.device), blocks_of(indices, self.chains, self.samples)
        for block in blocks.unique().tolist():
            chosen = to_device((blocks == block).nonzero()[:, 0], self.device)
            with self.checks.collected() if runs_ahead(self.device) else nullcontext():
                self.frechet.update(own[chosen], block)
        kept = indices < len(self.features)
        self.features[indices[kept]] = features[kept]

    def reduce(self) -> None:
        """Gather the features of all ranks, once; collective."""
        self.checks.settle()
        # Every row was written by one rank, so that the sum equals the row.
        self.features = all_reduce(self.features.to(self.device)).cpu()

    def made(self, distance: str, labels: Tensor | None = None) -> Made:
        """Return the inputs of the metrics, after :meth:`reduce`.

        Args:
            distance: Key of the Frechet distance.
            labels: Classes of the images, (n,) int64; None for no classes.
        """
        own = len(self.features)
        block = blocks_of(torch.arange(own), self.chains, self.samples)
        labels = None if labels is None else labels[:own]
        return Made(self.n, self.features, self.frechet, distance, block, self.chains, labels)


class Scores:
    """Sums over the images of a point.

    Args:
        n: Number of images.
        dim: Number of features of the first extractor.
        shape: Shape of an image on the sample grid, (C, H, W).
        shown: Number of images on the sample grid.
        dtype: Data type of an image on the sample grid.
        real: Statistics of real images in the features of the first extractor.
        chains: Number of chains; None for independent images.
        device: Device of the sums.
        others: Statistics of real images in the features of further extractors, by the hash of the extractor.
        labels: Classes that the images were made for, (n,) int64, equal on all ranks; None for no classes.
        samples: Number of images in succession that share a condition.
    """

    def __init__(
        self,
        n: int,
        dim: int,
        shape: tuple[int, ...],
        shown: int,
        dtype: torch.dtype,
        real: Real,
        chains: int | None,
        device: torch.device,
        others: Mapping[str, Real] = MappingProxyType({}),
        labels: Tensor | None = None,
        samples: int = 1,
    ) -> None:
        self.n, self.real, self.chains, self.device, self.labels = n, real, chains, device, labels
        self.first = FeatureSums(n, dim, real, chains, device, samples)
        self.others = {
            sha256: FeatureSums(n, own.reference.moments.dim, own, chains, device, samples)
            for sha256, own in others.items()
        }
        self.digests = torch.zeros(n, 32, dtype=torch.uint8)
        self.shown = torch.zeros(min(shown, n), *shape, dtype=dtype)
        self.evaluations: Counter[str] = Counter()
        self.burn_in: Counter[str] = Counter()
        self.flops: dict[str, float] = {}
        self.seconds = torch.zeros(4, dtype=torch.float64)  # sampling, scoring, warm-up, decoding
        self.decoding_flops = 0.0
        self.images_by_rank: Counter[int] = Counter()
        self.traces: dict[int, list[Any]] = {}

    def add(self, chunk: Chunk) -> None:
        """Add a batch of this rank."""
        indices = chunk.indices
        self.first.add(indices, chunk.features)
        for sha256, sums in self.others.items():
            sums.add(indices, chunk.others[sha256])
        self.digests[indices] = chunk.digests
        self.shown[indices[indices < len(self.shown)]] = chunk.shown
        self.evaluations.update(chunk.evaluations)
        self.burn_in.update(chunk.burn_in)
        self.flops |= chunk.flops
        spent = [chunk.sampling, chunk.scoring, chunk.warm_up, chunk.decoding]
        self.seconds += torch.tensor(spent, dtype=torch.float64)
        self.decoding_flops = max(self.decoding_flops, chunk.decoding_flops)
        self.images_by_rank[chunk.rank] += len(indices)
        if chunk.trace:
            self.traces.setdefault(int(indices[0]) % (self.chains or self.n), []).extend(chunk.trace)

    def reduce(self) -> None:
        """Sum over all ranks, once; collective. The sums of the moments are reduced when they are used."""
        for sums in (self.first, *self.others.values()):
            sums.reduce()
        # Every row was written by one rank, so that the sum equals the row.
        self.digests = all_reduce(self.digests.to(self.device, torch.int32)).to("cpu", torch.uint8)
        self.shown = all_reduce(self.shown.to(self.device, torch.float32)).to("cpu", self.shown.dtype)
        self.decoding_flops = max(all_gather(self.decoding_flops))
        own = (self.evaluations, self.burn_in, self.flops, self.seconds, self.images_by_rank, self.traces)
        self.evaluations, self.burn_in, self.flops, self.images_by_rank = Counter(), Counter(), {}, Counter()
        self.seconds, self.traces = torch.zeros_like(self.seconds), {}
        for evaluations, burn_in, flops, seconds, images, traces in all_gather(own):
            self.evaluations.update(evaluations)
            self.burn_in.update(burn_in)
            self.flops |= flops
            self.seconds += seconds
            self.images_by_rank.update(images)
            self.traces |= traces

    @property
    def features(self) -> list[Tensor]:
        """Features of the first images by each extractor, (min(n, 10,000), dim) each, after :meth:`reduce`."""
        return [sums.features for sums in (self.first, *self.others.values())]

    def made(self, distance: str, number: int = 0) -> Made:
        """Return the inputs of the metrics, after :meth:`reduce`.

        Args:
            distance: Key of the Frechet distance.
            number: Index of the extractor.
        """
        return [self.first, *self.others.values()][number].made(distance, self.labels)
