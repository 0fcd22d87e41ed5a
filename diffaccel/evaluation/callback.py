"""The evaluation callback: for each budget sample, count, score, log.

Whole groups of batches go to processes by index, without padding; every image draws from its own stream and the sums
of its features are all-reduced, so a point does not depend on how many processes made it.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor

from diffaccel.collective import failing_together
from diffaccel.evaluation.bits import BitsPerDim
from diffaccel.evaluation.partial import Chunk, Partial
from diffaccel.evaluation.pictures import comparable, draw_curve, draw_samples
from diffaccel.evaluation.provenance import device_name, git_commit, identity_hash, versions
from diffaccel.evaluation.sampling import ImageKind, evaluations_per_image, progress, sample_group
from diffaccel.evaluation.scores import KEPT, Real, Scores, digests
from diffaccel.features.extractors import Extractor
from diffaccel.methods import Diffusion
from diffaccel.metrics.base import STANDARD, Metric, build_metrics, measure
from diffaccel.metrics.reference import Reference
from diffaccel.prior import Group, Plan
from diffaccel.prior.diagnostics import summarise
from diffaccel.report import append_point, read_points
from diffaccel.report.logs import log_curve
from diffaccel.report.points import normalised, undrawn
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


class Evaluator(L.Callback):
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
        discrete: Whether samples are images, brought to uint8; toy points are scored as they are.
        truncate: Whether images are truncated to uint8 and not rounded.
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
        discrete: bool = True,
        identity: Callable[[float], Identity] | None = None,
        again: bool = False,
        keep_features: bool = True,
        keep_images: bool = False,
        likelihood: BitsPerDim | None = None,
        truncate: bool = False,
        metrics: Sequence[Metric] | None = None,
    ) -> None:
        self.budgets, self.n, self.seed, self.batch_size = list(budgets), n, seed, batch_size
        self.extractor, self.real = extractor, Real(reference, floor)
        self.out, self.provenance, self.settings = out, provenance, settings
        self.metrics = build_metrics(STANDARD) if metrics is None else list(metrics)
        self.kind = ImageKind(discrete, truncate)
        self.identity, self.again = identity, again
        self.keep_features, self.keep_images, self.likelihood = keep_features, keep_images, likelihood
        self.points: list[dict[str, Any]] = []
        self.console = PlainConsole(stderr=True)  # stdout holds results alone

    # Lightning's hooks

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure every budget."""
        assert isinstance(pl_module, Diffusion)
        self.run(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure every budget with the averaged weights once training is complete."""
        assert isinstance(pl_module, Diffusion)
        if pl_module.images_seen < pl_module.training_plan.images:
            return  # interrupted: the run goes on later
        pl_module.eval()
        with pl_module.averaged_weights(), pl_module.tuning():
            self.run(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure every budget on fewer images, with the averaged weights, while training goes on; log scalars.

        Every process logs the same values, so that a ``ModelCheckpoint`` follows them on all.
        """
        assert isinstance(pl_module, Diffusion)
        n = pl_module.training_plan.evaluate_n
        self.extractor.to(pl_module.device)
        with pl_module.averaged_weights(), pl_module.tuning():
            for budget in self.budgets:
                point = self.measure(trainer, pl_module, budget, pl_module.plan(budget, n), n)
                for name, value in {**point["metrics"], "nfe": point["nfe"]}.items():
                    if value == value:  # a few images have no extrapolation
                        pl_module.log(f"eval/nfe_{budget:03g}/{name}", value)

    def run(self, trainer: L.Trainer, method: Diffusion) -> None:
        """Plan all budgets before the first is measured; then measure, write and log one after the other."""
        plans = [(budget, method.plan(budget, self.n)) for budget in self.budgets]
        self.extractor.to(method.device)
        before, left = trainer.strategy.broadcast((self._measured(), [self._left(budget) for budget in self.budgets]))
        try:
            for (budget, plan), batches_left in zip(plans, left, strict=True):
                point = before.get(self.key(budget))
                if point is not None:
                    self.points.append(point)
                    if trainer.is_global_zero:
                        self.console.print(f"nfe {budget:g}: measured before (again=true measures anew)")
                    if not batches_left:
                        continue
                    self.measure(trainer, method, budget, plan)  # from those batches: features and pictures are due
                else:
                    point = self.measure(trainer, method, budget, plan)
                    if self.likelihood is not None:
                        point["metrics"] |= self.likelihood(method, trainer.global_rank, trainer.world_size)
                    if trainer.is_global_zero:
                        append_point(self.out / "points.jsonl", point)
                    self.points.append(point)
                if trainer.is_global_zero:
                    self._leave(budget)
            if self.likelihood is not None and trainer.is_global_zero:
                self.likelihood.clear()
            if trainer.is_global_zero and self.points:
                self._say_undrawn()
            if before and trainer.is_global_zero:
                self._draw_curve()  # the last run may have been killed before it
        finally:  # an interrupt loses no finished point
            if trainer.is_global_zero and self.points:
                for logger in trainer.loggers:
                    with side_output(f"{type(logger).__name__}, of the curve,"):
                        log_curve(logger, self.points, self.out, self.provenance)

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
        self, trainer: L.Trainer, method: Diffusion, budget: float, plan: Plan, n: int | None = None
    ) -> dict[str, Any]:
        """Sample images under a plan, score them, and describe how that went.

        Batches that an earlier run has left in OUT/partial are not made again.

        Args:
            trainer: Says which process this is, and the precision.
            method: Makes the images.
            budget: Most evaluations per image.
            plan: How it is spent.
            n: Number of images; the evaluator's own if not given.

        Raises:
            UsageError: More was spent than the budget allows, or a network returned NaN.
        """
        method.tune(budget)
        n = n or self.n
        key, chains = self.key(budget), getattr(method.prior, "chains", None)
        partial = self._partial(budget)
        kind = torch.uint8 if self.kind.discrete else torch.float32
        shown = SHOWN if self.kind.discrete else SCATTERED
        scores = Scores(n, self.extractor.dim, method.shape, shown, kind, self.real, chains, method.device)
        mine = method.prior.schedule(n, self.batch_size)[trainer.global_rank :: trainer.world_size]
        with failing_together(), progress(self.console, trainer.is_global_zero, budget) as bars:
            bar = bars.add_task("", total=sum(len(batch) for group in mine for batch in group))
            for group in mine:
                for chunk in self._chunks(trainer, method, plan, group, partial, chains is not None):
                    scores.add(chunk)
                    bars.advance(bar, len(chunk.indices))
        scores.reduce()
        point = self._point(trainer, method, budget, plan, scores, n)
        if key is not None:
            point["key"] = key
        return point

    def _chunks(
        self, trainer: L.Trainer, method: Diffusion, plan: Plan, group: Group, partial: Partial, chained: bool
    ) -> Iterator[Chunk]:
        """Yield a group's batches: those done before, then those made now."""
        done, saved = (0, None) if self.again and partial.kept else partial.done(group, chained)
        for indices in group[:done]:
            chunk = partial.read(indices)
            if chunk.extractor != self.extractor.sha256:
                assert chunk.images is not None  # without them, OUT/partial goes by the extractor too
                started = time.perf_counter()
                chunk.features = self._features(chunk.images.to(method.device))
                chunk.scoring, chunk.extractor = time.perf_counter() - started, self.extractor.sha256
            yield chunk
        autocast = trainer.precision_plugin.forward_context
        for number, made in enumerate(
            sample_group(method, plan, group, self.seed, self.kind, autocast, done, saved), start=done
        ):
            started = time.perf_counter()
            features = self._features(made.images)
            final = made.images.cpu()
            shown = final[made.indices < (SHOWN if self.kind.discrete else SCATTERED)]
            chunk = Chunk(
                made.indices, features, digests(final), shown, final if partial.kept else None, self.extractor.sha256,
                trainer.global_rank, made.evaluations, made.burn_in, made.flops,
                made.seconds, time.perf_counter() - started, made.trace,
            )  # fmt: skip
            partial.save(group, number, chunk, made.state)
            yield chunk

    def _features(self, images: Tensor) -> Tensor:
        return self.extractor(images).float().cpu()

    def _point(
        self, trainer: L.Trainer, method: Diffusion, budget: float, plan: Plan, scores: Scores, n: int
    ) -> dict[str, Any]:
        """Describe the point. Every process gets here: it holds collectives."""
        nfe, burn_in = evaluations_per_image(method, budget, scores.evaluations, scores.burn_in, n)
        flops = sum(count * scores.flops.get(name, 0.0) for name, count in scores.evaluations.items()) / n
        one = scores.flops.get("denoiser", 0.0)
        start = getattr(method.prior, "burn_in_per_chain", 0)
        rounds = -(-n // getattr(method.prior, "chains", n))
        # One image's own evaluations, and those of the chain before it.
        sequential = (
            start + (rounds - 1) * plan.skips + method.planned_nfe(plan, n) - method.prior.burn_in_evaluations(n) / n
        )
        settings, reference, floor = self.settings(budget), self.real.reference, self.real.floor
        ranks = max(trainer.world_size, 1 + max(scores.images_by_rank))  # a run of more processes may have begun it
        self.shown, self.features = scores.shown, scores.features
        made = scores.made(self.extractor.metric_name)
        measured = measure(self.metrics, made, self.real, in_training=self.identity is None)
        return {
            **self.provenance,
            "prior": settings["prior"]["name"],
            "solver": settings["solver"]["name"],
            "settings": settings,
            "by_budget": bool(method.by_nfe),
            "tuned": method.tuned,
            "nfe_budget": budget if math.isfinite(budget) else None,
            "nfe": nfe,
            "nfe_marginal": nfe - burn_in,
            "nfe_burn_in": burn_in,
            "nfe_sequential": sequential if math.isfinite(sequential) else None,
            "nfe_equivalent": flops / one if one else None,
            "evaluations": dict(scores.evaluations),
            "plan": {"steps": plan.steps, "skips": plan.skips},
            "chains": getattr(method.prior, "chains", None),
            "chain": summarise([scores.traces[first] for first in sorted(scores.traces)]),
            "gflops_per_image": flops / 1e9,
            "seconds_per_image": scores.seconds[0].item() / n,
            "seconds_scoring": scores.seconds[1].item() / n,
            "n": n,
            "seed": self.seed,
            "images_sha256": hashlib.sha256(scores.digests.numpy().tobytes()).hexdigest(),
            "images_by_rank": [scores.images_by_rank[rank] for rank in range(ranks)],
            "metrics": measured.values,
            **measured.details,
            "extractor": {"name": self.extractor.name, "sha256": self.extractor.sha256, "dim": self.extractor.dim},
            "reference": {
                "name": reference.provenance["label"],
                "split": reference.provenance["split"],
                "n": reference.moments.n,
                "sha256": reference.sha256,
            },
            "floor": floor and {"n": floor.moments_of(n).n, "sha256": floor.sha256},
            "world_size": trainer.world_size,
            "device": device_name(method.device),
            "precision": str(trainer.precision),
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "git": git_commit(),
        }

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
        draw_samples(self.shown, self.kind.discrete, self.points[-1], self.out)

    def _draw_curve(self) -> None:
        draw_curve(self.points[-1], self.out)

    def _say_undrawn(self) -> None:
        points = comparable(read_points(self.out / "points.jsonl"), self.points[-1])
        for said in undrawn(points, self.extractor.metric_name):
            self.console.print(f"points.jsonl: {said}")
