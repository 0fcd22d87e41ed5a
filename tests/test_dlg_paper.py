"""DLG as published: its six integrators on Gaussian data by exact algebra, its settings, its quirks one by one."""

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign import VE, VP, random_network, score_sde_content
from torch import Tensor

from diffaccel import experiment
from diffaccel.__main__ import main
from diffaccel.config import load
from diffaccel.denoiser import GaussianDenoiser
from diffaccel.errors import UsageError
from diffaccel.methods import DenoisingLangevinGibbs
from diffaccel.nfe import EvaluationCounter
from diffaccel.noise import NoiseStreams
from diffaccel.prior import ClassifierPosterior, LangevinGibbsPrior
from diffaccel.process import EDMVarianceExploding
from diffaccel.sampling import to_uint8
from diffaccel.solver import SOLVERS
from diffaccel.solver.onestep import StochasticHeun
from diffaccel.weights import save_weights

DATA = ["cifar10", "celebahq256"]
NAMES = ["kar1", "kar2", "probability_flow", "reverse_diffusion", "euler_maruyama", "rk45"]


def name_of(data: str, integrator: str) -> str:
    plain = {"cifar10": "kar1", "celebahq256": "kar2"}[data]
    return f"{data}/dlg" if integrator == plain else f"{data}/dlg_{integrator}"


# The published algorithms in units of [0, 1], on deviations from the mean: x holds its coefficients of the start and of
# each draw of noise, all of which a step combines linearly.

A2, SIGMA_M = 0.0625, 0.01


def s(x: np.ndarray, sigma: float) -> np.ndarray:
    return -x / (A2 + sigma**2)


def karras(top: float, n: int) -> list[float]:
    a, b = top ** (1 / 7), SIGMA_M ** (1 / 7)
    return [top, *((a + i / (n - 1) * (b - a)) ** 7 for i in range(1, n)), 0.0]


def kar1(x: np.ndarray, z: Callable[[], np.ndarray], top: float, code_n: int) -> np.ndarray:
    for sigma, then in pairwise(karras(top, code_n - 1)):
        d = -sigma * s(x, sigma)
        euler = x + (then - sigma) * d
        x = x + (then - sigma) * (d - then * s(euler, then)) / 2 if then else euler
    return x


def kar2(x: np.ndarray, z: Callable[[], np.ndarray], top: float, code_n: int) -> np.ndarray:
    for sigma, then in pairwise(karras(top, code_n - 1)):
        gamma = min(80 / code_n, math.sqrt(2) - 1) if 0.05 <= sigma <= 1.0 else 0.0
        up = (1 + gamma) * sigma
        x = x + math.sqrt(up**2 - sigma**2) * 1.007 * z()
        d = -up * s(x, up)
        euler = x + (then - up) * d
        x = x + (then - up) * (d - then * s(euler, then)) / 2 if then else euler
    return x


def geometric(top: float, n: int) -> list[float]:
    return [SIGMA_M * (top / SIGMA_M) ** (j / (n - 1)) for j in range(n)]


def reverse_diffusion(x: np.ndarray, z: Callable[[], np.ndarray], top: float, n: int) -> np.ndarray:
    g = [0.0, *geometric(top, n)]
    for j in range(n, 0, -1):
        removed = g[j] ** 2 - g[j - 1] ** 2
        mean = x + removed * s(x, g[j])
        x = mean + math.sqrt(removed) * z()
    return mean


def probability_flow(x: np.ndarray, z: Callable[[], np.ndarray], top: float, n: int) -> np.ndarray:
    g = [0.0, *geometric(top, n)]
    for j in range(n, 0, -1):
        x = x + (g[j] ** 2 - g[j - 1] ** 2) / 2 * s(x, g[j])
    return x


def euler_maruyama(x: np.ndarray, z: Callable[[], np.ndarray], top: float, n: int) -> np.ndarray:
    for i in range(n):
        sigma = SIGMA_M * (top / SIGMA_M) ** (1 - i / (n - 1))
        g2 = 2 * sigma**2 * math.log(top / SIGMA_M)
        mean = x + g2 / n * s(x, sigma)
        x = mean + math.sqrt(g2 / n) * z()
    return mean


