"""Small T: starts at a density, right or wrong, through SDE and ODE; and what is fitted, drawn and counted."""

import math

import pytest
import torch
from oracles import BatchedNoise, DiagonalMixture, assemble, three_modes
from torch import nn

from diffaccel.data import Batch
from diffaccel.denoiser import EpsDenoiser, KarrasDenoiser, MixtureDenoiser
from diffaccel.denoiser.levels import LogUniform, Uniform
from diffaccel.density import TrainingImages
from diffaccel.errors import UsageError
from diffaccel.evaluation.likelihood import score_matching
from diffaccel.methods import SmallTimeDiffusion, Training
from diffaccel.nfe import EvaluationCounter
from diffaccel.nn import MLP, UNet
from diffaccel.noise import NoiseStreams
from diffaccel.prior import DensityPrior, GaussianPrior
from diffaccel.process import EDMVarianceExploding, VariancePreserving
from diffaccel.solver import SOLVERS

ANCESTRAL = {"name": "ddim", "eta": 1.0, "denoise": False, "grid": {"name": "log_snr", "ratio_min": 0.001}}
ODE = {"name": "heun", "denoise": False, "grid": {"name": "log_snr", "ratio_min": 0.001}}
SHAPE = (1, 8, 8)


def run(truth, prior, solver, n: int, steps: int) -> torch.Tensor:
    """Samples (n, D) float64."""
    noise = BatchedNoise(n)
    x_t, t = prior(truth, noise, (truth.size, 1, 1))
    x_t = x_t.double() if isinstance(truth, DiagonalMixture) else x_t.float()
    return SOLVERS.build(solver)(truth, x_t, t, noise, steps).flatten(1).double()


# A start that is wrong, or right (closed forms and golden values)


@pytest.mark.parametrize(
    ("variance", "sde", "ode"),
    [(0.25, (0.6749, 0.3293), (0.4298, 0.4938)), (4.0, (0.1148, 1.6494), (0.0592, 1.3445))],
)
def test_what_a_wrong_start_costs_one_gaussian(variance, sde, ode):
    """Mean and variance from N(0, 1) at T = 0.2 for data N(1, variance): the ODE keeps its error."""
    truth = DiagonalMixture([1.0], [[1.0]], [[variance]])
    prior, n = truth.normal_prior(0.2), 10_000
    x = run(truth, prior, ANCESTRAL, n, 120)
    se = x.std().item() / n**0.5
    assert x.mean().item() == pytest.approx(sde[0], abs=4 * se + 0.002)
    assert x.var().item() == pytest.approx(sde[1], abs=4 * sde[1] * (2 / n) ** 0.5 + 0.004)
    # The ODE is affine in its start: two points fix it.
    t = truth.process.time(torch.full((2,), prior.ratio_star, dtype=torch.float64))
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    low, high = SOLVERS.build(ODE)(truth, ends, t, BatchedNoise(2), 200).flatten().tolist()
    assert (low, (high - low) ** 2) == pytest.approx(ode, abs=1e-3)


def modes(x: torch.Tensor) -> torch.Tensor:
    """Share of the samples nearest to each of the three modes."""
    return torch.cdist(x, three_modes().means).argmin(1).bincount(minlength=3) / len(x)


@pytest.mark.parametrize("T", [0.2, 0.6])
def test_from_the_true_law_samples_are_the_data_s_at_any_T(T):
    truth, n = three_modes(), 8_000
    x = run(truth, truth.exact_prior(T), ANCESTRAL, n, 80)
    assert torch.allclose(modes(x), torch.tensor([0.5, 0.3, 0.2]), atol=0.02)
    mean, covariance = truth.moments
    assert torch.allclose(x.mean(0), mean, atol=0.07)
    assert torch.allclose(torch.cov(x.T), covariance, atol=0.1)


@pytest.mark.parametrize(
    ("T", "solver", "fractions", "log_prob"),
    [
        (0.2, ANCESTRAL, (0.368, 0.395, 0.237), -1.876),
        (0.2, ODE, (0.361, 0.405, 0.235), -2.515),
        (0.4, ANCESTRAL, (0.444, 0.331, 0.226), None),
    ],
)
def test_from_white_noise_they_are_not(T, solver, fractions, log_prob):
    truth, n = three_modes(), 8_000
    x = run(truth, truth.normal_prior(T), solver, n, 80 if solver is ANCESTRAL else 30)
    assert torch.allclose(modes(x), torch.tensor(fractions), atol=0.022)
    assert not torch.allclose(modes(x), torch.tensor([0.5, 0.3, 0.2]), atol=0.04)
    if log_prob is not None:
        found = truth.log_prob(x[:, :, None, None], torch.zeros(n).double())
        assert found.mean().item() == pytest.approx(log_prob, abs=0.08)


