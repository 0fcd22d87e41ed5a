"""High-order solvers and the quadratic grid against exact flows and the published formulas."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffaccel.denoiser import Denoiser, GaussianDenoiser, MixtureDenoiser
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams
from diffaccel.process import (
    Decoupled,
    EDMVarianceExploding,
    Process,
    VarianceExploding,
    VariancePreserving,
    expand,
)
from diffaccel.solver import SOLVERS, Karras, Past, Quadratic, Solver, Trajectory
from diffaccel.solver.adaptive import dormand_prince
from diffaccel.solver.exponential import correction_weights, data_moments

PROCESSES = [VariancePreserving(), VarianceExploding(), Decoupled()]
MEANS = torch.tensor([[-1.0, 0.5], [0.8, 0.6], [0.1, -0.9]], dtype=torch.float64).reshape(3, 2, 1, 1)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


STARTS, STOP = f64(0.8, 2.0, 5.0), 0.3
PARABOLA = {"D2": "parabola", "lower_order_final": False}
FULL = {"variant": "bh2", "lower_order_final": False}  # the authors' defaults: test_solver_published.py
NOISE = NoiseStreams(0, range(3))
START_STATE = MEANS + 0.9 * expand(STARTS, MEANS) * MEANS.flip(0)


def mixture(process: Process) -> MixtureDenoiser:
    return MixtureDenoiser(MEANS, 0.04, process=process)


def flow(y: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """Exact probability flow of the mixture from ratios ``start`` to ``stop``, both (3,)."""
    denoiser = mixture(EDMVarianceExploding())

    def slope(index: Tensor, u: Tensor, y: Tensor) -> Tensor:
        length = (stop - start)[index]
        return expand(length, y) * denoiser(y, start[index] + u * length).eps

    return dormand_prince(slope, y, 0.0, 1.0, 1e-11, 5000)


def measured_order(coarse: Tensor, fine: Tensor) -> Tensor:
    return torch.log2(coarse / fine)


# Orders with their own start-up, on a mixture.

EXACT = flow(START_STATE, STARTS, torch.full_like(STARTS, STOP))


def error_at_stop(solver: Solver, process: Process, steps: int) -> Tensor:
    """Error of y of each of the mixed start levels."""
    x_t, t = process.from_ratio(START_STATE, STARTS)
    result = solver(mixture(process), x_t, t, NOISE, steps)
    stop = process.time(torch.full_like(STARTS, STOP))
    return (result / expand(process.alpha(stop), result) - EXACT).flatten(1).norm(dim=1)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize(
    ("name", "keys", "order"),
    [
        ("dpm2", {}, 2),
        ("dpmpp3m", PARABOLA, 2),
        ("unipc2", FULL, 3),
        ("unipc3", FULL, 3),
        *[("deis", {"max_order": order, "mode": "rhoab"}, min(order, 2)) for order in (1, 2, 3, 4)],
    ],
)
def test_converges_at_its_order(name: str, keys: dict[str, object], order: int, process: Process) -> None:
    """From mixed levels, start-up included, whose share of the error is largest at the lowest start."""
    solver = SOLVERS[name](grid=Karras(STOP), denoise=False, **keys)
    order_of_each = measured_order(*(error_at_stop(solver, process, steps) for steps in (60, 120)))
    assert order_of_each[0].item() == pytest.approx(order, abs=0.15)
    assert (order_of_each > order - 0.2).all(), order_of_each


# Orders given exact starting values.

A_SQUARE, MEAN = 0.0625, torch.tensor([0.3, -0.2, 0.1, 0.5, 0.0], dtype=torch.float64).reshape(5, 1, 1)
DEVIATION = torch.linspace(-1.9, 1.9, 5, dtype=torch.float64).reshape(1, 5, 1, 1)


def gaussian_state(rho: Tensor) -> Tensor:
    """y at ratios (B,) of the trajectories that are ``DEVIATION`` standard deviations off the mean."""
    return MEAN + expand((A_SQUARE + rho**2).sqrt(), DEVIATION) * DEVIATION


def error_from_exact_start(solver: Solver, process: Process, steps: int) -> Tensor:
    """Error of y at ``STOP``, of each start level, where the first four states and three predictions are exact."""
    times = solver.grid(process, process.time(STARTS), steps, denoise=False)
    rho = process.ratio(times)
    denoiser = GaussianDenoiser(MEAN, A_SQUARE, process)
    states = [process.from_ratio(gaussian_state(row), row)[0] for row in rho]
    trajectory = Trajectory(NOISE, steps)
    trajectory.past = [Past(denoiser(states[i], times[i]), times[i]) for i in (2, 1, 0)]
    x = states[3]
    for t, s in list(pairwise(times))[3:]:
        x = solver.step(denoiser, x, t, s, trajectory)
    return ((x - states[-1]) / expand(process.alpha(times[-1]), x)).flatten(1).norm(dim=1)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize(
    ("name", "keys", "order"),
    [
        ("dpmpp3m", PARABOLA, 3),
        ("unipc2", FULL, 3),
        ("unipc3", FULL, 4),
        *[("deis", {"max_order": order, "mode": "rhoab"}, order) for order in (1, 2, 3, 4)],
    ],
)
def test_order_given_exact_starting_values(name: str, keys: dict[str, object], order: int, process: Process) -> None:
    """On unequal steps. UniPC's corrector lifts both members by one order."""
    solver = SOLVERS[name](grid=Karras(STOP), denoise=False, **keys)
    order_of_each = measured_order(*(error_from_exact_start(solver, process, steps) for steps in (60, 120)))
    assert order_of_each[0].item() == pytest.approx(order, abs=0.2)
    # UniPC-2's two leading errors have opposite signs: from the higher starts it falls faster until steps are tiny.
    assert ((order_of_each - order).abs() < (0.65 if name == "unipc2" else 0.25)).all(), order_of_each


