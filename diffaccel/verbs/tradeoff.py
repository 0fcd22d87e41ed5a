"""``tradeoff``: likelihood bound and distance of small T against the start time."""

from diffaccel import experiment
from diffaccel.config import Config
from diffaccel.errors import UsageError
from diffaccel.evaluation.tradeoff import Row, TradeoffCurve, best, starts_of
from diffaccel.prior import DensityPrior
from diffaccel.run import launch
from diffaccel.run.targets import check_new
from diffaccel.text.terminal import print_lines

HELP = """\
tradeoff EXPERIMENT
likelihood bound and distance of small T for each start time

Requires an experiment with the prior `density`, such as digits/small_t. The table is written to OUT/tradeoff.csv.

Keys:
  tradeoff.T=[0.1,0.2]     start times on the experiment's process
  tradeoff.densities.0.3=FILE  weights of the density fitted at a start time
  tradeoff.images=512 tradeoff.draws=16  test images for the bound, and evaluations per image
  tradeoff.fd=false        only the bound, no distance of samples
  nfe=10 n=5000 seed=0     budget, images and seed of the samples
"""


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
    experiment.check_unconditional("tradeoff", sampler)
    if config.tradeoff.images < 2:
        raise UsageError(f"tradeoff.images={config.tradeoff.images}: a standard error requires at least 2 images")
    if sampler.latents is not None:
        raise UsageError("tradeoff compares likelihoods of images, which a diffusion in latents does not have")
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