@pytest.mark.parametrize("T", [0.2, 0.4])
def test_the_density_is_in_the_network_s_coordinates(T):
    """Integrals over x = alpha y are one, on VP and on VE alike, where the same level has other coordinates."""
    for process in (VariancePreserving(), EDMVarianceExploding()):
        truth = three_modes(process)
        level = VariancePreserving().ratio(torch.tensor(T)).item() if process.t_max > 1 else T
        prior = truth.exact_prior(level)
        side = torch.linspace(-12, 12, 200, dtype=torch.float64)
        x = torch.cartesian_prod(side, side)[:, :, None, None]
        assert prior.log_prob(truth, x).exp().sum().item() * (24 / 199) ** 2 == pytest.approx(1, abs=1e-3)


def test_the_gaussian_prior_has_its_own_density():
    truth = three_modes()
    truth.ratio_range = (0.0, 20.0)
    x = torch.randn(5, 2, 1, 1, dtype=torch.float64)
    for prior, ratio in ((GaussianPrior(), 20.0), (GaussianPrior(1.5), 1.5)):
        sigma = truth.process.sigma(truth.process.time(torch.tensor(ratio).double()))
        law = torch.distributions.Normal(torch.zeros(2).double(), sigma)
        assert prior.start_ratio(truth) == pytest.approx(ratio)
        assert torch.allclose(prior.log_prob(truth, x), law.log_prob(x.flatten(1)).sum(1))


# Levels, draws and counts


def network(process=None, kind=KarrasDenoiser):
    torch.manual_seed(0)
    net = UNet(SHAPE, widths=[8, 8], blocks=1, embedding=8)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return kind(net, process or VariancePreserving())


def small_t(model=None, density=None, T=0.6, levels=None, **options) -> SmallTimeDiffusion:
    model = model or network()
    prior = DensityPrior(model, SHAPE, density or {"name": "gaussian"}, T=T)
    solver = SOLVERS.build({"name": "dpmpp2m"})
    return assemble(
        SmallTimeDiffusion,
        model,
        prior,
        solver,
        levels or Uniform(),
        Training(batch_size=64),
        SHAPE,
        **{"frozen": True, **options},
    )


def fitted(method: SmallTimeDiffusion) -> SmallTimeDiffusion:
    method.density.fit(TrainingImages(lambda rank, world: iter([(0, torch.rand(200, *SHAPE))])))
    return method


def batch(count: int = 64, first: int = 0) -> Batch:
    return Batch(torch.rand(count, *SHAPE) * 2 - 1, None, torch.arange(first, first + count))


def test_T_is_a_time_of_the_process():
    assert small_t(T=0.4).prior.ratio_star == pytest.approx(0.8969 / 0.4422, rel=1e-3)
    assert DensityPrior(network(EDMVarianceExploding()), SHAPE, T=2.0).ratio_star == 2.0
    assert DensityPrior(network(), SHAPE, ratio_star=2.0).ratio_star == 2.0
    for options in ({}, {"T": 0.4, "ratio_star": 2.0}):
        with pytest.raises(UsageError, match="either ratio_star or T"):
            DensityPrior(network(), SHAPE, **options)
    with pytest.raises(UsageError, match="must be positive and finite"):
        DensityPrior(network(), SHAPE, T=0.0)


def test_times_stay_within_T_and_what_is_reported_is_what_the_networks_saw():
    method, T = fitted(small_t(density={"name": "mixture", "components": 2, "rank": 4})), 0.6
    seen = []
    method.denoiser.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    plan = method.sampler.plan(8, 6)
    assert plan.steps == 7 and method.sampler.planned_nfe(plan, 6) == 8
    with EvaluationCounter(method.sampler.evaluated_networks()) as counter:
        for group in method.prior.schedule(6, 3):
            for _ in method.sampler.draw(plan, 0, group, method.sampler.open(plan, 0, group)):
                pass
    assert dict(counter.evaluations) == {"denoiser": 42, "density": 6}
    assert counter.flops["density"] > 2 * 64 * 64, "the basis alone is a matrix product"
    times = method.denoiser.process.time((4 * torch.cat(seen).double()).exp())
    assert times.min() > 0 and times.max().item() == pytest.approx(T, rel=1e-3)


def test_white_noise_is_no_evaluation():
    method = small_t(density={"name": "normal"})
    assert method.sampler.planned_nfe(method.sampler.plan(8, 6), 6) == 8 and method.sampler.plan(8, 6).steps == 8
    assert list(method.sampler.evaluated_networks()) == ["denoiser"]


