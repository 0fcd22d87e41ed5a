"""``search``: search for the best prior and solver at each budget."""

from typing import Any

from diffaccel import experiment
from diffaccel.config import Config
from diffaccel.run import launch
from diffaccel.text.terminal import print_lines


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
            f"{len(searcher.measured)} trials are in {searcher.out / 'trials.jsonl'}, the winners in "
            f"{searcher.out / 'best.yaml'}: measure them on another seed with `diffaccel bench`"
        )
    return searcher.best
