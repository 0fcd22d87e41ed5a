"""What a plan would take, before anything long starts: evaluations, FLOPs, memory, time."""

import resource
import time
from collections.abc import Mapping

import torch
from rich.console import Console
from rich.table import Table

from diffaccel.config import Config
from diffaccel.experiment import human
from diffaccel.methods import Diffusion
from diffaccel.nfe import EvaluationCounter
from diffaccel.prior import Plan


@torch.no_grad()
def forward_cost(method: Diffusion, images: int) -> tuple[float, float]:
    """Run one forward of the denoiser on a few images.

    Returns:
        FLOPs of one image, and seconds of one image on this machine.
    """
    process = method.denoiser.process
    x_t = torch.randn(images, *method.shape, device=method.device)
    t = process.time(torch.ones(images, dtype=torch.float64, device=method.device))
    with EvaluationCounter(method.evaluated_networks()) as counter:
        method.denoiser(x_t, t)
    started = time.perf_counter()
    method.denoiser(x_t, t)
    if method.device.type == "cuda":
        torch.cuda.synchronize()
    return sum(counter.flops.values()), (time.perf_counter() - started) / images


def print_cost(config: Config, method: Diffusion, plans: Mapping[float, Plan]) -> None:
    """Print a plan per budget, and the cost that one measured forward predicts."""
    images = min(config.batch_size, 16)
    flops, seconds = forward_cost(method.eval(), images)
    parameters = sum(parameter.numel() for parameter in method.parameters())
    table = Table(box=None, header_style="bold")
    for column in ("budget", "chain steps", "solver steps", "burn-in", "nfe", "FLOPs/image", "time for n"):
        table.add_column(column, justify="right")
    for budget, plan in plans.items():
        nfe = method.planned_nfe(plan, config.n)
        table.add_row(
            f"{budget:g}",
            str(plan.skips),
            str(plan.steps),
            f"{method.prior.burn_in_evaluations(config.n) / config.n:.3g}",
            f"{nfe:.4g}",
            human(nfe * flops, "FLOP"),
            f"{nfe * seconds * config.n / config.devices / config.num_nodes:.3g} s",
        )
    print(f"{config.experiment}: {config.method_name}, images {tuple(method.shape)}, n={config.n}, seed={config.seed}")
    print(f"{parameters:,} parameters, {human(4.0 * parameters, 'B')} in fp32; random weights: a dry run loads none")
    Console().print(table)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"one forward of {images} images was run: {human(flops, 'FLOP')} and {seconds:.3g} s an image here; "
        f"peak memory so far {human(peak, 'B')}"
    )
