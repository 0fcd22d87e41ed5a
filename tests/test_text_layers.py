"""Cross-attention and text encoders of networks: null conditions, padding, order, and what reaches the output."""

import math

import pytest
import torch
from oracles import stirred
from torch import Tensor
from torch.nn import functional as F

from diffaccel.condition import Condition, Kinds
from diffaccel.denoiser import KarrasDenoiser
from diffaccel.errors import UsageError
from diffaccel.nfe import EvaluationCounter
from diffaccel.nn import UNet
from diffaccel.nn.compiling import compile_forward
from diffaccel.nn.critic import MLPCritic, StyleGAN2Critic, r1_penalty
from diffaccel.nn.text import CrossAttention, Text, TextEncoder, pooled
from diffaccel.prior import GaussianPrior
from diffaccel.process import EDMVarianceExploding
from diffaccel.sampling import Sampler

SHAPE, DIM = (2, 8, 8), 6
VALID = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)


def condition() -> Condition:
    return Condition(tokens=torch.randn(3, 4, DIM), valid=VALID)


def network(**keys: object) -> UNet:
    torch.manual_seed(0)
    return UNet(SHAPE, widths=[8, 16], blocks=1, attention=[1], embedding=12, **{"tokens": DIM, **keys})


@pytest.mark.parametrize("heads", [[1], [1, 1]])
@pytest.mark.parametrize("layers", [0, 2])
def test_the_null_condition_is_the_unconditional_network(layers: int, heads: list[int]):
    """To the bit, after training: none, no valid token, or dropped; and the network without these layers."""
    unet = stirred(network(text_layers=layers, heads=heads))
    plain = network(tokens=0, heads=heads)
    plain.load_state_dict({name: unet.state_dict()[name] for name in plain.state_dict()})
    x, noise, given = torch.randn(3, *SHAPE), torch.rand(3), condition()
    null = plain(x, noise)
    assert torch.equal(unet(x, noise), null)
    assert torch.equal(unet(x, noise, given.drop(others=torch.ones(3, dtype=torch.bool))), null)
    found = unet(x, noise, given)
    assert torch.equal(found[1], null[1]), "a sample without valid token beside others"
    assert all((found[i] - null[i]).abs().max() > 1e-3 for i in (0, 2))


def test_an_unconditional_network_is_widened():
    """Every caption gives the output of the unconditional network until the new layers are trained, which they are."""
    plain = stirred(network(tokens=0))
    unet = network(text_layers=1)
    unet.load_state_dict(unet.widened(plain.state_dict()))
    x, noise = torch.randn(3, *SHAPE), torch.rand(3)
    found = unet(x, noise, condition())
    assert torch.equal(found, plain(x, noise))
    found.square().mean().backward()
    outs = [module.out.weight.grad for module in unet.modules() if isinstance(module, CrossAttention)]
    assert outs and all(gradient.abs().max() > 0 for gradient in outs)
    with pytest.raises(RuntimeError, match="Missing key"):
        incomplete = plain.state_dict()
        incomplete.pop("down.0.0.conv_1.weight")
        unet.load_state_dict(unet.widened(incomplete))


@pytest.mark.parametrize("layers", [0, 2])
def test_padding_changes_nothing_and_tokens_do(layers: int):
    unet = stirred(network(text_layers=layers))
    x, noise, given = torch.randn(3, *SHAPE), torch.rand(3), condition()
    found = unet(x, noise, given)
    padding = torch.where(VALID[..., None], given.tokens, torch.randn(3, 4, DIM) * 100)
    torch.testing.assert_close(unet(x, noise, given._replace(tokens=padding)), found)
    longer = Condition(tokens=F.pad(given.tokens, (0, 0, 0, 3), value=7.0), valid=F.pad(VALID, (0, 3)))
    torch.testing.assert_close(unet(x, noise, longer), found)
    alone = unet(x[[0]], noise[[0]], Condition(tokens=given.tokens[:1, :2]))
    torch.testing.assert_close(alone, found[[0]], rtol=1e-4, atol=1e-4)
    other = given._replace(tokens=given.tokens.roll(1, 0))
    assert (unet(x, noise, other)[2] - found[2]).abs().max() > 1e-3


def test_only_a_text_encoder_reads_the_order_of_the_words():
    x, noise, given = torch.randn(3, *SHAPE), torch.rand(3), condition()
    turned = given._replace(tokens=given.tokens.flip(1))
    for layers, differs in ((0, False), (1, True)):
        unet = stirred(network(text_layers=layers))
        change = (unet(x, noise, turned)[2] - unet(x, noise, given)[2]).abs().max()
        assert (change > 1e-3) == differs


