"""Solvers as their authors publish them: variants and order lowering against the equations, and at their orders."""

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from scipy.integrate import quad
from test_solver_highorder import (
    NOISE,
    PROCESSES,
    START_STATE,
    STARTS,
    STOP,
    error_at_stop,
    error_from_exact_start,
    f64,
    measured_order,
    mixture,
)
from torch import Tensor

from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.process import CosineVariancePreserving, EDMVarianceExploding, Process, VariancePreserving
from diffaccel.solver import SOLVERS, Grid, Karras, UniformTime

# The algorithms on x of one sample, with numbers as coefficients: authors' step 1 .. S over times t_0 .. t_S.


def levels(process: Process, times: Tensor) -> tuple[list[float], list[float], list[float]]:
    """alpha, sigma and lambda = ln(alpha / sigma) at times (S + 1,)."""
    alpha, sigma = process.alpha(times), process.sigma(times)
    return alpha.tolist(), sigma.tolist(), (alpha.log() - sigma.log()).tolist()


def dpmpp(denoiser: Denoiser, x: Tensor, times: Tensor, order: int, lower: bool = True, half: bool = True) -> Tensor:
    """dpm_solver_pytorch.py, ``sample`` with method='multistep' and algorithm_type='dpmsolver++'."""
    alpha, sigma, lam = levels(denoiser.process, times)
    steps, m = len(times) - 1, [denoiser(x, times[:1]).x_0]
    for k in range(1, steps + 1):
        p = min(k, order)
        if lower and steps < 10:
            p = min(p, steps + 1 - k)
        h = lam[k] - lam[k - 1]
        phi_1 = math.expm1(-h)
        x = sigma[k] / sigma[k - 1] * x - alpha[k] * phi_1 * m[-1]
        if p == 2:
            r_0 = (lam[k - 1] - lam[k - 2]) / h
            x = x - 0.5 * alpha[k] * phi_1 * (m[-1] - m[-2]) / r_0
        if p == 3:
            r_0, r_1 = (lam[k - 1] - lam[k - 2]) / h, (lam[k - 2] - lam[k - 3]) / h
            d_10, d_11 = (m[-1] - m[-2]) / r_0, (m[-2] - m[-3]) / r_1
            d_1 = d_10 + r_0 / (r_0 + r_1) * (d_10 - d_11)
            d_2 = (1 if half else 2) / (r_0 + r_1) * (d_10 - d_11)
            phi_2 = phi_1 / h + 1
            x = x + alpha[k] * phi_2 * d_1 - alpha[k] * (phi_2 / h - 0.5) * d_2
        m.append(denoiser(x, times[k : k + 1]).x_0)
    return x


def unipc(denoiser: Denoiser, x: Tensor, times: Tensor, order: int, variant: str = "bh1", lower: bool = True) -> Tensor:
    """uni_pc.py, ``sample`` and ``multistep_uni_pc_bh_update`` with data prediction."""
    alpha, sigma, lam = levels(denoiser.process, times)
    steps, m = len(times) - 1, [denoiser(x, times[:1]).x_0]
    for k in range(1, steps + 1):
        p = min(k, order, steps + 1 - k) if lower else min(k, order)
        h = lam[k] - lam[k - 1]
        r = [(lam[k - 1 - j] - lam[k - 1]) / h for j in range(1, p)]
        d = [(m[-1 - j] - m[-1]) / r[j - 1] for j in range(1, p)]
        big_b = -h if variant == "bh1" else math.expm1(-h)
        b, phi = [], math.expm1(-h) / -h - 1
        for j in range(1, p + 1):
            b.append(phi * math.factorial(j) / big_b)
            phi = phi / -h - 1 / math.factorial(j + 1)
        big_r = torch.stack([f64(*r, 1.0) ** j for j in range(p)])
        rho_p = f64(0.5) if p == 2 else torch.linalg.solve(big_r[:-1, :-1], f64(*b[:-1]))
        rho_c = f64(0.5) if p == 1 else torch.linalg.solve(big_r, f64(*b))
        base = sigma[k] / sigma[k - 1] * x - alpha[k] * math.expm1(-h) * m[-1]
        x = base - alpha[k] * big_b * sum(w * one for w, one in zip(rho_p.tolist(), d, strict=True))
        m.append(denoiser(x, times[k : k + 1]).x_0)
        if k < steps:
            d.append(m[-1] - m[-2])
            x = base - alpha[k] * big_b * sum(w * one for w, one in zip(rho_c.tolist(), d, strict=True))
    return x


