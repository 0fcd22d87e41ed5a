"""Overhead of prior and solver: time of sampling relative to the same evaluations of the bare network.

    taskset -c 1 python -m benchmarks.sampling [REPEATS]
    python -m benchmarks.sampling accelerator=gpu [REPEATS]

On the CPU, times are processor times. On a GPU they are wall times, with a synchronisation at both ends, in bf16, for
small and large batches, eager and compiled with channels last.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from benchmarks.timing import Stopwatch, compare, show, timed, timed_on_gpu
from diffaccel.deferred import Checks
from diffaccel.denoiser import KarrasDenoiser
from diffaccel.nfe import EvaluationCounter
from diffaccel.nn.compiling import compile_forward
from diffaccel.nn.unet import UNet
from diffaccel.prior import PRIORS
from diffaccel.prior.posterior import POSTERIORS
from diffaccel.process import PROCESSES
from diffaccel.sampling import Sampler
from diffaccel.solver import SOLVERS

SHAPE, BUDGET = (3, 32, 32), 10
DETERMINISTIC, STOCHASTIC = 1.05, 1.10


@dataclass(frozen=True)
class Run:
    """Conditions of the comparison.

    Attributes:
        batch: Images per batch.
        device: Device, ``cpu`` or ``cuda``.
        precision: Precision of the networks.
        compile: Whether the network is compiled, with channels last.
    """

    batch: int = 64
    device: str = "cpu"
    precision: str = "32-true"
    compile: bool = False

    def timed(self, function: Callable[[], object]) -> Callable[[], float]:
        """Wrap a function to return its processor time or, on a GPU, its wall time in seconds."""
        return timed(function) if self.device == "cpu" else timed_on_gpu(function)


RUNS = {
    "cpu": [Run()],
    "gpu": [Run(batch, "cuda", "bf16-mixed", compiled) for batch in (500, 2500) for compiled in (False, True)],
}
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


def build_sampler(network: UNet, solver: dict[str, object], prior: str, run: Run) -> Sampler:
    """Build a sampler of the network, a solver and a prior; chains have an untrained classifier of the usual size."""
    denoiser = KarrasDenoiser(network, PROCESSES.build({"name": "edm"}))
    posterior = POSTERIORS.build({"name": "classifier", "width": 16}, shape=SHAPE, denoiser=denoiser)
    keys = {"chains": run.batch} if prior == "chain" else {}
    start = PRIORS.build({"name": prior, **keys}, posterior=posterior)
    sampler = Sampler(denoiser, start, SOLVERS.build(solver), SHAPE, precision=run.precision)
    return sampler.to(run.device).eval()


@torch.no_grad()
def measure(run: Run, repeats: int) -> None:
    """Measure every case, and print a table."""
    torch.manual_seed(0)
    network = build_network().to(run.device)
    if run.compile:
        compile_forward(network.to(memory_format=torch.channels_last), constant=True)
    stopwatch = Stopwatch()
    if run.device == "cpu":
        stopwatch.watch(network, "forward")
    rows = {}
    for name, (solver, prior, limit) in CASES.items():
        sampler = build_sampler(network, solver, prior, run)
        group = [range(run.batch)]
        plan = sampler.plan(BUDGET, 10**9)
        with sampler.arithmetic():
            state = sampler.open(plan, 0, group)  # excludes burn-in, which is done once per chain
        x, noise = torch.randn(run.batch, *SHAPE, device=run.device), torch.zeros(run.batch, device=run.device)

        def sample() -> None:
            checks = Checks()
            deferred = checks.collected() if run.device == "cuda" else nullcontext()
            with sampler.arithmetic(), deferred:  # noqa: B023 (called before the next case)
                for _ in sampler.draw(plan, 0, group, state):  # noqa: B023
                    pass

        with EvaluationCounter({"network": network}) as counter:
            sample()
        evaluations = counter.evaluations["network"] // run.batch

        def bare() -> None:
            with sampler.arithmetic():  # noqa: B023
                for _ in range(evaluations):  # noqa: B023
                    network(x, noise)  # noqa: B023

        found = compare(run.timed(sample), run.timed(bare), repeats)
        within = stopwatch.ratio(run.timed(sample), 3) if run.device == "cpu" else None
        rows[f"{name} ({evaluations})"] = (found, limit, within)
        if run.device == "cuda":
            ours, bare_rate = (run.batch * evaluations / seconds for seconds in (found.ours, found.bare))
            print(f"{name}: {ours:,.0f} evaluations/s, bare {bare_rate:,.0f}")
    device = torch.cuda.get_device_name() if run.device == "cuda" else "one CPU thread"
    show(
        f"prior and solver relative to the bare network; {device}, batch {run.batch}, {run.precision}"
        f"{', compiled' if run.compile else ''}, evaluations in parentheses",
        rows,
    )


def main(accelerator: str = "cpu", repeats: int = 9) -> None:
    """Measure under all conditions of a device."""
    if accelerator == "cpu":
        torch.set_num_threads(1)
    for run in RUNS[accelerator]:
        measure(run, repeats)


if __name__ == "__main__":
    words = dict(word.split("=") if "=" in word else ("repeats", word) for word in sys.argv[1:])
    main(words.get("accelerator", "cpu"), int(words.get("repeats", 9)))
