"""Strips: samples from the same noise, with a row for each curve and a column for each budget.

The images are cut from the sample grids that a bench leaves beside its points.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from diffaccel.report.drawing import save, wrapped
from diffaccel.report.rows import Row
from diffaccel.report.styles import BACKGROUND

if TYPE_CHECKING:
    from numpy.typing import NDArray

GAP = 2
"""Width in pixels of the lines between the images of a sample grid."""
ROWS = 8
"""Number of rows of a sample grid."""
SHOWN = 64
"""Maximum number of images on a sample grid."""
IMAGES = 4
"""Number of images of a cell of a strip."""

Strip = Mapping[tuple[str, float], "NDArray[np.uint8]"]
"""Images (H, W, C) by label and budget."""


def cut(path: Path, count: int) -> "list[NDArray[np.uint8]]":
    """Cut the images out of a sample grid.

    Args:
        path: PNG file of :func:`~diffaccel.report.pictures.sample_grid`.
        count: Number of images on it.

    Returns:
        Images, (H, W, C) uint8, with C = 1 or 3. Empty if the file is not such a grid, for example a scatter plot.
    """
    try:
        with Image.open(path) as file:
            picture = np.asarray(file if file.mode in ("L", "RGB") else file.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return []
    picture = picture.reshape(*picture.shape[:2], -1)
    columns = -(-count // ROWS)
    height, width = ((size - GAP) / number for size, number in zip(picture.shape, (ROWS, columns), strict=False))
    if height != int(height) or width != int(width) or min(height, width) <= GAP:
        return []
    h, w = int(height), int(width)
    rows, lines = np.arange(picture.shape[0]) % h < GAP, np.arange(picture.shape[1]) % w < GAP
    if not (picture[rows] == 255).all() or not (picture[:, lines] == 255).all():
        return []
    cells = [picture[GAP + i // columns * h :, GAP + i % columns * w :] for i in range(count)]
    return [cell[: h - GAP, : w - GAP] for cell in cells]


def joined(images: "Sequence[NDArray[np.uint8]]", ground: int = 255) -> "NDArray[np.uint8]":
    """Put images of the same shape beside each other, with thin lines between them."""
    line = np.full((images[0].shape[0], GAP, images[0].shape[2]), ground, dtype=np.uint8)
    parts = [part for image in images for part in (line, image)]
    return np.concatenate(parts[1:], axis=1)


def plot_strip(strip: Strip, path: Path, title: str, dark: bool = False) -> None:
    """Draw a strip: a row for each label and a column for each budget.

    Args:
        strip: Pictures by label and budget, at least one.
        path: PNG file to write.
        title: Title, which names the noise that all cells share.
        dark: Whether the picture is for dark pages.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    labels = list(dict.fromkeys(label for label, _ in strip))
    budgets = sorted({budget for _, budget in strip})
    h, w = next(iter(strip.values())).shape[:2]
    wide, ink = 1.9, "white" if dark else "black"
    high = wide * h / w
    figure = Figure(
        figsize=(2.4 + len(budgets) * (wide + 0.08), 0.6 + len(labels) * (high + 0.08)),
        dpi=150,
        layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01),
        facecolor=BACKGROUND[dark],
    )
    grid = figure.subplots(len(labels), len(budgets), squeeze=False)
    for row, label in enumerate(labels):
        for column, budget in enumerate(budgets):
            axes, picture = grid[row][column], strip.get((label, budget))
            axes.set_axis_off()
            if row == 0:
                axes.set_title(f"NFE {budget:g}", fontsize=9, color=ink)
            if picture is not None:
                shown = picture if picture.shape[2] == 3 else picture[..., 0]
                axes.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            if column == 0:
                axes.text(
                    -0.03, 0.5, wrapped(label, 26), transform=axes.transAxes, ha="right", va="center", fontsize=9,
                    color=ink, parse_math=False,
                )  # fmt: skip
    figure.suptitle(wrapped(title), x=0.01, ha="left", fontsize=9, color=ink, parse_math=False)
    save(figure, path)


def strips_of(rows: Sequence[Row]) -> "tuple[dict[tuple[str, float], NDArray[np.uint8]], str]":
    """Cut a strip from the sample grids of rows: the same images for each curve and budget.

    The images are those of the seed, the noise and the shape that most rows with a grid have.

    Returns:
        Pictures by label and budget, empty without grids; and a title.
    """
    grids: dict[tuple[object, ...], dict[tuple[str, float], list[NDArray[np.uint8]]]] = {}
    for row in rows:
        point = row.point
        if row.grid is None or point["nfe_budget"] is None:
            continue
        images = cut(row.grid, min(point["n"] or SHOWN, SHOWN))
        if images:
            key = (point["seed"], point["noise"], images[0].shape)
            grids.setdefault(key, {})[row.label, point["nfe_budget"]] = images
    if not grids:
        return {}, ""
    shared, found = max(grids.items(), key=lambda pair: len(pair[1]))
    count = min(IMAGES, *(len(images) for images in found.values()))
    strip = {place: joined(images[:count]) for place, images in found.items()}
    return (
        strip,
        f"samples {'0' if count == 1 else f'0 to {count - 1}'} of seed {shared[0]}: the same noise in all cells",
    )
