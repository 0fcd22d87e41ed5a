"""Encoders of conditions: they run once per image, and change nothing but the cost."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from oracles import stirred
from torch import Tensor

from diffaccel.condition import Condition, Kinds, check_condition
from diffaccel.denoiser import Denoiser, KarrasDenoiser
from diffaccel.errors import UsageError
from diffaccel.nfe import EvaluationCounter
from diffaccel.nn import UNet
from diffaccel.nn.compiling import compile_forward
from diffaccel.nn.pixels import PixelEncoder
from diffaccel.prior import GaussianPrior, ImplicitPrior
from diffaccel.process import EDMVarianceExploding
from diffaccel.sampling import Sampler

SHAPE, DIM = (2, 8, 8), 6
KEYS = {"image": 2, "mask": True, "image_layers": 1, "tokens": DIM, "text_layers": 1}
ENCODERS = ["text_encoder", "image_encoder"]


def network(**keys: object) -> UNet:
    torch.manual_seed(0)
    return UNet(SHAPE, **{"widths": [8, 16], "blocks": 1, "attention": [1], "embedding": 12, **KEYS, **keys})


def condition(n: int = 3) -> Condition:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(n, 4, DIM, generator=generator)
    image = torch.randn(n, *SHAPE, generator=generator).tanh()
    mask = (torch.rand(n, 1, *SHAPE[1:], generator=generator) < 0.5).float()
    return Condition(tokens=tokens, valid=torch.ones(n, 4, dtype=torch.bool), image=image * mask, mask=mask)


def sampler(unet: UNet, solver: str | dict[str, object] = "dpmpp2m") -> Sampler:
    return Sampler(KarrasDenoiser(unet, EDMVarianceExploding()), GaussianPrior(), solver, SHAPE, batch_size=3)


@contextmanager
def encoded_in_each_evaluation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The network as it is in training."""
    with monkeypatch.context() as patch:
        patch.setattr(Denoiser, "condition_encoders", {})
        yield


@pytest.mark.parametrize("heads", [[1], [1, 1]])
def test_the_null_condition_is_the_unconditional_network(heads: list[int]):
    """To the bit, after training: none, dropped, of zeros, and the network without these layers."""
    unet = stirred(network(heads=heads))
    plain = network(tokens=0, text_layers=0, image_layers=0, heads=heads)
    plain.load_state_dict({name: unet.state_dict()[name] for name in plain.state_dict()})
    x, noise, given = torch.randn(3, *SHAPE), torch.rand(3), condition()
    null = plain(x, noise)
    some = torch.tensor([False, True, False])
    assert torch.equal(unet(x, noise), null)
    assert torch.equal(unet(x, noise, given.drop(others=torch.ones(3, dtype=torch.bool))), null)
    found = unet(x, noise, given.drop(others=some))
    assert torch.equal(found[1], null[1]), "a sample without condition beside others"
    assert all((found[i] - plain(x, noise, given)[i]).abs().max() > 1e-3 for i in (0, 2))


def test_features_are_those_of_both_resolutions():
    unet, given = stirred(network()), condition()
    x, noise = torch.randn(3, *SHAPE), torch.rand(3)
    assert unet.pixels is not None
    fine, coarse = unet.pixels(given)
    assert fine.shape == (3, 8, 8, 8)
    assert coarse.shape == (3, 16, 4, 4)
    found = unet(x, noise, given)
    for level in range(2):
        with torch.no_grad():
            kept = unet.inject[level].weight.clone()
            unet.inject[level].weight.zero_()
            assert (unet(x, noise, given) - found).abs().max() > 1e-3
            unet.inject[level].weight.copy_(kept)


def test_an_unconditional_network_is_widened():
    plain = stirred(network(tokens=0, text_layers=0, image_layers=0, image=0, mask=False))
    unet = network()
    unet.load_state_dict(unet.widened(plain.state_dict()))
    x, noise = torch.randn(3, *SHAPE), torch.rand(3)
    found = unet(x, noise, condition())
    torch.testing.assert_close(found, plain(x, noise), rtol=1e-6, atol=1e-6)
    found.square().mean().backward()
    assert all(layer.weight.grad.abs().max() > 0 for layer in unet.inject)


@pytest.mark.parametrize("name", ["dpmpp2m", "heun", "edm_stochastic", "rk45"])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_images_are_the_same(name: str, guidance: float, monkeypatch: pytest.MonkeyPatch):
    """Also where a solver evaluates a part of the batch (rk45), and in the second term of guidance."""
    sample = sampler(stirred(network(), std=0.1).double(), {"name": name, "guidance": guidance})
    sample.precision = "64-true"
    budget, given = (float("inf") if name == "rk45" else 12), condition(5)
    given = given.map(lambda value: value if value.dtype == torch.bool else value.double())
    images = sample(5, budget, condition=given)
    assert sample.spent is not None
    once = sample.spent
    assert {name: once.evaluations[name] for name in ENCODERS} == dict.fromkeys(ENCODERS, 5)
    with encoded_in_each_evaluation(monkeypatch):
        assert torch.equal(sample(5, budget, condition=given), images)
    assert "text_encoder" not in sample.spent.evaluations
    assert sample.spent.nfe == once.nfe, "encoders are no evaluations of the denoiser"
    assert once.gflops_per_image < sample.spent.gflops_per_image