# The published algorithms written out on x, path by path.


def lambdas(process: Process, times: Tensor) -> Tensor:
    return process.alpha(times).log() - process.sigma(times).log()


def dpm2_path(denoiser: Denoiser, x: Tensor, times: Tensor) -> Tensor:
    """DPM-Solver's Algorithm 1: u = a_m / a_t x - s_m (e^(h/2) - 1) eps, x_s = a_s / a_t x - s_s (e^h - 1) eps(u)."""
    process = denoiser.process
    alpha, sigma, lam = process.alpha, process.sigma, lambdas(process, times)
    for i, (t, s) in enumerate(pairwise(times[:-1])):
        h = lam[i + 1] - lam[i]
        middle = process.time((-(lam[i] + lam[i + 1]) / 2).exp())
        u = expand(alpha(middle) / alpha(t), x) * x
        u = u - expand(sigma(middle) * torch.expm1(h / 2), x) * denoiser(x, t).eps
        x = expand(alpha(s) / alpha(t), x) * x - expand(sigma(s) * torch.expm1(h), x) * denoiser(u, middle).eps
    return denoiser(x, times[-2]).x_0


def dpmpp3m_path(denoiser: Denoiser, x: Tensor, times: Tensor) -> Tensor:
    """DPM-Solver++'s multistep update of third order, with the D_2 that makes it so; the authors' code halves it."""
    process = denoiser.process
    alpha, sigma, lam = process.alpha, process.sigma, lambdas(process, times)
    m: list[Tensor] = []
    for i, (t, s) in enumerate(pairwise(times[:-1])):
        m.append(denoiser(x, t).x_0)
        h = lam[i + 1] - lam[i]
        phi_1 = torch.expm1(-h)
        phi_2 = phi_1 / h + 1
        phi_3 = phi_2 / h - 0.5
        x = expand(sigma(s) / sigma(t), x) * x - expand(alpha(s) * phi_1, x) * m[-1]
        if i > 0:
            r_0 = (lam[i] - lam[i - 1]) / h
            d_10 = expand(1 / r_0, x) * (m[-1] - m[-2])
        if i == 1:
            x = x - expand(0.5 * alpha(s) * phi_1, x) * d_10
        if i > 1:
            r_1 = (lam[i - 1] - lam[i - 2]) / h
            d_11 = expand(1 / r_1, x) * (m[-2] - m[-3])
            d_1 = d_10 + expand(r_0 / (r_0 + r_1), x) * (d_10 - d_11)
            d_2 = expand(2 / (r_0 + r_1), x) * (d_10 - d_11)
            x = x + expand(alpha(s) * phi_2, x) * d_1 - expand(alpha(s) * phi_3, x) * d_2
    return denoiser(x, times[-2]).x_0


