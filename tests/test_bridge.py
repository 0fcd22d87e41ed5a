"""DDM's sampler against closed forms: bridges by simulation, golden deviations, mixtures, grids, the ODE."""

import math

import pytest
import torch
from torch import Tensor

from diffaccel.denoiser import Denoiser, GaussianDenoiser
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams
from diffaccel.process import PROCESSES, Decoupled, DecoupledPrediction, Prediction, VariancePreserving, expand
from diffaccel.process.attenuation import ATTENUATIONS, Constant, Linear
from diffaccel.solver import SOLVERS, Solver
from diffaccel.solver.grid import LogSNR, Quadratic, TimeToZero, UniformTime

MEAN, STD = 0.3, 0.5
KINDS = [Decoupled(), Decoupled("t^2"), Decoupled(attenuation=Linear()), Decoupled("t^2", Linear())]


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scalars(count: int) -> Tensor:
    return torch.randn(count, 1, 1, 1).double()


class Fresh:
    """Noise of one generator for all samples, where their streams needn't be told apart."""

    def normal(self, like: Tensor) -> Tensor:
        return torch.randn_like(like)


class OneAtATime:
    """Step k gives the noise 1 to row k + 2 and 0 to the others, so that a linear sampler shows its coefficients."""

    def __init__(self) -> None:
        self.calls = 0

    def normal(self, like: Tensor) -> Tensor:
        z = torch.zeros_like(like)
        z[self.calls + 2] = 1
        self.calls += 1
        return z


def output_std(denoiser: Denoiser, solver: Solver, steps: int) -> float:
    """Deviation of samples from x_1 ~ N(0, 1), exactly, for a denoiser affine in x: the sum over all noise."""
    x = torch.zeros(steps + 2, 1, 1, 1, dtype=torch.float64)
    x[1] = 1
    out = solver(denoiser, x, f64(*[1.0] * len(x)), OneAtATime(), steps)  # type: ignore[arg-type]
    assert out[0].item() == pytest.approx(MEAN, abs=1e-10)  # the mean stays exact
    return (out[1:] - out[0]).square().sum().sqrt().item()


def gaussian(var: float = STD**2) -> GaussianDenoiser:
    return GaussianDenoiser(torch.full((1, 1, 1), MEAN, dtype=torch.float64), var, Decoupled())


class LinearGaussian(Denoiser):
    """Exact for data N(MEAN, STD^2) under linear attenuation with K ~ N(0, var_k)."""

    def __init__(self, var_k: float = 0.5161) -> None:
        super().__init__()
        self.process, self.ratio_range, self.var_k = Decoupled(attenuation=Linear()), (0.0, math.inf), var_k

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Prediction:
        t = expand(t, x_t)
        gain = 0.5 * (t**2 - t)
        score = (x_t - (1 - t) * MEAN) / ((1 - t) ** 2 * STD**2 + gain**2 * self.var_k + t)
        x_0, k = MEAN + (1 - t) * STD**2 * score, gain * self.var_k * score
        return DecoupledPrediction(x_0, t.sqrt() * score, torch.cat([k, -x_0 - 0.5 * k], 1))


# 1: the transition


