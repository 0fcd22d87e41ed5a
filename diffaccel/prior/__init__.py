"""Priors: distributions of the states that sampling starts from."""

from diffaccel.prior.base import PRIORS, GaussianPrior, Group, Plan, Prior
from diffaccel.prior.chain import ChainPrior, ChainState
from diffaccel.prior.density import DensityPrior
from diffaccel.prior.implicit import ImplicitPrior
from diffaccel.prior.langevin import LangevinGibbsPrior, keep_lower, langevin_step
from diffaccel.prior.posterior import ClassifierPosterior, ExactPosterior, LevelPosterior, geometric_levels
from diffaccel.prior.restart import RestartPrior
from diffaccel.prior.warm import WarmPrior

__all__ = [
    "PRIORS",
    "ChainPrior",
    "ChainState",
    "ClassifierPosterior",
    "DensityPrior",
    "ExactPosterior",
    "GaussianPrior",
    "Group",
    "ImplicitPrior",
    "LangevinGibbsPrior",
    "LevelPosterior",
    "Plan",
    "Prior",
    "RestartPrior",
    "geometric_levels",
    "keep_lower",
    "langevin_step",
    "WarmPrior",
]
