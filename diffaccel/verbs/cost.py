"""Cost estimates of a dry run: evaluations, FLOPs, memory, time."""

import itertools
import math
import time
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffaccel.condition import Condition
from diffaccel.config import Config
from diffaccel.errors import UsageError
from diffaccel.latents import Latents
from diffaccel.nfe import EvaluationCounter
from diffaccel.prior import ChainPrior, Group, Plan
from diffaccel.run.machine import describe, device_type
from diffaccel.sampling import Sampler
from diffaccel.text.terminal import duration, human, print_lines, wide_console

AFFORDABLE = 5.0
"""Maximum time of a measurement in seconds; longer ones are extrapolated from fewer images."""

INFLATED = 1.5
"""Multiple of the time of a forward pass from which a batch is timed again."""


class LiveBytes(TorchDispatchMode):
    """Counter of the bytes of live tensors created within the context, on any device, including the meta device.

    Attributes:
        live: Current number of bytes.
        peak: Maximum number of bytes, without workspaces of kernels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the storages that it creates."""
        known = {
            tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._seen | known:  # neither a view nor in place
                    self._seen.add(storage._cdata)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


class ForwardCost(NamedTuple):
    """Cost of a forward pass of the denoiser.

    Attributes:
        timed: Number of images of the timed forward pass.
        flops: FLOPs per image.
        encoding: FLOPs per image of the encoders of its condition, once for all forward passes.
        seconds: Time per image, in seconds.
        activations: Memory of activations per image, in bytes.
        compiling: Additional time of the first forward pass with the timed size, in seconds, for ``compile``.
        counting: Additional time of the very first forward pass, in seconds, for counting FLOPs, as in a bench.
    """

    timed: int
    flops: float
    encoding: float
    seconds: float
    activations: float
    compiling: float
    counting: float


@torch.no_grad()
def forward_cost(sampler: Sampler, batch_size: int) -> ForwardCost:
    """Measure memory and FLOPs on a few images, and time on a batch, or on few images if a batch takes too long."""
    pixels = sampler.shape[1] * sampler.shape[2]
    watched = min(batch_size, max(1, 16 * 32 * 32 // pixels))  # one image for 256x256, which is slow on a CPU
    encoders = sampler.denoiser.condition_encoders
    with EvaluationCounter({**sampler.evaluated_networks(), **encoders}) as counter, LiveBytes() as memory:
        least = _forward(sampler, watched)
    # The first pass includes the counting and the start-up of libraries, of seconds on a few images.
    timed = batch_size if _forward(sampler, watched) / watched * batch_size < AFFORDABLE else watched
    first = _forward(sampler, timed)
    seconds = min(_forward(sampler, timed) for _ in range(2)) / timed
    compiling, counting = max(0.0, first - timed * seconds), max(0.0, least - watched * seconds)
    encoding = sum(counter.flops.get(name, 0.0) for name in encoders)
    flops = sum(counter.flops.values()) - encoding
    return ForwardCost(timed, flops, encoding, seconds, memory.peak / watched, compiling=compiling, counting=counting)


def _forward(sampler: Sampler, images: int) -> float:
    """Time of a forward pass, without the encoders of a condition, in seconds."""
    x_t = torch.randn(images, *sampler.shape, device=sampler.device)
    t = sampler.denoiser.process.time(torch.ones(images, dtype=torch.float64, device=sampler.device))
    denoiser = sampler.denoiser.given(some_condition(sampler, images))
    started = clock(sampler.device)
    denoiser(x_t, t)
    return clock(sampler.device) - started


def some_condition(sampler: Sampler, images: int) -> Condition | None:
    """Make a condition of the kinds that the network takes, other than labels, whose cost does not differ."""
    takes, device = sampler.takes, sampler.device
    if not takes.required:
        return None
    length = sampler.inputs.token_count if sampler.inputs is not None else 1
    ones = torch.ones(images, takes.pixels, *sampler.shape[1:], device=device)
    return Condition(
        tokens=torch.zeros(images, length, takes.tokens, device=device) if takes.tokens else None,
        image=ones[:, : takes.image] if takes.image else None,
        mask=ones[:, takes.image :] if takes.mask else None,
    )


def clock(device: torch.device) -> float:
    """Read the clock, in seconds, when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def seconds_per_evaluation(config: Config, sampler: Sampler, plan: Plan, forward: float) -> float:
    """Measure the time per evaluation, including noise, solver and chain.

    The first batch is sampled, including burn-in, if that does not take too long. Otherwise the time of the forward
    pass is returned, which dominates when evaluations are slow.

    Args:
        config: Configuration of the run.
        sampler: Sampler of the images.
        plan: Plan of the budget.
        forward: Time of a forward pass per image, in seconds.

    Returns:
        Time per evaluation and image, in seconds.
    """
    group = plan.prior.schedule(config.n, config.images_per_batch)[0]
    nfe = sampler.planned_nfe(plan, config.n)
    burn_in = plan.prior.burn_in_per_chain if isinstance(plan.prior, ChainPrior) else 0
    if math.isnan(nfe) or (nfe + burn_in) * len(group[0]) * forward > AFFORDABLE:
        return forward
    try:
        rate = _rate_of_first_batch(config, sampler, plan, group)
        if rate > INFLATED * forward:  # perhaps by start-up, which the batches of a run share
            rate = min(rate, _rate_of_first_batch(config, sampler, plan, group))
    except UsageError:  # random weights may diverge
        return forward
    return rate


def _rate_of_first_batch(config: Config, sampler: Sampler, plan: Plan, group: Group) -> float:
    """Time per evaluation and image of a group's first batch, including burn-in, in seconds."""
    evaluated = sampler.evaluated_networks(plan.prior)
    with EvaluationCounter(evaluated, dict.fromkeys(evaluated, 0.0)) as counter:  # FLOPs are known
        started = clock(sampler.device)
        state = sampler.open(plan, config.seed, group)
        given = some_condition(sampler, len(group[0]))
        for _, images in itertools.islice(sampler.draw(plan, config.seed, group[:1], state, given), 1):
            images.cpu()
        taken = clock(sampler.device) - started
    return taken / max(1, sum(counter.evaluations[name] for name in evaluated))


def print_cost(config: Config, sampler: Sampler, plans: Mapping[float, Plan]) -> None:
    """Print a plan per budget, with costs estimated from measurements with random weights."""
    sampler.to(device_type(config))
    modules = nn.ModuleList([sampler.denoiser, sampler.prior])  # shared weights count once
    parameters = sum(parameter.numel() for parameter in modules.parameters())
    table = Table(box=None, header_style="bold")
    for column in ("budget", "chain steps", "solver steps", "burn-in", "nfe", "FLOPs/image", "sampling of n"):
        table.add_column(column, justify="right")
    with sampler.arithmetic():
        cost = forward_cost(sampler, min(config.images_per_batch, config.n))
        for budget, plan in plans.items():
            nfe = sampler.planned_nfe(plan, config.n)
            spent = ("by its tolerance", "")
            if not math.isnan(nfe):
                rate = seconds_per_evaluation(config, sampler, plan, cost.seconds)
                total = cost.counting + rate * nfe * config.n / config.devices / config.num_nodes
                spent = (human(nfe * cost.flops + cost.encoding, "FLOP"), duration(total))
            burn_in = f"{plan.prior.burn_in_evaluations(config.n) / config.n:.3g}"
            table.add_row(f"{budget:g}", str(plan.chain_steps), str(plan.steps), burn_in, f"{nfe:.4g}", *spent)
    shapes = f"images {sampler.image_shape}" + (f", latents {sampler.shape}" if sampler.latents is not None else "")
    print_lines(f"{config.experiment}: {config.method_name}, {shapes}, n={config.n}, seed={config.seed}")
    print_lines(f"{parameters:,} parameters, {human(4.0 * parameters, 'B')} in fp32 (a dry run uses random weights)")
    wide_console().print(table)
    _print_forward(config, cost, 4.0 * parameters)
    if sampler.latents is not None:
        _print_decoding(sampler, sampler.latents)


def _print_decoding(sampler: Sampler, latents: Latents) -> None:
    """Print the cost of decoding, measured on one image."""
    x_0 = torch.randn(1, *latents.shape, device=sampler.device)
    seconds = 0.0
    with torch.no_grad(), EvaluationCounter({"decoder": latents}) as counter:
        for number in range(2):
            if number == 0 or seconds < AFFORDABLE:  # the first time includes the start-up of libraries
                started = clock(sampler.device)
                latents(x_0)
                seconds = clock(sampler.device) - started
    parameters = sum(parameter.numel() for parameter in latents.parameters())
    print_lines(
        f"decoding takes {human(counter.flops['decoder'], 'FLOP')} and {seconds:.3g} s per image in addition (timed on "
        f"one image), by an auto-encoder of {parameters:,} parameters"
    )


def _print_forward(config: Config, cost: ForwardCost, weights: float) -> None:
    batch_size = config.images_per_batch
    print_lines(f"{describe(config)}; times do not include start-up, scoring and metrics")
    if config.compile:
        print_lines(f"compiling takes {cost.compiling:.3g} s in addition for each batch size")
    print_lines(
        f"one forward pass of {cost.timed} images was timed: {human(cost.flops, 'FLOP')}, {cost.seconds:.3g} s and "
        f"{human(cost.activations, 'B')} of activations per image"
    )
    print_lines(
        f"memory per process: {human(weights, 'B')} of weights, {human(batch_size * cost.activations, 'B')} of "
        f"activations at batch_size={batch_size}, without the extractor and libraries"
    )
