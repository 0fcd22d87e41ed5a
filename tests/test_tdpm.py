"""Truncated diffusion: what the generator starts as, what a phase moves, what is counted, and a law that is learned."""

import copy
import math

import pytest
import torch
from oracles import assemble
from torch import nn

from diffaccel.data import Batch
from diffaccel.denoiser import KarrasDenoiser, MixtureDenoiser
from diffaccel.denoiser.levels import LogNormal
from diffaccel.errors import UsageError
from diffaccel.methods import Training, TruncatedDiffusion
from diffaccel.nfe import EvaluationCounter
from diffaccel.nn import UNet
from diffaccel.nn.critic import Critic
from diffaccel.noise import NoiseStreams
from diffaccel.prior import ImplicitPrior
from diffaccel.process import DiscreteVariancePreserving, EDMVarianceExploding, VariancePreserving
from diffaccel.solver import SOLVERS
from diffaccel.training.ema import EMA

SHAPE = (1, 8, 8)


def denoiser(process=None) -> KarrasDenoiser:
    torch.manual_seed(0)
    network = UNet(SHAPE, widths=[8, 8], blocks=1, embedding=8)
    for parameter in network.parameters():  # the last layer starts at zero, which would hide what it is fed
        nn.init.normal_(parameter, std=0.2)
    return KarrasDenoiser(network, process or EDMVarianceExploding())


def tdpm(generator="separate", frozen=True, **options) -> TruncatedDiffusion:
    model = denoiser()
    token = 5.0 if generator == "shared" else None
    prior = ImplicitPrior(model, 1.5, generator, token=token)
    critic = {"name": "stylegan2", "channel_base": 64, "channel_max": 8}
    solver = SOLVERS.build({"name": "ddim"})
    return assemble(
        TruncatedDiffusion,
        model,
        prior,
        solver,
        LogNormal(),
        Training(),
        SHAPE,
        critic=critic,
        frozen=frozen,
        **options,
    )


def test_a_generator_of_a_compiled_denoiser_runs_on_its_own_weights():
    """As in a search, which builds priors after the denoiser was compiled."""
    model = denoiser()
    plain = ImplicitPrior(model, 1.5)
    model.network.forward = torch.compile(model.network.forward, backend="eager")
    prior = ImplicitPrior(model, 1.5)
    for one in (plain, prior):
        one.generator.load_state_dict({name: 0.5 * value for name, value in model.network.state_dict().items()})
    z = torch.randn(2, *SHAPE)
    made, expected = (one.generate(model, NoiseStreams(0, range(2)), SHAPE, z) for one in (prior, plain))
    assert torch.equal(made, expected)


def batch(count: int = 8) -> Batch:
    return Batch(torch.randn(count, *SHAPE).clamp(-1, 1), None, torch.arange(count))


@pytest.mark.parametrize("process", [EDMVarianceExploding(), VariancePreserving()])
def test_a_separate_generator_starts_as_the_ddim_step_from_pure_noise(process):
    model = denoiser(process)
    prior = ImplicitPrior(model, ratio_star=1.5, ratio_init=12.0)
    y = prior.generate(model, NoiseStreams(0, range(4)), SHAPE)
    z = NoiseStreams(0, range(4)).normal(y)
    ratio = torch.full((4,), 12.0, dtype=torch.float64)
    x_t, t = process.from_ratio(12.0 * z, ratio)
    s = process.time(torch.full_like(ratio, 1.5))
    mean, std = process.transition(model(x_t, t), t, s)
    assert torch.allclose(y * process.alpha(s).to(y)[:, None, None, None], mean, atol=1e-5) and not std.any()


def test_a_diffusing_generator_adds_noise_of_its_level():
    model = denoiser()
    prior = ImplicitPrior(model, 1.5, "diffuse")
    y = prior.generate(model, NoiseStreams(0, range(4)), SHAPE)
    noise = NoiseStreams(0, range(4))
    z = noise.normal(y)
    clean = model(20.0 * z, torch.full((4,), 20.0, dtype=torch.float64)).x_0
    assert torch.allclose(y - clean, 1.5 * noise.normal(y), atol=1e-5)


