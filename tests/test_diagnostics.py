"""Diagnostics of chains against processes whose answers are known."""

import math

import numpy as np
import pytest

from diffaccel.prior.diagnostics import autocorrelation_time, split_r_hat, summarise


def autoregression(a: float, chains: int, rounds: int) -> np.ndarray:
    """Stationary x_k = a x_{k-1} + sqrt(1 - a^2) z."""
    rng = np.random.default_rng(0)
    z, x = rng.standard_normal((chains, rounds)), np.empty((chains, rounds))
    x[:, 0] = z[:, 0]
    for k in range(1, rounds):
        x[:, k] = a * x[:, k - 1] + math.sqrt(1 - a * a) * z[:, k]
    return x


@pytest.mark.parametrize("a", [0.0, 0.5, 0.8, -0.3])
def test_autocorrelation_time_of_an_autoregression(a):
    assert autocorrelation_time(autoregression(a, 200, 500)) == pytest.approx((1 + a) / (1 - a), rel=0.1)


def test_a_time_that_is_not_positive_is_none():
    """In few rounds the sum of the estimated autocorrelation can be negative."""
    assert math.isnan(autocorrelation_time(np.array([[1.0, -1.0, 1.0, -1.0]])))


@pytest.mark.filterwarnings("error")
def test_chains_that_do_not_move_have_no_time():
    values = np.full((3, 10), 0.1)  # the mean of which is rounded
    assert math.isnan(autocorrelation_time(values)) and math.isnan(split_r_hat(np.zeros((3, 10))))
    assert split_r_hat(np.arange(3.0)[:, None] * np.ones(10)) == math.inf


def test_autocorrelation_time_of_stuck_chains_is_long():
    """The grand mean is taken off, and not each chain's: chains that never leave their places are no fresh draws."""
    stuck = np.random.default_rng(0).standard_normal((50, 1)) + 0.1 * autoregression(0.0, 50, 40)
    assert autocorrelation_time(stuck) > 20


def test_too_few_rounds_give_nan():
    assert math.isnan(autocorrelation_time(np.zeros((3, 3))))
    assert math.isnan(split_r_hat(np.zeros((3, 3))))


def test_split_r_hat_by_hand():
    values = np.array([[1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 5.0, 7.0]])
    halves = np.array([[1.0, 2.0], [2.0, 2.0], [3.0, 4.0], [5.0, 7.0]])
    within = halves.var(axis=1, ddof=1).mean()
    between = 2 * halves.mean(axis=1).var(ddof=1)
    assert split_r_hat(values) == pytest.approx(math.sqrt((within / 2 + between / 2) / within))


def test_split_r_hat_sees_what_does_not_mix():
    mixed = autoregression(0.0, 20, 400)
    assert split_r_hat(mixed) == pytest.approx(1.0, abs=0.01)
    assert split_r_hat(mixed + np.arange(20)[:, None] / 10) > 1.1  # chains apart
    assert split_r_hat(mixed + np.linspace(-1, 1, 400)) > 1.1  # all drift together: their halves differ


def record(ratio, mean, carried=0.0, ends=0.0, rounds=1):
    return {
        "rounds_since_start": rounds,
        "start_ratio": ratio,
        "mean": mean,
        "carried": carried,
        "at_end_levels": ends,
    }


def test_summary_of_two_groups_by_hand():
    """Three chains in groups of two and one, four rounds; in the last, one chain of the first group only."""
    one = [
        record([1.0, 2.0], [0.1, 0.2], carried=0.5),
        record([2.0, 2.0], [0.3, 0.1], ends=0.1),
        record([3.0, 1.0], [0.2, 0.4]),
        record([9.0], [0.9], carried=1.0),
    ]
    two = [record([4.0], [0.5]), record([2.0], [0.2]), record([2.0], [0.1])]
    result = summarise([one, two])
    assert result["start_ratio_mean"] == pytest.approx(19 / 9)
    assert (result["start_ratio_min"], result["start_ratio_max"]) == (1.0, 4.0)
    assert result["start_ratio_drift"] == pytest.approx((6 / 3) / (7 / 3))
    assert result["carried"] == pytest.approx((2 * 0.5 + 1.0) / 10), "of ten starts, however the chains are grouped"
    assert result["at_end_levels"] == pytest.approx(2 * 0.1 / 10)
    assert math.isnan(result["r_hat"]) and math.isnan(result["autocorrelation_time"])


def test_summary_agrees_with_its_parts():
    values = autoregression(0.5, 6, 40)
    ratio = np.exp(0.1 * autoregression(0.2, 6, 40)) * np.linspace(1, 3, 40)
    groups = [slice(0, 4), slice(4, 6)]
    traces = [[record(ratio[g, k].tolist(), values[g, k].tolist()) for k in range(40)] for g in groups]
    result = summarise(traces)
    assert result["r_hat"] == pytest.approx(split_r_hat(values))
    assert result["autocorrelation_time"] == pytest.approx(autocorrelation_time(values))
    assert result["start_ratio_drift"] == pytest.approx(ratio[:, 30:].mean() / ratio[:, :10].mean())


def test_nothing_to_summarise():
    assert summarise([]) == {}
    assert summarise([[]]) == {}
