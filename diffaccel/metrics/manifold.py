"""Fidelity and diversity apart: precision and recall, density and coverage.

With B_k(x) the ball about x that reaches to its k-th nearest neighbour in its own set, generated x_i and real y_j:

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
    """What of the generated lies among the real, and of the real among the generated; all in [0, 1] but the density."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_scores(
    generated: Tensor, reference: Tensor | Neighbours, k_precision: int = 3, k_density: int = 5, rows: int = 1024
) -> Manifold:
    """Compare the neighbourhoods of generated and real features.

    Not even real images score 1: for two sets of n from one distribution density is 1 on average and coverage about
    1 - 2^-k (0.97), but precision and recall fall with the dimension (0.6 at d = 64, n = 2000). So print beside them
    what held-out real images get in the place of the generated ones.

    The numbers of features may differ, yet only scores at the same two numbers compare: more of one set make its balls
    smaller, more generated ones fill more of the real balls. Take as many real ones as generated, as the papers do.

    Time goes as (n + m)^2 d; memory holds one tile of distances and both sets in float64.

    Args:
        generated: Features of generated images, (n, d); or of held-out real ones, for the value beside.
        reference: Features of real images, (m, d), on the same device; ``Neighbours`` saves finding theirs again.
        k_precision: Neighbours that make the balls of precision and recall.
        k_density: Neighbours that make those of density and coverage.
        rows: Rows of a tile, which takes 8 rows max(n, m) bytes.

    Raises:
        UsageError: Dimensions that differ, a value that is NaN or infinite, fewer than k + 1 features.
    """
    if not isinstance(reference, Neighbours):
        reference = Neighbours(reference, max(k_precision, k_density), rows)
    real, narrow, wide = reference.features, reference.radii(k_precision), reference.radii(k_density)
    check_features(generated, real.shape[1], "the generated features")
    radii = rearrange(Neighbours(generated, k_precision, rows).radii(k_precision), "n -> n 1")
    precise = dense = 0
    recalled = covered = real.new_zeros(len(real), dtype=torch.bool)
    for distance, radius in zip(distances(generated, real, rows), radii.split(rows), strict=True):
        inside = distance <= wide
        precise += int((distance <= narrow).any(1).sum())
        dense += int(inside.sum())
        recalled = recalled | (distance <= radius).any(0)
        covered = covered | inside.any(0)
    n, m = len(generated), len(real)
    return Manifold(precise / n, int(recalled.sum()) / m, dense / (n * k_density), int(covered.sum()) / m)
