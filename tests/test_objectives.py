"""What a frozen denoiser teaches a generator, where the answer is known: Gaussians."""

import pytest
import torch
from oracles import assemble
from torch import Tensor, nn

from diffaccel.condition import Condition
from diffaccel.data import Batch
from diffaccel.denoiser import Denoiser, EpsDenoiser, GaussianDenoiser, KarrasDenoiser, MixtureDenoiser
from diffaccel.denoiser.levels import LogNormal
from diffaccel.errors import UsageError
from diffaccel.methods import Training, TruncatedDiffusion
from diffaccel.nn import UNet
from diffaccel.noise import NoiseStreams
from diffaccel.prior import ImplicitPrior
from diffaccel.process import EDMVarianceExploding, Prediction, VariancePreserving, expand
from diffaccel.solver import SOLVERS
from diffaccel.training.objectives import OBJECTIVES, DistributionMatching, OdePair

SHAPE, STAR, INIT = (1, 4, 4), 0.5, 20.0


class Scale(nn.Module):
    """A generator z -> a z + b, in units of variance preserving processes."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))

    def forward(self, z: Tensor, noise: Tensor, condition: Tensor | None) -> Tensor:
        return self.a * z + self.b


def prior_of(denoiser: Denoiser, a: float = 0.1, b: float = 0.0) -> ImplicitPrior:
    prior = ImplicitPrior(denoiser, STAR, network={"name": "mlp"}, shape=SHAPE)
    prior.made = Scale(a, b)
    return prior


@pytest.mark.parametrize("process", [EDMVarianceExploding(), VariancePreserving()], ids=repr)
def test_pairs_follow_the_gaussians_flow(process: object):
    """For N(m, v) the probability-flow ODE rescales: (y - m) / sqrt(v + ratio^2) stays what it was."""
    mean, var = 0.3, 0.25
    denoiser = GaussianDenoiser(torch.full(SHAPE, mean), var, process)
    pair, z = OdePair(steps=200), torch.randn(6, *SHAPE)
    y = pair.integrate(denoiser, prior_of(denoiser), z, NoiseStreams(0, range(6)))
    start = (INIT * z - mean) / (var + INIT**2) ** 0.5
    torch.testing.assert_close(y, mean + start * (var + STAR**2) ** 0.5, rtol=1e-3, atol=2e-3)


def exact(a: float, b: float, **objective: object) -> TruncatedDiffusion:
    denoiser = GaussianDenoiser(torch.full(SHAPE, 0.3), 0.25)
    prior = prior_of(denoiser, a, b)
    return assemble(
        TruncatedDiffusion, denoiser, prior, SOLVERS.build({"name": "ddim"}), LogNormal(), Training(), SHAPE,
        critic={"name": "mlp", "width": 8, "depth": 1}, objectives=[objective],
    )  # fmt: skip


def batch(count: int) -> Batch:
    return Batch(torch.zeros(count, *SHAPE), None, torch.arange(count))


def test_pairs_teach_the_gaussians_map():
    method = exact(0.1, 0.0, name="ode_pair", steps=25)
    (phase,) = (phase for phase in method.phases() if phase.name == "ode_pair")
    optimizer = torch.optim.Adam(phase.parameters, 0.05)
    for step in range(100):
        loss = phase.loss(batch(16), NoiseStreams(step, range(16))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    generator, unit = method.implicit.generator, (1 + STAR**2) ** 0.5
    assert generator.a.item() * unit == pytest.approx((0.25 + STAR**2) ** 0.5, rel=0.03)
    assert generator.b.item() * unit == pytest.approx(0.3, abs=0.03)


def test_a_pair_is_of_the_same_noise():
    """A copy of the denoiser is one DDIM step of the very ODE: with one step the pair has no error left."""
    network = UNet((1, 8, 8), [8], blocks=1, embedding=8)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    model = KarrasDenoiser(network, EDMVarianceExploding())
    prior = ImplicitPrior(model, STAR)
    pair = OdePair({"name": "ddim"}, steps=1)
    (phase,) = pair.phases(prior, lambda _: model, (1, 8, 8))
    images = Batch(torch.zeros(4, 1, 8, 8), None, torch.arange(4))
    assert phase.loss(images, NoiseStreams(0, range(4))).max() < 1e-9
    pair.steps = 6
    assert phase.loss(images, NoiseStreams(0, range(4))).min() > 1e-4


class Counted(GaussianDenoiser):
    """An exact denoiser of two classes that counts its calls; class 1 is less wide."""

    classes, calls = 2, 0

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Prediction:
        self.calls += 1
        x_0, eps = super().forward(x_t, t)
        assert condition is not None
        return Prediction(x_0 * (1 - 0.5 * expand(condition.labels, x_0)), eps)


def test_pairs_are_integrated_once():
    """Whatever images are there and however batches fall: position i has pair i mod pairs, noise, class and end."""
    denoiser = Counted(torch.full(SHAPE, 0.3), 0.25)
    prior, pair = prior_of(denoiser), OdePair(steps=5, pairs=6)
    pair.attach(denoiser, prior, SHAPE)
    (phase,) = pair.phases(prior, lambda batch: denoiser.given(batch.condition), SHAPE)

    def losses(first: int, count: int) -> Tensor:
        index = torch.arange(first, first + count)
        images = Batch(torch.zeros(count, *SHAPE), Condition(labels=torch.full((count,), 7)), index)
        return phase.loss(images, NoiseStreams(first, index)).detach()

    early = losses(0, 6)
    calls = denoiser.calls
    torch.testing.assert_close(losses(6, 3), early[:3])
    torch.testing.assert_close(losses(3, 9), early[[3, 4, 5, 0, 1, 2, 3, 4, 5]])
    assert denoiser.calls == calls > 0
    z = NoiseStreams(0, range(6), "ode pairs").normal(torch.empty(6, *SHAPE))
    classes = torch.arange(6) % 2
    end = OdePair(steps=5).integrate(denoiser.given(classes), prior, z, NoiseStreams(0, range(6)))
    unit = (1 + STAR**2) ** 0.5
    torch.testing.assert_close(pair._ends.float(), end / unit, rtol=1e-3, atol=1e-3)  # float16
    torch.testing.assert_close(early, (0.1 * z - end / unit).square().flatten(1).mean(1), rtol=5e-3, atol=1e-3)


class Law(MixtureDenoiser):
    """The exact denoiser of a generator's states at ratio STAR, in place of the one that learns them."""

    def __init__(self, mean: float, var: float) -> None:
        super().__init__(torch.full((1, *SHAPE), mean), var - STAR**2)


