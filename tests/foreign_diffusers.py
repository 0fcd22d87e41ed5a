"""diffusers' UNet2DModel with DDPM's blocks, evaluated from its own names, and folders of it; see ``foreign``.

Written from the published layout alone; nothing of it is shared with what it tests.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

DEFAULTS: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "act_fn": "silu",
    "add_attention": True,
    "attention_head_dim": 8,
    "attn_norm_num_groups": None,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 3,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 4,
    "out_channels": 3,
    "resnet_time_scale_shift": "default",
    "sample_size": 8,
    "time_embedding_type": "positional",
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
"""As diffusers' class has them, but for the sizes."""
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "variance_type": "fixed_small",
}


class UNet2D:
    """A network of random tensors, under diffusers' names."""

    def __init__(self, seed: int = 0, **config: Any) -> None:
        self.config = {**DEFAULTS, **config}
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}
        self.widths: list[int] = self.config["block_out_channels"]
        self.film = self.config["resnet_time_scale_shift"] == "scale_shift"
        middle = self.config["attn_norm_num_groups"] or (None if self.film else self.config["norm_num_groups"])
        first, last, layers = self.widths[0], self.widths[-1], self.config["layers_per_block"]
        self.add("time_embedding.linear_1", 4 * first, first)
        self.add("time_embedding.linear_2", 4 * first, 4 * first)
        self.add("conv_in", first, self.config["in_channels"], 3, 3)
        wide, skips = first, [first]
        for level, width in enumerate(self.widths):
            for layer in range(layers):
                self.residual(f"down_blocks.{level}.resnets.{layer}", wide, width)
                if self.config["down_block_types"][level].startswith("Attn"):
                    self.attention(f"down_blocks.{level}.attentions.{layer}", width)
                wide = width
                skips.append(wide)
            if level < len(self.widths) - 1:
                self.add(f"down_blocks.{level}.downsamplers.0.conv", wide, wide, 3, 3)
                skips.append(wide)
        self.residual("mid_block.resnets.0", last, last)
        if self.config["add_attention"]:
            self.attention("mid_block.attentions.0", last, norm=middle is not None)
        self.residual("mid_block.resnets.1", last, last)
        for level, width in enumerate(self.widths[::-1]):
            for layer in range(layers + 1):
                self.residual(f"up_blocks.{level}.resnets.{layer}", wide + skips.pop(), width)
                if self.config["up_block_types"][level].startswith("Attn"):
                    self.attention(f"up_blocks.{level}.attentions.{layer}", width)
                wide = width
            if level < len(self.widths) - 1:
                self.add(f"up_blocks.{level}.upsamplers.0.conv", wide, wide, 3, 3)
        self.add("conv_norm_out", first)
        self.add("conv_out", self.config["out_channels"], first, 3, 3)

    def add(self, name: str, *shape: int) -> None:
        scale = 1.0 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
        weight = scale * torch.randn(shape, generator=self.generator)
        self.tensors[f"{name}.weight"] = weight + (len(shape) == 1)
        self.tensors[f"{name}.bias"] = torch.randn(shape[0], generator=self.generator) / 4

    def residual(self, name: str, wide: int, width: int) -> None:
        self.add(f"{name}.norm1", wide)
        self.add(f"{name}.conv1", width, wide, 3, 3)
        self.add(f"{name}.time_emb_proj", width * (2 if self.film else 1), 4 * self.widths[0])
        self.add(f"{name}.norm2", width)
        self.add(f"{name}.conv2", width, width, 3, 3)
        if wide != width:
            self.add(f"{name}.conv_shortcut", width, wide, 1, 1)

    def attention(self, name: str, width: int, norm: bool = True) -> None:
        if norm:
            self.add(f"{name}.group_norm", width)
        for layer in ("to_q", "to_k", "to_v", "to_out.0"):
            self.add(f"{name}.{layer}", width, width)

    # The same once more, run

    def __call__(self, x: Tensor, k: Tensor) -> Tensor:
        """Run it on x (B, C, H, W) at indices (B,)."""
        half, layers = self.widths[0] // 2, self.config["layers_per_block"]
        angle = k[:, None] * torch.tensor(
            [10000.0 ** (-j / (half - self.config["freq_shift"])) for j in range(half)], dtype=torch.float32
        )
        halves = [angle.sin(), angle.cos()]
        e = torch.cat(halves[::-1] if self.config["flip_sin_to_cos"] else halves, 1)
        e = F.linear(F.silu(F.linear(e, *self.pair("time_embedding.linear_1"))), *self.pair("time_embedding.linear_2"))
        skips = [h := F.conv2d(x, *self.pair("conv_in"), padding=1)]
        for level in range(len(self.widths)):
            for layer in range(layers):
                skips.append(h := self.block(f"down_blocks.{level}", layer, h, e))
            if level < len(self.widths) - 1:
                sides = (1, 1, 1, 1) if self.config["downsample_padding"] else (0, 1, 0, 1)
                conv = self.pair(f"down_blocks.{level}.downsamplers.0.conv")
                skips.append(h := F.conv2d(F.pad(h, sides), *conv, stride=2))
        h = self.resnet("mid_block.resnets.1", self.block("mid_block", 0, h, e), e)
        for level in range(len(self.widths)):
            for layer in range(layers + 1):
                h = self.block(f"up_blocks.{level}", layer, torch.cat([h, skips.pop()], 1), e)
            if level < len(self.widths) - 1:
                h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
                h = F.conv2d(h, *self.pair(f"up_blocks.{level}.upsamplers.0.conv"), padding=1)
        assert not skips
        return F.conv2d(F.silu(self.norm("conv_norm_out", h)), *self.pair("conv_out"), padding=1)

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, groups: int | None = None) -> Tensor:
        groups = groups or self.config["norm_num_groups"]
        return F.group_norm(x, groups, *self.pair(name), eps=self.config["norm_eps"])

    def block(self, name: str, layer: int, x: Tensor, e: Tensor) -> Tensor:
        h = self.resnet(f"{name}.resnets.{layer}", x, e)
        name = f"{name}.attentions.{layer}"
        return self.attend(name, h) if f"{name}.to_q.weight" in self.tensors else h

    def resnet(self, name: str, x: Tensor, e: Tensor) -> Tensor:
        h = F.conv2d(F.silu(self.norm(f"{name}.norm1", x)), *self.pair(f"{name}.conv1"), padding=1)
        told = F.linear(F.silu(e), *self.pair(f"{name}.time_emb_proj"))[:, :, None, None]
        if self.film:
            width = h.shape[1]
            h = self.norm(f"{name}.norm2", h) * (1 + told[:, :width]) + told[:, width:]
        else:
            h = self.norm(f"{name}.norm2", h + told)
        h = F.conv2d(F.silu(h), *self.pair(f"{name}.conv2"), padding=1)
        return h + (
            F.conv2d(x, *self.pair(f"{name}.conv_shortcut")) if f"{name}.conv_shortcut.bias" in self.tensors else x
        )

    def attend(self, name: str, x: Tensor) -> Tensor:
        h = x
        if f"{name}.group_norm.weight" in self.tensors:
            middle = self.config["attn_norm_num_groups"] if name.startswith("mid") else None
            h = self.norm(f"{name}.group_norm", x, middle)
        rows = h.flatten(2).transpose(1, 2)
        q, k, v = (F.linear(rows, *self.pair(f"{name}.{layer}")) for layer in ("to_q", "to_k", "to_v"))
        size = self.config["attention_head_dim"] or x.shape[1]
        heads = []
        for start in range(0, x.shape[1], size):
            own = slice(start, start + size)
            weights = (q[:, :, own] @ k[:, :, own].transpose(1, 2) / math.sqrt(size)).softmax(2)
            heads.append(weights @ v[:, :, own])
        out = F.linear(torch.cat(heads, 2), *self.pair(f"{name}.to_out.0"))
        return x + out.transpose(1, 2).reshape(x.shape)

    # On disk

    def save(self, folder: Path, **extra: Any) -> Path:
        """Write a folder of the network alone."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**self.config, **extra}))
        save_file(self.tensors, folder / "diffusion_pytorch_model.safetensors")
        return folder


def save_scheduler(folder: Path, **keys: Any) -> None:
    """Write a pipeline's scheduler and index."""
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**SCHEDULER, **keys}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
