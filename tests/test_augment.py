"""Geometric augmentation: what each label says is what happened to the image."""

import math

import pytest
import torch
from oracles import assemble
from torch import Tensor

from diffaccel.data import Batch, augment
from diffaccel.data.augment import LABELS
from diffaccel.denoiser import KarrasDenoiser
from diffaccel.denoiser.levels import LogNormal
from diffaccel.errors import UsageError
from diffaccel.methods import Diffusion, Training
from diffaccel.nn import UNet
from diffaccel.noise import NoiseStreams
from diffaccel.prior import GaussianPrior
from diffaccel.process import EDMVarianceExploding
from diffaccel.solver import SOLVERS

SIZE = 33


class Chosen:
    """Streams whose one draw turns everything off but what is set."""

    def __init__(self, **columns: float) -> None:
        self.columns = columns

    def normal(self, like: Tensor) -> Tensor:
        names = [
            "mirror",
            "flip",
            "scale",
            "rotate",
            "stretch",
            "shift",
            "angle",
            "towards",
            "z0",
            "z1",
            "z2",
            "z3",
            "turn",
        ]
        draws = torch.full_like(like, 5.0)  # Phi(5) lies above every chance
        draws[:, 6:] = 0
        for name, value in self.columns.items():
            draws[:, names.index(name)] = value
        return draws


def blob(x: float, y: float, width: float = 2.0, height: float = 2.0) -> Tensor:
    """A smooth spot at an offset from the middle, in pixels."""
    rows, columns = torch.meshgrid(torch.arange(SIZE) - SIZE // 2, torch.arange(SIZE) - SIZE // 2, indexing="ij")
    return torch.exp(-0.5 * (((columns - x) / width) ** 2 + ((rows - y) / height) ** 2))[None, None]


def middle(image: Tensor) -> tuple[float, float]:
    """Centre of mass (x, y) from the middle, in pixels."""
    weight, axis = image[0, 0] / image.sum(), torch.arange(SIZE) - SIZE // 2.0
    return (weight.sum(0) @ axis).item(), (weight.sum(1) @ axis).item()


def spread(image: Tensor) -> tuple[float, float]:
    """Deviations along x and y, in pixels."""
    weight, axis = image[0, 0] / image.sum(), torch.arange(SIZE) - SIZE // 2.0
    return (weight.sum(0) @ axis**2).sqrt().item(), (weight.sum(1) @ axis**2).sqrt().item()


def run(image: Tensor, **columns: float) -> tuple[Tensor, list[float]]:
    images, labels = augment.augment(image, 0.5, Chosen(**columns))  # type: ignore[arg-type]
    return images, labels[0].tolist()


def test_nothing_happens_to_most() -> None:
    images, labels = run(blob(6, 3))
    assert torch.equal(images, blob(6, 3)) and labels == [0] * LABELS


def test_flips() -> None:
    images, labels = run(blob(6, 3), mirror=-5)
    assert torch.equal(images, blob(-6, 3)) and labels == [1, *[0] * 8]
    images, labels = run(blob(6, 3), flip=-5)
    assert torch.equal(images, blob(6, -3)) and labels == [0, 1, *[0] * 7]


def test_a_shift_is_an_eighth_of_the_size() -> None:
    images, labels = run(blob(0, 0), shift=-5, z2=1.0, z3=-0.5)
    assert middle(images) == pytest.approx((SIZE / 8, -SIZE / 16), abs=0.05)
    assert labels[7:] == [1, -0.5] and not any(labels[:7])


def test_a_scale_is_a_fifth_of_an_octave() -> None:
    images, labels = run(blob(0, 0), scale=-5, z0=2.0)
    assert spread(images) == pytest.approx((2 * 2**0.4, 2 * 2**0.4), rel=0.02)
    assert labels[2] == 2 and sum(map(abs, labels)) == 2


def test_a_rotation_keeps_its_distance() -> None:
    images, labels = run(blob(8, 0), rotate=-5, angle=0.6745)  # Phi = 3/4: a right angle
    x, y = middle(images)
    assert math.hypot(x, y) == pytest.approx(8, abs=0.05) and abs(x) < 0.05
    assert labels[3:5] == pytest.approx([-1, 1], abs=1e-3)


@pytest.mark.parametrize(("turn", "towards"), [(1.0, 0.0), (-1.0, 0.6745)])
def test_a_stretch_keeps_the_area(turn: float, towards: float) -> None:
    images, labels = run(blob(0, 0), stretch=-5, z1=2.0, turn=turn, towards=towards)
    wide, high = 2 * 2**0.4, 2 / 2**0.4
    assert spread(images) == pytest.approx((wide, high) if turn > 0 else (high, wide), rel=0.02)
    assert labels[5:7] == pytest.approx([2, 0] if turn > 0 else [0, 2], abs=1e-3)


def test_a_stretch_goes_where_its_label_says() -> None:
    """Along x and y alike for an angle of 45 degrees, y pointing down."""
    images, labels = run(blob(6, 0), stretch=-5, z1=2.0, turn=-1.0, towards=0.3186)
    along, across = 2**0.4, 2**-0.4
    assert middle(images) == pytest.approx((3 * (along + across), 3 * (along - across)), abs=0.05)
    assert labels[5:7] == pytest.approx([2**0.5, 2**0.5], abs=2e-3)


def test_a_rotation_of_a_wide_image_turns_pixels() -> None:
    image = torch.nn.functional.pad(blob(6, 0), (16, 16))
    images, _ = augment.augment(image, 0.5, Chosen(rotate=-5, angle=0.6745))  # type: ignore[arg-type]
    rows, columns = images[0, 0].sum(1), images[0, 0].sum(0)
    assert abs(int(rows.argmax()) - SIZE // 2) == 6 and int(columns.argmax()) == 16 + SIZE // 2


def test_how_often() -> None:
    images, labels = augment.augment(torch.zeros(6000, 1, 4, 4), 0.12, NoiseStreams(0, range(6000)))
    share = (labels != 0).float().mean(0)
    expected = torch.tensor([0.5, 0.06, 0.12, 0.12, 0.12, 0.12, 0.06, 0.12, 0.12])
    torch.testing.assert_close(share, expected, rtol=0, atol=0.02)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    images = torch.randn(4, 3, 8, 8)
    together, labels = augment.augment(images, 0.9, NoiseStreams(1, range(4)))
    for i in range(4):
        alone, label = augment.augment(images[i : i + 1], 0.9, NoiseStreams(1, [i]))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(label[0], labels[i])


def edm(labels: int, probability: float) -> Diffusion:
    torch.manual_seed(0)
    network = UNet((1, 8, 8), [8], blocks=1, embedding=8, augment=labels)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    denoiser = KarrasDenoiser(network, EDMVarianceExploding())
    solver, training = SOLVERS.build({"name": "heun"}), Training(augment=probability)
    return assemble(Diffusion, denoiser, GaussianPrior(), solver, LogNormal(), training, (1, 8, 8))


def test_any_method_may_train_with_it() -> None:
    batch = Batch(torch.randn(8, 1, 8, 8), None, torch.arange(8))
    model = edm(LABELS, 0.5)
    model.phases()
    images, labels = model.augmented(batch)
    assert labels is not None and labels.any() and not torch.equal(images, batch.image)
    model.denoiser_loss(batch, NoiseStreams(0, range(8))).sum().backward()
    assert model.denoiser.network.embed_augment.weight.grad.abs().max() > 0
    plain = edm(LABELS, 0.0)
    assert plain.augmented(batch) == (batch.image, None)
    with pytest.raises(UsageError, match="set network.augment=9"):
        edm(0, 0.5).phases()
