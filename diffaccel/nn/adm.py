"""ADM ("Dhariwal") U-Net in EDM's layout, with one encoder and one or more decoders."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from diffaccel.condition import Condition
from diffaccel.errors import UsageError
from diffaccel.nn.decouple import Decouple
from diffaccel.nn.layers import zeroed
from diffaccel.nn.unet import NETWORKS
from diffaccel.parts.checks import Count, Counts, Dropout, Whole, Wholes

HEAD_WIDTH = 64
"""Number of channels of an attention head."""


def _norm(width: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups, or fewer groups of 4 channels for less than 128 channels."""
    return nn.GroupNorm(min(32, width // 4), width)


def _resample(x: Tensor, resample: str) -> Tensor:
    """Average 2x2 pixels (``down``), repeat each pixel 2x2 times (``up``), or return ``x`` (an empty string)."""
    if resample == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2, mode="nearest") if resample == "up" else x


class NoiseEmbedding(nn.Module):
    """Sinusoids of the noise conditioning and a perceptron, with labels added in the same layers as in EDM.

        [cos(c w_i), sin(c w_i)],    w_i = 10000^(-i / h),    i = 0 .. h - 1,    h = width / 2

    Args:
        width: Number of sinusoids.
        embedding: Width of the embedding.
        classes: Number of class labels; the embedding of label ``classes``, the null class, is 0.
        augment: Number of augmentation labels.
    """

    frequencies: Tensor

    def __init__(self, width: int, embedding: int, classes: int, augment: int) -> None:
        super().__init__()
        exponent = torch.arange(width // 2) / (width // 2)
        self.register_buffer("frequencies", torch.exp(-math.log(1e4) * exponent), persistent=False)
        self.first, self.second = nn.Linear(width, embedding), nn.Linear(embedding, embedding)
        self.augment = nn.Linear(augment, width, bias=False) if augment else None
        if self.augment is not None:
            nn.init.zeros_(self.augment.weight)
        self.label = nn.Embedding(classes, embedding) if classes else None

    def forward(self, noise: Tensor, condition: Condition | Tensor | None, augment: Tensor | None) -> Tensor:
        """Noise (B,), condition or None, augmentation labels (B, augment) or None -> (B, embedding)."""
        angle = noise[:, None] * self.frequencies
        embedding = torch.cat([angle.cos(), angle.sin()], dim=1)
        if self.augment is not None and augment is not None:
            embedding = embedding + self.augment(augment)
        embedding = self.second(F.silu(self.first(embedding)))
        if (
            self.label is not None
            and (condition := Condition.of(condition)) is not None
            and condition.labels is not None
        ):
            labels = condition.labels
            known = (labels >= 0) & (labels < self.label.num_embeddings)
            embedding = embedding + self.label(labels * known) * known[:, None]
        return F.silu(embedding)


class Attention(nn.Module):
    """Residual self-attention over positions with heads of 64 channels; the output layer is initialised with zeros.

    Queries, keys and values are interleaved as in EDM's layout: the channel axis is (head, channel, q/k/v).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // HEAD_WIDTH)
        self.norm, self.qkv, self.out = _norm(width), nn.Conv2d(width, 3 * width, 1), zeroed(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (n c three) h w -> three b n (h w) c", three=3, n=self.heads)
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(attended, "b n (h w) c -> b (n c) h w", h=x.shape[2]))


class Block(nn.Module):
    """Residual block with FiLM: GroupNorm, SiLU, resampling, 3x3; GroupNorm, FiLM, SiLU, dropout, 3x3.

    FiLM is a scale and shift by the embedding. The last convolution is initialised with zeros. The skip connection is
    also resampled, and has a 1x1 convolution if the width changes. Self-attention optionally follows.
    """

    def __init__(
        self, width_in: int, width: int, embedding: int, dropout: float, attends: bool = False, resample: str = ""
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm_1, self.norm_2 = _norm(width_in), _norm(width)
        self.conv_1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.conv_2 = zeroed(nn.Conv2d(width, width, 3, padding=1))
        self.film = nn.Linear(embedding, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()
        self.attention = Attention(width) if attends else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, width_in, H, W), (B, embedding) -> (B, width, H', W')."""
        hidden = self.conv_1(_resample(F.silu(self.norm_1(x)), self.resample))
        scale, shift = rearrange(self.film(embedding), "b (two c) -> two b c 1 1", two=2)
        hidden = torch.addcmul(shift, self.norm_2(hidden), 1 + scale)
        hidden = self.conv_2(self.dropout(F.silu(hidden)))
        return self.attention(self.skip(_resample(x, self.resample)) + hidden)


class Layout:
    """Widths, resolutions and options shared by the encoder and the decoders."""

    def __init__(
        self, rows: int, width: int, multipliers: list[int], attention: list[int], embedding: int, dropout: float
    ) -> None:
        self.widths = [width * multiplier for multiplier in multipliers]
        self.rows = [rows // 2**level for level in range(len(multipliers))]
        self.attention, self.embedding, self.dropout = attention, embedding, dropout

    def block(self, width_in: int, level: int, **options: object) -> Block:
        """Make a block with the width of a level, and with attention if the level has attention."""
        options = {"attends": self.rows[level] in self.attention, **options}
        return Block(width_in, self.widths[level], self.embedding, self.dropout, **options)  # type: ignore[arg-type]

    def resampler(self, level: int, width: int, resample: str) -> Block:
        """Make the resampling block between two levels, which keeps the width."""
        return Block(width, width, self.embedding, self.dropout, resample=resample)


class Decoder(nn.Module):
    """Decoder, coarsest level first, with a skip connection to each block.

    Args:
        layout: Layout shared with the encoder.
        blocks: Number of blocks per level, one more than in the encoder.
        skips: Widths of the encoder's outputs, finest first.
        channels: Channels of the output.
        decouple: Whether a decoupling module is applied to the bottleneck first.
    """

    def __init__(self, layout: Layout, blocks: int, skips: list[int], channels: int, decouple: bool) -> None:
        super().__init__()
        skips, last, hidden = list(skips), len(layout.widths) - 1, layout.widths[-1]
        self.decouple = Decouple(hidden) if decouple else nn.Identity()
        self.middle = nn.ModuleList([layout.block(hidden, last, attends=attends) for attends in (True, False)])
        self.levels = nn.ModuleList()
        for level in reversed(range(last + 1)):
            stages = nn.ModuleList([layout.resampler(level, hidden, "up")] if level < last else [])
            for _ in range(blocks):
                stages.append(layout.block(hidden + skips.pop(), level))
                hidden = layout.widths[level]
            self.levels.append(stages)
        self.norm, self.out = _norm(hidden), nn.Conv2d(hidden, channels, 3, padding=1)
        nn.init.kaiming_uniform_(self.out.weight, nonlinearity="linear")  # U(-sqrt(3 / fan_in), sqrt(3 / fan_in))
        assert self.out.bias is not None
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
        """Bottleneck (B, C, H, W) and the encoder's outputs, finest first -> (B, channels, H', W')."""
        skips, hidden = list(skips), self.decouple(hidden)
        for block in self.middle:
            hidden = block(hidden, embedding)
        for stages in self.levels:
            for block in stages:  # type: ignore[attr-defined]
                joined = hidden if block.resample else torch.cat([hidden, skips.pop()], dim=1)
                hidden = block(joined, embedding)
        return self.out(F.silu(self.norm(hidden)))


def _check(shape: tuple[int, int, int], width: int, multipliers: list[int], attention: list[int]) -> None:
    """Raise a UsageError if the network can't be built with these options."""
    _, rows, columns = shape
    halvings = len(multipliers) - 1
    if not multipliers or rows % 2**halvings or columns % 2**halvings:
        raise UsageError(
            f"network 'adm': images of {rows}x{columns} can't be halved {halvings} times ({len(multipliers)} "
            "multipliers): use fewer multipliers or another image size"
        )
    for wide in (width * multiplier for multiplier in multipliers):
        groups = min(32, wide // 4)
        if width % 2 or groups < 1 or wide % groups or (wide > HEAD_WIDTH and wide % (wide // HEAD_WIDTH)):
            raise UsageError(
                f"network 'adm': {wide} channels can't be divided into {groups} groups and heads of {HEAD_WIDTH}: "
                "use a network.width that is a multiple of 64, or of 32"
            )
    resolutions = [rows // 2**level for level in range(len(multipliers))]
    if unknown := [resolution for resolution in attention if resolution not in resolutions]:
        raise UsageError(
            f"network 'adm' has no resolution {unknown[0]} for attention: set network.attention to some of "
            f"{resolutions}, or to [] for attention at the bottleneck only"
        )


@NETWORKS.register("adm")
class ADMUNet(nn.Module):
    """ADM's U-Net; the defaults are those of DDM for CIFAR-10, with one decoder.

    All layers have PyTorch's default initialisation, except those initialised with zeros and the output convolution.

    Args:
        shape: Image shape (C, H, W).
        width: Channels of the first convolution.
        multipliers: Channels at each resolution in units of ``width``, finest first; each resolution halves H and W.
        blocks: Residual blocks per resolution in the encoder; decoders have one more.
        attention: Heights, in pixels, of the feature maps with self-attention; the bottleneck always has one block.
        dropout: Dropout rate in the residual blocks.
        classes: Number of class labels; 0 for an unconditional network. Label ``classes`` is the null class.
        heads: Channels of each head in units of the image's channels; there is one decoder per head.
        decouple: Whether each decoder has a decoupling module; EDM's network has a single decoder without.
        augment: Number of augmentation labels, which are zero in sampling; 0 for none.
        null_class: Whether a conditional network is also trained without labels, so that it can sample without labels
            and with guidance.

    Raises:
        UsageError: The image can't be halved once per resolution, the width can't be divided into groups and heads, or
            ``attention`` contains an unknown resolution.

    References:
        Diffusion Models Beat GANs (Dhariwal and Nichol, 2021), https://arxiv.org/abs/2105.05233
        Elucidating the Design Space (Karras et al., 2022), https://arxiv.org/abs/2206.00364, appendix F.3
        Decoupled Diffusion Models (Huang et al., 2023), https://arxiv.org/abs/2306.13720, reference code
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        width: Count = 192,
        multipliers: Counts = [1, 2, 2, 2],  # noqa: B006 (read only; a list, for YAML)
        blocks: Count = 3,
        attention: Wholes = [16, 8],  # noqa: B006
        dropout: Dropout = 0.1,
        classes: Whole = 0,
        heads: Counts = [1],  # noqa: B006
        decouple: bool = True,
        augment: Whole = 0,
        null_class: bool = True,
    ) -> None:
        super().__init__()
        _check(shape, width, multipliers, attention)
        channels, rows, _ = shape
        self.shape, self.heads, self.classes, self.null_class = tuple(shape), tuple(heads), classes, null_class
        self.takes_augment = augment > 0
        layout = Layout(rows, width, multipliers, attention, 4 * width, dropout)
        self.embed = NoiseEmbedding(width, 4 * width, classes, augment)
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.encoder, hidden, skips = nn.ModuleList(), width, [width]
        for level in range(len(multipliers)):
            if level:
                self.encoder.append(layout.resampler(level, hidden, "down"))
                skips.append(hidden)
            for _ in range(blocks):
                self.encoder.append(layout.block(hidden, level))
                hidden = layout.widths[level]
                skips.append(hidden)
        self.decoders = nn.ModuleList(
            [Decoder(layout, blocks + 1, skips, channels * multiple, decouple) for multiple in heads]
        )

    def forward(
        self, x: Tensor, noise: Tensor, condition: Condition | Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        """Map images to the outputs of the heads, concatenated along the channels.

        Args:
            x: Images, (B, C, H, W).
            noise: Noise conditioning, (B,).
            condition: Condition, or class labels (B,), which is the only kind that the network takes; None for the null
                class.
            augment: Augmentation labels, (B, augment); None for zero.

        Returns:
            (B, sum(heads) C, H, W).

        Raises:
            UsageError: The images don't have the network's shape.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise UsageError(f"network 'adm' was built for images of shape {self.shape}, got {tuple(x.shape[1:])}")
        embedding = self.embed(noise, condition, augment)
        hidden = self.stem(x)
        skips = [hidden]
        for block in self.encoder:
            hidden = block(hidden, embedding)
            skips.append(hidden)
        return torch.cat([decoder(hidden, skips, embedding) for decoder in self.decoders], dim=1)
