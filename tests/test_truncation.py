"""Truncated chains by closed forms: the golden schedule, tokens, budgets, oracle denoisers, both ends of K."""

import math

import pytest
import torch
from oracles import assemble, plan_of, split
from torch import Tensor, nn

from diffaccel.data import Batch
from diffaccel.denoiser import EpsDenoiser, GaussianDenoiser, KarrasDenoiser, MixtureDenoiser
from diffaccel.denoiser.levels import Index, LogNormal
from diffaccel.errors import UsageError
from diffaccel.methods import Diffusion, Training, TruncatedDiffusion
from diffaccel.nfe import EvaluationCounter
from diffaccel.nn import DDPMUNet, UNet
from diffaccel.noise import NoiseStreams
from diffaccel.prior import GaussianPrior, ImplicitPrior
from diffaccel.process import DiscreteVariancePreserving, EDMVarianceExploding, VariancePreserving
from diffaccel.solver import GRIDS, SOLVERS, Indices

PROCESS = DiscreteVariancePreserving()
TABLE = [  # index, alpha bar, sqrt(1 - alpha bar)
    (0, 0.999900, 0.0100),
    (1, 0.999780, 0.0148),
    (3, 0.999481, 0.0228),
    (4, 0.999301, 0.0264),
    (49, 0.971016, 0.1702),
    (50, 0.969951, 0.1733),
    (99, 0.897018, 0.3209),
    (100, 0.895142, 0.3238),
    (499, 0.078587, 0.9599),
    (999, 4.036e-5, 0.99998),
]


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# The discrete process


@pytest.mark.parametrize(("index", "alpha_bar", "sigma"), TABLE)
def test_schedule_is_the_papers(index: int, alpha_bar: float, sigma: float):
    assert PROCESS.alpha(f64(index)).square().item() == pytest.approx(alpha_bar, abs=1e-6 if index < 999 else 1e-8)
    assert PROCESS.sigma(f64(index)).item() == pytest.approx(sigma, abs=6e-5)


def test_schedule_is_the_product_of_alphas():
    beta = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    alpha_bar = f64(*(math.prod(1 - b for b in beta[: i + 1]) for i in range(1000)))
    index = torch.arange(1000).double()
    torch.testing.assert_close(PROCESS.alpha(index).square(), alpha_bar, rtol=1e-11, atol=0)
    torch.testing.assert_close(PROCESS.sigma(index).square(), 1 - alpha_bar, rtol=1e-9, atol=0)


def test_index_minus_one_is_the_data():
    assert PROCESS.alpha(f64(-1)).item() == 1 and PROCESS.sigma(f64(-1)).item() == 0
    assert PROCESS.time(f64(0.0)).item() == -1


def test_times_invert_ratios_between_indices_and_beyond():
    index = torch.arange(1000).double()
    torch.testing.assert_close(PROCESS.time(PROCESS.ratio(index)), index, rtol=0, atol=1e-9)
    ratio = torch.logspace(-4, 2.5, 200, dtype=torch.float64)
    torch.testing.assert_close(PROCESS.ratio(PROCESS.time(ratio)), ratio, rtol=1e-8, atol=0)
    times = PROCESS.time(ratio)
    assert (times.diff() > 0).all() and times[-1] > 999


def test_drift_and_diffusion_between_indices():
    t = f64(0.25, 49.5, 700.7).requires_grad_()
    (slope,) = torch.autograd.grad(PROCESS.alpha(t).log().sum(), t)
    torch.testing.assert_close(PROCESS.drift(t.detach()), slope)
    (slope,) = torch.autograd.grad(PROCESS.ratio(t).square().sum(), t)
    expected = (PROCESS.alpha(t).square() * slope).sqrt().detach()
    torch.testing.assert_close(PROCESS.diffusion(t.detach()), expected)


def test_variance_at_a_level():
    x_0, eps = 0.6 * torch.randn(4000, 3, 2, 2) + 0.1, torch.randn(4000, 3, 2, 2)
    x_t = PROCESS.marginal(x_0, torch.full((4000,), 99.0), eps)
    assert x_t.var().item() == pytest.approx(0.897018 * x_0.var().item() + 1 - 0.897018, rel=0.01)


