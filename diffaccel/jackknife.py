"""Jackknife over blocks of images: extrapolation to infinitely many images, and standard errors.

Everything here works on numpy arrays and on PyTorch's tensors, and imports neither: ``compare`` reads the values that a
point contains without importing PyTorch.

References:
    Delete-m Jackknife for Unequal m (Busing et al., 1999), https://doi.org/10.1023/A:1008800423698
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

BLOCKS = 10
"""Number of blocks of the jackknife."""

Array = Any
"""A numpy array or a tensor of PyTorch on the CPU, float64."""


class Frechet(NamedTuple):
    """Frechet distance of n images, its limit for n to infinity, and the standard error of both; () float64.

    ``paired_difference`` returns the differences between two methods' distances in the same form.
    """

    fd: Array
    fd_inf: Array
    se: Array


class Resampled(NamedTuple):
    """Distances of all images and of parts of them.

    Attributes:
        full: Distance of all images, ().
        kept: Distances without each of the K blocks that have data, (K,).
        sizes: Number of images in these blocks, (K,).
        halves: Distances of half samples, (H,), each half with its complement; empty for a first-order extrapolation.
        half_sizes: Number of images in the half samples, (H,).
    """

    full: Array
    kept: Array
    sizes: Array
    halves: Array
    half_sizes: Array

    def alike(self, other: "Resampled") -> bool:
        """Whether blocks and half samples have the same sizes."""
        return all(getattr(self, name).tolist() == getattr(other, name).tolist() for name in ("sizes", "half_sizes"))

    def less(self, other: "Resampled") -> "Resampled":
        """Return the differences to the distances of other images with the same blocks."""
        return Resampled(
            self.full - other.full, self.kept - other.kept, self.sizes, self.halves - other.halves, self.half_sizes
        )

    def extrapolated(self) -> Frechet:
        """Extrapolate to n -> infinity, with the jackknife standard error.

        The terms in 1/n and, with half samples, in 1/n^2 cancel exactly for blocks and halves of any size. The standard
        error is that of the first order, which includes all but the noise of the small second-order term.
        """
        limit, error = jackknife(self.full, self.kept, self.sizes)
        if len(self.halves):
            n = self.sizes.sum()
            kept, half = n / (n - self.sizes), n / self.half_sizes
            # The constant of the parabola in n / m through the mean distances of m images: all, kept blocks, halves.
            x, y = (kept.mean(), half.mean()), ((kept**2).mean(), (half**2).mean())
            weights = (x[0] * y[1] - x[1] * y[0], x[1] - y[1], y[0] - x[0])
            values = (self.full, self.kept.mean(), self.halves.mean())
            limit = sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)
        return Frechet(self.full, limit, error)

    def record(self) -> dict[str, list[float]] | None:
        """Return everything but ``full`` as lists, for a point; None where the distances are undefined (NaN)."""
        if len(self.kept) < 2 or any(value != value for value in self.kept.tolist()):
            return None
        return {name: getattr(self, name).tolist() for name in self._fields[1:]}


def resampled(full: object, record: object) -> Resampled | None:
    """Return the distances that a point contains.

    Args:
        full: Distance of all images.
        record: Result of :meth:`Resampled.record`, from a file.

    Returns:
        The distances as numpy arrays; None if they are missing or malformed.
    """
    if not isinstance(record, Mapping) or not isinstance(full, float | int):
        return None
    try:
        lists = [np.array(record.get(name, ()), dtype=np.float64) for name in Resampled._fields[1:]]
    except (TypeError, ValueError, OverflowError):
        return None
    kept, sizes, halves, half_sizes = lists
    fit = all(one.ndim == 1 and np.isfinite(one).all() for one in lists)
    if not fit or len(kept) < 2 or len(kept) != len(sizes) or len(halves) != len(half_sizes) or not (sizes > 0).all():
        return None
    return Resampled(np.float64(full), kept, sizes, halves, half_sizes)


def partition(chains: int | None) -> int:
    """Return a number that is equal for points whose image i is in the same block for every i.

    Image i is in block ``i % chains % BLOCKS``: independent images are divided like those of a multiple of ten chains.
    """
    return chains if chains and chains % BLOCKS else 0


def jackknife(full: Array, kept: Array, sizes: Array) -> tuple[Array, Array]:
    """Extrapolate a statistic whose bias is proportional to 1/n, from its values with each block left out.

    With K equal blocks the estimate is K full - (K - 1) mean(kept), with se^2 = (K - 1)/K sum (kept - mean(kept))^2.
    Weights extend it to unequal blocks (Busing et al., 1999), for which the 1/n term still cancels exactly.

    Args:
        full: Statistic of all data, ().
        kept: Statistic without block k, (K,).
        sizes: Number of images in block k, (K,).

    Returns:
        Extrapolated statistic and its standard error, both ().
    """
    inverse_share = sizes.sum() / sizes
    estimate = len(kept) * full - ((1 - 1 / inverse_share) * kept).sum()
    pseudo_values = inverse_share * full - (inverse_share - 1) * kept
    variance = ((pseudo_values - estimate) ** 2 / (inverse_share - 1)).mean()
    return estimate, variance**0.5
