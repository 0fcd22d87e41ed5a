"""How much smaller one method's Frechet distance is than another's, where their images come from the same noise."""

from torch import Tensor

from diffaccel.errors import UsageError
from diffaccel.metrics.frechet import Frechet, FrechetDistance, jackknife
from diffaccel.metrics.moments import Moments


def paired_difference(a: Tensor, b: Tensor, block: Tensor, reference: Moments) -> Frechet:
    """Distance of a's images to the reference less that of b's, with a standard error.

    Blocks are left out of both methods at once, so that what their images share by their common noise cancels: the
    error is that of the difference, not of two independent distances. What training left to chance is not in it.

    Args:
        a: Features of the one method's images, in image order, (n, d).
        b: Features of the other's, from the same noise, (n, d).
        block: The block of the jackknife that an image belongs to, (n,) integers; images that are not independent of
            one another, as those of one chain, belong to one block.
        reference: Moments of the real images.

    Returns:
        FD(a) - FD(b), FD_inf(a) - FD_inf(b), and the standard error of either; the last two are NaN where
        ``FrechetDistance`` has none.

    Raises:
        UsageError: Shapes that do not fit, a value that is NaN or infinite, fewer than two images.
    """
    if a.shape != b.shape or block.shape != a.shape[:1]:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)} with blocks of {tuple(block.shape)}"
        raise UsageError(f"images that form no pairs, {shapes}: score the same n for both methods")
    (full_a, kept_a, sizes), (full_b, kept_b, _) = (_leave_one_out(x, block, reference) for x in (a, b))
    return Frechet(full_a - full_b, *jackknife(full_a - full_b, kept_a - kept_b, sizes))


def _leave_one_out(features: Tensor, block: Tensor, reference: Moments) -> tuple[Tensor, Tensor, Tensor]:
    labels, block = block.cpu().unique(return_inverse=True)
    distance = FrechetDistance(features.shape[-1], reference, blocks=len(labels))
    for k in range(len(labels)):
        distance.update(features[block == k], k)
    return distance.leave_one_out()