@pytest.mark.parametrize("keys", [{"steps": 0}, {"beta_0": 0.0}, {"beta_0": 0.03}])
def test_a_schedule_that_is_none(keys: dict[str, float]):
    with pytest.raises(UsageError, match="vp_discrete"):
        DiscreteVariancePreserving(**keys)


# Indices as levels and as grid


def eps_denoiser(K: int = 0, width: int = 8, shape: tuple[int, int, int] = (1, 16, 16)) -> EpsDenoiser:
    network = DDPMUNet(shape, width=width, multipliers=[1, 2], blocks=1, attention=[], dropout=0.0, groups=4)
    top = PROCESS.ratio(f64(K - 1)).item() if K else math.inf
    return EpsDenoiser(network, PROCESS, ratio_max=top, time_scale=1.0)


def test_training_indices_are_0_to_K_less_1():
    for K in (1, 4, 50, 1000):
        levels = Index()(eps_denoiser(K), torch.linspace(0, 1, 5001, dtype=torch.float64))
        assert levels.unique().tolist() == list(range(K))
    counts = Index()(eps_denoiser(4), torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1]).long().bincount()
    assert counts.tolist() == [1000] * 4
    with pytest.raises(UsageError, match="process=vp_discrete"):
        Index()(MixtureDenoiser(torch.zeros(1, 1, 2, 2), 1.0), f64(0.5))


@pytest.mark.parametrize(
    ("start", "steps", "expected"),
    [(99, 5, [99, 74, 50, 25, 0]), (99, 1, [99]), (3, 4, [3, 2, 1, 0]), (0, 1, [0]), (999, 2, [999, 0])],
)
def test_grid_of_indices(start: int, steps: int, expected: list[int]):
    times = Indices()(PROCESS, f64(start, start), steps)
    assert times[:, 0].tolist() == [*expected, -1] and torch.equal(times[:, 0], times[:, 1])


def test_grid_of_indices_refuses():
    with pytest.raises(UsageError, match="more than 4 steps from index 3"):
        Indices()(PROCESS, f64(3.0), 5)
    with pytest.raises(UsageError, match="vp_discrete"):
        Indices()(EDMVarianceExploding(), f64(3.0), 2)


# Tokens and evaluations


def tdpm(K: int, solver: dict[str, object], offset: int = 0, **options: object) -> TruncatedDiffusion:
    torch.manual_seed(0)
    model = eps_denoiser()
    prior = ImplicitPrior(model, generator="shared", K=K, prior_level_offset=offset)
    critic = {"name": "stylegan2", "channel_base": 128, "channel_max": 8}
    training = Training(pixel_sum=True, antithetic=True)
    return assemble(
        TruncatedDiffusion,
        model,
        prior,
        SOLVERS.build(solver),
        Index(),
        training,
        (1, 16, 16),
        critic=critic,
        **options,
    )  # type: ignore[arg-type]


def tokens_of(method: TruncatedDiffusion, budget: float) -> list[int]:
    """What the network is told at each call for 3 images, which must be one thing for all of them."""
    seen: list[Tensor] = []
    hook = method.denoiser.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    plan = method.sampler.plan(budget, 3)
    with EvaluationCounter(method.sampler.evaluated_networks()) as counter:
        ((_, images),) = method.sampler.draw(plan, 0, [range(3)])
    hook.remove()
    assert images.shape == (3, 1, 16, 16) and images.isfinite().all()
    assert all((token == token[0]).all() and len(token) == 3 for token in seen)
    assert counter.evaluations["denoiser"] == 3 * len(seen) == 3 * method.sampler.planned_nfe(plan, 3)
    return [int(token[0]) for token in seen]


ANCESTRAL = {"name": "ancestral", "clip": True, "grid": {"name": "index"}}


@pytest.mark.parametrize(("K", "variance"), [(0, "large"), (1, "large"), (4, "small"), (50, "large")])
def test_tokens_go_from_K_to_0(K: int, variance: str):
    method = tdpm(K, {**ANCESTRAL, "variance": variance})
    assert tokens_of(method, K + 1) == list(range(K, -1, -1))
    assert tokens_of(method, K + 7) == list(range(K, -1, -1)), "more than K + 1 can't be spent"


def test_tokens_of_a_shorter_chain():
    method = tdpm(100, {"name": "ddim", "grid": {"name": "index"}})
    assert tokens_of(method, 6) == [100, 99, 74, 50, 25, 0]
    assert tokens_of(method, 2) == [100, 99]


