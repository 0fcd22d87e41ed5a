"""``bench``: measurement of points of the quality-versus-NFE curve."""

from typing import Any

from diffaccel import experiment
from diffaccel.config import Config
from diffaccel.errors import MissingError
from diffaccel.report.table import print_points
from diffaccel.run import launch, loggers
from diffaccel.sampling import Sampler
from diffaccel.storage import check_room
from diffaccel.text.terminal import print_lines
from diffaccel.verbs.cost import print_cost

HELP = """\
bench EXPERIMENT nfe=5,10,20 n=5000
measure points of the quality-versus-NFE curve

Points are appended to OUT/points.jsonl, and shown by `diffaccel compare`. The same command resumes an interrupted
bench, and prints the points that were measured before.

Keys:
  nfe=10 or nfe=5,10       maximum network evaluations per image, including burn-in; one point each
  n=5000 seed=0            images per point, and seed of their noise
  prior=gaussian           distribution of the starting states
  prior.images_per_chain=50  length of the chains of a chain prior; chains=100: their number, for any n
  judges=efficientnet_lite0,mobilenetv2  extractors that score the images, in one pass
  reference=FILE floor=FILE  statistics of training and held-out images, from `diffaccel reference`
  metrics=[frechet,kid]    metrics of a point; `diffaccel list metric` lists them
  likelihood=true          measure bits per dimension of test images
  keep_images=true         write the images, to score them with other extractors
  dry_run=true             print the plan with its cost and memory; measure nothing
  logger=wandb|csv|tensorboard|none  W&B writes offline unless wandb_mode=online (or WANDB_MODE)
"""


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
    missing = False
    if config.dry_run and sampler.inputs is not None:
        try:
            sampler.inputs.check(config.n)
        except MissingError as error:  # the cost of all conditions is the same
            missing = True
            print_lines(f"a bench would end: {error}")
    plans: dict[float, Any] = {budget: sampler.plan(budget, config.n, given=missing) for budget in config.nfe}
    if not config.dry_run:
        return sampler
    print_cost(config, sampler, plans)
    return None
