"""Decoupled diffusion: two heads, their preconditionings, the losses, what a fit leaves alone, and small fits."""

import math
from types import SimpleNamespace

import pytest
import torch
import torchvision
from oracles import assemble
from torch import Tensor, nn

from diffaccel.data import Batch
from diffaccel.denoiser import KarrasDenoiser, MixtureDenoiser
from diffaccel.denoiser.decoupled import DecoupledDenoiser, Heads
from diffaccel.denoiser.levels import Uniform
from diffaccel.errors import UsageError
from diffaccel.features.perceptual import VGG16_SHA256
from diffaccel.methods import DecoupledDiffusion, Training
from diffaccel.nn import MLP, UNet
from diffaccel.noise import NoiseStreams
from diffaccel.prior import GaussianPrior
from diffaccel.process import Decoupled, EDMVarianceExploding, expand
from diffaccel.process.attenuation import Attenuation, Constant, Linear
from diffaccel.solver import SOLVERS
from diffaccel.training.ema import EMA

ROWS = [("recommended", "t"), ("recommended", "t^2"), ("later", "t"), ("later", "t^2"), ("reference", "t")]


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Stub(nn.Module):
    """Answers ``answer``, or what it is told to make of its input."""

    answer: Tensor

    def __init__(self, heads: tuple[int, ...] = (1, 1)) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: Tensor, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        self.asked = x, noise
        return self.answer


def build(row: str = "recommended", clock: str = "t", heads: tuple[int, ...] = (1, 1), **keys: object):
    stub, attenuation = Stub(heads), Linear() if heads[0] == 2 else Constant()
    return DecoupledDenoiser(stub, Decoupled(clock, attenuation), row, **keys), stub  # type: ignore[arg-type]


def method(heads: tuple[int, ...] = (1, 1), clock: str = "t", shape=(3, 4, 4), **keys: object) -> DecoupledDiffusion:
    torch.manual_seed(0)
    network = MLP(shape, 8, 1, heads=list(heads))
    attenuation: Attenuation = Linear() if heads[0] == 2 else Constant()
    denoiser = DecoupledDenoiser(network, Decoupled(clock, attenuation))  # type: ignore[arg-type]
    options = {"weighting": "reference", **keys}
    return assemble(
        DecoupledDiffusion,
        denoiser,
        GaussianPrior(),
        SOLVERS.build({"name": "bridge"}),
        Uniform(),
        Training(),
        shape,
        **options,
    )


def batch(count: int, shape=(3, 4, 4), start: int = 0) -> Batch:
    images = torch.randn(8, *shape, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    index = torch.arange(start, start + count)
    return Batch(images[index], None, index)


# 6: preconditioning


@pytest.mark.parametrize(("row", "clock"), ROWS)
@pytest.mark.parametrize("heads", [(1, 1), (1,)])
def test_targets_give_the_truth(row: str, clock: str, heads: tuple[int, ...]) -> None:
    denoiser, stub = build(row, clock, heads, sigma_data=0.7)
    x_0, eps = torch.randn(2, 5, 3, 2, 2).double()
    t = f64(0.002, 0.1, 0.5, 0.9, 0.999)
    stub.answer = denoiser.target(x_0, eps, t)
    x_t = denoiser.process.marginal(x_0, t, eps)
    said = denoiser(x_t, t)
    for found, true in ((said.x_0, x_0), (said.eps, eps), (said.phi, -x_0)):
        torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-10)
    assert denoiser.loss(x_0, t, eps).abs().max() == 0
    torch.testing.assert_close(stub.asked[1], 0.25 * t.log())


@pytest.mark.parametrize(("row", "clock"), ROWS)
@pytest.mark.parametrize("heads", [(1, 1), (1,)])
def test_what_the_ends_say_whatever_the_network_does(row: str, clock: str, heads: tuple[int, ...]) -> None:
    """C is -x at t = 0 and eps is x at t = 1."""
    denoiser, stub = build(row, clock, heads)
    x, stub.answer = torch.randn(2, 3, 2, 2).double(), torch.randn(2, 3 * len(heads), 2, 2).double()
    torch.testing.assert_close(denoiser.heads(stub.answer, x, f64(1e-16, 1e-16)).phi, -x, rtol=0, atol=1e-6)
    torch.testing.assert_close(denoiser.heads(stub.answer, x, f64(1, 1)).eps, x, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("row", "clock"), ROWS)