@pytest.mark.parametrize("process", KINDS, ids=repr)
def test_bridge_by_simulation(process: Decoupled) -> None:
    """A Wiener path on the clock v over an attenuated image: what a step leaves is N(0, v_s (v_t - v_s) / v_t)."""
    t, s, n = 0.7, 0.2, 100_000
    v_t, v_s = (process.sigma(f64(one)).item() ** 2 for one in (t, s))
    w_s = math.sqrt(v_s) * scalars(n)
    w_t = w_s + math.sqrt(v_t - v_s) * scalars(n)
    x_0 = torch.full_like(w_s, 0.4)
    phi = process.attenuation.draw(x_0, Fresh())  # type: ignore[arg-type]
    times, stops = f64(t).expand(n), f64(s).expand(n)
    x_s, x_t = (x_0 + process.attenuated(phi, at) + w for at, w in ((stops, w_s), (times, w_t)))
    eps = w_t / math.sqrt(v_t)
    torch.testing.assert_close(process.diffuse(x_0, phi, times, eps), x_t)
    mean, std = process.transition(DecoupledPrediction(x_0, eps, phi), times, stops, eta=1.0)
    error = (x_s - mean).flatten()
    assert error.mean().item() == pytest.approx(0, abs=5e-3)
    assert error.var().item() == pytest.approx(v_s * (v_t - v_s) / v_t, rel=0.03)
    assert std[0].item() ** 2 == pytest.approx(v_s * (v_t - v_s) / v_t, rel=1e-12)
    assert torch.corrcoef(torch.stack([error, x_t.flatten()]))[0, 1].item() == pytest.approx(0, abs=0.015)


@pytest.mark.parametrize("process", KINDS, ids=repr)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_solver_takes_the_process_s_own_transition(process: Decoupled, eta: float) -> None:
    """Where x_t = x_0 + H(t; phi) + sigma_t eps, ``bridge`` is ``ddim``, on any process."""
    x_0, eps = torch.randn(2, 3, 2, 4, 4).double()
    phi, t, s = process.attenuation.draw(x_0, Fresh()), f64(1.0, 0.5, 0.3), f64(0.6, 0.1, 0.0)  # type: ignore[arg-type]
    x_t = process.diffuse(x_0, phi, t, eps)
    stub = Saying(DecoupledPrediction(x_0, eps, phi), process)
    for reproject in (True, False):
        bridge, ddim = SOLVERS["bridge"](eta=eta, reproject=reproject), SOLVERS["ddim"](eta=eta)
        steps = [one.step(stub, x_t, t, s, Noise(3)) for one in (bridge, ddim)]
        torch.testing.assert_close(steps[0], steps[1], rtol=1e-12, atol=1e-12)


class Saying(Denoiser):
    """Always predicts the same."""

    def __init__(self, prediction: Prediction, process: object) -> None:
        super().__init__()
        self.said, self.process, self.ratio_range = prediction, process, (0.0, math.inf)  # type: ignore[assignment]

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Prediction:
        return self.said


class Noise:
    """A trajectory with nothing but noise in it, the same each time."""

    def __init__(self, count: int) -> None:
        self.noise = NoiseStreams(0, range(count))


def test_published_means_agree() -> None:
    """x_t - D C - D / sqrt(t) eps = (1 - D / t) x_t + D / t x_0 = (1 - s) x_0 + s / sqrt(t) eps, D = t - s."""
    t, s, (x_0, eps) = 0.8, 0.3, torch.randn(2, 1, 3, 4, 4).double()
    x_t = (1 - t) * x_0 + math.sqrt(t) * eps
    mean, _ = Decoupled().transition(Prediction(x_0, eps), f64(t), f64(s), eta=1.0)
    torch.testing.assert_close(mean, x_t + (t - s) * x_0 - (t - s) / math.sqrt(t) * eps)
    torch.testing.assert_close(mean, (1 - (t - s) / t) * x_t + (t - s) / t * x_0)
    torch.testing.assert_close(mean, (1 - s) * x_0 + s / math.sqrt(t) * eps)


# 2: a single data point


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [2, 4, 11])
def test_a_single_point_is_reached(eta: float, steps: int) -> None:
    denoiser = GaussianDenoiser(f64(0.7).reshape(1, 1, 1), 0.0, Decoupled())
    out = SOLVERS["bridge"](eta=eta)(denoiser, scalars(50), f64(*[1.0] * 50), NoiseStreams(0, range(50)), steps)
    torch.testing.assert_close(out, torch.full_like(out, 0.7), rtol=0, atol=1e-10)


