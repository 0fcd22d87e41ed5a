"""Statistics of features in files of other programs: ``mu`` and ``sigma`` of EDM, pytorch-fid and ADM.

Such a file has mean and covariance only, and names neither the feature network nor the number of images. The Frechet
distance is the only metric that it allows.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from diffaccel.data.given import kind_of
from diffaccel.data.npz import ArrayFile
from diffaccel.errors import UsageError
from diffaccel.metrics.moments import Moments
from diffaccel.metrics.reference import Reference, read_reference

MEAN, COVARIANCE = "mu", "sigma"
OWN = "provenance"
"""Array that only the files of ``diffaccel reference`` have."""
IMAGES = ("images", "arr_0")
ASYMMETRY = 1e-3
"""Maximum asymmetry of a covariance, relative to its largest value; that of rounding in float32 is much smaller."""


class Statistics(Reference):
    """Moments from a file of another program; their number of images is 0, which means unknown."""

    @override
    def _arrays(self) -> dict[str, Any]:
        return {MEAN: self.moments.mean.numpy(), COVARIANCE: self.moments.covariance.numpy()}


def read_any(path: str, prefer_images: bool = False) -> Reference | None:
    """Read statistics of ``diffaccel reference`` or of another program; None for a path that contains images.

    Args:
        path: Path of any kind.
        prefer_images: Whether a file with both, such as ADM's reference batches, counts as images.

    Raises:
        UsageError: The path does not exist, or the file is damaged.
    """
    if kind_of(path) != "npz":
        return None
    names = set(ArrayFile(path).names)
    if OWN in names:
        return read_reference(path)
    if not {MEAN, COVARIANCE} <= names or (prefer_images and names.intersection(IMAGES)):
        return None
    return read_statistics(path)


def read_statistics(path: str) -> Statistics:
    """Read the arrays ``mu`` (d,) and ``sigma`` (d, d) of an npz file.

    Raises:
        UsageError: The file is damaged, or the arrays are not a mean and a covariance.
    """
    file = ArrayFile(path)
    mean, covariance = file.read(MEAN), file.read(COVARIANCE)
    if mean.ndim != 1 or not mean.size or covariance.shape != 2 * mean.shape:
        raise UsageError(
            f"{file.where}: {MEAN!r} has shape {mean.shape} and {COVARIANCE!r} {covariance.shape}: save (d,) and (d, d)"
        )
    for name, array in ((MEAN, mean), (COVARIANCE, covariance)):
        if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise UsageError(f"{file.where}: {name!r} ({array.dtype}) has values that are not finite numbers")
    if np.abs(covariance - covariance.T).max() > ASYMMETRY * np.abs(covariance).max():
        raise UsageError(f"{file.where}: {COVARIANCE!r} is not symmetric, and so no covariance: save np.cov's result")
    if (np.diag(covariance) < 0).any():
        raise UsageError(f"{file.where}: {COVARIANCE!r} has negative variances: save np.cov's result")
    moments = Moments(0, *(torch.from_numpy(array.astype(np.float64)) for array in (mean, covariance)))
    provenance = {"label": Path(path).name, "split": None, "unread": sorted({*file.names} - {MEAN, COVARIANCE})}
    return Statistics(moments, torch.zeros(0, moments.dim, dtype=torch.float16), provenance)
