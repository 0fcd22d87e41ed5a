"""Which settings a search may choose: chains whose images repeat one another are excluded.

The objective remains the Frechet distance. The distance of as many independent images is no alternative: it is about
mean and covariance, which hardly react to repetition, so that chains with a recall near 0 have won. Diversity is
required instead, in two ways that a chain can't trade for distance:

- The effective number of independent images is at least a quarter of the number of images
  (:data:`~diffaccel.metrics.repetition.LEAST_EFFECTIVE`): otherwise standard errors are more than doubled.
- Recall is at least :data:`RECALL` of that of the same solver from independent starts, less two standard errors of a
  share of so many images. The effective number is about the mean and misses images that share their details.

Near repeats exclude nothing, because images of few evaluations are close to one another without a chain too. Settings
without a chain are always eligible: their images are independent.
"""

import math
from collections.abc import Mapping
from typing import Any

from diffaccel.metrics.base import COMPARED
from diffaccel.metrics.repetition import LEAST_EFFECTIVE

INDEPENDENT = {"name": "gaussian"}
"""Prior with independent starts, whose recall a chain's is compared with."""
RECALL = 0.9
"""Minimum recall of a chain, relative to that of the same solver from independent starts."""


def exclusion(trial: Mapping[str, Any], recall: float | None) -> str:
    """Return why a measured setting is not eligible; empty if it is.

    Args:
        trial: Number of images ``n``, number of chains ``chains`` (None for independent images), and ``metrics``.
        recall: Recall of independent images of the same number; None if it is unknown.
    """
    if trial.get("chains") is None:
        return ""
    n, metrics = trial["n"], trial["metrics"]
    if (effective := metrics.get("effective_n", math.inf)) < LEAST_EFFECTIVE * n:
        return f"{n} images that are worth {effective:.0f} independent ones"
    own = metrics.get("recall")
    if recall is None or own is None:
        return ""
    least = RECALL * recall
    if own < least - 2 * math.sqrt(least * (1 - least) / min(n, COMPARED)):
        return f"a recall of {own:.3f}, and independent images one of {recall:.3f}"
    return ""