def test_flops_of_encoders_are_counted_once():
    """Those of the denoiser without them, and of each encoder, as measured one by one."""
    unet, given, budget = stirred(network()), condition(), 6
    with torch.no_grad():
        encoded = unet.encoded(given)
        with EvaluationCounter({"denoiser": unet}) as alone:
            unet(torch.zeros(3, *SHAPE), torch.rand(3), encoded)
        with EvaluationCounter(unet.condition_encoders) as encoders:
            unet.encoded(given)
    assert encoders.evaluations == dict.fromkeys(ENCODERS, 3)
    assert min(encoders.flops.values()) > 0
    sample = sampler(unet)
    sample(3, budget, condition=given)
    assert sample.spent is not None
    total = budget * alone.flops["denoiser"] + sum(encoders.flops.values())
    assert sample.spent.gflops_per_image * 1e9 == pytest.approx(total)


def test_a_dry_run_says_the_same():
    from diffaccel.verbs.cost import forward_cost

    unet, given = stirred(network()), condition()
    sample = sampler(unet)
    sample(3, 6, condition=given)
    assert sample.spent is not None
    cost = forward_cost(sample, 3)  # captions of one token, here
    short = given._replace(tokens=given.tokens[:, :1], valid=given.valid[:, :1])
    sample(3, 6, condition=short)
    assert 6 * cost.flops + cost.encoding == pytest.approx(sample.spent.gflops_per_image * 1e9)
    assert cost.encoding > 0


def test_features_are_of_one_network_and_have_no_gradients():
    """A generator of its own does not get the denoiser's features, a shared one does; training gets none."""
    unet, given = stirred(network()), condition()
    denoiser = KarrasDenoiser(unet, EDMVarianceExploding())
    with torch.no_grad():
        bound = denoiser.given(given)
    shared = bound.condition_for(unet)
    assert shared is not None and shared.features is None, "with gradients"
    with torch.no_grad():
        shared, other = bound.condition_for(unet), bound.condition_for(network())
    assert shared is not None and shared.features is not None
    assert other is not None and other.features is None
    bound(torch.randn(3, *SHAPE), torch.ones(3)).x_0.sum().backward()
    assert unet.text.into.weight.grad.abs().max() > 0
    assert unet.pixels.stem.weight.grad.abs().max() > 0


@pytest.mark.parametrize("generator", [{"generator": "shared", "token": -0.7}, {"generator": "separate"}])
def test_generators_make_the_same_states(generator: dict[str, object], monkeypatch: pytest.MonkeyPatch):
    denoiser = KarrasDenoiser(stirred(network(), std=0.1), EDMVarianceExploding())
    prior = ImplicitPrior(denoiser, ratio_star=1.0, **generator)
    sample = Sampler(denoiser, prior, "dpmpp2m", SHAPE, batch_size=3)
    images = sample(4, 4, condition=condition(4))
    assert sample.spent is not None
    assert sample.spent.evaluations["text_encoder"] == 4
    with encoded_in_each_evaluation(monkeypatch):
        assert torch.equal(sample(4, 4, condition=condition(4)), images)


def test_parts_of_a_batch_have_their_features():
    unet, given = stirred(network()), condition()
    x, noise = torch.randn(3, *SHAPE), torch.rand(3)
    with torch.no_grad():
        encoded = unet.encoded(given)
        chosen = torch.tensor([2, 0])
        assert torch.equal(unet(x, noise, encoded), unet(x, noise, given))
        part = encoded.select(chosen)
        found = unet(x[chosen], noise[chosen], part)
    torch.testing.assert_close(found, unet(x[chosen], noise[chosen], given.select(chosen)))
    assert encoded.drop(others=torch.ones(3, dtype=torch.bool)).features is None


def test_a_compiled_network_takes_features(monkeypatch: pytest.MonkeyPatch):
    """Also in a batch that is filled up; the graph itself is traced without a compiler."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled(function, backend="eager", dynamic=False))
    unet, given = stirred(network()), condition()
    x, noise = torch.randn(3, *SHAPE), torch.rand(3)
    with torch.no_grad():
        encoded, expected = unet.encoded(given), unet(x, noise, given)
        compile_forward(unet, constant=True)
        torch.testing.assert_close(unet(x, noise, encoded), expected)
        found = unet(x[:2], noise[:2], encoded.select(slice(2)))
    torch.testing.assert_close(found, expected[:2])


def test_what_is_refused():
    with pytest.raises(UsageError, match=r"image_layers requires network\.image: set it, or remove"):
        network(image=0, mask=False)
    unet, given = network(), condition()
    with pytest.raises(UsageError, match="features are computed by the network: leave them out"):
        check_condition(unet.encoded(given), unet.takes, 3, SHAPE)
    encoder = PixelEncoder(Kinds(image=2), 1, [8], 1)
    with pytest.raises(UsageError, match=r"image has shape \(3, 1, 8, 8\)"):
        encoder(Condition(image=torch.zeros(3, 1, 8, 8)))


def test_an_image_of_zeros_with_a_mask_is_no_null_condition():
    """A grey image of which all pixels are known."""
    encoder = stirred(PixelEncoder(Kinds(image=2, mask=True), 2, [8], 1))
    known = Condition(image=torch.zeros(1, *SHAPE), mask=torch.ones(1, 1, *SHAPE[1:]))
    unknown = known._replace(mask=torch.zeros(1, 1, *SHAPE[1:]))
    found: tuple[tuple[Tensor, ...], ...] = (encoder(known), encoder(unknown))
    assert found[0][0].abs().max() > 0
    assert found[1][0].abs().max() == 0