PUBLISHED = {
    "kar1": kar1,
    "kar2": kar2,
    "probability_flow": probability_flow,
    "reverse_diffusion": reverse_diffusion,
    "euler_maruyama": euler_maruyama,
}


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


def gaussian() -> GaussianDenoiser:
    """Mean 0.65 and deviation 0.25 in [0, 1]."""
    return GaussianDenoiser(torch.full((1, 1, 1), 0.3, dtype=torch.float64), 4 * A2, EDMVarianceExploding(1e3))


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("integrator", PUBLISHED)
@pytest.mark.parametrize(("top", "levels"), [(0.7, 6), (4.0, 19), (50.0, 60), (348.0, 19)])
def test_mean_and_variance_are_the_published_algorithms(data: str, integrator: str, top: float, levels: int) -> None:
    code_n = levels + 1 if integrator.startswith("kar") else levels
    start, draws = np.zeros(levels + 2), iter(range(1, levels + 2))
    start[0] = 1.0
    expected = PUBLISHED[integrator](start, lambda: np.eye(levels + 2)[next(draws)], top, code_n)
    solver = SOLVERS.build(load(name_of(data, integrator)).solver)
    x = torch.full((levels + 3, 1, 1, 1), 0.3, dtype=torch.float64)
    x[1] += 1
    t = torch.full((levels + 3,), 2 * top, dtype=torch.float64)
    found = solver(gaussian(), x, t, UnitNoise(levels + 1), levels).flatten()
    assert found[0].item() == pytest.approx(0.3, abs=1e-12), "the mean stays"
    # A draw of noise in [0, 1] is half of one in [-1, 1].
    coefficients = (found[1:] - found[0]).numpy() / np.array([1.0] + [2.0] * (levels + 1))
    variance = (coefficients**2 * np.array([A2 + top**2] + [1.0] * (levels + 1))).sum()
    assert variance == pytest.approx((expected**2 * np.array([A2 + top**2] + [1.0] * (levels + 1))).sum(), rel=1e-9)
    assert solver.evaluations(levels) == (2 * code_n - 3 if integrator.startswith("kar") else code_n)


@pytest.mark.parametrize("data", DATA)
def test_rk45_solves_the_flow_down_to_the_least_level(data: str) -> None:
    config = load(name_of(data, "rk45"))
    assert config.solver["tol"] == 1e-5 and config.nfe == [math.inf]
    top = torch.tensor([0.7, 4.0, 50.0], dtype=torch.float64)
    x = 0.3 + 2 * top[:, None, None, None]
    found = SOLVERS.build(config.solver)(gaussian(), x, 2 * top, NoiseStreams(0, range(3)), 1).flatten()
    exact = 0.3 + 2 * top * ((A2 + SIGMA_M**2) / (A2 + top**2)).sqrt()
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)


def test_levels_down_to_one() -> None:
    """The code's N = 2 has the grid [sigma_0, 0]."""
    for name in ("kar1", "kar2"):
        solver = SOLVERS.build(load(name_of("cifar10", name)).solver)
        x, t = torch.randn(2, 1, 1, 1, dtype=torch.float64), torch.tensor([3.0, 8.0], dtype=torch.float64)
        torch.testing.assert_close(solver(gaussian(), x, t, NoiseStreams(0, range(2)), 1), gaussian()(x, t).x_0)


# Settings


def build(name: str) -> DenoisingLangevinGibbs:
    with torch.device("meta"):
        method = experiment.build_method(load(name), load=False)
    assert isinstance(method, DenoisingLangevinGibbs)
    return method


