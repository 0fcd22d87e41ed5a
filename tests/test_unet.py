"""The small U-Net: starts at zero, uses everything it has, keeps its samples apart."""

import pytest
import torch
from torch import Tensor

from diffaccel.errors import UsageError
from diffaccel.nn.unet import NETWORKS, NoiseEmbedding, UNet

VARIANTS = [
    {"widths": [8]},
    {"widths": [8, 12], "blocks": 1},
    {"widths": [8, 12, 16], "blocks": 2, "attention": [1, 2], "classes": 5},
    {"widths": [8, 12], "blocks": 3, "attention": [0], "unshuffle": 2, "dropout": 0.1},
]


def build(shape: tuple[int, int, int] = (3, 8, 8), perturb: bool = True, **keys: object) -> UNet:
    """A network whose zero-initialised layers are moved off zero, so that they let something through."""
    network = UNet(shape, embedding=16, **{"widths": [8, 12], "blocks": 1, **keys})  # type: ignore[arg-type]
    if perturb:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def inputs(n: int = 3, shape: tuple[int, int, int] = (3, 8, 8)) -> tuple[Tensor, Tensor]:
    return torch.randn(n, *shape), torch.linspace(-1.5, 1.0, n)


@pytest.mark.parametrize("keys", VARIANTS, ids=str)
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 16, 8)])
def test_starts_at_zero(keys: dict[str, object], shape: tuple[int, int, int]) -> None:
    output = build(shape, perturb=False, **keys)(*inputs(3, shape))
    assert output.shape == (3, *shape)
    assert (output == 0).all()


@pytest.mark.parametrize("keys", VARIANTS, ids=str)
def test_every_parameter_learns(keys: dict[str, object]) -> None:
    """The loss depends on each of them once the zeros are left."""
    network = build(**keys)
    x, noise = inputs()
    condition = torch.tensor([0, 4, 5]) if keys.get("classes") else None
    network(x, noise, condition).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("keys", VARIANTS, ids=str)
def test_samples_are_independent(keys: dict[str, object]) -> None:
    network = build(**keys)
    x, noise = inputs()
    together = network(x, noise)
    alone = torch.cat([network(x[i : i + 1], noise[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_every_pixel_sees_the_noise_and_its_surroundings() -> None:
    network = build(widths=[8, 12, 16], blocks=2)
    x, noise = inputs(1)
    output = network(x, noise)
    assert ((network(x, noise + 0.3) - output).abs() > 0).all()
    moved = x.clone()
    moved[0, 0, 0, 0] += 1
    assert ((network(moved, noise) - output).abs() > 0)[0, :, 7, 7].all()


def test_classes_and_the_null_class() -> None:
    network = build(classes=4)
    x, noise = inputs(1)
    outputs = [network(x, noise, torch.tensor([label])) for label in range(5)]
    assert torch.equal(network(x, noise), outputs[4])  # no label is label 4
    assert all(not torch.equal(outputs[a], outputs[b]) for a in range(5) for b in range(a))


def test_unconditional_network_ignores_labels() -> None:
    network = build()
    x, noise = inputs(2)
    assert torch.equal(network(x, noise, torch.tensor([1, 2])), network(x, noise))


def test_unshuffle_is_a_network_on_folded_pixels() -> None:
    """Folding 2x2 pixels into channels by hand gives the same network."""
    folded = build((12, 4, 4), widths=[8, 12])
    network = build((3, 8, 8), widths=[8, 12], unshuffle=2)
    network.load_state_dict(folded.state_dict())
    x, noise = inputs(2)
    by_hand = x.reshape(2, 3, 4, 2, 4, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 12, 4, 4)
    expected = folded(by_hand, noise).reshape(2, 3, 2, 2, 4, 4).permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 8, 8)
    torch.testing.assert_close(network(x, noise), expected)


def test_dropout_acts_in_training_only() -> None:
    network = build(dropout=0.5)
    x, noise = inputs(1)
    assert torch.equal(network(x, noise), network(x, noise))
    network.train()
    assert not torch.equal(network(x, noise), network(x, noise))


def test_attention_mixes_positions() -> None:
    """With one resolution and one block the reach of convolutions is short; attention's is the whole image."""
    shape = (1, 32, 32)
    x, noise = inputs(1, shape)
    moved = x.clone()
    moved[0, 0, 0, 0] += 1

    def reach(attention: list[int]) -> Tensor:
        network = build(shape, widths=[8], attention=attention)
        for module in network.modules():  # whose means span the image
            if isinstance(module, torch.nn.GroupNorm):
                module.forward = lambda x: x  # type: ignore[method-assign]
        return (network(moved, noise) - network(x, noise)).abs()[0, 0, 31, 31]

    assert reach([]) == 0
    assert reach([0]) > 0


def test_noise_embedding_separates_levels_smoothly() -> None:
    """Neighbouring levels look alike, distant ones don't: over ln(rho) / 4 and over t."""
    embedding = NoiseEmbedding(16)
    assert not any(name.endswith("frequencies") for name in embedding.state_dict())
    level = torch.tensor([0.0, 1e-3, 0.25, 1.0])
    angle = level[:, None] * embedding.frequencies
    features = torch.cat([angle.cos(), angle.sin()], 1) / embedding.frequencies.numel() ** 0.5
    similarity = features @ features[0]
    assert similarity[1] > 0.99
    assert similarity[2] < 0.7 and similarity[3] < 0.7


def test_wrong_shapes() -> None:
    with pytest.raises(UsageError, match=r"built for images of shape \(3, 8, 8\), got \(3, 16, 16\)"):
        build()(*inputs(2, (3, 16, 16)))
    with pytest.raises(UsageError, match="10x8 can't be divided by 4.*use fewer widths"):
        UNet((3, 10, 8), widths=[8, 8, 8])
    with pytest.raises(UsageError, match="can't be divided by 4"):
        UNet((3, 10, 10), widths=[8, 8], unshuffle=2)


def test_from_yaml() -> None:
    network = NETWORKS.build({"name": "unet", "widths": [8, 16], "attention": [1], "blocks": 1}, shape=(3, 8, 8))
    assert isinstance(network, UNet)
    assert network(*inputs(2)).shape == (2, 3, 8, 8)
