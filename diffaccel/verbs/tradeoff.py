"""``tradeoff``: likelihood bound and distance of small T against the start time."""

from diffaccel import experiment
from diffaccel.config import Config
from diffaccel.errors import UsageError
from diffaccel.evaluation.tradeoff import Row, TradeoffCurve, best, starts_of
from diffaccel.prior import DensityPrior
from diffaccel.run import launch
from diffaccel.run.targets import check_new
from diffaccel.text.terminal import print_lines


def tradeoff(config: Config) -> list[Row]:
    """Measure the bound and the distance of samples for each start time.

    Returns:
        One row per density and time, which are also written to tradeoff.csv.

    Raises:
        UsageError: The input is invalid, or the experiment has no density prior.
    """
    sampler = experiment.build_frozen(config)
    if not isinstance(sampler.prior, DensityPrior):
        raise UsageError(f"{config.experiment} has no density prior: choose, for example, {config.data_name}/small_t")
    if launch.is_first(config):
        check_new([config.folder / "tradeoff.csv"], config.again)
    starts = starts_of(sampler, config.tradeoff.T, experiment.build_fitted(config, sampler))
    settings, data = config.tradeoff, experiment.build_data(config)
    evaluator = experiment.build_evaluator(config, sampler, measured=False) if settings.fd else None
    likelihood = experiment.build_likelihood(config, sampler)
    batch_size, out = config.images_per_batch, config.folder
    curve = TradeoffCurve(settings, starts, data, evaluator, likelihood, config.seed, batch_size, out)
    launch.write_config(config, "tradeoff.csv")
    if launch.everywhere(config, lambda world, device: curve.run(sampler.to(device), world)):
        found = ", ".join(f"{name} at T = {T:g}" for name, T in best(curve.rows).items())
        print_lines(f"lowest bound: {found}; tradeoff.csv and tradeoff.png are in {config.folder}")
    return curve.rows
