"""Distances between sets of images, from one pass over their features.

    FD  = |mu - mu_r|^2 + tr(C + C_r - 2 (C_r^1/2 C C_r^1/2)^1/2)                       (Frechet distance)
    KID = E k(x, x') + E k(y, y') - 2 E k(x, y),    k(x, y) = (x . y / d + 1)^3          (kernel distance)

The plain FD of n images is biased upwards by about c/n, with a c of the model's own, so equal n does not make models
comparable. Sums are therefore kept in blocks, and a delete-one-block jackknife removes the 1/n term (``fd_inf``) and
gives its standard error. A block is picked by the *global* batch index, so results do not depend on the world size.

Everything is float64: MPS has none, keep the metrics on the CPU there.

References:
    GANs Trained by a Two Time-Scale Update Rule (Heusel et al., 2017), https://arxiv.org/abs/1706.08500
    Demystifying MMD GANs (Binkowski et al., 2018), https://arxiv.org/abs/1801.01401
    Effectively Unbiased FID and Inception Score (Chong & Forsyth, 2020), https://arxiv.org/abs/1911.07023
    Delete-m Jackknife for Unequal m (Busing et al., 1999), https://doi.org/10.1023/A:1008800423698
"""

from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from diffaccel.errors import UsageError


class Moments:
    """Number, mean and unbiased covariance of a set of features, float64 on the CPU.

    Args:
        n: Number of images.
        mean: Mean feature, (d,).
        covariance: Covariance over n - 1, (d, d).
    """

    def __init__(self, n: int, mean: Tensor, covariance: Tensor) -> None:
        self.n = n
        self.mean = mean.detach().to("cpu", torch.float64)
        self.covariance = covariance.detach().to("cpu", torch.float64)

    @classmethod
    def from_features(cls, features: Tensor) -> "Moments":
        """Take the moments of features (n, d), n >= 2.

        Raises:
            UsageError: Fewer than two rows, or a value that is NaN or infinite.
        """
        check_features(features, features.shape[-1], "the features")
        if len(features) < 2:
            raise UsageError(f"{len(features)} image has no covariance: give at least 2")
        features = features.double()
        return cls(len(features), features.mean(0), torch.cov(features.T).reshape(features.shape[1], -1))

    @property
    def dim(self) -> int:
        """Number of features, d."""
        return len(self.mean)

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance, (d, d); costly at d = 2048, hence kept."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def check_features(features: Tensor, dim: int, what: str) -> None:
    """Refuse features that would make every later number meaningless.

    Raises:
        UsageError: The shape is not (n, dim), or a value is NaN or infinite.
    """
    if features.ndim != 2 or features.shape[1] != dim:
        raise UsageError(f"{what} have shape {tuple(features.shape)}, not (n, {dim}): use the reference's extractor")
    if bad := int((~torch.isfinite(features)).sum()):
        raise UsageError(f"{what} hold {bad} values that are NaN or infinite: look at the images they were taken from")


def frechet_distance(moments: Moments, reference: Moments) -> Tensor:
    """Frechet distance between the two Gaussians of these moments, () float64.

    The trace of (C C_r)^1/2 is taken from the eigenvalues of the symmetric matrix C_r^1/2 C C_r^1/2, which has the same
    ones: real by construction, and the root is computed once per reference.
    """
    values = torch.linalg.eigvalsh(reference.root @ moments.covariance @ reference.root).clamp_min(0)
    offset = (moments.mean - reference.mean).square().sum()
    return offset + moments.covariance.trace() + reference.covariance.trace() - 2 * values.sqrt().sum()


def all_reduce(state: Tensor, group: Any = None) -> list[Tensor]:
    """Sum a state over the processes: a ``dist_sync_fn`` for torchmetrics that holds no W copies of the state."""
    total = state.clone()
    dist.all_reduce(total, group=group)
    return [total]


