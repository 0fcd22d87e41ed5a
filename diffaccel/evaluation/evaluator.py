"""The evaluator: for each budget it samples, counts and scores, keeps what is done, and draws what it leaves.

Whole groups of batches go to processes by index, without padding; every image draws from its own stream and the sums
of its features are all-reduced, so a point does not depend on how many processes made it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from diffaccel.collective import World, failing_together
from diffaccel.config import STANDARD
from diffaccel.evaluation.bits import BitsPerDim
from diffaccel.evaluation.partial import Partial
from diffaccel.evaluation.pictures import comparable, draw_curve, draw_samples
from diffaccel.evaluation.point import describe_judges, describe_point
from diffaccel.evaluation.production import produce, progress
from diffaccel.evaluation.provenance import identity_hash
from diffaccel.evaluation.scores import KEPT, Real, Scores
from diffaccel.features.extractors import Extractor
from diffaccel.metrics.base import Metric, build_metrics, measure
from diffaccel.metrics.reference import Reference
from diffaccel.prior import ChainPrior, Plan
from diffaccel.report import append_point, read_points
from diffaccel.report.logs import log_curve
from diffaccel.report.points import normalised, undrawn
from diffaccel.sampling import Sampler
from diffaccel.storage import whole
from diffaccel.text.terminal import PlainConsole, side_output

SHOWN = 64
"""Images on a sample grid: the first ones, the same noise for every budget and method."""
SCATTERED = 1000
"""Toy points on a scatter plot."""


class Identity(NamedTuple):
    """What a point follows from, at one budget.

    Attributes:
        images: Of its images: parts, hashes of weights, n, seed, budget.
        scores: Of its metrics besides: hashes of extractor and statistics.
    """

    images: dict[str, Any]
    scores: dict[str, Any]


class Evaluator:
    """Measures points of the quality-versus-NFE curve.

    Args:
        budgets: Most evaluations per image, one point each.
        n: Images per point.
        seed: Image i draws from stream (seed, i).
        batch_size: Images a batch; it changes no image beyond rounding.
        extractor: Scores the images.
        reference: What they are compared with.
        floor: Statistics of real images that were held out; their distance is drawn as the floor.
        out: Folder for points, curve and grids.
        provenance: Keys that every point carries (method, experiment, checkpoint ...).
        settings: Budget -> ``{"prior": ..., "solver": ...}``, each with its name and keys, for the points.
        identity: What a point of a budget follows from. A point of equal ``key`` is not measured twice, and one that
            was begun is finished. None for weights that are still in training.
        again: Measure points that OUT has already once more.
        keep_features: Whether to leave the features of a point with a ``key`` in OUT/features, for paired comparisons.
        keep_images: Whether to leave its images in OUT/images: another extractor then scores the same ones.
        likelihood: Measures bits per dimension beside each point, if asked for.
        metrics: Metrics of a point; the standard ones if not given.
    """

    def __init__(
        self,
        budgets: Sequence[float],
        n: int,
        seed: int,
        batch_size: int,
        extractor: Extractor,
        reference: Reference,
        floor: Reference | None,
        out: Path,
        provenance: dict[str, Any],
        settings: Callable[[float], dict[str, dict[str, Any]]],
        identity: Callable[[float], Identity] | None = None,
        again: bool = False,
        keep_features: bool = True,
        keep_images: bool = False,
        likelihood: BitsPerDim | None = None,
        metrics: Sequence[Metric] | None = None,
    ) -> None:
        self.budgets, self.n, self.seed, self.batch_size = list(budgets), n, seed, batch_size
        self.extractor, self.real = extractor, Real(reference, floor)
        self.out, self.provenance, self.settings = out, provenance, settings
        self.metrics = build_metrics(STANDARD) if metrics is None else list(metrics)
        self.identity, self.again = identity, again
        self.keep_features, self.keep_images, self.likelihood = keep_features, keep_images, likelihood
        self.points: list[dict[str, Any]] = []
        self.console = PlainConsole(stderr=True)  # stdout holds results alone

    def run(self, sampler: Sampler, world: World = World(), loggers: Sequence[Any] = ()) -> list[dict[str, Any]]:  # noqa: B008 (frozen)
        """Plan all budgets before the first is measured; then measure, write and log one after the other.

        Args:
            sampler: What is measured.
            world: The processes.
            loggers: Lightning's, which get the curve at the end.

        Returns:
            The points, in the order of the budgets.

        Raises:
            UsageError: A budget is below the minimum, more was spent than one allows, or a network returned NaN.
        """
        plans = [(budget, sampler.plan(budget, self.n)) for budget in self.budgets]
        self.extractor.to(sampler.device)
        before, left = world.broadcast((self._measured(), [self._left(budget) for budget in self.budgets]))
        try:
            for (budget, plan), batches_left in zip(plans, left, strict=True):
                point = before.get(self.key(budget))
                if point is not None:
                    self.points.append(point)
                    if world.first:
                        self.console.print(f"nfe {budget:g}: measured before (again=true measures anew)")
                    if not batches_left:
                        continue
                    self.measure(sampler, budget, plan, world=world)  # from those: features and pictures are due
                else:
                    self.points.append(self._new(sampler, budget, plan, world))
                if world.first:
                    self._leave(budget)
            if self.likelihood is not None and world.first:
                self.likelihood.clear()
            if world.first and self.points:
                self._say_undrawn()
            if before and world.first:
                self._draw_curve()  # the last run may have been killed before it
        finally:  # an interrupt loses no finished point
            if world.first and self.points:
                for logger in loggers:
                    with side_output(f"{type(logger).__name__}, of the curve,"):
                        log_curve(logger, self.points, self.out, self.provenance)
        return self.points

    def _new(self, sampler: Sampler, budget: float, plan: Plan, world: World) -> dict[str, Any]:
        """Measure a point and write it."""
        point = self.measure(sampler, budget, plan, world=world)
        if self.likelihood is not None:
            point["metrics"] |= self.likelihood(sampler, plan.prior, world)
        if world.first:
            append_point(self.out / "points.jsonl", point)
        return point

    def _measured(self) -> dict[str | None, dict[str, Any]]:
        """Points that OUT has, by key."""
        path = self.out / "points.jsonl"
        if self.identity is None or self.again or not path.is_file():
            return {}
        points = [normalised(point) for point in read_points(path)]
        # A line that lacks the distance, or what it took, is measured again.
        name = self.extractor.metric_name
        return {point["key"]: point for point in points if name in point["metrics"] and point["nfe"] is not None}

    def room(self) -> tuple[int, int]:
        """Bytes that batches and features take at least, together and in the largest file."""
        batches, features = (4 * images * self.extractor.dim for images in (self.n, min(self.n, KEPT)))
        kept = len(self.budgets) * features * self.keep_features
        return batches + kept, features * self.keep_features

    def _left(self, budget: float) -> bool:
        """Whether a measured point's batches lie on disk because a kill came before its features and pictures."""
        partial = self._partial(budget)
        return partial.exists() and not (partial.kept and self._features_kept(budget))

    # One point

    def key(self, budget: float) -> str | None:
        """Hash of all that a point follows from, but for versions; None if it is not to be found again."""
        if self.identity is None:
            return None
        found = self.identity(budget)
        return identity_hash({**found.images, **found.scores})

    def _partial(self, budget: float) -> Partial:
        """What is done of a point: under its key, or if images are kept, under a hash of what they follow from."""
        if self.identity is None:
            return Partial(None)
        images = self.out / "images" / identity_hash(self.identity(budget).images)
        kept = self.keep_images or images.is_dir()
        return Partial(images if kept else self.out / "partial" / str(self.key(budget)), kept)

    @torch.no_grad()
    def measure(
        self,
        sampler: Sampler,
        budget: float,
        plan: Plan,
        n: int | None = None,
        world: World = World(),  # noqa: B008 (frozen)
    ) -> dict[str, Any]:
        """Sample images under a plan, score them, and describe how that went.

        Batches that an earlier run has left in OUT/partial are not made again.

        Args:
            sampler: Makes the images.
            budget: Most evaluations per image.
            plan: How the budget is spent.
            n: Number of images; the evaluator's own if not given.
            world: The processes, each of which calls this.

        Raises:
            UsageError: More was spent than the budget allows, or a network returned NaN.
        """
        n = n or self.n
        partial, shown = self._partial(budget), SHOWN if sampler.kind.discrete else SCATTERED
        chains = plan.prior.chains if isinstance(plan.prior, ChainPrior) else None
        kind = sampler.kind.dtype
        scores = Scores(n, self.extractor.dim, sampler.shape, shown, kind, self.real, chains, sampler.device)
        mine = world.share(plan.prior.schedule(n, self.batch_size))
        with failing_together(), progress(self.console, world.first, budget) as bars:
            bar = bars.add_task("", total=sum(len(batch) for group in mine for batch in group))
            for group in mine:
                for chunk in produce(
                    sampler, plan, group, self.seed, partial, world.rank, self.extractor, shown, partial.kept,
                    afresh=self.again and partial.kept,
                ):  # fmt: skip
                    scores.add(chunk)
                    bars.advance(bar, len(chunk.indices))
        scores.reduce()
        return self._point(sampler, budget, plan, scores, n, world)

    def _point(
        self, sampler: Sampler, budget: float, plan: Plan, scores: Scores, n: int, world: World
    ) -> dict[str, Any]:
        """Describe the point. Every process gets here: it holds collectives."""
        self.shown, self.discrete, self.features = scores.shown, sampler.kind.discrete, scores.features
        settings, final = self.settings(budget), self.identity is not None
        measured = measure(self.metrics, scores.made(self.extractor.metric_name), self.real, in_training=not final)
        point = {
            **self.provenance,
            "prior": settings["prior"]["name"],
            "solver": settings["solver"]["name"],
            "settings": settings,
            "seed": self.seed,
            **describe_point(sampler, plan, budget, n, scores, world),
            "metrics": measured.values,
            **measured.details,
            **describe_judges(self.extractor, self.real, n),
        }
        return {**point, "key": self.key(budget)} if final else point

    # What it leaves

    def _leave(self, budget: float) -> None:
        """Write what the point, which is on disk, can do without; then forget its batches."""
        if not self._features_kept(budget):
            path = self._features_path(budget)
            with side_output(str(path)), whole(path) as part, part.open("wb") as file:
                np.save(file, self.features.numpy())
        self._draw()
        if self._features_kept(budget):
            self._partial(budget).clear()
        self._draw_curve()

    def _features_path(self, budget: float) -> Path:
        return self.out / "features" / f"{self.key(budget)}.npy"

    def _features_kept(self, budget: float) -> bool:
        """Whether the features are on disk, if they are to be there at all."""
        return self.identity is None or not self.keep_features or self._features_path(budget).is_file()

    def _draw(self) -> None:
        draw_samples(self.shown, self.discrete, self.points[-1], self.out)

    def _draw_curve(self) -> None:
        draw_curve(self.points[-1], self.out)

    def _say_undrawn(self) -> None:
        points = comparable(read_points(self.out / "points.jsonl"), self.points[-1])
        for said in undrawn(points, self.extractor.metric_name):
            self.console.print(f"points.jsonl: {said}")