def test_an_image_belongs_to_its_stream():
    method = fitted(small_t(density={"name": "mixture", "components": 2, "rank": 4}))
    draw = lambda index: method.prior(method.denoiser, NoiseStreams(0, index), SHAPE)[0]  # noqa: E731
    assert torch.allclose(draw([3, 4, 5])[1], draw([4])[0], atol=1e-6)


def test_a_draw_is_as_exact_under_autocast():
    method = fitted(small_t())
    draw = lambda: method.prior(method.denoiser, NoiseStreams(0, range(4)), SHAPE)[0]  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16):
        mixed = draw()
        log_prob = method.prior.log_prob(method.denoiser, mixed)
    assert torch.equal(mixed, draw()) and torch.equal(log_prob, method.prior.log_prob(method.denoiser, mixed))


def test_an_unfitted_density_is_refused():
    method = small_t()
    with pytest.raises(UsageError, match="not fitted"):
        method.prior(method.denoiser, NoiseStreams(0, range(2)), SHAPE)


# Training


def drawn(method: SmallTimeDiffusion, data: Batch, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Training times of a batch and their weights."""
    return method.times(method.level_quantiles(data, NoiseStreams(0, range(first, first + len(data.index)))))


def test_a_trained_denoiser_is_trained_up_to_T():
    method = small_t(network(kind=EpsDenoiser), frozen=False)
    low, high = method.denoiser.ratio_range
    assert high == method.prior.ratio_star
    t, weight = drawn(method, batch())
    assert 0 < t.min() < 0.02 and 0.58 < t.max() <= 0.6 and weight.eq(1).all()
    kept = network(kind=EpsDenoiser)
    assert small_t(kept).denoiser.ratio_range[1] > 100, "a frozen one keeps its range"


def test_stratified_times_are_one_of_each_share_whatever_the_process():
    method = small_t(network(kind=EpsDenoiser), frozen=False)
    low, high = method.denoiser.process.time(torch.tensor(method.denoiser.ratio_range).double())
    halves = [drawn(method, batch(32, first), first)[0] for first in (64, 96)]
    share = ((torch.cat(halves) - low) / (high - low) * 64).floor()
    assert share.sort().values.tolist() == list(range(64))
    method.stratified = False
    share = ((drawn(method, batch())[0] - low) / (high - low) * 64).floor()
    assert len(share.unique()) < 60


@pytest.mark.parametrize("levels", [Uniform(), LogUniform()])
def test_the_likelihood_s_weight_makes_the_loss_the_bound_s_term(levels):
    """Mean loss times D is I(T) for any levels, and for log-uniform ones the weight is Z / 2."""
    truth, T = three_modes(), 0.6
    truth.ratio_range = (0.05, 10.0)
    prior = DensityPrior(truth, (2, 1, 1), T=T)
    solver, options = SOLVERS.build({"name": "ddim"}), {"weighting": "likelihood", "stratified": False}
    method = assemble(SmallTimeDiffusion, truth, prior, solver, levels, Training(), (2, 1, 1), **options)
    n = 40_000
    data = Batch(truth.sample(n), None, torch.arange(n))
    loss = 2 * method.denoiser_loss(data, BatchedNoise(n))
    expected = score_matching(truth, data.image, 0.05, torch.tensor([prior.ratio_star]), BatchedNoise(n), 4)[:, 0]
    assert abs(loss.mean() - expected.mean()) < 4 * (loss.var() / n + expected.var() / n) ** 0.5
    if isinstance(levels, LogUniform):
        assert method.times(BatchedNoise(n).uniform())[1].allclose(
            torch.tensor(math.log(prior.ratio_star / 0.05)).double()
        )


@pytest.mark.parametrize(("density", "frozen"), [("flow", True), ("flow", False), ("gaussian", False)])
def test_each_phase_moves_its_own_parameters_alone(density, frozen):
    method = fitted(small_t(density={"name": density}, frozen=frozen))
    optimizers = method.configure_optimizers()
    names = [phase.name for phase in method._phases]
    assert names == ["denoiser"] * (not frozen) + ["density"] * (density == "flow")
    for phase, optimizer in zip(method._phases, optimizers, strict=True):
        before = {name: parameter.clone() for name, parameter in method.named_parameters()}
        phase.loss(batch(), NoiseStreams(0, range(64))).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {name.split(".")[0] for name, one in method.named_parameters() if not torch.equal(one, before[name])}
        assert moved == {"denoiser" if phase.name == "denoiser" else "prior"}


@pytest.mark.parametrize(
    ("density", "frozen", "names"),
    [("flow", True, {"density"}), ("flow", False, {"denoiser", "density"}), ("gaussian", False, {"denoiser"})],
)
def test_what_is_trained_by_steps_is_averaged(density, frozen, names):
    method = small_t(density={"name": density}, frozen=frozen)
    assert {name.split(".")[0] for name, _ in method.averaged().named_parameters()} == names


def test_a_density_learns_the_law_at_its_own_level_and_rate(monkeypatch):
    """y = x_0 + ratio eps, with each image's own noise."""
    method, seen = fitted(small_t(density={"name": "flow"}, density_lr=0.3)), []
    (phase,) = method.phases()
    assert phase.lr == 0.3
    monkeypatch.setattr(method.density, "loss", lambda y: seen.append(y) or y.flatten(1).sum(1))
    images = batch()
    phase.loss(images, NoiseStreams(0, range(64)))
    noise = NoiseStreams(0, range(64)).normal(images.image)
    torch.testing.assert_close(seen[0], images.image + method.prior.ratio_star * noise)


def test_what_is_left_on_disk():
    names = {density: set(fitted(small_t(density={"name": density})).exports()) for density in ("flow", "gaussian")}
    assert names == {"flow": {"density"}, "gaussian": {"density"}}
    trained = small_t(frozen=False).exports()
    assert set(trained) == {"density", "raw", "ema"}
    assert trained["density"][1]["dtype"] == "float32" and trained["density"][1]["any_level"]


def test_what_does_not_go_together_is_refused():
    exact = MixtureDenoiser(torch.zeros(1, *SHAPE), 0.1, process=VariancePreserving())
    with pytest.raises(UsageError, match="denoiser of this experiment is exact"):
        small_t(exact, frozen=False).phases()
    with pytest.raises(UsageError, match="outside the denoiser.s range"):
        small_t(T=1.0)
    method = small_t()
    method.prior = GaussianPrior()
    with pytest.raises(UsageError, match="set prior=density"):
        method.phases()


# A minute of learning


@pytest.mark.slow
def test_a_learned_score_and_a_learned_start():
    """Three modes: a small network on [0, 1], a flow at T = 0.4, and what the two give from it and from white noise."""
    from diffaccel.density import DENSITIES
    from diffaccel.evaluation.likelihood import bound

    truth, steps = three_modes(), 3000
    model = EpsDenoiser(MLP((2, 1, 1), 128, 3), truth.process, ratio_min=0.0105)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + math.cos(math.pi * step / steps))
        x_0 = truth.sample(512).float()
        t = (torch.arange(512) + torch.rand(512)) / 512 * 0.999 + 1e-3
        optimizer.zero_grad()
        model.loss(x_0, t.double(), torch.randn_like(x_0)).mean().backward()
        optimizer.step()
    exact = truth.exact_prior(0.4)
    flow = DENSITIES.build({"name": "flow", "transforms": 3, "width": 64}, shape=(2, 1, 1), ratio=exact.ratio_star)
    flow.fit(TrainingImages(lambda rank, world: iter([(0, truth.sample(10_000).float())])))
    optimizer = torch.optim.Adam(flow.parameters(), 2e-3)
    for step in range(1500):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + math.cos(math.pi * step / 1500))
        x_0 = truth.sample(512).float()
        optimizer.zero_grad()
        flow.loss(x_0 + flow.ratio * torch.randn_like(x_0)).mean().backward()
        optimizer.step()
    prior = DensityPrior(truth, (2, 1, 1), {"name": "normal"}, T=0.4)
    prior.density = flow
    x_T = truth.sample(40_000).float() + flow.ratio * torch.randn(40_000, 2, 1, 1)
    with torch.no_grad():
        gap = exact.density.log_prob(x_T.double()) - flow.log_prob(x_T)
    assert -0.01 < gap.mean() < 0.03, "0.0007 is the recipe's"
    model.size, solver = 2, {**ANCESTRAL, "grid": {"name": "log_snr", "ratio_min": 0.0105}}
    assert torch.allclose(modes(run(model, prior, solver, 10_000, 150)), torch.tensor([0.5, 0.3, 0.2]), atol=0.03)
    wrong = modes(run(model, truth.normal_prior(0.4).float(), solver, 10_000, 150))
    assert torch.allclose(wrong, torch.tensor([0.438, 0.337, 0.225]), atol=0.03)
    times, n = (0.2, 0.4, 0.8), 20_000
    ratios = [truth.process.ratio(torch.tensor(T).double()).item() for T in times]
    laws = {"normal": [lambda x, T=T: truth.normal_prior(T).log_prob(truth, x.double()) for T in times]}
    curve = bound(model, laws, truth.sample(n).float(), 0.0105, ratios, BatchedNoise(n)).total("normal").mean(0)
    assert curve[0] + 0.4 < curve[1] < curve[2] < -1.6, "-2.328, -1.726, -1.673 were measured"