class MomentSums(Metric):
    """Sums of features and of their outer products, in blocks; ``compute`` returns their ``Moments``.

    Args:
        dim: Number of features, d.
        blocks: Number of blocks, K. Memory is K d^2 8 bytes (0.3 MB at d = 64, 335 MB at d = 2048: take 5 there). The
            sums are equal to the last bit for each world size that divides K, else to rounding.
        origin: Point near the mean to take the sums about, (d,), so that large means cost no digits; zero by default.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    count: Tensor
    total: Tensor
    outer: Tensor
    origin: Tensor

    def __init__(self, dim: int, blocks: int = 10, origin: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(**{"dist_sync_fn": all_reduce, **kwargs})
        self.dim, self.blocks = dim, blocks
        zeros = {"count": (blocks,), "total": (blocks, dim), "outer": (blocks, dim, dim)}
        for name, shape in zeros.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        origin = torch.zeros(dim, dtype=torch.float64) if origin is None else origin
        self.register_buffer("origin", origin, persistent=False)

    def update(self, features: Tensor, batch_index: int) -> None:
        """Add the features of a batch.

        Args:
            features: (n, dim).
            batch_index: Index of the batch among those of *all* processes.

        Raises:
            UsageError: The shape is wrong, or a value is NaN or infinite.
        """
        check_features(features, self.dim, f"the features of batch {batch_index}")
        block, centred = batch_index % self.blocks, features.to(self.total) - self.origin
        self.count[block] += len(centred)
        self.total[block] += centred.sum(0)
        self.outer[block] += centred.T @ centred

    def compute(self) -> Any:
        """Return the moments of all images seen by all processes.

        Raises:
            UsageError: Fewer than two images were given.
        """
        return self.moments()

    def moments(self, drop: int | None = None) -> Moments:
        """Return the moments of this process's sums, leaving the block ``drop`` out."""
        count, total, outer = (state.sum(0) for state in (self.count, self.total, self.outer))
        if drop is not None:
            count, total, outer = count - self.count[drop], total - self.total[drop], outer - self.outer[drop]
        if count < 2:
            raise UsageError(f"{int(count)} images have no covariance: score at least 2")
        mean = total / count
        covariance = (outer - count * torch.outer(mean, mean)) / (count - 1)
        return Moments(int(count), mean + self.origin, covariance)


class Frechet(NamedTuple):
    """Frechet distance of n images, its limit for n to infinity, and a standard error that serves both; () float64."""

    fd: Tensor
    fd_inf: Tensor
    se: Tensor


class FrechetDistance(MomentSums):
    """Frechet distance to a reference, with its jackknife extrapolation and standard error.

    ``fd_inf`` and ``se`` are NaN where they mean nothing: fewer than two blocks have data, or n <= dim, where the
    covariance is singular and the bias no longer goes as 1/n. They are good to a few per cent from n = 4 dim on. The
    bias that a finite reference leaves stays: hold one reference for all models.

    Args:
        dim: Number of features, d.
        reference: Moments of the real images, on the same features.
        blocks: Number of blocks, K, each of which should get two batches or more.

    Raises:
        UsageError: The reference has another number of features.
    """

    def __init__(self, dim: int, reference: Moments, blocks: int = 10, **kwargs: Any) -> None:
        if reference.dim != dim:
            raise UsageError(f"the reference has {reference.dim} features, the extractor {dim}: make it anew")
        super().__init__(dim, blocks, origin=reference.mean, **kwargs)
        self.reference = reference

    def compute(self) -> Frechet:
        """Score all images seen by all processes.

        Raises:
            UsageError: Fewer than two images were given.
        """
        full = self.moments()
        fd = frechet_distance(full, self.reference)
        used = [block for block in range(self.blocks) if self.count[block] > 0]
        if len(used) < 2 or full.n <= self.dim:
            return Frechet(fd, torch.full_like(fd, torch.nan), torch.full_like(fd, torch.nan))
        kept = torch.stack([frechet_distance(self.moments(drop=block), self.reference) for block in used])
        return Frechet(fd, *jackknife(fd, kept, self.count[used].cpu()))


