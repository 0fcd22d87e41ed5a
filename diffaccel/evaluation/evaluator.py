"""The evaluator: samples and scores images at each budget, and writes points, features and plots.

Groups of batches are assigned to ranks by index, without padding. Every image has its own noise stream and the sums of
the features are all-reduced, so that a point does not depend on the number of ranks.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from diffaccel.collective import World, failing_together
from diffaccel.config import STANDARD
from diffaccel.data.conditions import HeldOut
from diffaccel.evaluation.bits import BitsPerDim
from diffaccel.evaluation.judges import Judge, further, judgements
from diffaccel.evaluation.partial import Partial
from diffaccel.evaluation.pictures import comparable, draw_curve, draw_samples
from diffaccel.evaluation.point import describe_point
from diffaccel.evaluation.production import produce, progress
from diffaccel.evaluation.provenance import identity_hash
from diffaccel.evaluation.restoration import Restoration, merged
from diffaccel.evaluation.scores import KEPT, Scores
from diffaccel.features.extractors import Extractor
from diffaccel.features.perceptual import build_lpips
from diffaccel.metrics.base import Metric, build_metrics
from diffaccel.prior import ChainPrior, Plan
from diffaccel.report import append_point, read_points
from diffaccel.report.judges import features_name
from diffaccel.report.logs import log_curve
from diffaccel.report.points import normalised, undrawn
from diffaccel.sampling import Sampler
from diffaccel.storage import whole
from diffaccel.text.terminal import PlainConsole, side_output

SHOWN = 64
"""Number of images on a sample grid: the first ones, with the same noise for every budget and method."""
SCATTERED = 1000
"""Number of toy points on a scatter plot."""


class Identity(NamedTuple):
    """Everything that determines a point.

    Attributes:
        images: What determines the images: parts, hashes of weights, n, seed, budget.
        scores: What else determines the metrics: hashes of extractors and statistics.
    """

    images: dict[str, Any]
    scores: dict[str, Any]


class Evaluator:
    """Measures points of the quality-versus-NFE curve.

    Args:
        budgets: Maximum number of evaluations per image, one point each.
        n: Number of images per point.
        seed: Seed; image i has the noise stream (seed, i).
        batch_size: Number of images per batch; images do not depend on it beyond rounding.
        judges: Extractors with their statistics, one or more, all of which score the same images. Tables and curves
            show the first.
        out: Folder for points, curve and sample grids.
        provenance: Keys that are added to every point (method, experiment, checkpoint ...).
        settings: Budget -> ``{"prior": ..., "solver": ...}``, each with name and keys, for the points.
        identity: Budget -> everything that determines its point. A point with the same ``key`` is not measured again,
            and an interrupted measurement is resumed. None for weights in training.
        again: Whether to measure points in OUT again.
        keep_features: Whether to write the features of a point with a ``key`` to OUT/features, for paired comparisons.
        keep_images: Whether to write the images to OUT/images, to score the same images with other extractors.
        likelihood: Measurement of bits per dimension for each point; None for no such measurement.
        metrics: Metrics of a point; by default the standard ones.
        in_training: Whether to compute only the metrics for evaluations during training; by default if there is no
            ``identity``.
        restores: Conditions of the images, with which they are compared; None for no comparison.
    """

    def __init__(
        self,
        budgets: Sequence[float],
        n: int,
        seed: int,
        batch_size: int,
        judges: Sequence[Judge],
        out: Path,
        provenance: dict[str, Any],
        settings: Callable[[float], dict[str, dict[str, Any]]],
        identity: Callable[[float], Identity] | None = None,
        again: bool = False,
        keep_features: bool = True,
        keep_images: bool = False,
        likelihood: BitsPerDim | None = None,
        metrics: Sequence[Metric] | None = None,
        in_training: bool | None = None,
        restores: HeldOut | None = None,
    ) -> None:
        self.budgets, self.n, self.seed, self.batch_size = list(budgets), n, seed, batch_size
        self.judges = list(judges)
        self.out, self.provenance, self.settings = out, provenance, settings
        self.metrics = build_metrics(STANDARD) if metrics is None else list(metrics)
        self.identity, self.again = identity, again
        self.in_training = identity is None if in_training is None else in_training
        self.keep_features, self.keep_images, self.likelihood = keep_features, keep_images, likelihood
        self.restores = restores
        self.lpips = build_lpips("condition.lpips", "false") if restores is not None and restores.lpips else None
        self.points: list[dict[str, Any]] = []
        self.console = PlainConsole(stderr=True)  # stdout is reserved for results

    @property
    def extractor(self) -> Extractor:
        """Extractor of the first judge."""
        return self.judges[0].extractor

    def to(self, device: torch.device) -> None:
        """Move the extractors to a device, in place."""
        for judge in self.judges:
            judge.extractor.to(device)

    def run(self, sampler: Sampler, world: World = World(), loggers: Sequence[Any] = ()) -> list[dict[str, Any]]:  # noqa: B008 (frozen)
        """Plan all budgets, then measure, write and log their points one after the other.

        Args:
            sampler: Sampler to measure.
            world: Rank and number of ranks.
            loggers: Lightning loggers, to which the curve is logged at the end.

        Returns:
            Points in the order of the budgets.

        Raises:
            UsageError: A budget is below the minimum or was exceeded, or a network returned NaN.
        """
        plans = [(budget, sampler.plan(budget, self.n)) for budget in self.budgets]
        self.to(sampler.device)
        before, left = world.broadcast((self._measured(), [self._left(budget) for budget in self.budgets]))
        try:
            for (budget, plan), batches_left in zip(plans, left, strict=True):
                point = before.get(self.key(budget))
                if point is not None:
                    self.points.append(point)
                    if world.first:
                        self.console.print(f"nfe {budget:g}: measured before (set again=true to measure it again)")
                    if not batches_left:
                        continue
                    self.measure(sampler, budget, plan, world=world)  # features and plots are missing
                else:
                    self.points.append(self._new(sampler, budget, plan, world))
                if world.first:
                    self._leave(budget)
            if self.likelihood is not None and world.first:
                self.likelihood.clear()
            if world.first and self.points:
                self._say_undrawn()
            if before and world.first:
                self._draw_curve()  # the last run may have been killed before drawing
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
            point = merged(point, self.likelihood(sampler, plan.prior, world))
        if world.first:
            append_point(self.out / "points.jsonl", point)
        return point

    def _measured(self) -> dict[str | None, dict[str, Any]]:
        """Points in OUT, by key."""
        path = self.out / "points.jsonl"
        if self.identity is None or self.again or not path.is_file():
            return {}
        points = [normalised(point) for point in read_points(path)]
        # A point without distance or NFE is measured again.
        name = self.extractor.metric_name
        return {point["key"]: point for point in points if name in point["metrics"] and point["nfe"] is not None}

    def known(self) -> list[dict[str, Any]]:
        """Points in OUT that :meth:`run` would not measure, in the order of the budgets."""
        before = self._measured()
        keys = [self.key(budget) for budget in self.budgets if not self._left(budget)] if before else []
        return [before[key] for key in keys if key in before]

    def room(self) -> tuple[int, int]:
        """Minimum number of bytes of batches and features, in total and in the largest file."""
        dims = [judge.extractor.dim for judge in self.judges]
        batches, features = (4 * images * sum(dims) for images in (self.n, min(self.n, KEPT)))
        kept = len(self.budgets) * features * self.keep_features
        return batches + kept, 4 * min(self.n, KEPT) * max(dims) * self.keep_features

    def _left(self, budget: float) -> bool:
        """Whether a measured point has batches on disk: the run was killed before writing features and plots."""
        partial = self._partial(budget)
        return partial.exists() and not (partial.kept and self._features_kept(budget))

    # One point

    def key(self, budget: float) -> str | None:
        """Cache key of everything that determines a point, except for versions; None for weights in training."""
        if self.identity is None:
            return None
        found = self.identity(budget)
        return identity_hash({**found.images, **found.scores})

    def _partial(self, budget: float) -> Partial:
        """Partial results of a point, in a folder named by its key or, if images are kept, their identity."""
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
        """Sample images, score them, and return the point; collective.

        Batches in OUT/partial from an earlier run are not sampled again.

        Args:
            sampler: Sampler of the images.
            budget: Maximum number of evaluations per image.
            plan: Plan of the budget.
            n: Number of images; by default that of the evaluator.
            world: Rank and number of ranks.

        Raises:
            UsageError: The budget was exceeded, or a network returned NaN.
        """
        n = n or self.n
        partial, shown = self._partial(budget), SHOWN if sampler.kind.discrete else SCATTERED
        chains = plan.prior.chains_for(n) if isinstance(plan.prior, ChainPrior) else None
        kind = sampler.kind.dtype
        first, device = self.judges[0], sampler.device
        scores = Scores(
            n, first.extractor.dim, sampler.image_shape, shown, kind, first.real, chains, device, further(self.judges),
            sampler.classes_of(plan, n), 1 if sampler.inputs is None else sampler.inputs.samples,
        )  # fmt: skip
        restored = None
        if self.restores is not None:
            restored = Restoration(self.restores, n, device, self.lpips)
        mine = world.share(plan.prior.schedule(n, self.batch_size))
        with failing_together(), progress(self.console, world.first, budget) as bars:
            bar = bars.add_task("", total=sum(len(batch) for group in mine for batch in group))
            for chunk in produce(
                sampler, plan, mine, self.seed, partial, world.rank, [judge.extractor for judge in self.judges], shown,
                partial.kept or restored is not None, afresh=self.again and partial.kept,
            ):  # fmt: skip
                scores.add(chunk)
                if restored is not None:
                    assert chunk.images is not None
                    restored.add(chunk.indices, chunk.images)
                bars.advance(bar, len(chunk.indices))
        scores.reduce()
        point = self._point(sampler, budget, plan, scores, n, world)
        if restored is None:
            return point
        restored.reduce()
        return merged(point, restored.metrics())

    def _point(
        self, sampler: Sampler, budget: float, plan: Plan, scores: Scores, n: int, world: World
    ) -> dict[str, Any]:
        """Compute the metrics of a point and describe it; collective."""
        self.shown, self.discrete, self.features = scores.shown, sampler.kind.discrete, scores.features
        settings, final = self.settings(budget), self.identity is not None
        point = {
            **self.provenance,
            "prior": settings["prior"]["name"],
            "solver": settings["solver"]["name"],
            "settings": settings,
            "seed": self.seed,
            **describe_point(sampler, plan, budget, n, scores, world),
            **judgements(self.judges, scores, self.metrics, self.in_training),
        }
        return {**point, "key": self.key(budget)} if final else point

    # Files

    def _leave(self, budget: float) -> None:
        """Write features and plots of a point that is on disk, then remove its batches."""
        if not self._features_kept(budget):
            for path, features in zip(self._features_paths(budget), self.features, strict=True):
                with side_output(str(path)), whole(path) as part, part.open("wb") as file:
                    np.save(file, features.numpy())
        self._draw()
        if self._features_kept(budget):
            self._partial(budget).clear()
        self._draw_curve()

    def _features_paths(self, budget: float) -> list[Path]:
        """Files of the features of each judge."""
        key = str(self.key(budget))
        names = [features_name(key, judge.extractor.sha256, not number) for number, judge in enumerate(self.judges)]
        return [self.out / "features" / name for name in names]

    def _features_kept(self, budget: float) -> bool:
        """Whether the features are on disk, or need not be."""
        if self.identity is None or not self.keep_features:
            return True
        return all(path.is_file() for path in self._features_paths(budget))

    def _draw(self) -> None:
        draw_samples(self.shown, self.discrete, self.points[-1], self.out)

    def _draw_curve(self) -> None:
        draw_curve(self.points[-1], self.out)

    def _say_undrawn(self) -> None:
        points = comparable(read_points(self.out / "points.jsonl"), self.points[-1])
        for said in undrawn(points, self.extractor.metric_name):
            self.console.print(f"points.jsonl: {said}")
