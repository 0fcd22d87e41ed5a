"""Counting of a solver's evaluations without a network."""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.condition import Condition
from diffaccel.denoiser import Denoiser
from diffaccel.denoiser.conditioned import within
from diffaccel.noise import NoiseStreams
from diffaccel.process import Prediction, Process
from diffaccel.solver.base import Solver


class Rehearsal(Denoiser):
    """Denoiser of data that are 0, which counts the evaluations that a guided denoiser would take.

    Args:
        process: Forward process.
    """

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process, self.ratio_range = process, (0.0, float("inf"))
        self.interval: Sequence[float] | None = None
        self.evaluations = 0

    @override
    def guided(self, weight: float, interval: Sequence[float] | None = None) -> Denoiser:
        self.interval = interval
        return self

    @override
    def forward(
        self, x_t: Tensor, t: Tensor, condition: Condition | None = None, augment: Tensor | None = None
    ) -> Prediction:
        acts = self.interval is not None and bool(within(self, t, self.interval).all())
        self.evaluations += 1 + acts
        return Prediction(torch.zeros_like(x_t), torch.zeros_like(x_t))


def evaluations(solver: Solver, process: Process, ratio: float, steps: int) -> int:
    """Count the evaluations of a guided solver for one sample.

    Args:
        solver: Solver with guidance, not adaptive.
        process: Forward process.
        ratio: Noise-to-data ratio of the start; infinity for the end of the process.
        steps: Number of steps.
    """
    rehearsal = Rehearsal(process)
    t = process.time(torch.tensor([ratio], dtype=torch.float64, device="cpu")).clamp_max(process.t_max)
    solver(rehearsal, torch.zeros(1, 1, 1, 1, device="cpu"), t, NoiseStreams(0, range(1)), steps)
    return rehearsal.evaluations
