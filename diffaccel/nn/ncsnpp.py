"""NCSN++, DDPM++ and EDM's SongUNet, as layouts of one network.

The tensors have the names of EDM's files, which can therefore be loaded without a map of names.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from diffaccel.condition import Condition, labels_of
from diffaccel.errors import UsageError
from diffaccel.nn.unet import NETWORKS
from diffaccel.parts.checks import Count, Counts, Dropout, Whole, Wholes

Builder = Callable[..., nn.Module]
Filter = Literal["fir", "box"]
TAPS: dict[str, tuple[float, ...]] = {"fir": (1.0, 3.0, 3.0, 1.0), "box": (1.0, 1.0)}
"""Taps of the separable resampling filters."""

CHOICES = {
    "embedding": ("fourier", "positional"),
    "resample": ("fir", "box"),
    "encoder": ("standard", "residual", "skip"),
    "decoder": ("standard", "skip"),
}


def resampling_kernel(name: str) -> Tensor:
    """Outer product of a filter's taps, normalised to sum 1, (k, k)."""
    taps = torch.tensor(TAPS[name])
    return torch.outer(taps, taps) / taps.sum().square()


class Resample(nn.Module):
    """Halve or double H and W by a fixed filter, channel by channel, with zero padding.

    Args:
        filter: ``fir`` ([1, 3, 3, 1]) or ``box`` (means of 2x2, repeated pixels).
        up: Whether to double H and W; otherwise, halve them.
    """

    kernel: Tensor

    def __init__(self, filter: Filter, up: bool) -> None:
        super().__init__()
        self.up, self.padding = up, len(TAPS[filter]) // 2 - 1
        self.register_buffer("kernel", resampling_kernel(filter), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / 2, W / 2), or (B, C, 2 H, 2 W)."""
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, -1, -1)
        if self.up:
            return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=self.padding, groups=channels)
        return F.conv2d(x, kernel, stride=2, padding=self.padding, groups=channels)


class BlurredConv(nn.Conv2d):
    """Downsampling layer of the residual pyramid: a fixed filter at full resolution, then 3x3 with stride 2."""

    kernel: Tensor

    def __init__(self, width_in: int, width: int, filter: Filter) -> None:
        super().__init__(width_in, width, 3, stride=2)
        self.pad = len(TAPS[filter]) // 2
        self.register_buffer("kernel", resampling_kernel(filter), persistent=False)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width, H / 2, W / 2)."""
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        return super().forward(F.conv2d(x, kernel, padding=self.pad, groups=x.shape[1]))


