"""Sampling batch by batch, with finished batches on disk until the result is complete."""

import math
import time
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from diffaccel.evaluation.partial import Chunk, Partial
from diffaccel.evaluation.scores import digests
from diffaccel.features.extractors import Extractor
from diffaccel.prior import ChainPrior, Group, Plan
from diffaccel.sampling import Sampler
from diffaccel.text.terminal import description_column


def produce(
    sampler: Sampler,
    plan: Plan,
    group: Group,
    seed: int,
    partial: Partial,
    rank: int = 0,
    extractor: Extractor | None = None,
    shown: int = 0,
    keep_images: bool = True,
    afresh: bool = False,
) -> Iterator[Chunk]:
    """Yield the batches of a group, first those on disk from an earlier run, then new ones.

    Args:
        sampler: Sampler of the images.
        plan: Plan of the budget.
        group: Image indices, one range per batch.
        seed: Seed; image i has the noise stream (seed, i).
        partial: Finished batches on disk.
        rank: This rank.
        extractor: Feature extractor; None for no features.
        shown: Number of first images that the sample grid shows.
        keep_images: Whether the chunks contain all images.
        afresh: Whether to sample batches on disk again.
    """
    done, saved = (0, None) if afresh else partial.done(group, isinstance(plan.prior, ChainPrior))
    for indices in group[:done]:
        chunk = partial.read(indices)
        if extractor is not None and chunk.extractor != extractor.sha256:
            assert chunk.images is not None  # without images, the name of the folder depends on the extractor
            started = time.perf_counter()
            chunk.features = _features(extractor, chunk.images.to(sampler.device))
            chunk.scoring, chunk.extractor = time.perf_counter() - started, extractor.sha256
        yield chunk
    for number, made in enumerate(sampler.batches(plan, group, seed, done, saved), start=done):
        started = time.perf_counter()
        features = _features(extractor, made.images)
        scoring = time.perf_counter() - started
        final = made.images.cpu()
        chunk = Chunk(
            made.indices, features, digests(final), final[made.indices < shown], final if keep_images else None,
            extractor.sha256 if extractor is not None else "", rank, made.evaluations, made.burn_in, made.flops,
            made.seconds, scoring, made.trace,
        )  # fmt: skip
        partial.save(group, number, chunk, made.state)
        yield chunk


def _features(extractor: Extractor | None, images: Tensor) -> Tensor:
    return torch.zeros(len(images), 0) if extractor is None else extractor(images).float().cpu()


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
