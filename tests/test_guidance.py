"""Class labels: whose they are, when they are dropped, and guidance by them, which counts double."""

import math
from contextlib import nullcontext

import pytest
import torch
from oracles import assemble, plan_of
from torch import Tensor

from diffaccel.condition import NULL, Condition, Kinds, trained_without
from diffaccel.config import load
from diffaccel.data import Batch
from diffaccel.denoiser import DecoupledDenoiser, Denoiser, GuidedDenoiser, KarrasDenoiser, MixtureDenoiser
from diffaccel.denoiser.levels import LogNormal
from diffaccel.errors import UsageError
from diffaccel.evaluation.scores import blocks_of
from diffaccel.experiment import build_method, check_unconditional
from diffaccel.methods import Diffusion, Training, TruncatedDiffusion
from diffaccel.nfe import EvaluationCounter
from diffaccel.nn import UNet
from diffaccel.noise import NoiseStreams
from diffaccel.prior import ExactPosterior, GaussianPrior, ImplicitPrior, LangevinGibbsPrior, Plan, geometric_levels
from diffaccel.process import Decoupled, EDMVarianceExploding, Prediction, expand
from diffaccel.process.attenuation import Linear
from diffaccel.solver import SOLVERS

SHAPE, CLASSES = (1, 8, 8), 3
SR = ("network.image=1", "condition=super_resolution")


class ByClass(Denoiser):
    """Data of class k are N(k, 1), those of the null class, 3, are N(3, 1)."""

    process, ratio_range = EDMVarianceExploding(), (0.0, math.inf)

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Prediction:
        mean = expand(torch.full((len(x_t),), 3) if condition is None else condition.labels, x_t)
        residual = (x_t - mean) / expand(1 + t.square(), x_t)
        return Prediction(mean + residual, expand(t, x_t) * residual)


def test_guidance_goes_beyond_the_label_away_from_the_null_class():
    """(1 + w) k - 3 w is where the guided score leads: a Gaussian's shifts add up."""
    labels, weight = torch.tensor([0, 1, 2]), 0.5
    guided = ByClass().given(labels).guided(weight)
    x_t, t = torch.randn(3, 1, 2, 2), torch.full((3,), 0.7, dtype=torch.float64)
    shifted = ByClass()(x_t, t, (1 + weight) * labels - 3 * weight)
    torch.testing.assert_close(guided(x_t, t), shifted)
    chosen = guided.select(torch.tensor([2, 0]))
    assert isinstance(chosen, GuidedDenoiser)
    torch.testing.assert_close(chosen(x_t[[2, 0]], t[:2]).x_0, shifted.x_0[[2, 0]])
    solver = SOLVERS.build({"name": "ddim", "guidance": weight})
    made = solver(
        ByClass().given(labels), 80 * torch.randn(3, 1, 2, 2), torch.full((3,), 80.0), NoiseStreams(0, range(3)), 60
    )
    assert made.mean((1, 2, 3)).sub((1 + weight) * labels - 3 * weight).abs().max() < 1.5


def network(classes: int = CLASSES) -> UNet:
    torch.manual_seed(0)
    unet = UNet(SHAPE, widths=[8], blocks=1, embedding=8, classes=classes)
    for parameter in unet.parameters():  # off zero
        torch.nn.init.normal_(parameter, std=0.2)
    return unet


def diffusion(solver: dict[str, object], classes: int = CLASSES, **training: float) -> Diffusion:
    model = KarrasDenoiser(network(classes), EDMVarianceExploding())
    return assemble(Diffusion, model, GaussianPrior(), SOLVERS.build(solver), LogNormal(), Training(**training), SHAPE)


@pytest.mark.parametrize("classes", [2, 5, 10, 20])
def test_every_jackknife_block_has_all_classes(classes: int):
    method = diffusion({"name": "ddim"}, classes)
    n = 10 * classes
    labels, block = method.sampler.labels(plan_of(method, 3), range(n)), blocks_of(torch.arange(n), None)
    assert torch.bincount(labels, minlength=classes).tolist() == [10] * classes
    assert all(labels[block == one].unique().numel() == classes for one in range(10))


def test_an_image_has_its_label_in_any_batch():
    method = diffusion({"name": "ddim"})
    plan = plan_of(method, 3)
    assert method.sampler.labels(plan, range(4, 9)).tolist() == [2, 0, 2, 0, 1]
    whole = next(iter(method.sampler.draw(plan, 0, [range(6)])))[1]
    parts = torch.cat([images for _, images in method.sampler.draw(plan, 0, [range(2), range(2, 6)])])
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    method.prior.takes = lambda denoiser: Kinds()  # type: ignore[method-assign]
    assert not torch.allclose(next(iter(method.sampler.draw(plan, 0, [range(6)])))[1], whole, atol=1e-2)


