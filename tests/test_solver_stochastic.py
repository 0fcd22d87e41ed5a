"""Stochastic solvers by exact algebra: a step on Gaussian data is affine in the state and in the noise."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffaccel.denoiser import FiniteSetDenoiser, GaussianDenoiser, MixtureDenoiser
from diffaccel.noise import NoiseStreams
from diffaccel.process import (
    Decoupled,
    EDMVarianceExploding,
    Process,
    SubVariancePreserving,
    VarianceExploding,
    VariancePreserving,
)
from diffaccel.solver import SOLVERS, Karras, LogSNR, Solver, TimeToZero

MEAN, VAR = 0.3, 0.25  # of the data


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gaussian(process: Process, var: float = VAR, mean: float = MEAN) -> GaussianDenoiser:
    return GaussianDenoiser(torch.full((1, 1, 1), mean, dtype=torch.float64), var, process)


class UnitNoise(NoiseStreams):
    """The k-th draw is 1 for sample k + 2 of the batch and 0 for all others: it shows what each draw contributes."""

    def __init__(self, draws: int) -> None:
        super().__init__(0, range(draws + 2))
        self.drawn = 0

    def normal(self, like: Tensor) -> Tensor:
        noise = torch.zeros_like(like)
        noise[self.drawn + 2] = 1
        self.drawn += 1
        return noise


def law(solver: Solver, denoiser: GaussianDenoiser, ratio: float, steps: int, start_var: float) -> tuple[float, float]:
    """Mean and variance of what the solver makes of a state N(alpha m, start_var) at a ratio: exact."""
    process = denoiser.process
    t = process.time(f64(ratio))
    x = (process.alpha(t) * denoiser.means.item()).expand(steps + 2).clone()
    x[1] += math.sqrt(start_var)
    y = solver(denoiser, x.reshape(-1, 1, 1, 1), t.expand(steps + 2), UnitNoise(steps), steps).flatten()
    return y[0].item(), (y[1:] - y[0]).square().sum().item()


# The decoupled process with DDM's grid, from t = 1: deviation of samples of N(.3, .25) after N + 1 evaluations.

DDM_TABLE = {
    1: (0.01000, 0.01000),
    2: (0.15752, 0.16596),
    5: (0.30101, 0.31568),
    10: (0.36884, 0.38875),
    20: (0.41462, 0.43536),
    50: (0.45319, 0.46987),
    100: (0.47115, 0.48353),
    1000: (0.49511, 0.49801),
}


@pytest.mark.parametrize("n", DDM_TABLE)
@pytest.mark.parametrize("eta", [1.0, 0.0])
def test_ddm_table(n: int, eta: float) -> None:
    solver = SOLVERS["ddim"](grid=TimeToZero(), eta=eta)
    mean, variance = law(solver, gaussian(Decoupled()), math.inf, n + 1, 1.0)
    assert mean == pytest.approx(MEAN, abs=1e-9)
    assert math.sqrt(variance) == pytest.approx(DDM_TABLE[n][eta == 0], abs=5.1e-6)


@pytest.mark.parametrize(("eta", "deviation"), [(1.0, 0.83877), (0.0, 0.86829)])
def test_ddm_on_unit_variance(eta: float, deviation: float) -> None:
    solver = SOLVERS["ddim"](grid=TimeToZero(), eta=eta)
    _, variance = law(solver, gaussian(Decoupled(), var=1.0), math.inf, 11, 1.0)
    assert math.sqrt(variance) == pytest.approx(deviation, abs=5.1e-6)


@pytest.mark.parametrize("process", [Decoupled(), VariancePreserving(), EDMVarianceExploding()], ids=repr)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_single_data_point_is_returned(process: Process, eta: float, steps: int) -> None:
    """With the true x_0 known every step keeps the marginals, so the path ends at the data."""
    point = torch.rand(1, 2, 3, 3).double()
    x = torch.randn(2, 2, 3, 3).double()
    result = SOLVERS["ddim"](eta=eta)(
        FiniteSetDenoiser(point, process), x, process.time(f64(0.5, 20.0)), NoiseStreams(0, [0, 1]), steps
    )
    torch.testing.assert_close(result, point.expand(2, -1, -1, -1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 5, 40])
def test_ancestral_sampling_under_disperses(steps: int) -> None:
    """Its variance approaches the data's from below as steps grow."""
    _, coarse = law(SOLVERS["ddim"](eta=1.0), gaussian(VariancePreserving()), 50.0, steps, 1.0)
    _, fine = law(SOLVERS["ddim"](eta=1.0), gaussian(VariancePreserving()), 50.0, 4 * steps, 1.0)
    assert coarse < fine < VAR + 1e-4


# Recursions of the variance of y = x / alpha, from the formulas as published: start level, levels, variance there.

A_SQUARE = 0.0625
RHO_MIN = 0.01