def unipc_path(denoiser: Denoiser, x: Tensor, times: Tensor, order: int) -> Tensor:
    """UniPC of one sample: its systems R rho = b / B_2(h), state by state as published."""
    process = denoiser.process
    alpha, sigma, lam = process.alpha(times), process.sigma(times), lambdas(process, times)
    m = [denoiser(x, times[0]).x_0]
    for i in range(1, len(times) - 1):
        p = min(order, i)
        h = lam[i] - lam[i - 1]
        r = torch.cat([(lam[i - 1 - k] - lam[i - 1]) / h for k in range(1, p)] + [torch.ones(1).double()])
        d_1 = [(m[i - 1 - k] - m[i - 1]) / r[k - 1] for k in range(1, p)]
        b_2 = torch.expm1(-h)
        phi, b = b_2 / -h, []  # phi_1(-h)
        for n in range(1, p + 1):
            phi = (phi - 1 / math.factorial(n)) / -h  # phi_(n + 1)
            b.append(phi * -h * math.factorial(n) / b_2)
        big_r, rhs = torch.stack([r**n for n in range(p)]), torch.cat(b)
        rho_p = f64(0.5) if p == 2 else torch.linalg.solve(big_r[:-1, :-1], rhs[:-1])
        rho_c = f64(0.5) if p == 1 else torch.linalg.solve(big_r, rhs)
        base = sigma[i] / sigma[i - 1] * x - alpha[i] * b_2 * m[-1]
        guess = base - alpha[i] * b_2 * sum(w * d for w, d in zip(rho_p, d_1, strict=True))
        m.append(denoiser(guess, times[i]).x_0)
        d_t = m[-1] - m[-2]
        x = base - alpha[i] * b_2 * sum(w * d for w, d in zip(rho_c, [*d_1, d_t], strict=True))
    return m[-1]


def deis_path(denoiser: Denoiser, x: Tensor, times: Tensor, order: int) -> Tensor:
    """One sample: Lagrange's basis in rho, integrated by Gauss's rule."""
    process, rho = denoiser.process, denoiser.process.ratio(times)[:, 0]
    points, weights = f64(-math.sqrt(0.6), 0.0, math.sqrt(0.6)), f64(5 / 9, 8 / 9, 5 / 9)
    y, eps = x / process.alpha(times[0]), list[Tensor]()
    for i in range(len(times) - 2):
        eps.append(denoiser(process.alpha(times[i]) * y, times[i]).eps)
        half = (rho[i + 1] - rho[i]) / 2
        past, at = list(range(i, max(i - order, -1), -1)), (rho[i] + rho[i + 1]) / 2 + half * points
        for k in past:
            basis = torch.stack([(at - rho[j]) / (rho[k] - rho[j]) for j in past if j != k] or [torch.ones(3)]).prod(0)
            y = y + half * (weights * basis).sum() * eps[k]
    return denoiser(process.alpha(times[-2]) * y, times[-2]).x_0