@pytest.mark.parametrize(
    ("data", "chains", "burn_in", "warmup", "n", "top"),
    [
        ("cifar10", 200, 57, [(10, 2.0), (10, 2.0)], 50_000, 100.0),
        ("celebahq256", 20, 107, [(50, 6.4), (20, 3.2)], 10_000, 696.0),
    ],
)
def test_settings_of_the_reference(data: str, chains: int, burn_in: int, warmup: list[Any], n: int, top: float) -> None:
    config, method = load(f"{data}/dlg"), build(f"{data}/dlg")
    prior = method.prior
    assert isinstance(prior, LangevinGibbsPrior) and isinstance(prior.posterior, ClassifierPosterior)
    assert (prior.chains_for(config.n), prior.burn_in_per_chain, prior.warmup, config.n) == (chains, burn_in, warmup, n)
    assert (prior.update, prior.carry, prior.select, prior.corrected, prior.renoise) == (
        "argmax",
        True,
        "minimum",
        False,
        1,
    )
    assert isinstance(prior.init_solver, StochasticHeun) and prior.init_solver.evaluations(prior.init_steps) == 37
    assert method.denoiser.ratio_range == (0.02, top)
    network: Any = prior.posterior.network
    with torch.device("meta"):
        assert network.features(torch.empty(2, *config.shape)).shape == (2, 1024)
        assert network(torch.empty(2, *config.shape)).shape == (2, 1000)
    assert not network.normalise and network.strides == ([2] * 4 if data == "cifar10" else [4, 4, 4, 2])


def test_celebahq_at_the_setting_that_the_code_shows() -> None:
    """KAR2 of N = 20 after ten Langevin steps: 47 evaluations, and a Tweedie step that is not counted."""
    method = build("celebahq256/dlg")
    plan = method.sampler.plan(47, 10_000)
    assert (plan.chain_steps, plan.steps) == (10, 19)
    assert method.sampler.planned_nfe(plan, 10_000) == pytest.approx(47 + 107 * 20 / 10_000)


@pytest.mark.parametrize("data", DATA)
def test_ours_has_none_of_the_quirks(data: str) -> None:
    config, method = load(f"{data}/dlg_ours"), build(f"{data}/dlg_ours")
    prior: Any = method.prior
    assert prior.burn_in_counted and not prior.carry and prior.corrected and not config.truncate
    assert method.sampler.tweedie is None and prior.posterior.network.normalise


# Quirks


def counted(**options: Any) -> tuple[DenoisingLangevinGibbs, EvaluationCounter]:
    """Ten images by two rounds of five chains on exact scores."""
    config = load("toy/dlg", [f"{key}={value}" for key, value in options.items() if key.startswith("tweedie")])
    config.prior = {**config.prior, "chains": 5, **{k: v for k, v in options.items() if not k.startswith("tweedie")}}
    method = experiment.build_method(config)
    assert isinstance(method, DenoisingLangevinGibbs)
    plan = method.sampler.plan(9, 10)
    with EvaluationCounter(method.sampler.evaluated_networks()) as counter:
        for group in method.prior.schedule(10, 10):
            list(method.sampler.draw(plan, 0, group, method.sampler.open(plan, 0, group)))
    return method, counter


@pytest.mark.parametrize(("flag", "per_image"), [(True, 9), (False, 10)])
def test_a_tweedie_step_that_is_not_counted(flag: bool, per_image: int) -> None:
    """It is made all the same, beyond the budget, and stands under a name of its own, with its FLOPs."""
    _, counter = counted(tweedie_ratio=0.02, tweedie_counted=flag, burn_in_counted=False)
    marginal = counter.evaluations["denoiser"] - counter.burn_in["denoiser"]
    assert marginal == 10 * 9
    assert counter.evaluations["tweedie"] == 10 * (per_image - 9)
    assert ("tweedie" in counter.flops) == (not flag)


def test_burn_in_that_is_not_counted_is_still_reported() -> None:
    method, counter = counted(burn_in_counted=False)
    assert counter.burn_in["denoiser"] == 5 * method.prior.burn_in_per_chain  # type: ignore[operator]
    assert counter.evaluations["denoiser"] == 10 * 9 + counter.burn_in["denoiser"]


def test_truncation_darkens_by_half_a_level() -> None:
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    exact = (images + 1) * 127.5
    assert (to_uint8(images) - exact).mean().abs() < 0.02
    assert (to_uint8(images, truncate=True) - exact).mean().item() == pytest.approx(-0.5, abs=0.02)