def test_any_solver_goes_on_from_there():
    method = tdpm(50, {"name": "heun"})
    assert tokens_of(method, 6)[:2] == [50, 49]
    with pytest.raises(UsageError, match="minimum of 2"):
        method.sampler.plan(1, 3)


def test_a_whole_chain_has_a_token_beyond_its_indices():
    assert tokens_of(tdpm(1000, {"name": "ddim", "grid": {"name": "index"}}), 4) == [1000, 999, 500, 0]


@pytest.mark.parametrize(
    ("keys", "process", "message"),
    [
        ({"K": 1001}, PROCESS, "0 to 999"),
        ({"K": -1}, PROCESS, "0 to 999"),
        ({"K": 1000, "prior_level_offset": 1}, PROCESS, "must be an index"),
        ({"K": 5, "ratio_star": 1.0}, PROCESS, "set one of them"),
        ({"K": 5}, VariancePreserving(), "K requires process=vp_discrete and excludes ratio_star"),
        ({"prior_level_offset": 1}, PROCESS, "requires K: set K"),
        ({"level_scale": 0.0}, PROCESS, "level_scale is 0, it must be positive"),
        ({"level_scale": math.nan}, PROCESS, "level_scale is nan"),
        ({"K": 5, "level_scale": 0.9}, PROCESS, "level_scale is 0.9, it must be positive, and 1 if K is set"),
        ({"ratio_star": -1.0}, PROCESS, "must not be negative"),
        ({"generator": "shared", "network": {"name": "mlp"}, "token": 1.0}, PROCESS, "remove prior.network"),
    ],
)
def test_levels_that_are_refused(keys: dict[str, object], process: object, message: str):
    model = KarrasDenoiser(UNet((1, 8, 8), [8], blocks=1, embedding=8), process)
    with pytest.raises(UsageError, match=message):
        ImplicitPrior(model, shape=(1, 8, 8), **keys)


@pytest.mark.parametrize("process", [EDMVarianceExploding(), VariancePreserving()], ids=repr)
def test_a_lower_level_keeps_more_of_what_states_have(process: object):
    """States of variance v' + r^2 and the exact x_0 of N(0, v): what is left of it is known, and one level gives v."""
    v, less, ratio = 0.25, 0.2, 0.5  # the generator's images vary too little
    denoiser = GaussianDenoiser(torch.zeros(1, 8, 8), v, process)
    right = ((v * (less + ratio**2)) ** 0.5 - v) ** 0.5 / ratio
    for level_scale in (1.0, 0.9, right):
        prior = ImplicitPrior(denoiser, ratio, network={"name": "mlp"}, shape=(1, 8, 8), level_scale=level_scale)
        y = (less + ratio**2) ** 0.5 * torch.randn(400, 1, 8, 8)
        prior.generate = lambda *_, y=y: y
        x_t, t = prior(denoiser, NoiseStreams(0, range(400)), (1, 8, 8))
        torch.testing.assert_close(process.ratio(t), torch.full_like(t, level_scale * ratio))
        slope = v / (v + (level_scale * ratio) ** 2)
        torch.testing.assert_close(denoiser(x_t, t).x_0, slope * y)
    assert slope**2 * (less + ratio**2) == pytest.approx(v), "a level that makes up for it"


# An oracle denoiser behind right and wrong priors

MEANS = torch.tensor([[0.7, 0.6], [-0.6, 0.7], [-0.7, -0.5], [0.5, -0.7]])[:, :, None, None]
WEIGHTS = torch.tensor([0.4, 0.3, 0.2, 0.1])  # unequal: behind symmetry denoising hides a wrong prior
N = 10_000


class Noise:
    """NoiseStreams from the global generator, where draws need not be told apart."""

    def normal(self, like: Tensor) -> Tensor:
        return torch.randn_like(like)


def stratified(std: float) -> Tensor:
    modes = torch.arange(4).repeat_interleave((N * WEIGHTS).long())
    return MEANS[modes] + std * torch.randn(N, 2, 1, 1)


def real_states(K: int, offset: int = 0, std: float = 0.05) -> Tensor:
    x_0 = stratified(std)
    return PROCESS.marginal(x_0, torch.full((N,), K - 1.0 + offset).double(), torch.randn_like(x_0))


