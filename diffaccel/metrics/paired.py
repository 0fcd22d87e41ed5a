"""Difference between the Frechet distances of two methods whose images come from the same noise."""

from torch import Tensor

from diffaccel.errors import UsageError
from diffaccel.metrics.frechet import Frechet, FrechetDistance, Resampled
from diffaccel.metrics.moments import Moments


def paired_difference(a: Tensor, b: Tensor, block: Tensor, reference: Moments) -> Frechet:
    """Compute the Frechet distance of method a minus that of method b, with its standard error.

    The jackknife leaves the same images out of both methods, so that variation due to the common noise cancels. The
    standard error is that of the difference, and does not include variation between training runs.

    Args:
        a: Features of method a's images, in image order, (n, d).
        b: Features of method b's images, from the same noise, (n, d).
        block: Jackknife block of each image, (n,) integers; dependent images, such as those of one chain, must be in
            the same block.
        reference: Moments of the real images.

    Returns:
        FD(a) - FD(b), FD_inf(a) - FD_inf(b), and the standard error of both; the last two are NaN where
        :class:`FrechetDistance` returns NaN.

    Raises:
        UsageError: The shapes differ, a value is NaN or infinite, or there are fewer than two images.
    """
    if a.shape != b.shape or block.shape != a.shape[:1]:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)} with blocks of {tuple(block.shape)}"
        raise UsageError(f"the images do not form pairs ({shapes}): score the same n for both methods")
    first, second = (_resampled(x, block, reference) for x in (a, b))
    return first.less(second).extrapolated()


def _resampled(features: Tensor, block: Tensor, reference: Moments) -> Resampled:
    labels, block = block.cpu().unique(return_inverse=True)
    distance = FrechetDistance(features.shape[-1], reference, blocks=len(labels))
    for k in range(len(labels)):
        distance.update(features[block == k], k)
    return distance.resampled()
