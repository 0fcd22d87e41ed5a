"""PSNR and SSIM against independent formulas; means over samples, their errors, and where they are stored."""

import math

import numpy as np
import pytest
import torch
from test_tasks import SHAPE, held_out, images

from diffaccel.evaluation.restoration import Restoration, merged, psnr, ssim

CPU = torch.device("cpu")


def test_psnr_is_that_of_the_mean_squared_error():
    one, other = images(3), images(3)
    for value, a, b in zip(psnr(one, other), one.numpy().astype(float), other.numpy().astype(float), strict=True):
        assert value.item() == pytest.approx(20 * math.log10(255 / math.sqrt(((a - b) ** 2).mean())))
    assert psnr(one, one).tolist() == pytest.approx([10 * math.log10(255**2 * 12)] * 3)


def ssim_by_loops(one: torch.Tensor, other: torch.Tensor, window: np.ndarray) -> list[float]:
    """Wang et al., Eq. 13, with the window at every pixel of images continued by reflection; mean over channels too."""
    side, (c_1, c_2) = len(window), ((0.01 * 255) ** 2, (0.03 * 255) ** 2)
    means = []
    for a, b in zip(one.numpy().astype(float), other.numpy().astype(float), strict=True):
        found = []
        for x, y in zip(a, b, strict=True):
            x, y = (np.pad(part, side // 2, mode="reflect") for part in (x, y))
            for i in range(a.shape[1]):
                for j in range(a.shape[2]):
                    p, q = x[i : i + side, j : j + side], y[i : i + side, j : j + side]
                    mean_p, mean_q = (window * p).sum(), (window * q).sum()
                    var_p, var_q = (window * p * p).sum() - mean_p**2, (window * q * q).sum() - mean_q**2
                    covariance = (window * p * q).sum() - mean_p * mean_q
                    top = (2 * mean_p * mean_q + c_1) * (2 * covariance + c_2)
                    found.append(top / ((mean_p**2 + mean_q**2 + c_1) * (var_p + var_q + c_2)))
        means.append(float(np.mean(found)))
    return means


def test_ssim_is_the_published_formula():
    gaussian = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(gaussian, gaussian) / gaussian.sum() ** 2
    one = images(2)
    other = (one.float() + 20 * torch.randn(one.shape)).clamp(0, 255).round().to(torch.uint8)
    assert ssim(one, other).tolist() == pytest.approx(ssim_by_loops(one, other, window), abs=1e-9)
    assert ssim(one, one).tolist() == pytest.approx([1, 1])
    small, near = one[..., :5, :5], other[..., :5, :5]
    assert ssim(small, near).tolist() == pytest.approx(ssim_by_loops(small, near, np.full((3, 3), 1 / 9)), abs=1e-9)


def test_values_and_errors_of_samples(tmp_path):
    """Batches in any order; errors over test images; the mean of an image's samples is better than each."""
    inputs = held_out(tmp_path, samples=4)
    targets = inputs.targets(range(20))
    made = (targets.float() + 30 * torch.randn(targets.shape)).clamp(0, 255).round().to(torch.uint8)
    found = Restoration(inputs, 20, CPU)
    for part in (range(7, 20), range(7)):
        index = torch.arange(part.start, part.stop)
        found.add(index, made[index])
    found.reduce()
    metrics, each = found.metrics(), psnr(made, targets)
    assert metrics["psnr"] == pytest.approx(each.mean().item())
    groups = each.reshape(5, 4).mean(1)
    assert metrics["psnr_se"] == pytest.approx((groups.std() / 5**0.5).item())
    means = made.double().reshape(5, 4, *SHAPE).mean(1)
    assert metrics["psnr_mean"] == pytest.approx(psnr(means, targets[::4]).mean().item())
    assert metrics["psnr_mean"] > metrics["psnr"] + 4
    assert metrics["ssim_mean"] == pytest.approx(ssim(means, targets[::4]).mean().item())
    mask = inputs.condition(range(20)).mask
    assert metrics["known_error"] == ((made.double() - targets.double()).abs() * mask).max().item() > 0


def test_copies_have_no_known_error_and_finite_values(tmp_path):
    inputs = held_out(tmp_path)
    found = Restoration(inputs, 5, CPU)
    found.add(torch.arange(5), inputs.targets(range(5)))
    metrics = found.metrics()
    assert metrics["known_error"] == 0 and metrics["ssim"] == pytest.approx(1)
    assert metrics["psnr"] == pytest.approx(58.92, abs=0.01) and metrics["psnr_se"] == pytest.approx(0, abs=1e-9)
    assert "psnr_mean" not in metrics and metrics["psnr_baseline"] < 40


def test_every_judge_has_the_values():
    point = {"metrics": {"fd": 1}, "judges": {"a": {"metrics": {"fd": 1}}, "b": {"metrics": {"fd": 2}, "n": 3}}, "n": 3}
    found = merged(point, {"psnr": 30})
    assert found["metrics"] == {"fd": 1, "psnr": 30} and found["judges"]["b"] == {
        "metrics": {"fd": 2, "psnr": 30},
        "n": 3,
    }
    assert point["metrics"] == {"fd": 1} and "judges" not in merged({"metrics": {}}, {"psnr": 30})
