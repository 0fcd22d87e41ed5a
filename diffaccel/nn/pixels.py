"""Encoder of the image and the mask of a condition, which does not depend on the noise level."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffaccel.condition import Condition, Kinds, pixels_of
from diffaccel.nn.layers import groups_of, zeroed


class PixelEncoder(nn.Module):
    """Convolutional encoder of a condition's image and mask, with one map of features per resolution.

    The features of a sample whose image and mask are zero, the null condition, are zero.

    Args:
        takes: Kinds of the condition, with an image or a mask.
        unshuffle: Factor of the pixel unshuffle of the image.
        widths: Channels at each resolution, finest first; each resolution halves H and W.
        layers: Number of residual blocks per resolution.
    """

    def __init__(self, takes: Kinds, unshuffle: int, widths: list[int], layers: int) -> None:
        super().__init__()
        self.takes, self.unshuffle = takes, unshuffle
        self.stem = nn.Conv2d(takes.pixels * unshuffle**2, widths[0], 3, padding=1)
        self.into = nn.ModuleList(nn.Conv2d(fine, coarse, 1) for fine, coarse in zip(widths, widths[1:], strict=False))
        self.levels = nn.ModuleList(nn.Sequential(*(PixelBlock(width) for _ in range(layers))) for width in widths)

    def forward(self, condition: Condition) -> tuple[Tensor, ...]:
        """Encode the image and the mask of a condition.

        Args:
            condition: Condition with an image (B, C', H, W), or a mask (B, 1, H, W).

        Returns:
            Features, finest first, (B, widths[i], H / (unshuffle 2^i), W / (unshuffle 2^i)).

        Raises:
            UsageError: The image or the mask has another number of channels or another size.
        """
        like = condition.image if condition.image is not None else condition.mask
        assert like is not None
        pixels = pixels_of(condition, self.takes, like.to(self.stem.weight.dtype))
        present = (pixels != 0).flatten(1).any(1)[:, None, None, None]
        hidden, found = self.stem(F.pixel_unshuffle(pixels, self.unshuffle)), []
        for number, level in enumerate(self.levels):
            if number:
                hidden = self.into[number - 1](F.avg_pool2d(hidden, 2))
            hidden = level(hidden)
            found.append(torch.where(present, hidden, 0))
        return tuple(found)


class PixelBlock(nn.Module):
    """Residual block: GroupNorm, SiLU, 3x3; GroupNorm, SiLU, 3x3, initialised with zeros."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = (nn.GroupNorm(groups_of(width), width) for _ in range(2))
        self.conv_1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_2 = zeroed(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) -> (B, width, H, W)."""
        hidden = self.conv_1(F.silu(self.norm_1(x)))
        return x + self.conv_2(F.silu(self.norm_2(hidden)))
