"""U-Net of DDPM, in the layout and initialisation of TDPM's reference code."""

import math
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from diffaccel.condition import Condition, labels_of
from diffaccel.errors import UsageError
from diffaccel.nn.unet import NETWORKS
from diffaccel.parts.checks import Count, Dropout, Positives, Whole, Wholes

EPS = 1e-6
"""Epsilon of GroupNorm in DDPM's code, a tenth of PyTorch's default."""


class TimeEmbedding(nn.Module):
    """Sinusoids of the time index and a two-layer perceptron: (B,) -> (B, 4 width).

        [sin(i w_k), cos(i w_k)],    w_k = exp(-ln(1e4) k / (h - shift)),    k = 0 .. h - 1,    h = width / 2

    There is no SiLU at the end, because each residual block applies one to the embedding.

    Args:
        width: Number of sinusoids, even and at least 4.
        cosines_first: Whether the cosines precede the sines.
        shift: 1 for a lowest frequency of 1e-4, as in DDPM; 0 for the Transformer's convention.
    """

    frequencies: Tensor

    def __init__(self, width: int, cosines_first: bool = False, shift: int = 1) -> None:
        super().__init__()
        half, self.cosines_first = width // 2, cosines_first
        self.register_buffer(
            "frequencies", torch.exp(-math.log(1e4) * torch.arange(half) / (half - shift)), persistent=False
        )
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))

    def forward(self, index: Tensor) -> Tensor:
        """Embed (B,)."""
        angle = index[:, None] * self.frequencies
        halves = (angle.cos(), angle.sin()) if self.cosines_first else (angle.sin(), angle.cos())
        return self.layers(torch.cat(halves, dim=1))


class ResidualBlock(nn.Module):
    """Residual block: GroupNorm, SiLU, 3x3; add the projected embedding; GroupNorm, SiLU, dropout, 3x3.

    With ``film``, the projected embedding scales and shifts the output of the second GroupNorm instead.
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        embedding: int,
        dropout: float,
        groups: int,
        eps: float = EPS,
        film: bool = False,
    ) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.GroupNorm(groups, width_in, eps), nn.GroupNorm(groups, width, eps)
        self.conv_1, self.conv_2 = nn.Conv2d(width_in, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.film, self.project = film, nn.Linear(embedding, 2 * width if film else width)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, width_in, H, W), (B, embedding) -> (B, width, H, W)."""
        projected = rearrange(self.project(F.silu(embedding)), "b c -> b c 1 1")
        hidden = self.conv_1(F.silu(self.norm_1(x)))
        if self.film:
            scale, shift = projected.chunk(2, dim=1)
            hidden = self.norm_2(hidden) * (1 + scale) + shift
        else:
            hidden = self.norm_2(hidden + projected)
        return self.skip(x) + self.conv_2(self.dropout(F.silu(hidden)))


def _check_groups(channels: int, groups: int, head_width: int | None) -> None:
    """Raise a UsageError if attention's channels can't be divided into its groups or heads."""
    for number, what, key in (
        (groups, "groups", "middle_groups"),
        (channels if head_width is None else head_width, "channels per head", "head_width"),
    ):
        if number < 0 or (number == 0 and what != "groups") or (number and channels % number):
            raise UsageError(
                f"network 'ddpm': {channels} channels with attention can't be divided into {number} {what}: set "
                f"network.{key} to a divisor of {channels}"
            )


