"""The evaluation callback: for each budget sample, count, score, log.

Whole groups of batches go to processes by index, without padding; every image draws from its own stream and the sums
of its features are all-reduced, so a point does not depend on how many processes made it.
"""

import hashlib
import math
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import Logger, WandbLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from diffaccel.errors import UsageError
from diffaccel.methods import Diffusion
from diffaccel.metrics import FrechetDistance, KernelDistance, frechet_distance
from diffaccel.nfe import EvaluationCounter
from diffaccel.nn.features import Extractor
from diffaccel.prior import ChainState, Plan
from diffaccel.prior.diagnostics import summarise
from diffaccel.reference import Reference
from diffaccel.report import append_point, plot_curve, read_points, sample_grid, scatter, write_curve_csv

SHOWN = 64
"""Images on a sample grid: the first ones, the same noise for every budget and method."""
BLOCKS = 10
"""Blocks of the jackknife."""


def to_uint8(images: Tensor) -> Tensor:
    """Round images from [-1, 1] to 0 .. 255, as a file would hold them; nothing is truncated."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum over the processes, in place; the tensor itself where there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


@dataclass
class Scored:
    """What one pass over the images of a budget gathers on this process."""

    frechet: FrechetDistance
    kernel: KernelDistance | None
    digests: Tensor
    shown: Tensor
    sampling: float = 0.0
    scoring: float = 0.0
    images: int = 0


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
        discrete: Whether samples are images, rounded to uint8; toy points are scored as they are.
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
    ) -> None:
        self.budgets, self.n, self.seed, self.batch_size = list(budgets), n, seed, batch_size
        self.extractor, self.reference, self.floor = extractor, reference, floor
        self.out, self.provenance, self.settings, self.discrete = out, provenance, settings, discrete
        self.points: list[dict[str, Any]] = []

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
        if pl_module.ema is None:
            self.run(trainer, pl_module)
        else:
            with pl_module.ema.swapped():
                self.run(trainer, pl_module)

    def run(self, trainer: L.Trainer, method: Diffusion) -> None:
        """Plan all budgets before the first is measured; then measure, write and log one after the other."""
        plans = [(budget, method.plan(budget, self.n)) for budget in self.budgets]
        self.extractor.to(method.device)
        try:
            for budget, plan in plans:
                point = self.measure(trainer, method, budget, plan)
                self.points.append(point)
                if trainer.is_global_zero:
                    append_point(self.out / "points.jsonl", point)
                    self._draw()
        finally:  # an interrupt loses no finished point
            if trainer.is_global_zero and self.points:
                for logger in trainer.loggers:
                    self._log(logger)

    # One point

    @torch.no_grad()
    def measure(self, trainer: L.Trainer, method: Diffusion, budget: float, plan: Plan) -> dict[str, Any]:
        """Sample n images under a plan, score them, and describe how that went.

        Raises:
            UsageError: More was spent than the budget allows, or a network returned NaN.
        """
        method.tune(budget)
        rank, world = trainer.global_rank, trainer.world_size
        networks = {**method.evaluated_networks(), **method.auxiliary_networks()}
        scored = self._blank(method)
        groups = method.prior.schedule(self.n, self.batch_size)
        traces = []
        with self._progress(trainer, budget) as progress, EvaluationCounter(networks) as counter:
            bar = progress.add_task("", total=sum(len(batch) for group in groups[rank::world] for batch in group))
            for group in groups[rank::world]:
                clock = time.perf_counter()
                with trainer.precision_plugin.forward_context():
                    state = method.open(self.seed, group)
                    batches = method.sample(self.seed, group, plan, state)
                while True:
                    # The generator runs inside ``next``, and autocast with it; scoring stays in full precision.
                    with trainer.precision_plugin.forward_context():
                        batch = next(batches, None)
                    scored.sampling += time.perf_counter() - clock
                    if batch is None:
                        break
                    clock = time.perf_counter()
                    self._score(method, scored, *batch)
                    scored.scoring += time.perf_counter() - clock
                    progress.advance(bar, len(batch[0]))
                    clock = time.perf_counter()
                if isinstance(state, ChainState):
                    traces.append(state.trace)
        return self._point(trainer, method, budget, plan, scored, counter, traces)

    def _blank(self, method: Diffusion) -> Scored:
        dim, kept = self.extractor.dim, self.reference.features
        frechet = FrechetDistance(dim, self.reference.moments, blocks=BLOCKS).to(method.device)
        kernel = KernelDistance(dim, kept.float()).to(method.device) if len(kept) >= 2 else None
        dtype = torch.uint8 if self.discrete else torch.float32
        shown = torch.zeros(min(SHOWN if self.discrete else 1000, self.n), *method.shape, dtype=dtype)
        return Scored(frechet, kernel, torch.zeros(self.n, 32, dtype=torch.int64), shown)

    def _score(self, method: Diffusion, scored: Scored, indices: range, images: Tensor) -> None:
        final = to_uint8(images) if self.discrete else images.float()
        features = self.extractor(final)
        # Images of one chain are correlated: a block of the jackknife holds all of a chain or nothing of it.
        chains = getattr(method.prior, "chains", None)
        units = torch.tensor(indices, device=features.device) % (chains or self.n)
        for block in (units % BLOCKS).unique().tolist():
            scored.frechet.update(features[units % BLOCKS == block], block)
        if scored.kernel is not None:
            scored.kernel.update(features, indices[0])
        final = final.cpu()
        for i, image in zip(indices, final, strict=True):
            digest = hashlib.sha256(image.numpy().tobytes()).digest()
            scored.digests[i] = torch.frombuffer(bytearray(digest), dtype=torch.uint8).long()
            if i < len(scored.shown):
                scored.shown[i] = image
        scored.images += len(indices)

    def _point(
        self,
        trainer: L.Trainer,
        method: Diffusion,
        budget: float,
        plan: Plan,
        scored: Scored,
        counter: EvaluationCounter,
        traces: list[Any],
    ) -> dict[str, Any]:
        """Sum over the processes and describe the point. Every process gets here: it holds collectives."""
        n, names = self.n, list(counter.networks)
        device = method.device
        counts = torch.tensor(
            [[counter.evaluations[k], counter.burn_in[k], counter.evaluations[k] * counter.flops.get(k, 0.0)]
             for k in names], dtype=torch.float64, device=device,
        )  # fmt: skip
        counts = all_reduce(counts).cpu()
        totals = all_reduce(torch.tensor([scored.sampling, scored.scoring], dtype=torch.float64, device=device)).cpu()
        by_rank = torch.zeros(trainer.world_size, dtype=torch.int64, device=device)
        by_rank[trainer.global_rank] = scored.images
        by_rank = all_reduce(by_rank)
        digests = all_reduce(scored.digests.to(device)).to("cpu", torch.uint8)
        self.shown = all_reduce(scored.shown.to(device, torch.float32)).to("cpu", scored.shown.dtype)
        chain_records = [traces] * trainer.world_size
        if trainer.world_size > 1:
            dist.all_gather_object(chain_records, traces)
        evaluated = [i for i, name in enumerate(names) if name in method.evaluated_networks()]
        nfe, burn_in = (counts[evaluated].sum(0) / n)[:2].tolist()
        if nfe > budget * (1 + 1e-9):
            raise UsageError(f"nfe={budget:g} was overspent: {nfe:.6g} evaluations per image were counted")
        flops = counts[:, 2].sum().item() / n
        one = max((counter.flops.get(name, 0.0) for name in method.evaluated_networks()), default=0.0)
        start = getattr(method.prior, "burn_in_per_chain", 0)
        rounds = -(-n // getattr(method.prior, "chains", n))
        # One image's own evaluations, and those of the chain before it.
        sequential = (
            start + (rounds - 1) * plan.skips + method.planned_nfe(plan, n) - method.prior.burn_in_evaluations(n) / n
        )
        summary = summarise([trace for records in chain_records for trace in records])
        settings = self.settings(budget)
        return {
            **self.provenance,
            "prior": settings["prior"]["name"],
            "solver": settings["solver"]["name"],
            "settings": settings,
            "tuned": bool(method.by_nfe),
            "nfe_budget": budget if math.isfinite(budget) else None,
            "nfe": nfe,
            "nfe_marginal": nfe - burn_in,
            "nfe_burn_in": burn_in,
            "nfe_sequential": sequential if math.isfinite(sequential) else None,
            "nfe_equivalent": flops / one if one else None,
            "evaluations": {name: int(counts[i, 0]) for i, name in enumerate(names)},
            "plan": {"steps": plan.steps, "skips": plan.skips},
            "chains": getattr(method.prior, "chains", None),
            "chain": summary,
            "gflops_per_image": flops / 1e9,
            "seconds_per_image": totals[0].item() / n,
            "seconds_scoring": totals[1].item() / n,
            "n": n,
            "seed": self.seed,
            "images_sha256": hashlib.sha256(digests.numpy().tobytes()).hexdigest(),
            "images_by_rank": by_rank.tolist(),
            "metrics": self._metrics(scored),
            "extractor": {"name": self.extractor.name, "sha256": self.extractor.sha256, "dim": self.extractor.dim},
            "reference": {
                "name": self.reference.provenance["label"],
                "split": self.reference.provenance["split"],
                "n": self.reference.moments.n,
                "sha256": self.reference.sha256,
            },
            "floor": self.floor and {"n": self.floor.moments_of(self.n).n, "sha256": self.floor.sha256},
            "world_size": trainer.world_size,
            "device": _device(method.device),
            "precision": str(trainer.precision),
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "git": git_commit(),
        }

    def _metrics(self, scored: Scored) -> dict[str, float]:
        name = self.extractor.metric_name
        frechet = scored.frechet.compute()
        metrics = {
            name: float(frechet.fd),
            f"{name}_inf": float(frechet.fd_inf),
            f"{name}_se": float(frechet.se),
        }
        if scored.kernel is not None:
            metrics["kid"] = float(scored.kernel.compute())
        if self.floor is not None:
            floor = self.floor.moments_of(self.n)
            metrics[f"{name}_floor"] = float(frechet_distance(floor, self.reference.moments))
        return metrics

    # What it leaves

    def _draw(self) -> None:
        point = self.points[-1]
        budget = budget_name(point)
        if self.discrete:
            sample_grid(self.shown, self.out / f"samples_nfe{budget}.png")
        else:
            scatter(self.shown.flatten(1), self.out / f"samples_nfe{budget}.png", title=f"NFE {budget}")
        points = comparable(read_points(self.out / "points.jsonl"), point)
        write_curve_csv(points, self.out / "curve.csv")
        plot_curve(points, self.out / "curve.png", f"{point['data']}: {point['reference']['name']}")

    def _log(self, logger: Logger) -> None:
        rows = [
            {"curve/nfe": point["nfe"], **{f"curve/{key}": value for key, value in point["metrics"].items()},
             "curve/nfe_marginal": point["nfe_marginal"], "curve/seconds_per_image": point["seconds_per_image"]}
            for point in self.points
        ]  # fmt: skip
        if isinstance(logger, WandbLogger):
            run = logger.experiment
            run.define_metric("curve/nfe", hidden=True)
            run.define_metric("curve/*", step_metric="curve/nfe", step_sync=False, summary="none")
            for row in rows:
                run.log(row)
            grids = [self.out / f"samples_nfe{budget_name(point)}.png" for point in self.points]
            logger.log_image("samples", [str(path) for path in grids])
            logger.log_image("curve", [str(self.out / "curve.png")])
            run.config.update({"provenance": self.provenance}, allow_val_change=True)
        else:
            for i, row in enumerate(rows):
                logger.log_metrics({key: value for key, value in row.items() if value == value}, step=i)

    def _progress(self, trainer: L.Trainer, budget: float) -> Progress:
        columns = (
            TextColumn(f"nfe {budget:g}" if math.isfinite(budget) else "adaptive"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("images"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)  # stdout holds results alone
        shown = trainer.is_global_zero and console.is_terminal
        return Progress(*columns, console=console, disable=not shown, transient=True)


def budget_name(point: dict[str, Any]) -> str:
    """The budget, or what an adaptive solver spent without one, for file names."""
    return f"{point['nfe_budget'] or round(point['nfe']):g}"


def comparable(points: Sequence[dict[str, Any]], point: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that may share a plot with ``point``: same data, extractor and reference."""
    return [
        other
        for other in points
        if other["extractor"]["sha256"] == point["extractor"]["sha256"]
        and other["reference"]["sha256"] == point["reference"]["sha256"]
    ]


def versions() -> dict[str, str]:
    """Versions of what a point depends on."""
    found = {"python": platform.python_version()}
    for package in ("diffaccel", "torch", "lightning", "torchmetrics", "torch-fidelity"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_commit() -> str | None:
    """The commit of the checkout that runs, ``+`` if it has changes; None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
