"""Overhead of prior and solver: time of sampling relative to the same evaluations of the bare network.

taskset -c 1 python -m benchmarks.sampling [REPEATS]
"""

import sys

import torch

from benchmarks.timing import Stopwatch, compare, show, timed
from diffaccel.denoiser import KarrasDenoiser
from diffaccel.nfe import EvaluationCounter
from diffaccel.nn.unet import UNet
from diffaccel.prior import PRIORS
from diffaccel.prior.posterior import POSTERIORS
from diffaccel.process import PROCESSES
from diffaccel.sampling import Sampler
from diffaccel.solver import SOLVERS

SHAPE, BATCH, BUDGET = (3, 32, 32), 64, 10
DETERMINISTIC, STOCHASTIC = 1.05, 1.10
CASES = {
    "ddim": ({"name": "ddim"}, "gaussian", DETERMINISTIC),
    "heun": ({"name": "heun"}, "gaussian", DETERMINISTIC),
    "dpmpp2m": ({"name": "dpmpp2m"}, "gaussian", DETERMINISTIC),
    "ipndm": ({"name": "ipndm"}, "gaussian", DETERMINISTIC),
    "ddim, eta=1": ({"name": "ddim", "eta": 1.0}, "gaussian", STOCHASTIC),
    "edm_stochastic": ({"name": "edm_stochastic"}, "gaussian", STOCHASTIC),
    "chain, then dpmpp2m": ({"name": "dpmpp2m"}, "chain", STOCHASTIC),
}


def build_network() -> UNet:
    """A small backbone: that of cifar10_small, with two blocks per stage."""
    return UNet(SHAPE, widths=[64, 96, 128], blocks=2, attention=[2], unshuffle=2, embedding=128).eval()


def build_sampler(network: UNet, solver: dict[str, object], prior: str) -> Sampler:
    """Build a sampler of the network, a solver and a prior; chains have an untrained classifier of the usual size."""
    denoiser = KarrasDenoiser(network, PROCESSES.build({"name": "edm"}))
    posterior = POSTERIORS.build({"name": "classifier", "width": 16}, shape=SHAPE, denoiser=denoiser)
    start = PRIORS.build({"name": prior, **({"chains": BATCH} if prior == "chain" else {})}, posterior=posterior)
    return Sampler(denoiser, start, SOLVERS.build(solver), SHAPE).eval()


@torch.no_grad()
def main(repeats: int = 9) -> None:
    """Measure every case."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = build_network()
    stopwatch = Stopwatch()
    stopwatch.watch(network, "forward")
    rows = {}
    for name, (solver, prior, limit) in CASES.items():
        sampler = build_sampler(network, solver, prior)
        group = [range(BATCH)]
        plan = sampler.plan(BUDGET, 10**9)
        state = sampler.open(plan, 0, group)  # excludes burn-in, which is done once per chain

        def sample() -> None:
            for _ in sampler.draw(plan, 0, group, state):  # noqa: B023 (called before the next case)
                pass

        with EvaluationCounter({"network": network}) as counter:
            sample()
        evaluations = counter.evaluations["network"] // BATCH
        x, noise = torch.randn(BATCH, *SHAPE), torch.zeros(BATCH)

        def bare() -> None:
            for _ in range(evaluations):  # noqa: B023
                network(x, noise)  # noqa: B023

        found = compare(timed(sample), timed(bare), repeats)
        rows[f"{name} ({evaluations})"] = (found, limit, stopwatch.ratio(timed(sample), 3))
    show(f"prior and solver relative to the bare network; batch {BATCH}, evaluations in parentheses", rows)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
