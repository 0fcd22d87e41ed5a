"""Priors by name: the law of the state that sampling starts from."""

from diffaccel.prior.base import PRIORS, GaussianPrior, Group, Plan, Prior
from diffaccel.prior.chain import ChainState, LangevinGibbsPrior, keep_lower, langevin_step
from diffaccel.prior.posterior import ClassifierPosterior, ExactPosterior, LevelPosterior, geometric_levels

__all__ = [
    "PRIORS",
    "ChainState",
    "ClassifierPosterior",
    "ExactPosterior",
    "GaussianPrior",
    "Group",
    "LangevinGibbsPrior",
    "LevelPosterior",
    "Plan",
    "Prior",
    "geometric_levels",
    "keep_lower",
    "langevin_step",
]
