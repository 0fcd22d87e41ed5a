"""Metrics of held-out real images, which show what a metric of generated images means."""

from collections.abc import Sequence
from typing import NamedTuple

from diffaccel.report.points import Point
from diffaccel.text.terminal import number


class Floor(NamedTuple):
    """Frechet distance of held-out images to the training images.

    Attributes:
        value: Distance.
        n: Number of held-out images; None if unknown.
    """

    value: float
    n: int | None = None

    @property
    def label(self) -> str:
        """Name of the images, with their number."""
        return "held-out real images" if self.n is None else f"{number(self.n, 12)} held-out real images"


def floor_of(points: Sequence[Point], key: str) -> Floor | None:
    """Return the floor of normalised points; None without one, or if the points have those of several sets of images.

    Args:
        points: Normalised points of one judge.
        key: Key of the Frechet distance.
    """
    found = {}
    for point in points:
        if (value := point["metrics"].get(f"{key}_floor")) is not None:
            images = point["floor"] or {}
            found[images.get("n"), images.get("sha256")] = Floor(value, images.get("n"))
    return next(iter(found.values())) if len(found) == 1 else None


def floor_lines(points: Sequence[Point], key: str, names: Sequence[str]) -> list[str]:
    """Return a line with the floor and other metrics of held-out images; none without a floor.

    The number of images is that of the Frechet distance. Other metrics are of fewer images, whose features are kept.

    Args:
        points: Normalised points of one judge.
        key: Key of the Frechet distance.
        names: Names of other metrics. Those that are unknown, or differ between the points, are left out.
    """
    floor = floor_of(points, key)
    if floor is None:
        return []
    shown = {name: {text for point in points if (text := _text(point, name)) != "-"} for name in names}
    others = [f"{name} {texts.pop()}" for name, texts in shown.items() if len(texts) == 1]
    line = f"floor: {floor.label} are at {key} {number(floor.value)}"
    return ["; other metrics of held-out images: ".join([line, *([", ".join(others)] if others else [])])]


def _text(point: Point, name: str) -> str:
    """Metric of held-out images as text; a dash if it is unknown."""
    metrics = point["metrics"]
    return number(metrics.get(f"{name}_floor", metrics.get(f"{name}_real")))
