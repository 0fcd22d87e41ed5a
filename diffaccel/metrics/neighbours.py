"""Distances between features, a tile of rows at a time, and the nearest neighbours that they give."""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffaccel.errors import UsageError
from diffaccel.metrics.moments import check_features

SPARE = 8
"""Candidates beyond those asked for, so that rounding seldom hides one."""
ROUNDING = 1e-12
"""Bound on the error of a squared distance by a matrix product, over the squared norms."""


def distances(x: Tensor, y: Tensor, rows: int = 1024) -> Iterator[Tensor]:
    """Yield the Euclidean distances of some rows of x to all of y, from the first rows of x to the last.

    The differences themselves are squared and summed, in float64: |x|^2 + |y|^2 - 2 x.y would lose the distance of
    near duplicates to cancellation. A pair's distance is also the same to the last bit in any tile and either order, so
    that copies are at zero and ties stay ties.

    Args:
        x: (n, d).
        y: (m, d), on the same device.
        rows: Rows of a tile, which takes 8 rows m bytes.

    Yields:
        Distances (rows, m) float64; the last tile may have fewer rows.
    """
    y = y.double()
    for some in x.split(rows):
        yield torch.cdist(some.double(), y, compute_mode="donot_use_mm_for_euclid_dist")


def smallest(x: Tensor, y: Tensor, k: int, rows: int = 1024) -> tuple[Tensor, Tensor]:
    """Find the k nearest of y to each of x by the distances that :func:`distances` gives, to the last bit.

    A matrix product, several times faster, names a few more than k candidates, whose distances are then taken exactly.
    Rows in which its rounding could have hidden one of the k, among many near duplicates, are taken exactly as a whole.

    Args:
        x: (n, d).
        y: (m, d), m >= k.
        k: Number of neighbours.
        rows: Rows of a tile, which takes 8 rows m bytes.

    Returns:
        Distances (n, k) float64, the smallest first, and which of y they belong to, (n, k) int64.
    """
    y = y.double()
    squares, found = y.square().sum(1), []
    for some in x.double().split(rows):
        own = some.square().sum(1, keepdim=True)
        tile = (some @ y.T).mul_(-2).add_(squares).add_(own)
        values, candidates = tile.topk(min(k + SPARE, len(y)), largest=False)
        candidates = candidates.sort(1).values  # of equal ones the first counts
        exact = torch.cdist(some[:, None], y[candidates], compute_mode="donot_use_mm_for_euclid_dist")[:, 0]
        order = exact.sort(dim=1, stable=True)
        distance, index = order.values[:, :k], candidates.gather(1, order.indices[:, :k])
        if candidates.shape[1] < len(y):
            hidden = values[:, -1] - ROUNDING * (own[:, 0] + squares.max()) <= distance[:, -1].square()
            if hidden.any():
                (whole,) = distances(some[hidden], y, len(some))
                order = whole.sort(dim=1, stable=True)
                distance[hidden], index[hidden] = order.values[:, :k], order.indices[:, :k]
        found.append((distance, index))
    return torch.cat([distance for distance, _ in found]), torch.cat([index for _, index in found])


def nearest(x: Tensor, y: Tensor, rows: int = 1024) -> tuple[Tensor, Tensor]:
    """Distance of each of x (n, d) to the nearest of y (m, d), (n,) float64, and which one that is, (n,) int64."""
    distance, index = smallest(x, y, 1, rows)
    return distance[:, 0], index[:, 0]


class Neighbours:
    """Features and the distances from each to its nearest others: make one of a set that is compared with often.

    Args:
        features: (n, d), n > k.
        k: Number of neighbours; a feature is none of its own, a copy of it is one.
        rows: Rows of a tile.

    Raises:
        UsageError: Fewer than k + 1 features, k < 1, or a value that is NaN or infinite.
    """

    def __init__(self, features: Tensor, k: int = 5, rows: int = 1024) -> None:
        check_features(features, features.shape[-1], "the features")
        if not 1 <= k < len(features):
            raise UsageError(f"{len(features)} features have no {k} neighbours each: take k >= 1 and k + 1 features")
        self.features = features.detach()
        self._nearest = smallest(features, features, k + 1, rows)[0][:, 1:]  # the nearest of all is the feature itself

    def radii(self, k: int) -> Tensor:
        """Distance from each feature to its k-th nearest other, (n,) float64.

        Raises:
            UsageError: k is not between 1 and the number of neighbours that were looked for.
        """
        if not 1 <= k <= self._nearest.shape[1]:
            raise UsageError(f"{self._nearest.shape[1]} neighbours are known, not {k}: make them with k={k}")
        return self._nearest[:, k - 1]
