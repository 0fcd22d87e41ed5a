"""The evaluation callback, what it leaves on the way, and what a point's images add up to."""

from diffaccel.evaluator.bits import BitsPerDim, least_ratio
from diffaccel.evaluator.callback import Evaluator, Identity
from diffaccel.evaluator.partial import Chunk, Partial
from diffaccel.evaluator.pictures import comparable
from diffaccel.evaluator.scores import BLOCKS, Real, Scores, to_uint8

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
    "to_uint8",
]
