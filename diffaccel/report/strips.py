"""Strips: samples from the same noise, with a row for each curve and a column for each budget.

The images are cut from the sample grids that a bench leaves beside its points.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
MARGIN = 10
"""Width in pixels of the lines between the cells of a strip."""
IMAGES = 4
"""Number of images of a cell of a strip."""

Strip = Mapping[tuple[str, float], "list[NDArray[np.uint8]]"]
"""Images (H, W, C) of the same shape, and as many in each cell, by label and budget."""


def first_images(path: Path, count: int) -> "list[NDArray[np.uint8]]":
    """Cut the first images out of a sample grid.

    Args:
        path: PNG file of :func:`~diffaccel.report.pictures.sample_grid`.
        count: Number of images on it.

    Returns:
        At most :data:`IMAGES` images, (H, W, C) uint8, with C = 1 or 3. Empty if the file is not such a grid, for
        example a scatter plot.
    """
    try:
        return _first_images(path, path.stat().st_mtime_ns, count)
    except OSError:
        return []


@lru_cache(maxsize=1024)  # several judges see the same grids
def _first_images(path: Path, changed: int, count: int) -> "list[NDArray[np.uint8]]":
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
    corners = [(GAP + i // columns * h, GAP + i % columns * w) for i in range(min(count, IMAGES))]
    return [picture[y : y + h - GAP, x : x + w - GAP].copy() for y, x in corners]


def joined(images: "Sequence[NDArray[np.uint8]]") -> "NDArray[np.uint8]":
    """Put images of the same shape beside each other, with thin transparent lines between them; (H, W, 4)."""
    line = np.zeros((images[0].shape[0], GAP, 4), dtype=np.uint8)
    parts = []
    for image in images:
        opaque = np.full((*image.shape[:2], 4), 255, dtype=np.uint8)
        opaque[..., :3] = image  # a grey image is the same in all channels
        parts += [line, opaque]
    return np.concatenate(parts[1:], axis=1)


def plot_strip(strip: Strip, path: Path, title: str, dark: bool = False) -> None:
    """Draw a strip: a row for each label and a column for each budget.

    Args:
        strip: Images by label and budget, at least one.
        path: PNG file to write.
        title: Title, which names the noise that all cells share.
        dark: Whether the picture is for dark pages.
    """
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(label for label, _ in strip))
    budgets = sorted({budget for _, budget in strip})
    board, (h, w) = _board(strip, labels, budgets, dark), joined(next(iter(strip.values()))).shape[:2]
    wide, left, top = 1.9, 2.3, 0.55  # of a column, and of the margins, in inches
    scale = wide / w
    size = (left + board.shape[1] * scale + 0.08, top + board.shape[0] * scale + 0.08)
    figure = Figure(figsize=size, dpi=150, facecolor=BACKGROUND[dark])
    box = (left / size[0], 0.08 / size[1], board.shape[1] * scale / size[0], board.shape[0] * scale / size[1])
    axes = figure.add_axes(box)
    axes.set_axis_off()
    axes.imshow(board, interpolation="nearest", extent=(0, board.shape[1], board.shape[0], 0), aspect="auto")
    style: dict[str, Any] = {"color": "white" if dark else "black", "fontsize": 9, "parse_math": False}
    for column, budget in enumerate(budgets):
        x = column * (w + MARGIN) + w / 2
        axes.text(x, -0.08 / scale, f"NFE {budget:g}", ha="center", va="bottom", **style)
    for row, label in enumerate(labels):
        y = row * (h + MARGIN) + h / 2
        axes.text(-0.12 / scale, y, wrapped(label, 28), ha="right", va="center", **style)
    figure.text(0.08 / size[0], 1 - 0.08 / size[1], wrapped(title), ha="left", va="top", **style)
    save(figure, path)


def _board(strip: Strip, labels: Sequence[str], budgets: Sequence[float], dark: bool) -> "NDArray[np.uint8]":
    """Put all images of a strip on one board, (H, W, 3), with the background between them."""
    h, w = joined(next(iter(strip.values()))).shape[:2]
    ground = [int(BACKGROUND[dark][i : i + 2], 16) for i in (1, 3, 5)]
    shape = (len(labels) * (h + MARGIN) - MARGIN, len(budgets) * (w + MARGIN) - MARGIN, 3)
    board = np.broadcast_to(np.array(ground, dtype=np.uint8), shape).copy()
    for (label, budget), images in strip.items():
        y, x, picture = labels.index(label) * (h + MARGIN), budgets.index(budget) * (w + MARGIN), joined(images)
        place = board[y : y + h, x : x + w]
        place[picture[..., 3] > 0] = picture[picture[..., 3] > 0, :3]
    return board


def strips_of(rows: Sequence[Row]) -> "tuple[dict[tuple[str, float], list[NDArray[np.uint8]]], str]":
    """Cut a strip from the sample grids of rows: the same images for each curve and budget.

    The images are those of the seed, the noise and the shape that most rows with a grid have.

    Returns:
        Images by label and budget, empty without grids; and a title.
    """
    grids: dict[tuple[object, ...], dict[tuple[str, float], list[NDArray[np.uint8]]]] = {}
    for row in rows:
        point = row.point
        if row.grid is None or point["nfe_budget"] is None:
            continue
        images = first_images(row.grid, min(point["n"] or SHOWN, SHOWN))
        if images:
            key = (point["seed"], point["noise"], images[0].shape)
            grids.setdefault(key, {})[row.label, point["nfe_budget"]] = images
    if not grids:
        return {}, ""
    shared, found = max(grids.items(), key=lambda pair: len(pair[1]))
    count = min(len(images) for images in found.values())
    strip = {place: images[:count] for place, images in found.items()}
    return (
        strip,
        f"samples {'0' if count == 1 else f'0 to {count - 1}'} of seed {shared[0]}: the same noise in all cells",
    )
