"""Reference statistics of a data set in the features of one extractor, kept in an npz file with their provenance.

The file holds the moments of a whole split (for the Frechet distance) and float16 features of some of its images (for
the kernel distance). The moments are float64. Above 512 features the covariance is rounded to float32 and only its
upper triangle is stored, which is a quarter of the size: 3.3 MB at 1,280 features. Libraries that cache such statistics
by name alone hand out old numbers once the data or the weights behind the name change; here the extractor's hash is
checked and the content has a hash of its own.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from diffaccel.collective import failing_together
from diffaccel.data.npz import ArrayFile
from diffaccel.errors import UsageError
from diffaccel.features.extractors import Extractor
from diffaccel.metrics import Moments, MomentSums, check_features
from diffaccel.version import __version__

REMEDY = "compute it with `diffaccel reference EXPERIMENT`, and set reference= (or floor=) to the new file"
FLOAT16_MAX = torch.finfo(torch.float16).max
PACKED_ABOVE = 512
"""Number of features above which the covariance is stored as an upper triangle in float32."""
TRIANGLE = "upper triangle, float32"
"""Value of ``covariance`` in the provenance of such a file."""


class Splits(Protocol):
    """Interface of the data module: name, label and limit of the data, and its images in a fixed order."""

    limit: int | None

    @property
    def name(self) -> str:
        """Name of the data set."""

    @property
    def label(self) -> str:
        """Label of the data set in tables."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of an image, (C, H, W)."""

    def batches(
        self, split: str, batch_size: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Yield global index, images (n, C, H, W) and labels of each batch of a rank; batch b is on rank b % world."""


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of real images that generated images are compared with.

    Attributes:
        moments: Moments of the features of all images of the split.
        features: Features of images evenly spaced over the split, (m, dim) float16.
        provenance: Origin of the statistics: ``data``, ``label``, ``split``, ``n``, ``limit``, ``shape``, ``extractor``
            (``name``, ``sha256``, ``dim``), ``order``, ``version`` and, if it is packed, ``covariance``.
        labels: Class labels of the images of ``features``, (m,) int64, for the metric ``accuracy``; None without.
    """

    moments: Moments
    features: Tensor
    provenance: dict[str, Any]
    labels: Tensor | None = None

    def moments_of(self, n: int) -> Moments:
        """Compute the moments of n images evenly spaced over the split.

        All images are used if n is not less than their number, or if the features of fewer than n images are kept. The
        kept features are float16, which changes a distance by less than its standard error.
        """
        chosen = self.features_of(n)
        return self.moments if chosen is None else Moments.from_features(chosen)

    def features_of(self, n: int) -> Tensor | None:
        """Return the features of n images evenly spaced over the split; None if those of fewer images are kept."""
        if n >= self.moments.n or n > len(self.features):
            return None
        return self.features[torch.linspace(0, len(self.features) - 1, n, dtype=torch.float64).round().long()]

    @cached_property
    def sha256(self) -> str:
        """Hash of the statistics, equal before saving and after loading, and for a file with or without labels."""
        digest = hashlib.sha256()
        for name, array in self._arrays().items():
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the file atomically; missing folders are created."""
        save_references({Path(path): self})

    def _arrays(self) -> dict[str, Any]:
        packed = self.provenance.get("covariance") == TRIANGLE
        return {
            "n": np.array(self.moments.n, dtype=np.int64),
            "mean": self.moments.mean.numpy(),
            "covariance": (_pack(self.moments.covariance) if packed else self.moments.covariance).numpy(),
            "features": self.features.numpy(),
            "provenance": np.array(json.dumps(self.provenance, sort_keys=True)),
        }


def save_references(references: Mapping[Path, Reference]) -> None:
    """Write several files, either all or none; missing folders are created.

    Raises:
        UsageError: A file can't be written; existing files are unchanged.
    """
    parts = {path: path.with_name(f"{path.name}.{os.getpid()}.part") for path in references}
    olds = {path: path.with_name(f"{path.name}.{os.getpid()}.old") for path in references if path.exists()}
    try:
        for path, part in parts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                arrays, labels = references[path]._arrays(), references[path].labels
                if labels is not None:
                    arrays["labels"] = labels.numpy().astype(np.int32)
                np.savez_compressed(file, **arrays)
        for path, old in olds.items():
            path.replace(old)
        for path, part in parts.items():
            part.replace(path)
    except BaseException as error:
        for path, part in parts.items():
            if path not in olds or olds[path].exists():
                path.unlink(missing_ok=True)
            part.unlink(missing_ok=True)
        for path, old in olds.items():
            if old.exists():
                old.replace(path)
        if isinstance(error, OSError):
            raise UsageError(f"{error.filename or path} can't be written ({error.strerror})") from None
        raise
    for old in olds.values():
        old.unlink()


def compute_reference(
    data: Splits, split: str, extractor: Extractor, batch_size: int = 250, keep: int = 10_000
) -> Reference:
    """Compute the statistics of a split in the features of one extractor; see :func:`compute_references`."""
    (found,) = compute_references(data, split, [extractor], batch_size, keep)
    return found


@torch.no_grad()
def compute_references(
    data: Splits, split: str, extractors: Sequence[Extractor], batch_size: int = 250, keep: int = 10_000
) -> list[Reference]:
    """Compute the statistics of a split in the features of several extractors, in one pass, distributed over all ranks.

    Each rank processes its own batches, and all ranks return the same references. They are bit-identical for 1, 2, 4 or
    8 ranks with the same number of threads each, and equal up to rounding otherwise.

    Args:
        data: Data module.
        split: Name of the split, ``train`` or ``test``.
        extractors: Feature extractors.
        batch_size: Number of images per batch.
        keep: Maximum number of images whose features are kept. These are evenly spaced over the split, because folders
            are sorted by class.

    Returns:
        Statistics in the order of the extractors.

    Raises:
        UsageError: A feature is not finite or exceeds float16, or there are fewer than two images.
    """
    parallel = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)
    passes = [_Pass(extractor) for extractor in extractors]
    with failing_together():
        for index, images, labels in data.batches(split, batch_size, rank, world):
            for one in passes:
                one.add(index, images, labels)
    return [one.reference(data, split, keep, world) for one in passes]


class _Pass:
    """Features of a split in one extractor."""

    def __init__(self, extractor: Extractor) -> None:
        self.extractor = extractor
        self.sums = MomentSums(extractor.dim, blocks=8)
        self.kept: dict[int, tuple[Tensor, Tensor | None]] = {}

    def add(self, index: int, images: Tensor, labels: Tensor | None = None) -> None:
        features = self.extractor(images.to(self.extractor.device)).cpu()
        self.sums.update(features, index)
        if features.abs().max() > FLOAT16_MAX:
            raise UsageError(f"features of batch {index} exceed {FLOAT16_MAX:.0f}: scale them in the extractor")
        self.kept[index] = features.half(), labels

    def reference(self, data: Splits, split: str, keep: int, world: int) -> Reference:
        """Gather the features of all ranks; collective."""
        kept, extractor = self.kept, self.extractor
        if world > 1:
            shares = [kept] * world
            dist.all_gather_object(shares, kept)
            kept = {index: features for share in shares for index, features in share.items()}
        moments = self.sums.compute()
        features = torch.cat([kept[index][0] for index in sorted(kept)])
        labels = [own for index in sorted(kept) if (own := kept[index][1]) is not None]
        chosen = torch.linspace(0, moments.n - 1, min(keep, moments.n), dtype=torch.float64).round().long()
        provenance = {
            "data": data.name,
            "label": data.label,
            "split": split,
            "n": moments.n,
            "limit": data.limit,
            "shape": list(data.shape),
            "extractor": {"name": extractor.name, "sha256": extractor.sha256, "dim": extractor.dim},
            "order": "features evenly spread over the split",
            "version": __version__,
        }
        if extractor.dim > PACKED_ABOVE:
            provenance["covariance"] = TRIANGLE
            moments = Moments(moments.n, moments.mean, _unpack(_pack(moments.covariance), extractor.dim))
        return Reference(moments, features[chosen], provenance, torch.cat(labels)[chosen] if labels else None)


def _pack(covariance: Tensor) -> Tensor:
    """Return the upper triangle of a symmetric matrix (d, d) row by row, (d (d + 1) / 2,) float32."""
    rows, columns = torch.triu_indices(*covariance.shape)
    return covariance[rows, columns].float()


def _unpack(triangle: Tensor, dim: int) -> Tensor:
    """Return the symmetric matrix of an upper triangle, (d, d) float64.

    Raises:
        ValueError: The triangle has another number of values.
    """
    if triangle.shape != (dim * (dim + 1) // 2,):
        raise ValueError(f"the triangle has shape {tuple(triangle.shape)}, but there are {dim} features")
    rows, columns = torch.triu_indices(dim, dim)
    found = torch.zeros(dim, dim, dtype=torch.float64)
    found[rows, columns] = found[columns, rows] = triangle.double()
    return found


def file_of(files: Any, judge: str) -> str | None:
    """Return the file of statistics for a judge.

    Args:
        files: File for a single judge, or mapping of names of judges to files; None for no file.
        judge: Name of the judge.
    """
    return files.get(judge) if isinstance(files, Mapping) else files


def load_reference(path: str | Path, extractor: Extractor) -> Reference:
    """Read a reference and check that it was computed with the extractor.

    Raises:
        UsageError: The file is missing, damaged, or was computed with another extractor.
    """
    reference = read_reference(path)
    made_with = {key: reference.provenance["extractor"][key] for key in ("name", "sha256", "dim")}
    wanted = {"name": extractor.name, "sha256": extractor.sha256, "dim": extractor.dim}
    if made_with != wanted:
        raise UsageError(
            f"{path} was computed with the extractor {_named(made_with)}, but the run uses {_named(wanted)}: {REMEDY}"
        )
    return reference


def check_same_data(path: str | Path, reference: Reference, label: str, shape: tuple[int, int, int]) -> None:
    """Check that statistics are of the experiment's data.

    Args:
        path: File of the statistics, for the message.
        reference: Statistics.
        label: Label of the experiment's data; a qualifier in brackets, as in "CIFAR-10 (JPEG)", is ignored.
        shape: Shape of the experiment's images, (C, H, W).

    Raises:
        UsageError: The statistics have another label, or are of images of another shape.
    """
    own, theirs = (name.partition(" (")[0] for name in (label, str(reference.provenance["label"])))
    if own != theirs:
        raise UsageError(
            f"{path} contains statistics of {theirs!r}, but the experiment's data are {own!r}: compute statistics of "
            "these with `diffaccel reference` and set reference= and floor=, or, if the data are the same, set "
            f"data.label={theirs!r}"
        )
    if (made := reference.provenance.get("shape")) is not None and tuple(made) != shape:
        raise UsageError(
            f"{path} contains statistics of images of shape {tuple(made)}, but the experiment's images have shape "
            f"{shape}: compute other statistics with `diffaccel reference`, or set shape="
        )


def check_held_out(path: str | Path, floor: Reference | None, reference: Reference) -> None:
    """Check that the statistics for a floor are not those of training images.

    Args:
        path: File of the floor, for the message.
        floor: Statistics for the floor; None for no floor.
        reference: Statistics of training images.

    Raises:
        UsageError: They are of the training split, as far as the file states it, or equal the reference.
    """
    if floor is not None and (floor.provenance.get("split") == "train" or floor.sha256 == reference.sha256):
        raise UsageError(
            f"floor={path} contains statistics of training images, and a floor those of held-out images: give the "
            "floor.npz of `diffaccel reference`, which it computes from data.test_path= or data.test_share="
        )


def read_reference(path: str | Path) -> Reference:
    """Read a reference computed with any extractor.

    Raises:
        UsageError: The file is missing or damaged.
    """
    if not Path(path).is_file():
        raise UsageError(f"there are no reference statistics at {path}: {REMEDY}")
    try:
        file = ArrayFile(str(path))
        if missing := {"n", "mean", "covariance", "features", "provenance"} - set(file.names):
            raise LookupError(f"no array {min(missing)!r}")
        n, mean, covariance, features = (file.read(key) for key in ("n", "mean", "covariance", "features"))
        provenance = json.loads(str(file.read("provenance")))
        made_with = {key: provenance["extractor"][key] for key in ("name", "sha256", "dim")}
        matrix = torch.from_numpy(covariance)
        if provenance.get("covariance") == TRIANGLE:
            matrix = _unpack(matrix, len(mean))
        reference = Reference(
            Moments(int(n), torch.from_numpy(mean), matrix),
            torch.from_numpy(features),
            provenance,
            torch.from_numpy(file.read("labels").astype(np.int64)) if "labels" in file.names else None,
        )
    except (UsageError, LookupError, TypeError, ValueError, RecursionError, OverflowError) as error:
        reason = str(error) if isinstance(error, UsageError) else f"{error!r:.100}"
        raise UsageError(f"{path} is not a complete reference ({reason}): {REMEDY}") from None
    _check_shapes(reference, int(made_with["dim"]), str(path))
    return reference


def _named(extractor: dict[str, Any]) -> str:
    return f"{extractor['name']} (dim {extractor['dim']}, sha256 {str(extractor['sha256'])[:12]})"


def _check_shapes(reference: Reference, dim: int, path: str) -> None:
    moments, labels = reference.moments, reference.labels
    if labels is not None and (labels.shape != (len(reference.features),) or (labels < 0).any()):
        raise UsageError(f"{path}: the labels are not one class number of each feature: {REMEDY}")
    if moments.mean.shape != (dim,) or moments.covariance.shape != (dim, dim) or moments.n < 2:
        raise UsageError(f"{path}: the moments are not of {dim} features of at least 2 images: {REMEDY}")
    for what, values in (
        ("mean", moments.mean[None]),
        ("covariance", moments.covariance),
        ("features", reference.features),
    ):
        check_features(values, dim, f"{path}: the reference's {what}")
