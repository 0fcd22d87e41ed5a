"""Density models of noisy data, from which sampling may start."""

from diffaccel.density.base import DENSITIES, Density, NormalDensity, TrainingImages
from diffaccel.density.basis import CosineBasis, PrincipalBasis
from diffaccel.density.flow import FlowDensity
from diffaccel.density.gaussian import GaussianDensity
from diffaccel.density.glow import GlowDensity
from diffaccel.density.mixture import MixtureDensity
from diffaccel.density.vae import VAEDensity

__all__ = [
    "DENSITIES",
    "CosineBasis",
    "Density",
    "FlowDensity",
    "GaussianDensity",
    "GlowDensity",
    "MixtureDensity",
    "NormalDensity",
    "PrincipalBasis",
    "TrainingImages",
    "VAEDensity",
]
