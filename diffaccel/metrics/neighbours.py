"""Distances between features, a tile of rows at a time, and the nearest neighbours that they give."""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffaccel.errors import UsageError
from diffaccel.metrics.moments import check_features


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


def nearest(x: Tensor, y: Tensor, rows: int = 1024) -> tuple[Tensor, Tensor]:
    """Distance of each of x (n, d) to the nearest of y (m, d), (n,) float64, and which one that is, (n,) int64."""
    found = [tile.min(dim=1) for tile in distances(x, y, rows)]
    return torch.cat([tile.values for tile in found]), torch.cat([tile.indices for tile in found])


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
        # The nearest of all is the feature itself, at zero.
        self._nearest = torch.cat(
            [tile.topk(k + 1, largest=False).values[:, 1:] for tile in distances(features, features, rows)]
        )

    def radii(self, k: int) -> Tensor:
        """Distance from each feature to its k-th nearest other, (n,) float64.

        Raises:
            UsageError: k is not between 1 and the number of neighbours that were looked for.
        """
        if not 1 <= k <= self._nearest.shape[1]:
            raise UsageError(f"{self._nearest.shape[1]} neighbours are known, not {k}: make them with k={k}")
        return self._nearest[:, k - 1]