def denoised(x: Tensor, K: int, variance: str = "large", std: float = 0.05) -> Tensor:
    """All K ancestral steps of the exact denoiser from states that it takes for those of index K - 1."""
    oracle = MixtureDenoiser(MEANS, std**2, WEIGHTS, PROCESS)
    solver = SOLVERS.build({"name": "ancestral", "variance": variance, "grid": {"name": "index"}})
    return solver(oracle, x, torch.full((N,), K - 1.0).double(), Noise(), K)


def modes(x: Tensor) -> tuple[float, float]:
    """Standard deviation within modes, and total variation of the modes' weights."""
    nearest = (x - MEANS[:, None]).square().sum((2, 3, 4)).argmin(0)
    weights = nearest.bincount(minlength=4) / len(x)
    within = torch.cat([x[nearest == k] - x[nearest == k].mean(0) for k in range(4)])
    return within.std().item(), 0.5 * (weights - WEIGHTS).abs().sum().item()


def sliced_w2(a: Tensor, b: Tensor) -> float:
    """Sliced Wasserstein-2 distance of two samples of points, over 64 directions."""
    angle = torch.arange(64, dtype=a.dtype) * torch.pi / 64
    directions = torch.stack([angle.cos(), angle.sin()])
    gap = (a.flatten(1) @ directions).sort(0).values - (b.flatten(1) @ directions).sort(0).values
    return gap.square().mean().sqrt().item()


@pytest.mark.parametrize(
    ("K", "variance", "std"),
    [(1, "large", 0.0489), (100, "large", 0.0503), pytest.param(100, "small", 0.0464, marks=pytest.mark.slow)],
)
def test_exact_prior_and_oracle_give_the_data(K: int, variance: str, std: float):
    found, variation = modes(denoised(real_states(K), K, variance))
    assert found == pytest.approx(std, abs=5e-4 + 3e-4)  # the table's own uncertainty, and one draw's
    assert variation < 0.01


@pytest.mark.parametrize(
    ("K", "kind", "prior", "final"),
    [
        (5, "normal", 0.56, 0.47),
        pytest.param(100, "normal", 0.42, 0.30, marks=pytest.mark.slow),
        (5, "matched", 0.26, 0.22),
        (50, "matched", 0.18, 0.11),
        pytest.param(100, "matched", 0.11, 0.09, marks=pytest.mark.slow),
    ],
)
def test_a_wrong_prior_shows_behind_the_oracle(K: int, kind: str, prior: float, final: float):
    x, real = torch.randn(N, 2, 1, 1), real_states(K)
    if kind == "matched":
        x = real.mean(0) + (x.flatten(1) @ torch.linalg.cholesky(real.flatten(1).T.cov()).T).reshape(x.shape)
    assert sliced_w2(x, real) == pytest.approx(prior, abs=0.015)
    made = denoised(x, K)
    assert sliced_w2(made, stratified(0.05)) == pytest.approx(final, abs=0.015)
    if (K, kind) == (100, "normal"):
        assert modes(made)[1] == pytest.approx(0.19, abs=0.02)


@pytest.mark.parametrize(("offset", "std"), [(0, 0.0070), (1, 0.0089)])
def test_off_by_one_shows(offset: int, std: float):
    found, _ = modes(denoised(real_states(1, offset, std=0.01), 1, std=0.01))
    assert found == pytest.approx(std, abs=1e-4)


@pytest.mark.parametrize("offset", [0, 1])
def test_the_offset_moves_the_critics_states_and_not_the_start(offset: int):
    method = tdpm(4, ANCESTRAL, offset)
    batch, noise = Batch(torch.zeros(64, 1, 16, 16), None, torch.arange(64)), NoiseStreams(0, range(64))
    ratio = PROCESS.ratio(f64(3.0 + offset)).item()
    assert method.diffused(batch.image, noise).std().item() == pytest.approx(ratio, rel=0.02)
    x_t, t = method.prior(method.denoiser, NoiseStreams(0, range(2)), (1, 16, 16))
    assert torch.allclose(t, f64(3, 3))
    z = NoiseStreams(0, range(2)).normal(x_t)
    assert torch.allclose(x_t, method.denoiser.network(z, torch.full((2,), 4.0)), atol=1e-5), "handed over as it is"


# Both ends of K


