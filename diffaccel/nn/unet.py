"""Small U-Net of the shipped weights, with FiLM conditioning on the noise level."""

import math
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from diffaccel.condition import Condition, Kinds, labels_of, pixels_of
from diffaccel.errors import UsageError
from diffaccel.nn.decouple import Decouple
from diffaccel.nn.layers import groups_of, zeroed
from diffaccel.nn.pixels import PixelEncoder
from diffaccel.nn.text import CrossAttention, Text, TextEncoder, heads_of
from diffaccel.parts.checks import Count, Counts, Dropout, Whole, Wholes
from diffaccel.parts.registry import Registry

NETWORKS: Registry[nn.Module] = Registry("network", builtins=["diffaccel.nn"], context=["shape"])


class Conditioning(NamedTuple):
    """What all stages are conditional on.

    Attributes:
        embedding: Embedding of the noise level, the class and the augmentation, (B, embedding).
        text: Encoded tokens; None for no text.
    """

    embedding: Tensor
    text: Text | None


class NoiseEmbedding(nn.Module):
    """Fixed Fourier features of the noise conditioning and a two-layer perceptron: (B,) -> (B, width).

    The frequencies are geometric in [1/4, 16] cycles per unit: high enough to resolve both ln(rho) / 4 and t in [0, 1],
    and low enough for similar embeddings at neighbouring levels.
    """

    frequencies: Tensor

    def __init__(self, width: int, features: int = 64) -> None:
        super().__init__()
        self.register_buffer(
            "frequencies", 2 * math.pi * torch.logspace(-2, 4, features // 2, base=2), persistent=False
        )
        self.layers = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, noise: Tensor) -> Tensor:
        """Embed (B,)."""
        angle = noise[:, None] * self.frequencies
        return self.layers(torch.cat([angle.cos(), angle.sin()], dim=1))


class ResidualBlock(nn.Module):
    """Residual block: GroupNorm, SiLU, 3x3; GroupNorm, scale and shift by the embedding, SiLU, dropout, 3x3.

    The last convolution is initialised with zeros.
    """

    def __init__(self, width_in: int, width: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.GroupNorm(groups_of(width_in), width_in), nn.GroupNorm(groups_of(width), width)
        self.conv_1, self.conv_2 = nn.Conv2d(width_in, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()
        zeroed(self.conv_2)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, width_in, H, W), (B, embedding) -> (B, width, H, W)."""
        hidden = self.conv_1(F.silu(self.norm_1(x)))
        scale, shift = rearrange(self.film(embedding), "b (two c) -> two b c 1 1", two=2)
        hidden = torch.addcmul(shift, self.norm_2(hidden), 1 + scale)
        return self.skip(x) + self.conv_2(self.dropout(F.silu(hidden)))


class SelfAttention(nn.Module):
    """Residual self-attention over positions; the output layer is initialised with zeros."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = heads_of(width)
        self.norm = nn.GroupNorm(groups_of(width), width)
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)
        zeroed(self.out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (three n c) h w -> three b n (h w) c", three=3, n=self.heads)
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(attended, "b n (h w) c -> b (n c) h w", h=x.shape[2]))


class Stage(nn.ModuleList):
    """Residual block, optionally followed by self-attention, and by cross-attention to a text."""

    def __init__(self, width_in: int, width: int, embedding: int, dropout: float, attends: bool, reads: bool) -> None:
        block = ResidualBlock(width_in, width, embedding, dropout)
        super().__init__([block, SelfAttention(width) if attends else nn.Identity()])
        if attends and reads:
            self.append(CrossAttention(width, embedding, groups_of(width)))

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        """(B, width_in, H, W), conditioning -> (B, width, H, W)."""
        hidden = self[1](self[0](x, conditioning.embedding))
        return self[2](hidden, conditioning.text) if len(self) > 2 else hidden


