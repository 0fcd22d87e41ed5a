"""Batches of a group of images: sampled, counted, timed and decoded."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from diffaccel.condition import Condition
from diffaccel.deferred import Checks, Stopwatch, runs_ahead
from diffaccel.nfe import EvaluationCounter
from diffaccel.prior import ChainState, Group, Plan
from diffaccel.sampling.cost import Sampled

if TYPE_CHECKING:
    from diffaccel.sampling.sampler import Sampler

DECODER = "decoder"
"""Name of the decoder of latents, whose FLOPs are counted apart."""


def counted_batches(
    sampler: "Sampler",
    plan: Plan,
    group: Group,
    seed: int,
    done: int,
    saved: dict[str, Any] | None,
    given: Condition | None,
) -> Iterator[Sampled]:
    """Yield the unfinished batches of a group; see :meth:`diffaccel.sampling.Sampler.batches`."""
    if done == len(group):
        return
    networks = sampler.counted_networks(plan.prior)
    if sampler.inputs is not None and given is None:
        sampler.inputs.prepare()
    seconds, flops = sampler.warmed_up(plan, len(group[0]), given)
    rounds = len(saved["trace"]) if saved else 0
    decoder_flops: dict[str, float] = {}
    stopwatch, checks, counter = Stopwatch(sampler.device), Checks(), EvaluationCounter(networks, flops)
    with _watched(sampler, checks, counter):
        state = sampler.restore(plan, seed, group, saved) if done else sampler.open(plan, seed, group)
    batches = sampler.draw(plan, seed, group[done:], state, given)
    for _ in group[done:]:
        # Left between batches, so that the caller computes in full precision; the generator runs inside ``next``.
        with _watched(sampler, checks, counter):
            indices, x_0 = next(batches)
            images = sampler.kind(x_0) if sampler.latents is None else x_0
        stopwatch.stop()
        decoding = None
        if sampler.latents is not None:
            decoding, decoder = Stopwatch(sampler.device), EvaluationCounter({DECODER: sampler.latents}, decoder_flops)
            with _checked(sampler, checks), decoder:
                images = sampler.kind(sampler.latents.decode(x_0))
            decoding.stop()
            decoder_flops = decoder.flops
        chained = isinstance(state, ChainState)
        trace = state.trace[rounds:] if chained else []
        yield Sampled(
            torch.arange(indices.start, indices.stop), images, dict(counter.evaluations), dict(counter.burn_in),
            dict(counter.flops), trace, state.state_dict() if chained else None, stopwatch, checks, seconds,
            decoding, decoder_flops.get(DECODER, 0.0),
        )  # fmt: skip
        rounds, seconds = rounds + len(trace), 0.0
        stopwatch, checks, counter = (
            Stopwatch(sampler.device), Checks(), EvaluationCounter(networks, counter.flops),
        )  # fmt: skip


@contextmanager
def _watched(sampler: "Sampler", checks: Checks, counter: EvaluationCounter) -> Iterator[None]:
    """Evaluate in the precision of the networks, counted, with checks that do not make the host wait."""
    with sampler.arithmetic(), counter, _checked(sampler, checks):
        yield


def _checked(sampler: "Sampler", checks: Checks) -> AbstractContextManager[None]:
    """Return the context of checks that do not make the host wait."""
    return checks.collected() if runs_ahead(sampler.device) else nullcontext()
