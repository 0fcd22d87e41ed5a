"""Metrics of sets of images, computed in one pass over their features.

Everything is computed in float64, which MPS does not support: on such devices, keep the metrics on the CPU.
"""

from diffaccel.metrics.frechet import Frechet, FrechetDistance, frechet_distance, jackknife
from diffaccel.metrics.kernel import (
    Kernel,
    KernelDistance,
    KernelReference,
    kernel_distance,
    kernel_sum,
    mean_off_diagonal,
)
from diffaccel.metrics.manifold import Manifold, manifold_scores
from diffaccel.metrics.memorisation import Memorisation, memorised
from diffaccel.metrics.moments import Moments, MomentSums, check_features
from diffaccel.metrics.neighbours import Neighbours, distances, nearest
from diffaccel.metrics.paired import paired_difference

__all__ = [
    "Frechet",
    "FrechetDistance",
    "Kernel",
    "KernelDistance",
    "KernelReference",
    "Manifold",
    "Memorisation",
    "MomentSums",
    "Moments",
    "Neighbours",
    "check_features",
    "distances",
    "frechet_distance",
    "jackknife",
    "kernel_distance",
    "kernel_sum",
    "manifold_scores",
    "mean_off_diagonal",
    "memorised",
    "nearest",
    "paired_difference",
]
