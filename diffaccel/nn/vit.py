"""Vision transformer, as in DINOv2 and in the image half of CLIP.

References:
    An Image is Worth 16x16 Words (Dosovitskiy et al., 2021), https://arxiv.org/abs/2010.11929
    DINOv2: Learning Robust Visual Features without Supervision (Oquab et al., 2023), https://arxiv.org/abs/2304.07193
    Learning Transferable Visual Models From Natural Language Supervision (Radford et al., 2021),
        https://arxiv.org/abs/2103.00020
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Variant:
    """Properties in which families of transformers differ.

    Attributes:
        scale: Whether the output of each branch is multiplied by learned factors (LayerScale).
        norm_first: Whether tokens are normalised before the first block.
        patch_bias: Whether the patch embedding has a bias.
        quick: Whether GELU is approximated by x sigmoid(1.702 x).
        eps: Constant of the layer norm.
    """

    scale: bool
    norm_first: bool
    patch_bias: bool
    quick: bool
    eps: float


DINOV2 = Variant(scale=True, norm_first=False, patch_bias=True, quick=False, eps=1e-6)
CLIP = Variant(scale=False, norm_first=True, patch_bias=False, quick=True, eps=1e-5)


class Layer(nn.Module):
    """Block of attention and a perceptron with one hidden layer, each normalised first and added to its input."""

    def __init__(self, width: int, heads: int, variant: Variant) -> None:
        super().__init__()
        self.heads, self.variant = heads, variant
        self.norm_1, self.norm_2 = nn.LayerNorm(width, variant.eps), nn.LayerNorm(width, variant.eps)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.into, self.back = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        if variant.scale:
            self.scale_1, self.scale_2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, width) -> (N, tokens, width)."""
        q, k, v = rearrange(self.qkv(self.norm_1(x)), "n t (three h d) -> three n h t d", three=3, h=self.heads)
        attended = self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "n h t d -> n t (h d)"))
        x = x + (attended * self.scale_1 if self.variant.scale else attended)
        hidden = self.into(self.norm_2(x))
        hidden = self.back(hidden * torch.sigmoid(1.702 * hidden) if self.variant.quick else F.gelu(hidden))
        return x + (hidden * self.scale_2 if self.variant.scale else hidden)


class VisionTransformer(nn.Module):
    """Vision transformer whose output is the normalised class token, projected if there is a projection.

    Args:
        variant: Family.
        width: Number of channels of a token.
        layers: Number of blocks.
        patch: Side of a patch in pixels.
        side: Number of patches along each side of an image.
        dim: Number of features after a linear projection; None for no projection.
        heads: Number of attention heads; by default, of 64 channels each, as in all published models of both families.
    """

    def __init__(
        self,
        variant: Variant,
        width: int,
        layers: int,
        patch: int,
        side: int,
        dim: int | None = None,
        heads: int | None = None,
    ) -> None:
        super().__init__()
        self.patch, self.side, self.dim = patch, side, dim or width
        self.patches = nn.Conv2d(3, width, patch, patch, bias=variant.patch_bias)
        self.cls = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros(1 + side**2, width))
        self.before = nn.LayerNorm(width, variant.eps) if variant.norm_first else nn.Identity()
        self.layers = nn.Sequential(*(Layer(width, heads or width // 64, variant) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, variant.eps)
        self.project = nn.Identity() if dim is None else nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Extract features of normalised images, (N, 3, patch side, patch side) -> (N, dim)."""
        patches = rearrange(self.patches(x), "n c h w -> n (h w) c")
        tokens = torch.cat([self.cls.expand(len(x), 1, -1), patches], dim=1) + self.positions
        return self.project(self.norm(self.layers(self.before(tokens))[:, 0]))


def resample_positions(positions: Tensor, side: int) -> Tensor:
    """Interpolate position embeddings to another number of patches, as DINOv2's code does.

    The scale is that of ``side`` + 0.1 patches, which the published features depend on.

    Args:
        positions: Embeddings of the class token and of the patches, (1 + S^2, width).
        side: Number of patches along each side of an image.

    Returns:
        Embeddings, (1 + side^2, width).
    """
    own = round((len(positions) - 1) ** 0.5)
    if own == side:
        return positions
    grid = rearrange(positions[1:], "(h w) c -> 1 c h w", h=own)
    grid = F.interpolate(grid.float(), scale_factor=((side + 0.1) / own,) * 2, mode="bicubic")
    return torch.cat([positions[:1], rearrange(grid, "1 c h w -> (h w) c").to(positions)])
