"""Ablation of DDM on digits: constant or linear attenuation, two heads or one, over several seeds.

python -m benchmarks.ablation [SEEDS] [key=value ...]      (three seeds: nine fits of five minutes on one core)

All cases have about the same number of parameters, the paper's clock v = t, the loss weighting ``unit``, and the
stochastic bridge without clamping. Seeds are those of both training and sampling; standard errors are over seeds.
Complete fits in runs/ablation are reused, and interrupted ones are resumed.
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.fits import arguments, fit, over_seeds
from diffaccel.config import load
from diffaccel.report import read_points

OUT = Path("runs/ablation")
COMMON = ["process.clock=t", "solver.clamp=false", "nfe=[5,10,20,50]"]
CASES = {
    "constant, two heads": [],
    "constant, one head": ["network.heads=[1]", "network.widths=[32,48]", "network.embedding=64"],
    "linear, two heads": ["process.attenuation=linear", "network.heads=[2,1]", "solver.reproject=false"],
}


def measure(case: str, seed: int, words: list[str]) -> dict[float, float]:
    """Fit a case with a seed, and return its distance at each budget."""
    out = OUT / f"{case.replace(', ', '_').replace(' ', '_')}_{seed}"
    fit("digits/ddm", out, [f"seed={seed}", *COMMON, *CASES[case], *words])
    return {point["nfe_budget"]: point["metrics"]["fd_digits"] for point in read_points(out / "points.jsonl")}


def main(*words: str) -> None:
    """Fit every case with every seed, and print a row per case."""
    seeds, rest = arguments(words)
    config = load("digits/ddm", [*COMMON, *rest])
    table = Table("case", *(f"NFE {nfe:g}" for nfe in config.nfe), box=None, header_style="bold")
    for case in CASES:
        found = [measure(case, seed, rest) for seed in range(seeds)]
        table.add_row(case, *(over_seeds([distances[nfe] for distances in found]) for nfe in config.nfe))
    print(f"fd_digits of {config.n} images, mean and standard error over {seeds} seeds")
    Console(width=120).print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
