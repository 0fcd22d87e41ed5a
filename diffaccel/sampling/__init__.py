"""Sampling: images from a denoiser, a prior and a solver, within a budget of network evaluations."""

from diffaccel.budget import nearest
from diffaccel.sampling.cost import Sampled, Spent
from diffaccel.sampling.images import ImageKind, to_uint8
from diffaccel.sampling.model import Model, Part
from diffaccel.sampling.precision import arithmetic
from diffaccel.sampling.sampler import Sampler
from diffaccel.sampling.settings import Setting, Tweedie

__all__ = [
    "ImageKind",
    "Model",
    "Part",
    "Sampled",
    "Sampler",
    "Setting",
    "Spent",
    "Tweedie",
    "arithmetic",
    "nearest",
    "to_uint8",
]
