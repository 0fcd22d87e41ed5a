"""Mixing diagnostics of chains, from their records of each round."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def split_r_hat(values: Array) -> float:
    """Compute split R-hat of a scalar: about 1 for mixed chains, larger if chains or their halves differ.

    Args:
        values: One row per chain and one column per round, (C, R), R >= 4.

    Returns:
        R-hat, or NaN for fewer rounds.

    References:
        Bayesian Data Analysis (Gelman et al., 2013), section 11.4
    """
    half = values.shape[1] // 2
    if half < 2:
        return float("nan")
    chains = np.concatenate([values[:, :half], values[:, -half:]])
    within = chains.var(axis=1, ddof=1).mean()
    between = half * chains.mean(axis=1).var(ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):  # chains that do not move: infinity, or NaN if all are equal
        return float(np.sqrt(((half - 1) / half * within + between / half) / within))


def autocorrelation_time(values: Array) -> float:
    """Compute the integrated autocorrelation time in rounds, averaged over chains: 1 for independent rounds.

    The sum of the autocorrelation about the grand mean is truncated at the first window that is 5 times longer than
    the time found so far (Sokal). It is less than 1 for rounds that alternate.

    Args:
        values: (C, R).

    Returns:
        The time; NaN for fewer than 4 rounds, values that are all equal, or a sum that is not positive, as it can be in
        few rounds.
    """
    chains, rounds = values.shape
    if rounds < 4 or np.ptp(values) == 0:
        return float("nan")
    centred = values - values.mean()
    covariance = np.array([(centred[:, : rounds - k] * centred[:, k:]).mean() for k in range(rounds)])
    total = 1.0
    for window in range(1, rounds):
        total += 2 * covariance[window] / covariance[0]
        if window >= 5 * total:
            break
    return float(total) if total > 0 else float("nan")


def summarise(traces: Sequence[Sequence[dict[str, Any]]]) -> dict[str, float]:
    """Summarise the diagnostics of all chains for a point.

    Args:
        traces: Records of each group of chains (:class:`~diffaccel.prior.chain.ChainState`).

    Returns:
        Start levels (mean, minimum, maximum, and the ratio of their mean over the last quarter of the rounds to that
        over the first), fraction of starts that repeat a carried state, fraction of sweeps that ended at an end level,
        and R-hat and autocorrelation time of the means of the states.
    """
    rounds = min((len(trace) for trace in traces), default=0)
    # The last round may have fewer chains, and is left out of the rectangular arrays.
    whole = [k for k in range(rounds) if all(len(t[k]["mean"]) == len(t[0]["mean"]) for t in traces)]
    if not whole:
        return {}
    ratio = np.concatenate([np.array([trace[k]["start_ratio"] for k in whole]).T for trace in traces])
    mean = np.concatenate([np.array([trace[k]["mean"] for k in whole]).T for trace in traces])
    quarter = max(1, len(whole) // 4)
    records = [record for trace in traces for record in trace]
    sizes = [len(record["mean"]) for record in records]  # of the groups of chains, which depend on the batch size
    return {
        "start_ratio_mean": float(ratio.mean()),
        "start_ratio_min": float(ratio.min()),
        "start_ratio_max": float(ratio.max()),
        "start_ratio_drift": float(ratio[:, -quarter:].mean() / ratio[:, :quarter].mean()),
        "carried": float(np.average([record["carried"] for record in records], weights=sizes)),
        "at_end_levels": float(np.average([record["at_end_levels"] for record in records], weights=sizes)),
        "r_hat": split_r_hat(mean),
        "autocorrelation_time": autocorrelation_time(mean),
    }
