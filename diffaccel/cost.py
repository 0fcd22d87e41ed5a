"""What a plan would take, before anything long starts: evaluations, FLOPs, memory, time."""

import math
import time
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffaccel.config import Config
from diffaccel.methods import Diffusion
from diffaccel.nfe import EvaluationCounter
from diffaccel.prior import Plan
from diffaccel.terminal import human


class LiveBytes(TorchDispatchMode):
    """Follows how many bytes of tensors made within are alive, on any device, the meta device too.

    Attributes:
        live: Now.
        peak: At most. A kernel's own workspace is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and take up the storages that it made."""
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


@torch.no_grad()
def forward_cost(method: Diffusion, images: int) -> tuple[float, float, float]:
    """Run the denoiser twice on a few images, once watched and once timed.

    Returns:
        FLOPs of one image, seconds of one image on this machine, and bytes of activations of one image.
    """
    process = method.denoiser.process
    x_t = torch.randn(images, *method.shape, device=method.device)
    t = process.time(torch.ones(images, dtype=torch.float64, device=method.device))
    with EvaluationCounter(method.evaluated_networks()) as counter, LiveBytes() as memory:
        method.denoiser(x_t, t)
    started = time.perf_counter()
    method.denoiser(x_t, t)
    if method.device.type == "cuda":
        torch.cuda.synchronize()
    return sum(counter.flops.values()), (time.perf_counter() - started) / images, memory.peak / images


def print_cost(config: Config, method: Diffusion, plans: Mapping[float, Plan]) -> None:
    """Print a plan per budget, and the cost that one measured forward predicts."""
    pixels = config.shape[1] * config.shape[2]
    images = min(config.batch_size, max(1, 16 * 32 * 32 // pixels))  # one alone of 256x256 takes a while on a CPU
    with torch.autocast(method.device.type, torch.bfloat16, enabled=config.precision == "bf16-mixed"):
        flops, seconds, activations = forward_cost(method.eval(), images)
    parameters = sum(parameter.numel() for parameter in method.parameters())
    table = Table(box=None, header_style="bold")
    for column in ("budget", "chain steps", "solver steps", "burn-in", "nfe", "FLOPs/image", "time for n"):
        table.add_column(column, justify="right")
    total = seconds * config.n / config.devices / config.num_nodes
    for budget, plan in plans.items():
        method.tune(budget)
        nfe = method.planned_nfe(plan, config.n)
        table.add_row(
            f"{budget:g}",
            str(plan.skips),
            str(plan.steps),
            f"{method.prior.burn_in_evaluations(config.n) / config.n:.3g}",
            f"{nfe:.4g}",
            *(("by its tolerance", "") if math.isnan(nfe) else (human(nfe * flops, "FLOP"), f"{nfe * total:.3g} s")),
        )
    print(f"{config.experiment}: {config.method_name}, images {tuple(method.shape)}, n={config.n}, seed={config.seed}")
    print(f"{parameters:,} parameters, {human(4.0 * parameters, 'B')} in fp32; random weights: a dry run loads none")
    Console().print(table)
    print(
        f"one forward of {images} images was run: {human(flops, 'FLOP')}, {seconds:.3g} s and "
        f"{human(activations, 'B')} of activations an image here"
    )
    weights, batch = human(4.0 * parameters, "B"), human(config.batch_size * activations, "B")
    print(
        f"memory of a process: {weights} of weights, {batch} of activations at batch_size={config.batch_size}, "
        "besides the extractor's and the libraries' own"
    )