class Attention(nn.Module):
    """Residual self-attention over positions, with logits scaled by c^-1/2 for heads of c channels.

    Args:
        width: Number of channels.
        groups: Groups of the GroupNorm before the attention; 0 for no GroupNorm.
        head_width: Channels of a head; None for a single head.
        eps: Epsilon of the GroupNorm.

    Raises:
        UsageError: The channels can't be divided into the groups or heads.
    """

    def __init__(self, width: int, groups: int, head_width: int | None = None, eps: float = EPS) -> None:
        super().__init__()
        _check_groups(width, groups, head_width)
        self.heads = width // (head_width or width)
        self.norm = nn.GroupNorm(groups, width, eps) if groups else nn.Identity()
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (three n c) h w -> three b n (h w) c", three=3, n=self.heads)
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(attended, "b n (h w) c -> b (n c) h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Halve H and W: 3x3 with stride 2, padded at the right and the bottom only, as in TensorFlow's "same" padding.

    Args:
        width: Number of channels.
        symmetric: Whether to pad all four sides instead.
    """

    def __init__(self, width: int, symmetric: bool = False) -> None:
        super().__init__()
        self.padding = (1, 1, 1, 1) if symmetric else (0, 1, 0, 1)
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / 2, W / 2)."""
        return self.conv(F.pad(x, self.padding))


class Upsample(nn.Module):
    """Double H and W: nearest-neighbour interpolation, then 3x3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.ModuleList):
    """Sequence of layers, which passes the embedding to the residual blocks."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, width_in, H, W), (B, embedding) -> (B, width, H', W')."""
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResidualBlock) else layer(x)
        return x


def _widths(width: int, multipliers: list[float], blocks: int, groups: int) -> list[int]:
    """Channels at each resolution.

    Raises:
        UsageError: There would be no layers, or a width can't be divided into groups, or into sines and cosines.
    """
    if not multipliers or not all(0 < multiplier < 1e5 for multiplier in multipliers) or blocks < 1:
        raise UsageError(
            f"network 'ddpm' needs one or more multipliers, all above 0, and at least 1 block per resolution, got "
            f"multipliers {multipliers} and {blocks} blocks: set network.multipliers and network.blocks"
        )
    widths = [round(width * multiplier) for multiplier in multipliers]
    for found in (width, *widths):
        if groups < 1 or found < 1 or found % groups:
            raise UsageError(
                f"network 'ddpm': {found} channels can't be divided into {groups} groups: use a width that is a "
                "multiple of network.groups, or set groups"
            )
    if width % 2 or width < 4:
        raise UsageError(f"network 'ddpm' embeds time in {width} sines and cosines: use an even width of at least 4")
    return widths


