"""Kernel distance (KID).

    KID = E k(x, x') + E k(y, y') - 2 E k(x, y),    k(x, y) = (x . y / d + 1)^3

References:
    Demystifying MMD GANs (Binkowski et al., 2018), https://arxiv.org/abs/1801.01401
"""

from functools import cached_property
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from diffaccel.collective import all_gather
from diffaccel.errors import UsageError
from diffaccel.metrics.frechet import jackknife
from diffaccel.metrics.moments import check_features


class KernelReference:
    """Features of real images with their term E k(y, y'), which is computed once and shared by all distances.

    Args:
        features: Features, (m, d), m >= 2.
        rows: Number of rows of a tile.

    Raises:
        UsageError: There are fewer than two rows, or a value is not finite.
    """

    def __init__(self, features: Tensor, rows: int = 1024) -> None:
        check_features(features, features.shape[-1], "the reference features")
        if len(features) < 2:
            raise UsageError(
                f"KID requires features of at least 2 reference images, not {len(features)}: keep more of them"
            )
        self.features, self.rows = features.detach().cpu(), rows

    @cached_property
    def within(self) -> Tensor:
        """Mean kernel of pairs of different reference images, () float64."""
        return mean_off_diagonal(self.features, self.rows)


class KernelDistance:
    """Kernel distance (KID): the full unbiased U-statistic over all pairs, not an average over random subsets.

    As an unbiased estimate, KID may be negative near zero. Features are kept as float32 and gathered from all ranks;
    kernels are summed in float64, tile by tile. The time is proportional to n (n + m) d, which is suitable for n up to
    about 10,000. The methods are those of a metric of torchmetrics; see :class:`~diffaccel.metrics.MomentSums`.

    Args:
        dim: Number of features, d.
        reference: Features of real images, (m, d), m >= 2, or a :class:`KernelReference` shared by several distances.
        rows: Number of rows of a tile; a tile takes 8 rows (rows + 2 d) bytes.
        sync_on_compute: Whether ``compute`` gathers the features of all ranks; False if every rank has all of them.

    Raises:
        UsageError: The reference has a different number of features, fewer than two rows, or a value that is not
            finite.
    """

    def __init__(
        self, dim: int, reference: Tensor | KernelReference, rows: int = 1024, sync_on_compute: bool = True
    ) -> None:
        self.reference = reference if isinstance(reference, KernelReference) else KernelReference(reference, rows)
        check_features(self.reference.features, dim, "the reference features")
        self.dim, self.rows, self.sync_on_compute = dim, rows, sync_on_compute
        self.reset()

    def reset(self) -> None:
        """Remove all features."""
        self.batches: list[tuple[int, Tensor]] = []

    def update(self, features: Tensor, batch_index: int) -> None:
        """Add the features of a batch.

        Args:
            features: Features, (n, dim).
            batch_index: Index of the batch among those of *all* ranks.

        Raises:
            UsageError: The shape is wrong, or a value is NaN or infinite.
        """
        check_features(features, self.dim, f"the features of batch {batch_index}")
        self.batches.append((batch_index, features.detach().to("cpu", torch.float32)))

    def merge_state(self, other: "KernelDistance") -> None:
        """Add the features of other images."""
        self.batches += other.batches

    def compute(self) -> Tensor:
        """Return the distance to the reference, () float64; collective, if features are gathered.

        Raises:
            UsageError: Fewer than two images were given.
        """
        batches = sum(all_gather(self.batches), []) if self.sync_on_compute else self.batches
        # in the order of the batches, so that rounding does not depend on the number of ranks
        ordered = [features for _, features in sorted(batches, key=itemgetter(0))]
        features = torch.cat([torch.empty(0, self.dim), *ordered])
        if len(features) < 2:
            raise UsageError(f"KID requires at least 2 images, not {len(features)}: score more")
        real = self.reference.features
        cross = kernel_sum(features, real, self.rows) / (len(features) * len(real))
        within = mean_off_diagonal(features, self.rows) + self.reference.within
        return within - 2 * cross


class Kernel(NamedTuple):
    """Kernel distance and its standard error, () float64."""

    kid: Tensor
    se: Tensor


