"""Forward processes against closed forms: inverses, SDE coefficients by autograd, transitions by algebra."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffaccel.denoiser import GaussianDenoiser
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams
from diffaccel.process import (
    PROCESSES,
    CosineVariancePreserving,
    Decoupled,
    EDMVarianceExploding,
    Prediction,
    Process,
    SubVariancePreserving,
    VarianceExploding,
    VariancePreserving,
    expand,
)
from diffaccel.solver.onestep import DDIM

ALL = [
    VariancePreserving(),
    SubVariancePreserving(),
    CosineVariancePreserving(),
    VarianceExploding(),
    EDMVarianceExploding(),
    Decoupled(),
    Decoupled(clock="t^2"),
]
NOISELESS = [VariancePreserving(beta_0=0.0), SubVariancePreserving(beta_0=0.0), CosineVariancePreserving(offset=0.0)]
"""Schedules whose rate of noise is 0 at t = 0, where the time of ratio 0 is a quotient of zeros."""
MARKOV = ALL[:5]
RATIOS = torch.logspace(-5, 2, 101, dtype=torch.float64)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def everywhere(processes: list[Process] = ALL) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("process", processes, ids=repr)


@everywhere(ALL + NOISELESS)
def test_time_inverts_the_ratio(process: Process) -> None:
    torch.testing.assert_close(process.ratio(process.time(RATIOS)), RATIOS, rtol=1e-12, atol=0)


@everywhere(ALL + NOISELESS)
def test_ratio_zero_is_the_data(process: Process) -> None:
    x_0, t = torch.randn(2, 3, 1, 1).double(), process.time(f64(0.0, 0.0))
    assert process.sigma(t).tolist() == [0, 0]
    torch.testing.assert_close(process.alpha(t), f64(1, 1), rtol=0, atol=1e-15)
    torch.testing.assert_close(process.marginal(x_0, t, torch.randn_like(x_0)), x_0, rtol=0, atol=1e-14)


@everywhere(ALL[5:])
def test_decoupled_ends_at_pure_noise(process: Process) -> None:
    one = process.time(f64(math.inf))
    assert one.item() == 1 and process.ratio(one).item() == math.inf
    eps = torch.randn(1, 3, 2, 2).double()
    torch.testing.assert_close(process.marginal(torch.randn_like(eps), one, eps), eps, rtol=0, atol=0)


@everywhere(ALL[:5])
def test_the_others_end_at_a_finite_ratio(process: Process) -> None:
    top = process.ratio(f64(process.t_max)).item()
    expected = {"vp": math.sqrt(math.expm1(10.05)), "sub_vp": 2 * math.sinh(5.025), "ve": 100.0, "edm": 80.0}
    names = {PROCESSES[name]: name for name in ("vp", "sub_vp", "ve", "edm")}
    assert top == pytest.approx(expected.get(names.get(type(process), ""), top), rel=1e-12)
    assert 50 < top < 1e4


@everywhere()
def test_drift_is_the_logarithmic_derivative_of_alpha(process: Process) -> None:
    t = process.time(RATIOS).requires_grad_()
    (derivative,) = torch.autograd.grad((process.alpha(t) + 0 * t).log().sum(), t)
    torch.testing.assert_close(process.drift(t.detach()), derivative, rtol=1e-10, atol=1e-12)


@everywhere()
def test_diffusion_drives_the_ratio(process: Process) -> None:
    t = process.time(RATIOS).requires_grad_()
    (derivative,) = torch.autograd.grad(process.ratio(t).square().sum(), t)
    expected = (process.alpha(t).square() * derivative).sqrt().detach()
    torch.testing.assert_close(process.diffusion(t.detach()), expected, rtol=1e-8, atol=0)


def test_vp_integral_at_one() -> None:
    """B(1) = 10.05."""
    t = f64(1.0)
    assert -2 * VariancePreserving().alpha(t).log().item() == pytest.approx(10.05, abs=1e-12)
    assert -2 * SubVariancePreserving().alpha(t).log().item() == pytest.approx(10.05, abs=1e-12)


@pytest.mark.parametrize(
    ("t", "integral", "mu", "sigma", "half_log_snr"),
    [
        (1.0, 10.050, 0.0066, 1.0000, -5.025),
        (0.8, 6.448, 0.0398, 0.9992, -3.223),
        (0.6, 3.642, 0.1619, 0.9868, -1.808),
        (0.4, 1.632, 0.4422, 0.8969, -0.707),
        (0.2, 0.418, 0.8114, 0.5845, 0.328),
    ],
)
def test_vp_table(t: float, integral: float, mu: float, sigma: float, half_log_snr: float) -> None:
    process, at = VariancePreserving(), f64(t)
    assert -2 * process.alpha(at).log().item() == pytest.approx(integral, abs=5e-4)
    assert process.alpha(at).item() == pytest.approx(mu, abs=5e-5)
    assert process.sigma(at).item() == pytest.approx(sigma, abs=5e-5)
    assert -process.ratio(at).log().item() == pytest.approx(half_log_snr, abs=5e-4)
    assert SubVariancePreserving().sigma(at).item() == pytest.approx(sigma**2, abs=1e-4)


def test_small_time_is_exact() -> None:
    """Sigma keeps its relative precision where 1 - exp(-B) would cancel."""
    t = f64(1e-9)
    integral = 0.1e-9 + 9.95e-18
    assert VariancePreserving().sigma(t).item() == pytest.approx(math.sqrt(integral), rel=1e-9)
    slope = math.pi * math.tan(0.5 * math.pi * 0.008 / 1.008) / 1.008
    assert CosineVariancePreserving().sigma(t).item() == pytest.approx(math.sqrt(slope * 1e-9), rel=1e-6)


@pytest.mark.parametrize("process", [VariancePreserving(), CosineVariancePreserving()], ids=repr)
def test_vp_preserves_variance(process: Process) -> None:
    t = torch.linspace(0, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-14)


@everywhere()
def test_x_over_alpha_at_equal_ratio_is_one_law(process: Process) -> None:
    ratio = f64(0.01, 0.5, 3.0)
    x_0, eps = torch.randn(2, 3, 2, 4, 4).double()
    y = x_0 + expand(ratio, x_0) * eps
    x_t, t = process.from_ratio(y, ratio)
    torch.testing.assert_close(process.marginal(x_0, t, eps), x_t, rtol=1e-12, atol=1e-12)


@everywhere()
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_transition_preserves_marginals(process: Process, eta: float) -> None:
    """For the true (x_0, eps) the mean is alpha_s x_0 + sqrt(sigma_s^2 - c^2) eps: x_s ~ q(x_s | x_0)."""
    t, s = process.time(f64(5.0, 1.0, 0.3)), process.time(f64(0.7, 0.9, 0.002))
    x_0, eps = torch.randn(2, 3, 2, 4, 4).double()
    mean, std = process.transition(Prediction(x_0, eps), t, s, eta)
    coefficient = ((mean - expand(process.alpha(s), x_0) * x_0) / eps).flatten(1)
    torch.testing.assert_close(coefficient, coefficient[:, :1].expand_as(coefficient), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(coefficient[:, 0] ** 2 + std**2, process.sigma(s) ** 2, rtol=1e-8, atol=1e-12)
    assert bool((std == 0).all()) == (eta == 0)


@everywhere()
def test_ancestral_steps_compose(process: Process) -> None:
    """t -> s -> r is t -> r: the mean of x_r given (x_t, x_0) and its variance."""
    levels = [process.time(f64(ratio)) for ratio in (4.0, 1.3, 0.2)]
    t, s, r = levels

    def pull(a: Tensor, b: Tensor) -> float:
        """How much of x_a - alpha_a x_0 is left in the mean of x_b."""
        remaining = (process.sigma(b) ** 2 - process.posterior_std(a, b) ** 2).sqrt()
        return (remaining / process.sigma(a)).item()

    assert pull(t, s) * pull(s, r) == pytest.approx(pull(t, r), rel=1e-12)
    variance = pull(s, r) ** 2 * process.posterior_std(t, s) ** 2 + process.posterior_std(s, r) ** 2
    torch.testing.assert_close(variance, process.posterior_std(t, r) ** 2, rtol=1e-12, atol=0)


@everywhere(MARKOV)
def test_posterior_is_that_of_the_markov_chain(process: Process) -> None:
    """Bayes' rule from q(x_s | x_0) and q(x_t | x_s), whose variance is sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2."""
    t, s = process.time(f64(2.0)), process.time(f64(0.6))
    a = process.alpha(t) / process.alpha(s)
    forward = process.sigma(t) ** 2 - a**2 * process.sigma(s) ** 2
    variance = 1 / (1 / process.sigma(s) ** 2 + a**2 / forward)
    torch.testing.assert_close(process.posterior_std(t, s) ** 2, variance, rtol=1e-10, atol=0)


