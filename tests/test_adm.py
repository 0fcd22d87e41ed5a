"""The ADM U-Net: its sizes, its start, what it conditions on, and the decoupling modules of several decoders."""

import math

import pytest
import torch
from torch import nn

from diffaccel.errors import UsageError
from diffaccel.nn import MLP, NETWORKS, ADMUNet, UNet
from diffaccel.nn.adm import Attention, Block, NoiseEmbedding
from diffaccel.nn.decouple import Decouple, SpatialAttention

SMALL = {"width": 16, "multipliers": [1, 2], "blocks": 1, "attention": [4]}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def build(shape=(3, 8, 8), perturb: bool = True, **keys) -> ADMUNet:
    network = ADMUNet(shape, **{**SMALL, **keys})
    if perturb:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


@pytest.mark.parametrize(
    ("shape", "keys", "millions"),
    [
        ((3, 32, 32), {"heads": [1, 1], "augment": 9}, 216.1),
        ((3, 32, 32), {"augment": 9}, 129.7),
        ((3, 64, 64), {"width": 96, "multipliers": [1, 2, 3, 4], "attention": [32, 16], "heads": [1, 1]}, 121.1),
        # EDM's own for ImageNet 64, class-conditional
        (
            (3, 64, 64),
            {"multipliers": [1, 2, 3, 4], "attention": [32, 16, 8], "decouple": False, "classes": 1000},
            295.9,
        ),
    ],
)
def test_published_sizes(shape, keys, millions) -> None:
    with torch.device("meta"):
        assert count(ADMUNet(shape, **keys)) / 1e6 == pytest.approx(millions, abs=0.05)


def test_where_the_parameters_are() -> None:
    with torch.device("meta"):
        network = ADMUNet((3, 32, 32), heads=[1, 1], augment=9)
    decoder = network.decoders[0]
    assert count(decoder.decouple) / 1e6 == pytest.approx(1.33, abs=0.005)
    assert (count(decoder) - count(decoder.decouple)) / 1e6 == pytest.approx(85.1, abs=0.05)
    assert (count(network) - 2 * count(decoder)) / 1e6 == pytest.approx(43.3, abs=0.05)


