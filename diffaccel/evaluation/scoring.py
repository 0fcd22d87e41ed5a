"""Scores of images that exist already, and of statistics of images, with the metrics of a bench."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.collective import World, failing_together
from diffaccel.data import Images
from diffaccel.data.given import batches_of, read
from diffaccel.deferred import Stopwatch
from diffaccel.evaluation.partial import Chunk, Partial
from diffaccel.evaluation.scores import Real, Scores, digests
from diffaccel.features.extractors import Extractor
from diffaccel.metrics import FrechetDistance, Moments
from diffaccel.metrics.base import Made, Measured, Metric, measure
from diffaccel.text.terminal import track

READ = 500
"""Number of images per batch that are hashed."""


class Named(Protocol):
    """Identity of an extractor, which for statistics of other programs has no hash."""

    @property
    def name(self) -> str:
        """Name in tables and metric keys."""

    @property
    def sha256(self) -> str | None:
        """Hash of all that determines the features; None if it is unknown."""

    @property
    def dim(self) -> int:
        """Number of features."""


def hash_each(images: Images) -> Tensor:
    """Compute the SHA-256 of each image, (N, 32) uint8."""
    return torch.cat([digests(read(images, indices)) for indices in batches_of(len(images), READ)])


def hash_all(found: Tensor) -> str:
    """Hash the hashes of images in order: ``images_sha256`` of a point."""
    return hashlib.sha256(found.numpy().tobytes()).hexdigest()


def score_images(
    images: Images,
    order: Tensor,
    hashes: Tensor,
    extractor: Extractor,
    real: Real,
    batch_size: int,
    chains: int | None = None,
    samples: int = 1,
    shown: int = 0,
    partial: Partial | None = None,
    world: World = World(),  # noqa: B008 (frozen)
) -> Scores:
    """Sum the features of images, as a bench does for the images that it samples; collective.

    Args:
        images: Images.
        order: Indices of the images to be scored, (n,) int64, in the order in which they are scored.
        hashes: SHA-256 of each of these, (n, 32).
        extractor: Feature extractor, on the device of the scoring.
        real: Statistics of real images.
        batch_size: Number of images per batch.
        chains: Number of chains that sampled the images; None for independent images.
        samples: Number of images in succession that share a condition.
        shown: Number of images on the sample grid.
        partial: Finished batches on disk; None to keep none.
        world: Rank and number of ranks.
    """
    n, partial = len(hashes), partial or Partial(None)
    labels = None if images.labels is None else images.labels[order]
    scores = Scores(
        n, extractor.dim, images.shape, shown, torch.uint8, real, chains, extractor.device, labels=labels,
        samples=samples,
    )  # fmt: skip
    batches = world.share(batches_of(n, batch_size))
    with failing_together():
        for indices in track(batches, "scoring", len(batches), shown=world.first):
            if partial.done([indices], chained=False)[0]:
                chunk = partial.read(indices)
            else:
                chunk = _chunk(images, order, indices, hashes, extractor, shown, world.rank)
                partial.save([indices], 0, chunk, None)
            scores.add(chunk)
    scores.reduce()
    return scores


def _chunk(
    images: Images, order: Tensor, indices: range, hashes: Tensor, extractor: Extractor, shown: int, rank: int
) -> Chunk:
    batch = images.read(order[indices.start : indices.stop])
    stopwatch = Stopwatch(extractor.device)
    features = extractor(batch.to(extractor.device)).float().cpu()
    stopwatch.stop()
    numbers = torch.arange(indices.start, indices.stop)
    return Chunk(
        numbers, features, hashes[numbers], batch[numbers < shown], None, extractor.sha256, rank,
        {}, {}, {}, sampling=0.0, scoring=stopwatch.seconds,
    )  # fmt: skip


class GivenMoments(FrechetDistance):
    """Frechet distance of known moments, whose limit and standard error are NaN, because no image can be left out.

    Args:
        moments: Moments of the features; their number of images may be unknown, 0.
        reference: Moments of the same features of real images.
    """

    def __init__(self, moments: Moments, reference: Moments) -> None:
        super().__init__(moments.dim, reference, blocks=1)
        self.given = moments
        self.count[0] = max(moments.n, 1)

    @override
    def moments(self, drop: int | None = None) -> Moments:
        """Return the moments."""
        return self.given


def number_of(n: int | None, real: Real) -> int:
    """Return the number of scored images or, if it is unknown (0 or None), that of all held-out images."""
    return n or (real.floor.moments.n if real.floor else 0)


def score_moments(moments: Moments, real: Real, metrics: Sequence[Metric], distance: str) -> Measured:
    """Compute the metrics of moments; ``distance`` is the key of the Frechet distance.

    The floor is that of as many images or, if their number is unknown, of all held-out images.
    """
    n = number_of(moments.n, real)
    sums = GivenMoments(moments, real.reference.moments)
    return measure(metrics, Made(n, torch.zeros(0, moments.dim), sums, distance), real)