def kernel_distance(
    features: Tensor, reference: KernelReference, blocks: int = 10, block: Tensor | None = None
) -> Kernel:
    """Compute the kernel distance with its jackknife standard error over images, for a fixed reference.

    The distance is bit-identical to that of :class:`KernelDistance`: the blocks are sums over the same tiles, which are
    computed once. The standard error does not include the reference's own sampling error, which shifts the distances of
    all methods alike.

    Args:
        features: Features, (n, d), n >= 4.
        reference: Features of real images.
        blocks: Number of blocks of the jackknife, if ``block`` is not given; images are then in random order.
        block: Jackknife block of each image, (n,) integers; dependent images, such as those of one chain, must be in
            the same block.

    Returns:
        Distance and standard error; the latter is NaN if fewer than two blocks have images, or one has all but one.
    """
    n, rows, real = len(features), reference.rows, reference.features
    if block is None:
        block = torch.arange(n) % min(blocks, n // 2)
    members = F.one_hot(block.unique(return_inverse=True)[1]).double()
    sums, within = _block_sums(features, features, members, members, rows)
    own = (features.double().square().sum(1) / features.shape[1] + 1).pow(3)  # of each image with itself
    full = _without_diagonal(sums, features, rows) + reference.within
    sums, cross = _block_sums(features, real, members, torch.ones(len(real), 1, dtype=torch.float64), rows)
    full = full - 2 * (sums / (n * len(real)))

    # sums over the pairs of images that are left without each block: those within a block are subtracted twice
    sizes, lone = members.sum(0), n - members.sum(0)
    pairs = within.sum() - own.sum() - (2 * within.sum(1) - within.diagonal() - members.T @ own)
    others = (cross.sum() - cross[:, 0]) / len(real)
    kept = pairs / (lone * (lone - 1)) + reference.within - 2 * others / lone
    return Kernel(full, jackknife(full, kept, sizes)[1])


def _block_sums(x: Tensor, y: Tensor, x_members: Tensor, y_members: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Sum kernels over all pairs as :func:`kernel_sum`, and over the pairs of each two blocks.

    Args:
        x: Features, (n, d).
        y: Features, (m, d).
        x_members: Whether each row of x is in each of K blocks, (n, K) float64.
        y_members: Whether each row of y is in each of L blocks, (m, L) float64.
        rows: Number of rows of a tile.

    Returns:
        Sum over all pairs, (), and sums by block, (K, L), float64.
    """
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    found = torch.zeros(x_members.shape[1], y_members.shape[1], dtype=torch.float64, device=x.device)
    for some_x, own in zip(x.split(rows), x_members.split(rows), strict=True):
        for some_y, others in zip(y.split(rows), y_members.split(rows), strict=True):
            tile = _tile(some_x, some_y)
            total += tile.sum()
            found += own.T @ (tile @ others)
    return total, found


def kernel_sum(x: Tensor, y: Tensor, rows: int = 1024) -> Tensor:
    """Sum k(x_i, y_j) = (x_i . y_j / d + 1)^3 over all pairs of x (n, d) and y (m, d), () float64."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for some_x in x.split(rows):
        for some_y in y.split(rows):
            total += _tile(some_x, some_y).sum()
    return total


def _tile(x: Tensor, y: Tensor) -> Tensor:
    """Kernels of all pairs, (n, m) float64."""
    return (x.double() @ y.double().T).div_(x.shape[1]).add_(1).pow_(3)  # in place, which is faster


def mean_off_diagonal(x: Tensor, rows: int = 1024) -> Tensor:
    """Average k(x_i, x_j) over i != j, x (n, d), () float64."""
    return _without_diagonal(kernel_sum(x, x, rows), x, rows)


def _without_diagonal(total: Tensor, x: Tensor, rows: int) -> Tensor:
    """Average over i != j, from the sum over all pairs of x (n, d)."""
    n, dim = x.shape
    diagonal = torch.stack([(part.double().square().sum(1) / dim + 1).pow(3).sum() for part in x.split(rows)]).sum()
    return (total - diagonal) / (n * (n - 1))
