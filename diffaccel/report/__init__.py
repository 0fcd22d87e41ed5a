"""Tables, plots and pictures of measured points."""

from diffaccel.report.drawing import (
    CELL,
    COLOURS,
    MARKERS,
    MAX_LEGEND_INSIDE,
    Published,
    plot_curve,
    sample_grid,
    scatter,
    title_of,
)
from diffaccel.report.files import COLUMNS, append_point, frechet_key, read_points, write_csv, write_curve_csv
from diffaccel.report.points import COUNTS, MAPPINGS, NUMBERS, TEXTS, Point, distance, lacking, normalised, undrawn

__all__ = [
    "CELL",
    "COLOURS",
    "COLUMNS",
    "COUNTS",
    "MAPPINGS",
    "MAX_LEGEND_INSIDE",
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
