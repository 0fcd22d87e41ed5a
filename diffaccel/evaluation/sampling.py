"""The sampling loop that every command shares: images made batch by batch, each counted on the networks."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from diffaccel.errors import UsageError
from diffaccel.evaluation.scores import to_uint8
from diffaccel.methods import Diffusion
from diffaccel.nfe import EvaluationCounter
from diffaccel.prior import ChainState, Group, Plan
from diffaccel.text.terminal import description_column


@dataclass
class Sampled:
    """A batch of generated images, and what it took.

    Attributes:
        indices: Of the images, (b,) int64.
        images: As they are scored, (b, C, H, W): uint8, or float32 where the data are no images.
        evaluations: Samples by network, burn-in included.
        burn_in: The part of them spent in burn-in.
        flops: Of one sample by network.
        seconds: Time for making the images.
        trace: What a chain recorded in this round.
        state: The state of the chains after the batch; None for independent images.
    """

    indices: Tensor
    images: Tensor
    evaluations: dict[str, int]
    burn_in: dict[str, int]
    flops: dict[str, float]
    seconds: float
    trace: list[dict[str, Any]]
    state: dict[str, Any] | None


@dataclass(frozen=True)
class ImageKind:
    """How a network's output becomes an image.

    Attributes:
        discrete: Whether samples are images, brought to uint8; points stay as they are.
        truncate: Whether images are truncated to uint8 instead of rounded.
    """

    discrete: bool = True
    truncate: bool = False

    def __call__(self, x_0: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> uint8, or points -> float32.

        Raises:
            UsageError: A value is NaN or infinite, which as uint8 would be a dark pixel.
        """
        if not x_0.isfinite().all():
            raise UsageError("an image holds NaN or infinity: check the network's weights, or take precision=32-true")
        return to_uint8(x_0, self.truncate) if self.discrete else x_0.float()


def sample_group(
    method: Diffusion,
    plan: Plan,
    group: Group,
    seed: int,
    kind: ImageKind,
    autocast: Callable[[], AbstractContextManager[Any]],
    done: int = 0,
    saved: dict[str, Any] | None = None,
) -> Iterator[Sampled]:
    """Make the batches of a group that are not done yet.

    Args:
        method: Makes the images, tuned to the budget.
        plan: How the budget is spent.
        group: Image indices, one range a batch.
        seed: Image i draws from stream (seed, i).
        kind: Brings images to the form that is scored.
        autocast: Context of the networks' precision. It is left between batches, so that the caller computes in full.
        done: Number of leading batches that an earlier run has made.
        saved: The state of the chains after the last of them.
    """
    if done == len(group):
        return
    networks = {**method.evaluated_networks(), **method.auxiliary_networks()}
    rounds = len(saved["trace"]) if saved else 0
    clock = time.perf_counter()
    counter = EvaluationCounter(networks)
    with autocast(), counter:
        state = method.restore(seed, group, saved) if done else method.open(seed, group)
    batches = method.sample(seed, group[done:], plan, state)
    for _ in group[done:]:
        with autocast(), counter:  # the generator runs inside ``next``
            indices, x_0 = next(batches)
        seconds = time.perf_counter() - clock
        chained = isinstance(state, ChainState)
        trace = state.trace[rounds:] if chained else []
        yield Sampled(
            torch.tensor(indices), kind(x_0), dict(counter.evaluations), dict(counter.burn_in), dict(counter.flops),
            seconds, trace, state.state_dict() if chained else None,
        )  # fmt: skip
        rounds += len(trace)
        counter = EvaluationCounter(networks, counter.flops)
        clock = time.perf_counter()


def evaluations_per_image(
    method: Diffusion, budget: float, evaluations: Mapping[str, int], burn_in: Mapping[str, int], n: int
) -> tuple[float, float]:
    """Evaluations per image that n images took: all of them, and those of the burn-in.

    Raises:
        UsageError: They are more than the budget allows.
    """
    evaluated = method.evaluated_networks()
    nfe, burned = (sum(counts.get(name, 0) for name in evaluated) / n for counts in (evaluations, burn_in))
    bounded = nfe if method.prior.burn_in_counted else nfe - burned
    if bounded > budget * (1 + 1e-9):
        raise UsageError(f"nfe={budget:g} was overspent: {bounded:.6g} evaluations per image were counted")
    return nfe, burned


def progress(console: Console, shown: bool, budget: float) -> Progress:
    """Bar over the images of a budget; only a terminal shows it."""
    columns = (
        description_column(f"nfe {budget:g}" if math.isfinite(budget) else "adaptive"),
        BarColumn(),
        MofNCompleteColumn(),
        description_column("images"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=True)
