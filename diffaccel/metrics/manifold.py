"""Separate measures of fidelity and diversity: precision and recall, density and coverage.

B_k(x) is the ball around x up to its k-th nearest neighbour in its own set; x_i are generated and y_j real features:

    precision = mean_i [x_i in some B_3(y_j)]          recall   = mean_j [y_j in some B_3(x_i)]
    density   = mean_i #{j: x_i in B_5(y_j)} / 5       coverage = mean_j [some x_i in B_5(y_j)]

References:
    Improved Precision and Recall Metric for Assessing Generative Models (Kynkaanniemi et al., 2019),
        https://arxiv.org/abs/1904.06991
    Reliable Fidelity and Diversity Metrics for Generative Models (Naeem et al., 2020), https://arxiv.org/abs/2002.09797
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from diffaccel.metrics.moments import check_features
from diffaccel.metrics.neighbours import Neighbours, distances


class Manifold(NamedTuple):
    """Precision, recall, density and coverage; all are in [0, 1], except for the density, which may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_scores(
    generated: Tensor | Neighbours,
    reference: Tensor | Neighbours,
    k_precision: int = 3,
    k_density: int = 5,
    rows: int = 1024,
) -> Manifold:
    """Compute precision, recall, density and coverage of generated features.

    Even real images do not score 1. For two sets of n features from the same distribution, density is 1 on average and
    coverage about 1 - 2^-k (0.97), but precision and recall decrease with the dimension (0.6 at d = 64, n = 2000). The
    scores of held-out real images should therefore be reported as well.

    The numbers of features may differ, but only scores with the same two numbers are comparable: more features in a set
    make its balls smaller, and more generated features fill more of the real balls. The papers use equal numbers.

    The time is proportional to (n + m)^2 d. Memory holds one tile of distances, and both sets in float64.

    Args:
        generated: Features of generated images, (n, d), or of held-out real images, for comparison; or their
            :class:`Neighbours`, which saves time.
        reference: Features of real images, (m, d), on the same device, or their :class:`Neighbours`, which saves time.
        k_precision: Number of neighbours that define the balls of precision and recall.
        k_density: Number of neighbours that define the balls of density and coverage.
        rows: Number of rows of a tile, which takes 8 rows max(n, m) bytes.

    Raises:
        UsageError: The dimensions differ, a value is NaN or infinite, or there are fewer than k + 1 features.
    """
    if not isinstance(reference, Neighbours):
        reference = Neighbours(reference, max(k_precision, k_density), rows)
    real, narrow, wide = reference.features, reference.radii(k_precision), reference.radii(k_density)
    features = generated.features if isinstance(generated, Neighbours) else generated
    check_features(features, real.shape[1], "the generated features")
    if not isinstance(generated, Neighbours):
        generated = Neighbours(generated, k_precision, rows)
    radii = rearrange(generated.radii(k_precision), "n -> n 1")
    precise = dense = 0
    recalled = covered = real.new_zeros(len(real), dtype=torch.bool)
    for distance, radius in zip(distances(features, real, rows), radii.split(rows), strict=True):
        inside = distance <= wide
        precise += int((distance <= narrow).any(1).sum())
        dense += int(inside.sum())
        recalled = recalled | (distance <= radius).any(0)
        covered = covered | inside.any(0)
    n, m = len(features), len(real)
    return Manifold(precise / n, int(recalled.sum()) / m, dense / (n * k_density), int(covered.sum()) / m)