def test_identities(row: str, clock: str) -> None:
    """One head: x_t = (t - 1) C + sigma_t eps. Two: x_0 is t and 1 - t of what each says of it."""
    x, answer = torch.randn(4, 3, 2, 2).double(), torch.randn(4, 6, 2, 2).double()
    t = f64(0.01, 0.3, 0.8, 0.99)
    denoiser, _ = build(row, clock, (1,))
    sigma = expand(denoiser.process.sigma(t), x)
    c, eps = denoiser.heads(answer[:, :3], x, t)
    torch.testing.assert_close(expand(t - 1, x) * c + sigma * eps, x, rtol=1e-10, atol=1e-10)
    denoiser, _ = build(row, clock, (1, 1))
    said = denoiser.prediction(answer, x, t)
    blend = expand(t, x) * -said.phi + (x - sigma * said.eps)  # (1 - t) of the noise head's x_0
    torch.testing.assert_close(said.x_0, blend, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("clock", ["t", "t^2"])
def test_recommended_targets_are_one_and_of_unit_variance(clock: str) -> None:
    denoiser, _ = build(clock=clock, sigma_data=0.7)
    x_0, eps = torch.randn(2, 20_000, 1, 1, 1).double()
    for value in (1e-3, 0.1, 0.5, 0.9):
        t = f64(value).expand(len(x_0))
        first, second = denoiser.target(0.7 * x_0, eps, t).chunk(2, 1)
        assert torch.equal(first, second)
        assert first.std().item() == pytest.approx(1, abs=0.02)
        x_t = denoiser.process.marginal(0.7 * x_0, t, eps)
        assert denoiser.scale_input(x_t, t).std().item() == pytest.approx(1, abs=0.02)


def test_the_references_image_target_explodes_and_the_later_row_is_ours_at_one() -> None:
    x_0, eps = torch.randn(2, 20_000, 1, 1, 1).double()
    reference, later, ours = (build(row, sigma_data=1.0)[0] for row in ("reference", "later", "recommended"))
    for value, std in ((1e-4, 100), (0.01, 10), (0.5, 2.0), (0.999, 1.4)):
        first, second = reference.target(x_0, eps, f64(value).expand(len(x_0))).chunk(2, 1)
        assert first.std().item() == pytest.approx(std, rel=0.05)
        assert second.std().item() < 1.1
    t = f64(0.1, 0.5, 0.99)
    assert torch.equal(torch.stack(later.coefficients(t)), torch.stack(ours.coefficients(t)))
    variance = t**2 - t + 1
    torch.testing.assert_close(ours.coefficients(t).out_c, (t / variance).sqrt())


def test_the_single_head_is_edms_denoiser_on_this_process() -> None:
    """F of the one is -F of the other: x_0 and eps agree at every level."""
    stub, process = Stub((1,)), Decoupled("t^2")
    ours, karras = DecoupledDenoiser(stub, process, sigma_data=0.6), KarrasDenoiser(stub, process, 0.6)
    x, output, t = torch.randn(3, 2, 2, 2).double(), torch.randn(3, 2, 2, 2).double(), f64(0.01, 0.4, 0.95)
    torch.testing.assert_close(
        tuple(ours.prediction(output, x, t)), tuple(karras.prediction(-output, x, t)), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("clock", ["t", "t^2"])
def test_linear_heads(clock: str) -> None:
    """K starts from its regression on x_t and is brought to [-1, 1]; C follows the constant one's row."""
    denoiser, stub = build("later", clock, (2, 1))
    x, t = 3 * torch.randn(2, 3, 2, 2).double(), f64(0.3, 0.7)
    output = torch.randn(2, 9, 2, 2).double()
    phi, eps = denoiser.heads(output, x, t)
    gain, v = 0.5 * (t**2 - t), denoiser.process.sigma(t) ** 2
    skip = gain * 0.516 / ((1 - t) ** 2 + gain**2 * 0.516 + v)
    torch.testing.assert_close(phi[:, :3], expand(skip, x) * x + output[:, :3])
    plain, _ = build("later", clock)
    for found, expected in zip((phi[:, 3:], eps), plain.heads(output[:, 3:], x, t), strict=True):
        torch.testing.assert_close(found, expected)
    said = denoiser.prediction(output, x, t)
    assert said.phi[:, :3].abs().max() == 1 and phi[:, :3].abs().max() > 1
    whole = said.x_0 + denoiser.process.attenuated(said.phi, t) + expand(v.sqrt(), x) * said.eps
    torch.testing.assert_close(whole, x)


@pytest.mark.parametrize("row", ["recommended", "reference"])
def test_linear_targets_give_the_truth(row: str) -> None:
    denoiser, stub = build(row, "t", (2, 1), sigma_data=0.7)
    x_0, eps = torch.randn(2, 4, 3, 2, 2).double()
    t, phi = f64(0.01, 0.3, 0.7, 0.99), Linear().draw(x_0, NoiseStreams(0, range(4)))
    stub.answer = denoiser.target(x_0, eps, t, phi)
    found = denoiser.heads(stub.answer, denoiser.process.diffuse(x_0, phi, t, eps), t)
    torch.testing.assert_close(found, Heads(phi, eps), rtol=1e-9, atol=1e-9)
    assert denoiser.loss(x_0, t, eps, phi=phi).abs().max() == 0


def test_what_does_not_go_together() -> None:
    for make, word in (
        (lambda: DecoupledDenoiser(Stub(), EDMVarianceExploding()), "process=decoupled"),
        (lambda: build("reference", "t^2"), "clock=t"),
        (lambda: build("recomended"), "recommended, reference, later"),
        (lambda: DecoupledDenoiser(Stub((1, 1)), Decoupled(attenuation=Linear())), r"network.heads=2,1"),
        (lambda: DecoupledDenoiser(Stub((1,)), Decoupled(attenuation=Linear())), r"network.heads=2,1"),
        (lambda: DecoupledDenoiser(Stub((2, 1)), Decoupled()), r"network.heads=1,1.*or \[1\]"),
        (lambda: method(weighting="heavy"), "unit, reference, later, none"),
        (lambda: method(weighting="unit", l1=True), "weighting"),
        (lambda: method(perceptual_weight=1.0), "reconstruction=pixel"),
        (lambda: method(shape=(1, 4, 4), reconstruction="pixel", perceptual_weight=1.0), "three channels"),
    ):
        with pytest.raises(UsageError, match=word):
            make()
    exact = MixtureDenoiser(torch.zeros(1, 1, 2, 2), 0.1, process=Decoupled())
    parts = GaussianPrior(), SOLVERS.build({"name": "bridge"}), Uniform(), Training(), (1, 2, 2)
    with pytest.raises(UsageError, match="exact"):
        assemble(DecoupledDiffusion, exact, *parts).phases()
    with pytest.raises(UsageError, match="process=decoupled"):
        assemble(DecoupledDiffusion, MixtureDenoiser(torch.zeros(1, 1, 2, 2), 0.1), *parts)
    heads = assemble(DecoupledDiffusion, KarrasDenoiser(Stub((1,)), Decoupled()), *parts)
    with pytest.raises(UsageError, match="denoiser=decoupled"):
        heads.phases()
    linear = method((2, 1))
    linear.sampler.solver = SOLVERS.build({"name": "heun"})
    with pytest.raises(UsageError, match="attenuation=constant"):
        linear.sampler.plan(10, 100)  # before anything is fitted or sampled


# 7: the loss

CASES = [
    ({}, (1, 1), "t"),
    ({"weighting": "unit"}, (1, 1), "t^2"),
    ({"weighting": "unit"}, (2, 1), "t"),
    ({"weighting": "later", "reconstruction": "latent"}, (1,), "t"),
    ({"weighting": "later", "reconstruction": "later"}, (2, 1), "t^2"),
    ({"weighting": "none", "l1": True, "reconstruction": "pixel"}, (1, 1), "t"),
]


@pytest.mark.parametrize(("keys", "heads", "clock"), CASES, ids=str)
def test_a_batch_is_its_samples(keys: dict[str, object], heads: tuple[int, ...], clock: str) -> None:
    """The reference's weights of the image's term multiply the whole batch's mean; here each has its own."""
    model = method(heads, clock, **keys)
    together = model.denoiser_loss(batch(4), NoiseStreams(3, range(4), "training"))
    alone = [model.denoiser_loss(batch(1, start=i), NoiseStreams(3, [i], "training")) for i in range(4)]
    assert together.shape == (4,)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-6)


def test_the_image_s_weight_is_each_samples_own() -> None:
    model = method(reconstruction="pixel")
    x_0, x_t, t = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4), torch.tensor([0.1, 0.5, 0.9])
    heads = Heads(torch.randn_like(x_0), torch.randn_like(x_0))
    image = x_t - expand(t, x_t) * heads.phi - expand(t.sqrt(), x_t) * heads.eps
    expected = (1 - t) ** 2 * (image - x_0).abs().mean((1, 2, 3))
    torch.testing.assert_close(model.reconstruction_loss(heads, x_0, x_t, t), expected)


