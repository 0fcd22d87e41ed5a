"""Sums over the images of a point, on all ranks, from which its metrics are computed."""

import hashlib
from collections import Counter
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from diffaccel.collective import all_gather, all_reduce
from diffaccel.deferred import Checks, runs_ahead, to_device
from diffaccel.evaluation.partial import Chunk
from diffaccel.metrics import FrechetDistance
from diffaccel.metrics.base import Made, Real

BLOCKS = 10
"""Number of blocks of the jackknife."""
KEPT = 10_000
"""Number of first images whose features are kept, for metrics that are not computed from sums; bounds memory."""


def digests(images: Tensor) -> Tensor:
    """Compute the SHA-256 of each image, (B, C, H, W) -> (B, 32) uint8."""
    found = [hashlib.sha256(image.numpy().tobytes()).digest() for image in images.cpu()]
    return torch.frombuffer(bytearray(b"".join(found)), dtype=torch.uint8).reshape(-1, 32)


def blocks_of(indices: Tensor, chains: int | None) -> Tensor:
    """Return the jackknife block of each image, (B,); blocks contain whole chains, whose images are correlated."""
    return (indices % chains if chains else indices) % BLOCKS


class Scores:
    """Sums over the images of a point.

    Args:
        n: Number of images.
        dim: Number of features.
        shape: Shape of an image on the sample grid, (C, H, W).
        shown: Number of images on the sample grid.
        dtype: Data type of an image on the sample grid.
        real: Statistics of real images.
        chains: Number of chains; None for independent images.
        device: Device of the sums.
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
    ) -> None:
        self.n, self.real, self.chains, self.device = n, real, chains, device
        self.frechet = FrechetDistance(dim, real.reference.moments, blocks=BLOCKS).to(device)
        self.features = torch.zeros(min(n, KEPT), dim)
        self.checks = Checks()
        self.digests = torch.zeros(n, 32, dtype=torch.uint8)
        self.shown = torch.zeros(min(shown, n), *shape, dtype=dtype)
        self.evaluations: Counter[str] = Counter()
        self.burn_in: Counter[str] = Counter()
        self.flops: dict[str, float] = {}
        self.seconds = torch.zeros(3, dtype=torch.float64)
        self.images_by_rank: Counter[int] = Counter()
        self.traces: dict[int, list[Any]] = {}

    def add(self, chunk: Chunk) -> None:
        """Add a batch of this rank."""
        indices, features = chunk.indices, to_device(chunk.features, self.device)
        blocks = blocks_of(indices, self.chains)
        for block in blocks.unique().tolist():
            chosen = to_device((blocks == block).nonzero()[:, 0], self.device)
            with self.checks.collected() if runs_ahead(self.device) else nullcontext():
                self.frechet.update(features[chosen], block)
        kept = indices < len(self.features)
        self.features[indices[kept]] = chunk.features[kept]
        self.digests[indices] = chunk.digests
        self.shown[indices[indices < len(self.shown)]] = chunk.shown
        self.evaluations.update(chunk.evaluations)
        self.burn_in.update(chunk.burn_in)
        self.flops |= chunk.flops
        self.seconds += torch.tensor([chunk.sampling, chunk.scoring, chunk.warm_up], dtype=torch.float64)
        self.images_by_rank[chunk.rank] += len(indices)
        if chunk.trace:
            self.traces.setdefault(int(indices[0]) % (self.chains or self.n), []).extend(chunk.trace)

    def reduce(self) -> None:
        """Sum over all ranks, once; collective. The sums of the moments are reduced when they are used."""
        self.checks.settle()
        # Every row was written by one rank, so that the sum equals the row.
        self.features = all_reduce(self.features.to(self.device)).cpu()
        self.digests = all_reduce(self.digests.to(self.device, torch.int32)).to("cpu", torch.uint8)
        self.shown = all_reduce(self.shown.to(self.device, torch.float32)).to("cpu", self.shown.dtype)
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

    def made(self, distance: str) -> Made:
        """Return the inputs of the metrics, after :meth:`reduce`; ``distance`` is the key of the Frechet distance."""
        return Made(self.n, self.features, self.frechet, distance)