@pytest.mark.parametrize("steps", [150, 250])
def test_churn_over_n_matters_beyond_the_cap(steps: int) -> None:
    """80 / N falls below sqrt(2) - 1 at N = 194, and only there does it matter what N counts."""
    raised: list[list[float]] = []
    for over_n in (False, True):
        told: list[float] = []
        denoiser = gaussian()
        forward = denoiser.forward
        denoiser.forward = lambda x, t, c=None: told.append(t[0].item()) or forward(x, t, c)  # noqa: B023
        solver = StochasticHeun(S_min=0.1, S_max=2.0, S_churn_over_N=over_n)
        solver(denoiser, torch.ones(1, 1, 1, 1).double(), torch.tensor([1.5]).double(), NoiseStreams(0, [0]), steps)
        raised.append(told)
    assert raised[1][0] == pytest.approx(1.5 * (1 + min(80 / (steps + 1), math.sqrt(2) - 1)), rel=1e-9)
    assert (raised[0] == raised[1]) == (steps == 150)


# Bring your own checkpoint


def test_bench_of_a_checkpoint_of_another_program(tmp_path: Path, undrawn: None) -> None:
    """The file says what network it holds; the point says where it comes from, and counts as the paper does."""
    networks = random_network(1, **VE), random_network(2, **VE)
    torch.save(score_sde_content(*networks), tmp_path / "a.pth")
    words = [f"checkpoint={tmp_path / 'a.pth'}", "prior.init_steps=3", "prior.warmup=[[1,2.0]]"]
    classifier = experiment.build_method(load("cifar10/dlg", words)).sampler.auxiliary_networks()["classifier"]
    save_weights(tmp_path / "classifier.safetensors", classifier.state_dict(), {})
    words.append(f"posterior.checkpoint={tmp_path / 'classifier.safetensors'}")
    settings = [f"out={tmp_path / 'out'}", "logger=none", "threads=1", "nfe=10", "n=8", "chains=200"]
    assert main(["bench", "cifar10/dlg", *words, *settings]) == 0
    point = json.loads((tmp_path / "out" / "points.jsonl").read_text())
    assert point["nfe_marginal"] == 10 and point["nfe_burn_in"] == 6 and point["nfe"] == 16
    assert point["evaluations"]["tweedie"] == 8
    source = point["checkpoint"]["source"]
    assert source["format"] == "score_sde_pytorch" and source["weights"] == "ema" and "doubled" in source["units"]
    assert source["sha256"] == point["checkpoint"]["sha256"]
    resolved = load(str(tmp_path / "out" / "config.yaml"))
    assert resolved.network["width"] == 8 and resolved.denoiser["name"] == "ve"


def test_a_converted_checkpoint_brings_its_parts_too(tmp_path: Path) -> None:
    network = random_network(1, **VP)
    torch.save(score_sde_content(network, random_network(2, **VP)), tmp_path / "a.pth")
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "a.safetensors")]) == 0
    for file in ("a.pth", "a.safetensors"):
        method = experiment.build_method(load("cifar10/dlg", [f"checkpoint={tmp_path / file}"]))
        assert method.denoiser.source is not None and not any(p.requires_grad for p in method.denoiser.parameters())
        found = method.denoiser.network.state_dict()
        assert all(torch.equal(value, found[name]) for name, value in network.state_dict().items())
        assert type(method.denoiser).__name__ == "VPDenoiser" and isinstance(
            method.denoiser.process, EDMVarianceExploding
        )
        method.denoiser.check_range(torch.tensor([0.02, 100.0]))


def test_a_checkpoint_of_other_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(score_sde_content(random_network(1, **VE), random_network(2, **VE)), tmp_path / "a.pth")
    assert main(["bench", "celebahq256/dlg", f"checkpoint={tmp_path / 'a.pth'}", "dry_run=true"]) == 2
    assert "makes images of shape (3, 32, 32)" in capsys.readouterr().err


def test_a_grid_below_what_a_checkpoint_is_trained_on(tmp_path: Path) -> None:
    torch.save(score_sde_content(random_network(1, **VE), random_network(2, **VE)), tmp_path / "a.pth")
    words = [f"checkpoint={tmp_path / 'a.pth'}"]
    with pytest.raises(UsageError, match=r"solver.grid.ratio_min=0.02"):
        experiment.build_method(load("cifar10/edm", words))
    experiment.build_method(load("cifar10/edm", [*words, "solver.grid.name=karras", "solver.grid.ratio_min=0.02"]))
