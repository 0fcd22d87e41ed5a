"""Test whether Frechet and kernel distances increase with the strength of damage to real images.

    python -m benchmarks.distances DATA.npz EXTRACTOR [EXTRACTOR2 ...] [--test FILE] [--n 5000] [--only noise,blur]

An extractor is a safetensors file, or a name with keys: efficientnet_lite0, mobilenetv2,resolution=160 ... The
reference is DATA, and the images of the test file are damaged. Without a test file, DATA is split at random into two
halves. Images that were JPEG files show little of the damage by JPEG. With several extractors, a second table contains
the rank correlations of their distances over all damaged images. The exit status is 1 if a distance doesn't increase
with the strength.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from diffaccel.data.arrays import Npz
from diffaccel.errors import UsageError
from diffaccel.features.extractors import EXTRACTORS, Extractor, Small
from diffaccel.features.jpeg import jpeg
from diffaccel.metrics import Frechet, FrechetDistance, Kernel, KernelReference, Moments, kernel_distance
from diffaccel.metrics.base import spread

# The smallest blur is 0.4 pixels: a blur of 0.25 changes values by less than half a level, and no uint8 value.
BLUR = (0, 0.4, 0.5, 0.75, 1, 1.5)
NOISE = (0, 2, 4, 8, 16, 32)
QUALITY = (100, 90, 75, 50, 25, 10)
DROPPED = (0, 1, 2, 4, 6, 8)
BLOCKS = 10
KEPT = 5000
"""Maximum number of images of the reference of kernel distances; the time is proportional to its square."""


class Damage(NamedTuple):
    """A kind of damage to images.

    Attributes:
        name: Name, with the unit of the strengths.
        strengths: Strengths, from the least to the most damage.
        n: Number of images, the same for all strengths, because the distance depends on n.
        apply: Function from a strength to damaged images, (n, C, H, W) uint8.
    """

    name: str
    strengths: Sequence[float]
    n: int
    apply: Callable[[float], Tensor]


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Blur images (N, C, H, W) uint8 by a Gaussian of ``sigma`` pixels, with mirrored borders."""
    if sigma == 0:
        return images
    side = 2 * math.ceil(3 * sigma) + 1
    return gaussian_blur(images, [side, side], [sigma, sigma])


def noisy(images: Tensor, std: float, seed: int = 0) -> Tensor:
    """Add Gaussian noise of ``std`` levels to images (N, C, H, W) uint8, with the same draws at each ``std``."""
    z = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + std * z).round().clamp(0, 255).to(torch.uint8)


def without_classes(images: Tensor, labels: Tensor, dropped: float, n: int) -> Tensor:
    """First ``n`` images (N, C, H, W) with labels (N,) that are not in the first ``dropped`` classes."""
    return images[labels >= dropped][:n]


def damages(
    images: Tensor,
    labels: Tensor,
    n: int,
    blur: Sequence[float] = BLUR,
    noise: Sequence[float] = NOISE,
    quality: Sequence[float] = QUALITY,
    dropped: Sequence[float] = DROPPED,
) -> list[Damage]:
    """Kinds of damage to the first ``n`` images.

    Args:
        images: Images in random order, (N, C, H, W) uint8.
        labels: Class labels, (N,).
        n: Number of images to score; for dropped classes, at most the number of images in the remaining classes.
        blur: Standard deviations of the blur in pixels.
        noise: Standard deviations of the noise in levels of 255.
        quality: Qualities of JPEG.
        dropped: Numbers of dropped classes.

    Raises:
        UsageError: There are too few images to score.
    """
    first, n = images[:n], min(n, len(images))
    fewest = min(n, int((labels >= max(dropped)).sum()))
    if fewest < 2:
        raise UsageError(f"{n} images, of which {fewest} remain without {max(dropped)} classes: use at least 2")
    return [
        Damage("blur, pixels", blur, n, lambda sigma: blurred(first, sigma)),
        Damage("noise, of 255", noise, n, lambda std: noisy(first, std)),
        Damage("JPEG quality", quality, n, lambda value: jpeg(first, int(value))),
        Damage("classes dropped", dropped, fewest, lambda count: without_classes(images, labels, count, fewest)),
    ]


class Standard(NamedTuple):
    """Statistics of real images."""

    moments: Moments
    kernel: KernelReference


class Distances(NamedTuple):
    """Both distances of a set of images."""

    frechet: Frechet
    kernel: Kernel

    def pairs(self) -> list[tuple[float, float]]:
        """Distances with their standard errors; the kernel distance in thousandths."""
        (fd, _, fd_se), (kid, kid_se) = self.frechet, self.kernel
        return [(fd.item(), fd_se.item()), (1000 * kid.item(), 1000 * kid_se.item())]


NAMES = ("FD", "KID x 1000")
"""Names of :meth:`Distances.pairs`."""


@torch.no_grad()
def features_of(images: Tensor, extractor: Extractor, batch_size: int = 250) -> Tensor:
    """Features of images (N, C, H, W), (N, d) float32."""
    return torch.cat([extractor(batch).float() for batch in images.split(batch_size)])


def standard(images: Tensor, extractor: Extractor) -> Standard:
    """Statistics of the features of images (N, C, H, W)."""
    features = features_of(images, extractor)
    return Standard(Moments.from_features(features), KernelReference(spread(features, min(KEPT, len(features)))))


