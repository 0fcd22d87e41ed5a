"""The Frechet distance orders damaged digits by their damage; and the damage is what it says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.distances import (
    blurred,
    build,
    damages,
    ladder,
    main,
    noisy,
    rank_correlation,
    read,
    rises,
    rises_in,
    standard,
    without_classes,
)
from diffaccel.data.arrays import Digits
from diffaccel.errors import UsageError
from diffaccel.features.extractors import Small

EXTRACTOR = Path(__file__).parents[1] / "experiments" / "digits" / "weights" / "extractor.safetensors"
DAMAGES = ("blur, pixels", "noise, of 255", "JPEG quality", "classes dropped")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The training digits in an npz; the extractor knows both of its halves alike."""
    digits = Digits().split("train")
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, images=digits.images.permute(0, 2, 3, 1).numpy(), labels=digits.labels.numpy())
    return path


@pytest.mark.parametrize("name", DAMAGES)
def test_the_distance_rises_with_the_damage(data: Path, name: str):
    real, images, labels = read(str(data), None)
    strengths = {"blur": (0, 0.5, 0.75, 1, 1.5), "noise": (0, 8, 16, 32, 64), "quality": (100, 75, 50, 25, 10)}
    damage = {damage.name: damage for damage in damages(images, labels, n=700, **strengths)}[name]
    assert all(len(damage.apply(strength)) == damage.n for strength in damage.strengths)
    extractor = Small(str(EXTRACTOR))
    found = ladder(damage, extractor, standard(real, extractor))
    assert rises_in(found) == [True, True]
    for (weakest, weakest_se), (strongest, strongest_se) in zip(found[0].pairs(), found[-1].pairs(), strict=True):
        assert strongest - weakest > 5 * (strongest_se + weakest_se), "not by chance"


def test_rising_is_strict():
    assert rises([1, 2, 3])
    assert not rises([1, 1, 3]) and not rises([1, 3, 2])


def test_rank_correlation_is_of_the_ranks():
    assert rank_correlation([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3], [2, 1, 3]) == pytest.approx(1 - 6 * 2 / (3 * 8)), "Spearman's formula"


def test_an_extractor_is_a_file_or_a_name_with_keys():
    assert build(str(EXTRACTOR)).name == "digits"
    assert build("identity,dim=5").dim == 5
    with pytest.raises(UsageError, match="no extractor is called 'identify'; did you mean 'identity'"):
        build("identify")


def grey(n: int = 50, side: int = 32) -> Tensor:
    return torch.full((n, 1, side, side), 128, dtype=torch.uint8)


def test_blur_is_a_gaussian_of_its_sigma():
    points = torch.zeros(1, 1, 17, 17, dtype=torch.uint8)
    points[..., 8, 8] = 255
    assert torch.equal(blurred(grey(), 1.5), grey()) and torch.equal(blurred(points, 0), points)
    spread = torch.arange(-8.0, 9).square()
    for sigma in (0.75, 1.0):  # wider ones lose their tails to rounding
        row = blurred(points, sigma)[0, 0].double().sum(0)
        assert (row * spread).sum() / row.sum() == pytest.approx(sigma**2, rel=0.1)


def test_noise_has_its_deviation_and_the_same_draws():
    for std in (2, 8, 32):
        difference = noisy(grey(), std).double() - 128
        assert difference.std() == pytest.approx((std**2 + 1 / 12) ** 0.5, rel=0.02), "rounding adds 1/12"
    weak, strong = noisy(grey(), 8).double() - 128, noisy(grey(), 16).double() - 128
    assert (strong - 2 * weak).abs().max() <= 1.5
    assert torch.equal(noisy(grey(), 0), grey())


def test_classes_are_dropped_and_the_number_stays():
    labels = torch.arange(40) % 10
    images = labels.to(torch.uint8)[:, None, None, None]
    for dropped in (0, 2, 8):
        kept = without_classes(images, labels, dropped, 8).flatten()
        assert len(kept) == 8 and kept.min() == dropped and kept.max() <= 9
    assert [damage.n for damage in damages(images, labels, n=30)] == [30, 30, 30, 8]


def test_the_command_says_whether_it_rises(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(data), str(EXTRACTOR), "--n", "700"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" rises") == 2 * len(DAMAGES) and all(name in printed for name in DAMAGES)
    arrays = dict(np.load(data))
    images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2)
    np.savez(tmp_path / "noisy.npz", images=noisy(images, 32).permute(0, 2, 3, 1).numpy())
    words = [str(tmp_path / "noisy.npz"), str(EXTRACTOR), str(EXTRACTOR), "--test", str(data), "--n", "100"]
    assert main(words) == 1, "noise brings the images nearer to a noisy reference"
    printed = capsys.readouterr().out
    assert "does not rise" in printed and "rank correlation" in printed
    assert main([str(data), str(EXTRACTOR), "--n", "100", "--only", "blur"]) == 0
    printed = capsys.readouterr().out
    assert "blur" in printed and "noise" not in printed
    assert main([str(tmp_path / "noisy.npz"), str(EXTRACTOR)]) == 2
    assert "noisy.npz has no array 'labels'" in capsys.readouterr().err
    np.savez(tmp_path / "few.npz", images=arrays["images"], labels=arrays["labels"] % 8)
    assert main([str(tmp_path / "few.npz"), str(EXTRACTOR)]) == 2
    assert "0 remain without 8 classes" in capsys.readouterr().err
    assert main([str(data), str(tmp_path / "none.safetensors")]) == 2
    assert "none.safetensors" in capsys.readouterr().err
