"""Gain of densities over N(0, I) in bits per dimension of held-out noisy images, and an upper bound on this gain.

python -m benchmarks.densities DATA.npz [--held-out 10000] [--T 0.2 0.4 0.6] [--mixture]
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from diffaccel.data import to_float
from diffaccel.data.arrays import Npz
from diffaccel.density import DENSITIES, Density, TrainingImages
from diffaccel.errors import UsageError
from diffaccel.methods.small_t import judge
from diffaccel.process import VariancePreserving

KINDS = {
    "full covariance": {"name": "gaussian", "basis": "pca"},
    "cosines": {"name": "gaussian", "basis": "dct"},
}
MIXTURES = {
    "PCA-32, 20 components": {"name": "mixture"},
    "PCA-32, Dirichlet process": {"name": "mixture", "dirichlet": True},
}


def ratio(T: float) -> float:
    """Noise-to-data ratio of the variance preserving process at time T."""
    return VariancePreserving().ratio(torch.tensor(T, dtype=torch.float64)).item()


def ceiling(T: float, square: float) -> float:
    """Upper bound on the gain of any density, in bits per dimension: KL[p_T || N(0, I)] for x_T independent of x_0.

    Args:
        T: Time on the variance preserving process.
        square: Mean square of the elements of the data.
    """
    variance = 1 / (1 + ratio(T) ** -2)
    return 0.5 * (variance - 1 - math.log(variance) + (1 - variance) * square) / math.log(2)


def split(path: str, held_out: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Split images at random into those to fit to and held-out ones, (N, C, H, W) uint8.

    Raises:
        UsageError: The file can't be read, or has too few images.
    """
    images = Npz(path).split("train").images
    if len(images) < held_out + 2:
        raise UsageError(f"{path} has {len(images)} images: hold out fewer than {held_out}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order[held_out:]], images[order[:held_out]]


def fit(density: Density, images: Tensor) -> Density:
    """Fit a density to uint8 images."""

    def read(rank: int, world: int) -> Iterator[tuple[int, Tensor]]:
        return ((i, to_float(batch)) for i, batch in enumerate(images.split(1000)))

    density.fit(TrainingImages(read))
    return density


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return 0, or 2 for invalid input."""
    parser = argparse.ArgumentParser("python -m benchmarks.densities", description=str(__doc__).splitlines()[0])
    parser.add_argument("data", help="npz with the array images (N, H, W[, C]) uint8")
    parser.add_argument("--held-out", type=int, default=10_000, help="number of held-out images")
    parser.add_argument("--T", type=float, nargs="+", default=[0.2, 0.4, 0.6], help="times of the VP process")
    parser.add_argument("--mixture", action="store_true", help="also fit mixtures, which takes minutes")
    given = parser.parse_args(arguments)
    try:
        images, others = split(given.data, given.held_out)
    except UsageError as error:
        Console(stderr=True).print(f"densities: {error}", style="red", markup=False)
        return 2
    shape = tuple(images.shape[1:])
    square = torch.stack([to_float(batch).double().square().mean() for batch in others.split(1000)]).mean().item()
    table = Table("density", *(f"T = {T:g}" for T in given.T), box=None, header_style="bold")
    table.add_row("ceiling", *(f"{ceiling(T, square):.4f}" for T in given.T))
    for name, node in {**KINDS, **(MIXTURES if given.mixture else {})}.items():
        cells, density = [], None
        for T in given.T:
            known = density is not None and not density.bound
            density = density.at(ratio(T)) if known and density else fit(_build(node, shape, T), images)
            found = judge(density, (to_float(batch) for batch in others.split(1000)))
            cells.append(f"{found.gain:.4f} ± {found.se:.4f}{'' if found.plausible else ' (!)'}")
        table.add_row(name, *cells)
    print(f"gain over N(0, I), bits per dimension; fitted to {len(images)} images, measured on {len(others)} others")
    Console(width=120).print(table)
    return 0


def _build(node: dict[str, object], shape: tuple[int, ...], T: float) -> Density:
    return DENSITIES.build(node, shape=shape, ratio=ratio(T))


if __name__ == "__main__":
    sys.exit(main())