def test_a_shared_generator_is_the_denoisers_network_at_its_token():
    method = tdpm("shared", frozen=False)
    y = method.implicit.generate(method.denoiser, NoiseStreams(0, range(4)), SHAPE)
    z = NoiseStreams(0, range(4)).normal(y)
    assert torch.allclose(y, (1 + 1.5**2) ** 0.5 * method.denoiser.network(z, torch.full((4,), 5.0)))
    assert list(method.sampler.evaluated_networks()) == ["denoiser"]


@pytest.mark.parametrize("generator", ["separate", "diffuse", "shared"])
def test_one_evaluation_is_the_generators(generator):
    method = tdpm(generator, frozen=generator != "shared")
    plan = method.sampler.plan(4, 6)
    assert plan.steps == 3 and method.sampler.planned_nfe(plan, 6) == 4
    with EvaluationCounter(method.sampler.evaluated_networks()) as counter:
        for group in method.prior.schedule(6, 3):
            for _ in method.sampler.draw(plan, 0, group, method.sampler.open(plan, 0, group)):
                pass
    expected = {"denoiser": 24} if generator == "shared" else {"denoiser": 18, "generator": 6}
    assert dict(counter.evaluations) == expected
    with pytest.raises(UsageError, match="minimum of 2"):
        method.sampler.plan(1, 6)


@pytest.mark.parametrize(("generator", "frozen"), [("separate", True), ("separate", False), ("shared", False)])
def test_each_phase_moves_its_own_parameters_alone(generator, frozen):
    method = tdpm(generator, frozen)
    noise = NoiseStreams(0, range(8), "training")
    moved = {"denoiser": {"denoiser"}, "generator": {"denoiser" if generator == "shared" else "prior"}}
    moved["critic"] = {"critic"}
    optimizers = method.configure_optimizers()
    assert [phase.name for phase in method._phases] == (["generator", "critic"] if frozen else list(moved))
    for phase, optimizer in zip(method._phases, optimizers, strict=True):
        before = copy.deepcopy(dict(method.named_parameters()))
        optimizer.zero_grad()
        phase.loss(batch(), noise).mean().backward()
        optimizer.step()
        changed = {name.split(".")[0] for name, one in method.named_parameters() if not torch.equal(one, before[name])}
        assert changed == moved[phase.name]


def test_the_critics_phase_gives_the_networks_no_gradient():
    method = tdpm("shared", frozen=False)
    method.configure_optimizers()
    method._phases[2].loss(batch(), NoiseStreams(0, range(8))).mean().backward()
    assert all(parameter.grad is None for parameter in method.denoiser.parameters())
    assert all(parameter.grad is not None for parameter in method.critic.parameters())
    method.zero_grad()
    method._phases[1].loss(batch(), NoiseStreams(0, range(8))).mean().backward()
    assert all(parameter.grad is None for parameter in method.critic.parameters())


def test_the_fake_is_made_once_a_phase():
    """Two forwards of the generator a step, one of them without gradient; three of the critic, and R1's."""
    method, calls = tdpm(), []
    method.implicit.generator.register_forward_hook(lambda _, __, output: calls.append(output.requires_grad))
    for method.steps in (1, 2):
        for phase in method.phases():
            phase.loss(batch(), NoiseStreams(0, range(8)))
    assert calls == [True, False] * 2


