"""What lets one encoder serve several decoders."""

from torch import Tensor, nn
from torch.nn import functional as F


class SpatialAttention(nn.Module):
    """A gate on all channels, attended over positions on a single one.

        a = conv1x1(f),    A = softmax(q k^T),    f softsign(A a),    q, k affine in a

    The softmax is not scaled, as there is one channel only.

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
    """x + S(conv3x3(x)), S the spatial attention: one decoder's own view of what the encoder made of the image.

    References:
        Decoupled Diffusion Models (Huang et al., 2023), https://arxiv.org/abs/2306.13720, reference code
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.attention = nn.Conv2d(width, width, 3, padding=1), SpatialAttention(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + self.attention(self.conv(x))
