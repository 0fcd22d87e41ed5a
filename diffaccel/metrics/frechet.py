"""Frechet distance, its extrapolation to n -> infinity and its standard error.

    FD = |mu - mu_r|^2 + tr(C + C_r - 2 (C_r^1/2 C C_r^1/2)^1/2)

The FD of n images is biased upwards by about c/n, where c depends on the model, so that models are not comparable even
at equal n. Sums are therefore kept in blocks, and a delete-one-block jackknife removes the 1/n term (``fd_inf``) and
estimates the standard error.

References:
    GANs Trained by a Two Time-Scale Update Rule (Heusel et al., 2017), https://arxiv.org/abs/1706.08500
    Effectively Unbiased FID and Inception Score (Chong & Forsyth, 2020), https://arxiv.org/abs/1911.07023
    Delete-m Jackknife for Unequal m (Busing et al., 1999), https://doi.org/10.1023/A:1008800423698
"""

from typing import NamedTuple

import torch
from torch import Tensor

from diffaccel.errors import UsageError
from diffaccel.metrics.moments import Moments, MomentSums


def frechet_distance(moments: Moments, reference: Moments) -> Tensor:
    """Compute the Frechet distance between the Gaussians with these moments, () float64.

    The trace of (C C_r)^1/2 is computed from the eigenvalues of C_r^1/2 C C_r^1/2. This symmetric matrix has the same
    eigenvalues as C C_r, they are real by construction, and the root is computed only once per reference.
    """
    values = torch.linalg.eigvalsh(reference.root @ moments.covariance @ reference.root).clamp_min(0)
    offset = (moments.mean - reference.mean).square().sum()
    return offset + moments.covariance.trace() + reference.covariance.trace() - 2 * values.sqrt().sum()


class Frechet(NamedTuple):
    """Frechet distance of n images, its limit for n to infinity, and the standard error of both; () float64.

    ``paired_difference`` returns the differences between two methods' distances in the same form.
    """

    fd: Tensor
    fd_inf: Tensor
    se: Tensor


class FrechetDistance(MomentSums):
    """Frechet distance to a reference, with its jackknife extrapolation and standard error.

    ``fd_inf`` and ``se`` are NaN where they are undefined: fewer than two blocks have data, or n <= dim, where the
    covariance is singular and the bias is not proportional to 1/n. From n = 4 dim on, they are accurate to a few per
    cent. The bias of a finite reference remains, so all models should be compared with the same reference.

    Args:
        dim: Number of features, d.
        reference: Moments of the same features of real images.
        blocks: Number of blocks, K; each block should get at least two batches.

    Raises:
        UsageError: The reference has a different number of features.
    """

    def __init__(self, dim: int, reference: Moments, blocks: int = 10) -> None:
        if reference.dim != dim:
            raise UsageError(
                f"the reference has {reference.dim} features, but the extractor has {dim}: compute the reference "
                "again with "
                "`diffaccel reference`"
            )
        super().__init__(dim, blocks, origin=reference.mean)
        self.reference = reference

    def compute(self) -> Frechet:
        """Compute the distance of all images of all ranks; collective.

        Raises:
            UsageError: Fewer than two images were given.
        """
        full, kept, sizes = self.gathered().leave_one_out()
        return Frechet(full, *jackknife(full, kept, sizes))

    def leave_one_out(self) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the distance with all images of this rank, and with each block left out.

        Returns:
            Distance of all images (), distances without each of the K blocks that have data (K,), and the number of
            images in these blocks (K,).

        Raises:
            UsageError: Fewer than two images were given.
        """
        moments = self.moments()
        full = frechet_distance(moments, self.reference)
        used = (self.count > 0).nonzero().flatten().tolist()
        kept = torch.full((len(used),), torch.nan, dtype=torch.float64)
        if len(used) >= 2 and moments.n > self.dim:
            kept = torch.stack([frechet_distance(self.moments(drop=block), self.reference) for block in used])
        return full, kept, self.count[used].cpu()


def jackknife(full: Tensor, kept: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
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
    variance = ((pseudo_values - estimate).square() / (inverse_share - 1)).mean()
    return estimate, variance.sqrt()
