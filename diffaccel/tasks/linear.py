"""Linear degradations of images, y = A x: super-resolution and colourisation.

The condition's image is y lifted to the size of x. It determines A+ A x, with the pseudo-inverse A+, an orthogonal
projection, which is imposed on predictions and samples. These then degrade to y, up to rounding to 8 bits.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from diffaccel.condition import Condition, Kinds, Observation
from diffaccel.data.conditions import CONDITIONERS, Degradation, round_to_8_bits
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams
from diffaccel.parts.checks import Count

Filter = Literal["bicubic", "area"]

ROUNDS = 10
"""Number of alternating projections of finished images."""


def resizing(size: int, smaller: int, kernel: Filter) -> Tensor:
    """Matrix that resizes a row of pixels, (smaller, size) float64.

    ``bicubic`` is PyTorch's filter with antialiasing, a = -0.5 as in Pillow and MATLAB; ``area`` the mean of blocks.
    """
    rows = torch.eye(size, dtype=torch.float64)[None, None]
    if kernel == "area":
        return F.interpolate(rows, size=(smaller, size), mode="area")[0, 0]
    return F.interpolate(rows, size=(smaller, size), mode="bicubic", antialias=True, align_corners=False)[0, 0]


def apply(rows: Tensor, columns: Tensor, images: Tensor) -> Tensor:
    """Apply a matrix to the rows and another to the columns of images (B, C, H, W), in their precision."""
    with torch.autocast(images.device.type, enabled=False):  # the error of bfloat16 exceeds that of 8-bit pixels
        return torch.einsum("ij,bcjk,lk->bcil", rows.to(images), images, columns.to(images))


class Resolved(Observation):
    """Part of an image that its resized copy determines, by the pseudo-inverses of the resizing matrices.

    Args:
        rows: Resizing matrix of the rows, (h, H).
        columns: Resizing matrix of the columns, (w, W).
    """

    rounds = ROUNDS

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        self.rows, self.columns = (torch.linalg.pinv(matrix) @ matrix for matrix in (rows, columns))

    @override
    def impose(self, x: Tensor, target: Tensor, condition: Condition) -> Tensor:
        return x + apply(self.rows, self.columns, target - x)


@CONDITIONERS.register("super_resolution")
class SuperResolution(Degradation):
    """Image at a lower resolution, as 8-bit pixels, resized back to the size of the image by bicubic interpolation.

    The interpolated image x is corrected by A+ (y - A x), so that it degrades exactly to the small image y.

    Args:
        shape: Image shape (C, H, W).
        factor: Factor between the resolutions.
        kernel: Filter of the degradation: ``bicubic`` with antialiasing, or ``area``, the mean of blocks.
        impose: Whether to impose on predictions and samples what the small image determines.

    Raises:
        UsageError: The image can't be divided by the factor.

    References:
        Image Super-Resolution via Iterative Refinement (Saharia et al., 2021), https://arxiv.org/abs/2104.07636 (the
        condition), Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model (Wang et al., 2022),
        https://arxiv.org/abs/2212.00490 (the projection)
    """

    weight_keys = ("factor", "kernel")

    def __init__(
        self, shape: tuple[int, int, int], factor: Count = 4, kernel: Filter = "bicubic", impose: bool = True
    ) -> None:
        channels, height, width = shape
        if factor < 2 or height % factor or width % factor:
            raise UsageError(
                f"condition 'super_resolution': factor={factor} must be 2 or more and divide images of {height}x{width}"
            )
        self.kinds = Kinds(image=channels)
        self.size, self.small = (height, width), (height // factor, width // factor)
        self.rows, self.columns = resizing(height, self.small[0], kernel), resizing(width, self.small[1], kernel)
        self.inverse = torch.linalg.pinv(self.rows), torch.linalg.pinv(self.columns)
        self.observation = Resolved(self.rows, self.columns) if impose else None

    def shrink(self, images: Tensor) -> Tensor:
        """Resize images (B, C, H, W) to the lower resolution, (B, C, H / factor, W / factor)."""
        return apply(self.rows, self.columns, images)

    def enlarge(self, small: Tensor) -> Tensor:
        """Resize images of the lower resolution by bicubic interpolation, (B, C, H, W)."""
        return F.interpolate(small, size=self.size, mode="bicubic", align_corners=False)

    @override
    def degrade(self, images: Tensor, noise: NoiseStreams) -> Condition:
        return self.of_small(round_to_8_bits(self.shrink(images)))

    def of_small(self, small: Tensor) -> Condition:
        """Make the conditions of small images in [-1, 1], (B, C, H / factor, W / factor).

        Raises:
            UsageError: The images have another shape.
        """
        right = (len(small), self.kinds.image, *self.small)
        if tuple(small.shape) != right:
            raise UsageError(f"condition 'super_resolution': small images have shape {tuple(small.shape)}, not {right}")
        large = self.enlarge(small)
        return Condition(image=large + apply(*self.inverse, small - self.shrink(large)))

    @override
    def baseline(self, condition: Condition) -> Tensor | None:
        """Return the bicubic interpolation of the small image."""
        assert condition.image is not None
        return self.enlarge(self.shrink(condition.image))

    @override
    def observe(self, images: Tensor) -> Tensor | None:
        return self.shrink(images)


LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the luma of ITU-R BT.601."""


def luma(images: Tensor) -> Tensor:
    """Compute the luma of colour images (B, 3, H, W), (B, 1, H, W), in their precision."""
    with torch.autocast(images.device.type, enabled=False):  # the error of bfloat16 exceeds that of 8-bit pixels
        weights = torch.tensor(LUMA, dtype=images.dtype, device=images.device)
        return torch.einsum("c,bchw->bhw", weights, images)[:, None]


class Luma(Observation):
    """Luma of a colour image, the projection on its weights."""

    rounds = ROUNDS

    @override
    def impose(self, x: Tensor, target: Tensor, condition: Condition) -> Tensor:
        weights = torch.tensor(LUMA, dtype=x.dtype, device=x.device)
        return x + (weights / weights.square().sum())[:, None, None] * luma(target - x)


@CONDITIONERS.register("colourisation")
class Colourisation(Degradation):
    """Luma of the image, 0.299 R + 0.587 G + 0.114 B as 8-bit pixels, in three equal channels.

    Args:
        shape: Image shape (C, H, W), with three channels.
        impose: Whether to impose the luma on samples.

    Raises:
        UsageError: The images have no colour.
    """

    weight_keys = ()

    def __init__(self, shape: tuple[int, int, int], impose: bool = True) -> None:
        if shape[0] != 3:
            raise UsageError(f"condition 'colourisation' requires images with three channels, not {shape[0]}")
        self.kinds, self.observation = Kinds(image=3), Luma() if impose else None

    @override
    def degrade(self, images: Tensor, noise: NoiseStreams) -> Condition:
        return Condition(image=round_to_8_bits(luma(images)).expand_as(images).contiguous())

    @override
    def baseline(self, condition: Condition) -> Tensor | None:
        """Return the grey image."""
        return condition.image

    @override
    def observe(self, images: Tensor) -> Tensor | None:
        return luma(images)
