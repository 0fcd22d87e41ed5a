"""Styles of curves, the same in pictures and pages: a colour for each method, a line and a marker for each solver."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from diffaccel.report.points import Point

# Okabe and Ito's palette for colour-blind readers, without its yellow, which is too light for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DARK_COLOURS = ("#4FB3F6", "#FF8B4D", "#2BD0A0", "#F0A3CB", "#F5BE45", "#A6DAF8", "#FFFFFF")
"""The same hues, lighter, for dark pages."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p")
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 2), (2, 2), (7, 2, 2, 2), (10, 2.5), (4, 1.5, 1, 1.5, 1, 1.5))
"""Lengths of dashes and gaps in line widths; the first is a solid line."""
TINTS = (0.0, 0.35, 0.6, 0.2, 0.5)
"""Fractions of the background that distinguish curves of the same method and solver."""


class Style(NamedTuple):
    """Style of a curve.

    Attributes:
        method: Index of the method, for the colour.
        solver: Index of the solver, for the line and the marker.
        repeat: Index among the curves of the same method and solver, for the tint.
    """

    method: int
    solver: int
    repeat: int

    @property
    def marker(self) -> str:
        """Marker of matplotlib."""
        return MARKERS[self.solver % len(MARKERS)]

    @property
    def dashes(self) -> tuple[float, ...]:
        """Dashes and gaps; empty for a solid line."""
        return DASHES[self.solver % len(DASHES)]

    def colour(self, dark: bool = False) -> str:
        """Colour as ``#RRGGBB``, on a white or a dark background."""
        own = (DARK_COLOURS if dark else COLOURS)[self.method % len(COLOURS)]
        tint, ground = TINTS[self.repeat % len(TINTS)] * (0.75 if dark else 1), BACKGROUND[dark]
        mixed = (round((1 - tint) * _channel(own, i) + tint * _channel(ground, i)) for i in range(3))
        return "#" + "".join(f"{value:02X}" for value in mixed)


BACKGROUND = {False: "#FFFFFF", True: "#0D1117"}
"""Background of a picture by whether it is for dark pages."""


def _channel(colour: str, i: int) -> int:
    return int(colour[1 + 2 * i : 3 + 2 * i], 16)


def styles_of(curves: Mapping[str, Sequence[Point]]) -> dict[str, Style]:
    """Return the styles of curves by their labels.

    A curve whose settings are tuned for each budget may use several solvers; it has the first style, a solid line.

    Args:
        curves: Normalised points of each curve, in the order of the legend.
    """
    methods: dict[str, int] = {}
    solvers: dict[str, int] = {"": 0}
    repeats: dict[tuple[int, int], int] = {}
    found = {}
    for label, points in curves.items():
        names = {str(point["solver"]) for point in points}
        solver = names.pop() if len(names) == 1 and not any(point["tuned"] for point in points) else ""
        key = (
            methods.setdefault(str(points[0]["method"]), len(methods)),
            solvers.setdefault(solver, len(solvers)),
        )
        repeats[key] = repeats.get(key, -1) + 1
        found[label] = Style(*key, repeats[key])
    return found
