"""What a metric is: named values of a point's generated images beside real ones.

A metric is a part like a solver: registered with :data:`METRICS`, or by an entry point of the group
``diffaccel.metrics``, it is computed by every bench whose key ``metrics`` names it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from diffaccel.errors import UsageError
from diffaccel.metrics.frechet import FrechetDistance
from diffaccel.metrics.kernel import KernelReference
from diffaccel.metrics.manifold import Manifold, manifold_scores
from diffaccel.metrics.moments import Moments
from diffaccel.metrics.neighbours import Neighbours
from diffaccel.metrics.reference import Reference
from diffaccel.parts.registry import Registry

METRICS: Registry["Metric"] = Registry("metric", builtins=["diffaccel.metrics.standard"])


@dataclass(frozen=True)
class Made:
    """Features of a point's generated images; the same on every rank.

    Attributes:
        n: Number of images.
        features: Of the first of them, at most 10,000, in order, (m, d) float32.
        sums: Sums over all n images in jackknife blocks; its ``compute`` is collective.
        distance: Key of the Frechet distance in these features, ``fid`` or ``fd_<extractor>``.
    """

    n: int
    features: Tensor
    sums: FrechetDistance
    distance: str

    def moments(self) -> Moments:
        """Mean and covariance of all n images' features; collective."""
        with self.sums.sync_context(dist_sync_fn=self.sums.dist_sync_fn):
            return self.sums.moments()


class Real:
    """Real images that points are compared with, and what all points share of their evaluation.

    Args:
        reference: Training images.
        floor: Held-out images, for the value beside each metric; or None.

    Attributes:
        features: Of training images, (m, d) float32.
        held_out: Of held-out images, (h, d) float32; empty without them.
        kernel: Training images for the kernel distance; None for fewer than two.
    """

    def __init__(self, reference: Reference, floor: Reference | None) -> None:
        self.reference, self.floor = reference, floor
        self.features = reference.features.float()
        self.held_out = floor.features.float() if floor else self.features[:0]
        self.kernel = KernelReference(self.features) if len(self.features) >= 2 else None
        self._manifolds: dict[int, tuple[Neighbours, Manifold | None]] = {}

    def manifold(self, m: int) -> tuple[Neighbours, Manifold | None]:
        """Neighbourhoods of m training images, and the scores of as many held-out ones among them."""
        if m not in self._manifolds:
            neighbours = Neighbours(spread(self.features, m))
            held_out = manifold_scores(spread(self.held_out, m), neighbours) if len(self.held_out) >= m else None
            self._manifolds[m] = neighbours, held_out
        return self._manifolds[m]


def spread(rows: Tensor, m: int) -> Tensor:
    """Take m rows, evenly spread over all."""
    return rows[torch.linspace(0, len(rows) - 1, m, dtype=torch.float64).round().long()]


@METRICS.base
class Metric(ABC):
    """A score of generated images; its constructor's parameters are its keys.

    Attributes:
        in_training: Whether the evaluations during training, and those of a search, compute it too.
    """

    in_training: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, made: Made, real: Real) -> Mapping[str, float]:
        """Compute named values, for the ``metrics`` of a point.

        Every rank calls it once, after the features have been gathered. A value that can't be computed, from too few
        images for example, is left out.
        """

    def details(self, made: Made, real: Real) -> Mapping[str, Any]:
        """Compute what is not a number, for keys of the point itself; plain JSON."""
        return {}


class Measured(NamedTuple):
    """Results of all metrics of a point.

    Attributes:
        values: For the ``metrics`` of the point.
        details: For keys of the point itself.
    """

    values: dict[str, float]
    details: dict[str, Any]


def build_metrics(nodes: Iterable[Mapping[str, Any] | str]) -> list[Metric]:
    """Build metrics from their names, or from mappings of a ``name`` and keys.

    Raises:
        UsageError: An unknown metric or key, or no ``frechet``, which tables and curves are drawn from.
    """
    nodes = list(nodes)
    for node in nodes:
        if not isinstance(node, str | Mapping):
            raise UsageError(f"metrics: {node!r} is no metric: give a name, or a mapping with a name")
    if not {"frechet"} & {node if isinstance(node, str) else node.get("name") for node in nodes}:
        raise UsageError("metrics: add 'frechet', the distance that tables and curves show")
    return [METRICS.build(node) for node in nodes]


def measure(metrics: Iterable[Metric], made: Made, real: Real, in_training: bool = False) -> Measured:
    """Compute metrics, in order; collective.

    Args:
        metrics: The metrics.
        made: Generated images.
        real: Real images.
        in_training: Whether to leave out those that are not for evaluations during training.

    Raises:
        UsageError: Two metrics give a value of the same name.
    """
    values: dict[str, float] = {}
    details: dict[str, Any] = {}
    for metric in metrics:
        if in_training and not metric.in_training:
            continue
        for found, own in ((values, metric(made, real)), (details, metric.details(made, real))):
            if twice := sorted(found.keys() & own.keys()):
                raise UsageError(f"two metrics give {twice[0]!r}, one of them {type(metric).__name__}: remove one")
            found.update(own)
    return Measured({name: float(value) for name, value in values.items()}, details)