def test_weights() -> None:
    t, low = f64(0.1, 0.6), method().process.time(f64(0.002, 0.002))
    for clock, keys, expected in (
        ("t", {}, (1 / t, 1 / (1 - t + low))),
        ("t", {"weighting": "later"}, ((t**2 - t + 1) / t, (t**2 - t + 1) / (1 - t + low))),
        ("t", {"weighting": "none"}, (t**0, t**0)),
        ("t^2", {"weighting": "later"}, (((1 - t) / t) ** 2 + 1, (t / (1 - t + 0.002 / 1.002)) ** 2 + 1)),
    ):
        torch.testing.assert_close(method(clock=clock, **keys).weights(t), expected)
    later = method(weighting="later")
    k = build("later")[0].coefficients(t)
    torch.testing.assert_close(later.weights(t)[0] * k.out_c**2, t**0)  # on its own row: 1 and about 1 - t
    torch.testing.assert_close(later.weights(t)[1] * k.out_eps**2, 1 - t, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("keys", "heads", "clock"), CASES, ids=str)
def test_the_truth_costs_nothing_and_the_ends_are_finite(keys: dict, heads: tuple[int, ...], clock: str) -> None:
    model = method(heads, clock, **keys)
    x_0, eps = torch.randn(2, 3, 3, 4, 4)
    low = model.process.time(f64(0.002))
    t = torch.cat([low, f64(0.5, 1 - 1e-7)])
    phi = model.process.attenuation.draw(x_0, NoiseStreams(0, range(3)))
    x_t, true = model.process.diffuse(x_0, phi, t, eps), Heads(phi, eps)
    assert model.main_loss(true, true, t).abs().max() == 0
    assert model.reconstruction_loss(true, x_0, x_t, t).abs().max() < 1e-5
    model.levels = lambda denoiser, u: t  # type: ignore[assignment]
    loss = model.denoiser_loss(Batch(x_0, None, torch.arange(3)), NoiseStreams(0, range(3)))
    loss.mean().backward()
    gradients = [parameter.grad for parameter in model.denoiser.parameters()]
    assert loss.isfinite().all() and all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_each_weight_belongs_to_its_head() -> None:
    """Heads that are off by 2 and 3 cost 4 / t + 9 / (1 - t + t_min); the image's term joins them."""
    model = method(weighting="reference", reconstruction="latent")
    truth = Heads(*torch.randn(2, 2, 3, 4, 4))
    t, low = f64(0.2, 0.7), model.process.time(f64(0.002))
    found = model.main_loss(Heads(truth.phi + 2, truth.eps - 3), truth, t)
    torch.testing.assert_close(found.double(), 4 / t + 9 / (1 - t + low), rtol=1e-5, atol=0)
    model.main_loss = lambda heads, target, t: torch.ones(4)  # type: ignore[method-assign]
    model.reconstruction_loss = lambda heads, x_0, x_t, t: torch.full((4,), 0.5)  # type: ignore[method-assign]
    assert model.denoiser_loss(batch(4), NoiseStreams(0, range(4))).tolist() == [1.5] * 4


