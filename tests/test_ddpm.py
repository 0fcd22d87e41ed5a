"""DDPM's U-Net: each layer against its formula, the whole against the published sizes, and what it refuses."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffaccel.denoiser import DENOISERS, NetworkDenoiser
from diffaccel.errors import UsageError
from diffaccel.nn.ddpm import Attention, DDPMUNet, Downsample, ResidualBlock, TimeEmbedding, Upsample
from diffaccel.nn.unet import NETWORKS
from diffaccel.process import PROCESSES

VARIANTS = [
    {"multipliers": [1]},
    {"multipliers": [1, 2], "attention": [8]},
    {"multipliers": [2, 1, 3], "blocks": 2, "attention": [8, 4], "classes": 5},
    {"groups": 1, "width": 6, "dropout": 0.1},
]


def build(shape: tuple[int, int, int] = (3, 8, 8), **keys: object) -> DDPMUNet:
    defaults = {"width": 8, "multipliers": [1, 2], "blocks": 1, "attention": [], "groups": 4, "dropout": 0.0}
    return DDPMUNet(shape, **{**defaults, **keys}).eval()  # type: ignore[arg-type]


def inputs(n: int = 3, shape: tuple[int, int, int] = (3, 8, 8)) -> tuple[Tensor, Tensor]:
    return torch.randn(n, *shape), torch.linspace(0, 999, n).round()


@pytest.mark.parametrize(
    ("size", "multipliers", "count"),
    [
        (32, [1, 2, 2, 2], 35_746_307),
        (64, [1, 2, 2, 2, 4], 78_700_803),
        (256, [1, 1, 2, 2, 4, 4], 113_673_219),
    ],
    ids=["cifar10", "celeba", "lsun"],
)
def test_has_the_published_size(size: int, multipliers: list[int], count: int) -> None:
    with torch.device("meta"):
        network = DDPMUNet((3, size, size), multipliers=multipliers)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def test_time_embedding_is_the_formula() -> None:
    """[sin, cos] of i exp(-ln(1e4) k / (h - 1)), then Linear, SiLU, Linear."""
    embedding = TimeEmbedding(8)
    seen = []
    embedding.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    index = torch.tensor([0.0, 1.0, 50.0, 999.0])
    output = embedding(index)
    angles = [[i * math.exp(-math.log(1e4) * k / 3) for k in range(4)] for i in index.tolist()]
    features = torch.tensor([[math.sin(a) for a in row] + [math.cos(a) for a in row] for row in angles])
    torch.testing.assert_close(seen[0], features, rtol=0, atol=1e-4)  # float32 knows the angle 999 to 6e-5
    first, second = embedding.layers[0], embedding.layers[2]
    expected = (features @ first.weight.T + first.bias).sigmoid() * (features @ first.weight.T + first.bias)
    torch.testing.assert_close(output, expected @ second.weight.T + second.bias, rtol=0, atol=1e-4)
    assert output.shape == (4, 32)
    assert not any(name.endswith("frequencies") for name in embedding.state_dict())


@pytest.mark.parametrize("width", [8, 12])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_residual_block_is_the_formula(width: int, scale: float) -> None:
    """Inputs of variance 1e-6 tell the epsilon of GroupNorm."""
    block = ResidualBlock(8, width, 16, dropout=0.0, groups=4).double()
    x, embedding = scale * torch.randn(2, 8, 4, 4).double(), torch.randn(2, 16).double()
    for norm in (block.norm_1, block.norm_2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)

    def norm_swish(norm: nn.GroupNorm, x: Tensor) -> Tensor:
        grouped = x.reshape(2, 4, -1)
        centred = grouped - grouped.mean(2, keepdim=True)
        normed = (centred / (centred.square().mean(2, keepdim=True) + 1e-6).sqrt()).reshape(x.shape)
        affine = normed * norm.weight[:, None, None] + norm.bias[:, None, None]
        return affine * affine.sigmoid()

    hidden = F.conv2d(norm_swish(block.norm_1, x), block.conv_1.weight, block.conv_1.bias, padding=1)
    swish = embedding * embedding.sigmoid()
    hidden = hidden + (swish @ block.project.weight.T + block.project.bias)[:, :, None, None]
    hidden = F.conv2d(norm_swish(block.norm_2, hidden), block.conv_2.weight, block.conv_2.bias, padding=1)
    skip = x
    if width != 8:
        skip = torch.einsum("oi,bihw->bohw", block.skip.weight[:, :, 0, 0], x) + block.skip.bias[:, None, None]
    torch.testing.assert_close(block(x, embedding), skip + hidden)


def test_dropout_stands_before_the_last_convolution() -> None:
    """Which sees, in training, 0 or twice what it sees otherwise: dropping before the SiLU would not just scale."""
    block = ResidualBlock(8, 8, 16, dropout=0.5, groups=4)
    seen: list[Tensor] = []
    block.conv_2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x, embedding = torch.randn(2, 8, 4, 4), torch.randn(2, 16)
    block(x, embedding)
    block.eval()(x, embedding)
    dropped, kept = seen
    torch.testing.assert_close(dropped, torch.where(dropped == 0, 0.0, 2 * kept))
    assert 0.3 < (dropped == 0).float().mean() < 0.7 and (kept != 0).all()


def test_attention_has_one_head() -> None:
    """softmax(q k^T / sqrt(C)) v over all channels, by hand and by PyTorch."""
    attention = Attention(8, groups=4).double()
    nn.init.normal_(attention.qkv.weight)  # far from uniform weights, so that the scale matters
    x = torch.randn(2, 8, 3, 5).double()
    qkv = attention.qkv(F.group_norm(x, 4, attention.norm.weight, attention.norm.bias, eps=1e-6))
    q, k, v = (part.flatten(2).transpose(1, 2) for part in qkv.split(8, dim=1))  # (2, 15, 8)
    by_hand = (q @ k.transpose(1, 2) * 8**-0.5).softmax(2) @ v
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, scale=8**-0.5), by_hand)
    expected = x + attention.out(by_hand.transpose(1, 2).reshape(2, 8, 3, 5))
    torch.testing.assert_close(attention(x), expected)


def ones_kernel(layer: Downsample | Upsample) -> None:
    """Make the layer sum its windows."""
    nn.init.ones_(layer.conv.weight)
    nn.init.zeros_(layer.conv.bias)


def test_downsampling_pads_right_and_bottom() -> None:
    """Sums of 3x3 windows of 0 .. 15 that start at even places; zeros stand right and below."""
    layer = Downsample(1)
    ones_kernel(layer)
    expected = torch.tensor([[45.0, 39.0], [66.0, 50.0]])
    assert torch.equal(layer(torch.arange(16.0).reshape(1, 1, 4, 4))[0, 0], expected)


def test_upsampling_repeats_pixels_before_it_convolves() -> None:
    """Sums of the 3x3 windows of [[1, 2], [3, 4]], each pixel repeated 2x2, zeros around."""
    layer = Upsample(1)
    ones_kernel(layer)
    expected = [[4.0, 8.0, 10.0, 8.0], [10.0, 18.0, 21.0, 16.0], [14.0, 24.0, 27.0, 20.0], [12.0, 20.0, 22.0, 16.0]]
    assert torch.equal(layer(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))[0, 0], torch.tensor(expected))


def test_layers_in_their_order() -> None:
    """Widths in, widths out, and the heights at which every block and every attention runs."""
    network = build(width=8, multipliers=[1, 2, 3], blocks=1, attention=[4])
    trace: list[tuple[str, int, int, int]] = []
    for module in network.modules():
        if isinstance(module, ResidualBlock | Attention):
            module.register_forward_hook(
                lambda module, args, output: trace.append(
                    (type(module).__name__[0], args[0].shape[1], output.shape[1], output.shape[2])
                )
            )
    network(*inputs(1))
    down = [("R", 8, 8, 8), ("R", 8, 16, 4), ("A", 16, 16, 4), ("R", 16, 24, 2)]
    middle = [("R", 24, 24, 2), ("A", 24, 24, 2), ("R", 24, 24, 2)]
    # Skips, last in first out: block 24, downsampled 16, block 16, downsampled 8, block 8, stem 8.
    up = [("R", 24 + 24, 24, 2), ("R", 24 + 16, 24, 2)]
    up += [("R", 24 + 16, 16, 4), ("A", 16, 16, 4), ("R", 16 + 8, 16, 4), ("A", 16, 16, 4)]
    up += [("R", 16 + 8, 8, 8), ("R", 8 + 8, 8, 8)]
    assert trace == down + middle + up


def test_skips_connect_counterparts() -> None:
    """What the way down leaves, the stem's output first, is what the way up sees beside its own, in reverse."""
    network = build(multipliers=[1, 1, 1], blocks=2)  # equal widths: a mistaken order wouldn't fail by itself
    left: list[Tensor] = []
    seen: list[Tensor] = []
    for module in (network.stem, *network.down):
        module.register_forward_hook(lambda _module, _args, output: left.append(output))
    for stage in network.up:
        stage.register_forward_pre_hook(lambda _stage, args: seen.append(args[0][:, 8:]))
    network(*inputs(2))
    assert len(left) == len(seen) == 9
    assert all(torch.equal(a, b) for a, b in zip(left, reversed(seen), strict=True))
    assert all(a.shape != b.shape or not torch.equal(a, b) for a, b in pairwise(left))


