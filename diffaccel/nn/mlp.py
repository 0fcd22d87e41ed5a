"""Multilayer perceptron for toy points, which have no spatial structure."""

import math

from einops import pack, rearrange
from torch import Tensor, nn

from diffaccel.condition import Condition
from diffaccel.nn.unet import NETWORKS, NoiseEmbedding
from diffaccel.parts.checks import Count, Counts


@NETWORKS.register("mlp")
class MLP(nn.Module):
    """Multilayer perceptron on the flattened sample and the embedded noise conditioning.

    Args:
        shape: Sample shape (C, H, W).
        width: Hidden units per layer.
        depth: Number of hidden layers.
        embedding: Width of the noise embedding.
        heads: Channels of each head in units of the sample's channels; the heads share all layers except the last.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        width: Count = 128,
        depth: Count = 3,
        embedding: Count = 32,
        heads: Counts = [1],  # noqa: B006 (read only; a list, for YAML)
    ) -> None:
        super().__init__()
        self.shape, self.heads = tuple(shape), tuple(heads)
        size = math.prod(shape)
        self.embed_noise = NoiseEmbedding(embedding)
        widths = [size + embedding, *[width] * depth]
        hidden = [layer for a, b in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, sum(heads) * size))

    def forward(self, x: Tensor, noise: Tensor, condition: Condition | Tensor | None = None) -> Tensor:
        """Map samples (B, C, H, W) at noise conditioning (B,) to (B, sum(heads) C, H, W); conditions are ignored."""
        flat, _ = pack([rearrange(x, "b c h w -> b (c h w)"), self.embed_noise(noise).to(x)], "b *")
        _, height, width = self.shape
        return rearrange(self.layers(flat), "b (c h w) -> b c h w", h=height, w=width)