@pytest.mark.parametrize(("name", "budget", "steps"), [("ddim", 9, 4), ("heun", 12, 3), ("dpmpp2m", 2, 1)])
def test_guidance_counts_double(name: str, budget: int, steps: int):
    method = diffusion({"name": name, "guidance": 1.0})
    plan = method.sampler.plan(budget, 4)
    assert plan.steps == steps
    with EvaluationCounter(method.sampler.evaluated_networks()) as counter:
        list(method.sampler.draw(plan, 0, [range(4)]))
    assert counter.evaluations["denoiser"] == 4 * method.sampler.planned_nfe(plan, 4) <= 4 * budget
    with pytest.raises(UsageError, match="minimum of 2"):
        method.sampler.plan(1, 4)


def test_guidance_that_cannot_work_is_refused_in_the_plan():
    """Not after a fit, nor after the burn-in of a chain."""
    with pytest.raises(UsageError, match="network.classes"):
        diffusion({"name": "ddim", "guidance": 1.0}, classes=0).sampler.plan(4, 2)
    sampler = diffusion({"name": "ddim", "guidance": 1.0}).sampler
    posterior = ExactPosterior(ByClass(), geometric_levels(50))  # type: ignore[arg-type]
    chain = sampler.using(LangevinGibbsPrior(posterior, chains=4))
    with pytest.raises(UsageError, match="and a prior without chains, or remove it"):
        chain.plan(100, 4)
    sampler.denoiser.network.null_class = False
    with pytest.raises(UsageError, match="also trained without condition"):
        sampler.plan(4, 2)


@pytest.mark.parametrize(("words", "seen"), [
    (["network.classes=10", "training.label_drop=0"], (False, False)),
    (["network.classes=10"], (True, True)),
    ([*SR], (False, False)),
    ([*SR, "network.classes=10", "training.condition_drop=0.1"], (True, True)),
    ([*SR, "network.classes=10"], (False, True)),
])  # fmt: skip
def test_a_fit_without_null_conditions_has_no_guided_points(words: list[str], seen: tuple[bool, bool]):
    """As the header of its weights says, also at its own end."""
    config = load("digits/edm", [*words, "guidance=1", "checkpoint=null"])
    sampler = build_method(config, load=False).sampler
    assert (trained_without(sampler.denoiser.network), trained_without(sampler.denoiser.network, "labels")) == seen
    with nullcontext() if seen[0] else pytest.raises(UsageError, match="also trained without condition"):
        sampler.plan(10, 4)
    if not config.condition:
        with (
            nullcontext() if seen[0] else pytest.raises(UsageError, match="likelihood=true is unconditional, but this")
        ):
            check_unconditional("likelihood=true", sampler)


def test_chains_are_of_no_class():
    method = diffusion({"name": "ddim"})
    posterior = ExactPosterior(ByClass(), geometric_levels(50))  # type: ignore[arg-type]
    prior = LangevinGibbsPrior(posterior, chains=4)
    assert method.sampler.labels(Plan(prior, method.sampler.solver, 1, 1), range(4)) is None


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.25, 0.25), (1.0, 1)])
def test_labels_are_dropped_in_the_denoisers_loss(share: float, expected: float):
    method = diffusion({"name": "ddim"}, label_drop=share)
    condition = Condition(labels=torch.arange(2000) % CLASSES)
    labels = method.drop_condition(condition, NoiseStreams(0, range(2000))).labels
    assert (labels == NULL).double().mean().item() == pytest.approx(expected, abs=0.03)
    kept = labels != NULL
    assert torch.equal(labels[kept], (torch.arange(2000) % CLASSES)[kept])
    assert diffusion({"name": "ddim"}, classes=0).condition(Batch(labels, condition, labels)) is None


def tdpm(generator: str, frozen: bool, **options: object) -> TruncatedDiffusion:
    model = KarrasDenoiser(network(), EDMVarianceExploding())
    prior = ImplicitPrior(model, 1.5, generator, token=2.0 if generator == "shared" else None)
    solver, critic = SOLVERS.build({"name": "ddim", **options}), {"name": "stylegan2", "channel_base": 64}
    return assemble(
        TruncatedDiffusion, model, prior, solver, LogNormal(), Training(), SHAPE, critic=critic, frozen=frozen
    )


