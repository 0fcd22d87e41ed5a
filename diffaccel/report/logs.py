"""Logging of points to the loggers of a run, on rank zero."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from diffaccel.report import Point
from diffaccel.report.judges import judges_of, seen_by
from diffaccel.text.terminal import side_output

Logger = TypeVar("Logger")

CALLS = ("log_hyperparams", "log_metrics", "log_image", "after_save_checkpoint", "save", "finalize")
"""Methods of a logger that Lightning and :func:`log_curve` call."""
COLUMNS = ("method", "solver", "prior", "nfe_budget", "nfe", "nfe_burn_in", "n", "seed", "seconds_per_image")


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
    """Log a complete curve: a row per point against NFE, and for W&B also the table and the pictures.

    W&B plots ``curve/*`` against ``curve/nfe``. Rows are logged once, at the end, because W&B would plot repeated rows
    with the same NFE as one line.

    Args:
        logger: Logger of Lightning, or :class:`~diffaccel.run.loggers.WandbRun`.
        points: Points of the curve.
        out: Output folder with the pictures.
        provenance: Provenance of the run, for W&B's config.
    """
    rows = [
        {
            "curve/nfe": point["nfe"],
            "curve/nfe_marginal": point["nfe_marginal"],
            "curve/seconds_per_image": point["seconds_per_image"],
            **{f"curve/{key}": value for key, value in point["metrics"].items() if value is not None},
            **_by_others(point),
        }
        for point in points
    ]
    if not hasattr(logger, "log_image"):
        for i, row in enumerate(rows):
            logger.log_metrics({key: value for key, value in row.items() if value == value}, step=i)
        return
    import wandb  # imported here, because it takes a second

    run = logger.experiment
    run.define_metric("curve/nfe", hidden=True)
    run.define_metric("curve/*", step_metric="curve/nfe", step_sync=False, summary="none")
    for row in rows:
        run.log(row)
    metrics = sorted({name for point in points for name in point["metrics"]})
    table = [[*(point[key] for key in COLUMNS), *(point["metrics"].get(name) for name in metrics)] for point in points]
    run.log({"points": wandb.Table(columns=[*COLUMNS, *metrics], data=table)})
    grids = [path for point in points if (path := out / f"samples_nfe{budget_name(point)}.png").is_file()]
    if grids:
        logger.log_image("samples", [str(path) for path in grids])
    if (out / "curve.png").is_file():
        logger.log_image("curve", [str(out / "curve.png")])
    run.config.update({"provenance": provenance}, allow_val_change=True)


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