@pytest.mark.parametrize("keys", [{}, {"heads": [2, 1], "augment": 9}, {"classes": 3}, {"decouple": False}], ids=str)
def test_every_parameter_learns(keys) -> None:
    network = build(**keys)
    x, noise = torch.randn(3, 3, 8, 8), torch.tensor([-4.0, -1.0, 0.0])
    labels, augment = torch.tensor([0, 1, 2]) if "classes" in keys else None, torch.randn(3, 9)
    output = network(x, noise, labels, augment if "augment" in keys else None)
    assert output.shape == (3, 3 * sum(keys.get("heads", [1])), 8, 8)
    output.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_samples_are_independent_and_the_noise_matters() -> None:
    network, x, noise = build(heads=[1, 1]), torch.randn(3, 3, 8, 8), torch.tensor([-4.0, -1.0, 0.0])
    together = network(x, noise)
    alone = torch.cat([network(x[i : i + 1], noise[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    assert (network(x, noise - 0.5) - together).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [ADMUNet, UNet])
def test_augmentation_labels_of_zero_are_none(kind) -> None:
    """So the network samples as if nothing were augmented; and at its start labels change nothing."""
    network = NETWORKS.build(
        {"name": "adm", **SMALL, "augment": 9} if kind is ADMUNet else {"name": "unet", "widths": [8], "augment": 9},
        shape=(3, 8, 8),
    ).eval()
    x, noise, labels = torch.randn(2, 3, 8, 8), torch.zeros(2), torch.randn(2, 9)
    assert torch.equal(network(x, noise, None, labels), network(x, noise))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert torch.equal(network(x, noise, None, 0 * labels), network(x, noise))
    assert (network(x, noise, None, labels) - network(x, noise)).abs().max() > 1e-4


def test_it_starts_as_the_reference_does() -> None:
    network = build(perturb=False, augment=9)
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    assert all(not block.conv_2.weight.any() and not block.conv_2.bias.any() for block in blocks)
    assert all(not m.out.weight.any() for m in network.modules() if isinstance(m, Attention))
    out, stem = network.decoders[0].out, network.stem
    assert not out.bias.any()
    for layer, limit in ((out, math.sqrt(3 / (16 * 9))), (stem, 1 / math.sqrt(27))):
        assert 0.9 * limit < layer.weight.abs().max() <= limit
    assert network(torch.randn(1, 3, 8, 8), torch.zeros(1)).abs().max() > 0


def test_time_embedding() -> None:
    embed = NoiseEmbedding(8, 4, 0, 0)
    embed.first, embed.second = nn.Identity(), nn.Identity()
    c, frequencies = torch.tensor([-2.5]), torch.tensor([10000 ** (-i / 4) for i in range(4)])
    plain = torch.cat([(c * frequencies).cos(), (c * frequencies).sin()])[None]
    torch.testing.assert_close(embed(c, None, None), nn.functional.silu(nn.functional.silu(plain)))


def test_spatial_attention_is_its_formula() -> None:
    module, f = SpatialAttention(5), torch.randn(2, 5, 3, 4)
    a = module.squeeze(f).flatten(1)  # (2, 12)
    q, k = ((layer.weight.item() * a + layer.bias.item()) for layer in (module.query, module.key))
    attended = torch.einsum("bij,bj->bi", (q[:, :, None] * k[:, None, :]).softmax(2), a)
    gate = attended / (1 + attended.abs())
    torch.testing.assert_close(module(f), gate.reshape(2, 1, 3, 4) * f, rtol=1e-4, atol=1e-5)
    decouple = Decouple(5)
    torch.testing.assert_close(decouple(f), f + decouple.attention(decouple.conv(f)))


@pytest.mark.parametrize(
    ("shape", "keys", "message"),
    [
        ((3, 10, 10), {"multipliers": [1, 2, 2]}, "can't be halved 2 times"),
        ((3, 8, 8), {"attention": [16]}, "no resolution 16"),
        ((3, 8, 8), {"width": 90}, "90 channels can't be divided"),
    ],
)
def test_what_can_t_be_built(shape, keys, message) -> None:
    with pytest.raises(UsageError, match=message):
        ADMUNet(shape, **{**SMALL, **keys})
    with pytest.raises(UsageError, match="built for images of shape"):
        build()(torch.randn(1, 3, 16, 16), torch.zeros(1))


# Heads of the small networks


def test_heads_of_the_small_u_net_have_a_decoder_each() -> None:
    """Each has its own way up; the encoder is one; a single head keeps the names of shipped weights."""
    two = UNet((3, 8, 8), [8, 12], blocks=1, embedding=16, heads=[2, 1]).eval()
    with torch.no_grad():
        for parameter in two.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    x, noise = torch.randn(2, 3, 8, 8), torch.zeros(2)
    before = two(x, noise)
    assert before.shape == (2, 9, 8, 8)
    with torch.no_grad():
        for parameter in two.branches[1].parameters():
            parameter.add_(0.1)
    after = two(x, noise)
    assert torch.equal(after[:, :6], before[:, :6]) and not torch.equal(after[:, 6:], before[:, 6:])
    with torch.no_grad():
        two.stem.bias += 0.1
    assert not torch.equal(two(x, noise)[:, :6], after[:, :6])
    single = UNet((3, 8, 8), [8, 12], blocks=1, embedding=16).state_dict()
    assert {"up.0.0.conv_1.weight", "merge.weight", "out.weight"} <= set(single)
    assert not any("branches" in name or "decouple" in name for name in single)


def test_heads_of_the_perceptron() -> None:
    network = MLP((2, 1, 1), 8, 1, heads=[2, 1])
    assert network(torch.randn(4, 2, 1, 1), torch.zeros(4)).shape == (4, 6, 1, 1)