def test_the_game_is_the_non_saturating_one(monkeypatch):
    """By hand, with a critic that says 2 of what is made and 3 of what is real: it wants to say less and more."""
    method = tdpm()
    method.steps = 1  # no penalty is due
    made, real = torch.full((8, *SHAPE), 2.0), torch.full((8, *SHAPE), 3.0)
    logits = {2.0: torch.tensor(2.0, requires_grad=True), 3.0: torch.tensor(3.0, requires_grad=True)}
    monkeypatch.setattr(method.implicit, "generate", lambda *_: made)
    monkeypatch.setattr(method, "diffused", lambda *_: real)
    monkeypatch.setattr(method, "judge", lambda y, _: logits[y[0, 0, 0, 0].item()].expand(len(y)))
    loss = method.critic_loss(batch(), NoiseStreams(0, range(8)))
    assert loss.tolist() == pytest.approx([math.log(1 + math.e**2) + math.log(1 + math.e**-3)] * 8)
    loss.mean().backward()
    assert logits[2.0].grad.item() == pytest.approx(1 / (1 + math.e**-2))
    assert logits[3.0].grad.item() == pytest.approx(-1 / (1 + math.e**3))
    loss = method.generator_loss(batch(), NoiseStreams(0, range(8)))
    assert loss.tolist() == pytest.approx([math.log(1 + math.e**-2)] * 8)


class LinearCritic(Critic):
    """D(x) = <w, x>, whose gradient by x is w."""

    def __init__(self, w):
        super().__init__(SHAPE, 1, 0)
        self.w = nn.Parameter(w)

    def features(self, seen):
        raise NotImplementedError

    def logits(self, seen, condition=None):
        return (self.w * seen).flatten(1).sum(1)


def test_what_the_critic_sees_and_the_size_of_the_penalty():
    """States are over sqrt(1 + ratio^2), real ones have noise of the generator's level, and R1 is gamma / 2 |w|^2."""
    method, w, images = tdpm(gamma=3.0, r1_every=5), torch.randn(SHAPE), batch()
    method.critic = LinearCritic(w)
    losses = []
    for method.steps in (4, 5):
        losses.append(method.critic_loss(images, NoiseStreams(0, range(8))).detach())
    noise, unit = NoiseStreams(0, range(8)), (1 + 1.5**2) ** 0.5
    made = method.implicit.generate(method.denoiser, noise, SHAPE).detach()
    real = images.image + 1.5 * noise.normal(made)
    d_made, d_real = ((w * y / unit).flatten(1).sum(1) for y in (made, real))
    torch.testing.assert_close(losses[0], (1 + d_made.exp()).log() + (1 + (-d_real).exp()).log())
    torch.testing.assert_close(
        losses[1] - losses[0], torch.full((8,), 1.5 * w.square().sum().item()), rtol=1e-4, atol=0
    )


def test_the_game_has_rates_windows_and_moments_of_its_own():
    method = tdpm(frozen=False, generator_lr=0.2, critic_lr=7.0, generator_since=30, critic_since=20)
    phases = {phase.name: phase for phase in method.phases()}
    assert [(phases[name].lr, phases[name].since) for name in ("generator", "critic")] == [(0.2, 30), (7.0, 20)]
    for name, own in (("denoiser", False), ("generator", True), ("critic", True)):  # StyleGAN's, and never clipped
        assert (phases[name].betas, phases[name].clip) == (((0.0, 0.99), False) if own else (None, True))


def test_the_penalty_comes_when_it_is_due():
    method = tdpm(gamma=100.0, r1_every=4)
    losses = []
    for method.steps in range(5):
        losses.append(method.critic_loss(batch(), NoiseStreams(0, range(8))).mean().item())
    assert losses[1] == pytest.approx(losses[2], rel=0.2)
    assert min(losses[0], losses[4]) > 2 * max(losses[1:4])


def test_the_game_may_be_played_in_some_steps_only():
    """The penalty comes in every second of them: in every sixth step."""
    method = tdpm(frozen=False, gamma=100.0, r1_every=2, game_every=3)
    assert {phase.name: phase.every for phase in method.phases()} == {"denoiser": 1, "generator": 3, "critic": 3}
    losses = []
    for method.steps in (0, 3, 6, 9):
        losses.append(method.critic_loss(batch(), NoiseStreams(0, range(8))).mean().item())
    assert min(losses[0], losses[2]) > 2 * max(losses[1], losses[3])