def test_states_on_the_way_have_the_marginal_law() -> None:
    denoiser = GaussianDenoiser(f64(0.7).reshape(1, 1, 1), 0.0, Decoupled())
    solver = SOLVERS["bridge"](grid=UniformTime(ratio_min=math.sqrt(0.4) / 0.6), denoise=False)
    x = solver(denoiser, scalars(100_000), f64(1.0).expand(100_000), Fresh(), 3)  # type: ignore[arg-type]
    assert x.mean().item() == pytest.approx(0.6 * 0.7, abs=0.01)
    assert x.var().item() == pytest.approx(0.4, rel=0.02)


# 3: Gaussian data; the reference's N steps are N + 1 evaluations

GOLDEN = {1: (0.01, 0.01), 2: (0.15752, 0.16596), 5: (0.30101, 0.31568), 10: (0.36884, 0.38875), 20: (0.41462, 0.43536),
          50: (0.45319, 0.46987), 100: (0.47115, 0.48353), 1000: (0.49511, 0.49801)}  # fmt: skip


@pytest.mark.parametrize("eta", [1.0, 0.0])
@pytest.mark.parametrize(("n", "name"), [*((n, "bridge") for n in GOLDEN), (10, "ddim")])
def test_golden_deviations(n: int, eta: float, name: str) -> None:
    found = output_std(gaussian(), SOLVERS[name](eta=eta, grid=TimeToZero()), n + 1)
    assert found == pytest.approx(GOLDEN[n][eta == 0], abs=6e-6)


@pytest.mark.parametrize(("eta", "expected"), [(1.0, 0.83877), (0.0, 0.86829)])
def test_golden_deviations_of_unit_variance(eta: float, expected: float) -> None:
    assert output_std(gaussian(1.0), SOLVERS["bridge"](eta=eta), 11) == pytest.approx(expected, abs=6e-6)


@pytest.mark.parametrize(
    ("n", "expected", "name"),
    [
        (2, 0.15530, "bridge"),
        (10, 0.36804, "bridge"),
        (10, 0.36804, "ddim"),
        (100, 0.47108, "bridge"),
        (1000, 0.49510, "bridge"),
    ],
)
def test_golden_deviations_of_linear_attenuation(n: int, expected: float, name: str) -> None:
    keys = {"reproject": False} if name == "bridge" else {}
    solver = SOLVERS[name](eta=1.0, grid=TimeToZero(), **keys)
    assert output_std(LinearGaussian(), solver, n + 1) == pytest.approx(expected, abs=6e-6)


