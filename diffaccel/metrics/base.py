"""Base class of the metrics, which compare the generated images of a point with real images.

A metric is a part, like a solver. It is registered with :data:`METRICS` or by an entry point of the group
``diffaccel.metrics``, and computed by every bench whose key ``metrics`` contains its name.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from diffaccel.errors import UsageError
from diffaccel.jackknife import Resampled
from diffaccel.metrics.frechet import FrechetDistance
from diffaccel.metrics.kernel import Kernel, KernelReference, kernel_distance
from diffaccel.metrics.manifold import Manifold, manifold_scores
from diffaccel.metrics.memorisation import copy_threshold
from diffaccel.metrics.moments import Moments
from diffaccel.metrics.neighbours import Neighbours
from diffaccel.metrics.reference import Reference
from diffaccel.metrics.repetition import near_repeats, spacing
from diffaccel.parts.registry import Registry
from diffaccel.weights import tensors_sha256

COMPARED = 5_000
"""Maximum number of images whose neighbourhoods are compared; the time is proportional to its square."""

METRICS: Registry["Metric"] = Registry(
    "metric", builtins=["diffaccel.metrics.standard", "diffaccel.metrics.cmmd", "diffaccel.metrics.accuracy"]
)


@dataclass(frozen=True)
class Made:
    """Features of the generated images of a point, equal on every rank.

    Attributes:
        n: Number of images.
        features: Features of the first images, at most 10,000, in order, (m, d) float32.
        sums: Sums over all n images in jackknife blocks; ``compute`` is collective.
        distance: Key of the Frechet distance of these features, ``fid`` or ``fd_<extractor>``.
        block: Jackknife block of each row of ``features``, (m,) integers, with whole chains in a block; None for
            independent images.
        chains: Number of chains, image i by chain i modulo this number; None for independent images.
        labels: Class that each row of ``features`` was made for, (m,) int64, -1 for no class; None for no classes.
    """

    n: int
    features: Tensor
    sums: FrechetDistance
    distance: str
    block: Tensor | None = None
    chains: int | None = None
    labels: Tensor | None = None
    _neighbours: dict[int, Neighbours] = field(default_factory=dict, init=False, repr=False, compare=False)

    def neighbours(self, m: int) -> Neighbours:
        """Return the neighbourhoods of the first m images, which several metrics share."""
        if m not in self._neighbours:
            self._neighbours[m] = Neighbours(self.features[:m])
        return self._neighbours[m]

    @cached_property
    def resampled(self) -> Resampled:
        """Frechet distances of all images and of parts of them; collective on first use."""
        return self.sums.gathered().resampled()

    def moments(self) -> Moments:
        """Compute mean and covariance of the features of all n images; collective."""
        return self.sums.gathered().moments()


class Real:
    """Statistics of real images, shared by the evaluation of all points.

    Args:
        reference: Statistics of training images.
        floor: Statistics of held-out images, whose metrics are reported for comparison; None for no such images.

    Attributes:
        features: Features of training images, (m, d) float32.
        held_out: Features of held-out images, (h, d) float32; empty without ``floor``.
        kernel: Training images for the kernel distance; None if there are fewer than two.
    """

    def __init__(self, reference: Reference, floor: Reference | None) -> None:
        self.reference, self.floor = reference, floor
        self.features = reference.features.float()
        self.held_out = floor.features.float() if floor else self.features[:0]
        self.kernel = KernelReference(self.features) if len(self.features) >= 2 else None
        self._manifolds: dict[int, tuple[Neighbours, Manifold | None]] = {}
        self._spacings: dict[int, tuple[Tensor | None, float | None]] = {}
        self._kernel_floors: dict[int, Kernel] = {}

    def identity(self, labels: bool) -> dict[str, Any]:
        """Return the hashes that determine the metrics of given features.

        Args:
            labels: Whether a metric uses the class labels, which the hashes of the statistics leave out.
        """
        found: dict[str, Any] = {"reference": self.reference.sha256, "floor": self.floor and self.floor.sha256}
        if labels:
            parts = {"reference": self.reference, "floor": self.floor}
            known = {name: one.labels for name, one in parts.items() if one is not None and one.labels is not None}
            found["labels"] = tensors_sha256(known)
        return found

    def manifold(self, m: int) -> tuple[Neighbours, Manifold | None]:
        """Return the neighbourhoods of m training images, and the scores of m held-out images; None if too few."""
        if m not in self._manifolds:
            neighbours = Neighbours(spread(self.features, m))
            threshold, scores, repeats = spacing(neighbours), None, None
            if len(self.held_out) >= m:
                held_out = Neighbours(spread(self.held_out, m))
                scores = manifold_scores(held_out, neighbours)
                repeats = None if threshold is None else near_repeats(held_out, threshold)
            self._manifolds[m], self._spacings[m] = (neighbours, scores), (threshold, repeats)
        return self._manifolds[m]

    def spacing(self, m: int) -> tuple[Tensor | None, float | None]:
        """Return the distance for near repeats of m images, and those of held-out images; None if there are too few.

        Within this distance, 1 % of m training images have another one.
        """
        self.manifold(m)
        return self._spacings[m]

    def compared(self, made: Made) -> int:
        """Return how many images each of the generated, training and held-out images are compared as neighbours."""
        sizes = [COMPARED, len(made.features), len(self.features)]
        return min(sizes + [len(self.held_out)] * (self.floor is not None))

    def kernel_floor(self, n: int) -> Kernel | None:
        """Return the kernel distance of n held-out images, or of all if there are fewer; None below four."""
        m = min(n, len(self.held_out))
        if self.kernel is None or m < 4:
            return None
        if m not in self._kernel_floors:
            self._kernel_floors[m] = kernel_distance(spread(self.held_out, m), self.kernel)
        return self._kernel_floors[m]

    @cached_property
    def copy_threshold(self) -> Tensor:
        """Distance within which an image counts as a copy, by at most 5,000 held-out images, () float64."""
        return copy_threshold(self.features, spread(self.held_out, min(COMPARED, len(self.held_out))))


def spread(rows: Tensor, m: int) -> Tensor:
    """Select m evenly spaced rows."""
    return rows[torch.linspace(0, len(rows) - 1, m, dtype=torch.float64).round().long()]


@METRICS.base
class Metric(ABC):
    """Metric of generated images; the parameters of the constructor are its keys.

    Attributes:
        in_training: Whether evaluations during training and during a search compute the metric.
        needs_labels: Whether the metric requires the classes of generated and training images.
        gives_distance: Whether the metric gives the Frechet distance under ``made.distance``, for tables and curves.
    """

    in_training: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    gives_distance: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, made: Made, real: Real) -> Mapping[str, float]:
        """Compute named values for the ``metrics`` of a point.

        Every rank calls this method once, after the features have been gathered. Values that can't be computed, for
        example because there are too few images, are omitted.
        """

    def details(self, made: Made, real: Real) -> Mapping[str, Any]:
        """Compute further results, as plain JSON, for keys of the point."""
        return {}


class Measured(NamedTuple):
    """Results of all metrics of a point.

    Attributes:
        values: Values for the ``metrics`` of the point.
        details: Results for keys of the point.
    """

    values: dict[str, float]
    details: dict[str, Any]


def build_metrics(nodes: Iterable[Mapping[str, Any] | str]) -> list[Metric]:
    """Build metrics from their names, or from mappings of a ``name`` and keys.

    Raises:
        UsageError: A metric or key is unknown, or none gives the Frechet distance (``frechet`` does).
    """
    nodes = list(nodes)
    for node in nodes:
        if not isinstance(node, str | Mapping):
            raise UsageError(f"metrics: {node!r} is not a metric: give a name, or a mapping with a name")
    metrics = [METRICS.build(node) for node in nodes]
    if not any(metric.gives_distance for metric in metrics):
        raise UsageError("metrics: 'frechet' is missing, which tables and curves require: add it")
    return metrics


def measure(metrics: Iterable[Metric], made: Made, real: Real, in_training: bool = False) -> Measured:
    """Compute metrics, in order; collective.

    Args:
        metrics: The metrics.
        made: Generated images.
        real: Real images.
        in_training: Whether to compute only the metrics for evaluations during training.

    Raises:
        UsageError: Two metrics return values with the same name.
    """
    values: dict[str, float] = {}
    details: dict[str, Any] = {}
    for metric in metrics:
        if in_training and not metric.in_training:
            continue
        for found, own in ((values, metric(made, real)), (details, metric.details(made, real))):
            if twice := sorted(found.keys() & own.keys()):
                raise UsageError(
                    f"metrics: {type(metric).__name__} and another metric both return {twice[0]!r}: remove one of them"
                )
            found.update(own)
    return Measured({name: float(value) for name, value in values.items()}, details)