def each(path: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Run a path of one sample on each of a batch."""

    def run(denoiser: Denoiser, x: Tensor, times: Tensor, **keys: int) -> Tensor:
        return torch.cat([path(denoiser, x[i : i + 1], times[:, i : i + 1], **keys) for i in range(len(x))])

    return run


@pytest.mark.parametrize("process", [VariancePreserving(), EDMVarianceExploding(), Decoupled()], ids=repr)
@pytest.mark.parametrize(
    ("name", "path", "keys"),
    [
        ("dpm2", dpm2_path, {}),
        ("dpmpp3m", dpmpp3m_path, {}),
        ("unipc2", each(unipc_path), {"order": 2}),
        ("unipc3", each(unipc_path), {"order": 3}),
        *[("deis", each(deis_path), {"order": order}) for order in (1, 2, 3, 4)],
    ],
)
def test_paths_are_the_published_algorithms(
    name: str, path: Callable[..., Tensor], keys: dict[str, int], process: Process
) -> None:
    denoiser, grid = mixture(process), Karras(0.05)  # unequal steps
    x, t = process.from_ratio(START_STATE, STARTS)
    own = {"dpmpp3m": PARABOLA, "unipc2": FULL, "unipc3": FULL}
    own["deis"] = {"max_order": keys.get("order"), "mode": "rhoab"}
    solver = SOLVERS[name](grid=grid, **own.get(name, {}))
    for steps in (2, 9):
        expected = path(denoiser, x, grid(process, t, steps), **keys)
        torch.testing.assert_close(solver(denoiser, x, t, NOISE, steps), expected, rtol=1e-10, atol=1e-10)


def test_deis_on_equal_steps_is_ipndm() -> None:
    process = VariancePreserving()
    x, t = process.from_ratio(START_STATE, STARTS)
    for order in (1, 2, 3, 4):
        deis, ipndm = (
            SOLVERS[name](grid=Karras(0.05, rho=1.0), max_order=order, **keys)(mixture(process), x, t, NOISE, 9)
            for name, keys in (("deis", {"mode": "rhoab"}), ("ipndm", {}))
        )
        torch.testing.assert_close(deis, ipndm, rtol=1e-10, atol=1e-10)


# The weights


def test_weights_integrate_polynomials() -> None:
    """Values of a cubic at four nodes, against the antiderivative; with fewer, of the interpolant."""
    nodes = f64(0.0, -0.7, -1.0, -2.5)[:, None] * f64(1.0, 2.0)
    length = f64(0.4, 1.1)
    moments = torch.stack([length ** (k + 1) / (k + 1) for k in range(4)])
    values = 2.0 - nodes + 3 * nodes**2 - 0.5 * nodes**3
    weights = correction_weights(nodes, moments)
    integral = 2 * moments[0] - moments[1] + 3 * moments[2] - 0.5 * moments[3]
    torch.testing.assert_close((weights * values).sum(0) + moments[0] * values[0], integral, rtol=1e-12, atol=0)
    torch.testing.assert_close(weights.sum(0), torch.zeros(2).double(), rtol=0, atol=1e-12)


def test_a_node_at_infinity_drops_out() -> None:
    nodes, moments = f64(0.0, -1.0, -3.0)[:, None].repeat(1, 2), data_moments(f64(0.5, 0.5), 3)
    nodes[2, 1] = -math.inf
    weights = correction_weights(nodes, moments)
    torch.testing.assert_close(weights[:2, 1], correction_weights(nodes[:2, 1:], moments[:2, 1:])[:, 0])
    assert weights[2, 1] == 0 and weights.isfinite().all() and weights[2, 0] != 0


def test_data_moments() -> None:
    """Against Simpson's rule; the second of two is the published B(h)'s."""
    h, u = f64(0.3, 2.0), torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None]
    rule = torch.ones(2001, 1, dtype=torch.float64)
    rule[1:-1:2], rule[2:-1:2] = 4, 2
    for k, moment in enumerate(data_moments(h, 4)):
        expected = h * (rule * (h * (u - 1)).exp() * (h * u) ** k).sum(0) / 6000
        torch.testing.assert_close(moment, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(data_moments(h, 2)[1], h / 2 * (1 - (-h).exp()))


@pytest.mark.parametrize("name", ["dpmpp3m", "unipc2", "unipc3", "deis"])
def test_a_prediction_at_infinite_ratio_counts_for_nothing(name: str) -> None:
    """The step after the one from pure noise is that of a fresh start."""
    process, top = Decoupled(), f64(1.0, 1.0, 1.0)
    denoiser, (x, t), s = mixture(process), process.from_ratio(START_STATE, STARTS), process.time(STARTS / 2)
    fresh, later = Trajectory(NOISE, 5), Trajectory(NOISE, 5, past=[Past(denoiser(START_STATE, top), top)])
    expected = SOLVERS[name]().step(denoiser, x, t, s, fresh)
    torch.testing.assert_close(SOLVERS[name]().step(denoiser, x, t, s, later), expected, rtol=1e-12, atol=1e-12)


def test_dpm2_counts_odd() -> None:
    assert [SOLVERS["dpm2"]().evaluations(n) for n in (1, 2, 18)] == [1, 3, 35]
    assert SOLVERS["dpm2"](denoise=False).evaluations(5) == 10


# The quadratic grid


@pytest.mark.parametrize("process", [VariancePreserving(), Decoupled(), VarianceExploding(sigma_min=0.004)], ids=repr)
def test_quadratic_grid(process: Process) -> None:
    """t_i = (sqrt(t_0) + i / N (sqrt(t_N) - sqrt(t_0)))^2, from the top too."""
    start = f64(process.t_max, 0.6)
    times, stop = Quadratic(ratio_min=0.01)(process, start, 8, denoise=False), process.time(f64(0.01)).item()
    for column, top in zip(times.T, start.tolist(), strict=True):
        expected = [(math.sqrt(top) + i / 8 * (math.sqrt(stop) - math.sqrt(top))) ** 2 for i in range(9)]
        torch.testing.assert_close(column, f64(*expected), rtol=1e-9, atol=1e-12)


def test_quadratic_grid_on_edms_process_is_karras() -> None:
    times = Quadratic()(EDMVarianceExploding(), STARTS, 7)
    torch.testing.assert_close(times, Karras(rho=2.0)(EDMVarianceExploding(), STARTS, 7), rtol=1e-12, atol=1e-15)


def test_quadratic_grid_refuses_negative_times() -> None:
    with pytest.raises(UsageError, match=r"ratio 0.002, is at a negative time on this process: raise ratio_min"):
        Quadratic()(VarianceExploding(), f64(0.5, 0.9), 5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "deis", "max_order": 5}, "1, 2, 3 or 4"),
        ({"name": "unipc2", "order": 3}, "no key 'order'"),
    ],
)
def test_bad_settings(keys: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SOLVERS.build(keys)