class Fourier(nn.Module):
    """Random Fourier features of fixed frequencies: (B,) -> (B, width).

        [sin(2 pi c f), cos(2 pi c f)],    f ~ N(0, 16^2)

    Args:
        width: Number of features.
    """

    freqs: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(width // 2))

    def forward(self, noise: Tensor) -> Tensor:
        """Embed (B,)."""
        angle = 2 * math.pi * noise[:, None] * self.freqs  # hundreds of radians, which need this precision
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class Positional(nn.Module):
    """Sinusoids of geometric frequencies from 1 to 1e-4, both included: (B,) -> (B, width)."""

    freqs: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        exponents = torch.arange(width // 2) / (width // 2 - 1)
        self.register_buffer("freqs", torch.exp(-math.log(1e4) * exponents), persistent=False)

    def forward(self, noise: Tensor) -> Tensor:
        """Embed (B,)."""
        angle = noise[:, None] * self.freqs
        return torch.cat([angle.sin(), angle.cos()], dim=1)


def _norm(width: int) -> nn.GroupNorm:
    groups = max(1, min(32, width // 4))
    if width % groups:
        raise UsageError(
            f"network 'ncsnpp': {width} channels can't be divided into {groups} groups: set network.width and "
            "network.multipliers so that all widths, and sums of two, are multiples of 32, or of 4 below 128"
        )
    return nn.GroupNorm(groups, width, eps=1e-6)


class Block(nn.Module):
    """Residual block, divided by sqrt(2), with optional resampling before its first convolution and attention after it.

    Args:
        width_in: Channels of the input.
        width: Channels of the output.
        embedding: Width of the embedding.
        dropout: Dropout rate before the last convolution.
        resample: Resampling of both branches; None for no resampling.
        attends: Whether single-head self-attention follows, also residual and divided by sqrt(2).
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        embedding: int,
        dropout: float,
        resample: Resample | None = None,
        attends: bool = False,
    ) -> None:
        super().__init__()
        self.norm0, self.conv0 = _norm(width_in), nn.Conv2d(width_in, width, 3, padding=1)
        self.affine = nn.Linear(embedding, width)
        self.norm1, self.conv1 = _norm(width), nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width, 1) if width_in != width or resample else nn.Identity()
        self.resample, self.dropout, self.attends = resample or nn.Identity(), nn.Dropout(dropout), attends
        if attends:
            self.norm2 = _norm(width)
            self.qkv, self.proj = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, width_in, H, W), (B, embedding) -> (B, width, H', W')."""
        hidden = self.conv0(self.resample(F.silu(self.norm0(x))))
        hidden = hidden + rearrange(self.affine(embedding), "b c -> b c 1 1")
        hidden = self.conv1(self.dropout(F.silu(self.norm1(hidden))))
        x = (self.skip(self.resample(x)) + hidden) / math.sqrt(2)
        return self._attend(x) if self.attends else x

    def _attend(self, x: Tensor) -> Tensor:
        # The channel axis is (channel, q/k/v).
        q, k, v = rearrange(self.qkv(self.norm2(x)), "b (c three) h w -> three b 1 (h w) c", three=3)
        attended = F.scaled_dot_product_attention(q, k, v)
        return (x + self.proj(rearrange(attended, "b 1 (h w) c -> b c h w", h=x.shape[2]))) / math.sqrt(2)


@NETWORKS.register("ncsnpp")
class NCSNpp(nn.Module):
    """U-Net of score SDEs and EDM; the defaults are those of NCSN++ for CIFAR-10 (62.8 M parameters).

    DDPM++ is ``embedding: positional, resample: box, encoder: standard``. The published networks for 256x256 images
    have ``multipliers: [1, 1, 2, 2, 2, 2, 2], blocks: 2, encoder: skip, decoder: skip``.

    Args:
        shape: Image shape (C, H, W).
        width: Channels of the first convolution.
        multipliers: Channels at each resolution in units of ``width``, finest first; each resolution halves H and W.
        blocks: Residual blocks per resolution in the encoder; the decoder has one more.
        attention: Heights, in pixels, of the feature maps with self-attention. It follows every block of the encoder
            and the last block of the decoder at these resolutions, and there is one at the lowest resolution.
        embedding: Embedding of the noise conditioning, ``fourier`` (for its logarithm) or ``positional``.
        noise_width: Number of features of the embedding; None for 2 ``width`` (fourier) or ``width`` (positional).
        resample: Resampling filter, ``fir`` or ``box``; see :class:`Resample`.
        encoder: Input pyramid of the encoder: ``standard`` for none, ``residual`` for a learned pyramid (NCSN++),
            ``skip`` for the blurred input.
        decoder: Output pyramid of the decoder: ``standard`` for none, ``skip`` for a sum of images over resolutions.
        dropout: Dropout rate in the blocks.
        classes: Number of class labels; 0 for an unconditional network. Label ``classes`` is the null class.
        augment: Number of EDM's augmentation labels, which are zero in sampling; 0 for none.
        null_class: Whether a conditional network is also trained without labels, so that it can sample without labels
            and with guidance.

    Raises:
        UsageError: An unknown layout, no layers, or an image or widths that can't be divided.

    References:
        Score-Based Generative Modeling through SDEs (Song et al., 2021), https://arxiv.org/abs/2011.13456, appendix H
        Elucidating the Design Space (Karras et al., 2022), https://arxiv.org/abs/2206.00364, Table 7
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        width: Count = 128,
        multipliers: Counts = [1, 2, 2, 2],  # noqa: B006 (read only; a list, for YAML)
        blocks: Count = 4,
        attention: Wholes = [16],  # noqa: B006
        embedding: str = "fourier",
        noise_width: Count | None = None,
        resample: str = "fir",
        encoder: str = "residual",
        decoder: str = "standard",
        dropout: Dropout = 0.1,
        classes: Whole = 0,
        augment: Whole = 0,
        null_class: bool = True,
    ) -> None:
        super().__init__()
        chosen = {"embedding": embedding, "resample": resample, "encoder": encoder, "decoder": decoder}
        _check(shape, width, multipliers, blocks, attention, chosen)
        channels, rows, columns = shape
        self.shape, self.classes, self.blocks, self.encoder = tuple(shape), classes, blocks, encoder
        self.null_class = null_class
        self.sizes = [f"{rows // 2**level}x{columns // 2**level}" for level in range(len(multipliers))]
        features = noise_width or (2 * width if embedding == "fourier" else width)
        self.takes_augment = augment > 0
        self.map_noise = Fourier(features) if embedding == "fourier" else Positional(features)
        self.map_label = nn.Linear(classes, features) if classes else None
        self.map_augment = nn.Linear(augment, features, bias=False) if augment else None
        self.map_layer0, self.map_layer1 = nn.Linear(features, 4 * width), nn.Linear(4 * width, 4 * width)
        filter: Filter = "fir" if resample == "fir" else "box"
        self.down, self.up = Resample(filter, up=False), Resample(filter, up=True)

        def block(before: int, after: int, resample: Resample | None = None, attends: bool = False) -> Block:
            return Block(before, after, 4 * width, dropout, resample, attends)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        widths = [width * multiplier for multiplier in multipliers]
        attended = [rows // 2**level in attention for level in range(len(widths))]
        skips = self._build_encoder(block, channels, width, widths, attended, filter)
        self._build_decoder(block, channels, widths, attended, skips, decoder)
        self._initialise()

    def _build_encoder(
        self, block: Builder, channels: int, width: int, widths: list[int], attended: list[bool], filter: Filter
    ) -> list[int]:
        """Build the way down; return the channels of each connection to the way up."""
        hidden, skips, pyramid = width, [width], channels
        for level, (size, after) in enumerate(zip(self.sizes, widths, strict=True)):
            if level == 0:
                self.enc[f"{size}_conv"] = nn.Conv2d(channels, width, 3, padding=1)
            else:
                self.enc[f"{size}_down"] = block(hidden, hidden, self.down)
                if self.encoder == "residual":
                    self.enc[f"{size}_aux_residual"] = BlurredConv(pyramid, hidden, filter)
                    pyramid = hidden
                elif self.encoder == "skip":
                    self.enc[f"{size}_aux_skip"] = nn.Conv2d(channels, hidden, 1)
                skips.append(hidden)
            for index in range(self.blocks):
                self.enc[f"{size}_block{index}"] = block(hidden, after, attends=attended[level])
                hidden = after
                skips.append(hidden)
        return skips

    def _build_decoder(
        self, block: Builder, channels: int, widths: list[int], attended: list[bool], skips: list[int], decoder: str
    ) -> None:
        """Build the way up, whose blocks use up ``skips``."""
        hidden = widths[-1]
        for level, size in reversed(list(enumerate(self.sizes))):
            if level == len(self.sizes) - 1:
                self.dec[f"{size}_in0"] = block(hidden, hidden, attends=True)
                self.dec[f"{size}_in1"] = block(hidden, hidden)
            else:
                self.dec[f"{size}_up"] = block(hidden, hidden, self.up)
            for index in range(self.blocks + 1):
                attends = index == self.blocks and attended[level]
                self.dec[f"{size}_block{index}"] = block(hidden + skips.pop(), widths[level], attends=attends)
                hidden = widths[level]
            if decoder == "skip" or level == 0:
                self.dec[f"{size}_aux_norm"] = _norm(hidden)
                self.dec[f"{size}_aux_conv"] = nn.Conv2d(hidden, channels, 3, padding=1)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Initialise weights as in the code of both papers.

        Weights are uniform with variance 1 / mean fan, reduced for q, k and v, and almost 0 in the last layer of each
        branch.
        """
        for name, module in self.named_modules():
            if not isinstance(module, nn.Conv2d | nn.Linear):
                continue
            nn.init.xavier_uniform_(module.weight)
            if name.endswith(("conv1", "proj", "aux_conv")):
                module.weight.mul_(1e-5)
            elif name.endswith("qkv"):
                module.weight.mul_(math.sqrt(0.2))
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, x: Tensor, noise: Tensor, condition: Condition | Tensor | None = None, augmentation: Tensor | None = None
    ) -> Tensor:
        """Map images (B, C, H, W) at noise conditioning (B,) to an output of the same shape, linear and unbounded.

        Args:
            x: Images, (B, C, H, W).
            noise: Noise conditioning, (B,): a logarithm for ``fourier``, an index up to 999 for ``positional`` (or
                ln(sigma) / 4 for both, in EDM's files).
            condition: Condition, or class labels (B,), which is the only kind that the network takes; None for the null
                class.
            augmentation: Augmentation labels, (B, augment); None for zero, as in sampling.

        Raises:
            UsageError: The images don't have the network's shape.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise UsageError(f"network 'ncsnpp' was built for images of shape {self.shape}, got {tuple(x.shape[1:])}")
        embedding = self._embed(noise, condition, augmentation)
        return self._decode(self._encode(x, embedding), embedding)

    def _embed(self, noise: Tensor, condition: Condition | Tensor | None, augmentation: Tensor | None) -> Tensor:
        features = self.map_noise(noise)
        if self.map_label is not None:
            label = labels_of(condition, self.classes, noise)
            one_hot = F.one_hot(label, self.classes + 1)[:, : self.classes].to(features)
            features = features + self.map_label(math.sqrt(self.classes) * one_hot)
        if self.map_augment is not None and augmentation is not None:
            features = features + self.map_augment(augmentation)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(features))))

    def _encode(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        """Outputs of the encoder for the skip connections, finest first; the last is also the decoder's input."""
        hidden, pyramid = self.enc[f"{self.sizes[0]}_conv"](x), x
        skips = [hidden]
        for level, size in enumerate(self.sizes):
            if level:
                hidden = self.enc[f"{size}_down"](hidden, embedding)
                if self.encoder == "residual":
                    hidden = (self.enc[f"{size}_aux_residual"](pyramid) + hidden) / math.sqrt(2)
                    pyramid = hidden
                elif self.encoder == "skip":
                    pyramid = self.down(pyramid)
                    hidden = hidden + self.enc[f"{size}_aux_skip"](pyramid)
                skips.append(hidden)
            for index in range(self.blocks):
                hidden = self.enc[f"{size}_block{index}"](hidden, embedding)
                skips.append(hidden)
        return skips

    def _decode(self, skips: list[Tensor], embedding: Tensor) -> Tensor:
        dec, hidden, output = self.dec, skips[-1], None
        for level, size in reversed(list(enumerate(self.sizes))):
            if level == len(self.sizes) - 1:
                hidden = dec[f"{size}_in1"](dec[f"{size}_in0"](hidden, embedding), embedding)
            else:
                hidden = dec[f"{size}_up"](hidden, embedding)
            for index in range(self.blocks + 1):
                hidden = dec[f"{size}_block{index}"](torch.cat([hidden, skips.pop()], dim=1), embedding)
            if f"{size}_aux_conv" in dec:
                image = dec[f"{size}_aux_conv"](F.silu(dec[f"{size}_aux_norm"](hidden)))
                output = image if output is None else self.up(output) + image
        assert output is not None  # the finest resolution always has one
        return output


def _check(
    shape: tuple[int, ...],
    width: int,
    multipliers: list[int],
    blocks: int,
    attention: list[int],
    chosen: dict[str, str],
) -> None:
    """Raise a UsageError if the network can't be built with these options."""
    _, rows, columns = shape
    for key, value in chosen.items():
        if value not in CHOICES[key]:
            raise UsageError(f"network 'ncsnpp': {key} is {value!r}: set it to one of {', '.join(CHOICES[key])}")
    if width < 4 or width % 2 or not multipliers or min(multipliers) < 1 or blocks < 1:
        raise UsageError(
            f"network 'ncsnpp' needs an even width of at least 4, multipliers of at least 1 and at least 1 block, got "
            f"width {width}, multipliers {multipliers}, {blocks} blocks: set network.width, .multipliers, .blocks"
        )
    halvings = len(multipliers) - 1
    if rows % 2**halvings or columns % 2**halvings:
        raise UsageError(
            f"network 'ncsnpp': images of {rows}x{columns} can't be halved {halvings} times: use fewer multipliers"
        )
    resolutions = [rows // 2**level for level in range(len(multipliers))]
    if unknown := set(attention) - set(resolutions):
        raise UsageError(f"network 'ncsnpp' has no resolution {min(unknown)} for attention: set network.attention to "
                         f"some of {resolutions}, or to [] for attention in the middle only")  # fmt: skip
