"""Which levels a denoiser is trained at: each law by its quantiles."""

import math

import pytest
import torch
from torch import Tensor

from diffaccel.denoiser import GaussianDenoiser
from diffaccel.denoiser.levels import LEVELS, Index, Levels, LogNormal, LogUniform, Uniform
from diffaccel.process import DiscreteVariancePreserving, EDMVarianceExploding, Process, VariancePreserving

LOW, HIGH = 0.01, 10.0
NORMAL = [0.5 * math.erfc(-z / math.sqrt(2)) for z in (-1.0, 0.0, 1.0)]
"""Quantiles at which a standard normal number is -1, 0 and 1."""


def ratios(levels: Levels, process: Process, u: list[float]) -> Tensor:
    """Ratios at quantiles, for a denoiser that is trained on [LOW, HIGH]."""
    denoiser = GaussianDenoiser(torch.zeros(1, 1, 1), 0.25, process)
    denoiser.ratio_range = (LOW, HIGH)
    return process.ratio(levels(denoiser, torch.tensor(u, dtype=torch.float64)))


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("process", [EDMVarianceExploding(), VariancePreserving()], ids=repr)
def test_lognormal_is_a_normal_law_of_the_logarithm(process: Process):
    close(ratios(LogNormal(-0.5, 0.7), process, NORMAL), [math.exp(-0.5 + 0.7 * z) for z in (-1, 0, 1)])
    close(ratios(LogNormal(), process, NORMAL), [math.exp(-1.2 + 1.2 * z) for z in (-1, 0, 1)])  # EDM's table 1
    close(ratios(LogNormal(), process, [1e-9, 1 - 1e-9]), [LOW, HIGH])  # six deviations off


@pytest.mark.parametrize("process", [EDMVarianceExploding(), VariancePreserving()], ids=repr)
def test_log_uniform_and_uniform_times(process: Process):
    close(ratios(LogUniform(), process, [0.0, 1 / 3, 1.0]), [LOW, 0.1, HIGH])
    low, high = process.time(torch.tensor([LOW, HIGH], dtype=torch.float64))
    quarter = process.ratio(low + (high - low) / 4)
    close(ratios(Uniform(), process, [0.0, 0.25, 1.0]), [LOW, quarter.item(), HIGH])


def test_indices_are_equally_likely():
    """Up to the top of the range, {0 .. K - 1}; a mirrored number may be 1."""
    process = DiscreteVariancePreserving(steps=20)
    denoiser = GaussianDenoiser(torch.zeros(1, 1, 1), 0.25, process)
    denoiser.ratio_range = (0.0, process.ratio(torch.tensor(7.0, dtype=torch.float64)).item())
    found = Index()(denoiser, (torch.arange(800, dtype=torch.float64) + 0.5) / 800)
    assert found.long().bincount().tolist() == [100] * 8
    assert Index()(denoiser, torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist() == [0, 7]


def test_names():
    assert LEVELS.build({"name": "lognormal", "mean": -0.4}) == LogNormal(mean=-0.4, std=1.2)