@pytest.mark.parametrize(("generator", "frozen"), [("separate", True), ("shared", False), ("diffuse", True)])
def test_generator_and_critic_see_the_labels(generator: str, frozen: bool):
    method, images = tdpm(generator, frozen), torch.randn(8, *SHAPE)
    one, other = (Batch(images, Condition(labels=torch.full((8,), label)), torch.arange(8)) for label in (0, 1))
    for loss in (method.generator_loss, method.critic_loss):
        values = [loss(batch, NoiseStreams(0, range(8))) for batch in (one, other)]
        assert not torch.allclose(*values, atol=1e-6)
    made = [method.implicit.generate(method.given(b), NoiseStreams(0, range(8)), SHAPE) for b in (one, other)]
    assert not torch.allclose(*made, atol=1e-3)
    states = torch.randn(8, *SHAPE)
    assert not torch.allclose(method.judge(states, one), method.judge(states, other), atol=1e-6)


@pytest.mark.parametrize(("generator", "frozen"), [("separate", True), ("shared", False)])
def test_the_prior_is_never_guided(generator: str, frozen: bool):
    """2 (budget - 1) / 2 evaluations of the denoiser, one of the generator; the state is that without guidance."""
    method, plain = tdpm(generator, frozen, guidance=2.0), tdpm(generator, frozen)
    plan = method.sampler.plan(10, 3)
    assert plan.steps == 4 and method.sampler.planned_nfe(plan, 3) == 9
    with EvaluationCounter(method.sampler.evaluated_networks()) as counter:
        list(method.sampler.draw(plan, 0, [range(3)]))
    assert sum(counter.evaluations.values()) == 27
    denoiser = method.denoiser.given(method.sampler.labels(plan, range(3)))
    states = [m.prior(denoiser, NoiseStreams(0, range(3)), SHAPE, plan)[0] for m in (method, plain)]
    assert torch.allclose(*states)


class ByClassMixture(Denoiser):
    """Exact for a mixture: the components of a class given its label, all of them without label."""

    process, ratio_range = EDMVarianceExploding(), (0.0, math.inf)

    def __init__(self, means: Tensor, owner: Tensor) -> None:
        super().__init__()
        self.means, self.owner = means, owner

    def of(self, weights: Tensor) -> MixtureDenoiser:
        return MixtureDenoiser(self.means, 0.04, weights)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Prediction:
        if condition is None:
            return self.of(torch.ones(len(self.means), dtype=torch.float64))(x_t, t)
        rows = [
            self.of((self.owner == label).double() + 1e-300)(x[None], s[None])
            for x, s, label in zip(x_t, t, condition.labels, strict=True)
        ]
        return Prediction(*(torch.cat(parts) for parts in zip(*rows, strict=True)))


def mixture() -> ByClassMixture:
    means = torch.tensor([[2.0, 0], [-1, 1.5], [-1, -2], [0, 3]], dtype=torch.float64)[:, :, None, None]
    return ByClassMixture(means, torch.tensor([0, 0, 1, 1]))


def score(denoiser: MixtureDenoiser, x: Tensor, t: Tensor) -> Tensor:
    """By autograd, independent of the denoiser's formula."""
    x = x.clone().requires_grad_()
    density = torch.stack([denoiser.log_prob(x, s[None])[i, 0] for i, s in enumerate(t)]).sum()
    return torch.autograd.grad(density, x)[0]


@pytest.mark.parametrize("weight", [-1.0, 0.0, 0.7, 3.0])
def test_guidance_of_exact_denoisers_is_the_formula(weight: float):
    """The score is (1 + w) that of the class minus w that of all; w = 0 is the class, w = -1 the null condition."""
    model, labels = mixture(), torch.tensor([0, 1, 1])
    x_t, t = torch.randn(3, 2, 1, 1, dtype=torch.float64), torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)
    found = model.given(labels).guided(weight)(x_t, t)
    everything = score(model.of(torch.ones(4, dtype=torch.float64)), x_t, t)
    own = torch.cat(
        [score(model.of((model.owner == k).double() + 1e-300), x_t[[i]], t[[i]]) for i, k in enumerate(labels)]
    )
    expected = (1 + weight) * own - weight * everything
    torch.testing.assert_close(found.eps, -expand(t, x_t) * expected)
    torch.testing.assert_close(found.x_0, x_t + expand(t.square(), x_t) * expected)