class Decoder(nn.Module):
    """Decoder: stages with skip connections, coarse to fine, and an output convolution initialised with zeros.

    A decoder is built by :meth:`build_decoder`, not by its constructor, so that a U-Net with a single decoder can
    inherit its layers and keep the names of their weights.
    """

    up: nn.ModuleList
    merge: nn.Conv2d
    norm: nn.GroupNorm
    out: nn.Conv2d

    def build_decoder(
        self, stage: Callable[[int, int], Stage], widths: list[int], blocks: int, skips: list[int], channels: int
    ) -> None:
        """Make the layers.

        Args:
            stage: Function of the input width and the index of the resolution that makes a stage.
            widths: Channels at each resolution, finest first.
            blocks: Stages per resolution.
            skips: Widths of the encoder's outputs, finest first.
            channels: Channels of the output.
        """
        skips = list(skips)
        self.blocks, self.up = blocks, nn.ModuleList()
        hidden = widths[-1]
        for level in reversed(range(len(widths))):
            for _ in range(blocks):
                self.up.append(stage(hidden + skips.pop(), level))
                hidden = widths[level]
        self.merge = nn.Conv2d(hidden + skips.pop(), hidden, 1)
        self.norm = nn.GroupNorm(groups_of(hidden), hidden)
        self.out = nn.Conv2d(hidden, channels, 3, padding=1)
        zeroed(self.out)

    def decode(self, hidden: Tensor, skips: list[Tensor], conditioning: Conditioning) -> Tensor:
        """Bottleneck (B, C, H, W) and the encoder's outputs, finest first -> (B, channels, H', W')."""
        skips = list(skips)
        for index, stage in enumerate(self.up):
            if index and index % self.blocks == 0:
                hidden = F.interpolate(hidden, scale_factor=2, mode="nearest")
            hidden = stage(torch.cat([hidden, skips.pop()], dim=1), conditioning)
        hidden = self.merge(torch.cat([hidden, skips.pop()], dim=1))
        return self.out(F.silu(self.norm(hidden)))


