"""Work that the first batch alone requires: compilation, and counting FLOPs without compiled graphs."""

from typing import TYPE_CHECKING

import torch

from diffaccel.condition import Condition
from diffaccel.deferred import Stopwatch
from diffaccel.nfe import EvaluationCounter
from diffaccel.nn.compiling import is_compiled
from diffaccel.noise import NoiseStreams
from diffaccel.prior import Plan

if TYPE_CHECKING:
    from diffaccel.sampling.sampler import Sampler


def needs_warm_up(sampler: "Sampler", plan: Plan) -> bool:
    """Whether the first batch takes much longer than others: with compiled networks, and on GPUs."""
    networks = sampler.evaluated_networks(plan.prior).values()
    return sampler.device.type == "cuda" or any(is_compiled(network) for network in networks)


@torch.no_grad()
def warm_up(
    sampler: "Sampler", plan: Plan, count: int, given: Condition | None = None
) -> tuple[float, dict[str, float]]:
    """Evaluate the networks of a plan once for one image, counting FLOPs, and once for a batch.

    Args:
        sampler: Sampler.
        plan: Plan of the budget.
        count: Number of images of a batch.
        given: Condition of ``count`` images or more; by default the sampler's.

    Returns:
        Time, in seconds, and FLOPs per evaluation by network.
    """
    stopwatch = Stopwatch(sampler.device)
    with sampler.arithmetic(), EvaluationCounter(sampler.counted_networks(plan.prior)) as counter:
        _evaluate(sampler, plan, 1, given)
    with sampler.arithmetic():
        _evaluate(sampler, plan, count, given)
    stopwatch.stop()
    return stopwatch.seconds, counter.flops


def _evaluate(sampler: "Sampler", plan: Plan, count: int, given: Condition | None) -> None:
    indices = range(count)
    noise, denoiser = NoiseStreams(0, indices, "warm-up", sampler.device), sampler.denoiser
    denoiser = denoiser.given(sampler.condition(plan, indices) if given is None else given.select(slice(count)))
    plan.prior.warm_up(denoiser, noise, sampler.shape)
    if not plan.steps:
        return
    x_t = noise.normal(torch.empty(count, *sampler.shape, device=sampler.device))
    if sampler.latents is not None:
        sampler.latents.decode(x_t)
    # A chain evaluates without guidance, also where the solver guides.
    for each in (denoiser, *((denoiser.guided(plan.solver.guidance),) if plan.solver.guidance else ())):
        each(*each.process.from_ratio(x_t, torch.full((count,), 1.0, dtype=torch.float64, device=x_t.device)))
