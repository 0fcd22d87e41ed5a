"""Description of a measured point, with the keys of points.jsonl."""

import hashlib
import math
from typing import Any

import torch

from diffaccel.collective import World
from diffaccel.evaluation.provenance import device_name, git_commit, versions
from diffaccel.evaluation.scores import Real, Scores
from diffaccel.evaluation.scoring import Named
from diffaccel.nfe import total_flops
from diffaccel.noise import GENERATOR
from diffaccel.prior import ChainPrior, Plan, Prior
from diffaccel.prior.chain import starts_of
from diffaccel.prior.diagnostics import summarise
from diffaccel.sampling import Sampler
from diffaccel.weights import networks_sha256


def describe_point(sampler: Sampler, plan: Plan, budget: float, n: int, scores: Scores, world: World) -> dict[str, Any]:
    """Describe cost and provenance of the images of a point.

    Args:
        sampler: Sampler of the images.
        plan: Plan of the budget.
        budget: Maximum number of evaluations per image.
        n: Number of images.
        scores: Sums over the images of all ranks.
        world: Rank and number of ranks.

    Raises:
        UsageError: The budget was exceeded.
    """
    prior = plan.prior
    nfe, burn_in = sampler.evaluations_per_image(plan, budget, scores.evaluations, scores.burn_in, n)
    flops = total_flops(scores.evaluations, scores.flops) / n
    one = scores.flops.get("denoiser", 0.0)
    chains = prior.chains_for(n) if isinstance(prior, ChainPrior) else None
    # Evaluations of the image itself; those of the chain before it are added below.
    sequential = sampler.planned_nfe(plan, n) - prior.burn_in_evaluations(n) / n
    if isinstance(prior, ChainPrior):
        _, rounds = starts_of(n, prior.chains_for(n), prior.restart_every)  # those of a restart need no earlier ones
        sequential += prior.burn_in_per_chain + (rounds - 1) * plan.chain_steps
    ranks = max(world.size, 1 + max(scores.images_by_rank))  # the point may have been started with more ranks
    return {
        "by_budget": bool(sampler.by_nfe),
        "tuned": sampler.tuned,
        "nfe_budget": budget if math.isfinite(budget) else None,
        "nfe": nfe,
        "nfe_marginal": nfe - burn_in,
        "nfe_burn_in": burn_in,
        "nfe_sequential": sequential if math.isfinite(sequential) else None,
        "nfe_equivalent": flops / one if one else None,
        "evaluations": dict(scores.evaluations),
        "plan": {"steps": plan.steps, "chain_steps": plan.chain_steps},
        "chains": chains,
        "chain": summarise([scores.traces[first] for first in sorted(scores.traces)]),
        "gflops_per_image": flops / 1e9,
        "seconds_per_image": scores.seconds[0].item() / n,
        **_decoding(sampler, scores, n),
        "seconds_scoring": scores.seconds[1].item() / n,
        "seconds_warm_up": scores.seconds[2].item(),
        "n": n,
        "noise": GENERATOR,
        "weights": weights_of(prior),
        "images_sha256": hashlib.sha256(scores.digests.numpy().tobytes()).hexdigest(),
        "images_by_rank": [scores.images_by_rank[rank] for rank in range(ranks)],
        "world_size": world.size,
        "device": device_name(sampler.device),
        "precision": sampler.precision,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "git": git_commit(),
    }


def weights_of(prior: Prior) -> dict[str, str]:
    """Return the hashes of the own weights of a prior, a noise classifier's included, by the names of the networks."""
    found = networks_sha256([{**prior.networks(), **prior.auxiliary_networks()}])
    return dict(one.split("=", 1) for one in found)


def _decoding(sampler: Sampler, scores: Scores, n: int) -> dict[str, float]:
    """Cost per image of the decoder of latents, which no other key includes; empty without latents."""
    if sampler.latents is None:
        return {}
    return {"gflops_decoding": scores.decoding_flops / 1e9, "seconds_decoding": scores.seconds[3].item() / n}


def describe_judges(extractor: Named, real: Real, n: int) -> dict[str, Any]:
    """Describe the extractor and the statistics with which n images were scored."""
    reference, floor = real.reference, real.floor
    return {
        "extractor": {"name": extractor.name, "sha256": extractor.sha256, "dim": extractor.dim},
        "reference": {
            "name": reference.provenance["label"],
            "split": reference.provenance["split"],
            "n": reference.moments.n or None,
            "sha256": reference.sha256,
        },
        "floor": floor and {"n": floor.moments_of(n).n or None, "sha256": floor.sha256},
    }
