"""Exact auto-encoder of the tests: it moves pixels to channels, so that decoding inverts encoding."""

from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from diffaccel.latents import AUTOENCODERS, AutoEncoder, Moments
from diffaccel.weights import save_weights


class Shuffle(AutoEncoder):
    """2x2 pixels are channels, times a gain for each channel; the posterior has a standard deviation of its own."""

    def __init__(self, shape: tuple[int, int, int], std: float = 0.0) -> None:
        super().__init__(shape, 4 * shape[0], 2)
        self.gain = nn.Parameter(torch.linspace(1.0, 3.0, 4 * shape[0])[:, None, None])
        self.spread = std

    def encode(self, images: Tensor) -> Moments:
        mean = self.gain * rearrange(images, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)
        return Moments(mean, torch.full_like(mean, self.spread))

    def decode(self, latents: Tensor) -> Tensor:
        return rearrange(latents / self.gain, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2)

    @property
    def last_layer(self) -> Tensor:
        return self.gain


KL: dict[str, Any] = {"name": "kl", "widths": [8, 16], "blocks": 1, "channels": 3, "groups": 4}


def kl(shape: tuple[int, int, int] = (1, 8, 8), **keys: Any) -> AutoEncoder:
    """A small random KL auto-encoder."""
    return AUTOENCODERS.build({**KL, **keys}, shape=shape).eval()


def write_autoencoder(path: Path, seed: int = 0) -> Path:
    """Write random weights, as a fit writes trained ones."""
    torch.manual_seed(seed)
    network = kl()
    network.latent_std.fill_(0.5)
    header = {"kind": "autoencoder", "autoencoder": KL, "shape": [1, 8, 8], "images_seen": 100}
    save_weights(path, network.state_dict(), header, torch.float32)
    return path
