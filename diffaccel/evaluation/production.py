"""Images made batch by batch, each kept on disk until what they are for is whole."""

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
    """Yield a group's batches: those that an earlier run has left, then those made now.

    Args:
        sampler: Makes the images.
        plan: How the budget is spent.
        group: Image indices, one range a batch.
        seed: Image i draws from stream (seed, i).
        partial: The batches on disk.
        rank: Number of this process.
        extractor: Computes features; None leaves them out.
        shown: Number of images, the first ones, that a sample grid shows.
        keep_images: Whether the chunks hold all images.
        afresh: Whether batches on disk are made again.
    """
    done, saved = (0, None) if afresh else partial.done(group, isinstance(plan.prior, ChainPrior))
    for indices in group[:done]:
        chunk = partial.read(indices)
        if extractor is not None and chunk.extractor != extractor.sha256:
            assert chunk.images is not None  # without images, OUT/partial goes by the extractor too
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
