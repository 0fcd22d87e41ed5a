"""From a configuration to the objects of a run."""

from diffaccel.experiment.build import (
    build_method,
    build_posterior,
    build_prior,
    build_sampler,
    check_start,
    keeps_denoiser,
    set_budgets,
    shape_of,
)
from diffaccel.experiment.evaluation import (
    build_data,
    build_evaluator,
    build_extractor,
    build_fitted,
    build_likelihood,
    build_searcher,
)
from diffaccel.experiment.identity import by_content, describe_configuration, identify, identify_images, identify_parts

__all__ = [
    "build_data",
    "build_evaluator",
    "build_extractor",
    "build_fitted",
    "build_likelihood",
    "build_method",
    "build_posterior",
    "build_prior",
    "build_sampler",
    "build_searcher",
    "by_content",
    "check_start",
    "describe_configuration",
    "identify",
    "identify_images",
    "identify_parts",
    "keeps_denoiser",
    "set_budgets",
    "shape_of",
]
