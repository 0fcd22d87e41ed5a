"""Decoupling module between one encoder and several decoders."""

from torch import Tensor, nn
from torch.nn import functional as F


class SpatialAttention(nn.Module):
    """Gate on all channels, from self-attention over positions on a single channel.

        a = conv1x1(f),    A = softmax(q k^T),    f softsign(A a),    q, k affine in a

    The logits of the softmax are not scaled, because q and k have one channel.

    References:
        Decoupled Diffusion Models (Huang et al., 2023), https://arxiv.org/abs/2306.13720, reference code
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(width, 1, 1)
        self.query, self.key = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

    def forward(self, f: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        a = self.squeeze(f)
        q, k, v = (x.flatten(2).transpose(1, 2) for x in (self.query(a), self.key(a), a))  # (B, H W, 1)
        attended = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return f * F.softsign(attended.transpose(1, 2).reshape(a.shape))


class Decouple(nn.Module):
    """Decoder-specific map of the encoder's output: x + S(conv3x3(x)), where S is the spatial attention.

    References:
        Decoupled Diffusion Models (Huang et al., 2023), https://arxiv.org/abs/2306.13720, reference code
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.attention = nn.Conv2d(width, width, 3, padding=1), SpatialAttention(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + self.attention(self.conv(x))