def test_vp_ancestral_step_is_ddpm() -> None:
    """DDPM's posterior mean and variance (arXiv 2006.11239, Eq. 7) in its own variables."""
    process = VariancePreserving()
    t, s = f64(0.5, 0.9), f64(0.48, 0.3)
    bar_t, bar_s = process.alpha(t) ** 2, process.alpha(s) ** 2
    beta = 1 - bar_t / bar_s
    x_0, eps = torch.randn(2, 2, 3, 4, 4).double()
    x_t = process.marginal(x_0, t, eps)
    mean, std = process.transition(Prediction(x_0, eps), t, s, eta=1.0)
    from_data = expand(bar_s.sqrt() * beta / (1 - bar_t), x_0) * x_0
    from_state = expand((1 - beta).sqrt() * (1 - bar_s) / (1 - bar_t), x_0) * x_t
    torch.testing.assert_close(mean, from_data + from_state, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(std**2, (1 - bar_s) / (1 - bar_t) * beta, rtol=1e-10, atol=0)


def test_decoupled_ancestral_step_is_the_bridge() -> None:
    t, s = f64(0.9, 0.5, 1.0), f64(0.6, 0.1, 0.25)
    x_0, eps = torch.randn(2, 3, 3, 4, 4).double()
    x_t = Decoupled().marginal(x_0, t, eps)
    mean, std = Decoupled().transition(Prediction(x_0, eps), t, s, eta=1.0)
    step = expand((t - s) / t, x_t)
    torch.testing.assert_close(mean, (1 - step) * x_t + step * x_0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(std**2, s * (t - s) / t, rtol=1e-12, atol=0)
    assert (std[0] ** 2).item() == pytest.approx(0.2, abs=1e-12)
    markov = Process.posterior_std(Decoupled(), t[:1], s[:1]) ** 2
    assert markov.item() == pytest.approx(0.575, abs=1e-12)  # the other joint law of these marginals


def test_decoupled_square_clock() -> None:
    """With v = t^2: mean x_t + (t - s) x_0 - (v_t - v_s) / sqrt(v_t) eps, variance v_s (v_t - v_s) / v_t."""
    process, t, s = Decoupled(clock="t^2"), f64(0.8), f64(0.3)
    x_0, eps = torch.randn(2, 1, 3, 4, 4).double()
    mean, std = process.transition(Prediction(x_0, eps), t, s, eta=1.0)
    expected = process.marginal(x_0, t, eps) + 0.5 * x_0 - (0.64 - 0.09) / 0.8 * eps
    torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-12)
    assert (std**2).item() == pytest.approx(0.09 * 0.55 / 0.64, rel=1e-12)


def test_decoupled_bridge_by_simulation() -> None:
    """Wiener path plus attenuated image: x_s - mean is N(0, s D / t) and uncorrelated with x_t."""
    t, s, n = 0.7, 0.2, 200_000
    w_s = math.sqrt(s) * torch.randn(n, 1).double()
    w_t = w_s + math.sqrt(t - s) * torch.randn(n, 1).double()
    x_0 = torch.full_like(w_s, 0.4)
    x_s, x_t = (1 - s) * x_0 + w_s, (1 - t) * x_0 + w_t
    eps = (x_t - (1 - t) * x_0) / math.sqrt(t)
    times = torch.full((n,), t).double(), torch.full((n,), s).double()
    mean, std = Decoupled().transition(Prediction(x_0, eps), *times, eta=1.0)
    error = (x_s - mean)[:, 0]
    assert error.mean().item() == pytest.approx(0, abs=5e-3)
    assert error.var().item() == pytest.approx(std[0].item() ** 2, rel=0.02)
    assert torch.corrcoef(torch.stack([error, x_t[:, 0]]))[0, 1].item() == pytest.approx(0, abs=0.01)


@everywhere()
def test_a_step_to_the_data_is_the_prediction(process: Process) -> None:
    zero = process.time(f64(0.0, 0.0))
    x_0, eps = torch.randn(2, 2, 3, 4, 4).double()
    for t, eta in [(process.time(f64(0.01, 50.0)), 1.0), (f64(process.t_max, process.t_max), 0.0)]:
        mean, std = process.transition(Prediction(x_0, eps), t, zero, eta)
        torch.testing.assert_close(mean, x_0, rtol=0, atol=1e-14)
        assert std.tolist() == [0, 0]


@everywhere()
def test_coefficients_are_monotone(process: Process) -> None:
    t = process.time(RATIOS)
    assert all(a < b for a, b in pairwise(t.tolist()))
    assert (process.posterior_std(t[1:], t[:-1]) <= process.sigma(t[:-1])).all()


def test_expand_follows_the_state() -> None:
    x = torch.zeros(2, 3, 4, 5)
    coefficient = expand(f64(1, 2), x)
    assert coefficient.dtype == torch.float32
    assert coefficient.shape == (2, 1, 1, 1)


def test_unknown_clock_and_yaml() -> None:
    assert PROCESSES.build({"name": "decoupled", "clock": "t^2"}) == Decoupled(clock="t^2")
    with pytest.raises(UsageError, match="clock"):
        Decoupled(clock="t3")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="'t3'"):
        PROCESSES.build({"name": "decoupled", "clock": "t3"})


@pytest.mark.parametrize(
    "process", [VariancePreserving(), EDMVarianceExploding(), Decoupled()], ids=lambda p: type(p).__name__
)
def test_a_number_stands_for_a_batch_of_equal_times(process: Process):
    x = torch.randn(3, 1, 4, 4)
    t = process.time(2.0)
    batch = torch.full((3,), 2.0, dtype=torch.float64)
    assert torch.equal(t.expand(3), process.time(batch))
    assert torch.equal(process.alpha(t.item()), process.alpha(t)) and torch.equal(
        process.sigma(t.item()), process.sigma(t)
    )
    for found, expected in zip(process.from_ratio(x, 2.0), process.from_ratio(x, batch), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(process.marginal(x, t.item(), x), process.marginal(x, t.expand(3), x))
    denoiser = GaussianDenoiser(torch.zeros(1, 4, 4), 0.25, process)
    assert torch.equal(denoiser(x, t.item()).x_0, denoiser(x, t.expand(3)).x_0)
    noise, solver = NoiseStreams(0, range(3)), DDIM()
    assert torch.equal(solver(denoiser, x, t.item(), noise, 4), solver(denoiser, x, t.expand(3), noise, 4))
