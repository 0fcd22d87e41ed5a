"""``bench``: measurement of points of the quality-versus-NFE curve."""

from typing import Any

from diffaccel import experiment
from diffaccel.config import Config
from diffaccel.report.table import print_points
from diffaccel.run import launch, loggers
from diffaccel.sampling import Sampler
from diffaccel.storage import check_room
from diffaccel.verbs.cost import print_cost


def bench(config: Config) -> list[dict[str, Any]]:
    """Measure the configured budgets with the configured weights, and print the points.

    Returns:
        Points, which are also written to points.jsonl; empty for a dry run.

    Raises:
        UsageError: The input is invalid, or a budget is below the minimum.
    """
    sampler = planned(config)
    if sampler is None:
        return []
    evaluator = experiment.build_evaluator(config, sampler)
    if launch.is_first(config):
        check_room(config.folder, *evaluator.room(), "features")
    launch.write_config(config, "points.jsonl")
    known = evaluator.known() if launch.is_first(config) else []
    with loggers.logging(config, known if len(known) == len(config.nfe) else ()) as logs:
        first = launch.everywhere(config, lambda world, device: evaluator.run(sampler.to(device), world, logs))
    if first:
        print_points(evaluator.points, evaluator.extractor.metric_name, evaluator.out)
    return evaluator.points


def planned(config: Config) -> Sampler | None:
    """Build an experiment's sampler and plan its budgets; a dry run prints their cost and returns None."""
    sampler = experiment.build_frozen(config, load=not config.dry_run)
    plans: dict[float, Any] = {budget: sampler.plan(budget, config.n) for budget in config.nfe}
    if not config.dry_run:
        return sampler
    print_cost(config, sampler, plans)
    return None
