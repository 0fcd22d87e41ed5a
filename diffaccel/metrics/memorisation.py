"""Memorisation: how many generated images are copies of training images.

References:
    A Non-Parametric Test to Detect Data-Copying in Generative Models (Meehan et al., 2020),
        https://arxiv.org/abs/2004.05675
"""

from typing import NamedTuple

from torch import Tensor

from diffaccel.errors import UsageError
from diffaccel.metrics.moments import check_features
from diffaccel.metrics.neighbours import nearest


class Memorisation(NamedTuple):
    """Fraction of generated images that are unusually close to a training image, and the closest pairs.

    Attributes:
        share: Fraction of the generated images that are within ``threshold`` of a training image.
        threshold: Quantile of the distances of held-out images to their nearest training images.
        generated: Indices of the closest generated images, the closest first, (c,).
        training: Indices of the training images nearest to these generated images, (c,).
        distance: Distances of these pairs, (c,) float64.
    """

    share: float
    threshold: float
    generated: Tensor
    training: Tensor
    distance: Tensor


def memorised(
    generated: Tensor,
    training: Tensor,
    held_out: Tensor,
    quantile: float = 0.01,
    closest: int = 8,
    rows: int = 1024,
    threshold: Tensor | None = None,
) -> Memorisation:
    """Measure how often generated images are as close to training images as only few held-out images are.

    The threshold is the j-th smallest distance of the h held-out images, j = floor(quantile (h + 1)). A new image from
    the data distribution is within the threshold with probability j / (h + 1), which is about ``quantile``; a copy
    always is. Images unlike the data are within it less often, so that the fraction should be read together with a
    Frechet distance.

    Args:
        generated: Features of generated images, (n, d).
        training: Features of the images that the model was trained on, (m, d). Copies of images that are not included
            are missed.
        held_out: Features of real images that the model was not trained on, (h, d), h + 1 >= 1 / quantile.
        quantile: Fraction of the held-out images that counts as close.
        closest: Number of the closest pairs to return.
        rows: Number of rows of a tile, which takes 8 rows m bytes.
        threshold: Threshold of the same training and held-out images, if it is known, () float64.

    Raises:
        UsageError: The dimensions differ, a value is NaN or infinite, or there are no images or too few held-out
            images.
    """
    for features, what in ((generated, "generated"), (training, "training"), (held_out, "held-out")):
        check_features(features, training.shape[-1], f"the {what} features")
        if not len(features):
            raise UsageError(f"there are no {what} features: give at least 1")
    if threshold is None:
        threshold = copy_threshold(training, held_out, quantile, rows)
    distance, index = nearest(generated, training, rows)
    shortest, chosen = distance.topk(min(closest, len(distance)), largest=False)
    share = (distance <= threshold).double().mean()
    return Memorisation(share.item(), threshold.item(), chosen, index[chosen], shortest)


def copy_threshold(training: Tensor, held_out: Tensor, quantile: float = 0.01, rows: int = 1024) -> Tensor:
    """Compute the distance to a training image within which an image counts as a copy, () float64.

    Raises:
        UsageError: There are too few held-out images.
    """
    if not 1 <= (j := int(quantile * (len(held_out) + 1))) <= len(held_out):
        raise UsageError(f"{len(held_out)} held-out images are too few for the quantile {quantile:g}: hold out more")
    return nearest(held_out, training, rows)[0].kthvalue(j).values