def geometric(top: float, levels: int) -> list[float]:
    return [RHO_MIN * (top / RHO_MIN) ** (1 - i / (levels - 1)) for i in range(levels)]


def karras(top: float, levels: int) -> list[float]:
    a, b = top ** (1 / 7), RHO_MIN ** (1 / 7)
    return [(a + i / (levels - 1) * (b - a)) ** 7 for i in range(levels)]


def score(rho: float) -> float:
    """Factor of -(y - m) in the exact score."""
    return 1 / (A_SQUARE + rho**2)


def reverse_diffusion(top: float, n: int, variance: float) -> float:
    for rho, below in pairwise([*geometric(top, n), 0.0]):
        d = rho**2 - below**2
        variance = (1 - d * score(rho)) ** 2 * variance + (d if below else 0)
    return variance


def euler_maruyama(top: float, n: int, variance: float) -> float:
    levels = geometric(top, n)
    for i, rho in enumerate(levels):
        g_square = 2 * rho**2 * math.log(top / RHO_MIN)
        variance = (1 - g_square / n * score(rho)) ** 2 * variance + (g_square / n if i < n - 1 else 0)
    return variance


def edm_stochastic(top: float, n: int, variance: float) -> float:
    for rho, below in pairwise([*karras(top, n), 0.0]):
        raised = rho * (1 + (min(4 / n, math.sqrt(2) - 1) if 0.05 <= rho <= 1 else 0))
        variance += 1.007**2 * (raised**2 - rho**2)
        factor = 1 + (below - raised) * raised * score(raised)
        if below:
            factor = 1 + (below - raised) / 2 * (raised * score(raised) + below * score(below) * factor)
        variance *= factor**2
    return variance


def probability_flow(top: float, n: int, variance: float) -> float:
    for rho, below in pairwise([*geometric(top, n), 0.0]):
        variance *= (1 - (rho**2 - below**2) / 2 * score(rho)) ** 2
    return variance


def ddim(top: float, n: int, variance: float, eta: float = 0.5) -> float:
    for rho, below in pairwise([*karras(top, n), 0.0]):
        c_square = eta**2 * below**2 * (1 - below**2 / rho**2)
        data, eps = A_SQUARE * score(rho), rho * score(rho)
        variance = (data + math.sqrt(below**2 - c_square) * eps) ** 2 * variance + c_square
    return variance


CHURN = {"S_churn": 4.0, "S_min": 0.05, "S_max": 1.0, "S_noise": 1.007, "grid": Karras(RHO_MIN)}
RECURSIONS: list[tuple[str, dict[str, object], Callable[[float, int, float], float]]] = [
    ("reverse_diffusion", {"grid": LogSNR(RHO_MIN)}, reverse_diffusion),
    ("euler_maruyama", {"grid": LogSNR(RHO_MIN)}, euler_maruyama),
    ("edm_stochastic", CHURN, edm_stochastic),
    ("probability_flow", {"grid": LogSNR(RHO_MIN)}, probability_flow),
    ("ddim", {"eta": 0.5, "grid": Karras(RHO_MIN)}, ddim),
]
MARKOV = [EDMVarianceExploding(), VarianceExploding(0.005), VariancePreserving(), SubVariancePreserving()]


@pytest.mark.parametrize(
    ("name", "keys", "recursion", "process"),
    # A DDIM step on the decoupled process has a joint law of its own: the table of DDM.
    [(*row, p) for row in RECURSIONS for p in (*MARKOV, Decoupled()) if row[0] != "ddim" or p in MARKOV],
)
@pytest.mark.parametrize(("top", "steps"), [(0.7, 5), (4.0, 20), (50.0, 60)])
def test_mean_and_variance_recursions(
    name: str,
    keys: dict[str, object],
    recursion: Callable[[float, int, float], float],
    process: Process,
    top: float,
    steps: int,
) -> None:
    alpha = process.alpha(process.time(f64(top))).item()
    start = A_SQUARE + top**2
    mean, variance = law(SOLVERS[name](**keys), gaussian(process, A_SQUARE), top, steps, alpha**2 * start)
    assert mean == pytest.approx(MEAN, abs=1e-9)
    assert variance == pytest.approx(recursion(top, steps, start), rel=1e-8)


@pytest.mark.parametrize(("top", "total"), [(1.0, 1.037), (50.0, 2694.0)])
def test_euler_maruyama_overshoots_like_the_reference(top: float, total: float) -> None:
    """The removed variance sum G_i^2 / N at N = 100, which would be top^2: its levels lie 1 / (N - 1) apart."""
    removed = sum(2 * rho**2 * math.log(top / RHO_MIN) / 100 for rho in geometric(top, 100))
    assert removed == pytest.approx(total, rel=5e-4)