@pytest.mark.parametrize(
    ("reconstruction", "weight"), [("pixel", 0.7**2), ("latent", 0.7), ("later", -0.5 * math.log(0.3))]
)
def test_the_image_s_term_with_and_without_lpips(reconstruction: str, weight: float) -> None:
    """An image that is off by 2 everywhere, by a measure that says 5 of anything, which counts by its own weight."""
    model = method(weighting="none", reconstruction=reconstruction, perceptual_weight=0.1)
    x_t, t = torch.randn(2, 3, 4, 4), torch.tensor([0.3, 0.3])
    heads = Heads(*torch.randn(2, 2, 3, 4, 4))
    x_0 = model.denoiser.image(heads, x_t, t) - 2  # type: ignore[operator]
    torch.testing.assert_close(model.reconstruction_loss(heads, x_0, x_t, t), torch.full((2,), 2 * weight))

    class Five(nn.Module):
        def forward(self, image: Tensor, x_0: Tensor) -> Tensor:
            return torch.full((len(image), 1, 1, 1), 5.0)

    model._lpips = [Five()]
    said = 0.1 * 5 + (0 if reconstruction == "later" else 2)
    torch.testing.assert_close(model.reconstruction_loss(heads, x_0, x_t, t), torch.full((2,), said * weight))


