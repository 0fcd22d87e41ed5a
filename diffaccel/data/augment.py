"""EDM's geometric augmentations, with labels for the network that are zero without augmentation."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from diffaccel.noise import NoiseStreams

LABELS = 9
"""Number of labels: horizontal and vertical flip, log2 of scale, cosine - 1 and sine of angle, 2 stretch, 2 shift."""
SCALE, SHIFT = 0.2, 0.125
"""Standard deviations of log2 of the scale, and of the shift divided by the image size."""


def augment(images: Tensor, probability: float, noise: NoiseStreams) -> tuple[Tensor, Tensor]:
    """Flip, scale, rotate, stretch and shift images at random.

    Images are mirrored left to right with probability 1/2; each other augmentation is applied with ``probability``.
    Images are resampled by bicubic interpolation with mirrored borders; EDM's code also applies a low-pass filter.
    Images without a geometric augmentation are not resampled.

    Args:
        images: Images, (B, C, H, W).
        probability: Probability of each augmentation except the mirroring.
        noise: Noise streams of the samples.

    Returns:
        Augmented images, (B, C, H, W), and augmentation labels, (B, 9).

    References:
        Elucidating the Design Space (Karras et al., 2022), https://arxiv.org/abs/2206.00364, appendix F.2, table 6
    """
    draws = noise.normal(images.new_empty(len(images), 13, dtype=torch.float32))
    u, z, turned = torch.special.ndtr(draws[:, :8]), draws[:, 8:12], draws[:, 12] < 0
    on = torch.cat([u[:, :1] < 0.5, u[:, 1:2] < 0.5 * probability, u[:, 2:6] < probability], 1).to(draws)
    mirror, flip, shift = on[:, 0], on[:, 1], on[:, 5:] * z[:, 2:]
    scale, angle = on[:, 2] * z[:, 0], on[:, 3] * math.pi * (2 * u[:, 6] - 1)
    stretch, towards = on[:, 4] * z[:, 1], math.pi * (2 * u[:, 7] - 1) * turned
    labels = [mirror, flip, scale, angle.cos() - 1, angle.sin(), stretch * towards.cos(), stretch * towards.sin()]
    images = torch.where(mirror.bool()[:, None, None, None], images.flip(-1), images)
    images = torch.where(flip.bool()[:, None, None, None], images.flip(-2), images)
    back = _rotation(-angle) @ _scaling(-SCALE * scale, -SCALE * scale)  # from output to input coordinates
    back = back @ _rotation(towards) @ _scaling(-SCALE * stretch, SCALE * stretch) @ _rotation(-towards)
    return _resampled(images, back, shift, on[:, 2:].any(1)), torch.cat([torch.stack(labels, 1), shift], 1).to(images)


def _rotation(angle: Tensor) -> Tensor:
    """Rotation matrices, (B,) -> (B, 2, 2), clockwise in the image, because the second axis points down."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    """Scaling matrices from logarithms to base 2 of the factors along both axes, (B,), (B,) -> (B, 2, 2)."""
    return torch.diag_embed(torch.stack([x, y], 1).exp2())


def _resampled(images: Tensor, back: Tensor, shift: Tensor, moved: Tensor) -> Tensor:
    """Resample images at the points ``back`` (p - shift), for pixels p in [-1, 1]^2.

    Args:
        images: Images, (B, C, H, W).
        back: Matrices from output to input coordinates, (B, 2, 2).
        shift: Shifts in units of SHIFT times the image size, (B, 2).
        moved: Images to resample, (B,) bool; other images are returned unchanged.
    """
    height, width = images.shape[-2:]
    aspect = torch.stack([back.new_full((), side / max(height, width)) for side in (width, height)])
    matrix = (back * aspect) / aspect[:, None]  # rotates pixels, not fractions
    offset = -(matrix @ (2 * SHIFT * shift)[:, :, None])
    points = F.affine_grid(torch.cat([matrix, offset], 2), list(images.shape), align_corners=False)
    # All images, because a selection by `moved` would wait for the device to know how many they are.
    resampled = F.grid_sample(images.float(), points, "bicubic", "reflection", align_corners=False)
    return torch.where(moved[:, None, None, None], resampled.to(images), images)
