"""Overhead of training: time of a step relative to a bare PyTorch loop with the same network, batch and optimiser.

    taskset -c 1 python -m benchmarks.training [REPEATS]

Ours is `diffaccel fit`: Lightning's loop with logger and progress bar, phases, gradient clipping and its check, noise
streams, counters, data module, averaged weights. The bare loop draws the noise of a batch at once, and has no clipping
and no logging.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from benchmarks.sampling import SHAPE, build_network
from benchmarks.timing import Stopwatch, clock, compare, show
from diffaccel import experiment
from diffaccel.config import Config, load
from diffaccel.run import trainer
from diffaccel.training.ema import EMA
from diffaccel.verbs.run import quiet

BATCH, STEPS, LIMIT = 64, 10, 1.05
EXPERIMENT = """\
method: diffusion
data: {name: npz, path: images.npz}
shape: [3, 32, 32]
network: {name: unet, widths: [64, 96, 128], blocks: 2, attention: [2], unshuffle: 2, embedding: 128}
training: {batch_size: 64}
logger: csv
accelerator: cpu
"""


class StepTimer(L.Callback):
    """Timer of all steps except the first, to exclude the start of the trainer."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.ends: list[float] = []
        self.stopwatch = stopwatch

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        if not self.ends:
            self.stopwatch.seconds = 0.0
        self.ends.append(clock())

    @property
    def seconds(self) -> float:
        """Processor time of all steps except the first."""
        return self.ends[-1] - self.ends[0]


def fit(config: Config, stopwatch: Stopwatch) -> float:
    """Train for STEPS + 1 steps, and return the processor time of STEPS steps.

    The stopwatch contains the time of the network's forward and backward pass, and of other functions that it watches.
    """
    method, data, timer = experiment.build_method(config), experiment.build_data(config), StepTimer(stopwatch)
    stopwatch.watch(method.denoiser.network, "forward")
    stopwatch.watch(method, "manual_backward")
    callbacks = [trainer.build_checkpointer(config), timer]
    trainer.build_trainer(config, callbacks).fit(method, data)
    return timer.seconds


def bare_loss(network: torch.nn.Module, x_0: Tensor, sigma_data: float = 0.5) -> Tensor:
    """EDM's loss."""
    sigma = (torch.randn(len(x_0), 1, 1, 1) * 1.2 - 1.2).exp()
    eps = torch.randn_like(x_0)
    norm = (sigma.square() + sigma_data**2).sqrt()
    output = network((x_0 + sigma * eps) / norm, sigma.flatten().log() / 4)
    target = sigma / (norm * sigma_data) * x_0 - sigma_data / norm * eps
    return (output - target).square().mean()


def bare_loop(images: Tensor) -> float:
    """Train for STEPS + 1 steps in a bare loop, and return the processor time of STEPS steps."""
    torch.manual_seed(0)
    network = build_network().train()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, betas=(0.9, 0.99), fused=True)
    average, ends = EMA(network, half_life=50_000), []
    for step in range(STEPS + 1):
        x_0 = images[torch.randint(len(images), (BATCH,))].float() / 127.5 - 1
        loss = bare_loss(network, x_0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(BATCH, (step + 1) * BATCH)
        ends.append(clock())
    return ends[-1] - ends[0]


def main(repeats: int = 9) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    quiet()
    images = torch.randint(256, (2048, *SHAPE), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder, "images.npz"), images=images.permute(0, 2, 3, 1).numpy())
        file = Path(folder, "edm.yaml")
        file.write_text(EXPERIMENT)
        config = load(str(file), [f"out={folder}/out", f"images={BATCH * (STEPS + 1)}"])
        found = compare(lambda: fit(config, Stopwatch()), lambda: bare_loop(images), repeats)
        stopwatch = Stopwatch()
        stopwatch.watch(torch.optim.Adam, "step")
        stopwatch.watch(EMA, "update")
        within = stopwatch.ratio(lambda: fit(config, stopwatch), 3)
    show(f"{STEPS} training steps; batch {BATCH}", {"edm": (found, LIMIT, within)})


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