def test_absolute_errors_join_by_half() -> None:
    model = method(weighting="none", l1=True)
    zero, one = Heads(*torch.zeros(2, 1, 3, 4, 4)), Heads(*torch.full((2, 1, 3, 4, 4), 3.0))
    assert model.main_loss(one, zero, f64(0.5)).item() == pytest.approx(2 * 0.5 * (9 + 3))


# 10: what a fit leaves alone, and its schedules


@pytest.fixture
def lpips(monkeypatch) -> None:
    """LPIPS on VGG-16's layers, untrained: there is nothing to download in a test."""
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    monkeypatch.setattr(torchvision.models, "vgg16", lambda weights: SimpleNamespace(features=layers))


def test_lpips_stays_frozen_in_evaluation_mode_and_out_of_everything(lpips) -> None:
    keys = {"shape": (3, 16, 16), "weighting": "none", "perceptual_weight": 0.5}
    model = method(reconstruction="pixel", **keys)
    names = list(model.state_dict())
    assert model.feature_networks() == []
    (phase,) = model.phases()
    (network,) = model._lpips
    model.train()
    assert model.feature_networks() == [network.weights_sha256] == [VGG16_SHA256]
    assert not any(module.training for module in network.modules())
    assert any(isinstance(module, nn.Dropout) for module in network.modules())
    assert list(model.state_dict()) == names and len(list(phase.parameters)) == len(list(model.parameters()))
    images = batch(2, (3, 16, 16))
    loss = model.denoiser_loss(images, NoiseStreams(0, range(2)))
    loss.mean().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in network.parameters())
    assert torch.equal(loss, model.denoiser_loss(images, NoiseStreams(0, range(2))))  # its dropout is off
    model.perceptual_weight = 0.0
    plain = model.denoiser_loss(images, NoiseStreams(0, range(2)))
    model.perceptual_weight = 1.0
    torch.testing.assert_close(model.denoiser_loss(images, NoiseStreams(0, range(2))) - plain, 2 * (loss - plain))
    later = method(reconstruction="later", **keys)
    later.phases()
    heads, t = Heads(*torch.randn(2, 2, 3, 16, 16)), torch.tensor([0.3, 0.6])
    x_0 = -heads.phi  # the image of C alone is what it looks at
    assert later.reconstruction_loss(heads, x_0, torch.randn_like(x_0), t).abs().max() < 1e-6


def test_lpips_without_its_weights(monkeypatch) -> None:
    def offline(weights):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models, "vgg16", offline)
    with pytest.raises(UsageError, match=r"VGG-16.*no network.*perceptual_weight=0"):
        method(reconstruction="pixel", perceptual_weight=1.0).phases()