def test_ends_in_norm_swish_convolution() -> None:
    """The output is linear in the last convolution: no squashing."""
    network = build().double()
    x, noise = (tensor.double() for tensor in inputs(2))
    before = network(x, noise)
    with torch.no_grad():
        for parameter in network.out.parameters():
            parameter.mul_(100)
    torch.testing.assert_close(network(x, noise), 100 * before)
    nn.init.zeros_(network.norm.weight)
    nn.init.constant_(network.norm.bias, 2.0)  # a constant map of swish(2), whatever came before
    constant = torch.full((2, 8, 8, 8), 2 / (1 + math.exp(-2)), dtype=torch.float64)
    torch.testing.assert_close(network(x, noise), network.out(constant))


@pytest.mark.parametrize("keys", VARIANTS, ids=str)
def test_every_parameter_learns(keys: dict[str, object]) -> None:
    network = build(**keys).double()
    x, noise = inputs()
    condition = torch.tensor([0, 4, 5]) if keys.get("classes") else None
    network(x.double(), noise.double(), condition).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-8, name  # above float64's rounding of a gradient that is 0


@pytest.mark.parametrize("keys", VARIANTS, ids=str)
def test_samples_are_independent(keys: dict[str, object]) -> None:
    network = build(**keys)
    x, noise = inputs()
    together = network(x, noise)
    alone = torch.cat([network(x[i : i + 1], noise[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    network = build(dropout=0.5)
    x, noise = inputs(1)
    assert torch.equal(network(x, noise), network(x, noise))
    network.train()
    assert not torch.equal(network(x, noise), network(x, noise))


def test_images_need_not_be_square() -> None:
    """Attention goes by the height, and a feature map keeps its rows and columns apart."""
    network = build((1, 16, 8), attention=[16])
    x, noise = inputs(2, (1, 16, 8))
    assert network(x, noise).shape == (2, 1, 16, 8)
    assert sum(isinstance(module, Attention) for module in network.modules()) == 1 + 2 + 1


def test_classes_and_the_null_class() -> None:
    network = build(classes=4)
    x, noise = inputs(1)
    outputs = [network(x, noise, torch.tensor([label])) for label in range(5)]
    assert torch.equal(network(x, noise), outputs[4])  # no label is label 4
    assert all(not torch.equal(outputs[a], outputs[b]) for a in range(5) for b in range(a))


def test_classes_are_added_to_the_time() -> None:
    """A label whose vector is 0 leaves the unconditional network."""
    unconditional, network = build(), build(classes=2)
    network.load_state_dict(unconditional.state_dict(), strict=False)
    nn.init.zeros_(network.embed_class.weight[1])
    x, noise = inputs(2)
    assert torch.equal(network(x, noise, torch.tensor([1, 1])), unconditional(x, noise))
    with torch.no_grad():  # the vector that moves the embedding of time 7 to that of time 300
        network.embed_class.weight[1] = (network.embed_time(torch.tensor([300.0, 7.0])).diff(dim=0)).squeeze(0).neg()
    moved = network(x, torch.full((2,), 7.0), torch.tensor([1, 1]))
    torch.testing.assert_close(moved, unconditional(x, torch.full((2,), 300.0)))


def test_unconditional_network_ignores_labels() -> None:
    network = build()
    x, noise = inputs(2)
    assert torch.equal(network(x, noise, torch.tensor([1, 2])), network(x, noise))


@pytest.mark.parametrize("name", ["eps", "karras"])
def test_serves_denoisers(name: str) -> None:
    """As the small U-Net does: called by position, with the denoiser's input, noise conditioning and labels."""
    network = build(classes=3)
    denoiser = DENOISERS.build({"name": name}, process=PROCESSES.build({"name": "vp"}), network=network)
    assert isinstance(denoiser, NetworkDenoiser)
    x_0, t, label = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.9]), torch.tensor([0, 2])
    expected = network(denoiser.scale_input(x_0, t), denoiser.noise_conditioning(t), label)
    assert torch.equal(denoiser.output(x_0, t, label), expected)
    prediction = denoiser(x_0, t, label)
    rebuilt = denoiser.process.marginal(prediction.x_0, t, prediction.eps)
    torch.testing.assert_close(rebuilt, x_0, rtol=1e-4, atol=1e-4)
    denoiser.loss(x_0, t, torch.randn_like(x_0), label).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_from_yaml() -> None:
    node = {"name": "ddpm", "width": 8, "multipliers": [1, 2], "blocks": 1, "attention": [4], "groups": 4}
    network = NETWORKS.build(node, shape=(3, 8, 8))
    assert isinstance(network, DDPMUNet)
    assert network(*inputs(2)).shape == (2, 3, 8, 8)
    assert "shape" in NETWORKS.keys_of("ddpm")


def test_wrong_images() -> None:
    with pytest.raises(UsageError, match=r"built for images of shape \(3, 8, 8\), got \(3, 16, 16\)"):
        build()(*inputs(2, (3, 16, 16)))


@pytest.mark.parametrize(
    ("shape", "keys", "message"),
    [
        ((3, 12, 16), {"multipliers": [1, 1, 1, 1]}, "images of 12x16 can't be halved 3 times.*use fewer multipliers"),
        ((3, 16, 12), {"multipliers": [1, 1, 1, 1]}, "images of 16x12 can't be halved 3 times.*another image size"),
        ((3, 8, 8), {"width": 48, "groups": 32}, "48 channels can't be divided into 32 groups.*multiple"),
        ((3, 8, 8), {"groups": 0}, "can't be divided into 0 groups.*set groups"),
        ((3, 8, 8), {"width": 7, "groups": 1}, "in 7 sines and cosines: use an even width"),
        ((3, 8, 8), {"width": 2, "groups": 1}, "in 2 sines and cosines: use .* at least 4"),
        ((3, 8, 8), {"attention": [8, 16]}, r"no resolution 16.*some of \[8, 4\]"),
        ((3, 8, 8), {"multipliers": []}, "needs one or more multipliers"),
        ((3, 8, 8), {"multipliers": [1, 0]}, "all above 0"),
        ((3, 8, 8), {"multipliers": [1, math.nan]}, "all above 0"),
        ((3, 8, 8), {"multipliers": [1, 1.25]}, "10 channels can't be divided into 4 groups"),
        ((3, 8, 8), {"head_width": 3}, "16 channels with attention can't be divided into 3 channels per head"),
        ((3, 8, 8), {"head_width": 0}, "can't be divided into 0 channels per head"),
        ((3, 8, 8), {"middle_groups": 3}, "can't be divided into 3 groups"),
        ((3, 8, 8), {"attention_up": [16]}, r"no resolution 16.*some of \[8, 4\]"),
        ((3, 8, 8), {"blocks": 0}, "at least 1 block"),
    ],
)
def test_refuses(shape: tuple[int, int, int], keys: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(shape, **keys)


def test_default_groups_are_the_papers() -> None:
    with pytest.raises(UsageError, match="40 channels can't be divided into 32 groups"):
        DDPMUNet((3, 32, 32), width=40)
    norms = [module for module in DDPMUNet((3, 32, 32), width=32).modules() if isinstance(module, nn.GroupNorm)]
    assert {(norm.num_groups, norm.eps) for norm in norms} == {(32, 1e-6)}
