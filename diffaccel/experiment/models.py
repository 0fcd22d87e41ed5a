"""Models, whose samplers share one denoiser: of an experiment, and of a self-describing checkpoint."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffaccel.config import Config
from diffaccel.denoiser import DENOISERS
from diffaccel.errors import UsageError
from diffaccel.experiment.build import build_posterior, build_prior, build_sampler, build_solver, set_budgets
from diffaccel.experiment.loading import check_trained
from diffaccel.nn import NETWORKS
from diffaccel.pretrained import Pretrained
from diffaccel.process import PROCESSES
from diffaccel.sampling import Model, Part, Sampler
from diffaccel.solver import DEFAULT
from diffaccel.weights import assign_weights, open_weights


def build_model(config: Config, again: Callable[[Mapping[str, Any]], Config]) -> Model:
    """Build the model of an experiment, whose samplers share one denoiser.

    Args:
        config: Configuration of the experiment.
        again: Function settings -> configuration of the experiment with these settings.

    Raises:
        UsageError: See :func:`build_sampler`.
    """
    own = build_sampler(config)
    denoiser = own.denoiser
    posterior = build_posterior(config, denoiser)

    def derive(prior: Part, solver: Part) -> Sampler:
        given = {part: node for part, node in (("prior", prior), ("solver", solver)) if node is not None}
        if not given:
            return copy.copy(own)
        other = again(given)
        made = own.using(build_prior(other, other.prior, posterior, denoiser), build_solver(other, other.solver))
        check_trained(other, made)
        set_budgets(other, made, posterior, load=True)
        return made.eval()

    return Model(config.experiment, denoiser, own.shape, derive)


def build_checkpoint(path: Path) -> Model:
    """Build the model of a self-describing checkpoint, on the process that it was trained on.

    Raises:
        UsageError: The file is damaged, contains code, is not of a denoiser, or does not determine the network.
    """
    weights = open_weights(path)
    found = Pretrained.of(weights)
    network = NETWORKS.build(found.network, shape=found.shape)
    process = PROCESSES.build(found.process)
    denoiser = DENOISERS.build(found.denoiser, process=process, network=network)
    assign_weights(found.tensors, network, f"the weights of {path}")
    denoiser.eval()

    def derive(prior: Part, solver: Part) -> Sampler:
        if weights.header.get("latents"):
            raise UsageError(
                f"{path} samples latents, which are not images: load its experiment, with the auto-encoder"
            )
        low = max(denoiser.ratio_range[0], 0.002)
        return Sampler(denoiser, prior, solver or {**DEFAULT, "grid": {"ratio_min": low}}, found.shape).eval()

    return Model(str(path), denoiser, found.shape, derive)
