"""The predictor-corrector against its published algorithm and the exact recursion of mean and variance."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffaccel.denoiser import GaussianDenoiser, MixtureDenoiser
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams
from diffaccel.process import (
    Decoupled,
    EDMVarianceExploding,
    Process,
    SubVariancePreserving,
    VariancePreserving,
    expand,
)
from diffaccel.solver import SOLVERS, LogSNR

MEANS = torch.tensor([[-1.0, 0.5], [0.8, 0.6], [0.1, -0.9]], dtype=torch.float64).reshape(3, 2, 1, 1)
A_SQUARE = 0.0625


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mixture(process: Process) -> MixtureDenoiser:
    return MixtureDenoiser(MEANS, 0.04, process=process)


RHO_MIN, SNR = 0.01, 0.2


def geometric(top: float, levels: int) -> list[float]:
    return [RHO_MIN * (top / RHO_MIN) ** (1 - i / (levels - 1)) for i in range(levels)]


@pytest.mark.parametrize("process", [EDMVarianceExploding(), SubVariancePreserving(), Decoupled()], ids=repr)
@pytest.mark.parametrize("corrections", [0, 1, 3])
def test_pc_is_the_published_algorithm(process: Process, corrections: int) -> None:
    """Langevin steps of length 2 (snr |z| / |score|)^2, then reverse diffusion, on y at sigma = rho."""
    exact, noise, n = mixture(EDMVarianceExploding()), NoiseStreams(3, range(3)), 12
    y = MEANS + 3.0 * torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(4)).double()
    x, t = process.from_ratio(y, f64(3.0, 3.0, 3.0))
    solver = SOLVERS["pc"](grid=LogSNR(RHO_MIN), snr=SNR, corrector_steps=corrections)
    actual = solver(mixture(process), x, t, NoiseStreams(3, range(3)), n)
    for rho, below in pairwise([*geometric(3.0, n), 0.0]):
        level = f64(rho, rho, rho)
        for _ in range(corrections):
            score, z = -exact(y, level).eps / rho, noise.normal(y)
            ratio = z.square().sum((1, 2, 3)).sqrt() / score.square().sum((1, 2, 3)).sqrt()
            length = expand(2 * (SNR * ratio) ** 2, y)
            y = y + length * score + (2 * length).sqrt() * z
        removed = rho**2 - below**2
        y = y - removed * exact(y, level).eps / rho
        if below:
            y = y + math.sqrt(removed) * noise.normal(y)
    torch.testing.assert_close(actual, y, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("corrections", [1, 2])
def test_pc_obeys_the_recursion(corrections: int) -> None:
    """Of mean and variance on Gaussian data: 1e5 pixels, whose norms are those of their law to 0.3 %.

    With v the variance of y, E eps^2 = rho^2 v / (a^2 + rho^2)^2 and q^2 = snr^2 / E eps^2.
    """
    top, steps, n = 2.0, 20, 100_000
    data, variance = torch.full((1, 250, 400), 0.3, dtype=torch.float64), A_SQUARE + top**2
    noise = NoiseStreams(0, [0])
    x = data[None] + math.sqrt(variance) * noise.normal(data[None])
    solver = SOLVERS["pc"](grid=LogSNR(RHO_MIN), snr=SNR, corrector_steps=corrections)
    sample = solver(GaussianDenoiser(data, A_SQUARE), x, f64(top), noise, steps)
    for rho, below in pairwise([*geometric(top, steps), 0.0]):
        total, removed = A_SQUARE + rho**2, rho**2 - below**2
        for _ in range(corrections):
            q_square = SNR**2 * total**2 / (rho**2 * variance)
            variance = (1 - 2 * rho**2 * q_square / total) ** 2 * variance + 4 * rho**2 * q_square
        variance = (1 - removed / total) ** 2 * variance + (removed if below else 0)
    assert sample.mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(variance / n))
    assert sample.var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / n))


def test_pc_counts_and_limits() -> None:
    solver = SOLVERS["pc"](corrector_steps=2)
    assert [solver.evaluations(n) for n in (1, 5)] == [3, 15]
    assert [solver.steps_within(n) for n in (3, 5, 6)] == [1, 1, 2]
    process = VariancePreserving()
    x, t = process.from_ratio(MEANS, f64(0.8, 2.0, 5.0))
    plain, none = (
        part(mixture(process), x, t, NoiseStreams(1, range(3)), 6)
        for part in (SOLVERS["reverse_diffusion"](), SOLVERS["pc"](corrector_steps=0))
    )
    assert torch.equal(plain, none)


def test_pc_leaves_a_state_without_score() -> None:
    """At the mean of Gaussian data there is no direction to weigh the noise against."""
    denoiser = GaussianDenoiser(MEANS[0], A_SQUARE)
    state = SOLVERS["pc"]()(denoiser, MEANS[:1], f64(2.0), NoiseStreams(0, [0]), 1)
    torch.testing.assert_close(state, MEANS[:1])


def test_pc_corrects_nothing_at_infinite_ratio() -> None:
    """A lone step is the posterior mean."""
    process, x = Decoupled(), torch.randn(3, 2, 1, 1).double()
    one = SOLVERS["pc"](corrector_steps=2)(mixture(process), x, f64(1, 1, 1), NoiseStreams(0, range(3)), 1)
    torch.testing.assert_close(one, MEANS.mean(0).expand(3, -1, -1, -1))


@pytest.mark.parametrize(
    ("keys", "message"), [({"snr": 0.0}, "must be positive"), ({"corrector_steps": -1}, "0 or more")]
)
def test_bad_settings(keys: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SOLVERS.build({"name": "pc", **keys})
