"""Test whether Frechet distances increase with the strength of damage to real images.

    python -m benchmarks.distances DATA.npz EXTRACTOR.safetensors [EXTRACTOR2.safetensors ...] [--test FILE] [--n 5000]

The reference is DATA, and the images of the test file are damaged. Without a test file, DATA is split at random into
two halves. The exit status is 1 if a distance doesn't increase with the strength.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from diffaccel.data.arrays import Npz
from diffaccel.errors import UsageError
from diffaccel.features.extractors import Extractor, Small
from diffaccel.features.jpeg import jpeg
from diffaccel.metrics import Frechet, FrechetDistance, Moments

# The smallest blur is 0.4 pixels: a blur of 0.25 changes values by less than half a level, and no uint8 value.
BLUR = (0, 0.4, 0.5, 0.75, 1, 1.5)
NOISE = (0, 2, 4, 8, 16, 32)
QUALITY = (100, 90, 75, 50, 25, 10)
DROPPED = (0, 1, 2, 4, 6, 8)
BLOCKS = 10


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


def moments(images: Tensor, extractor: Extractor, batch_size: int = 250) -> Moments:
    """Moments of the features of images (N, C, H, W)."""
    return Moments.from_features(torch.cat([extractor(batch) for batch in images.split(batch_size)]))


def score(images: Tensor, extractor: Extractor, reference: Moments, batch_size: int = 250) -> Frechet:
    """Distance of images (N, C, H, W) in random order, with its jackknife standard error."""
    distance = FrechetDistance(extractor.dim, reference, BLOCKS)
    for i, batch in enumerate(images.split(min(batch_size, -(-len(images) // (2 * BLOCKS))))):
        distance.update(extractor(batch), i)
    return distance.compute()


def ladder(damage: Damage, extractor: Extractor, reference: Moments) -> list[Frechet]:
    """Distances at each strength."""
    return [score(damage.apply(strength), extractor, reference) for strength in damage.strengths]


def rises(found: Sequence[Frechet]) -> bool:
    """Whether the distances increase."""
    return all(weaker.fd < stronger.fd for weaker, stronger in pairwise(found))


def show(names: Sequence[str], rows: Sequence[tuple[Damage, Sequence[Sequence[Frechet]]]]) -> None:
    """Print a table of the distances for each damage, strength and extractor."""
    table = Table(title="Frechet distance (jackknife se)", title_justify="left", box=None, header_style="bold")
    for column in ("damage", "strength", "n", *names):
        table.add_column(column, justify="left" if column == "damage" else "right", no_wrap=True)
    for damage, ladders in rows:
        for strength, *found in zip(damage.strengths, *ladders, strict=True):
            cells = (f"{each.fd:.4g} ({each.se:.2g})" for each in found)
            table.add_row(damage.name, f"{strength:g}", str(damage.n), *cells)
        verdicts = ("[green]rises[/]" if rises(found) else "[red]does not rise[/]" for found in ladders)
        table.add_row("", "", "", *verdicts)
    console = Console()
    console.width = max(console.width, 40 + 24 * len(names))  # the default for pipes is 80
    console.print(table)


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
    parser.add_argument("extractors", nargs="+", help="safetensors files written by `diffaccel fit DATA/extractor`")
    parser.add_argument("--test", help="npz with the images to damage; half of DATA by default")
    parser.add_argument("--n", type=int, default=5000, help="number of images to damage")
    given = parser.parse_args(arguments)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        real, images, labels = read(given.data, given.test)
        extractors = [Small(path) for path in given.extractors]
        kinds = damages(images, labels, given.n)
        references = [moments(real, extractor) for extractor in extractors]
    except UsageError as error:
        console.print(f"distances: {error}", style="red", markup=False)
        return 2
    rows = []
    for damage in track(kinds, "damaging", console=console, transient=True):
        pairs = zip(extractors, references, strict=True)
        rows.append((damage, [ladder(damage, extractor, reference) for extractor, reference in pairs]))
    show([extractor.metric_name for extractor in extractors], rows)
    return 0 if all(rises(found) for _, ladders in rows for found in ladders) else 1


if __name__ == "__main__":
    sys.exit(main())
