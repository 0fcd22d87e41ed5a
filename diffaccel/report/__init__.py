"""Tables, plots and pictures of measured points.

Everything except :mod:`~diffaccel.report.pictures` can be imported without PyTorch.
"""

from typing import TYPE_CHECKING

from diffaccel.parts.lazy import lazy
from diffaccel.report.drawing import plot_curve, title_of
from diffaccel.report.files import COLUMNS, append_point, frechet_key, read_points, write_csv, write_curve_csv
from diffaccel.report.points import COUNTS, MAPPINGS, NUMBERS, TEXTS, Point, distance, lacking, normalised, undrawn
from diffaccel.report.published import Published
from diffaccel.report.styles import COLOURS, MARKERS

if TYPE_CHECKING:
    from diffaccel.report.pictures import CELL, sample_grid, scatter

__all__ = [
    "CELL",
    "COLOURS",
    "COLUMNS",
    "COUNTS",
    "MAPPINGS",
    "MARKERS",
    "NUMBERS",
    "Point",
    "Published",
    "TEXTS",
    "append_point",
    "distance",
    "frechet_key",
    "lacking",
    "normalised",
    "plot_curve",
    "read_points",
    "sample_grid",
    "scatter",
    "title_of",
    "undrawn",
    "write_csv",
    "write_curve_csv",
]

__getattr__, __dir__ = lazy(__name__, dict.fromkeys(("CELL", "sample_grid", "scatter"), "diffaccel.report.pictures"))
