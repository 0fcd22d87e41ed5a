"""Whether generated images are copies of training images.

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
    """How many generated images lie conspicuously close to a training image, and the closest of them.

    Attributes:
        share: Share of the generated images that lie no further than ``threshold`` from a training image.
        threshold: The quantile of held-out images' distances to their nearest training image.
        generated: Indices of the closest generated images, the closest first, (c,).
        training: Indices of the training images nearest to these, (c,).
        distance: Distances between the two, (c,) float64.
    """

    share: float
    threshold: float
    generated: Tensor
    training: Tensor
    distance: Tensor


def memorised(
    generated: Tensor, training: Tensor, held_out: Tensor, quantile: float = 0.01, closest: int = 8, rows: int = 1024
) -> Memorisation:
    """Measure how much more often generated images come close to training images than unseen real ones do.

    The threshold is the j-th smallest of the h held-out images' distances, j = floor(quantile (h + 1)). A fresh image
    of the data's distribution is as close with probability j / (h + 1), that is ``quantile``; a copy always is. Images
    that are unlike the data are so less often, so read the share beside a Frechet distance.

    Args:
        generated: Features of generated images, (n, d).
        training: Features of the images the model was trained on, (m, d): all of them, or copies of others are missed.
        held_out: Features of real images it was not trained on, (h, d), h + 1 >= 1 / quantile.
        quantile: Share of the held-out images that counts as close.
        closest: Number of the closest pairs to return, for a look at them.
        rows: Rows of a tile, which takes 8 rows m bytes.

    Raises:
        UsageError: Dimensions that differ, a value that is NaN or infinite, no images, or too few held out.
    """
    for features, what in ((generated, "generated"), (training, "training"), (held_out, "held-out")):
        check_features(features, training.shape[-1], f"the {what} features")
        if not len(features):
            raise UsageError(f"no {what} features: give at least 1")
    if not 1 <= (j := int(quantile * (len(held_out) + 1))) <= len(held_out):
        raise UsageError(f"{len(held_out)} held-out images have no quantile of {quantile:g}: hold out more")
    threshold = nearest(held_out, training, rows)[0].kthvalue(j).values
    distance, index = nearest(generated, training, rows)
    shortest, chosen = distance.topk(min(closest, len(distance)), largest=False)
    share = (distance <= threshold).double().mean()
    return Memorisation(share.item(), threshold.item(), chosen, index[chosen], shortest)
