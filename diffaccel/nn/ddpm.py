"""The U-Net of DDPM, in the layout and initialisation of TDPM's reference code."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from diffaccel.errors import UsageError
from diffaccel.nn.unet import NETWORKS


def _norm(groups: int, width: int) -> nn.GroupNorm:
    """GroupNorm with the reference's epsilon, a tenth of PyTorch's."""
    return nn.GroupNorm(groups, width, eps=1e-6)


class TimeEmbedding(nn.Module):
    """Sinusoids of the time index and a two-layer perceptron: (B,) -> (B, 4 width).

        [sin(i w_k), cos(i w_k)],    w_k = exp(-ln(1e4) k / (h - 1)),    k = 0 .. h - 1,    h = width / 2

    Every residual block applies its own SiLU to the result, so none ends it.

    Args:
        width: Number of sinusoids, even and at least 4.
    """

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.register_buffer(
            "frequencies", torch.exp(-math.log(1e4) * torch.arange(half) / (half - 1)), persistent=False
        )
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))

    def forward(self, index: Tensor) -> Tensor:
        """Embed (B,)."""
        angle = index[:, None] * self.frequencies
        return self.layers(torch.cat([angle.sin(), angle.cos()], dim=1))


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, 3x3; add the projected embedding; GroupNorm, SiLU, dropout, 3x3; residual."""

    def __init__(self, width_in: int, width: int, embedding: int, dropout: float, groups: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = _norm(groups, width_in), _norm(groups, width)
        self.conv_1, self.conv_2 = nn.Conv2d(width_in, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.project = nn.Linear(embedding, width)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, width_in, H, W), (B, embedding) -> (B, width, H, W)."""
        shift = rearrange(self.project(F.silu(embedding)), "b c -> b c 1 1")
        hidden = self.conv_1(F.silu(self.norm_1(x))) + shift
        return self.skip(x) + self.conv_2(self.dropout(F.silu(self.norm_2(hidden))))


class Attention(nn.Module):
    """Self-attention over positions with a single head, so with scale C^-1/2, residual."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(groups, width)
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        # The axis of the one head is what PyTorch's fused kernels ask for.
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (three c) h w -> three b 1 (h w) c", three=3)
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(attended, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Halve H and W: 3x3 of stride 2, padded at the right and the bottom only, as TensorFlow's "same" pads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / 2, W / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double H and W: nearest neighbour, then 3x3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.ModuleList):
    """Layers in a row, of which the residual blocks see the embedding."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, width_in, H, W), (B, embedding) -> (B, width, H', W')."""
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResidualBlock) else layer(x)
        return x


def _check(
    shape: tuple[int, int, int], width: int, multipliers: list[int], blocks: int, attention: list[int], groups: int
) -> None:
    """Refuse what can't be built, or would be built without something that was asked for."""
    _, rows, columns = shape
    if not multipliers or min(multipliers) < 1 or blocks < 1:
        raise UsageError(
            f"network 'ddpm' needs one multiplier or more, all of at least 1, and at least 1 block a resolution, got "
            f"multipliers {multipliers} and {blocks} blocks: set network.multipliers and network.blocks"
        )
    if groups < 1 or width % groups:
        raise UsageError(
            f"network 'ddpm': {width} channels can't be divided into {groups} groups: use a width that is a multiple "
            "of network.groups, or set groups"
        )
    if width % 2 or width < 4:
        raise UsageError(f"network 'ddpm' embeds time in {width} sines and cosines: use an even width of at least 4")
    halvings = len(multipliers) - 1
    if rows % 2**halvings or columns % 2**halvings:
        raise UsageError(
            f"network 'ddpm': images of {rows}x{columns} can't be halved {halvings} times ({len(multipliers)} "
            "multipliers): use fewer multipliers or another image size"
        )
    resolutions = [rows // 2**level for level in range(len(multipliers))]
    if unknown := [resolution for resolution in attention if resolution not in resolutions]:
        raise UsageError(
            f"network 'ddpm' has no resolution {unknown[0]} to attend at: set network.attention to some of "
            f"{resolutions}, or to [] for attention in the middle only"
        )


@NETWORKS.register("ddpm")
class DDPMUNet(nn.Module):
    """DDPM's U-Net; its defaults are those for CIFAR-10 (35.7 M parameters).

    One block more per resolution on the way up than on the way down, each with the skip of its counterpart; attention
    after every block of some resolutions, and once in the middle. All layers start as PyTorch's defaults leave them,
    none at zero, as in TDPM's reference code.

    Args:
        shape: Image shape (C, H, W).
        width: Channels of the first convolution, a multiple of ``groups``.
        multipliers: Channels at each resolution in units of ``width``, finest first; each next one halves H and W.
        blocks: Residual blocks per resolution on the way down.
        attention: Heights, in pixels, of the feature maps with self-attention (16 means 16x16 for square images).
        dropout: Dropout rate in the residual blocks.
        groups: Groups of the GroupNorm layers; 32 in the paper, fewer for small experiments.
        classes: Number of class labels; 0 for an unconditional network. Label ``classes`` is the null class.

    Raises:
        UsageError: The image can't be halved as often as ``multipliers`` asks, the width can't be divided into groups
            or into sines and cosines, a resolution to attend at doesn't exist, or there would be no layers.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), https://arxiv.org/abs/2006.11239, Appendix B
        Truncated Diffusion Probabilistic Models (Zheng et al., 2022), https://arxiv.org/abs/2202.09671, reference code
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        width: int = 128,
        multipliers: list[int] = [1, 2, 2, 2],  # noqa: B006 (read only; a list, for YAML)
        blocks: int = 2,
        attention: list[int] = [16],  # noqa: B006
        dropout: float = 0.1,
        groups: int = 32,
        classes: int = 0,
    ) -> None:
        super().__init__()
        _check(shape, width, multipliers, blocks, attention, groups)
        channels, rows, _ = shape
        self.shape, self.classes = tuple(shape), classes
        embedding = 4 * width
        self.embed_time = TimeEmbedding(width)
        self.embed_class = nn.Embedding(classes + 1, embedding) if classes else None

        def block(width_in: int, width_out: int) -> ResidualBlock:
            return ResidualBlock(width_in, width_out, embedding, dropout, groups)

        def attend(level: int) -> list[nn.Module]:
            return [Attention(width * multipliers[level], groups)] if rows // 2**level in attention else []

        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        hidden, skips = width, [width]
        for level, multiplier in enumerate(multipliers):
            if level:
                self.down.append(Stage([Downsample(hidden)]))
                skips.append(hidden)
            for _ in range(blocks):
                self.down.append(Stage([block(hidden, width * multiplier), *attend(level)]))
                hidden = width * multiplier
                skips.append(hidden)
        self.middle = Stage([block(hidden, hidden), Attention(hidden, groups), block(hidden, hidden)])
        for level in reversed(range(len(multipliers))):
            for index in range(blocks + 1):
                layers = [block(hidden + skips.pop(), width * multipliers[level]), *attend(level)]
                hidden = width * multipliers[level]
                if level and index == blocks:
                    layers.append(Upsample(hidden))
                self.up.append(Stage(layers))
        self.norm = _norm(groups, hidden)
        self.out = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x: Tensor, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map images (B, C, H, W) at time indices to an output of the same shape, linear and unbounded.

        Args:
            x: Images, (B, C, H, W).
            noise: Time indices 0, 1 .. T - 1 as floats, (B,), not divided by T: the fastest sinusoid turns by one
                radian an index, so that t in [0, 1] would hardly move any.
            condition: Class labels, (B,); None for the null class. An unconditional network ignores them.

        Raises:
            UsageError: The images have another shape than the network was built for.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise UsageError(f"network 'ddpm' was built for images of shape {self.shape}, got {tuple(x.shape[1:])}")
        embedding = self.embed_time(noise)
        if self.embed_class is not None:
            label = condition if condition is not None else torch.full_like(noise, self.classes, dtype=torch.long)
            embedding = embedding + self.embed_class(label)
        hidden = self.stem(x)
        skips = [hidden]
        for stage in self.down:
            hidden = stage(hidden, embedding)
            skips.append(hidden)
        hidden = self.middle(hidden, embedding)
        for stage in self.up:
            hidden = stage(torch.cat([hidden, skips.pop()], dim=1), embedding)
        return self.out(F.silu(self.norm(hidden)))
