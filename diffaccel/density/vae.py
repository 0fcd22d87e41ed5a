"""Variational autoencoder of noisy images, which samples and has a bound on its density."""

import math

import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from diffaccel.density.base import DENSITIES, Density, TrainingImages
from diffaccel.errors import UsageError


@DENSITIES.register("vae")
class VAEDensity(Density):
    """Variational autoencoder, y = decoder(latent) + s z, where s^2 is at least the variance ratio^2 of the noise in y.

    Args:
        shape: See :class:`~diffaccel.density.base.Density`; height and width multiples of 4.
        ratio: See :class:`~diffaccel.density.base.Density`.
        latent: Dimension of the latent.
        width: Channels of the first layer.

    Raises:
        UsageError: The shape can't be halved twice.

    References:
        Auto-Encoding Variational Bayes (Kingma and Welling, 2014), https://arxiv.org/abs/1312.6114
    """

    normalised = False

    def __init__(self, shape: tuple[int, int, int], ratio: float, latent: int = 64, width: int = 32) -> None:
        super().__init__(shape, ratio)
        channels, height, side = self.shape
        if height % 4 or side % 4:
            raise UsageError(f"density 'vae': images of {height}x{side} can't be halved twice: use another density")
        self.latent, self.noise_size = latent, self.size + latent
        inner = (2 * width, height // 4, side // 4)
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.SiLU(),
            nn.Flatten(), nn.Linear(math.prod(inner), 2 * latent),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(latent, math.prod(inner)), nn.SiLU(),
            Rearrange("b (c h w) -> b c h w", c=inner[0], h=inner[1]),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1), nn.SiLU(),
            nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1),
        )  # fmt: skip
        self.raw_excess = nn.Parameter(torch.zeros(()))

    @property
    def variance(self) -> Tensor:
        """Variance s^2 of the decoder."""
        return self.ratio**2 + F.softplus(self.raw_excess)

    @override
    def fit(self, images: TrainingImages) -> None:
        """Mark the density as fitted: there is nothing to fit before training."""
        self.fitted.fill_(True)

    @override
    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        noise, latent = z.split([self.size, self.latent], dim=1)
        return self.decoder(latent) + self.variance.sqrt() * noise.reshape(-1, *self.shape)

    @override
    def log_prob(self, y: Tensor) -> Tensor:
        raise UsageError("density 'vae' has no log-density: use another density for likelihoods")

    @override
    def loss(self, y: Tensor) -> Tensor:
        """Negative evidence lower bound in bits per dimension, from one draw of the latent, (B,)."""
        mean, log_std = self.encoder(y / (1 + self.ratio**2) ** 0.5).chunk(2, dim=1)
        decoded = self.decoder(mean + log_std.exp() * torch.randn_like(mean))
        square = (y - decoded).flatten(1).double().square().sum(1)
        misfit = 0.5 * (square / self.variance + self.size * (2 * math.pi * self.variance).log())
        divergence = (0.5 * (mean.square() + (2 * log_std).exp() - 1) - log_std).double().sum(1)
        return (misfit + divergence) / (self.size * math.log(2))
