"""Estimated time and memory of a fit, from a step of each of its phases with random weights and images."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from rich.table import Table
from torch import nn

from diffaccel.condition import Condition, join
from diffaccel.config import Config
from diffaccel.data import Batch
from diffaccel.methods import Diffusion
from diffaccel.noise import NoiseStreams
from diffaccel.run.machine import describe, device_type
from diffaccel.sampling.precision import arithmetic
from diffaccel.text.terminal import duration, human, print_lines, wide_console
from diffaccel.training.module import Phase, TrainedModule
from diffaccel.verbs.cost import AFFORDABLE, clock, some_condition

TIMED = 32
"""Maximum number of images of a timed training step."""
PIXELS = 32 * 32 * 32
"""Maximum number of positions of these images together, unless a single image has more."""


class PhaseCost(NamedTuple):
    """Cost of a phase of the training.

    Attributes:
        phase: Phase.
        share: Part of the run's images with which the phase takes a step, from 0 to 1.
        seconds: Time of a step per image, in seconds.
    """

    phase: Phase
    share: float
    seconds: float


def phase_costs(module: TrainedModule, shape: tuple[int, ...], config: Config) -> list[PhaseCost]:
    """Measure a training step of each phase, without the optimiser's.

    Args:
        module: Method, or training of an auto-encoder.
        shape: Shape of an image, or of a latent, (C, H, W).
        config: Configuration of the run.
    """
    device = torch.device(device_type(config))
    module.to(device)
    count = max(1, min(TIMED, PIXELS // (shape[-1] * shape[-2])))
    batch = Batch(
        torch.randn(count, *shape, device=device).clamp(-1, 1),
        _condition(module, count, device),
        torch.arange(count, device=device),
    )
    images = module.images_seen = config.training.images  # all parts of the losses are active at the end
    phases = module.phases()
    shares = [max(0.0, min(phase.until, images) - min(phase.since, images)) / images / phase.every for phase in phases]
    seconds = [0.0 for _ in phases]
    for _ in range(2):  # the second step is timed, unless the first one takes too long
        if sum(seconds) < AFFORDABLE:
            # In the order of a training step, because a phase may use what an earlier one made.
            seconds = [
                _seconds_of_step(phase, batch, config) if share else 0.0
                for phase, share in zip(phases, shares, strict=True)
            ]
    return [PhaseCost(*each) for each in zip(phases, shares, (taken / count for taken in seconds), strict=True)]


def _condition(module: TrainedModule, count: int, device: torch.device) -> Condition | None:
    """Make a condition of the kinds that a method is trained with."""
    if not isinstance(module, Diffusion):
        return None
    labels = torch.zeros(count, dtype=torch.int64, device=device) if module.trained_classes else None
    return join(Condition.of(labels), some_condition(module.sampler, count))


def _seconds_of_step(phase: Phase, batch: Batch, config: Config) -> float:
    """Time loss and gradient of a phase."""
    started = clock(batch.image.device)
    with arithmetic(config.precision, batch.image.device):
        loss = phase.loss(batch, NoiseStreams(config.seed, batch.index, "training")).mean()
    if loss.requires_grad:
        loss.backward()
    return clock(batch.image.device) - started


def print_fit(module: TrainedModule, shape: tuple[int, ...], config: Config, notes: Sequence[str] = ()) -> None:
    """Print the phases of a fit, with the estimated time.

    Args:
        module: Method, or training of an auto-encoder.
        shape: Shape of an image, or of a latent, (C, H, W).
        config: Configuration of the run.
        notes: Further lines.
    """
    plan, total = config.training, 0.0
    table = Table(box=None, header_style="bold")
    for column in ("phase", "parameters", "images", "s/image", "time"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    trained: dict[int, nn.Parameter] = {}
    for phase, share, seconds in phase_costs(module, shape, config):
        parameters = list(phase.parameters)
        trained |= {id(parameter): parameter for parameter in parameters}
        taken = share * plan.images * seconds / config.devices / config.num_nodes
        total += taken
        table.add_row(
            phase.name, f"{sum(one.numel() for one in parameters):,}", f"{share * plan.images:,.0f}",
            f"{seconds:.3g}", duration(taken),
        )  # fmt: skip
    count, size = sum(parameter.numel() for parameter in trained.values()), tuple(shape)
    print_lines(
        f"{config.experiment}: {config.method_name}, {plan.images:,} images of {size}, {plan.batch_size} a step, "
        f"seed={config.seed}"
    )
    print_lines(f"{count:,} trained parameters; with gradients, Adam and average {human(20.0 * count, 'B')} in fp32")
    if not table.row_count:
        print_lines("no phase has gradient steps: a density in closed form takes a pass over the images")
        return
    wide_console().print(table)
    print_lines(
        f"about {duration(total)} in all; {describe(config)}; times are of random weights and images, without "
        "start-up, reading, optimiser, evaluation, and what compile=true gains",
        *notes,
    )
