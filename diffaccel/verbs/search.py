"""``search``: the best prior and solver for each budget."""

from typing import Any

from diffaccel import experiment
from diffaccel.config import Config
from diffaccel.run import launch
from diffaccel.text.terminal import print_lines


def search(config: Config) -> dict[int, dict[str, dict[str, Any]]]:
    """Search the configured budgets.

    Returns:
        Budget -> the best ``{"prior": ..., "solver": ...}``; also in best.yaml.

    Raises:
        UsageError: Bad input, or no setting that can be measured.
    """
    sampler = experiment.build_method(config, frozen=True).eval().sampler.eval()
    searcher = experiment.build_searcher(config, sampler)
    launch.write_config(config, "trials.jsonl", "best.yaml")

    def run(world: Any, device: Any) -> bool:
        searcher.run(sampler.to(device), world)
        return world.first

    if launch.everywhere(config, run):
        print_lines(
            f"{len(searcher.measured)} trials are in {searcher.out / 'trials.jsonl'}, the winners in "
            f"{searcher.out / 'best.yaml'}: measure them on another seed with `diffaccel bench`"
        )
    return searcher.best