def jackknife(full: Tensor, kept: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Extrapolate a statistic whose bias goes as 1/n, from its values with each block left out.

    With K equal blocks this is K full - (K - 1) mean(kept), with se^2 = (K - 1)/K sum (kept - mean(kept))^2; the
    weights extend it to unequal blocks (Busing et al., 1999), where the 1/n term still cancels exactly.

    Args:
        full: The statistic on all data, ().
        kept: The statistic without block k, (K,).
        sizes: Number of images in block k, (K,).

    Returns:
        The extrapolated statistic and its standard error, both ().
    """
    inverse_share = sizes.sum() / sizes
    estimate = len(kept) * full - ((1 - 1 / inverse_share) * kept).sum()
    pseudo_values = inverse_share * full - (inverse_share - 1) * kept
    variance = ((pseudo_values - estimate).square() / (inverse_share - 1)).mean()
    return estimate, variance.sqrt()


class KernelDistance(Metric):
    """Kernel distance (KID): the full unbiased U-statistic over all pairs, not an average over random subsets.

    It is unbiased, hence sometimes negative near zero, and is reported so. Features are kept as float32 and gathered
    from the processes; kernels are summed in float64, tile by tile. Time goes as n (n + m) d: meant for n <= 10,000.

    Args:
        dim: Number of features, d.
        reference: Features of real images, (m, d), m >= 2.
        rows: Rows of a tile; a tile takes 8 rows (rows + 2 d) bytes.

    Raises:
        UsageError: The reference has another number of features, fewer than two rows, or a value that is not finite.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    features: list[Tensor]
    order: list[Tensor]

    def __init__(self, dim: int, reference: Tensor, rows: int = 1024, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_features(reference, dim, "the reference features")
        if len(reference) < 2:
            raise UsageError(f"KID needs at least 2 reference features, got {len(reference)}: keep more of them")
        self.dim, self.rows, self.reference = dim, rows, reference.detach().cpu()
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("order", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, batch_index: int) -> None:
        """Keep the features of a batch, (n, dim); ``batch_index`` counts the batches of *all* processes.

        Raises:
            UsageError: The shape is wrong, or a value is NaN or infinite.
        """
        check_features(features, self.dim, f"the features of batch {batch_index}")
        self.features.append(features.detach().to(self.device, torch.float32))
        self.order.append(torch.full((len(features),), batch_index, device=self.device))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the features; a process without batches sends none, where torchmetrics alone would send a misfit."""
        if not self.features:
            self.features.append(torch.empty(0, self.dim, device=self.device))
            self.order.append(torch.empty(0, dtype=torch.int64, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> Tensor:
        """Return the distance to the reference, () float64.

        Raises:
            UsageError: Fewer than two images were given.
        """
        features = dim_zero_cat(self.features) if len(self.features) else torch.empty(0, self.dim)
        if len(features) < 2:
            raise UsageError(f"KID of {len(features)} images is not defined: score at least 2")
        # in the order of the batches, so that rounding does not depend on the number of processes
        features = features[torch.argsort(dim_zero_cat(self.order), stable=True)]
        reference = self.reference.to(features.device)
        cross = kernel_sum(features, reference, self.rows) / (len(features) * len(reference))
        within = mean_off_diagonal(features, self.rows) + self._within_reference.to(features.device)
        return within - 2 * cross

    @cached_property
    def _within_reference(self) -> Tensor:
        """The reference's own term, which does not change from one score to the next."""
        return mean_off_diagonal(self.reference, self.rows)


def kernel_sum(x: Tensor, y: Tensor, rows: int = 1024) -> Tensor:
    """Sum k(x_i, y_j) = (x_i . y_j / d + 1)^3 over all pairs of x (n, d) and y (m, d), () float64."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for some_x in x.split(rows):
        for some_y in y.split(rows):
            total += (some_x.double() @ some_y.double().T / x.shape[1] + 1).pow(3).sum()
    return total


def mean_off_diagonal(x: Tensor, rows: int = 1024) -> Tensor:
    """Average k(x_i, x_j) over i != j, x (n, d), () float64."""
    n, dim = x.shape
    diagonal = torch.stack([(part.double().square().sum(1) / dim + 1).pow(3).sum() for part in x.split(rows)]).sum()
    return (kernel_sum(x, x, rows) - diagonal) / (n * (n - 1))
