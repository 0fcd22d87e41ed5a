"""EDM's geometric augmentations, each told to the network by a label that is zero when nothing was done."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from diffaccel.noise import NoiseStreams

LABELS = 9
"""Horizontal flip, vertical flip, log2 of scale, cosine - 1 and sine of the angle, two of anisotropy, two of shift."""
SCALE, SHIFT = 0.2, 0.125
"""Deviations: of log2 of scales, and of shifts over the image's size."""


def augment(images: Tensor, probability: float, noise: NoiseStreams) -> tuple[Tensor, Tensor]:
    """Flip, scale, rotate, stretch and shift images at random.

    Half of the images are mirrored; each of the others happens with ``probability``. Images are resampled by bicubic
    interpolation of their mirrored continuation, where EDM's code low-passes them first; unchanged ones stay exact.

    Args:
        images: (B, C, H, W).
        probability: Of each augmentation but the mirroring.
        noise: The samples' streams.

    Returns:
        The images and the labels, (B, 9).

    References:
        Elucidating the Design Space (Karras et al., 2022), https://arxiv.org/abs/2206.00364, appendix F.2, table 6
    """
    draws = noise.normal(images.new_empty(len(images), 13, dtype=torch.float32))
    u, z, turned = torch.special.ndtr(draws[:, :8]), draws[:, 8:12], draws[:, 12] < 0
    chances = torch.tensor([0.5, 0.5 * probability, *[probability] * 4], device=u.device)
    on = (u[:, :6] < chances).to(draws)
    mirror, flip, shift = on[:, 0], on[:, 1], on[:, 5:] * z[:, 2:]
    scale, angle = on[:, 2] * z[:, 0], on[:, 3] * math.pi * (2 * u[:, 6] - 1)
    stretch, towards = on[:, 4] * z[:, 1], math.pi * (2 * u[:, 7] - 1) * turned
    labels = [mirror, flip, scale, angle.cos() - 1, angle.sin(), stretch * towards.cos(), stretch * towards.sin()]
    images = torch.where(mirror.bool()[:, None, None, None], images.flip(-1), images)
    images = torch.where(flip.bool()[:, None, None, None], images.flip(-2), images)
    back = _rotation(-angle) @ _scaling(-SCALE * scale, -SCALE * scale)  # from where a pixel is to where it was
    back = back @ _rotation(towards) @ _scaling(-SCALE * stretch, SCALE * stretch) @ _rotation(-towards)
    return _resampled(images, back, shift, on[:, 2:].any(1)), torch.cat([torch.stack(labels, 1), shift], 1).to(images)


def _rotation(angle: Tensor) -> Tensor:
    """(B,) -> (B, 2, 2), clockwise as seen, since the second axis points down."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    """Logarithms to base 2 of the factors along both axes, (B,) each -> (B, 2, 2)."""
    return torch.diag_embed(torch.stack([x, y], 1).exp2())


def _resampled(images: Tensor, back: Tensor, shift: Tensor, moved: Tensor) -> Tensor:
    """Read images at ``back`` (p - shift) for pixels p, which lie in [-1, 1]^2; the others are left alone."""
    if not moved.any():
        return images
    height, width = images.shape[-2:]
    aspect = torch.tensor([width, height], device=back.device) / max(height, width)  # rotate pixels, not fractions
    matrix = (back[moved] * aspect) / aspect[:, None]
    offset = -(matrix @ (2 * SHIFT * shift[moved])[:, :, None])
    where = F.affine_grid(torch.cat([matrix, offset], 2), [int(moved.sum()), *images.shape[1:]], align_corners=False)
    read = F.grid_sample(images[moved].float(), where, "bicubic", "reflection", align_corners=False)
    return images.index_put((moved,), read.to(images))