def diffusion(method: type[Diffusion], T: int) -> Diffusion:
    torch.manual_seed(0)
    process = DiscreteVariancePreserving(T)
    network = DDPMUNet((1, 8, 8), width=8, multipliers=[1, 2], blocks=1, attention=[], groups=4)
    model = EpsDenoiser(network, process, time_scale=1.0)
    solver = SOLVERS.build({"name": "ancestral", "variance": "large", "clip": True, "grid": {"name": "index"}})
    return assemble(
        method, model, GaussianPrior(), solver, Index(), Training(antithetic=True, pixel_sum=True), (1, 8, 8), seed=3
    )


def step(method: Diffusion, batch: Batch) -> tuple[Tensor, list[str]]:
    """One optimiser step of each phase; the losses, and the phases' names."""
    noise, losses = NoiseStreams(3, batch.index, "training"), []
    optimizers = method.configure_optimizers()
    for phase, optimizer in zip(method._phases, optimizers, strict=True):
        torch.manual_seed(0)  # dropout
        losses.append(phase.loss(batch, noise))
        losses[-1].mean().backward()
        optimizer.step()
    return torch.stack(losses), [phase.name for phase in method._phases]


@pytest.mark.parametrize("T", [20, 1000])
def test_a_whole_chain_from_a_gaussian_is_plain_diffusion_bit_for_bit(T: int):
    batch = Batch(torch.randn(8, 1, 8, 8).clamp(-1, 1), None, torch.arange(8))
    ours, plain = diffusion(TruncatedDiffusion, T), diffusion(Diffusion, T)
    (loss, names), (expected, _) = step(ours, batch), step(plain, batch)
    assert names == ["denoiser"] and not any("critic" in name for name in ours.state_dict())
    assert torch.equal(loss, expected)
    plan = ours.sampler.plan(20, 4)
    assert split(plan) == split(plain.sampler.plan(20, 4)) == (20, 0)
    made, expected = (next(m.eval().sampler.draw(plan_of(m, 20), 0, [range(4)]))[1] for m in (ours, plain))
    assert torch.equal(made, expected)


def test_plain_diffusion_is_ddpms_algorithm():
    """The reference's loop, with the same noise."""
    method = diffusion(TruncatedDiffusion, 20).eval()
    ((_, made),) = method.sampler.draw(plan_of(method, 20), 0, [range(4)])
    noise = NoiseStreams(0, range(4))
    alpha_bar = [1.0, *(1 - torch.linspace(1e-4, 0.02, 20).double()).cumprod(0).tolist()][::-1]
    with torch.no_grad():
        x = noise.normal(made) * (1 - alpha_bar[0]) ** 0.5
        for i, a, p in zip(range(19, -1, -1), alpha_bar, alpha_bar[1:], strict=False):
            b = 1 - a / p
            e = method.denoiser.network(x, torch.full((4,), float(i)))
            x_0 = ((x - (1 - a) ** 0.5 * e) / a**0.5).clamp(-1, 1)
            x = (p**0.5 * b * x_0 + (1 - b) ** 0.5 * (1 - p) * x) / (1 - a)
            if i > 0:
                x = x + b**0.5 * noise.normal(x)
    torch.testing.assert_close(made, x, rtol=1e-4, atol=1e-4)


def test_without_steps_it_is_a_gan():
    method = tdpm(0, ANCESTRAL)
    assert [phase.name for phase in method.phases()] == ["generator", "critic"]
    batch = Batch(torch.randn(8, 1, 16, 16), None, torch.arange(8))
    assert torch.equal(method.diffused(batch.image, NoiseStreams(0, range(8))), batch.image), "the critic sees x_0"
    losses, _ = step(method, batch)
    assert losses.isfinite().all()
    plan = method.sampler.plan(1, 2)
    assert split(plan) == (0, 0) and method.sampler.planned_nfe(plan, 2) == 1
    made = next(iter(method.sampler.draw(plan, 0, [range(2)])))[1]
    z = NoiseStreams(0, range(2)).normal(made)
    assert torch.equal(made, method.denoiser.network(z, torch.zeros(2)).detach())


def test_a_gan_of_a_copy():
    model = KarrasDenoiser(UNet((1, 8, 8), [8], blocks=1, embedding=8), EDMVarianceExploding())
    prior = ImplicitPrior(model, 0.0)
    x_t, t = prior(model, NoiseStreams(0, range(2)), (1, 8, 8))
    assert t.tolist() == [0, 0]
    z = NoiseStreams(0, range(2)).normal(x_t)
    assert torch.allclose(x_t, model(20 * z, f64(20, 20)).x_0)


