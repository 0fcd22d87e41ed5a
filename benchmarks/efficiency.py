"""Training efficiency of small T on digits: distance against the number of images seen, for several T and seeds.

python -m benchmarks.efficiency [SEEDS] [key=value ...]    (three seeds: twelve fits)

The score is trained on [epsilon, T] only, and sampling starts from a Gaussian with the moments of the noisy images,
which is N(0, I) at T = 1. Sampling takes 25 evaluations, to make the solver's error negligible. Fits see half as many
images as those of the shipped weights, because the differences are largest early in training. Seeds are those of both
training and sampling; standard errors are over seeds. Complete fits in runs/efficiency are reused, and interrupted ones
are resumed.
"""

import csv
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.fits import arguments, fit, over_seeds
from diffaccel.config import load

OUT = Path("runs/efficiency")
TIMES = (0.2, 0.4, 0.6, 1.0)
COMMON = ("nfe=25", "images=60_000", "training.evaluate_every=12_000", "training.evaluate_n=2000")
METRIC = "eval/nfe_025/fd_digits"


def measure(T: float, seed: int, words: list[str]) -> dict[int, float]:
    """Fit with a T and a seed, and return the distance by number of steps."""
    out = OUT / f"T{T:g}_{seed}"
    fit("digits/small_t_trained", out, [f"prior.T={T}", f"seed={seed}", *COMMON, *words])
    found = {}
    for path in sorted(out.glob("csv/version_*/metrics.csv")):  # one per start or resume of the fit
        with path.open() as file:
            found |= {int(row["step"]) + 1: float(row[METRIC]) for row in csv.DictReader(file) if row.get(METRIC)}
    return found


def main(*words: str) -> None:
    """Fit with every T and every seed, and print a row per number of images seen."""
    seeds, rest = arguments(words)
    config = load("digits/small_t_trained", [*COMMON, *rest])
    curves = {T: [measure(T, seed, rest) for seed in range(seeds)] for T in TIMES}
    steps = sorted(set.intersection(*(set(curve) for own in curves.values() for curve in own)))
    table = Table("images seen", *(f"T = {T:g}" for T in TIMES), box=None, header_style="bold")
    for step in steps:
        cells = [over_seeds([curve[step] for curve in own]) for own in curves.values()]
        table.add_row(f"{step * config.training.batch_size:,}", *cells)
    print(f"fd_digits of {config.training.evaluate_n} images, mean and standard error over {seeds} seeds")
    Console(width=120).print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
