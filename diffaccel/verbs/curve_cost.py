"""Estimated time of the steps of ``curve``, from a training step, a forward pass and a batch of features."""

from collections.abc import Sequence

import torch
from rich.table import Table

from diffaccel import experiment
from diffaccel.config import Config
from diffaccel.experiment.chain import Step
from diffaccel.methods import Diffusion
from diffaccel.run.machine import describe, device_type
from diffaccel.sampling import Sampler
from diffaccel.text.terminal import print_lines, wide_console
from diffaccel.verbs.cost import clock, forward_cost
from diffaccel.verbs.fit_cost import phase_costs

TIMED = 32
"""Number of images of a timed batch of features."""


def print_costs(steps: Sequence[Step]) -> None:
    """Print the steps with their lengths and estimated times."""
    table = Table(box=None, header_style="bold")
    for column, justify in (("", "right"), ("step", "left"), ("length", "left"), ("about", "right"), ("in", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    total, judging = 0.0, 0.0
    for number, step in enumerate(steps, start=1):
        config = step.config
        if step.method is not None:
            taken = seconds_per_image(step.method, config) * config.training.images
            length = f"{config.training.images:,} images"
        else:
            assert step.sampler is not None
            judging = judging or seconds_of_features(config)
            taken = seconds_of_samples(step.sampler, config) + len(config.nfe) * config.n * judging
            length = f"n={config.n}, nfe={','.join(f'{budget:g}' for budget in config.nfe)}"
        total += taken
        table.add_row(f"{number}", f"{step.verb} {step.name}", length, minutes(taken), str(config.folder))
    wide_console().print(table)
    config = steps[-1].config
    print_lines(
        f"about {minutes(total)} in all on this machine ({describe(config)}), without start-up, plots and measured "
        "points, which are not measured again"
    )


def minutes(seconds: float) -> str:
    """Format an estimated time."""
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def seconds_per_image(method: Diffusion, config: Config) -> float:
    """Measure the time of a training step per image, over all phases, weighted by the images for which each is active.

    The time of a density in closed form, which is a pass over the images, is not included.
    """
    return sum(cost.share * cost.seconds for cost in phase_costs(method, method.shape, config))


def seconds_of_samples(sampler: Sampler, config: Config) -> float:
    """Estimate the time of sampling all budgets from the time of a forward pass."""
    sampler.to(torch.device(device_type(config)))
    with sampler.arithmetic():
        cost = forward_cost(sampler, min(config.images_per_batch, config.n))
    return sum(sampler.planned_nfe(sampler.plan(budget, config.n), config.n) for budget in config.nfe) * (
        config.n * cost.seconds
    )


@torch.no_grad()
def seconds_of_features(config: Config) -> float:
    """Measure the time of the features of all judges, per image."""
    device = torch.device(device_type(config))
    images = torch.randint(0, 256, (TIMED, *config.shape), dtype=torch.uint8, device=device)
    taken = 0.0
    for extractor in experiment.build_extractors(config):
        extractor.to(device)(images)
        started = clock(device)
        extractor(images)
        taken += (clock(device) - started) / TIMED
    return taken
