"""Overhead of training: time of a step relative to a bare PyTorch loop with the same network, batch and optimiser.

    taskset -c 1 python -m benchmarks.training [REPEATS]
    python -m benchmarks.training accelerator=gpu [REPEATS]

Ours is `diffaccel fit`: Lightning's loop with logger and progress bar, phases, gradient clipping and its check, noise
streams, counters, data module, averaged weights. The bare loop draws the noise of a batch at once, and has no clipping
and no logging; its images are on the device.

On the CPU, times are processor times. On a GPU they are wall times, with a synchronisation before the first and after
the last step, in bf16, eager and compiled.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from benchmarks.sampling import SHAPE, build_network
from benchmarks.timing import Ratio, Stopwatch, clock, compare, show
from diffaccel import experiment
from diffaccel.config import Config, load
from diffaccel.run import trainer
from diffaccel.training.ema import EMA
from diffaccel.verbs.run import quiet


@dataclass(frozen=True)
class Case:
    """What is compared.

    Attributes:
        batch: Images per step.
        steps: Number of steps that are timed.
        warmup: Number of steps before, in which a network is compiled.
        device: Device, ``cpu`` or ``cuda``.
        precision: Lightning's precision, 32-true or bf16-mixed.
        compile: Whether networks are compiled.
        wall: Whether times are wall times.
        limit: Largest ratio.
    """

    batch: int = 64
    steps: int = 10
    warmup: int = 1
    device: str = "cpu"
    precision: str = "32-true"
    compile: bool = False
    wall: bool = False
    limit: float = 1.05

    def now(self) -> float:
        """Time in seconds, after all work that is queued on the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() if self.wall else clock()


GPU = Case(512, 200, 50, "cuda", "bf16-mixed", wall=True, limit=1.1)
CASES = {
    "cpu": {"edm": Case()},
    "gpu": {"edm": GPU, "edm, compiled": Case(**{**vars(GPU), "compile": True})},
}
EXPERIMENT = """\
method: diffusion
data: {name: npz, path: images.npz}
shape: [3, 32, 32]
network: {name: unet, widths: [64, 96, 128], blocks: 2, attention: [2], unshuffle: 2, embedding: 128}
logger: csv
"""


class StepTimer(L.Callback):
    """Timer of all steps after the warm-up, which includes the start of the trainer."""

    def __init__(self, case: Case, stopwatch: Stopwatch) -> None:
        self.case, self.stopwatch = case, stopwatch
        self.taken = 0
        self.started = self.ended = 0.0

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        self.taken += 1
        if self.taken == self.case.warmup:
            self.stopwatch.seconds, self.started = 0.0, self.case.now()
        if self.taken == self.case.warmup + self.case.steps:
            self.ended = self.case.now()


def fit(config: Config, case: Case, stopwatch: Stopwatch) -> float:
    """Train, and return the time of the steps after the warm-up.

    The stopwatch contains the time of the network's forward and backward pass, and of other functions that it watches.
    """
    method, data = experiment.build_method(config), experiment.build_data(config)
    timer = StepTimer(case, stopwatch)
    stopwatch.watch(method.denoiser.network, "forward")
    stopwatch.watch(method, "manual_backward")
    callbacks = [trainer.build_checkpointer(config, data), timer]
    trainer.build_trainer(config, callbacks).fit(method, data)
    return timer.ended - timer.started


def bare_loss(network: Callable[..., Tensor], x_0: Tensor, sigma_data: float = 0.5) -> Tensor:
    """EDM's loss."""
    sigma = (torch.randn(len(x_0), 1, 1, 1, device=x_0.device) * 1.2 - 1.2).exp()
    eps = torch.randn_like(x_0)
    norm = (sigma.square() + sigma_data**2).sqrt()
    output = network((x_0 + sigma * eps) / norm, sigma.flatten().log() / 4).to(x_0)
    target = sigma / (norm * sigma_data) * x_0 - sigma_data / norm * eps
    return (output - target).square().mean()


def bare_loop(images: Tensor, case: Case) -> float:
    """Train in a bare loop, and return the time of the steps after the warm-up."""
    torch.manual_seed(0)
    network, images = build_network().train().to(case.device), images.to(case.device)
    evaluated = torch.compile(network) if case.compile else network
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, betas=(0.9, 0.99), fused=True)
    average, started = EMA(network, half_life=50_000), 0.0
    for step in range(case.warmup + case.steps):
        if step == case.warmup:
            started = case.now()
        x_0 = images[torch.randint(len(images), (case.batch,), device=case.device)].float() / 127.5 - 1
        with torch.autocast(case.device, torch.bfloat16, enabled=case.precision == "bf16-mixed"):
            loss = bare_loss(evaluated, x_0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(case.batch, (step + 1) * case.batch)
    return case.now() - started


def measure(case: Case, images: Tensor, folder: str, repeats: int) -> tuple[Ratio, float, float | None]:
    """Compare `diffaccel fit` with the bare loop.

    Args:
        case: What is compared.
        images: Images, (N, 3, 32, 32) uint8.
        folder: Folder for the data and the output of the fits.
        repeats: Number of fits.

    Returns:
        A row of :func:`~benchmarks.timing.show`. The time within a run is measured on the CPU only, because on a GPU
        functions return before their work is done.
    """
    np.savez(Path(folder, "images.npz"), images=images.permute(0, 2, 3, 1).numpy())
    file = Path(folder, "edm.yaml")
    file.write_text(EXPERIMENT)
    words = [f"accelerator={'gpu' if case.device == 'cuda' else 'cpu'}", f"precision={case.precision}"]
    words += [f"out={folder}/out", f"compile={str(case.compile).lower()}", f"training.batch_size={case.batch}"]
    config = load(str(file), [*words, f"images={case.batch * (case.warmup + case.steps)}"])
    found = compare(lambda: fit(config, case, Stopwatch()), lambda: bare_loop(images, case), repeats)
    if case.wall:
        return found, case.limit, None
    stopwatch = Stopwatch()
    stopwatch.watch(torch.optim.Adam, "step")
    stopwatch.watch(EMA, "update")
    return found, case.limit, stopwatch.ratio(lambda: fit(config, case, stopwatch), 3)


def main(accelerator: str = "cpu", repeats: int | None = None) -> None:
    """Measure and print."""
    cases = CASES[accelerator]
    case = next(iter(cases.values()))
    if accelerator == "cpu":
        torch.set_num_threads(1)
    quiet()
    images = torch.randint(256, (2048, *SHAPE), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        count = repeats or (3 if case.wall else 9)
        rows = {name: measure(one, images, folder, count) for name, one in cases.items()}
    show(f"{case.steps} training steps; batch {case.batch}, {case.precision}, {accelerator}", rows)
    for name, (found, _, _) in rows.items() if case.wall else ():
        ours, bare = (case.batch * case.steps / seconds for seconds in (found.ours, found.bare))
        print(f"{name}: {ours:,.0f} images/s, bare {bare:,.0f}")


if __name__ == "__main__":
    words = dict(word.split("=") if "=" in word else ("repeats", word) for word in sys.argv[1:])
    main(words.get("accelerator", "cpu"), int(words["repeats"]) if "repeats" in words else None)
