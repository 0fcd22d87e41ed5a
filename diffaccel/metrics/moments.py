"""Moments of features, from sums in blocks.

The block of a batch follows from its *global* index, so that results do not depend on the world size.
"""

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Self

from diffaccel.collective import all_reduce
from diffaccel.deferred import check
from diffaccel.errors import UsageError


class Moments:
    """Number, mean and unbiased covariance of features, in float64 on the CPU.

    Args:
        n: Number of images.
        mean: Mean feature, (d,).
        covariance: Covariance, normalised by n - 1, (d, d).
    """

    def __init__(self, n: int, mean: Tensor, covariance: Tensor) -> None:
        self.n = n
        self.mean = mean.detach().to("cpu", torch.float64)
        self.covariance = covariance.detach().to("cpu", torch.float64)

    @classmethod
    def from_features(cls, features: Tensor) -> "Moments":
        """Compute the moments of features (n, d), n >= 2.

        Raises:
            UsageError: Fewer than two rows, or a value that is NaN or infinite.
        """
        check_features(features, features.shape[-1], "the features")
        if len(features) < 2:
            raise UsageError(f"a covariance requires features of at least 2 images, not {len(features)}: give more")
        features = features.double()
        return cls(len(features), features.mean(0), torch.cov(features.T).reshape(features.shape[1], -1))

    @property
    def dim(self) -> int:
        """Number of features, d."""
        return len(self.mean)

    @cached_property
    def root(self) -> Tensor:
        """Symmetric square root of the covariance, (d, d); cached, because it is expensive at d = 2048."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def check_features(features: Tensor, dim: int, what: str) -> None:
    """Check shape and values of features.

    Raises:
        UsageError: The shape is not (n, dim), or a value is NaN or infinite.
    """
    if features.ndim != 2 or features.shape[1] != dim:
        raise UsageError(f"{what} have shape {tuple(features.shape)}, not (n, {dim}): use the reference's extractor")
    finite = torch.isfinite(features)
    check(
        finite,
        lambda: UsageError(f"{what} contain {int((~finite).sum())} values that are NaN or infinite: check the images"),
    )


STATES = ("count", "total", "outer")
"""Sums of :class:`MomentSums`, which are added over ranks."""


class MomentSums:
    """Sums of features and of their outer products, in blocks; ``compute`` returns :class:`Moments`.

    The methods are those of a metric of torchmetrics, whose import takes longer than a short bench: it imports SciPy,
    torchvision, TorchDynamo and matplotlib.

    Args:
        dim: Number of features, d.
        blocks: Number of blocks, K. Memory is 8 K d^2 bytes: 0.3 MB at d = 64, and 335 MB at d = 2048, where 5 blocks
            are advisable. The sums are bit-identical for all world sizes that divide K, and equal up to rounding
            otherwise.
        origin: Point near the mean that is subtracted from the features, (d,), so that large means do not reduce
            precision; zero by default.
    """

    def __init__(self, dim: int, blocks: int = 10, origin: Tensor | None = None) -> None:
        self.dim, self.blocks = dim, blocks
        self.origin = torch.zeros(dim, dtype=torch.float64) if origin is None else origin.detach().double()
        self.reset()

    def reset(self) -> None:
        """Remove all features."""
        self.count = self.origin.new_zeros(self.blocks)
        self.total = self.origin.new_zeros(self.blocks, self.dim)
        self.outer = self.origin.new_zeros(self.blocks, self.dim, self.dim)

    def to(self, device: torch.device | str) -> Self:
        """Move the sums to a device, in place."""
        for name in (*STATES, "origin"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def merge_state(self, other: "MomentSums") -> None:
        """Add the sums of other images."""
        for name in STATES:
            getattr(self, name).add_(getattr(other, name))

    def gathered(self) -> Self:
        """Return the sums over all ranks; collective."""
        found = copy.copy(self)
        if dist.is_available() and dist.is_initialized():
            for name in STATES:
                setattr(found, name, all_reduce(getattr(self, name).clone()))
        return found

    def update(self, features: Tensor, batch_index: int) -> None:
        """Add the features of a batch.

        Args:
            features: Features, (n, dim).
            batch_index: Index of the batch among those of *all* ranks.

        Raises:
            UsageError: The shape is wrong, or a value is NaN or infinite.
        """
        check_features(features, self.dim, f"the features of batch {batch_index}")
        block, centred = batch_index % self.blocks, features.detach().to(self.total) - self.origin
        self.count[block] += len(centred)
        self.total[block] += centred.sum(0)
        self.outer[block] += centred.T @ centred

    def compute(self) -> Any:
        """Return the moments of all images of all ranks; collective.

        Raises:
            UsageError: Fewer than two images were given.
        """
        return self.gathered().moments()

    def moments(self, drop: int | None = None) -> Moments:
        """Return the moments of this rank's sums, without the block ``drop`` if given."""
        count, total, outer = (state.sum(0) for state in (self.count, self.total, self.outer))
        if drop is not None:
            count, total, outer = count - self.count[drop], total - self.total[drop], outer - self.outer[drop]
        return self._moments(count, total, outer)

    def moments_of(self, blocks: Sequence[int]) -> Moments:
        """Return the moments of some blocks of this rank's sums."""
        chosen = list(blocks)
        return self._moments(*(state[chosen].sum(0) for state in (self.count, self.total, self.outer)))

    def _moments(self, count: Tensor, total: Tensor, outer: Tensor) -> Moments:
        if count < 2:
            raise UsageError(f"a covariance requires at least 2 images, not {int(count)}: score more")
        mean = total / count
        covariance = (outer - count * torch.outer(mean, mean)) / (count - 1)
        return Moments(int(count), mean + self.origin, covariance)