def test_cross_attention_is_the_formula():
    """One head: x + W_o softmax(q k^T / sqrt(C)) v over the visible tokens."""
    torch.manual_seed(0)
    layer = stirred(CrossAttention(8, DIM, groups=2), 0.5)
    x, tokens = torch.randn(1, 8, 2, 3), torch.randn(1, 4, DIM)
    visible = torch.tensor([[True, False, True, True]])
    flat: Tensor = layer.norm(x)[0].flatten(1).T  # (6, 8)
    q = flat @ layer.query.weight[:, :, 0, 0].T + layer.query.bias
    k, v = layer.key_value(tokens[0, visible[0]]).chunk(2, dim=1)
    attended = (q @ k.T / math.sqrt(8)).softmax(1) @ v
    change = attended @ layer.out.weight[:, :, 0, 0].T + layer.out.bias
    expected = x + change.T.reshape(1, 8, 2, 3)
    torch.testing.assert_close(layer(x, Text(tokens, visible, torch.tensor([True]))), expected)


def test_the_pooled_text_is_the_mean_of_valid_tokens():
    given = condition()
    found = pooled(given)
    torch.testing.assert_close(found[0], given.tokens[0, :2].mean(0))
    assert not found[1].any()
    torch.testing.assert_close(pooled(given._replace(valid=None)), given.tokens.mean(1))


@pytest.mark.parametrize("kind", [StyleGAN2Critic, MLPCritic])
def test_a_critic_sees_the_text(kind: type):
    torch.manual_seed(0)
    critic, given = kind(SHAPE, tokens=DIM), condition()
    x = torch.randn(3, *SHAPE)
    logits = critic(x, given)
    changed = critic(x, given._replace(tokens=given.tokens.roll(1, 0)))
    assert not torch.allclose(changed, logits, atol=1e-4)
    one = critic(x[:1], given.select(slice(0, 1)))
    assert one.isfinite().all() and r1_penalty(lambda seen: critic.logits(seen, given), x, 1.0).shape == (3,)
    with pytest.raises(UsageError, match="critic with tokens was called without them"):
        critic(x, None)
    both = kind(SHAPE, classes=3, tokens=DIM)
    labels = torch.tensor([0, 1, 2])
    assert not torch.allclose(both(x, given._replace(labels=labels)), both(x, given._replace(labels=labels.roll(1))))


def test_evaluations_and_flops_of_a_caption_are_counted():
    """Guidance doubles the evaluations; a caption costs operations."""
    unet = stirred(network(text_layers=1), 0.15)
    sampler = Sampler(KarrasDenoiser(unet, EDMVarianceExploding()), GaussianPrior(), "ddim", SHAPE)
    guided = Sampler(
        KarrasDenoiser(unet, EDMVarianceExploding()), GaussianPrior(), {"name": "ddim", "guidance": 1.0}, SHAPE
    )
    given = condition()._replace(valid=None)
    plain, with_guidance = sampler(3, nfe=4, condition=given), guided(3, nfe=8, condition=given)
    assert sampler.spent.evaluations == {"denoiser": 12, "text_encoder": 3}
    assert guided.spent.evaluations == {"denoiser": 24, "text_encoder": 3}
    with EvaluationCounter(unet.condition_encoders) as once, torch.no_grad():
        unet.encoded(given)
    encoding = once.flops["text_encoder"] / 1e9
    plain_flops, guided_flops = (one.spent.gflops_per_image - encoding for one in (sampler, guided))
    assert guided_flops == pytest.approx(2 * plain_flops) and plain_flops > encoding > 0
    assert not torch.equal(plain, with_guidance)
    x, noise = torch.randn(1, *SHAPE), torch.rand(1)
    flops = []
    for one in (None, given.select(slice(0, 1))):
        with EvaluationCounter({"denoiser": unet}) as counter:
            unet(x, noise, one)
        flops.append(counter.flops["denoiser"])
    assert flops[1] > flops[0]


def test_a_compiled_network_takes_captions(monkeypatch: pytest.MonkeyPatch):
    """Also a short batch, which is filled up; the graph itself is traced without a compiler."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled(function, backend="eager", dynamic=False))
    unet = stirred(network(text_layers=1))
    x, noise, given = torch.randn(3, *SHAPE), torch.rand(3), condition()
    expected = unet(x, noise, given), unet(x[:2], noise[:2], given.select(slice(0, 2))), unet(x, noise)
    compile_forward(unet, constant=False)
    with torch.no_grad():
        found = unet(x, noise, given), unet(x[:2], noise[:2], given.select(slice(0, 2))), unet(x, noise)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_a_network_refuses():
    with pytest.raises(UsageError, match="tokens requires network.attention: set it, or remove network.tokens"):
        UNet(SHAPE, widths=[8], tokens=4)
    with pytest.raises(UsageError, match="text_layers requires network.tokens"):
        UNet(SHAPE, widths=[8], attention=[0], text_layers=1)
    assert network().takes == Kinds(tokens=DIM)
    assert TextEncoder(DIM, 12, 2)(condition()).present.tolist() == [True, False, True]
