"""From a solver's output to an image as files hold it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffaccel.errors import UsageError


def to_uint8(images: Tensor, truncate: bool = False) -> Tensor:
    """Round images from [-1, 1] to 0 .. 255, as a file would hold them, or truncate them (half a level darker)."""
    scaled = (images.clamp(-1, 1) + 1) * 127.5
    return (scaled if truncate else scaled.round()).to(torch.uint8)


@dataclass(frozen=True)
class ImageKind:
    """How a solver's output becomes an image.

    Attributes:
        discrete: Whether samples are images, converted to uint8; toy points stay as they are.
        truncate: Whether images are truncated to uint8 instead of rounded.
    """

    discrete: bool = True
    truncate: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the images."""
        return torch.uint8 if self.discrete else torch.float32

    def __call__(self, x_0: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> uint8, or points -> float32.

        Raises:
            UsageError: A value is NaN or infinite, which as uint8 would be a dark pixel.
        """
        if not x_0.isfinite().all():
            raise UsageError("an image holds NaN or infinity: check the network's weights, or take precision=32-true")
        return to_uint8(x_0, self.truncate) if self.discrete else x_0.float()
