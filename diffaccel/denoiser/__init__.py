"""Denoisers: E[x_0 | x_t] and E[eps | x_t] on a process, exact or from a network."""

from diffaccel.denoiser.base import DENOISERS, Denoiser, augment_args
from diffaccel.denoiser.conditioned import ConditionedDenoiser, GuidedDenoiser
from diffaccel.denoiser.decoupled import DecoupledDenoiser, Heads
from diffaccel.denoiser.exact import FiniteSetDenoiser, GaussianDenoiser, MixtureDenoiser, mixture
from diffaccel.denoiser.levels import LEVELS, Index, Levels, LogNormal, LogUniform, Uniform
from diffaccel.denoiser.network import DataDenoiser, EpsDenoiser, KarrasDenoiser, NetworkDenoiser, VelocityDenoiser

__all__ = [
    "ConditionedDenoiser",
    "DENOISERS",
    "DataDenoiser",
    "DecoupledDenoiser",
    "Denoiser",
    "EpsDenoiser",
    "FiniteSetDenoiser",
    "GaussianDenoiser",
    "GuidedDenoiser",
    "Heads",
    "Index",
    "KarrasDenoiser",
    "LEVELS",
    "Levels",
    "LogNormal",
    "LogUniform",
    "MixtureDenoiser",
    "NetworkDenoiser",
    "Uniform",
    "VelocityDenoiser",
    "augment_args",
    "mixture",
]
