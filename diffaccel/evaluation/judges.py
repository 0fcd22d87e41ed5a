"""Judges: feature extractors with the statistics that they compare images with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffaccel.evaluation.point import describe_judges
from diffaccel.evaluation.scores import Scores
from diffaccel.features.extractors import Extractor
from diffaccel.metrics.base import Metric, Real, measure


@dataclass(frozen=True, eq=False)
class Judge:
    """Feature extractor with the statistics of real images in its features.

    Attributes:
        extractor: Feature extractor.
        real: Statistics of training and held-out images.
    """

    extractor: Extractor
    real: Real

    @property
    def name(self) -> str:
        """Name of the extractor."""
        return self.extractor.name

    def identity(self, labels: bool = False) -> dict[str, Any]:
        """Return the hashes that determine the metrics of given images, with ``labels`` also those that use classes."""
        return {"extractor": self.extractor.sha256, **self.real.identity(labels)}


def further(judges: Sequence[Judge]) -> dict[str, Real]:
    """Return the statistics of all judges but the first, by the hash of the extractor, for :class:`Scores`."""
    return {judge.extractor.sha256: judge.real for judge in judges[1:]}


def judgements(
    judges: Sequence[Judge], scores: Scores, metrics: Sequence[Metric], in_training: bool = False
) -> dict[str, Any]:
    """Compute the metrics of all judges, as keys of a point; collective.

    The first judge's results have the keys of a point with one judge: ``metrics``, ``extractor``, ``reference``,
    ``floor`` and details such as ``memorisation``. Readers of such points therefore read points of several judges too.
    With several judges, ``judges`` contains these keys for each of them, the first included, by name in order. Every
    metric has the same name for every judge, so that a reader replaces the keys of the point by those of a judge to see
    the point through its features (:func:`diffaccel.report.judges.seen_by`). Suffixes, as in ``kid_mobilenetv2``, would
    be ambiguous, because metrics and judges of packages may have any names.

    Args:
        judges: Judges, in the order of ``scores``.
        scores: Sums of all ranks, after ``reduce``.
        metrics: Metrics.
        in_training: Whether to compute only the metrics for evaluations during training.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for number, judge in enumerate(judges):
        made = scores.made(judge.extractor.metric_name, number)
        measured = measure(metrics, made, judge.real, in_training)
        described = describe_judges(judge.extractor, judge.real, scores.n)
        found[judge.name] = {"metrics": measured.values, **measured.details, **described}
    first = found[judges[0].name]
    return {**first, "judges": found} if len(judges) > 1 else dict(first)
