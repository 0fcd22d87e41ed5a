"""Evaluation: sampling and scoring of points, with partial results on disk."""

from diffaccel.evaluation.bits import BitsPerDim, least_ratio
from diffaccel.evaluation.evaluator import Evaluator, Identity
from diffaccel.evaluation.partial import Chunk, Partial
from diffaccel.evaluation.pictures import comparable
from diffaccel.evaluation.scores import BLOCKS, Real, Scores

__all__ = [
    "BLOCKS",
    "BitsPerDim",
    "Chunk",
    "Evaluator",
    "Identity",
    "Partial",
    "Real",
    "Scores",
    "comparable",
    "least_ratio",
]
