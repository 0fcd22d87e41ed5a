"""Logging of points to the loggers of a run, on rank zero."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from diffaccel.report import Point
from diffaccel.report.files import read_points
from diffaccel.report.judges import judges_of, seen_by
from diffaccel.report.ledger import Ledger
from diffaccel.report.points import normalised
from diffaccel.text.terminal import side_output

Logger = TypeVar("Logger")

CALLS = ("log_hyperparams", "log_metrics", "log_image", "after_save_checkpoint", "save", "finalize")
"""Methods of a logger that Lightning and :func:`log_curve` call."""
COLUMNS = (
    *("method", "process", "prior", "solver", "nfe_budget", "nfe", "nfe_burn_in", "chains", "n", "seed", "precision"),
    *("seconds_per_image", "gflops_per_image", "images_sha256", "key"),
)
"""Keys of a point in the table; its settings and metrics follow."""
AXIS = "curve/nfe"
"""Horizontal axis of a curve in W&B."""


def unfailing(logger: Logger) -> Logger:
    """Print one line at the first call of a logger that fails, and ignore later calls."""
    failed: list[bool] = []

    def guard(call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **words: Any) -> Any:
            if failed:
                return None
            with side_output(type(logger).__name__):
                return call(*arguments, **words)
            failed.append(True)  # reached where an error was caught
            return None

        return guarded

    for name in CALLS:
        if hasattr(logger, name):
            setattr(logger, name, guard(getattr(logger, name)))
    return logger


def log_curve(logger: Any, points: Sequence[Point], out: Path, provenance: dict[str, Any]) -> None:
    """Log a curve: a row per point against NFE, and for W&B also summary values, the table and the pictures.

    Rows are logged at the end of a run. A point that the W&B run already contains, such as one of an interrupted bench
    or of the final evaluation of a resumed fit, is not logged again. Summary and table contain all points of the W&B
    run.

    Args:
        logger: Logger of Lightning, or :class:`~diffaccel.run.loggers.WandbRun`.
        points: Points of the curve.
        out: Output folder with the pictures, and the record of logged points.
        provenance: Provenance of the run, for W&B's config.
    """
    if not hasattr(logger, "log_image"):
        for i, row in enumerate(map(_row, points)):
            logger.log_metrics({key: value for key, value in row.items() if value == value}, step=i)
        return
    run, ledger = logger.experiment, Ledger(out)
    new = ledger.missing(run.id, points)
    if not new:
        return
    rows = [_row(point) for point in new]
    run.define_metric(AXIS, hidden=True, summary="none")
    # By name: of several patterns that match a metric, W&B applies any, and Lightning's logger defines one for all.
    for name in sorted({name for row in rows for name in row} - {AXIS}):
        run.define_metric(name, step_metric=AXIS, step_sync=False, summary="none")
    for row in rows:
        run.log(row)
    # W&B keeps the last value of a run, which earlier benches may have logged points to.
    file = out / "points.jsonl"
    earlier = ledger.contained(run.id, list(map(normalised, read_points(file)))) if file.is_file() else []
    run.log({**summary([*earlier, *new]), "points": _table([*earlier, *new])})
    grids = [path for point in points if (path := out / f"samples_nfe{budget_name(point)}.png").is_file()]
    if grids:
        logger.log_image("samples", [str(path) for path in grids])
    if (out / "curve.png").is_file():
        logger.log_image("curve", [str(out / "curve.png")])
    run.config.update({"provenance": provenance}, allow_val_change=True)
    if not run.disabled:
        ledger.add(run.id, new)


def _row(point: Point) -> dict[str, Any]:
    return {
        AXIS: point["nfe"],
        "curve/nfe_marginal": point["nfe_marginal"],
        "curve/seconds_per_image": point["seconds_per_image"],
        **{f"curve/{key}": value for key, value in point["metrics"].items() if value is not None},
        **_by_others(point),
    }


def summary(points: Iterable[Point]) -> dict[str, float]:
    """Return the Frechet distances of each budget by all judges, and the lowest ones under the name of the metric.

    The names have no prefix, because W&B's sweeps can optimise only values that are not nested.
    """
    found: dict[str, float] = {}
    for point in points:
        budget = "adaptive" if point["nfe_budget"] is None else f"nfe_{point['nfe_budget']:03g}"
        views: list[Point] = [seen_by(point, judge) for judge in judges_of(point)] or [point]
        for name, value in (pair for view in views for pair in distances(view).items()):
            found[f"{name}/{budget}"] = value
            found[name] = min(value, found.get(name, value))
    return found


def distances(point: Point) -> dict[str, float]:
    """Return the finite Frechet distances of a point: the metrics that are extrapolated to infinitely many images."""
    metrics = point["metrics"]
    found = {name: value for name, value in metrics.items() if f"{name}_inf" in metrics}
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


def _table(points: Sequence[Point]) -> Any:
    """Make a W&B table with a row per point: cost, the settings of prior and solver, and metrics."""
    import wandb  # imported here, because it takes a second

    settings = [_flat(point["settings"]) for point in points]
    keys = list(dict.fromkeys(key for each in settings for key in each if key not in ("prior.name", "solver.name")))
    metrics = sorted({name for point in points for name in point["metrics"]})
    data = [
        [*map(point.get, COLUMNS), *map(each.get, keys), *map(point["metrics"].get, metrics)]
        for point, each in zip(points, settings, strict=True)
    ]
    return wandb.Table(columns=[*COLUMNS, *keys, *metrics], data=data, allow_mixed_types=True)


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted keys; lists become text."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list) else value
    return found


def keep_best(loggers: Iterable[Any], names: Iterable[str]) -> None:
    """Keep the lowest value of metrics in W&B's summary, besides the last one."""
    for logger in loggers:
        if hasattr(logger, "log_image"):
            with side_output(type(logger).__name__):
                for name in names:
                    logger.experiment.define_metric(name, step_metric="trainer/global_step", summary="min,last")


def _by_others(point: Point) -> dict[str, float]:
    """Metrics of all judges but the first, as ``curve/<judge>/<metric>``."""
    return {
        f"curve/{judge}/{key}": value
        for judge in judges_of(point)[1:]
        for key, value in seen_by(point, judge)["metrics"].items()
        if value is not None
    }


def log_weights(logger: Any, path: Path, name: str, description: dict[str, Any]) -> None:
    """Log a file of weights as an artifact, if the logger supports artifacts (W&B)."""
    if hasattr(logger, "log_image"):
        import wandb

        artifact = wandb.Artifact(name.replace("/", "-"), type="model", metadata=description)
        artifact.add_file(str(path))
        logger.experiment.log_artifact(artifact)


def budget_name(point: Point) -> str:
    """Budget of a point for file names; for adaptive solvers, the rounded NFE."""
    return f"{point['nfe_budget'] or round(point['nfe']):g}"