def test_euler_maruyama_without_the_quirk() -> None:
    """``denoise=False``: N steps h apart, each of length h, all with noise."""
    top, n = 4.0, 25
    variance, h = A_SQUARE + top**2, math.log(top / RHO_MIN) / n
    expected = variance
    for i in range(n):
        rho = top * math.exp(-i * h)
        expected = (1 - 2 * h * rho**2 * score(rho)) ** 2 * expected + 2 * h * rho**2
    solver = SOLVERS["euler_maruyama"](grid=LogSNR(RHO_MIN), denoise=False)
    _, actual = law(solver, gaussian(EDMVarianceExploding(), A_SQUARE), top, n, variance)
    assert actual == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("name", "keys", "recursion"), RECURSIONS[:3], ids=[name for name, _, _ in RECURSIONS[:3]])
def test_samples_obey_the_recursions(
    name: str, keys: dict[str, object], recursion: Callable[[float, int, float], float]
) -> None:
    """1e5 independent pixels through the real noise streams."""
    top, steps, n = 2.0, 20, 100_000
    data = torch.full((1, 250, 400), MEAN, dtype=torch.float64)
    noise = NoiseStreams(0, [0])
    x = data[None] + math.sqrt(A_SQUARE + top**2) * noise.normal(data[None])
    sample = SOLVERS[name](**keys)(GaussianDenoiser(data, A_SQUARE), x, f64(top), noise, steps)
    expected = recursion(top, steps, A_SQUARE + top**2)
    assert sample.mean().item() == pytest.approx(MEAN, abs=4 * math.sqrt(expected / n))
    assert sample.var().item() == pytest.approx(expected, rel=4 * math.sqrt(2 / n))


# The published algorithms written out on y at sigma = rho, path by path on the same noise.

MEANS = torch.randn(4, 2, 2, 2, generator=torch.Generator().manual_seed(1)).double()


def reverse_diffusion_path(s: Callable[[Tensor, float], Tensor], y: Tensor, z: Callable[[], Tensor], n: int) -> Tensor:
    g = [0.0, *reversed(geometric(3.0, n))]
    for j in range(n, 0, -1):
        d = g[j] ** 2 - g[j - 1] ** 2
        m = y + d * s(y, g[j])
        y = m + math.sqrt(d) * z() if j > 1 else m
    return m


def euler_maruyama_path(s: Callable[[Tensor, float], Tensor], y: Tensor, z: Callable[[], Tensor], n: int) -> Tensor:
    ln_r = math.log(3.0 / RHO_MIN)
    for i in range(n):
        sigma = RHO_MIN * math.exp(ln_r * (1 - i / (n - 1)))
        g = sigma * math.sqrt(2 * ln_r)
        m = y + g**2 / n * s(y, sigma)
        y = m + g / math.sqrt(n) * z() if i < n - 1 else m
    return m


def edm_path(s: Callable[[Tensor, float], Tensor], x: Tensor, z: Callable[[], Tensor], n: int) -> Tensor:
    """EDM's Algorithm 2."""
    t = [*karras(3.0, n), 0.0]
    for i in range(n):
        gamma = min(4 / n, math.sqrt(2) - 1) if 0.05 <= t[i] <= 1.0 else 0.0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * 1.007 * z()
        d = -t_hat * s(x_hat, t_hat)
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_next = -t[i + 1] * s(x, t[i + 1])
            x = x_hat + (t[i + 1] - t_hat) * (0.5 * d + 0.5 * d_next)
    return x


@pytest.mark.parametrize(
    ("name", "keys", "path"),
    [
        ("reverse_diffusion", {"grid": LogSNR(RHO_MIN)}, reverse_diffusion_path),
        ("euler_maruyama", {"grid": LogSNR(RHO_MIN)}, euler_maruyama_path),
        ("edm_stochastic", CHURN, edm_path),
    ],
    ids=["reverse_diffusion", "euler_maruyama", "edm_stochastic"],
)
@pytest.mark.parametrize("process", [EDMVarianceExploding(), VariancePreserving(), Decoupled()], ids=repr)
def test_paths_are_the_published_algorithms(
    name: str, keys: dict[str, object], path: Callable[..., Tensor], process: Process
) -> None:
    y = MEANS + 3.0 * torch.randn(4, 2, 2, 2).double()
    ve = MixtureDenoiser(MEANS, 0.1)

    def exact_score(y: Tensor, rho: float) -> Tensor:
        return -ve(y, torch.full((4,), rho).double()).eps / rho

    noise = NoiseStreams(3, range(4))
    expected = path(exact_score, y, lambda: noise.normal(y), 12)
    x, t = process.from_ratio(y, torch.full((4,), 3.0).double())
    actual = SOLVERS[name](**keys)(MixtureDenoiser(MEANS, 0.1, process=process), x, t, NoiseStreams(3, range(4)), 12)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
