"""Conversion of a solver's output to images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffaccel.deferred import check
from diffaccel.errors import UsageError


def to_uint8(images: Tensor, truncate: bool = False) -> Tensor:
    """Convert images from [-1, 1] to 0 .. 255 by rounding, or by truncation, which is half a level darker."""
    scaled = (images.clamp(-1, 1) + 1) * 127.5
    return (scaled if truncate else scaled.round()).to(torch.uint8)


@dataclass(frozen=True)
class ImageKind:
    """Conversion of a solver's output to images.

    Attributes:
        discrete: Whether samples are images, which are converted to uint8, and not toy points, which are unchanged.
        truncate: Whether images are truncated to uint8 instead of rounded.
    """

    discrete: bool = True
    truncate: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the images."""
        return torch.uint8 if self.discrete else torch.float32

    def __call__(self, x_0: Tensor) -> Tensor:
        """Convert images (B, C, H, W) in [-1, 1] to uint8, or points to float32.

        Raises:
            UsageError: A value is NaN or infinite, which would become a dark pixel in uint8.
        """
        check(
            x_0.isfinite(),
            lambda: UsageError(
                "an image contains NaN or infinity: check the network's weights, or set precision=32-true"
            ),
        )
        return to_uint8(x_0, self.truncate) if self.discrete else x_0.float()
