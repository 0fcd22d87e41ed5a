"""Deterministic solvers against exact solutions: orders of convergence, published error figures, scipy."""

import math
from itertools import pairwise

import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from diffaccel.denoiser import Denoiser, GaussianDenoiser, MixtureDenoiser
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams
from diffaccel.process import (
    Decoupled,
    EDMVarianceExploding,
    Prediction,
    Process,
    VarianceExploding,
    VariancePreserving,
    expand,
)
from diffaccel.solver import SOLVERS, Grid, Karras, LogSNR, Past, Solver, Trajectory
from diffaccel.solver.adaptive import RK45, dormand_prince
from diffaccel.solver.onestep import DDIM, Heun

PROCESSES = [VariancePreserving(), VarianceExploding(), Decoupled()]
MEANS = torch.tensor([[-1.0, 0.5], [0.8, 0.6], [0.1, -0.9]], dtype=torch.float64).reshape(3, 2, 1, 1)
VAR = 0.04


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


STARTS = f64(0.8, 2.0, 5.0)
NOISE = NoiseStreams(0, range(3))


def mixture(process: Process) -> MixtureDenoiser:
    return MixtureDenoiser(MEANS, VAR, process=process)


def flow(y: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """Exact probability flow of the mixture from ratios ``start`` to ``stop``, both (3,)."""
    denoiser = mixture(EDMVarianceExploding())

    def slope(index: Tensor, u: Tensor, y: Tensor) -> Tensor:
        length = (stop - start)[index]
        return expand(length, y) * denoiser(y, start[index] + u * length).eps

    return dormand_prince(slope, y, 0.0, 1.0, 1e-10, 5000)


STOP = 0.3
START_STATE = MEANS + 0.9 * expand(STARTS, MEANS) * MEANS.flip(0)
EXACT = flow(START_STATE, STARTS, torch.full_like(STARTS, STOP))


def error_at_stop(solver: Solver, process: Process, steps: int) -> Tensor:
    """Largest error of y of each of the mixed start levels."""
    x_t, t = process.from_ratio(START_STATE, STARTS)
    result = solver(mixture(process), x_t, t, NOISE, steps)
    stop = process.time(torch.full_like(STARTS, STOP))
    return (result / expand(process.alpha(stop), result) - EXACT).abs().flatten(1).amax(1)


def measured_order(coarse: Tensor, fine: Tensor) -> Tensor:
    return torch.log2(coarse / fine)


def test_the_reference_solution_is_scipys() -> None:
    ve = EDMVarianceExploding()
    for i, top in enumerate(STARTS.tolist()):

        def slope(rho: float, y: object) -> object:
            state = torch.as_tensor(y).reshape(1, 2, 1, 1)
            return mixture(ve)(state, f64(rho)).eps.flatten().numpy()

        solution = solve_ivp(slope, (top, STOP), START_STATE[i].flatten().numpy(), "DOP853", rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(EXACT[i].flatten(), torch.as_tensor(solution.y[:, -1]), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("grid", [Karras(STOP), LogSNR(STOP)], ids=["karras", "log_snr"])
@pytest.mark.parametrize(
    ("name", "order"), [("ddim", 1), ("euler", 1), ("probability_flow", 1), ("heun", 2), ("dpmpp2m", 2)]
)
def test_converges_at_its_order(name: str, order: int, grid: Grid, process: Process) -> None:
    """From mixed start levels, start-up included."""
    solver = SOLVERS[name](grid=grid, denoise=False)
    order_of_each = measured_order(error_at_stop(solver, process, 30), error_at_stop(solver, process, 60))
    assert ((order_of_each - order).abs() < 0.25).all(), order_of_each


# Gaussian data N(m, a^2), where y(rho) = m + (y(rho_0) - m) sqrt((a^2 + rho^2) / (a^2 + rho_0^2)).

A_SQUARE, MEAN = 0.0625, torch.tensor([0.3, -0.2, 0.1, 0.5, 0.0], dtype=torch.float64).reshape(5, 1, 1)
DEVIATION = torch.linspace(-1.9, 1.9, 5, dtype=torch.float64).reshape(1, 5, 1, 1)


def gaussian_state(rho: Tensor) -> Tensor:
    """y at ratios (B,) of the trajectories that are ``DEVIATION`` standard deviations off the mean."""
    return MEAN + expand((A_SQUARE + rho**2).sqrt(), DEVIATION) * DEVIATION


def error_on_equal_steps(solver: Solver, process: Process, steps: int, exact_start: bool) -> Tensor:
    """Largest error of y of each start level, on levels uniform in rho."""
    start = f64(0.8, 1.2, 2.0)
    rho = start + torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:, None] * (STOP - start)
    times, denoiser = process.time(rho), GaussianDenoiser(MEAN, A_SQUARE, process)
    states = [process.from_ratio(gaussian_state(row), row)[0] for row in rho]
    trajectory, first = Trajectory(NOISE, steps), 3 if exact_start else 0
    trajectory.past = [Past(denoiser(states[i], times[i]), times[i]) for i in reversed(range(first))]
    x = states[first]
    for t, s in list(pairwise(times))[first:]:
        x = solver.step(denoiser, x, t, s, trajectory)
    return ((x - states[-1]) / expand(process.alpha(times[-1]), x)).abs().flatten(1).amax(1)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize(
    ("name", "keys", "exact_start", "order"),
    [
        ("dpmpp2m", {}, True, 2),
        ("dpmpp2m", {}, False, 2),
        *[("ipndm", {"max_order": order}, True, order) for order in (1, 2, 3, 4)],
        ("ipndm", {"max_order": 2}, False, 2),
    ],
)
def test_multistep_order_on_equal_steps(
    name: str, keys: dict[str, int], exact_start: bool, order: int, process: Process
) -> None:
    """With the start-up out of the way, from the exact predictions of the first levels, and with their own."""
    solver = SOLVERS[name](denoise=False, **keys)
    coarse, fine = (error_on_equal_steps(solver, process, steps, exact_start) for steps in (60, 120))
    assert ((measured_order(coarse, fine) - order).abs() < 0.3).all(), measured_order(coarse, fine)


def test_ipndm_own_start_up_is_of_second_order() -> None:
    solver = SOLVERS["ipndm"](denoise=False)
    coarse, fine = (error_on_equal_steps(solver, EDMVarianceExploding(), steps, False)[0] for steps in (200, 400))
    assert measured_order(coarse, fine).item() == pytest.approx(2, abs=0.2)


def test_dpmpp2m_is_its_algorithm_2() -> None:
    """D = (1 + 1/(2r)) x_0 - 1/(2r) x_0_last, x_s = sigma_s / sigma_t x_t - alpha_s (e^-h - 1) D, as the paper says."""
    process, steps = VariancePreserving(), 7
    denoiser = mixture(process)
    grid = Karras(0.05)  # unequal steps: h and h_last are told apart
    x, t = process.from_ratio(START_STATE, STARTS)
    expected, last, last_h = x, None, None
    times = grid(process, t, steps)
    for i, (now, then) in enumerate(pairwise(times)):
        x_0 = denoiser(expected, now).x_0
        if i == steps - 1:
            expected = x_0
            break
        h = process.ratio(now).log() - process.ratio(then).log()
        d = x_0
        if last is not None and last_h is not None:
            r = expand(last_h / h, x)
            d = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * last
        scale, weight = process.sigma(then) / process.sigma(now), -process.alpha(then) * torch.expm1(-h)
        expected = expand(scale, x) * expected + expand(weight, x) * d
        last, last_h = x_0, h
    actual = SOLVERS["dpmpp2m"](grid=grid, lower_order_final=False)(denoiser, x, t, NOISE, steps)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_equal_names_for_equal_steps() -> None:
    process = VariancePreserving()
    x, t = process.from_ratio(START_STATE, STARTS)
    ddim = SOLVERS["ddim"]()(mixture(process), x, t, NOISE, 9)
    for name, keys in (("euler", {}), ("ipndm", {"max_order": 1})):
        torch.testing.assert_close(SOLVERS[name](**keys)(mixture(process), x, t, NOISE, 9), ddim, rtol=0, atol=1e-12)
    heun = SOLVERS["heun"]()(mixture(process), x, t, NOISE, 9)
    churnless = SOLVERS["edm_stochastic"](S_churn=0.0)(mixture(process), x, t, NOISE, 9)
    torch.testing.assert_close(churnless, heun, rtol=0, atol=1e-12)


# The published figures of DLG's integrators, at most 1.9 standard deviations off the mean.

LEVELS = f64(0.7, 1.0, 2.0, 4.0)


def gaussian_error(solver: Solver, steps: int, stop: float) -> float:
    denoiser = GaussianDenoiser(MEAN, A_SQUARE)
    result = solver(denoiser, gaussian_state(LEVELS), LEVELS, NoiseStreams(0, range(4)), steps)
    return (result - gaussian_state(torch.full_like(LEVELS, stop))).abs().max().item()


@pytest.mark.parametrize(("levels", "error"), [(7, 0.06), (19, 0.006), (59, 0.0002)])
def test_heun_error(levels: int, error: float) -> None:
    assert gaussian_error(Heun(Karras(0.01)), levels, 0.0) == pytest.approx(error, rel=0.1)


@pytest.mark.parametrize(("steps", "error"), [(50, 0.07), (200, 0.017)])
def test_probability_flow_error(steps: int, error: float) -> None:
    assert gaussian_error(SOLVERS["probability_flow"](LogSNR(0.01)), steps, 0.0) == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize(("tol", "bound"), [(1e-3, 1e-3), (1e-4, 1e-4), (1e-5, 4e-6)])
def test_rk45_error(tol: float, bound: float) -> None:
    error = gaussian_error(RK45(LogSNR(0.01), tol=tol), 0, 0.01)
    assert bound / 20 < error < bound


# The adaptive solver


class Counting(Denoiser):
    """Counts evaluations of each sample of a batch."""

    def __init__(self, denoiser: Denoiser, counts: Tensor, index: Tensor) -> None:
        super().__init__()
        self.process, self.ratio_range = denoiser.process, denoiser.ratio_range
        self.denoiser, self.counts, self.index = denoiser, counts, index

    def select(self, index: Tensor) -> Denoiser:
        return Counting(self.denoiser, self.counts, self.index[index])

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Prediction:
        self.counts[self.index] += 1
        return self.denoiser(x_t, t)


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("data", ["gaussian", "mixture"])
def test_rk45_is_scipys_on_each_sample(data: str, tol: float) -> None:
    """Same states and the same number of evaluations as solve_ivp run on each sample alone."""
    ve = EDMVarianceExploding()
    denoiser = GaussianDenoiser(MEAN, A_SQUARE) if data == "gaussian" else mixture(ve)
    y, levels = (gaussian_state(LEVELS), LEVELS) if data == "gaussian" else (START_STATE, STARTS)
    counts = torch.zeros(len(y), dtype=torch.long)
    counting = Counting(denoiser, counts, torch.arange(len(y)))
    result = RK45(LogSNR(0.01), tol=tol)(counting, y, levels, NoiseStreams(0, range(len(y))))
    for i, level in enumerate(levels.tolist()):
        ln_r = math.log(level / 0.01)

        def slope(u: float, state: object, i: int = i, ln_r: float = ln_r) -> object:
            rho = f64(0.01 * math.exp(u * ln_r))
            return (ln_r * rho * denoiser(torch.as_tensor(state).reshape_as(y[i : i + 1]), rho).eps).flatten().numpy()

        alone = solve_ivp(slope, (1.0, 0.0), y[i].flatten().numpy(), "RK45", rtol=tol, atol=tol)
        assert counts[i].item() == alone.nfev
        assert (counts[i].item() - 2) % 6 == 0
        torch.testing.assert_close(result[i].flatten(), torch.as_tensor(alone.y[:, -1]), rtol=1e-9, atol=1e-9)


def test_rk45_rejects_steps() -> None:
    """A slope that jumps: rejected steps cost 6 evaluations each, and the order of the samples doesn't matter."""
    calls = torch.zeros(2, dtype=torch.long)

    def slope(index: Tensor, u: Tensor, y: Tensor) -> Tensor:
        calls[index] += 1
        return torch.where(index == 0, 1 / ((u - 0.5) ** 2 + 1e-4), torch.ones_like(u))[:, None] + 0 * y

    y = dormand_prince(slope, torch.zeros(2, 1).double(), 0.0, 1.0, 1e-6, 1000)
    assert y[0].item() == pytest.approx(2 * math.atan(0.5 / 0.01) / 0.01, rel=1e-5)
    assert y[1].item() == pytest.approx(1.0, abs=1e-12)
    single = solve_ivp(lambda u, y: [1 / ((u - 0.5) ** 2 + 1e-4)], (0.0, 1.0), [0.0], "RK45", rtol=1e-6, atol=1e-6)
    assert calls[0].item() == single.nfev > 6 * (len(single.t) - 1) + 2
    assert calls[1].item() < 40


def test_rk45_gives_up() -> None:
    denoiser = mixture(EDMVarianceExploding())
    with pytest.raises(UsageError, match="in 3 steps: raise tol"):
        RK45(tol=1e-9, max_steps=3)(denoiser, START_STATE, STARTS, NOISE)


def test_rk45_denoises_if_asked() -> None:
    denoiser = mixture(EDMVarianceExploding())
    state = RK45(LogSNR(0.05), tol=1e-6)(denoiser, START_STATE, STARTS, NOISE)
    clean = RK45(LogSNR(0.05), tol=1e-6, denoise=True)(denoiser, START_STATE, STARTS, NOISE)
    torch.testing.assert_close(clean, denoiser(state, torch.full_like(STARTS, 0.05)).x_0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("x", [0.0, 1.0])
def test_probability_flow_of_the_decoupled_process(x: float) -> None:
    """Data N(.3, .25): the flow from t = 1 maps x to .3 + .5 x."""
    denoiser = GaussianDenoiser(torch.full((1, 1, 1), 0.3, dtype=torch.float64), 0.25, Decoupled())
    state, t = torch.full((1, 1, 1, 1), x, dtype=torch.float64), f64(1.0)
    adaptive = RK45(tol=1e-6, denoise=True)(denoiser, state, t, NoiseStreams(0, [0]))
    assert adaptive.item() == pytest.approx(0.3 + 0.5 * x, abs=1e-4)
    fine = DDIM(LogSNR(0.01))(denoiser, state, t, NoiseStreams(0, [0]), 1000)
    assert fine.item() == pytest.approx(0.3 + 0.5 * x, abs=3e-3)