class PosteriorDraw(Denoiser):
    """Predicts a draw from p(x_0 | x_t) instead of its mean, and the eps that belongs to it."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.process, self.ratio_range = gaussian(), Decoupled(), (0.0, math.inf)

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Prediction:
        variance = STD**2 * t / ((1 - t) ** 2 * STD**2 + t)
        x_0 = self.mean(x_t, t).x_0 + expand(variance.sqrt(), x_t) * torch.randn_like(x_t)
        return Prediction(x_0, (x_t - expand(1 - t, x_t) * x_0) / expand(t.sqrt(), x_t))


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_drawing_from_the_posterior_is_exact_at_any_number_of_steps(steps: int) -> None:
    n = 200_000
    grid = TimeToZero(final_evaluation=False)
    out = SOLVERS["bridge"](grid=grid)(PosteriorDraw(), scalars(n), f64(1.0).expand(n), Fresh(), steps)  # type: ignore[arg-type]
    assert out.mean().item() == pytest.approx(MEAN, abs=0.005)
    assert out.std().item() == pytest.approx(STD, abs=0.004)


# 4: a mixture


class TwoPeaks(Denoiser):
    """Exact for 0.3 N(-0.8, 0.05^2) + 0.7 N(0.6, 0.1^2)."""

    weights, means, stds = f64(0.3, 0.7), f64(-0.8, 0.6), f64(0.05, 0.1)

    def __init__(self) -> None:
        super().__init__()
        self.process, self.ratio_range = Decoupled(), (0.0, math.inf)

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Prediction:
        x, alpha, sigma = x_t.flatten()[:, None], (1 - t)[:, None], t.sqrt()[:, None]
        variance = (alpha * self.stds) ** 2 + sigma**2
        residual = (x - alpha * self.means) / variance
        logits = self.weights.log() - 0.5 * variance.log() - 0.5 * residual**2 * variance
        eps = (logits.softmax(1) * sigma * residual).sum(1)
        x_0 = (logits.softmax(1) * (self.means + alpha * self.stds**2 * residual)).sum(1)
        return Prediction(x_0.reshape(x_t.shape), eps.reshape(x_t.shape))

    def quantiles(self, n: int) -> Tensor:
        """Of the data at (i + 1/2) / n, to 1e-5."""
        x = torch.linspace(-1.2, 1.2, 240_001, dtype=torch.float64)
        cdf = (self.weights * torch.special.ndtr((x[:, None] - self.means) / self.stds)).sum(1)
        return x[torch.searchsorted(cdf, (torch.arange(n).double() + 0.5) / n)]


@pytest.mark.parametrize(("eta", "expected"), [(1.0, (0.075, 0.040)), (0.0, (0.066, 0.029))])
def test_a_mixture_is_approached(eta: float, expected: tuple[float, float]) -> None:
    """From the quantiles of pure noise, so that the deterministic distances have no error but of the quantiles."""
    denoiser, n = TwoPeaks(), 2000
    start, solver = torch.special.ndtri((torch.arange(n).double() + 0.5) / n), SOLVERS["bridge"](eta=eta)
    distances, masses = [], []
    for steps in (11, 51, 1001):
        out = solver(denoiser, start.reshape(-1, 1, 1, 1), f64(1.0).expand(n), Fresh(), steps).flatten()  # type: ignore[arg-type]
        distances.append((out.sort().values - denoiser.quantiles(n)).abs().mean().item())
        masses.append((out < -0.1).double().mean().item())
    assert distances[:2] == pytest.approx(expected, abs=0.015 if eta else 0.003)
    assert distances[0] > distances[1] > distances[2] and distances[2] < 0.02
    assert masses[0] == pytest.approx(0.288, abs=0.03 if eta else 0.002)
    assert masses[2] == pytest.approx(0.3, abs=0.03 if eta else 0.002)


# 5: evaluations and grids


class Watched(GaussianDenoiser):
    """Notes when it is asked."""

    def __init__(self) -> None:
        super().__init__(f64(MEAN).reshape(1, 1, 1), 1.0, Decoupled())
        self.asked: list[float] = []

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Prediction:
        self.asked.append(t[0].item())
        return super().forward(x_t, t)


def asked(grid: object, steps: int) -> list[float]:
    denoiser = Watched()
    SOLVERS["bridge"](grid=grid)(denoiser, scalars(2), f64(1, 1), NoiseStreams(0, range(2)), steps)
    return denoiser.asked


@pytest.mark.parametrize("n", [1, 2, 10, 1000])
def test_the_references_steps_are_one_evaluation_more(n: int) -> None:
    times = asked(TimeToZero(), n + 1)
    assert len(times) == n + 1
    assert times == pytest.approx([*(1 - i / n for i in range(n)), 1e-4], abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 10])
def test_without_the_final_evaluation_there_are_as_many_as_steps(n: int) -> None:
    times = asked(TimeToZero(final_evaluation=False), n)
    assert times == pytest.approx([1 - i / n for i in range(n)], abs=1e-12)


def test_the_later_grid_is_uniform_to_its_least_time() -> None:
    times = asked(UniformTime(ratio_min=TimeToZero().ratio_min), 10)
    assert times == pytest.approx([1 - i / 9 * (1 - 1e-4) for i in range(10)], abs=1e-9)


def test_non_uniform_grids_do_better_on_gaussian_data() -> None:
    """At ten evaluations, with the uniform one's 0.388: what a grid is worth."""
    found = {
        type(grid).__name__: output_std(gaussian(), SOLVERS["bridge"](eta=0.0, grid=grid), 10)
        for grid in (TimeToZero(), Quadratic(ratio_min=0.01), LogSNR(ratio_min=0.01))
    }
    assert found["TimeToZero"] < found["Quadratic"] < STD
    assert abs(found["LogSNR"] - STD) < abs(found["TimeToZero"] - STD)