# What the loss weighs


def test_scale_of_the_loss():
    """Of a network that says 0 it is the noise's: C H W, within 1 %."""
    model = eps_denoiser(4, shape=(3, 32, 32))
    for parameter in model.network.out.parameters():
        nn.init.zeros_(parameter)
    method = assemble(
        TruncatedDiffusion,
        model,
        GaussianPrior(),
        SOLVERS.build({"name": "ddim"}),
        Index(),
        Training(pixel_sum=True),
        (3, 32, 32),
    )
    batch = Batch(torch.zeros(128, 3, 32, 32), None, torch.arange(128))
    with torch.no_grad():
        loss = method.denoiser_loss(batch, NoiseStreams(0, range(128), "training")).mean().item()
    assert loss == pytest.approx(3072, rel=0.01)


def test_levels_in_mirrored_pairs():
    """Neighbours in the stream sum to K - 1, in whatever batches they are."""
    method = tdpm(50, ANCESTRAL)

    def indices(first: int, count: int) -> Tensor:
        batch = Batch(torch.zeros(count, 1, 16, 16), None, torch.arange(first, first + count))
        return method.levels(method.denoiser, method.level_quantiles(batch, NoiseStreams(0, batch.index)))

    whole = indices(0, 2000)
    assert torch.equal(whole[::2] + whole[1::2], torch.full((1000,), 49.0).double())
    assert torch.equal(torch.cat([indices(0, 7), indices(7, 13)]), whole[:20])
    assert whole[::2].unique().numel() == 50 and whole[::2].mean().item() == pytest.approx(24.5, abs=2)


def test_an_unfrozen_denoiser_is_trained_up_to_the_start_alone():
    assert tdpm(50, ANCESTRAL).denoiser.ratio_range[1] == pytest.approx(PROCESS.ratio(f64(49)).item())
    model = KarrasDenoiser(UNet((1, 8, 8), [8], blocks=1, embedding=8), EDMVarianceExploding())
    prior, solver = ImplicitPrior(model, 1.0), SOLVERS.build({"name": "ddim"})
    critic = {"name": "stylegan2", "channel_base": 64}
    assemble(TruncatedDiffusion, model, prior, solver, LogNormal(), Training(), (1, 8, 8), critic=critic, frozen=True)
    assert model.ratio_range[1] == 80, "a frozen one is what it is"
    assemble(TruncatedDiffusion, model, prior, solver, LogNormal(), Training(), (1, 8, 8), critic=critic)
    assert model.ratio_range[1] == 1
    with pytest.raises(UsageError, match="ratio_star 2 is outside the denoiser's range"):
        assemble(
            TruncatedDiffusion,
            model,
            ImplicitPrior(model, 2.0),
            solver,
            LogNormal(),
            Training(),
            (1, 8, 8),
            critic=critic,
        )


# Ancestral sampling


def test_ancestral_of_the_posteriors_variance_is_ddim():
    oracle = MixtureDenoiser(MEANS.double(), 0.0025, WEIGHTS.double(), PROCESS)
    x, t = torch.randn(5, 2, 1, 1).double(), torch.full((5,), 80.0).double()
    one, other = (
        SOLVERS.build({**keys, "grid": {"name": "index"}})(oracle, x, t, NoiseStreams(0, range(5)), 30)
        for keys in ({"name": "ancestral", "variance": "small"}, {"name": "ddim", "eta": 1.0})
    )
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_ancestral_confines_the_prediction_alone():
    far = MixtureDenoiser(torch.full((1, 2, 1, 1), 3.0), 1e-6, process=PROCESS)
    x, t = torch.full((2, 2, 1, 1), 2.0), torch.full((2,), 500.0).double()
    for clip, expected in ((False, 3.0), (True, 1.0)):
        made = SOLVERS.build({"name": "ancestral", "clip": clip})(far, x, t, NoiseStreams(0, range(2)), 5)
        assert torch.allclose(made, torch.full_like(made, expected), atol=0.01)
    with pytest.raises(UsageError, match="small"):
        SOLVERS.build({"name": "ancestral", "variance": "medium"})


def test_index_is_a_grid_by_name():
    assert isinstance(GRIDS.build({"name": "index"}), Indices)