def tab(denoiser: Denoiser, x: Tensor, times: Tensor, order: int = 4, lower: bool = False) -> Tensor:
    """DEIS, Eqs. 14 and 15: x_s = Psi(s, t) x_t + sum_j C_j eps_j, with integrals C_j of Lagrange's basis over time.

    On VP Psi(s, t) = alpha_s / alpha_t and the integrand is Psi(s, tau) beta(tau) / (2 sigma_tau). Elsewhere the same
    is done with x / alpha, at the time of VP with beta from 0.1 to 20 where the ratio is equal.
    """
    process, vp = denoiser.process, VariancePreserving()
    tau = vp.time(process.ratio(times)).tolist()

    def rate(t: float) -> float:
        """The integrand over alpha_s: d(rho) / dt."""
        big_b = 0.1 * t + 0.5 * 19.9 * t**2
        return 0.5 * (0.1 + 19.9 * t) * math.exp(big_b) / math.sqrt(math.expm1(big_b))

    steps, eps, y = len(times) - 1, list[Tensor](), x / process.alpha(times[0])
    for k in range(1, steps + 1):
        eps.append(denoiser(process.alpha(times[k - 1]) * y, times[k - 1 : k]).eps)
        p = min(k, order, steps + 1 - k) if lower else min(k, order)
        nodes = [tau[k - 1 - j] for j in range(p)]
        for j in range(p):

            def integrand(t: float, j: int = j, nodes: list[float] = nodes) -> float:
                others = [(t - u) / (nodes[j] - u) for u in nodes if u != nodes[j]]
                return rate(t) * math.prod(others)

            y = y + quad(integrand, tau[k - 1], tau[k], epsabs=1e-15, epsrel=1e-13, limit=500)[0] * eps[-1 - j]
    return process.alpha(times[-1]) * y


def ipndm(denoiser: Denoiser, x: Tensor, times: Tensor, order: int = 4, lower: bool = False) -> Tensor:
    """The ``ipndm`` of DEIS's code: DDIM's step with Adams and Bashforth's mean of eps."""
    alpha, sigma, _ = levels(denoiser.process, times)
    table = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
    steps, eps = len(times) - 1, list[Tensor]()
    for k in range(1, steps + 1):
        eps.append(denoiser(x, times[k - 1 : k]).eps)
        p = min(k, order, steps + 1 - k) if lower else min(k, order)
        mean = sum(w * eps[-1 - j] for j, w in enumerate(table[p]))
        ratio = alpha[k] / alpha[k - 1]
        x = ratio * x + (sigma[k] - ratio * sigma[k - 1]) * mean
    return x


DEFAULTS: list[tuple[str, dict[str, object], Callable[..., Tensor], dict[str, object]]] = [
    ("dpmpp2m", {}, dpmpp, {"order": 2}),
    ("dpmpp3m", {}, dpmpp, {"order": 3}),
    ("unipc2", {}, unipc, {"order": 2}),
    ("unipc3", {}, unipc, {"order": 3}),
    ("deis", {}, tab, {}),
    ("ipndm", {}, ipndm, {}),
]
VARIANTS: list[tuple[str, dict[str, object], Callable[..., Tensor], dict[str, object]]] = [
    ("dpmpp2m", {"lower_order_final": False}, dpmpp, {"order": 2, "lower": False}),
    ("dpmpp3m", {"lower_order_final": False}, dpmpp, {"order": 3, "lower": False}),
    ("dpmpp3m", {"D2": "parabola"}, dpmpp, {"order": 3, "half": False}),
    ("unipc2", {"variant": "bh2"}, unipc, {"order": 2, "variant": "bh2"}),
    ("unipc3", {"variant": "bh2"}, unipc, {"order": 3, "variant": "bh2"}),
    ("unipc2", {"lower_order_final": False}, unipc, {"order": 2, "lower": False}),
    ("unipc3", {"lower_order_final": False}, unipc, {"order": 3, "lower": False}),
    ("deis", {"max_order": 3}, tab, {"order": 3}),
    ("deis", {"lower_order_final": True}, tab, {"lower": True}),
    ("ipndm", {"lower_order_final": True, "max_order": 3}, ipndm, {"order": 3, "lower": True}),
]