class Branch(Decoder):
    """One of several decoders, with a decoupling module on the bottleneck."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.decouple = Decouple(width)

    @override
    def decode(self, hidden: Tensor, skips: list[Tensor], conditioning: Conditioning) -> Tensor:
        """See :class:`Decoder`."""
        return super().decode(self.decouple(hidden), skips, conditioning)


@NETWORKS.register("unet")
class UNet(Decoder):
    """Small U-Net.

    Args:
        shape: Image shape (C, H, W).
        widths: Channels at each resolution, finest first; each resolution halves H and W.
        blocks: Residual blocks per resolution in the encoder, and in the decoder.
        attention: Indices into ``widths`` of the resolutions with self-attention.
        unshuffle: Factor of the pixel unshuffle of the image. With a factor of 2, 2x2 pixels become 4 channels, which
            divides the cost of every layer by 4.
        embedding: Width of the noise embedding.
        dropout: Dropout rate in the residual blocks.
        classes: Number of class labels; 0 for an unconditional network. Label ``classes`` is the null class.
        heads: Channels of each head in units of the image's channels. There is one encoder, and one decoder per head.
        augment: Number of augmentation labels, which are zero in sampling; 0 for none.
        image: Number of channels of a condition's image, which follow those of the input; 0 for none.
        mask: Whether a condition's mask follows, as one more channel.
        tokens: Width of a condition's tokens, to which the resolutions in ``attention`` attend; 0 for none.
        text_layers: Number of layers of a text encoder over these tokens, which is trained along.
        image_layers: Number of residual blocks per resolution of an encoder of image and mask, which is trained along,
            and whose features are added at each resolution; 0 for none. As the text encoder, it does not depend on the
            noise level, and runs once per sampled image.

    Raises:
        UsageError: The image can't be unshuffled and halved once per resolution, no resolution attends to tokens, or
            there is nothing to encode.
    """

    condition_keys: ClassVar[tuple[str, ...]] = ("classes", "image", "mask", "tokens", "text_layers", "image_layers")
    """Keys without which the network is unconditional, see :meth:`widened`."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        widths: Counts = [64, 128],  # noqa: B006 (read only; a list, for YAML)
        blocks: Count = 2,
        attention: Wholes = [],  # noqa: B006
        unshuffle: Count = 1,
        embedding: Count = 256,
        dropout: Dropout = 0.0,
        classes: Whole = 0,
        heads: Counts = [1],  # noqa: B006
        augment: Whole = 0,
        image: Whole = 0,
        mask: bool = False,
        tokens: Whole = 0,
        text_layers: Whole = 0,
        image_layers: Whole = 0,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        factor = unshuffle * 2 ** (len(widths) - 1)
        if height % factor or width % factor:
            raise UsageError(
                f"network 'unet': images of {height}x{width} can't be divided by {factor} "
                f"(unshuffle {unshuffle}, {len(widths)} resolutions): use fewer widths or another image size"
            )
        self.shape, self.unshuffle, self.classes, self.heads = tuple(shape), unshuffle, classes, tuple(heads)
        for key, value, missing, has in (
            ("tokens", tokens, "attention", attention),
            ("text_layers", text_layers, "tokens", tokens),
            ("image_layers", image_layers, "image", image or mask),
        ):
            if value and not has:
                raise UsageError(f"network 'unet': {key} requires network.{missing}: set it, or remove network.{key}")
        self.takes_augment, self.takes = augment > 0, Kinds(classes, tokens, image, mask)
        self.embed_noise = NoiseEmbedding(embedding)
        self.embed_class = nn.Embedding(classes + 1, embedding) if classes else None
        self.embed_augment = zeroed(nn.Linear(augment, embedding, bias=False)) if augment else None
        self.text = TextEncoder(tokens, embedding, text_layers) if tokens else None
        self.pixels = PixelEncoder(self.takes, unshuffle, widths, image_layers) if image_layers else None
        entered = [widths[0], *widths[:-1]] if image_layers else []  # widths of the states at the resolutions' entries
        self.inject = nn.ModuleList(
            zeroed(nn.Conv2d(width_from, width, 1, bias=False))
            for width_from, width in zip(widths, entered, strict=False)
        )
        folded = channels * unshuffle**2

        def stage(width_in: int, level: int) -> Stage:
            return Stage(width_in, widths[level], embedding, dropout, level in attention, tokens > 0)

        self.stem = nn.Conv2d(folded + self.takes.pixels * unshuffle**2, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips = [widths[0]]
        for level, width_level in enumerate(widths):
            for block in range(blocks):
                coarser = level > 0 and block == 0
                self.down.append(stage(widths[level - 1] if coarser else width_level, level))
                skips.append(width_level)
        self.middle = nn.ModuleList([stage(widths[-1], len(widths) - 1) for _ in range(2)])
        self.blocks = blocks
        self.branches = nn.ModuleList([Branch(widths[-1]) for _ in heads] if len(heads) > 1 else [])
        for decoder, multiple in zip(self.decoders, heads, strict=True):
            decoder.build_decoder(stage, widths, blocks, skips, folded * multiple)

    def widened(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Extend the weights of the same network without condition; conditions have no effect until trained."""
        found, own = dict(tensors), self.state_dict()
        attending = [name for name, module in self.named_modules() if isinstance(module, CrossAttention)]
        readers = {f"{name}.{layer}" for name in attending for layer in ("norm", "query", "key_value", "out")}
        added = self.takes.pixels * self.unshuffle**2
        if added and "stem.weight" in found:
            found["stem.weight"] = F.pad(found["stem.weight"], (0, 0, 0, 0, 0, added))
        for name in own.keys() - found.keys():
            if name.startswith("embed_class."):
                found[name] = torch.zeros_like(own[name])
            elif name.startswith(("text.", "pixels.", "inject.")) or name.rpartition(".")[0] in readers:
                found[name] = own[name]  # the output layers of cross-attention, and those of features, are zero
        return found

    @property
    def decoders(self) -> list[Decoder]:
        """Decoders, one per head; the network itself is the decoder of a single head."""
        return cast(list[Decoder], list(self.branches)) or [self]

    @property
    def condition_encoders(self) -> dict[str, nn.Module]:
        """The parts of the network that depend on the condition alone, by name."""
        found = {"text_encoder": self.text, "image_encoder": self.pixels}
        return {name: encoder for name, encoder in found.items() if encoder is not None}

    def encoded(self, condition: Condition) -> Condition:
        """Add the features of a condition, so that evaluations don't compute them; without gradients for the encoders.

        Raises:
            UsageError: The image or the mask has another number of channels or another size.
        """
        text, maps = self._features(condition)
        return condition._replace(features=(*(text or ()), *maps))

    def _features(self, condition: Condition | None) -> tuple[Text | None, tuple[Tensor, ...]]:
        """Compute, or look up, the encoded tokens and the features of image and mask of a condition."""
        if condition is None:
            return None, ()
        read = self.text is not None and condition.tokens is not None
        if condition.features is not None:
            split = len(Text._fields) if read else 0
            return Text(*condition.features[:split]) if read else None, condition.features[split:]
        text = self.text(condition) if self.text is not None and read else None
        seen = condition.image is not None or condition.mask is not None
        return text, self.pixels(condition) if self.pixels is not None and seen else ()

    def forward(
        self, x: Tensor, noise: Tensor, condition: Condition | Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        """Map images to the outputs of the heads, concatenated along the channels.

        Args:
            x: Images, (B, C, H, W).
            noise: Noise conditioning, (B,).
            condition: Condition, or class labels (B,); None for the null condition.
            augment: Augmentation labels, (B, augment); None for zero.

        Returns:
            (B, sum(heads) C, H, W).

        Raises:
            UsageError: The images, or those of the condition, don't have the network's shape.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise UsageError(f"network 'unet' was built for images of shape {self.shape}, got {tuple(x.shape[1:])}")
        hidden, skips, conditioning = self.encode(x, noise, condition, augment)
        outputs = [decoder.decode(hidden, skips, conditioning) for decoder in self.decoders]
        return torch.cat([F.pixel_shuffle(output, self.unshuffle) for output in outputs], dim=1)

    def encode(
        self, x: Tensor, noise: Tensor, condition: Condition | Tensor | None = None, augment: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor], Conditioning]:
        """Run the encoder.

        Args:
            x: Images, (B, C, H, W).
            noise: Noise conditioning, (B,).
            condition: Condition, or class labels (B,); None for the null condition.
            augment: Augmentation labels, (B, augment); None for zero.

        Returns:
            The bottleneck, the inputs of the skip connections, finest first, and the conditioning of the stages.
        """
        embedding = self.embed_noise(noise)
        if self.embed_class is not None:
            embedding = embedding + self.embed_class(labels_of(condition, self.classes, noise))
        if self.embed_augment is not None and augment is not None:
            embedding = embedding + self.embed_augment(augment)
        text, maps = self._features(Condition.of(condition))
        conditioning = Conditioning(embedding, text)
        if self.takes.pixels:
            x = torch.cat([x, pixels_of(condition, self.takes, x)], dim=1)
        hidden = self.stem(F.pixel_unshuffle(x, self.unshuffle))
        skips = [hidden]
        for index, stage in enumerate(self.down):
            level, block = divmod(index, self.blocks)
            if level and not block:
                hidden = F.avg_pool2d(hidden, 2)
            if maps and not block:
                hidden = hidden + self.inject[level](maps[level])
            hidden = stage(hidden, conditioning)
            skips.append(hidden)
        for stage in self.middle:
            hidden = stage(hidden, conditioning)
        return hidden, skips, conditioning
