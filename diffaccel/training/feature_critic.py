"""Critic on the features of a frozen denoiser."""

import torch
from einops import rearrange
from torch import Tensor, nn

from diffaccel.condition import Condition
from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.nn.critic import (
    CRITICS,
    Critic,
    CriticBlock,
    EqualisedConv2d,
    EqualisedLinear,
    leaky,
    minibatch_deviation,
)
from diffaccel.training.encoder import Encoder


@CRITICS.register("features")
class FeatureCritic(Critic):
    """Critic on the encoder features of the frozen denoiser at the level of the states.

    The encoder was trained on such states, so that the critic need not learn image features. The trained layers are a
    residual network that receives the encoder's last features at each resolution, from the finest to the coarsest. R1
    is computed with respect to the features instead of the states, because the encoder is fixed.

    Args:
        shape: Image shape (C, H, W).
        denoiser: Frozen denoiser with the network ``unet``. Extractors that score images are not used in training.
        ratio: Noise-to-data ratio of the states.
        width: Number of channels of the trained layers.
        classes: Number of class labels; 0 for an unconditional critic.

    Raises:
        UsageError: The denoiser is exact, is trained, or has another network, or ``width`` is less than 1.

    References:
        Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation (Sauer et al., 2024),
        https://arxiv.org/abs/2403.12015
    """

    needs_trained_denoiser = True

    def __init__(
        self, shape: tuple[int, int, int], denoiser: Denoiser, ratio: float, width: int = 64, classes: int = 0
    ) -> None:
        if width < 1:
            raise UsageError(f"critic 'features': width={width}: use 1 or more")
        super().__init__(shape, width, classes)
        self.encoder = Encoder(denoiser, ratio, "critic 'features'", "use critic 'stylegan2'")
        self.sizes = self.encoder.sizes(shape)
        self.into = nn.ModuleList(EqualisedConv2d(channels, width, 1) for channels, _, _ in self.sizes)
        self.blocks = nn.ModuleList(CriticBlock(width, width) for _ in self.sizes[1:])
        self.conv = EqualisedConv2d(width + 1, width, 3, padding=1)
        _, rows, columns = self.sizes[-1]
        self.linear = EqualisedLinear(width * rows * columns, width)

    def seen(self, x: Tensor, condition: Condition | Tensor | None = None) -> Tensor:
        """Compute the encoder's features of samples (B, C, H, W) with their condition, flattened, (B, F)."""
        return torch.cat([one.to(x).flatten(1) for one in self.encoder(x, condition)], dim=1)

    def features(self, seen: Tensor) -> Tensor:
        """Compute the features of the last layer, (B, F) -> (B, width)."""
        flat = seen.split([channels * rows * columns for channels, rows, columns in self.sizes], dim=1)
        maps = [one.unflatten(1, size) for one, size in zip(flat, self.sizes, strict=True)]
        hidden = leaky(self.into[0](maps[0]))
        for block, into, one in zip(self.blocks, self.into[1:], maps[1:], strict=True):
            hidden = (block(hidden) + leaky(into(one))) / 2**0.5
        hidden = leaky(self.conv(torch.cat([hidden, minibatch_deviation(hidden)], dim=1)))
        return leaky(self.linear(rearrange(hidden, "b c h w -> b (c h w)")))
