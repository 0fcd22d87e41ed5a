"""``bench``: measurement of points of the quality-versus-NFE curve."""

from typing import Any

import torch

from diffaccel import experiment
from diffaccel.collective import World
from diffaccel.config import Config
from diffaccel.report.table import print_points
from diffaccel.run import launch
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
    with launch.logging(config) as loggers:

        def measure(world: World, device: torch.device) -> bool:
            evaluator.run(sampler.to(device), world, loggers)
            return world.first

        first = launch.everywhere(config, measure)
    if first:
        print_points(evaluator.points, evaluator.extractor.metric_name, evaluator.out)
    return evaluator.points


def planned(config: Config) -> Sampler | None:
    """Build an experiment's sampler and plan its budgets; a dry run prints their cost and returns None."""
    method = experiment.build_method(config, load=not config.dry_run, frozen=True)
    sampler = method.eval().sampler.eval()
    plans: dict[float, Any] = {budget: sampler.plan(budget, config.n) for budget in config.nfe}
    if not config.dry_run:
        return sampler
    print_cost(config, sampler, plans)
    return None
