"""Convolutional auto-encoder with a Gaussian posterior, as in latent diffusion.

Layers and names are those of diffusers' AutoencoderKL, whose weights fit without renaming.

References:
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022),
    https://arxiv.org/abs/2112.10752, appendix G
"""

from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from diffaccel.errors import UsageError
from diffaccel.latents.base import AUTOENCODERS, AutoEncoder, Moments
from diffaccel.parts.checks import Count, Counts

EPS = 1e-6
"""Added to the variance in group normalisation."""
LOG_VARIANCE = -30.0, 20.0
"""Range that the log-variance of the posterior is clamped to."""


class ResidualBlock(nn.Module):
    """Residual block: twice GroupNorm, SiLU and a 3x3 convolution."""

    def __init__(self, width_in: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, width_in, EPS), nn.GroupNorm(groups, width, EPS)
        self.conv1, self.conv2 = nn.Conv2d(width_in, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width, H, W)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class Attention(nn.Module):
    """Residual self-attention over positions with one head."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        tokens = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        q, k, v = (layer(tokens)[:, None] for layer in (self.to_q, self.to_k, self.to_v))
        attended = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + rearrange(attended, "b (h w) c -> b c h w", h=x.shape[2])


class Middle(nn.Module):
    """Two residual blocks at the lowest resolution, with attention between them."""

    def __init__(self, width: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(width, groups)] if attention else [])
        self.resnets = nn.ModuleList(ResidualBlock(width, width, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.resnets[0](x)
        for layer in self.attentions:
            x = layer(x)
        return self.resnets[1](x)


class Downsample(nn.Module):
    """Strided convolution, with zeros at the right and bottom edges only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / 2, W / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour interpolation and a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """Residual blocks at one resolution, followed by a change of the resolution or none."""

    def __init__(self, width_in: int, width: int, blocks: int, groups: int, change: str = "") -> None:
        super().__init__()
        widths = [width_in] + [width] * blocks
        self.resnets = nn.ModuleList(ResidualBlock(before, after, groups) for before, after in pairwise(widths))
        self.downsamplers = nn.ModuleList([Downsample(width)] if change == "down" else [])
        self.upsamplers = nn.ModuleList([Upsample(width)] if change == "up" else [])

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width, H', W')."""
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Images (B, C, H, W) -> mean and log-variance, (B, 2 c, h, w)."""

    def __init__(self, depth: int, widths: list[int], blocks: int, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(depth, widths[0], 3, padding=1)
        changes = ["down"] * (len(widths) - 1) + [""]
        pairs = zip([widths[0], *widths], widths, changes, strict=False)
        self.down_blocks = nn.ModuleList(Stage(a, b, blocks, groups, change) for a, b, change in pairs)
        self.mid_block = Middle(widths[-1], groups, attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents (B, c, h, w) -> images (B, C, H, W); each stage has one block more than the encoder's."""

    def __init__(self, depth: int, widths: list[int], blocks: int, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        coarse = widths[::-1]
        self.conv_in = nn.Conv2d(channels, coarse[0], 3, padding=1)
        self.mid_block = Middle(coarse[0], groups, attention)
        changes = ["up"] * (len(widths) - 1) + [""]
        pairs = zip([coarse[0], *coarse], coarse, changes, strict=False)
        self.up_blocks = nn.ModuleList(Stage(a, b, blocks + 1, groups, change) for a, b, change in pairs)
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], EPS)
        self.conv_out = nn.Conv2d(widths[0], depth, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """See the class."""
        x = self.mid_block(self.conv_in(z))
        for stage in self.up_blocks:
            x = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


@AUTOENCODERS.register("kl")
class KLAutoEncoder(AutoEncoder):
    """Convolutional auto-encoder with a Gaussian posterior, that of diffusers' AutoencoderKL.

    The defaults are those of latent diffusion's KL auto-encoder with a factor of 4 and 3 channels.

    Args:
        shape: Image shape (C, H, W).
        widths: Number of channels at each resolution, from fine to coarse; each but the first halves the resolution.
        blocks: Number of residual blocks at each resolution of the encoder; the decoder has one more.
        channels: Number of channels of the latents.
        groups: Number of groups of group normalisation, a divisor of all widths.
        attention: Whether there is self-attention at the lowest resolution.
        projections: Whether there are 1x1 convolutions after the encoder and before the decoder.

    Raises:
        UsageError: A width is not a multiple of ``groups``, or the image size of the factor.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        widths: Counts = [128, 256, 512],  # noqa: B006 (read only; a list, for YAML)
        blocks: Count = 2,
        channels: Count = 3,
        groups: Count = 32,
        attention: bool = True,
        projections: bool = True,
    ) -> None:
        super().__init__(shape, channels, 2 ** (len(widths) - 1))
        if wrong := [width for width in widths if width % groups]:
            raise UsageError(
                f"auto-encoder 'kl': the width {wrong[0]} is not a multiple of groups={groups}: change latents.widths "
                "or latents.groups"
            )
        self.encoder = Encoder(shape[0], widths, blocks, channels, groups, attention)
        self.decoder = Decoder(shape[0], widths, blocks, channels, groups, attention)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if projections else nn.Identity()
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if projections else nn.Identity()

    @override
    def encode(self, images: Tensor) -> Moments:
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return Moments(mean, torch.exp(0.5 * log_variance.clamp(*LOG_VARIANCE)))

    @override
    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))

    @property
    @override
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight
