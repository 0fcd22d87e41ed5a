"""Distances between features, tile by tile, and nearest neighbours."""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffaccel.errors import UsageError
from diffaccel.metrics.moments import check_features

SPARE = 8
"""Number of additional candidates, so that rounding rarely hides a neighbour."""
ROUNDING = 1e-12
"""Bound on the error of a squared distance computed by a matrix product, relative to the squared norms."""


def distances(x: Tensor, y: Tensor, rows: int = 1024) -> Iterator[Tensor]:
    """Yield the Euclidean distances of all rows of x to all rows of y, tile by tile.

    The differences are squared and summed in float64, because |x|^2 + |y|^2 - 2 x.y loses the distance of near
    duplicates to cancellation. The distance of a pair is bit-identical in any tile and in either order, so that copies
    have distance zero and ties remain ties.

    Args:
        x: Features, (n, d).
        y: Features, (m, d), on the same device.
        rows: Number of rows of a tile, which takes 8 rows m bytes.

    Yields:
        Distances of the next rows of x, (rows, m) float64; the last tile may have fewer rows.
    """
    y = y.double()
    for some in x.split(rows):
        yield torch.cdist(some.double(), y, compute_mode="donot_use_mm_for_euclid_dist")


def smallest(x: Tensor, y: Tensor, k: int, rows: int = 1024) -> tuple[Tensor, Tensor]:
    """Find the k nearest rows of y to each row of x, with distances bit-identical to those of :func:`distances`.

    A matrix product, which is several times faster, selects slightly more than k candidates, whose distances are then
    computed exactly. If rounding may have hidden a neighbour, as among many near duplicates, all distances of the row
    are computed exactly.

    Args:
        x: Features, (n, d).
        y: Features, (m, d), m >= k.
        k: Number of neighbours.
        rows: Number of rows of a tile, which takes 8 rows m bytes.

    Returns:
        Distances (n, k) float64, the smallest first, and indices of the neighbours in y, (n, k) int64.
    """
    y = y.double()
    squares, found = y.square().sum(1), []
    for some in x.double().split(rows):
        own = some.square().sum(1)
        tile = torch.addmm(squares, some, y.T, alpha=-2)  # squared distances without |x|^2, equal in a row
        values, candidates = tile.topk(min(k + SPARE, len(y)), largest=False)
        candidates = candidates.sort(1).values  # of equal distances the first counts
        exact = torch.cdist(some[:, None], y[candidates], compute_mode="donot_use_mm_for_euclid_dist")[:, 0]
        order = exact.sort(dim=1, stable=True)
        distance, index = order.values[:, :k], candidates.gather(1, order.indices[:, :k])
        if candidates.shape[1] < len(y):
            hidden = values[:, -1] + own - ROUNDING * (own + squares.max()) <= distance[:, -1].square()
            if hidden.any():
                (whole,) = distances(some[hidden], y, len(some))
                order = whole.sort(dim=1, stable=True)
                distance[hidden], index[hidden] = order.values[:, :k], order.indices[:, :k]
        found.append((distance, index))
    return torch.cat([distance for distance, _ in found]), torch.cat([index for _, index in found])


def nearest(x: Tensor, y: Tensor, rows: int = 1024) -> tuple[Tensor, Tensor]:
    """Find the nearest row of y (m, d) to each row of x (n, d): distances (n,) float64 and indices (n,) int64."""
    distance, index = smallest(x, y, 1, rows)
    return distance[:, 0], index[:, 0]


class Neighbours:
    """Features with the distances to their nearest neighbours, for sets that are used in several comparisons.

    Args:
        features: Features, (n, d), n > k.
        k: Number of neighbours; a copy of a feature is a neighbour, the feature itself is not.
        rows: Number of rows of a tile.

    Raises:
        UsageError: There are fewer than k + 1 features, k < 1, or a value is NaN or infinite.
    """

    def __init__(self, features: Tensor, k: int = 5, rows: int = 1024) -> None:
        check_features(features, features.shape[-1], "the features")
        if not 1 <= k < len(features):
            raise UsageError(
                f"{len(features)} features are too few for k={k} neighbours: k + 1 or more and k >= 1 are required"
            )
        self.features = features.detach()
        self._nearest = smallest(features, features, k + 1, rows)[0][:, 1:]  # the nearest of all is the feature itself

    def radii(self, k: int) -> Tensor:
        """Return the distance of each feature to its k-th nearest neighbour, (n,) float64.

        Raises:
            UsageError: k is not between 1 and the number of neighbours of the constructor.
        """
        if not 1 <= k <= self._nearest.shape[1]:
            raise UsageError(
                f"only {self._nearest.shape[1]} neighbours are available, not {k}: use Neighbours(..., k={k})"
            )
        return self._nearest[:, k - 1]