def _check(shape: tuple[int, int, int], multipliers: list[float], attention: list[int]) -> None:
    """Raise a UsageError for images that can't be halved, or for attention at an unknown resolution."""
    _, rows, columns = shape
    halvings = len(multipliers) - 1
    if rows % 2**halvings or columns % 2**halvings:
        raise UsageError(
            f"network 'ddpm': images of {rows}x{columns} can't be halved {halvings} times ({len(multipliers)} "
            "multipliers): use fewer multipliers or another image size"
        )
    resolutions = [rows // 2**level for level in range(len(multipliers))]
    if unknown := [resolution for resolution in attention if resolution not in resolutions]:
        raise UsageError(
            f"network 'ddpm' has no resolution {unknown[0]} for attention: set network.attention to some of "
            f"{resolutions}, or to [] for attention in the middle only"
        )


@NETWORKS.register("ddpm")
class DDPMUNet(nn.Module):
    """DDPM's U-Net; the defaults are those for CIFAR-10 (35.7 M parameters).

    Each resolution has one more block in the decoder than in the encoder, each with a skip connection. Attention
    follows every block at some resolutions, and once in the middle. All layers have PyTorch's default initialisation,
    none is zero, as in TDPM's reference code.

    Args:
        shape: Image shape (C, H, W).
        width: Channels of the first convolution, a multiple of ``groups``.
        multipliers: Channels at each resolution in units of ``width``, finest first, rounded to integers; each
            resolution halves H and W.
        blocks: Residual blocks per resolution in the encoder.
        attention: Heights, in pixels, of the feature maps with self-attention (16 means 16x16 for square images).
        dropout: Dropout rate in the residual blocks.
        groups: Groups of the GroupNorm layers; 32 in the paper, fewer for small experiments.
        classes: Number of class labels; 0 for an unconditional network. Label ``classes`` is the null class.
        attention_up: ``attention`` in the decoder; None for the same as in the encoder.
        middle_attention: Whether there is attention in the middle.
        middle_groups: Groups of the GroupNorm before the middle attention; None for ``groups``, 0 for no GroupNorm.
        head_width: Channels of an attention head; None for a single head.
        eps: Epsilon of the GroupNorm layers.
        film: Whether the embedding scales and shifts the output of a block's second GroupNorm; otherwise it is added to
            the input of this layer.
        symmetric: Whether downsampling pads all four sides; otherwise, only the right and the bottom.
        cosines_first: See :class:`TimeEmbedding`.
        shift: See :class:`TimeEmbedding`.

    Raises:
        UsageError: The image can't be halved once per resolution, a width can't be divided into groups, heads, or sines
            and cosines, ``attention`` contains an unknown resolution, or there would be no layers.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), https://arxiv.org/abs/2006.11239, Appendix B
        Truncated Diffusion Probabilistic Models (Zheng et al., 2022), https://arxiv.org/abs/2202.09671, reference code
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        width: Count = 128,
        multipliers: Positives = [1, 2, 2, 2],  # noqa: B006 (read only; a list, for YAML)
        blocks: Count = 2,
        attention: Wholes = [16],  # noqa: B006
        dropout: Dropout = 0.1,
        groups: Count = 32,
        classes: Whole = 0,
        attention_up: list[int] | None = None,
        middle_attention: bool = True,
        middle_groups: Whole | None = None,
        head_width: Count | None = None,
        eps: float = EPS,
        film: bool = False,
        symmetric: bool = False,
        cosines_first: bool = False,
        shift: int = 1,
    ) -> None:
        super().__init__()
        up = attention if attention_up is None else attention_up
        widths = _widths(width, multipliers, blocks, groups)
        _check(shape, multipliers, [*attention, *up])
        channels, rows, _ = shape
        self.shape, self.classes = tuple(shape), classes
        embedding = 4 * width
        self.embed_time = TimeEmbedding(width, cosines_first, shift)
        self.embed_class = nn.Embedding(classes + 1, embedding) if classes else None

        block = partial(ResidualBlock, embedding=embedding, dropout=dropout, groups=groups, eps=eps, film=film)
        attend = partial(Attention, head_width=head_width, eps=eps)

        def attended(level: int, rows_attended: list[int]) -> list[nn.Module]:
            return [attend(widths[level], groups)] if rows // 2**level in rows_attended else []

        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        hidden, skips = width, [width]
        for level, wide in enumerate(widths):
            if level:
                self.down.append(Stage([Downsample(hidden, symmetric)]))
                skips.append(hidden)
            for _ in range(blocks):
                self.down.append(Stage([block(hidden, wide), *attended(level, attention)]))
                hidden = wide
                skips.append(hidden)
        self.middle = Stage([block(hidden, hidden)])
        if middle_attention:
            self.middle.append(attend(hidden, groups if middle_groups is None else middle_groups))
        self.middle.append(block(hidden, hidden))
        for level in reversed(range(len(widths))):
            for index in range(blocks + 1):
                layers = [block(hidden + skips.pop(), widths[level]), *attended(level, up)]
                hidden = widths[level]
                if level and index == blocks:
                    layers.append(Upsample(hidden))
                self.up.append(Stage(layers))
        self.norm = nn.GroupNorm(groups, hidden, eps)
        self.out = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x: Tensor, noise: Tensor, condition: Condition | Tensor | None = None) -> Tensor:
        """Map images (B, C, H, W) at time indices to an output of the same shape, linear and unbounded.

        Args:
            x: Images, (B, C, H, W).
            noise: Time indices 0, 1 .. T - 1 as floats, (B,), not divided by T: the highest frequency is one radian per
                index, so the embedding would be almost constant for t in [0, 1].
            condition: Condition, or class labels (B,), which is the only kind that the network takes; None for the null
                class.

        Raises:
            UsageError: The images don't have the network's shape.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise UsageError(f"network 'ddpm' was built for images of shape {self.shape}, got {tuple(x.shape[1:])}")
        embedding = self.embed_time(noise)
        if self.embed_class is not None:
            embedding = embedding + self.embed_class(labels_of(condition, self.classes, noise))
        hidden = self.stem(x)
        skips = [hidden]
        for stage in self.down:
            hidden = stage(hidden, embedding)
            skips.append(hidden)
        hidden = self.middle(hidden, embedding)
        for stage in self.up:
            hidden = stage(torch.cat([hidden, skips.pop()], dim=1), embedding)
        return self.out(F.silu(self.norm(hidden)))
