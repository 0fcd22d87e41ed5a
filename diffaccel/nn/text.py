"""Layers for the tokens of a text: an encoder that is trained along with the network, and cross-attention.

A sample without any valid token has no text: every layer here leaves it exactly as a network without these layers does.
"""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from diffaccel.condition import Condition
from diffaccel.nn.layers import zeroed


class Text(NamedTuple):
    """Encoded tokens of a batch.

    Attributes:
        tokens: Embeddings, (B, L, width).
        visible: Tokens that attention sees, (B, L) bool: the valid ones, or all of a sample without valid tokens, so
            that no softmax is over nothing.
        present: Which samples have a valid token, (B,) bool.
    """

    tokens: Tensor
    visible: Tensor
    present: Tensor


class TextEncoder(nn.Module):
    """Transformer over the tokens of a condition; without layers, a linear map and a normalisation.

        y = W tokens + positions;    y = y + attention(norm(y));    y = y + MLP(norm(y));    ...    norm(y)

    The positions are sinusoidal, so that the number of tokens is not restricted. They are left out without layers,
    because embeddings of a trained text encoder contain positions already.

    Args:
        dim: Width of the tokens.
        width: Width of the output.
        layers: Number of layers.
    """

    def __init__(self, dim: int, width: int, layers: int) -> None:
        super().__init__()
        self.into = nn.Linear(dim, width)
        self.layers = nn.ModuleList(TextLayer(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, condition: Condition) -> Text:
        """Encode the tokens of a condition, (B, L, dim)."""
        assert condition.tokens is not None
        valid = condition.valid
        if valid is None:
            valid = torch.ones(condition.tokens.shape[:2], dtype=torch.bool, device=condition.tokens.device)
        present = valid.any(1)
        visible = valid | ~present[:, None]
        hidden = self.into(condition.tokens.to(self.into.weight.dtype))
        if len(self.layers):
            hidden = hidden + positions(hidden)
        for layer in self.layers:
            hidden = layer(hidden, visible)
        return Text(self.norm(hidden), visible, present)


class TextLayer(nn.Module):
    """Layer of a transformer with normalisation before attention and perceptron: (B, L, width) -> (B, L, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = heads_of(width)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """Apply the layer to tokens (B, L, width), of which attention sees ``visible`` (B, L)."""
        q, k, v = rearrange(self.qkv(self.norm_1(x)), "b l (three n c) -> three b n l c", three=3, n=self.heads)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None, None])
        x = x + self.out(rearrange(attended, "b n l c -> b l (n c)"))
        return x + self.perceptron(self.norm_2(x))


class CrossAttention(nn.Module):
    """Residual attention of positions to the tokens of a text; the output layer is initialised with zeros.

    Args:
        width: Channels of the positions.
        dim: Width of the tokens.
        groups: Number of groups of the normalisation.
    """

    def __init__(self, width: int, dim: int, groups: int) -> None:
        super().__init__()
        self.heads = heads_of(width)
        self.norm = nn.GroupNorm(groups, width)
        self.query, self.out = nn.Conv2d(width, width, 1), zeroed(nn.Conv2d(width, width, 1))
        self.key_value = nn.Linear(dim, 2 * width)

    def forward(self, x: Tensor, text: Text | None) -> Tensor:
        """(B, C, H, W), text of the samples or None -> (B, C, H, W); samples without text are returned unchanged."""
        if text is None:
            return x
        q = rearrange(self.query(self.norm(x)), "b (n c) h w -> b n (h w) c", n=self.heads)
        k, v = rearrange(self.key_value(text.tokens), "b l (two n c) -> two b n l c", two=2, n=self.heads)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=text.visible[:, None, None])
        change = self.out(rearrange(attended, "b n (h w) c -> b (n c) h w", h=x.shape[2]))
        return torch.where(text.present[:, None, None, None], x + change, x)


def heads_of(width: int, head_width: int = 32) -> int:
    """Return the number of attention heads, a divisor of ``width``: that of about ``head_width`` channels each."""
    return next(n for n in range(max(1, width // head_width), 0, -1) if width % n == 0)


def positions(tokens: Tensor) -> Tensor:
    """Sinusoidal positions of tokens (B, L, width), with periods from 2 pi to 2 pi 1000, (L, width).

    References:
        Attention Is All You Need (Vaswani et al., 2017), https://arxiv.org/abs/1706.03762, Section 3.5
    """
    _, length, width = tokens.shape
    half = -(-width // 2)
    rate = torch.exp(torch.arange(half, device=tokens.device) * (-math.log(1000) / half))
    angle = torch.arange(length, device=tokens.device)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :width].to(tokens.dtype)


def pooled(condition: Condition) -> Tensor:
    """Mean of the valid tokens of each sample, (B, D) float32; zeros for a sample without valid tokens."""
    assert condition.tokens is not None
    tokens = condition.tokens.float()
    if condition.valid is None:
        return tokens.mean(1)
    weight = condition.valid.float()
    return (tokens * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp_min(1)
