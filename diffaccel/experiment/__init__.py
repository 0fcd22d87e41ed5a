"""Construction of the objects of a run from its configuration."""

from typing import TYPE_CHECKING

from diffaccel.parts.lazy import lazy

if TYPE_CHECKING:
    from diffaccel.experiment.build import (
        build_frozen,
        build_method,
        build_posterior,
        build_prior,
        build_sampler,
        check_start,
        set_budgets,
    )
    from diffaccel.experiment.evaluation import (
        build_data,
        build_evaluator,
        build_fitted,
        build_likelihood,
        build_searcher,
        build_validator,
        check_unconditional,
    )
    from diffaccel.experiment.identity import identify, identify_images
    from diffaccel.experiment.judges import build_extractor, build_extractors, build_judges
    from diffaccel.experiment.latents import build_fit_data, build_latents, shape_of
    from diffaccel.experiment.models import build_checkpoint, build_model

_BUILD = ("frozen", "method", "posterior", "prior", "sampler")
_MEASURE = ("data", "evaluator", "fitted", "likelihood", "searcher", "validator")
_JUDGES = ("extractor", "extractors", "judges")

__all__ = [
    "build_checkpoint",
    "build_data",
    "build_evaluator",
    "build_extractor",
    "build_extractors",
    "build_fit_data",
    "build_fitted",
    "build_frozen",
    "build_judges",
    "build_latents",
    "build_likelihood",
    "build_method",
    "build_model",
    "build_posterior",
    "build_prior",
    "build_sampler",
    "build_searcher",
    "build_validator",
    "check_start",
    "check_unconditional",
    "identify",
    "identify_images",
    "set_budgets",
    "shape_of",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        **dict.fromkeys((f"build_{part}" for part in _BUILD), "diffaccel.experiment.build"),
        **dict.fromkeys(("check_start", "set_budgets"), "diffaccel.experiment.build"),
        **dict.fromkeys(("build_fit_data", "build_latents", "shape_of"), "diffaccel.experiment.latents"),
        **dict.fromkeys((f"build_{part}" for part in _MEASURE), "diffaccel.experiment.evaluation"),
        **dict.fromkeys(("build_checkpoint", "build_model"), "diffaccel.experiment.models"),
        "check_unconditional": "diffaccel.experiment.evaluation",
        **dict.fromkeys((f"build_{part}" for part in _JUDGES), "diffaccel.experiment.judges"),
        **dict.fromkeys(("identify", "identify_images"), "diffaccel.experiment.identity"),
    },
)