def score(images: Tensor, extractor: Extractor, real: Standard) -> Distances:
    """Distances of images (N, C, H, W) in random order, with their jackknife standard errors."""
    features, distance = features_of(images, extractor), FrechetDistance(extractor.dim, real.moments, BLOCKS)
    for i, batch in enumerate(features.double().split(-(-len(images) // (2 * BLOCKS)))):
        distance.update(batch, i)
    return Distances(distance.compute(), kernel_distance(features, real.kernel, BLOCKS))


def ladder(damage: Damage, extractor: Extractor, real: Standard) -> list[Distances]:
    """Distances at each strength."""
    return [score(damage.apply(strength), extractor, real) for strength in damage.strengths]


def rises(found: Sequence[float]) -> bool:
    """Whether distances increase."""
    return all(weaker < stronger for weaker, stronger in pairwise(found))


def rises_in(found: Sequence[Distances]) -> list[bool]:
    """Whether each kind of distance increases."""
    return [rises([value for value, _ in pairs]) for pairs in zip(*(one.pairs() for one in found), strict=True)]


Rows = Sequence[tuple[Damage, Sequence[Sequence[Distances]]]]
"""Damages, each with a ladder per extractor."""


def show(names: Sequence[str], rows: Rows) -> None:
    """Print a table of the distances for each damage, strength and extractor."""
    table = Table(title="distance (jackknife se)", title_justify="left", box=None, header_style="bold")
    columns = [f"{name} {kind}" for name in names for kind in NAMES]
    for column in ("damage", "strength", "n", *columns):
        table.add_column(column, justify="left" if column == "damage" else "right", no_wrap=True)
    for damage, ladders in rows:
        for strength, *found in zip(damage.strengths, *ladders, strict=True):
            cells = (f"{value:.4g} ({se:.2g})" for each in found for value, se in each.pairs())
            table.add_row(damage.name, f"{strength:g}", str(damage.n), *cells)
        verdicts = ("[green]rises[/]" if up else "[red]does not rise[/]" for each in ladders for up in rises_in(each))
        table.add_row("", "", "", *verdicts)
    console = Console()
    console.width = max(console.width, 40 + 36 * len(columns))  # the default for pipes is 80
    console.print(table)


def show_correlations(names: Sequence[str], rows: Rows) -> None:
    """Print the rank correlations of the extractors' distances over all damages of the most images.

    Frechet distances of fewer images have a larger bias and do not compare.
    """
    most = max(damage.n for damage, _ in rows)
    rows = [row for row in rows if row[0].n == most]
    columns = [f"{name} {kind}" for name in names for kind in NAMES]
    by_judge = [[one for _, ladders in rows for one in ladders[k]] for k in range(len(names))]
    series = [[one.pairs()[kind][0] for one in found] for found in by_judge for kind in range(len(NAMES))]
    table = Table(title="rank correlation", title_justify="left", box=None, header_style="bold")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for column, one in zip(columns, series, strict=True):
        table.add_row(column, *(f"{rank_correlation(one, other):.3f}" for other in series))
    console = Console()
    console.width = max(console.width, 40 + 36 * len(columns))
    console.print(table)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's correlation of two series; equal values have different ranks, in order."""
    ranks = torch.tensor([one, other], dtype=torch.float64).argsort(dim=1, stable=True).argsort(dim=1).double()
    return torch.corrcoef(ranks)[0, 1].item()


def build(text: str) -> Extractor:
    """Build an extractor from a safetensors file, or from a name with keys.

    Raises:
        UsageError: The file is missing or damaged, or the name or a key is unknown.
    """
    if text.endswith(".safetensors"):
        return Small(Path(text))
    name, *keys = text.split(",")
    pairs = (key.partition("=") for key in keys)
    return EXTRACTORS.build({"name": name, **{key: yaml.safe_load(value) for key, _, value in pairs}})


def read(path: str, test_path: str | None, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Read the images of the reference, and the images to damage in random order, with their labels.

    Raises:
        UsageError: A file is missing or damaged, or the images to damage have no labels.
    """
    source = Npz(path, test_path)
    real = source.split("train")
    others = real if test_path is None else source.split("test")
    if others.labels is None:
        raise UsageError(f"{test_path or path} has no array 'labels', which is needed to drop classes: add it")
    reference, order = real.images, torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    if test_path is None:
        first, order = order.chunk(2)
        reference = reference[first]
    return reference, others.images[order], others.labels[order]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return 0 if all distances increase, 1 if not, and 2 for invalid input."""
    parser = argparse.ArgumentParser("python -m benchmarks.distances", description=str(__doc__).splitlines()[0])
    parser.add_argument("data", help="npz with the arrays images (N, H, W, C) uint8 and labels (N,)")
    parser.add_argument("extractors", nargs="+", help="names with keys, or files of `diffaccel fit DATA/extractor`")
    parser.add_argument("--test", help="npz with the images to damage; half of DATA by default")
    parser.add_argument("--n", type=int, default=5000, help="number of images to damage")
    parser.add_argument("--only", default="", help="damages whose names begin so, separated by commas; all by default")
    given = parser.parse_args(arguments)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        real, images, labels = read(given.data, given.test)
        extractors = [build(text) for text in given.extractors]
        kinds = [one for one in damages(images, labels, given.n) if one.name.startswith(tuple(given.only.split(",")))]
        standards = [standard(real, extractor) for extractor in extractors]
    except UsageError as error:
        console.print(f"distances: {error}", style="red", markup=False)
        return 2
    rows = []
    for damage in track(kinds, "damaging", console=console, transient=True):
        pairs = zip(extractors, standards, strict=True)
        rows.append((damage, [ladder(damage, extractor, one) for extractor, one in pairs]))
    names = [extractor.name for extractor in extractors]
    show(names, rows)
    if len(names) > 1:
        show_correlations(names, rows)
    return 0 if all(all(rises_in(found)) for _, ladders in rows for found in ladders) else 1


if __name__ == "__main__":
    sys.exit(main())
