"""From batches of images to the metrics of a point, summed over the processes."""

import hashlib
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from diffaccel.collective import all_gather, all_reduce
from diffaccel.evaluation.partial import Chunk
from diffaccel.metrics import (
    FrechetDistance,
    KernelDistance,
    KernelReference,
    Manifold,
    Memorisation,
    Neighbours,
    frechet_distance,
    manifold_scores,
    memorised,
)
from diffaccel.metrics.reference import Reference

BLOCKS = 10
"""Blocks of the jackknife."""
KEPT = 10_000
"""Images whose features are kept, the first ones: for what is not made of sums. It bounds memory."""


COMPARED = 5_000
"""Most images of a kind whose neighbourhoods are compared: time goes as their square."""


def digests(images: Tensor) -> Tensor:
    """SHA-256 of each image: (B, C, H, W) -> (B, 32) uint8."""
    found = [hashlib.sha256(image.numpy().tobytes()).digest() for image in images.cpu()]
    return torch.frombuffer(bytearray(b"".join(found)), dtype=torch.uint8).reshape(-1, 32)


def blocks_of(indices: Tensor, chains: int | None) -> Tensor:
    """Jackknife block of each image, (B,): images of one chain are correlated, so a block holds whole chains."""
    return (indices % chains if chains else indices) % BLOCKS


class Real:
    """The real images that points are compared with, and what of them is the same for every point.

    Args:
        reference: Training images.
        floor: Held-out images, for the value beside each metric; or None.
    """

    def __init__(self, reference: Reference, floor: Reference | None) -> None:
        self.reference, self.floor = reference, floor
        self.features = reference.features.float()
        self.held_out = floor.features.float() if floor else self.features[:0]
        self.kernel = KernelReference(self.features) if len(self.features) >= 2 else None
        self._manifolds: dict[int, tuple[Neighbours, Manifold | None]] = {}

    def manifold(self, m: int) -> tuple[Neighbours, Manifold | None]:
        """Neighbourhoods of m training images, and what as many held-out ones score among them."""
        if m not in self._manifolds:
            neighbours = Neighbours(spread(self.features, m))
            held_out = manifold_scores(spread(self.held_out, m), neighbours) if len(self.held_out) >= m else None
            self._manifolds[m] = neighbours, held_out
        return self._manifolds[m]


def spread(rows: Tensor, m: int) -> Tensor:
    """Take m rows, evenly spread over all."""
    return rows[torch.linspace(0, len(rows) - 1, m, dtype=torch.float64).round().long()]


class Scores:
    """What the images of a point add up to.

    Args:
        n: Number of images.
        dim: Number of features.
        shape: Of an image on the sample grid, (C, H, W), in the dtype ``dtype``.
        shown: Number of images on the grid.
        dtype: See ``shape``.
        real: Real images.
        chains: Number of chains, or None for independent images.
        device: Where sums are held.
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
        self.digests = torch.zeros(n, 32, dtype=torch.uint8)
        self.shown = torch.zeros(min(shown, n), *shape, dtype=dtype)
        self.evaluations: Counter[str] = Counter()
        self.burn_in: Counter[str] = Counter()
        self.flops: dict[str, float] = {}
        self.seconds = torch.zeros(2, dtype=torch.float64)
        self.images_by_rank: Counter[int] = Counter()
        self.traces: dict[int, list[Any]] = {}

    def add(self, chunk: Chunk) -> None:
        """Add a batch of this process."""
        indices, features = chunk.indices, chunk.features.to(self.device)
        blocks = blocks_of(indices, self.chains).to(self.device)
        for block in blocks.unique().tolist():
            self.frechet.update(features[blocks == block], block)
        kept = indices < len(self.features)
        self.features[indices[kept]] = chunk.features[kept]
        self.digests[indices] = chunk.digests
        self.shown[indices[indices < len(self.shown)]] = chunk.shown
        self.evaluations.update(chunk.evaluations)
        self.burn_in.update(chunk.burn_in)
        self.flops |= chunk.flops
        self.seconds += torch.tensor([chunk.sampling, chunk.scoring], dtype=torch.float64)
        self.images_by_rank[chunk.rank] += len(indices)
        if chunk.trace:
            self.traces.setdefault(int(indices[0]) % (self.chains or self.n), []).extend(chunk.trace)

    def reduce(self) -> None:
        """Sum over the processes; each of them calls this once. The moments' sums stay apart until they are asked."""
        # Every row was written by one process, so that the sum is the row itself.
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

    def metrics(self, name: str, all_of_them: bool) -> dict[str, float]:
        """Compute the metrics; collective, after :meth:`reduce`.

        Args:
            name: Of the Frechet distance.
            all_of_them: Whether to compare neighbourhoods too, which takes seconds.
        """
        frechet, floor = self.frechet.compute(), self.real.floor
        metrics = {name: float(frechet.fd), f"{name}_inf": float(frechet.fd_inf), f"{name}_se": float(frechet.se)}
        if floor is not None:
            metrics[f"{name}_floor"] = float(frechet_distance(floor.moments_of(self.n), self.real.reference.moments))
        if self.real.kernel is not None:
            kernel = KernelDistance(self.features.shape[1], self.real.kernel, sync_on_compute=False)
            kernel.update(self.features, 0)
            metrics["kid"] = float(kernel.compute())
        if all_of_them:
            metrics |= self._manifold()
        return metrics

    def _manifold(self) -> dict[str, float]:
        """Precision, recall, density, coverage; with the suffix ``_real`` those of held-out images in their place."""
        sizes = [COMPARED, len(self.features), len(self.real.features)]
        m = min(sizes + [len(self.real.held_out)] * (self.real.floor is not None))
        if m < 10:
            return {}
        neighbours, real = self.real.manifold(m)
        found = manifold_scores(self.features[:m], neighbours)._asdict()
        return found | ({f"{key}_real": value for key, value in real._asdict().items()} if real else {})

    def memorisation(self) -> Memorisation | None:
        """Look for copies of training images; None with too few images held out to say what is close."""
        if len(self.real.held_out) < 100:
            return None
        return memorised(self.features[:COMPARED], self.real.features, self.real.held_out[:COMPARED])