# 8: linear attenuation


def test_linear_attenuation() -> None:
    process, (x_0, eps) = Decoupled(attenuation=Linear()), torch.randn(2, 4, 2, 3, 3).double()
    phi = process.attenuation.draw(x_0, Fresh())  # type: ignore[arg-type]
    k, c = phi.chunk(2, 1)
    assert k.abs().max() == 1 and k.var().item() == pytest.approx(0.516, abs=0.2)
    torch.testing.assert_close(c + k / 2, -x_0)
    torch.testing.assert_close(process.diffuse(x_0, phi, f64(1, 1, 1, 1), eps), eps)
    for t in (1.0, 0.6, 0.01):
        times = f64(t, t, t, t)
        x_t = process.diffuse(x_0, phi, times, eps)
        torch.testing.assert_close(x_t, (1 - t) * x_0 + 0.5 * (t**2 - t) * k + math.sqrt(t) * eps)
        one = SOLVERS["bridge"](reproject=False).step(
            Saying(DecoupledPrediction(x_0, eps, phi), process), x_t, times, 0 * times, Noise(4)
        )
        torch.testing.assert_close(one, x_0, rtol=1e-12, atol=1e-12)
    still = process.attenuation.parameters(x_0, torch.zeros_like(x_0))
    t = f64(0.2, 0.5, 0.7, 1.0)
    torch.testing.assert_close(process.diffuse(x_0, still, t, eps), Decoupled().marginal(x_0, t, eps))


def test_the_variance_of_a_clamped_normal() -> None:
    k = Linear().draw(torch.zeros(1, 1, 1000, 1000), Fresh())[:, :1]  # type: ignore[arg-type]
    assert k.var().item() == pytest.approx(Linear.variance, abs=0.002)
    assert (k.abs() == 1).float().mean().item() == pytest.approx(0.317, abs=0.003)


@pytest.mark.parametrize("name", sorted(set(SOLVERS) - {"ddim", "bridge"}))
def test_other_solvers_refuse_a_mean_that_is_not_scaled_data(name: str) -> None:
    with pytest.raises(UsageError, match=r"takes the mean of x_t to be alpha x_0.*attenuation=constant"):
        SOLVERS.build({"name": name})(LinearGaussian(), scalars(2), f64(1, 1), NoiseStreams(0, range(2)), 4)


def test_what_free_parameters_rule_out() -> None:
    process, (x, eps), t = Decoupled(attenuation=Linear()), torch.randn(2, 1, 1, 1, 1).double(), f64(0.5)
    with pytest.raises(UsageError, match="analytic_first"):
        SOLVERS["ddim"](analytic_first=0.5)(LinearGaussian(), x, t, NoiseStreams(0, [0]), 2)
    for call, word in (
        (lambda: process.marginal(x, t, eps), "method=ddm"),
        (lambda: process.from_ratio(x, t), "prior=gaussian"),
        (lambda: process.transition(Prediction(x, eps), t, t / 2), "denoiser=decoupled"),
        (lambda: process.drift(t), "solver=ddim"),
    ):
        with pytest.raises(UsageError, match=word):
            call()


