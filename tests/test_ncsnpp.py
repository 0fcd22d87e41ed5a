"""NCSN++, DDPM++ and SongUNet: published sizes and names on the meta device, and each layer against its formula."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffaccel.denoiser import KarrasDenoiser
from diffaccel.errors import UsageError
from diffaccel.nn import NETWORKS
from diffaccel.nn.ncsnpp import BlurredConv, Fourier, NCSNpp, Positional, Resample, resampling_kernel
from diffaccel.pretrained.score_sde import listing
from diffaccel.process import EDMVarianceExploding

DDPMPP = {"embedding": "positional", "resample": "box", "encoder": "standard"}
EDM = {"multipliers": [2, 2, 2], "augment": 9}
PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {  # arguments, trained numbers, modules of score_sde_pytorch
    "ve": ({}, 62_758_787, 59),
    "ve_deep": ({"blocks": 8}, 107_586_947, 95),
    "vp": (DDPMPP, 61_804_419, 55),
    "celebahq": (
        {"multipliers": [1, 1, 2, 2, 2, 2, 2], "blocks": 2, "encoder": "skip", "decoder": "skip"},
        65_574_421,
        77,
    ),
    "edm_vp": ({**EDM, **DDPMPP}, 55_733_891, 0),
    "edm_ve": (EDM, 56_397_827, 0),
}


def on_meta(name: str) -> NCSNpp:
    with torch.device("meta"):
        return NCSNpp((3, 256, 256) if name == "celebahq" else (3, 32, 32), **PUBLISHED[name][0])


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_size(name: str) -> None:
    network, (_, numbers, modules) = on_meta(name), PUBLISHED[name]
    assert sum(parameter.numel() for parameter in network.parameters()) == numbers
    frozen = sum(buffer.numel() for key, buffer in network.state_dict().items() if key.endswith("freqs"))
    assert frozen == (0 if "vp" in name else 128)
    if modules:
        indices = {int(entry.name.split(".")[1]) for entry in listing(network)}
        assert indices == set(range(modules))


def edm_lines(network: NCSNpp) -> list[str]:
    return [f"{name} {list(tensor.shape)}" for name, tensor in network.state_dict().items()]


def score_sde_lines(network: NCSNpp) -> list[str]:
    """Key, shape and place in the list of averages; the frequencies are not in it."""
    lines, place = [], 0
    for entry in listing(network):
        frozen = entry.name == "all_modules.0.W"
        lines.append(f"{entry.name} {list(entry.shape)} {-1 if frozen else place}")
        place += not frozen
    return lines


LISTINGS = {
    "ve": (score_sde_lines, "ncsnpp_cifar10_ve", 571, "3a9bdf10934fdac1"),
    "vp": (score_sde_lines, "ddpmpp_cifar10_vp", 564, "6ec2ee5b387604ee"),
    "edm_vp": (edm_lines, "edm_cifar10_vp", 417, "3e813bca13a2bdec"),
    "edm_ve": (edm_lines, "edm_cifar10_ve", 422, "df1a63d0278ae40f"),
}


@pytest.mark.parametrize("name", LISTINGS)
def test_names_shapes_and_order_are_the_published_ones(name: str) -> None:
    """By a hash of the listing; where DIFFACCEL_MANIFESTS names a folder of the published ones, line by line."""
    lines_of, file, count, sha256 = LISTINGS[name]
    lines = lines_of(on_meta(name))
    folder = os.environ.get("DIFFACCEL_MANIFESTS", "absent")
    if Path(folder).is_dir():
        entries = json.loads(Path(folder, f"{file}.json").read_text())["entries"]
        dropped = ("sigmas", "resample_filter")
        kept = [row for row in entries if not row[0].endswith(dropped)]
        assert lines == [" ".join([row[0], str(row[1]), *map(str, row[3:])]) for row in kept]
    assert len(lines) == count
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == sha256


# Layers


@pytest.mark.parametrize("name", ["fir", "box"])
def test_resampling_keeps_constants_and_sums(name: Any) -> None:
    assert resampling_kernel(name).sum() == pytest.approx(1)
    down, up = Resample(name, up=False), Resample(name, up=True)
    ones = torch.ones(1, 2, 8, 8)
    torch.testing.assert_close(down(ones)[..., 1:-1, 1:-1], ones[..., :2, :2])
    torch.testing.assert_close(up(ones)[..., 1:-1, 1:-1], torch.ones(1, 2, 14, 14))
    impulse = torch.zeros(1, 1, 8, 8)
    impulse[0, 0, 3, 4] = 1
    assert up(impulse).sum() == pytest.approx(4)
    assert down(up(impulse)).sum() == pytest.approx(1)


def test_box_is_means_and_repeated_pixels() -> None:
    x = torch.randn(2, 3, 8, 6)
    torch.testing.assert_close(Resample("box", up=False)(x), F.avg_pool2d(x, 2))
    torch.testing.assert_close(Resample("box", up=True)(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_fir_weighs_one_three_three_one() -> None:
    """Down in one dimension: (x_{2i-1} + 3 x_{2i} + 3 x_{2i+1} + x_{2i+2}) / 8; up: 3/4 of the near, 1/4 of the far."""
    row = torch.arange(1.0, 9.0)
    x = row.expand(8, 8)[None, None]
    padded = F.pad(row, (1, 1))
    expected = (padded[0:-2:2] + 3 * padded[1:-1:2] + 3 * padded[2::2][:4] + padded[3::2]) / 8
    torch.testing.assert_close(Resample("fir", up=False)(x)[0, 0, 1], expected)
    doubled = torch.stack([0.25 * padded[:-2] + 0.75 * row, 0.75 * row + 0.25 * padded[2:]], 1).flatten()
    torch.testing.assert_close(Resample("fir", up=True)(x)[0, 0, 4], doubled)


@pytest.mark.parametrize("name", ["fir", "box"])
def test_the_pyramid_may_blur_before_or_after_its_convolution(name: Any) -> None:
    layer, x = BlurredConv(3, 5, name), torch.randn(2, 3, 8, 8)
    kernel = resampling_kernel(name)
    pad = 1 + (len(kernel) - 1) // 2
    after = F.conv2d(F.conv2d(x, layer.weight, padding=pad), kernel.expand(5, 1, -1, -1), stride=2, groups=5)
    torch.testing.assert_close(layer(x), after + layer.bias[:, None, None], rtol=1e-4, atol=1e-5)


def test_embeddings_are_the_formulas() -> None:
    c = torch.tensor([0.1, 3.0, 999.0])
    fourier, positional = Fourier(6), Positional(8)
    angle = 2 * math.pi * c[:, None] * fourier.freqs
    torch.testing.assert_close(fourier(c), torch.cat([angle.sin(), angle.cos()], 1))
    w = torch.tensor([1e4 ** (-j / 3) for j in range(4)])
    torch.testing.assert_close(
        positional(c), torch.cat([(c[:, None] * w).sin(), (c[:, None] * w).cos()], 1), atol=1e-4, rtol=0
    )
    assert list(fourier.state_dict()) == ["freqs"] and not positional.state_dict()


def test_labels_join_the_embedding() -> None:
    """map_label(onehot sqrt(classes)), its bias also without a label; augmentation only if it is given."""
    network = NCSNpp((3, 8, 8), 8, [1], 1, [], embedding="positional", encoder="standard", classes=4, augment=2)
    seen: list[Tensor] = []
    network.map_layer0.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x, c = torch.randn(2, 3, 8, 8), torch.zeros(2)
    network(x, c, torch.tensor([1, 3]))
    network(x, c)
    network(x, c, torch.tensor([4, 4]), torch.ones(2, 2))
    plain = network.map_noise(c)
    assert network.map_label is not None and network.map_augment is not None
    weight, bias = network.map_label.weight, network.map_label.bias
    torch.testing.assert_close(seen[0], plain + 2 * weight[:, [1, 3]].T + bias)
    torch.testing.assert_close(seen[1], plain + bias)
    torch.testing.assert_close(seen[2], plain + bias + network.map_augment.weight.sum(1))


def test_decoder_concatenates_its_own_first() -> None:
    network = NCSNpp((3, 8, 8), 8, [1, 2], 1, [4]).eval()
    seen: dict[str, Tensor] = {}
    for name in ("8x8_up", "8x8_block0"):
        network.dec[name].register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
    network.dec["8x8_up"].register_forward_hook(lambda _, inputs, output: seen.update(h=output))
    network.enc["8x8_block0"].register_forward_hook(lambda _, inputs, output: seen.update(skip=output))
    network(torch.randn(1, 3, 8, 8), torch.zeros(1))
    assert torch.equal(seen["8x8_block0"], torch.cat([seen["h"], seen["skip"]], 1))


def test_initialisation() -> None:
    """Variance 1 / mean fan, a fifth of a third for q, k, v together; what ends a branch almost 0; biases 0."""
    network = NCSNpp((3, 8, 8), 64, [1, 2], 1, [4])
    block: Any = network.enc["4x4_block0"]
    assert block.conv0.weight.var().item() == pytest.approx(1 / (9 * (64 + 128) / 2), rel=0.05)
    assert block.qkv.weight.var().item() == pytest.approx(0.2 / ((128 + 384) / 2), rel=0.05)
    for layer in (block.conv1, block.proj, network.dec["8x8_aux_conv"]):
        assert 0 < layer.weight.abs().max() < 1e-5
    assert all(not m.bias.any() for m in network.modules() if isinstance(m, nn.Conv2d) and m.bias is not None)


def test_learns() -> None:
    """It is an experiment's network like any other: one batch, some steps, a lower loss, in training mode."""
    torch.manual_seed(0)
    layout = {"name": "ncsnpp", "width": 8, "multipliers": [1, 2], "blocks": 1, "attention": [4], "dropout": 0.1}
    denoiser = KarrasDenoiser(NETWORKS.build(layout, shape=(3, 8, 8)), EDMVarianceExploding()).train()
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=3e-3)
    x_0, eps, t = 0.5 * torch.randn(1, 3, 8, 8).expand(16, -1, -1, -1), torch.randn(16, 3, 8, 8), torch.ones(16)
    losses = []
    for _ in range(25):
        loss = denoiser.loss(x_0, t, eps).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in denoiser.parameters())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"embedding": "learned"}, "embedding is 'learned': set it to one of"),
        ({"decoder": "residual"}, "decoder is 'residual': set it to one of"),
        ({"attention": [5]}, "no resolution 5"),
        ({"multipliers": [1] * 7}, "halved 6 times"),
        ({"multipliers": []}, "multipliers"),
        ({"width": 132}, "groups"),
    ],
)
def test_refuses_what_it_cannot_build(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message), torch.device("meta"):
        NCSNpp((3, 32, 32), **keys)


def test_refuses_other_images() -> None:
    with pytest.raises(UsageError, match="was built for images"):
        NCSNpp((3, 8, 8), 8, [1, 1], 1, [])(torch.zeros(1, 3, 16, 16), torch.zeros(1))
