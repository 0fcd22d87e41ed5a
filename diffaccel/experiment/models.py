"""Models, whose samplers share one denoiser: of an experiment, and of a self-describing checkpoint."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffaccel.condition import check_kinds
from diffaccel.config import Config
from diffaccel.data.conditions import ToGive, build_conditioner
from diffaccel.errors import UsageError
from diffaccel.experiment.build import build_posterior, build_prior, build_sampler, build_solver, set_budgets
from diffaccel.experiment.loading import check_trained
from diffaccel.pretrained import Pretrained
from diffaccel.sampling import Model, Part, Sampler
from diffaccel.solver import DEFAULT
from diffaccel.weights import open_weights


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
    """Build the model of a self-describing checkpoint, on the process and the noise levels that it was trained on.

    The conditioner of the training is that of conditions that are given in each call: what they determine is imposed,
    and captions are encoded. Samples start from pure noise, or from the network's own states if it is a generator, too.

    Raises:
        UsageError: The file is damaged, contains code, is not of a denoiser, or does not determine the network.
    """
    weights = open_weights(path)
    found = Pretrained.of(weights)
    denoiser = found.build()

    def derive(prior: Part, solver: Part) -> Sampler:
        if weights.header.get("latents"):
            raise UsageError(
                f"{path} samples latents, which are not images: load its experiment, with the auto-encoder"
            )
        conditioner = build_conditioner(weights.header.get("condition") or {}, found.shape)
        low, high = denoiser.ratio_range
        made = Sampler(
            denoiser,
            prior or found.shared_prior,
            solver or {**DEFAULT, "grid": {"ratio_min": max(low, 0.002)}},
            found.shape,
        )
        if conditioner is not None:
            check_kinds(made.takes, conditioner.kinds, f"the header of {path}")
            made.inputs = ToGive(conditioner, weights.header.get("condition_sha256"))
        if made.prior.pure_noise and found.is_truncated(denoiser):
            named = f" {weights.header['experiment']}" if weights.header.get("experiment") else ""
            raise UsageError(
                f"{path} was trained up to a noise-to-data ratio of {high:.4g}, at which images are not noise yet: "
                f"load the experiment{named} with checkpoint=, or sample model.denoiser from a prior that starts there"
            )
        return made.eval()

    return Model(str(path), denoiser, found.shape, derive)