@pytest.mark.parametrize("process", [*PROCESSES, EDMVarianceExploding()], ids=repr)
@pytest.mark.parametrize(
    ("name", "keys", "path", "arguments"),
    [*DEFAULTS, *VARIANTS],
    ids=lambda one: " ".join(map(str, one.items())) if isinstance(one, dict) else getattr(one, "__name__", one),
)
def test_steps_are_those_of_the_authors(
    name: str, keys: dict[str, object], path: Callable[..., Tensor], arguments: dict[str, object], process: Process
) -> None:
    """With few steps, in which the order is raised and lowered, and with so many that DPM-Solver++ lowers none."""
    denoiser, grid = mixture(process), Karras(0.05)
    x, t = process.from_ratio(START_STATE, STARTS)
    for steps in (1, 2, 3, 4, 5, 9, 10) if path is not tab else (1, 2, 4, 6):
        solver = SOLVERS[name](grid=grid, denoise=False, **keys)
        times = grid(process, t, steps, denoise=False)
        expected = torch.cat([path(denoiser, x[i : i + 1], times[:, i], **arguments) for i in range(3)])
        torch.testing.assert_close(solver(denoiser, x, t, NOISE, steps), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "keys", "path", "arguments"), DEFAULTS, ids=[row[0] for row in DEFAULTS])
def test_the_last_step_to_the_data_is_not_counted(
    name: str, keys: dict[str, object], path: Callable[..., Tensor], arguments: dict[str, object]
) -> None:
    """The authors' denoise_to_zero: the prediction at the state after the last, DDIM's, of S steps. S = 9 and 10."""
    process = VariancePreserving()
    denoiser, grid = mixture(process), Karras(0.05)
    x, t = process.from_ratio(START_STATE, STARTS)
    for steps in (10, 11) if path is not tab else (6,):
        times = grid(process, t, steps)[:-1]
        state = torch.cat([path(denoiser, x[i : i + 1], times[:, i], **arguments) for i in range(3)])
        actual = SOLVERS[name](grid=grid)(denoiser, x, t, NOISE, steps)
        torch.testing.assert_close(actual, denoiser(state, times[-1]).x_0, rtol=1e-12, atol=1e-12)


def test_defaults_are_those_of_the_authors() -> None:
    def default(name: str, key: str) -> object:
        return inspect.signature(SOLVERS[name]).parameters[key].default

    found = {
        name: default(name, "lower_order_final") for name in SOLVERS if "lower_order_final" in SOLVERS.keys_of(name)
    }
    published = {"dpmpp2m": True, "dpmpp3m": True, "unipc2": True, "unipc3": True, "deis": False, "ipndm": False}
    assert found == published
    assert default("dpmpp3m", "D2") == "published"
    assert default("unipc2", "variant") == default("unipc3", "variant") == "bh1"
    assert (default("deis", "mode"), default("deis", "max_order"), default("ipndm", "max_order")) == ("tab", 4, 4)


# tAB