def test_matching_moves_towards_the_data_and_stops_there():
    """d(states) = -(score of the data - own score), so a mean that is off, or a spread, is pulled right."""
    denoiser, objective = GaussianDenoiser(torch.full(SHAPE, 0.3), 0.25), DistributionMatching()
    true, z, noise = (0.25 + STAR**2) ** 0.5, torch.randn(512, *SHAPE), NoiseStreams(0, range(512))
    for mean, spread in ((0.3, 1.0), (0.8, 1.0), (0.3, 1.4), (0.3, 0.8)):
        std = spread * true
        objective.fake = Law(mean, std**2)
        y = mean + std * z
        gradient = objective.gradient(y, prior_of(denoiser), denoiser, noise)
        push, stretch = gradient.mean().item(), ((y - mean) * gradient).mean().item()
        if (mean, spread) == (0.3, 1.0):
            assert gradient.abs().max() < 1e-5
        assert push > 0.5 if mean > 0.3 else abs(push) < 0.05
        assert spread == 1 or stretch * (spread - 1) > 0.005


def test_the_second_denoiser_learns_the_generators_law():
    """Its loss is least, among Gaussian laws, at the states' own."""
    objective = DistributionMatching(scale_max=5.0)
    y, noise = 0.8 + 0.9 * torch.randn(2000, *SHAPE), range(2000)

    class Parametrised(KarrasDenoiser):
        """Karras' denoiser around the exact answer for N(mean, var) data at ratio 0."""

        def __init__(self, mean: float, var: float) -> None:
            super().__init__(nn.Identity(), EDMVarianceExploding())
            self.law = GaussianDenoiser(torch.full(SHAPE, mean), var)

        def output(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
            return self.target(*self.law(x_t, t), t)

    losses = {}
    for mean, std in ((0.8, 0.9), (0.6, 0.9), (1.0, 0.9), (0.8, 0.8), (0.8, 1.0)):
        objective.fake = Parametrised(mean, std**2 - STAR**2)
        losses[mean, std] = objective.fake_loss(y, prior_of(objective.fake), None, NoiseStreams(0, noise)).mean().item()
    assert min(losses, key=losses.__getitem__) == (0.8, 0.9)


class Silent(nn.Module):
    """A network whose output is zero, so that its error is its target."""

    def forward(self, x: Tensor, noise: Tensor, condition: Tensor | None) -> Tensor:
        return 0 * x


def test_the_second_denoisers_error_weighs_alike_at_all_scales():
    """No answer costs |n|^2 at any s: for noise prediction the target is (r / s) n, and the weight (s / r)^2."""
    objective, noise = DistributionMatching(scale_max=5.0), NoiseStreams(0, range(8))
    objective.fake = EpsDenoiser(Silent(), VariancePreserving())
    loss = objective.fake_loss(torch.randn(8, *SHAPE), prior_of(objective.fake), None, noise)
    again = NoiseStreams(0, range(8))
    again.uniform()  # the scales
    torch.testing.assert_close(loss, again.normal(torch.empty(8, *SHAPE)).square().flatten(1).mean(1))


def test_scales_are_log_uniform_and_the_gradient_is_in_units_of_the_error():
    """y_r = y + s n, r^2 = STAR^2 + s^2, s from 2 STAR to 8; N(m, v) has the denoiser m + v / (v + r^2) (y - m)."""
    objective, denoiser = DistributionMatching(scale_min=2.0, scale_max=8.0), GaussianDenoiser(torch.zeros(SHAPE), 0.25)
    objective.fake, y = Law(0.8, 1.0), 0.8 + torch.randn(6, *SHAPE)
    y_r, r, s, n = objective.diffuse(y, prior_of(denoiser), NoiseStreams(0, range(6)))
    noise = NoiseStreams(0, range(6))
    torch.testing.assert_close(s, 2 * STAR * (8 / (2 * STAR)) ** noise.uniform())
    assert torch.equal(n, noise.normal(y))
    torch.testing.assert_close(r, (STAR**2 + s**2).sqrt())
    torch.testing.assert_close(y_r, y + expand(s, y) * n)
    real = expand(0.25 / (0.25 + r**2), y) * y_r
    var = 1.0 - STAR**2
    made = 0.8 + expand(var / (var + r**2), y) * (y_r - 0.8)
    expected = (made - real) / expand((y - real).abs().flatten(1).mean(1), y)
    found = objective.gradient(y, prior_of(denoiser), denoiser, NoiseStreams(0, range(6)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def frozen(**objective: object) -> TruncatedDiffusion:
    torch.manual_seed(0)
    model = KarrasDenoiser(UNet((1, 8, 8), [8], blocks=1, embedding=8), EDMVarianceExploding())
    prior = ImplicitPrior(model, 1.0)
    return assemble(
        TruncatedDiffusion, model, prior, SOLVERS.build({"name": "ddim"}), LogNormal(), Training(), (1, 8, 8),
        frozen=True,
        critic={"name": "stylegan2", "channel_base": 64}, objectives=[objective],
    )  # fmt: skip


def test_phases_have_their_own_optimisers_and_windows():
    method = frozen(name="distribution_matching", since=100, until=500, lr=2.0, fake_lr=3.0)
    phases = {phase.name: phase for phase in method.phases()}
    assert list(phases) == ["fake_denoiser", "matching", "generator", "critic"]
    assert [phases[name].lr for name in ("fake_denoiser", "matching")] == [3.0, 2.0]
    assert all((phases[name].since, phases[name].until) == (100, 500) for name in ("fake_denoiser", "matching"))
    assert any(name.startswith("learning.0.fake.") for name in method.state_dict()), "for an exact resume"
    images = Batch(torch.randn(8, 1, 8, 8), None, torch.arange(8))
    for name, moved in (("fake_denoiser", "learning"), ("matching", "prior")):
        method.zero_grad()
        method.phases()
        phases[name].loss(images, NoiseStreams(0, range(8))).mean().backward()
        touched = {key.split(".")[0] for key, p in method.named_parameters() if p.grad is not None}
        assert touched == {moved}


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"name": "ode_pairs"}, "did you mean 'ode_pair'"),
        ({"name": "ode_pair", "steps": 0}, "1 or more"),
        ({"name": "ode_pair", "pairs": 0}, "pairs is 0"),
        ({"name": "ode_pair", "solver": {"name": "heun", "grid": "index"}}, "grid .* ignores ratio_min"),
        ({"name": "distribution_matching", "scale_min": 0.0}, "must be positive"),
        ({"name": "distribution_matching", "scale_max": 0.5}, "above scale_min"),
        ({"name": "distribution_matching", "scale_max": 500.0}, "trained on"),
    ],
)
def test_objectives_that_are_refused(objective: dict[str, object], message: str):
    with pytest.raises(UsageError, match=message):
        frozen(**objective)


def test_a_teacher_is_frozen_or_exact():
    model = KarrasDenoiser(UNet((1, 8, 8), [8], blocks=1, embedding=8), EDMVarianceExploding())
    solver, critic = SOLVERS.build({"name": "ddim"}), {"name": "stylegan2", "channel_base": 64}
    parts = (solver, LogNormal(), Training(), (1, 8, 8))
    with pytest.raises(UsageError, match=r"set method\.frozen"):
        assemble(
            TruncatedDiffusion, model, ImplicitPrior(model), *parts, critic=critic, objectives=[{"name": "ode_pair"}]
        )
    with pytest.raises(UsageError, match="generator=separate"):
        prior = ImplicitPrior(model, generator="diffuse")
        assemble(
            TruncatedDiffusion, model, prior, *parts, critic=critic, frozen=True, objectives=[{"name": "ode_pair"}]
        )
    with pytest.raises(UsageError, match="this denoiser is exact"):
        exact(1.0, 0.0, name="distribution_matching")
    assert sorted(OBJECTIVES) == ["distribution_matching", "moments", "ode_pair"]
