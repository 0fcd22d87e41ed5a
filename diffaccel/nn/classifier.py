"""Noise-level classifier of Denoising Langevin Gibbs."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from diffaccel.errors import UsageError


class NoiseLevelClassifier(nn.Module):
    """Four 3x3 convolutions with ReLU and average pooling, then one linear layer.

    This is the reference network: no normalisation layers, widths 32 to 256, pooling to 2x2 (1024 features). Smaller
    images than 32 pixels are pooled after fewer of the convolutions. At 256 pixels, the first three pooling layers have
    a stride of 4, as in the reference code.

    Args:
        shape: Image shape (C, H, W), H = W.
        levels: Number of noise levels K.
        width: Channels of the first convolution; each convolution doubles the width.
        normalise: Whether to divide a state by its root mean square and append the logarithm of the latter as a
            channel. The magnitude of states spans four decades, most of which a network hardly distinguishes on raw
            values. False for the reference network.

    Raises:
        UsageError: The images are not square, or can't be pooled to 2x2.

    References:
        Denoising MCMC (Kim and Ye, 2022), https://arxiv.org/abs/2209.14593, reference code
    """

    def __init__(self, shape: tuple[int, int, int], levels: int, width: int = 32, normalise: bool = True) -> None:
        super().__init__()
        channels, size, width_in_pixels = shape
        if size != width_in_pixels:
            raise UsageError(f"classifier: images of {size}x{width_in_pixels} pixels are not square")
        widths = [channels + normalise, width, 2 * width, 4 * width, 8 * width]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in zip(widths, widths[1:], strict=False)
        )
        self.normalise = normalise
        self.strides = _strides(size)
        self.linear = nn.Linear(8 * width * 4, levels)

    def features(self, y: Tensor) -> Tensor:
        """Features of the last layer: (B, C, H, W) -> (B, 4 * 8 * width)."""
        if self.normalise:
            scale = y.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-6)
            y = torch.cat([y / scale, scale.log().expand(-1, 1, *y.shape[2:])], dim=1)
        for convolution, stride in zip(self.convolutions, self.strides, strict=True):
            y = F.relu(convolution(y))
            if stride:
                y = F.avg_pool2d(y, 2, stride)
        return rearrange(y, "b c h w -> b (c h w)")

    def forward(self, y: Tensor) -> Tensor:
        """Logits of the noise levels: (B, C, H, W) -> (B, K)."""
        return self.linear(self.features(y))


def _strides(size: int) -> list[int]:
    """Pooling stride after each of the four convolutions, 0 for no pooling, to reduce ``size`` to 2."""
    halvings = round(math.log2(size / 2))
    if size != 2 ** (halvings + 1) or not 0 <= halvings <= 8:
        raise UsageError(
            f"classifier: images of {size} pixels cannot be pooled to 2x2: use a power of two from 2 to 512"
        )
    if halvings <= 4:
        return [2] * halvings + [0] * (4 - halvings)
    return [4] * (halvings - 4) + [2] * (8 - halvings)
