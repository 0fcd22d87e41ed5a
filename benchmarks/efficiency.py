"""What a small T is worth in training on digits: distance against images seen, for several T, over seeds.

python -m benchmarks.efficiency [SEEDS] [key=value ...]    (three seeds: twelve fits)

The score is trained on [epsilon, T] alone and sampled from a Gaussian of the noisy images' moments, which at T = 1 is
N(0, I). 25 evaluations, for the solver's error not to be what is seen; half the images that the shipped weights have
seen, as it is early on that they differ. A seed is one of training and of sampling; the standard error is over seeds.
Fits that runs/efficiency has are not made again, and an interrupted one goes on.
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
    """Fit at a T under a seed; the distance after so many steps."""
    out = OUT / f"T{T:g}_{seed}"
    fit("digits/small_t_trained", out, [f"prior.T={T}", f"seed={seed}", *COMMON, *words])
    found = {}
    for path in sorted(out.glob("csv/version_*/metrics.csv")):  # one for each time that the fit went on
        with path.open() as file:
            found |= {int(row["step"]) + 1: float(row[METRIC]) for row in csv.DictReader(file) if row.get(METRIC)}
    return found


def main(*words: str) -> None:
    """Fit at every T under every seed, then print a row per T."""
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
