"""What DDM's choices are worth on digits: constant against linear attenuation, two heads against one, over seeds.

python -m benchmarks.ablation [SEEDS] [key=value ...]      (three seeds: nine fits of five minutes on a free core)

Every case has about as many parameters, the paper's clock v = t, the weighting ``unit`` of the losses, and the
stochastic bridge without clamping. A seed is one of training and of sampling; the standard error is over seeds. Fits
that runs/ablation has are not made again, and an interrupted one goes on.
"""

import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from diffaccel.__main__ import main as diffaccel
from diffaccel.config import load
from diffaccel.report import read_points

OUT = Path("runs/ablation")
COMMON = ["process.clock=t", "solver.clamp=false", "nfe=[5,10,20,50]", "logger=csv"]
CASES = {
    "constant, two heads": [],
    "constant, one head": ["network.heads=[1]", "network.widths=[32,48]", "network.embedding=64"],
    "linear, two heads": ["process.attenuation=linear", "network.heads=[2,1]", "solver.reproject=false"],
}


def measure(case: str, seed: int, words: list[str]) -> dict[float, float]:
    """Fit a case under a seed unless that is done; its distance at each budget."""
    out = OUT / f"{case.replace(', ', '_').replace(' ', '_')}_{seed}"
    if not (out / "ema.safetensors").is_file():
        status = diffaccel(
            ["fit", "digits/ddm", f"seed={seed}", f"out={out}", "resume=auto", *COMMON, *CASES[case], *words]
        )
        if status:
            sys.exit(status)
    return {point["nfe_budget"]: point["metrics"]["fd_digits"] for point in read_points(out / "points.jsonl")}


def main(seeds: int = 3, *words: str) -> None:
    """Fit every case under every seed, then print a row per case."""
    table = Table("case", *(f"NFE {nfe:g}" for nfe in load("digits/ddm", COMMON).nfe), box=None, header_style="bold")
    for case in CASES:
        found = [measure(case, seed, list(words)) for seed in range(seeds)]
        cells = []
        for nfe in found[0]:
            values = [distances[nfe] for distances in found]
            error = statistics.stdev(values) / seeds**0.5 if seeds > 1 else float("nan")
            cells.append(f"{statistics.mean(values):.3f} +- {error:.3f}")
        table.add_row(case, *cells)
    print(f"fd_digits of {load('digits/ddm').n} images, mean and standard error over {seeds} seeds")
    Console(width=120).print(table)


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1].isdigit() else 3
    main(count, *(word for word in sys.argv[1:] if "=" in word))