@pytest.mark.parametrize("process", [VariancePreserving(0.5, 12.0), CosineVariancePreserving()], ids=repr)
def test_tab_is_in_the_time_of_a_variance_preserving_process(process: Process) -> None:
    """One step from two exact predictions: integrals in the process's own time, which differ from the linear one's."""
    denoiser, grid = mixture(process), UniformTime(0.5)
    x, t = process.from_ratio(START_STATE, STARTS)
    times = grid(process, t, 2, denoise=False)
    first = denoiser(x, t)
    y = x / process.alpha(t)[:, None, None, None]
    y = y + (process.ratio(times[1]) - process.ratio(t))[:, None, None, None] * first.eps
    second = denoiser(process.alpha(times[1])[:, None, None, None] * y, times[1])
    for i in range(3):
        a, b, c = times[:, i].tolist()

        def rate(u: float) -> float:
            time = f64(u)
            return (process.diffusion(time) ** 2 / (2 * process.alpha(time) * process.sigma(time))).item()

        newest = quad(lambda u, a=a, b=b: rate(u) * (u - a) / (b - a), b, c, epsrel=1e-13)[0]
        oldest = quad(lambda u, a=a, b=b: rate(u) * (u - b) / (a - b), b, c, epsrel=1e-13)[0]
        y[i] += newest * second.eps[i] + oldest * first.eps[i]
    actual = SOLVERS["deis"](grid=grid, denoise=False)(denoiser, x, t, NOISE, 2)
    torch.testing.assert_close(actual / process.alpha(times[2])[:, None, None, None], y, rtol=1e-11, atol=1e-11)


def test_tab_over_a_long_step() -> None:
    """From ratio 80 to 1 to 0.002, over which the time of the linear process bends."""
    process = EDMVarianceExploding()
    x, t = 80 * START_STATE[:1], f64(80.0)

    class Two(Grid):
        def interpolate(self, process: Process, start: Tensor, stop: Tensor, fraction: Tensor) -> Tensor:
            return f64(1.0, 0.002)[:, None]

    actual = SOLVERS["deis"](grid=Two(), denoise=False)(mixture(process), x, t, NOISE.first(1), 2)
    expected = tab(mixture(process), x, f64(80.0, 1.0, 0.002))
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


# Orders


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize(
    ("name", "keys", "order"),
    [
        ("dpmpp3m", {}, 2),
        ("dpmpp3m", {"D2": "parabola"}, 3),
        *[("deis", {"max_order": order, "mode": mode}, order) for order in (1, 2, 3, 4) for mode in ("tab", "rhoab")],
        *[
            (name, {"variant": variant}, int(name[-1]) + 1)
            for name in ("unipc2", "unipc3")
            for variant in ("bh1", "bh2")
        ],
    ],
)
def test_order_given_exact_starting_values(name: str, keys: dict[str, object], order: int, process: Process) -> None:
    """The authors' D_2 makes a method of order 2 of three predictions, and the parabola's one of order 3."""
    solver = SOLVERS[name](grid=Karras(STOP), denoise=False, **keys)
    order_of_each = measured_order(*(error_from_exact_start(solver, process, steps) for steps in (120, 240)))
    assert order_of_each[0].item() == pytest.approx(order, abs=0.15)
    assert ((order_of_each - order).abs() < (0.35 if keys.get("variant") == "bh2" else 0.15)).all(), order_of_each


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize(
    ("name", "keys", "order"),
    [
        ("dpmpp2m", {}, 2),
        ("dpmpp3m", {}, 2),
        ("unipc2", {}, 2),
        ("unipc3", {}, 2),
        ("unipc2", {"variant": "bh2"}, 2),
        ("unipc3", {"variant": "bh2"}, 2),
        ("unipc2", {"lower_order_final": False}, 3),
        ("unipc3", {"lower_order_final": False}, 3),
        ("deis", {}, 2),
        ("deis", {"lower_order_final": True}, 2),
        ("ipndm", {"lower_order_final": True}, 2),
    ],
)
def test_order_with_own_start_and_end(name: str, keys: dict[str, object], order: int, process: Process) -> None:
    """The start-up limits the order to 3, and to 2 without a corrector; a lowered last step, DDIM's, limits it to 2."""
    solver = SOLVERS[name](grid=Karras(STOP), denoise=False, **keys)
    order_of_each = measured_order(*(error_at_stop(solver, process, steps) for steps in (240, 480)))
    assert ((order_of_each - order).abs() < 0.15).all(), order_of_each


@pytest.mark.parametrize(
    "keys", [{"name": "unipc2", "variant": "bh3"}, {"name": "deis", "mode": "t"}, {"name": "dpmpp3m", "D2": "exact"}]
)
def test_unknown_variants(keys: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="expected one of"):
        SOLVERS.build(keys)