def test_attenuations_by_name() -> None:
    built = PROCESSES.build({"name": "decoupled", "attenuation": {"name": "linear"}})
    assert built == Decoupled(attenuation=Linear()) and not built.scales_data
    assert Decoupled().attenuation == Constant() and Decoupled().scales_data
    with pytest.raises(UsageError, match="did you mean 'linear'"):
        PROCESSES.build({"name": "decoupled", "attenuation": {"name": "linaer"}})
    assert set(ATTENUATIONS) == {"constant", "linear"}


# The reference's clamp, and heads that disagree


def test_x_0_is_clamped_and_c_taken_anew_as_in_the_reference() -> None:
    """x_s = x_t + D clamp(x_0) - D / sqrt(t) eps, whatever the first head said of C."""
    t, s, (x_t, x_0, eps, c) = 0.8, 0.3, 2 * torch.randn(4, 1, 3, 4, 4).double()
    stub = Saying(DecoupledPrediction(x_0, eps, c), Decoupled())
    z = NoiseStreams(0, range(1)).normal(x_t)
    noise = math.sqrt(s * (t - s) / t) * z - (t - s) / math.sqrt(t) * eps
    for keys, image in (({"clamp": True}, x_0.clamp(-1, 1)), ({}, x_0), ({"reproject": False}, -c)):
        step = SOLVERS["bridge"](**keys).step(stub, x_t, f64(t), f64(s), Noise(1))
        torch.testing.assert_close(step, x_t + (t - s) * image + noise)
    with pytest.raises(UsageError, match="clamp has no effect"):
        SOLVERS.build({"name": "bridge", "clamp": True, "reproject": False})


def test_on_another_process_it_is_ancestral() -> None:
    process, (x_0, eps), t, s = VariancePreserving(), torch.randn(2, 1, 3, 4, 4).double(), f64(0.6), f64(0.3)
    stub, x_t = Saying(Prediction(x_0, eps), process), process.marginal(x_0, t, eps)
    mean, std = process.transition(Prediction(x_0, eps), t, s, eta=1.0)
    expected = mean + expand(std, mean) * Noise(1).noise.normal(mean)
    torch.testing.assert_close(SOLVERS["bridge"]().step(stub, x_t, t, s, Noise(1)), expected)


# 9: the probability flow


def test_probability_flow() -> None:
    """dx/dt = C + eps / (2 sqrt t) is the process's own f x - g^2 score / 2, and carries N(0, 1) to the data."""
    denoiser, process = gaussian(), Decoupled()
    x, t = scalars(5), f64(0.05, 0.3, 0.5, 0.8, 0.99)
    x_0, eps = denoiser(x, t)
    own = expand(process.drift(t), x) * x + expand(0.5 * process.diffusion(t) ** 2 / process.sigma(t), x) * eps
    torch.testing.assert_close(own, -x_0 + eps / expand(2 * t.sqrt(), x), rtol=1e-9, atol=1e-9)

    def slope(factor: float) -> Tensor:
        x, times = f64(0.0, 1.0).reshape(2, 1, 1, 1), torch.linspace(1.0, 0.01, 801).double() ** 2
        for now, then in zip(times[:-1], times[1:], strict=True):
            x_0, eps = denoiser(x, now.expand(2))
            x = x + (then - now) * (-x_0 + factor * eps / now.sqrt())
        return denoiser(x, times[-1:].expand(2)).x_0.flatten()

    assert slope(0.5).tolist() == pytest.approx([0.3, 0.8], abs=4e-3)
    assert (slope(1.0)[1] - slope(1.0)[0]).item() == pytest.approx(0.18, abs=0.01)
    for name in ("ddim", "heun", "rk45"):
        solver = SOLVERS.build(
            {"name": name, **({"denoise": True} if name == "rk45" else {"grid": {"name": "log_snr"}})}
        )
        out = solver(denoiser, f64(0, 1).reshape(2, 1, 1, 1), f64(1, 1), NoiseStreams(0, range(2)), 200)
        assert out.flatten().tolist() == pytest.approx([0.3, 0.8], abs=8e-3)
