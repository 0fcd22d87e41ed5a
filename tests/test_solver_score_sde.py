"""score_sde's discretisations of the reverse SDE on variance preserving processes, as its code has them."""

import math

import pytest
import torch
from test_solver_stochastic import gaussian, law
from torch import Tensor

from diffaccel.denoiser import Denoiser, MixtureDenoiser
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams
from diffaccel.process import (
    CosineVariancePreserving,
    Decoupled,
    DiscreteVariancePreserving,
    EDMVarianceExploding,
    Process,
    SubVariancePreserving,
    VariancePreserving,
    expand,
)
from diffaccel.solver import SOLVERS, Karras, UniformTime

MEANS = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(1)).double()
VP, EPS, SNR = VariancePreserving(0.1, 20.0), 1e-3, 0.16
VAR = 0.25


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def reference(name: str, denoiser: Denoiser, x: Tensor, noise: NoiseStreams, n: int, correct: int = 0) -> Tensor:
    """get_pc_sampler with VPSDE(0.1, 20, N), but for norms per image in place of means over the batch."""
    discrete_betas = torch.linspace(0.1 / n, 20 / n, n, dtype=torch.float64)
    for t in torch.linspace(1, EPS, n, dtype=torch.float64):
        vec_t = t.expand(len(x))

        def score(x: Tensor, vec_t: Tensor = vec_t) -> Tensor:
            log_mean = -0.25 * vec_t**2 * 19.9 - 0.5 * vec_t * 0.1
            return -denoiser(x, vec_t).eps / expand((1 - (2 * log_mean).exp()).sqrt(), x)

        beta = discrete_betas[int(t * (n - 1))]
        for _ in range(correct):
            grad, z = score(x), noise.normal(x)
            ratio = z.flatten(1).norm(dim=1) / grad.flatten(1).norm(dim=1)
            size = expand((SNR * ratio) ** 2 * 2 * (1 - beta), x)
            x = x + size * grad + (2 * size).sqrt() * z
        if name == "euler_maruyama":
            beta_t = 0.1 + t * 19.9
            drift = -0.5 * beta_t * x - beta_t * score(x)
            x_mean, std = x + drift * (-1 / n), beta_t.sqrt() * math.sqrt(1 / n)
        else:
            f, std = (1 - beta).sqrt() * x - x, beta.sqrt()
            x_mean = x - (f - std**2 * score(x))
        if t > EPS * 1.5:
            x = x_mean + std * noise.normal(x)
    return x_mean


@pytest.mark.parametrize("n", [25, 100])
@pytest.mark.parametrize(
    ("name", "keys", "correct"),
    [
        ("reverse_diffusion", {}, 0),
        ("euler_maruyama", {}, 0),
        ("pc", {"snr": SNR}, 1),
        ("pc", {"snr": SNR, "corrector_steps": 2}, 2),
    ],
)
def test_paths_are_those_of_the_reference(name: str, keys: dict[str, object], correct: int, n: int) -> None:
    denoiser = MixtureDenoiser(MEANS, 0.1, process=VP)
    x = torch.randn(3, 2, 2, 2).double()
    expected = reference(name, denoiser, x, NoiseStreams(5, range(3)), n, correct)
    grid = UniformTime(ratio_min=VP.ratio(f64(EPS)).item())
    solver = SOLVERS[name](grid=grid, discretisation="score_sde", **keys)
    actual = solver(denoiser, x, f64(1, 1, 1), NoiseStreams(5, range(3)), n)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    ours = SOLVERS[name](grid=grid, **keys)(denoiser, x, f64(1, 1, 1), NoiseStreams(5, range(3)), n)
    assert (ours - expected).abs().max() > 1e-3


@pytest.mark.parametrize("denoise", [True, False])
@pytest.mark.parametrize("name", ["reverse_diffusion", "euler_maruyama"])
@pytest.mark.parametrize("grid", [UniformTime(2e-2), Karras(2e-2)], ids=["time", "karras"])
@pytest.mark.parametrize("process", [VP, CosineVariancePreserving(), DiscreteVariancePreserving()], ids=repr)
def test_variance_converges(name: str, grid: object, process: Process, denoise: bool) -> None:
    """To that of the data, or with ``denoise=False`` of the state at the last level, at order 1."""
    solver = SOLVERS[name](grid=grid, discretisation="score_sde", denoise=denoise)
    errors = []
    for steps in (200, 400):
        t = process.time(f64(3.0))
        alpha, sigma = process.alpha(t).item(), process.sigma(t).item()
        mean, variance = law(solver, gaussian(process), 3.0, steps, alpha**2 * VAR + sigma**2)
        last = process.time(f64(0.0 if denoise else 2e-2))
        scale, left = process.alpha(last).item(), process.sigma(last).item()
        assert mean == pytest.approx(scale * 0.3, abs=0.05)
        errors.append(variance - scale**2 * VAR - left**2)
    assert abs(errors[1]) < 0.04
    if not denoise and process != DiscreteVariancePreserving():  # whose beta is constant within an index
        assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)


def test_each_sample_has_its_own_times() -> None:
    denoiser = MixtureDenoiser(MEANS, 0.1, process=VP)
    x, t = torch.randn(3, 2, 2, 2).double(), f64(0.3, 1.0, 0.8)
    solver = SOLVERS["pc"](discretisation="score_sde", grid=UniformTime(1e-2))
    together = solver(denoiser, x, t, NoiseStreams(5, range(3)), 30)
    for i in range(3):
        alone = solver(denoiser, x[i : i + 1], t[i : i + 1], NoiseStreams(5, [i]), 30)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["reverse_diffusion", "euler_maruyama", "pc"])
@pytest.mark.parametrize("process", [EDMVarianceExploding(), SubVariancePreserving(), Decoupled()], ids=repr)
def test_other_processes_are_refused(name: str, process: Process) -> None:
    solver, t = SOLVERS[name](discretisation="score_sde"), process.time(f64(2.0))
    with pytest.raises(UsageError, match="requires a variance preserving process.*use solver.discretisation=ratio"):
        solver(MixtureDenoiser(MEANS, 0.1, process=process), MEANS[:1], t, NoiseStreams(0, [0]), 50)


@pytest.mark.parametrize("name", ["reverse_diffusion", "pc"])
def test_too_few_steps_are_refused(name: str) -> None:
    solver = SOLVERS[name](discretisation="score_sde", grid=UniformTime(1e-2))
    denoiser, x = MixtureDenoiser(MEANS, 0.1, process=VP), MEANS[:1]
    with pytest.raises(UsageError, match=r"20 steps are too few .* is 1 and must be below 1: raise nfe"):
        solver(denoiser, x, f64(1.0), NoiseStreams(0, [0]), 20)
    assert solver(denoiser, x, f64(1.0), NoiseStreams(0, [0]), 21).isfinite().all()


@pytest.mark.parametrize("name", ["reverse_diffusion", "euler_maruyama"])
def test_a_single_step_is_ddims(name: str) -> None:
    denoiser, x = MixtureDenoiser(MEANS, 0.1, process=VP), MEANS[:1]
    one = SOLVERS[name](discretisation="score_sde")(denoiser, x, f64(0.9), NoiseStreams(0, [0]), 1)
    torch.testing.assert_close(one, denoiser(x, f64(0.9)).x_0)
