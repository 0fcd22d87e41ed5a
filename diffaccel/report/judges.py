"""Points as several judges see them, one judge at a time.

A point that several judges scored has the results of each under ``judges``, and those of the first at the top, where a
point with one judge has them. See :func:`diffaccel.evaluation.judges.judgements`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from diffaccel.parts.catalogue import names_of
from diffaccel.report.points import Point


def judges_of(point: Point) -> list[str]:
    """Return the names of a point's judges, the first one first; empty for a point without an extractor's name."""
    if isinstance(judges := point.get("judges"), Mapping) and judges:
        return [str(name) for name in judges]
    extractor = point.get("extractor")
    name = extractor.get("name") if isinstance(extractor, Mapping) else None
    return [name] if isinstance(name, str) else []


def seen_by(point: Point, judge: str) -> dict[str, Any]:
    """Return a point with the results of a judge at the top; unchanged if the judge did not score it."""
    judges = point.get("judges")
    own = judges.get(judge) if isinstance(judges, Mapping) else None
    return {**point, **own} if isinstance(own, Mapping) else dict(point)


def common_judges(points: Sequence[Point]) -> list[str]:
    """Return the names of the judges of all points, in the order of the first point."""
    if not points:
        return []
    others = [set(judges_of(point)) for point in points[1:]]
    return [name for name in judges_of(points[0]) if all(name in names for names in others)]


def is_published(judge: str) -> bool:
    """Whether a judge is a built-in extractor, at any resolution, and not a classifier that was trained here."""
    return any(judge == name or judge.startswith(f"{name}_") for name in names_of("extractor"))


def features_name(key: str, extractor: str, first: bool) -> str:
    """Name of the file with the features of a point.

    Args:
        key: Key of the point.
        extractor: Hash of the extractor.
        first: Whether the extractor is that of the point's first judge.
    """
    return f"{key}.npy" if first else f"{key}.{extractor[:12]}.npy"


def features_of(point: Point) -> str:
    """Name of the file with a normalised point's features, in the extractor at the top of the point."""
    extractor, judges = point["extractor"], judges_of(point)
    return features_name(str(point["key"]), str(extractor["sha256"]), extractor["name"] in (None, *judges[:1]))
