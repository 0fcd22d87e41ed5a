"""Small vision transformers in the files of their publishers: names, shapes, and values that follow from the names."""

import math
import zlib

import torch
from torch import Tensor

WIDTH, LAYERS, HIDDEN = 64, 2, 256


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors of small waves, whose phases follow from their names; factors and norms are around 1."""
    tensors = {}
    for name, shape in shapes.items():
        wave = torch.arange(math.prod(shape), dtype=torch.float64) * 0.7 + zlib.crc32(name.encode()) % 1000
        centre = 1.0 if "norm" in name and name.endswith("weight") or "gamma" in name or "lambda" in name else 0.0
        tensors[name] = (centre + 0.2 * torch.sin(wave * (1 + wave / 1000))).float().reshape(shape)
    return tensors


def linear(name: str, into: int, out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}


def dinov2_hub(side: int = 3) -> dict[str, Tensor]:
    """A state of DINOv2's own code, trained on images of ``side`` x ``side`` patches."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + side**2, WIDTH),
        "mask_token": (1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 14, 14),
        "patch_embed.proj.bias": (WIDTH,),
    }
    for i in range(LAYERS):
        block = f"blocks.{i}"
        shapes |= norm(f"{block}.norm1") | linear(f"{block}.attn.qkv", WIDTH, 3 * WIDTH)
        shapes |= linear(f"{block}.attn.proj", WIDTH, WIDTH) | {f"{block}.ls1.gamma": (WIDTH,)}
        shapes |= norm(f"{block}.norm2") | linear(f"{block}.mlp.fc1", WIDTH, HIDDEN)
        shapes |= linear(f"{block}.mlp.fc2", HIDDEN, WIDTH) | {f"{block}.ls2.gamma": (WIDTH,)}
    return filled(shapes | norm("norm"))


def dinov2_transformers(side: int = 16) -> dict[str, Tensor]:
    """A state of DINOv2 in the library transformers."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.mask_token": (1, WIDTH),
        "embeddings.position_embeddings": (1, 1 + side**2, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
    }
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        shapes |= norm(f"{layer}.norm1") | norm(f"{layer}.norm2")
        for part in ("query", "key", "value"):
            shapes |= linear(f"{layer}.attention.attention.{part}", WIDTH, WIDTH)
        shapes |= linear(f"{layer}.attention.output.dense", WIDTH, WIDTH)
        shapes |= linear(f"{layer}.mlp.fc1", WIDTH, HIDDEN) | linear(f"{layer}.mlp.fc2", HIDDEN, WIDTH)
        shapes |= {f"{layer}.layer_scale{k}.lambda1": (WIDTH,) for k in (1, 2)}
    return filled(shapes | norm("layernorm"))


def clip_transformers(patch: int = 8, side: int = 4, dim: int = 48) -> dict[str, Tensor]:
    """The image half of a state of CLIP in the library transformers, and a tensor of the other half."""
    model = "vision_model"
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        f"{model}.embeddings.class_embedding": (WIDTH,),
        f"{model}.embeddings.patch_embedding.weight": (WIDTH, 3, patch, patch),
        f"{model}.embeddings.position_embedding.weight": (1 + side**2, WIDTH),
        "visual_projection.weight": (dim, WIDTH),
    }
    for i in range(LAYERS):
        layer = f"{model}.encoder.layers.{i}"
        shapes |= norm(f"{layer}.layer_norm1") | norm(f"{layer}.layer_norm2")
        for part in ("q", "k", "v", "out"):
            shapes |= linear(f"{layer}.self_attn.{part}_proj", WIDTH, WIDTH)
        shapes |= linear(f"{layer}.mlp.fc1", WIDTH, HIDDEN) | linear(f"{layer}.mlp.fc2", HIDDEN, WIDTH)
    return filled(shapes | norm(f"{model}.pre_layrnorm") | norm(f"{model}.post_layernorm"))
