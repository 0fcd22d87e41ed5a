"""Auto-encoders, and the standardised latents that a diffusion runs in."""

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffaccel.errors import UsageError
from diffaccel.parts.registry import Registry
from diffaccel.weights import tensors_sha256

AUTOENCODERS: Registry["AutoEncoder"] = Registry(
    "auto-encoder",
    group="diffaccel.autoencoders",
    builtins=["diffaccel.latents.kl"],
    context=["shape"],
    extra={"checkpoint": Path | None, "std": float, "sample": bool, "cache": Path | None},
)

DECODED = 2**20
"""Maximum number of pixels that are encoded or decoded at once, such as those of 16 images of 256x256."""


class Moments(NamedTuple):
    """Gaussian posterior of latents, independent in each element.

    Attributes:
        mean: Means, (B, c, h, w).
        std: Standard deviations, (B, c, h, w).
    """

    mean: Tensor
    std: Tensor

    def draw(self, z: Tensor) -> Tensor:
        """Map standard normal numbers (B, c, h, w) to draws from the posterior."""
        return self.mean + self.std * z


@AUTOENCODERS.base
class AutoEncoder(nn.Module, ABC):
    """Map between images and latents of a lower resolution.

    Args:
        shape: Image shape (C, H, W).
        channels: Number of channels of the latents, c.
        factor: Number of pixels along each side of an image for each element of its latents.

    Attributes:
        latent_mean: Mean of each channel of the latents of training images, (c,).
        latent_std: Standard deviation of these latents about the means, over all channels, 0-dimensional.

    Raises:
        UsageError: The image size is not a multiple of the factor.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, shape: tuple[int, int, int], channels: int, factor: int) -> None:
        super().__init__()
        depth, height, width = shape
        if height % factor or width % factor:
            raise UsageError(
                f"latents: images of {height}x{width} can't be divided by the auto-encoder's factor {factor}: choose "
                "fewer latents.widths, or another image size"
            )
        self.image_shape: tuple[int, int, int] = (depth, height, width)
        self.shape: tuple[int, int, int] = (channels, height // factor, width // factor)
        self.channels, self.factor = channels, factor
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(()))

    @abstractmethod
    def encode(self, images: Tensor) -> Moments:
        """Encode images in [-1, 1], (B, C, H, W), to latents that are not standardised."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents that are not standardised to images, (B, C, H, W), not clamped."""

    @property
    @abstractmethod
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last layer, whose gradients balance the losses of a fit."""


class Latents(nn.Module):
    """Standardised latents of a frozen auto-encoder: x = std (z - latent_mean) / latent_std.

    The latents of training images have mean 0 in each channel, and standard deviation ``std`` over all channels. A
    common factor for all channels keeps their relation, which the auto-encoder has chosen.

    Args:
        autoencoder: Auto-encoder, which is frozen.
        std: Standard deviation of the standardised latents.
    """

    def __init__(self, autoencoder: AutoEncoder, std: float = 1.0) -> None:
        super().__init__()
        self.autoencoder, self.std = autoencoder.requires_grad_(False).eval(), std

    def train(self, mode: bool = True) -> "Latents":
        """Keep the auto-encoder in evaluation mode."""
        return super().train(False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the latents, (c, h, w)."""
        return self.autoencoder.shape

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of the images, (C, H, W)."""
        return self.autoencoder.image_shape

    @property
    def sha256(self) -> str:
        """Hash of the auto-encoder's tensors."""
        return tensors_sha256(self.autoencoder.state_dict())

    @property
    def _gain(self) -> Tensor:
        return self.autoencoder.latent_std / self.std

    @torch.no_grad()
    def encode(self, images: Tensor) -> Moments:
        """Encode images in [-1, 1], (B, C, H, W), in float32, a few at a time."""
        own = self.autoencoder
        with torch.autocast(images.device.type, enabled=False):
            parts = [own.encode(part.to(own.latent_mean)) for part in images.split(self._at_once)]
        mean, std = (torch.cat(each) for each in zip(*parts, strict=True))
        return Moments((mean - own.latent_mean[:, None, None]) / self._gain, std / self._gain)

    def forward(self, x_0: Tensor) -> Tensor:
        """Decode standardised latents (B, c, h, w) to images, (B, C, H, W), not clamped."""
        own = self.autoencoder
        with torch.autocast(x_0.device.type, enabled=False):
            return own.decode(x_0.to(own.latent_mean) * self._gain + own.latent_mean[:, None, None])

    def decode(self, x_0: Tensor) -> Tensor:
        """Decode as :meth:`forward` does, a few at a time, which limits the memory."""
        return torch.cat([self(part) for part in x_0.split(self._at_once)])

    @property
    def _at_once(self) -> int:
        return max(1, DECODED // math.prod(self.image_shape[1:]))