def test_guidance_acts_in_its_interval_alone():
    """Sample by sample; evaluations of the null condition are those of the samples inside."""
    unet = network()
    model, labels = KarrasDenoiser(unet, EDMVarianceExploding()), torch.tensor([0, 1, 2, 0])
    x_t, t = torch.randn(4, *SHAPE), torch.tensor([0.2, 0.3, 3.0, 3.1], dtype=torch.float64)
    bound = model.given(labels)
    plain, guided = bound(x_t, t), bound.guided(2.0)(x_t, t)
    with EvaluationCounter({"denoiser": unet}) as counter:
        found = bound.guided(2.0, [0.3, 3.0])(x_t, t)
    assert counter.evaluations["denoiser"] == 6
    inside = torch.tensor([False, True, True, False])
    torch.testing.assert_close(found.x_0[inside], guided.x_0[inside], rtol=1e-4, atol=1e-5)
    assert torch.equal(found.x_0[~inside], plain.x_0[~inside]) and torch.equal(found.eps[~inside], plain.eps[~inside])
    for part, count in (([0.3, 3.0], 2), ([50.0, 80.0], 1)):
        with EvaluationCounter({"denoiser": unet}) as counter:
            bound.select(torch.tensor([1])).guided(2.0, part)(x_t[[1]], t[[1]])
        assert counter.evaluations["denoiser"] == count


@pytest.mark.parametrize(
    ("name", "keys"), [("ddim", {}), ("heun", {}), ("dpmpp2m", {}), ("heun", {"analytic_first": 0.5})]
)
@pytest.mark.parametrize("budget", [7, 12])
def test_a_budget_counts_guidance_where_it_acts(name: str, keys: dict[str, float], budget: int):
    """The plan is what the counter finds, within the budget, and has more steps than with guidance everywhere."""
    everywhere = diffusion({"name": name, "guidance": 1.0, **keys}).sampler.plan(budget, 2)
    method = diffusion({"name": name, "guidance": 1.0, "guidance_interval": [0.2, 3.0], **keys})
    plan = method.sampler.plan(budget, 2)
    with EvaluationCounter(method.sampler.evaluated_networks()) as counter:
        list(method.sampler.draw(plan, 0, [range(2)]))
    assert counter.evaluations["denoiser"] == 2 * method.sampler.planned_nfe(plan, 2) <= 2 * budget
    assert plan.steps > everywhere.steps


def test_null_labels_equal_the_network_without_condition():
    unet, x, noise = network(), torch.randn(3, *SHAPE), torch.rand(3)
    null = Condition(labels=torch.full((3,), NULL))
    assert torch.equal(unet(x, noise, null), unet(x, noise))
    model, t = KarrasDenoiser(unet, EDMVarianceExploding()), torch.rand(3, dtype=torch.float64) + 0.1
    alone = model.given(torch.tensor([0, 1, 2])).guided(-1.0)(x, t)
    torch.testing.assert_close(alone.x_0, model(x, t).x_0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("keys", "words"), [
    ({"guidance": 1.0, "guidance_interval": [3.0, 0.2]}, "must be two ratios, 0 <= low < high, or null"),
    ({"guidance": 1.0, "guidance_interval": [1.0]}, "must be two ratios"),
    ({"guidance_interval": [0.2, 3.0]}, "has no effect without guidance"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["heun", "rk45"])
def test_intervals_that_are_none(name: str, keys: dict[str, object], words: str):
    with pytest.raises(UsageError, match=words):
        SOLVERS.build({"name": name, **keys})


def test_the_words_of_a_command_line():
    config = load("digits/edm", ["guidance=1.5", "guidance_interval=0.28,2.9"])
    assert config.solver["guidance"] == 1.5 and list(SOLVERS.build(config.solver).guidance_interval) == [0.28, 2.9]


def test_a_guided_prediction_has_the_attenuation_too():
    torch.manual_seed(0)
    unet = UNet(SHAPE, widths=[8], blocks=1, embedding=8, classes=CLASSES, heads=[2, 1])
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model = DecoupledDenoiser(unet, Decoupled(attenuation=Linear()))
    bound, x, t = model.given(torch.tensor([0, 1])), torch.randn(2, *SHAPE), torch.full((2,), 0.4)
    own, null = bound(x, t), model(x, t)
    torch.testing.assert_close(bound.guided(0.5)(x, t).phi, 1.5 * own.phi - 0.5 * null.phi)
