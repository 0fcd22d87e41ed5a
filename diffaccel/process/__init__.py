"""Forward processes and the predictions that denoisers make on them."""

from diffaccel.process.base import PROCESSES, Process, batch_of, expand, require
from diffaccel.process.decoupled import Decoupled
from diffaccel.process.gaussian import (
    CosineVariancePreserving,
    DiscreteVariancePreserving,
    EDMVarianceExploding,
    SubVariancePreserving,
    VarianceExploding,
    VariancePreserving,
)
from diffaccel.process.prediction import DecoupledPrediction, Prediction, combined

__all__ = [
    "CosineVariancePreserving",
    "Decoupled",
    "DecoupledPrediction",
    "DiscreteVariancePreserving",
    "EDMVarianceExploding",
    "PROCESSES",
    "Prediction",
    "Process",
    "SubVariancePreserving",
    "VarianceExploding",
    "VariancePreserving",
    "batch_of",
    "combined",
    "expand",
    "require",
]
