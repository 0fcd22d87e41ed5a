"""Which settings a search may choose: chains whose images repeat one another are excluded.

The objective remains the Frechet distance. It counts dependence in part, because mean and covariance of few effective
images are farther from the data's, but it is nearly blind to details that images share: chains with a recall near 0
have won. The distance of as many independent images has the same blind spot. Diversity is required instead, in three
ways that a chain can't trade for distance:

- Recall is at least :data:`RECALL` of that of the same solver from independent starts, less two standard errors of a
  share of as many images as it is computed of.
- At most :data:`~diffaccel.report.repetition.MOST_REPEATS` more of the images are near repeats than of these.
- The effective number of images is at least :data:`EFFECTIVE` of their number: below it, standard errors are more than
  three times those of independent images, and a low distance is luck.

Settings without a chain are always eligible: their images are independent.
"""

import math
from collections.abc import Mapping
from typing import Any

from diffaccel.report.repetition import MOST_REPEATS

INDEPENDENT = {"name": "gaussian"}
"""Prior with independent starts, with whose recall and near repeats those of a chain are compared."""
RECALL = 0.9
"""Minimum recall of a chain, relative to that of the same solver from independent starts."""
EFFECTIVE = 0.1
"""Minimum effective number of a chain's images, relative to their number."""


def exclusion(trial: Mapping[str, Any], independent: Mapping[str, float]) -> str:
    """Return why a measured setting is not eligible; empty if it is.

    Args:
        trial: Number of images ``n``, number of chains ``chains`` (None for independent images), ``metrics``, and
            ``neighbourhoods``, the number of images that recall was computed of (None if it was not).
        independent: Metrics of as many independent images; empty if they are unknown.
    """
    if trial.get("chains") is None:
        return ""
    n, metrics = trial["n"], trial["metrics"]
    recall, near = independent.get("recall"), independent.get("near_repeats", 0.0)
    if recall is not None and (own := metrics.get("recall")) is not None:
        least = RECALL * recall
        if own < least - 2 * math.sqrt(least * (1 - least) / trial["neighbourhoods"]):
            return f"a recall of {own:.3f}, and independent images one of {recall:.3f}"
    if (own := metrics.get("near_repeats")) is not None and own > near + MOST_REPEATS:
        return f"near repeats of {own:.3f}, and independent images of {near:.3f}"
    if (effective := metrics.get("effective_n", math.inf)) < EFFECTIVE * n:
        return f"{n} images that are worth {effective:.0f} independent ones"
    return ""
