"""Sampling batch by batch, with finished batches on disk until the result is complete."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from diffaccel.deferred import Stopwatch, as_numbers, runs_ahead, to_host
from diffaccel.evaluation.partial import Chunk, Partial
from diffaccel.evaluation.scores import digests
from diffaccel.features.extractors import Extractor
from diffaccel.prior import ChainPrior, Group, Plan
from diffaccel.sampling import Sampled, Sampler
from diffaccel.text.terminal import description_column


@dataclass
class _Launched:
    """Batch on which the device may still be working, and what is needed to finish it on the host."""

    number: int
    group: Group
    made: Sampled
    images: Tensor
    features: list[Tensor]
    state: Any
    trace: list[dict[str, Any]]
    scoring: Stopwatch


def produce(
    sampler: Sampler,
    plan: Plan,
    groups: Sequence[Group],
    seed: int,
    partial: Partial,
    rank: int = 0,
    extractors: Sequence[Extractor] = (),
    shown: int = 0,
    keep_images: bool = True,
    afresh: bool = False,
) -> Iterator[Chunk]:
    """Yield the batches of some groups, of each first those on disk from an earlier run, then new ones.

    While the host hashes and writes a batch, a GPU samples the next one.

    Args:
        sampler: Sampler of the images.
        plan: Plan of the budget.
        groups: Image indices, one range per batch.
        seed: Seed; image i has the noise stream (seed, i).
        partial: Finished batches on disk.
        rank: This rank.
        extractors: Feature extractors, all of which see the same images.
        shown: Number of first images that the sample grid shows.
        keep_images: Whether the chunks contain all images.
        afresh: Whether to sample batches on disk again.
    """

    def finished(batch: Chunk | _Launched) -> Chunk:
        if isinstance(batch, Chunk):
            return batch
        made, final = batch.made, batch.images
        seconds, scoring = made.settle(), batch.scoring.seconds  # which wait for the device
        chunk = Chunk(
            made.indices, torch.zeros(len(final), 0), digests(final), final[made.indices < shown],
            final if keep_images else None, "", rank, made.evaluations, made.burn_in, made.flops,
            seconds, scoring, [as_numbers(record) for record in batch.trace], made.seconds_warm_up,
            decoding=made.seconds_decoding, decoding_flops=made.decoding_flops,
        )  # fmt: skip
        _assign(chunk, extractors, batch.features)
        partial.save(batch.group, batch.number, chunk, batch.state)
        return chunk

    ahead, queued = int(runs_ahead(sampler.device)), deque[Chunk | _Launched]()
    for group in groups:
        done, saved = (0, None) if afresh else partial.done(group, isinstance(plan.prior, ChainPrior))
        known = _read(group[:done], partial, extractors, sampler.device)
        new = _launch(sampler, plan, group, seed, done, saved, extractors)
        batches: Iterator[Chunk | _Launched] = chain(known, new)
        for batch in batches:
            queued.append(batch)
            if len(queued) > ahead:
                yield finished(queued.popleft())
    while queued:
        yield finished(queued.popleft())


def _assign(chunk: Chunk, extractors: Sequence[Extractor], features: Sequence[Tensor]) -> None:
    """Set the features of a batch, one tensor per extractor."""
    if extractors:
        chunk.features, chunk.extractor = features[0], extractors[0].sha256
        chunk.others = {one.sha256: own for one, own in zip(extractors[1:], features[1:], strict=True)}


def _read(
    batches: Sequence[range], partial: Partial, extractors: Sequence[Extractor], device: torch.device
) -> Iterator[Chunk]:
    """Read batches from disk, and compute the features of extractors that have not seen them."""
    for indices in batches:
        chunk = partial.read(indices)
        found = [chunk.of(one.sha256) for one in extractors]
        new = [one for one, own in zip(extractors, found, strict=True) if own is None]
        if new:
            assert chunk.images is not None  # without images, the name of the folder depends on the extractors
            stopwatch = Stopwatch(device)
            images = chunk.images.to(device)
            computed = {one.sha256: _features(one, images).cpu() for one in new}
            found = [computed.get(one.sha256, own) for one, own in zip(extractors, found, strict=True)]
            stopwatch.stop()
            chunk.scoring = stopwatch.seconds + (chunk.scoring if len(new) < len(extractors) else 0)
        _assign(chunk, extractors, [own for own in found if own is not None])
        yield chunk


def _launch(
    sampler: Sampler,
    plan: Plan,
    group: Group,
    seed: int,
    done: int,
    saved: dict[str, Any] | None,
    extractors: Sequence[Extractor],
) -> Iterator[_Launched]:
    """Sample and score batches, without waiting for the device."""
    for number, made in enumerate(sampler.batches(plan, group, seed, done, saved), start=done):
        images, state, trace = to_host(made.images), to_host(made.state), to_host(made.trace)
        stopwatch = Stopwatch(sampler.device)
        features = [to_host(_features(one, made.images)) for one in extractors]
        stopwatch.stop()
        yield _Launched(number, group, made, images, features, state, trace, stopwatch)


def _features(extractor: Extractor, images: Tensor) -> Tensor:
    return extractor(images).float()


def progress(console: Console, shown: bool, budget: float) -> Progress:
    """Create a progress bar over the images of a budget, shown only on a terminal."""
    columns = (
        description_column(f"nfe {budget:g}" if math.isfinite(budget) else "adaptive"),
        BarColumn(),
        MofNCompleteColumn(),
        description_column("images"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=True)