def test_the_latest_penalty_is_logged_when_none_is_due(monkeypatch):
    method, noted = tdpm(gamma=100.0, r1_every=4), []
    monkeypatch.setattr(method, "note", lambda values: noted.append(values.get("critic_penalty")))
    method.logs_now = True
    seen = []
    for method.steps in (0, 3, 4, 5):
        noted.clear()
        method.critic_loss(batch(), NoiseStreams(method.steps, range(8)))
        seen.append(next(value.item() for value in noted if value is not None))
    assert seen[0] == seen[1] != seen[2] == seen[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generator": "seperate"}, "separate, diffuse, shared"),
        ({"ratio_star": 30.0}, "ratio_init must be larger"),
        ({"generator": "shared"}, "requires a token, others have none"),
        ({"token": 3.0}, "requires a token, others have none"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UsageError, match=message):
        ImplicitPrior(denoiser(), **options)


def test_what_does_not_go_together_is_refused():
    exact = MixtureDenoiser(torch.zeros(1, *SHAPE), 0.1)
    with pytest.raises(UsageError, match="this denoiser is exact"):
        ImplicitPrior(exact)
    with pytest.raises(UsageError, match=r"method.frozen=false"):
        tdpm("shared", frozen=True)


class BatchedNoise:
    """NoiseStreams from the global generator, where draws need not be told apart."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self):
        return self.count

    def normal(self, like):
        return torch.randn_like(like)


def sliced_w2(a: torch.Tensor, b: torch.Tensor) -> float:
    """Sliced Wasserstein-2 distance of two samples (N, 2), over 64 directions."""
    angle = torch.arange(64, dtype=a.dtype) * torch.pi / 64
    directions = torch.stack([angle.cos(), angle.sin()])
    gap = (a @ directions).sort(0).values - (b @ directions).sort(0).values
    return gap.square().mean().sqrt().item()


@pytest.mark.slow
def test_the_generator_learns_a_mixture():
    """0.13 of the distance that a moment-matched Gaussian has was left; two real samples are 0.09 of it apart."""
    torch.manual_seed(0)
    means = torch.tensor([[0.7, 0.6], [-0.6, 0.7], [-0.7, -0.5], [0.5, -0.7]])[:, :, None, None]
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1])  # unequal: behind symmetry a Gaussian could hide
    shape, size, steps = (2, 1, 1), 512, 3000

    def real(count: int) -> torch.Tensor:
        chosen = torch.multinomial(weights, count, replacement=True)
        return means[chosen] + 0.05 * torch.randn(count, *shape)

    model = MixtureDenoiser(means, 0.0025, weights, DiscreteVariancePreserving())
    prior = ImplicitPrior(model, K=50, network={"name": "mlp"}, shape=shape)
    method = assemble(
        TruncatedDiffusion, model, prior, SOLVERS.build({"name": "ddim"}), LogNormal(), Training(), shape,
        critic={"name": "mlp"}, generator_lr=2e-4, critic_lr=1e-3, gamma=0.1, r1_every=1,
    )  # fmt: skip
    optimizers, ema = method.configure_optimizers(), EMA(prior.generator, 300 * size)
    for method.steps in range(steps):
        batch = Batch(real(size), None, torch.arange(size))
        for phase, optimizer in zip(method._phases, optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = phase.lr * min(1, 2 * (1 - method.steps / steps))
            optimizer.zero_grad()
            phase.loss(batch, BatchedNoise(size)).mean().backward()
            optimizer.step()
        ema.update(size, (method.steps + 1) * size)
    noise = BatchedNoise(10_000)
    true = method.diffused(real(10_000), noise).flatten(1)
    with torch.no_grad(), ema.swapped():
        made = prior.generate(model, noise, shape)
        logits = torch.stack([method.judge(y, batch).mean() for y in (made, method.diffused(real(10_000), noise))])
    gaussian = true.mean(0) + torch.randn_like(true) @ torch.linalg.cholesky(true.T.cov()).T
    assert sliced_w2(made.flatten(1), true) < 0.25 * sliced_w2(gaussian, true)
    assert logits.abs().max() < 0.3, "the critic's optimum is log q - log p"
