"""Quality of images that restore known ones: errors against the test image, and consistency with the condition."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.collective import all_reduce
from diffaccel.condition import Condition
from diffaccel.data.conditions import HeldOut
from diffaccel.data.stream import to_float

ROUNDING = 1 / 12
"""Squared error of rounding to 8 bits: the smallest that counts, so that equal images have a finite ratio, 58.9 dB."""
SMALL = 6
"""Side of images from which on SSIM's window is the published one."""


def psnr(one: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images in 0 .. 255, (B, ...) -> (B,) in dB: 10 log10(255^2 / mean squared error).

    Errors below that of rounding to 8 bits, 1 / 12, count as 1 / 12.
    """
    error = (one.double() - other.double()).square().flatten(1).mean(1).clamp_min(ROUNDING)
    return 10 * (255**2 / error).log10()


def ssim(one: Tensor, other: Tensor) -> Tensor:
    """Structural similarity of images in 0 .. 255, (B, C, H, W) -> (B,).

    As published, windows are Gaussian, of 11 x 11 pixels with a standard deviation of 1.5. The mean is over all pixels,
    of images continued by reflection, as in torchmetrics. In images with a side under 6, windows are uniform, 3 x 3.

    References:
        Image Quality Assessment: From Error Visibility to Structural Similarity (Wang et al., 2004),
        https://doi.org/10.1109/TIP.2003.819861
    """
    from torchmetrics.functional.image import structural_similarity_index_measure  # imported late: it takes a second

    gaussian = min(one.shape[2:]) >= SMALL
    found = structural_similarity_index_measure(
        one.double(), other.double(), gaussian, kernel_size=3, data_range=255.0, reduction="none"
    )
    assert isinstance(found, Tensor)
    return found


class Restoration:
    """Values of the samples of a point, each compared with the test image that its condition was made from.

    Args:
        inputs: Conditions of the samples.
        n: Number of samples.
        device: Device of the sums over ranks.
        lpips: Perceptual distance of images in [-1, 1]; None for no such distance.
    """

    def __init__(self, inputs: HeldOut, n: int, device: torch.device, lpips: nn.Module | None = None) -> None:
        self.inputs, self.n, self.device, self.lpips = inputs, n, device, lpips
        first, condition = inputs.targets(range(1)), inputs.condition(range(1))
        names = self._compare(first, first, condition)
        self.values = {name: torch.zeros(n, dtype=torch.float64) for name in names}
        self.means = torch.zeros(n // inputs.samples, *first.shape[1:], dtype=torch.float64)

    def add(self, indices: Tensor, images: Tensor) -> None:
        """Add the samples of a batch of this rank, (b, C, H, W) uint8, with indices that follow each other, (b,)."""
        span = range(int(indices[0]), int(indices[-1]) + 1)
        targets, condition = self.inputs.targets(span), self.inputs.condition(span)
        for name, value in self._compare(images, targets, condition).items():
            self.values[name][indices] = value.cpu()
        rows = indices // self.inputs.samples
        whole = rows < len(self.means)
        self.means.index_add_(0, rows[whole], images[whole].double() / self.inputs.samples)

    def _compare(self, images: Tensor, targets: Tensor, condition: Condition) -> dict[str, Tensor]:
        """Compute the values of each sample, (b,) each."""
        found = {"psnr": psnr(images, targets), "ssim": ssim(images, targets)}
        if self.lpips is not None:
            one, other = (to_float(part).to(self.device) for part in (images, targets))
            found["lpips"] = self.lpips.to(self.device)(one, other).flatten().double()
        observed = self.inputs.conditioner.observe(images.float())
        if observed is not None:
            given = self.inputs.conditioner.observe(targets.float())
            assert given is not None
            found["consistency"] = psnr(observed, given.clamp(0, 255).round())
        if condition.mask is not None:
            difference = (images.double() - targets.double()).abs() * condition.mask
            found["known_error"] = difference.flatten(1).amax(1)
        baseline = self.inputs.conditioner.baseline(condition)
        if baseline is not None:
            simple = ((baseline.clamp(-1, 1) + 1) * 127.5).round()
            found |= {"psnr_baseline": psnr(simple, targets), "ssim_baseline": ssim(simple, targets)}
        return found

    def reduce(self) -> None:
        """Sum over all ranks, once; collective."""
        self.values = {name: all_reduce(value.to(self.device)).cpu() for name, value in self.values.items()}
        self.means = all_reduce(self.means.to(self.device)).cpu()

    def metrics(self) -> dict[str, float]:
        """Return the means over the samples, with standard errors over the test images; after :meth:`reduce`.

        ``known_error`` is the largest over all samples. With several samples per image, ``psnr_mean`` and ``ssim_mean``
        are those of the mean of an image's samples, before rounding.
        """
        found: dict[str, float] = {}
        for name, value in self.values.items():
            if name == "known_error":
                found[name] = value.max().item()
                continue
            found[name] = value.mean().item()
            if not name.endswith("_baseline"):
                found[f"{name}_se"] = self._error(value)
        if self.inputs.samples > 1 and len(self.means):
            targets = self.inputs.targets(range(len(self.means) * self.inputs.samples))[:: self.inputs.samples]
            found["psnr_mean"] = psnr(self.means, targets).mean().item()
            found["ssim_mean"] = ssim(self.means, targets).mean().item()
        return found

    def _error(self, value: Tensor) -> float:
        """Standard error of a mean, over test images, whose samples are not independent."""
        groups = torch.arange(self.n) // self.inputs.samples
        count = int(groups[-1]) + 1
        sums = torch.zeros(count, dtype=torch.float64).index_add_(0, groups, value)
        sizes = torch.zeros(count, dtype=torch.float64).index_add_(0, groups, torch.ones(self.n, dtype=torch.float64))
        if count < 2:
            return math.nan
        deviation = sums - sizes * value.mean()
        return (deviation.square().sum() * count / (count - 1)).sqrt().item() / self.n


def merged(point: Mapping[str, Any], metrics: Mapping[str, float]) -> dict[str, Any]:
    """Add metrics to a point and to each of its judges."""
    found = {**point, "metrics": {**point["metrics"], **metrics}}
    if "judges" in point:
        found["judges"] = {name: merged(judge, metrics) for name, judge in point["judges"].items()}
    return found
