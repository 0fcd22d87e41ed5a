"""Pictures of samples: grids of images, and scatter plots of points in the plane."""

from pathlib import Path

from einops import rearrange, repeat
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffaccel.report.drawing import save, wrapped
from diffaccel.report.strips import GAP, ROWS
from diffaccel.report.styles import COLOURS

CELL = 64  # approximate size in pixels that the longer side of a small image is magnified to


def sample_grid(images: Tensor, path: str | Path, rows: int = ROWS) -> None:
    """Write a grid of images as one PNG, row by row; small images are magnified by an integer factor.

    Args:
        images: Images, (N, C, H, W) uint8, C = 1 or 3.
        path: PNG file to write; missing folders are created.
        rows: Number of rows; empty cells are white.
    """
    scale, gap = max(1, CELL // max(images.shape[-2:])), GAP
    columns = -(-len(images) // rows)
    cells = repeat(images.cpu(), "n c h w -> n c (h y) (w x)", y=scale, x=scale)
    cells = F.pad(cells, (0, gap, 0, gap), value=255)
    cells = F.pad(cells, (0, 0) * 3 + (0, rows * columns - len(images)), value=255)
    grid = rearrange(cells, "(r k) c h w -> (r h) (k w) c", r=rows)
    picture = F.pad(grid, (0, 0, gap, 0, gap, 0), value=255).numpy()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(path)


def scatter(points: Tensor, path: str | Path, reference: Tensor | None = None, title: str = "") -> None:
    """Draw a scatter plot of points of the plane, optionally on top of real points.

    Args:
        points: Points, (N, 2) or (N, 2, 1, 1), float.
        path: PNG file to write; missing folders are created.
        reference: Real points, (M, 2) or (M, 2, 1, 1), float, or None.
        title: Title of the plot.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if reference is not None:
        x, y = reference.flatten(1).cpu().numpy().T
        axes.scatter(x, y, s=7, color="0.75", linewidths=0, label="real")
    x, y = points.flatten(1).cpu().numpy().T
    axes.scatter(x, y, s=7, color=COLOURS[0], alpha=0.5, linewidths=0, label="sampled")
    axes.set_aspect("equal", adjustable="datalim")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(wrapped(title), loc="left", fontsize=11, parse_math=False)
    if reference is not None:
        axes.legend(frameon=False, fontsize=8, markerscale=2)
    save(figure, path)
