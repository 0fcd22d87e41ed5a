"""Does the Frechet distance rise with the damage that is done to real images?

    python -m benchmarks.distances DATA.npz EXTRACTOR.safetensors [EXTRACTOR2.safetensors ...] [--test FILE] [--n 5000]

The reference is DATA, the images that are damaged are those of the test file; without one, DATA is halved at random.
Exit status 1 if some distance doesn't rise with the strength.
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

# The least blur is 0.4 pixels: 0.25 would change no value by half a level, so that in uint8 it is none.
BLUR = (0, 0.4, 0.5, 0.75, 1, 1.5)
NOISE = (0, 2, 4, 8, 16, 32)
QUALITY = (100, 90, 75, 50, 25, 10)
DROPPED = (0, 1, 2, 4, 6, 8)
BLOCKS = 10


class Damage(NamedTuple):
    """A way to spoil images.

    Attributes:
        name: What it is, with the unit of its strengths.
        strengths: From the least to the most damage.
        n: Number of images, the same for all strengths: the distance depends on it.
        apply: Strength -> images (n, C, H, W) uint8.
    """

    name: str
    strengths: Sequence[float]
    n: int
    apply: Callable[[float], Tensor]


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Blur images (N, C, H, W) uint8 by a Gaussian of ``sigma`` pixels, the border mirrored."""
    if sigma == 0:
        return images
    side = 2 * math.ceil(3 * sigma) + 1
    return gaussian_blur(images, [side, side], [sigma, sigma])


def noisy(images: Tensor, std: float, seed: int = 0) -> Tensor:
    """Add Gaussian noise of ``std`` levels to images (N, C, H, W) uint8: the same draws at each, for one seed."""
    z = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + std * z).round().clamp(0, 255).to(torch.uint8)


def without_classes(images: Tensor, labels: Tensor, dropped: float, n: int) -> Tensor:
    """Return the first ``n`` of the images (N, C, H, W) that aren't of the first ``dropped`` classes, labels (N,)."""
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
    """List the ways to spoil the first ``n`` images.

    Args:
        images: (N, C, H, W) uint8 in random order, N >= n.
        labels: Their classes, (N,).
        n: Images to score; where classes are dropped, at most as many as there are of those that stay to the last.
        blur: Deviations in pixels.
        noise: Deviations in levels of 255.
        quality: JPEG's.
        dropped: Numbers of classes.

    Raises:
        UsageError: Too few images to score.
    """
    some, n = images[:n], min(n, len(images))
    fewest = min(n, int((labels >= max(dropped)).sum()))
    if fewest < 2:
        raise UsageError(f"{n} images, of which {fewest} stay without {max(dropped)} classes: give at least 2")
    return [
        Damage("blur, pixels", blur, n, lambda sigma: blurred(some, sigma)),
        Damage("noise, of 255", noise, n, lambda std: noisy(some, std)),
        Damage("JPEG quality", quality, n, lambda value: jpeg(some, int(value))),
        Damage("classes dropped", dropped, fewest, lambda count: without_classes(images, labels, count, fewest)),
    ]


def moments(images: Tensor, extractor: Extractor, batch_size: int = 250) -> Moments:
    """Take the moments of the features of images (N, C, H, W)."""
    return Moments.from_features(torch.cat([extractor(batch) for batch in images.split(batch_size)]))


def score(images: Tensor, extractor: Extractor, reference: Moments, batch_size: int = 250) -> Frechet:
    """Measure the distance of images (N, C, H, W) in random order, with its jackknife error."""
    distance = FrechetDistance(extractor.dim, reference, BLOCKS)
    for i, batch in enumerate(images.split(min(batch_size, -(-len(images) // (2 * BLOCKS))))):
        distance.update(extractor(batch), i)
    return distance.compute()


def ladder(damage: Damage, extractor: Extractor, reference: Moments) -> list[Frechet]:
    """Measure the distance at each strength."""
    return [score(damage.apply(strength), extractor, reference) for strength in damage.strengths]


def rises(found: Sequence[Frechet]) -> bool:
    """Whether each distance is above the one before."""
    return all(weaker.fd < stronger.fd for weaker, stronger in pairwise(found))


def show(names: Sequence[str], rows: Sequence[tuple[Damage, Sequence[Sequence[Frechet]]]]) -> None:
    """Print a table: each damage with a ladder an extractor."""
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
    console.width = max(console.width, 40 + 24 * len(names))  # a pipe has 80 columns
    console.print(table)


def read(path: str, test_path: str | None, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Read the images of the reference, and others in random order with their labels.

    Raises:
        UsageError: A file is missing or broken, or the other images have no labels.
    """
    source = Npz(path, test_path)
    real = source.split("train")
    others = real if test_path is None else source.split("test")
    if others.labels is None:
        raise UsageError(f"{test_path or path} has no array 'labels', so that no class can be dropped: add it")
    known, order = real.images, torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    if test_path is None:
        first, order = order.chunk(2)
        known = known[first]
    return known, others.images[order], others.labels[order]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print; returns 0 if all distances rise, 1 if not, 2 on bad input."""
    parser = argparse.ArgumentParser("python -m benchmarks.distances", description=str(__doc__).splitlines()[0])
    parser.add_argument("data", help="npz with the arrays images (N, H, W, C) uint8 and labels (N,)")
    parser.add_argument("extractors", nargs="+", help="safetensors files, as `diffaccel fit DATA/extractor` leaves")
    parser.add_argument("--test", help="npz with the images to damage; half of DATA by default")
    parser.add_argument("--n", type=int, default=5000, help="images to damage")
    given = parser.parse_args(arguments)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        real, images, labels = read(given.data, given.test)
        extractors = [Small(path) for path in given.extractors]
        ways = damages(images, labels, given.n)
        references = [moments(real, extractor) for extractor in extractors]
    except UsageError as error:
        console.print(f"distances: {error}", style="red", markup=False)
        return 2
    rows = []
    for damage in track(ways, "damaging", console=console, transient=True):
        pairs = zip(extractors, references, strict=True)
        rows.append((damage, [ladder(damage, extractor, reference) for extractor, reference in pairs]))
    show([extractor.metric_name for extractor in extractors], rows)
    return 0 if all(rises(found) for _, ladders in rows for found in ladders) else 1


if __name__ == "__main__":
    sys.exit(main())
