"""Bias and coverage of the extrapolated Frechet distance, for Gaussians with the moments of real features.

    python -m benchmarks.extrapolation REFERENCE.npz n=5000 draws=8

REFERENCE.npz is a file of ``diffaccel reference``, whose moments are those of the reference Gaussian. The distance to
each other Gaussian is known in closed form. The exit status is 1 if the mean error of the second order is above 1.5
standard errors.
"""

import sys

import torch
from rich.table import Table
from torch import Tensor

from diffaccel.metrics import FrechetDistance, Moments, frechet_distance
from diffaccel.metrics.reference import read_reference
from diffaccel.text.terminal import wide_console

BLOCKS = 10
CASES = {"equal": (0.0, 0.0, 0.0), "near": (0.1, 0.1, 0.02), "far": (0.4, 0.4, 0.3)}
"""Shift of the means, spread of the logarithms of the scales, and white noise, in units of the standard deviations."""


def other(reference: Moments, shift: float, spread: float, noise: float) -> Moments:
    """Moments of another Gaussian."""
    generator = torch.Generator().manual_seed(1)
    std = reference.covariance.diagonal().sqrt()
    moves, scales = (torch.randn(reference.dim, dtype=torch.float64, generator=generator) for _ in range(2))
    scale = (spread * scales).exp()
    covariance = scale[:, None] * reference.covariance * scale + noise * std.square().diag()
    return Moments(reference.n, reference.mean + shift * std * moves, covariance)


def errors(moments: Moments, reference: Moments, n: int, seed: int) -> Tensor:
    """Errors of the distance and of its extrapolations of first and second order, and their standard error, (4,)."""
    noise = torch.randn(n, moments.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    features, sums = noise @ moments.root + moments.mean, FrechetDistance(moments.dim, reference, BLOCKS)
    for block in range(BLOCKS):
        sums.update(features[block::BLOCKS], block)
    parts, true = sums.resampled(), frechet_distance(moments, reference)
    second, first = parts.extrapolated(), parts._replace(halves=parts.sizes[:0]).extrapolated()
    return torch.stack([second.fd - true, first.fd_inf - true, second.fd_inf - true, second.se])


def main(path: str, *words: str) -> int:
    """Print the table, and return the exit status."""
    given = dict(word.split("=") for word in words)
    n, draws = int(given.get("n", 5000)), int(given.get("draws", 8))
    reference = read_reference(path).moments
    heads = ("Gaussian", "distance", "bias", "first order", "second order", "se", "within 2 se, first", "second")
    table, fine = Table(*heads, title=f"{reference.dim} features, n = {n}, {draws} draws"), True
    for name, (shift, spread, noise) in CASES.items():
        moments = other(reference, shift, spread, noise)
        found = torch.stack([errors(moments, reference, n, seed) for seed in range(draws)])
        *means, se = found.mean(0).tolist()
        covered = [float((found[:, i].abs() < 2 * found[:, 3]).double().mean()) for i in (1, 2)]
        distance = float(frechet_distance(moments, reference))
        table.add_row(
            name, *(f"{value:.3g}" for value in (max(distance, 0), *means, se)), *(f"{x:.0%}" for x in covered)
        )
        fine &= abs(means[2]) < 1.5 * se
    wide_console().print(table)
    return 0 if fine else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(*sys.argv[1:]))