def test_the_later_schedule() -> None:
    """Warm-up over 5000 steps of 256, (1 - i / T)^0.96, and a floor."""
    images = 1_000_000
    model = method()
    model.training_plan = Training(
        images=images, lr=1e-4, warmup=1_280, decay=1.0, decay_power=0.96, floor=0.05, weight_decay=0.01
    )
    rates = {}
    for model.images_seen in (639, 1_280, 500_000, 990_000, images):
        rates[model.images_seen] = model.learning_rate()
    assert rates[639] == pytest.approx(0.5e-4, rel=1e-3)
    assert rates[500_000] == pytest.approx(1e-4 * 0.5**0.96)
    assert rates[990_000] == rates[images] == pytest.approx(5e-6)
    assert model.configure_optimizers()[0].param_groups[0]["weight_decay"] == 0.01


def test_the_average_has_the_references_half_life() -> None:
    """Every eighth step of 256 images by 0.999, once the decay min(0.999, 1 - (1 + n)^(-2/3)) has reached it."""
    assert pytest.approx(0.999, abs=1e-6) == 1 - (1 + 31_622) ** (-2 / 3)
    layer = nn.Linear(1, 1)
    ema = EMA(layer, half_life=1_420_000)
    with torch.no_grad():
        layer.weight += 1
    before = ema.average["weight"].clone()
    for _ in range(8):
        ema.update(256, 200_000_000)
    assert (ema.average["weight"] - before).item() == pytest.approx(0.001, rel=2e-3)


# 11: small fits


def fit(model: DecoupledDiffusion, draw, steps: int, size: int, lr: float = 2e-3) -> None:
    optimizer = torch.optim.Adam(model.denoiser.parameters(), lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - step / steps))
        x_0 = draw(size)
        t = model.levels(model.denoiser, torch.rand(size, dtype=torch.float64))
        loss = model.denoiser.loss(x_0, t, torch.randn_like(x_0)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Of two samples (N, 2)."""
    return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()


class Perceptron(nn.Module):
    """Three hidden layers on a point and its noise level; heads share all but the last layer."""

    def __init__(self, heads: tuple[int, ...]) -> None:
        super().__init__()
        self.heads = heads
        widths = [4, 128, 128, 128]
        hidden = [part for a, b in zip(widths, widths[1:], strict=False) for part in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(128, 2 * len(heads)))

    def forward(self, x: Tensor, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        inputs = torch.cat([x.flatten(1), noise[:, None], noise[:, None] ** 2], 1)
        return self.layers(inputs)[:, :, None, None]


@pytest.mark.slow
def test_one_head_and_two_learn_a_ring() -> None:
    def ring(count: int) -> Tensor:
        angle = torch.randint(8, (count,)) * (math.pi / 4)
        points = torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(count, 2)
        return points[:, :, None, None]

    true, found = ring(2000).flatten(1), {}
    for heads in ((1,), (1, 1)):
        torch.manual_seed(0)
        denoiser = DecoupledDenoiser(Perceptron(heads), Decoupled("t^2"), sigma_data=0.71)
        solver = SOLVERS.build({"name": "bridge", "eta": 0.0})
        model = assemble(DecoupledDiffusion, denoiser, GaussianPrior(), solver, Uniform(), Training(), (2, 1, 1))
        for state in ("before", "after"):
            (_, samples), *_ = model.sampler.draw(model.sampler.plan(50, 2000), 0, [range(2000)])
            found[heads, state] = energy_distance(samples.flatten(1), true)
            if state == "before":
                fit(model, ring, 2500, 512, lr=5e-3)
    for heads in ((1,), (1, 1)):
        assert found[heads, "after"] < found[heads, "before"] / 5, str(found)
    assert abs(found[(1,), "after"] - found[(1, 1), "after"]) < 0.01, str(found)


@pytest.mark.slow
def test_a_network_that_knows_one_image_returns_it_in_one_step() -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 8, 8) * 2 - 1
    network = UNet((1, 8, 8), [16, 16], blocks=1, embedding=32, heads=[1, 1])
    model = assemble(
        DecoupledDiffusion, DecoupledDenoiser(network, Decoupled()), GaussianPrior(),
        SOLVERS.build({"name": "bridge"}), Uniform(),
        Training(), (1, 8, 8),
    )  # fmt: skip
    fit(model, lambda count: image.expand(count, 1, 8, 8), 1500, 32)
    (_, samples), *_ = model.sampler.draw(model.sampler.plan(1, 16), 0, [range(16)])
    assert (samples - image).abs().mean() < 0.1
