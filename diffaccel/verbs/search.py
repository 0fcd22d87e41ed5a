"""``search``: search for the best prior and solver at each budget."""

from typing import Any

from diffaccel import experiment
from diffaccel.config import Config
from diffaccel.run import launch
from diffaccel.text.terminal import print_lines

HELP = """\
search EXPERIMENT nfe=5,10 seed=7
find the best prior and solver for each budget

Draws settings from the experiment's `search.space`, and keeps the best of them by successive halving. The winners are
written to OUT/best.yaml; measure them on another seed with `diffaccel bench`.

Keys:
  nfe=5,10                 budgets
  seed=7                   seed of the noise and of the draws of settings
  search.trials=32         settings per budget, including the experiment's own
  search.images=[500,2000]  images per setting in each round
  search.keep=0.25         fraction of the settings that are kept for the next round
  search.judge=inception   judge whose distance is minimised; by default the first
  search.space.solver.name=[ipndm,heun]  values of a key
"""


def search(config: Config) -> dict[int, dict[str, dict[str, Any]]]:
    """Search the configured budgets.

    Returns:
        Budget -> best ``{"prior": ..., "solver": ...}``, which are also written to best.yaml.

    Raises:
        UsageError: The input is invalid, or no setting can be measured.
    """
    sampler = experiment.build_frozen(config)
    searcher = experiment.build_searcher(config, sampler)
    launch.write_config(config, "trials.jsonl", "best.yaml")
    if launch.everywhere(config, lambda world, device: searcher.run(sampler.to(device), world)):
        print_lines(
            f"{len(searcher.trials.measured)} trials are in {searcher.out / 'trials.jsonl'}, the winners in "
            f"{searcher.out / 'best.yaml'}: measure them on another seed with `diffaccel bench`"
        )
    return searcher.best
