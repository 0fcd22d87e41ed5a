"""What a perfect prior would give: real held-out images, noised to a level, then integrated to the data.

The distance that is left is the denoiser's and the solver's below that level. A prior that starts there can't do
better than it, but for chance, and the last row, from the top, says what there is to gain.

    python -m benchmarks.headroom EXPERIMENT data.path=TRAIN.npz data.test_path=TEST.npz [n=2000] [nfe=20] ...
"""

import sys

import torch
from rich.console import Console
from rich.table import Table

from diffaccel.config import load
from diffaccel.data import to_float
from diffaccel.evaluator import to_uint8
from diffaccel.experiment import build_data, build_evaluator, build_method
from diffaccel.metrics import FrechetDistance
from diffaccel.noise import NoiseStreams
from diffaccel.process import expand

LEVELS = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 40.0)
BLOCKS = 10


@torch.no_grad()
def main(experiment: str, *words: str) -> None:
    """Print a row per level of ``LEVELS``: steps below it, distance, standard error."""
    config = load(experiment, words)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    method = build_method(config, frozen=True).eval()
    evaluator, (budget, *_) = build_evaluator(config, method), config.nfe
    process, metric = method.denoiser.process, evaluator.extractor.metric_name
    images = torch.cat([images for _, images, _ in build_data(config).batches("test", 500)])
    if len(images) < config.n:
        sys.exit(f"{len(images)} held-out images are fewer than n={config.n}: lower n")
    images = images[torch.linspace(0, len(images) - 1, config.n).long()]  # spread: a file may be sorted by class
    table = Table("level", "evaluations", f"{metric}@{config.n}", "se", box=None, header_style="bold")
    for level in LEVELS:
        # As many of the budget's evaluations as a grid from the top has at this level and below.
        ratios = process.ratio(method.solver.grid(process, process.time(torch.tensor([80.0]).double()), int(budget)))
        steps = max(2, int((ratios <= level).sum()))
        distance = FrechetDistance(evaluator.extractor.dim, evaluator.real.reference.moments, blocks=BLOCKS)
        for batch, first in enumerate(range(0, config.n, config.batch_size)):
            x_0 = to_float(images[first : first + config.batch_size])
            noise = NoiseStreams(config.seed, range(first, first + len(x_0)))
            ratio = torch.full((len(x_0),), level, dtype=torch.float64)
            x_t, t = process.from_ratio(x_0 + expand(ratio, x_0) * noise.normal(x_0), ratio)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16-mixed"):
                x_0 = method.solver(method.denoiser, x_t, t, noise, steps)
            distance.update(evaluator.extractor(to_uint8(x_0)), batch % BLOCKS)
        found = distance.compute()
        spent = method.solver.evaluations(steps)
        table.add_row(f"{level:g}", str(spent), f"{float(found.fd):.3f}", f"{float(found.se):.2g}")
    print(f"{config.experiment}, {config.solver['name']}, real images noised to a level, then denoised")
    Console(width=100).print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
