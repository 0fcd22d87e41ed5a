"""Tiny checkpoints in other programs' formats, and the networks in them, evaluated from their own names.

``ScoreSDE`` is written from the published layout alone: modules by number, NIN as matrices, resampling by zeros put in
between. Nothing of it is shared with what it tests.
"""

import math
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffaccel.nn.ncsnpp import Block, BlurredConv, NCSNpp
from diffaccel.pretrained.checkpoint import Entry
from diffaccel.pretrained.score_sde import listing

VE = {"width": 8, "multipliers": [1, 2, 2], "blocks": 1}
VP = {**VE, "embedding": "positional", "resample": "box", "encoder": "standard"}
PYRAMID = {**VE, "encoder": "skip", "decoder": "skip", "dropout": 0.0}
LAYOUTS = {"ve": VE, "vp": VP, "pyramid": PYRAMID, "deep": {**VE, "blocks": 2}}

CANARY_SOURCE = "open(CANARY, 'w').close()\nraise SystemExit('embedded source was executed')\n"


def random_network(seed: int = 0, **keys: Any) -> NCSNpp:
    """A network none of whose tensors is zero or alike, with outputs of order one."""
    network = NCSNpp((3, 32, 32), **keys).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            fan = tensor[0].numel() if tensor.ndim > 1 else 16
            scale = 16.0 if name.endswith("freqs") else fan**-0.5
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            tensor.copy_(offset + scale * torch.randn(tensor.shape, generator=generator))
    return network


def as_filed(entries: list[Entry], network: nn.Module) -> dict[str, Tensor]:
    """A network's tensors under a format's names and in its order."""
    state, filed = network.state_dict(), OrderedDict()
    for entry in entries:
        own = state[entry.own] if entry.rows is None else state[entry.own][entry.rows]
        value = own.reshape(entry.shape)
        filed[entry.name] = (value.T if entry.transposed else value).contiguous().clone()
    return filed


# score_sde_pytorch


def score_sde_content(
    averaged: NCSNpp, raw: NCSNpp, sigma_max: float = 50.0, prefix: str = "module.", levels: int = 10
) -> dict[str, Any]:
    """What its training loop saves."""
    model, shadow = as_filed(listing(raw), raw), as_filed(listing(averaged), averaged)
    if "all_modules.0.W" in model:
        shadow.pop("all_modules.0.W")
        model["all_modules.0.W"] = averaged.map_noise.freqs.clone()
    sigmas = torch.logspace(math.log10(sigma_max), -2, levels, dtype=torch.float64)
    named = OrderedDict((f"{prefix}{name}", value) for name, value in {"sigmas": sigmas, **model}.items())
    optimizer = {"state": {0: {"step": 1, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 2e-4, "params": [0]}]}
    ema = {"decay": 0.999, "num_updates": 7, "shadow_params": list(shadow.values())}
    return {"optimizer": optimizer, "model": named, "ema": ema, "step": 7}


class ScoreSDE:
    """A network of score_sde_pytorch, run module by module."""

    def __init__(self, tensors: dict[str, Tensor], layout: dict[str, Any]) -> None:
        self.tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
        self.multipliers, self.blocks = layout["multipliers"], layout["blocks"]
        self.fourier = layout.get("embedding") != "positional"
        self.fir = layout.get("resample") != "box"
        self.encoder, self.decoder = layout.get("encoder", "residual"), layout.get("decoder", "standard")
        self.attended = 1  # the level of 16x16 in 32x32

    def take(self) -> dict[str, Tensor]:
        start = f"all_modules.{self.number}."
        self.number += 1
        return {name[len(start) :]: value for name, value in self.tensors.items() if name.startswith(start)}

    def __call__(self, x: Tensor, c: Tensor) -> Tensor:
        """VE: x in [0, 1] and sigma -> score. VP: x of the scaled process and 999 t -> eps."""
        self.number = 0
        e = self.embed(c)
        pyramid = 2 * x - 1 if self.fourier else x
        skips = [self.conv(self.take(), "", pyramid)]
        for level in range(len(self.multipliers)):
            for _ in range(self.blocks):
                h = self.residual(skips[-1], e)
                skips.append(self.attend(h) if level == self.attended else h)
            if level < len(self.multipliers) - 1:
                h = self.residual(skips[-1], e, resample=self.down)
                if self.encoder == "residual":
                    own = self.take()
                    blurred = F.conv2d(pyramid, own["Conv2d_0.weight"], padding=2)  # conv, then blur and halve
                    blurred = self.filtered(blurred, pad=0)[:, :, ::2, ::2] + own["Conv2d_0.bias"][:, None, None]
                    h = pyramid = (blurred + h) / math.sqrt(2)
                elif self.encoder == "skip":
                    pyramid = self.down(pyramid)
                    h = h + self.conv(self.take(), "Conv_0.", pyramid)
                skips.append(h)
        h = self.residual(self.attend(self.residual(skips[-1], e)), e)
        image: Any = 0
        for level in reversed(range(len(self.multipliers))):
            for _ in range(self.blocks + 1):
                h = self.residual(torch.cat([h, skips.pop()], 1), e)
            if level == self.attended:
                h = self.attend(h)
            if self.decoder == "skip":
                image = self.up(image) if level < len(self.multipliers) - 1 else image
                image = image + self.end(h)
            if level:
                h = self.residual(h, e, resample=self.up)
        output = image if self.decoder == "skip" else self.end(h)
        assert not self.take(), "modules are left over"
        return output / c[:, None, None, None] if self.fourier else output

    def end(self, h: Tensor) -> Tensor:
        own = self.take()
        return self.conv(self.take(), "", F.silu(self.norm(own, "", h)))

    def embed(self, c: Tensor) -> Tensor:
        if self.fourier:
            angle = 2 * math.pi * c.log()[:, None] * self.take()["W"]
        else:
            half = self.tensors["all_modules.0.weight"].shape[1] // 2
            angle = c[:, None] * torch.tensor([10000.0 ** (-j / (half - 1)) for j in range(half)])
        first, second = self.take(), self.take()
        hidden = torch.cat([angle.sin(), angle.cos()], 1) @ first["weight"].T + first["bias"]
        return F.silu(F.silu(hidden) @ second["weight"].T + second["bias"])

    def conv(self, own: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        weight = own[f"{name}weight"]
        return F.conv2d(x, weight, own[f"{name}bias"], padding=weight.shape[2] // 2)

    def norm(self, own: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, min(x.shape[1] // 4, 32), own[f"{name}weight"], own[f"{name}bias"], eps=1e-6)

    def filtered(self, x: Tensor, pad: int | tuple[int, ...]) -> Tensor:
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) if self.fir else torch.tensor([1.0, 1.0])
        kernel = torch.outer(taps, taps) / taps.sum() ** 2
        x = F.pad(x, (pad,) * 4 if isinstance(pad, int) else pad)
        return torch.stack([F.conv2d(x[:, i : i + 1], kernel[None, None])[:, 0] for i in range(x.shape[1])], 1)

    def down(self, x: Tensor) -> Tensor:
        return self.filtered(x, pad=1)[:, :, ::2, ::2] if self.fir else F.avg_pool2d(x, 2)

    def up(self, x: Tensor) -> Tensor:
        if not self.fir:
            return x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        zeros = torch.zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        zeros[:, :, ::2, ::2] = x
        return 4 * self.filtered(zeros, pad=(2, 1, 2, 1))

    def residual(self, x: Tensor, e: Tensor, resample: Any = None) -> Tensor:
        own = self.take()
        h = F.silu(self.norm(own, "GroupNorm_0.", x))
        h, x = (resample(h), resample(x)) if resample else (h, x)
        h = self.conv(own, "Conv_0.", h) + (e @ own["Dense_0.weight"].T + own["Dense_0.bias"])[:, :, None, None]
        h = self.conv(own, "Conv_1.", F.silu(self.norm(own, "GroupNorm_1.", h)))
        return ((self.conv(own, "Conv_2.", x) if "Conv_2.weight" in own else x) + h) / math.sqrt(2)

    def attend(self, x: Tensor) -> Tensor:
        own = self.take()
        rows = self.norm(own, "GroupNorm_0.", x).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = (rows @ own[f"NIN_{j}.W"] + own[f"NIN_{j}.b"] for j in range(3))
        h = (q @ k.transpose(1, 2) / math.sqrt(x.shape[1])).softmax(2) @ v
        h = h @ own["NIN_3.W"] + own["NIN_3.b"]
        return (x + h.transpose(1, 2).reshape(x.shape)) / math.sqrt(2)


# EDM


class Recorded:
    """Pickles as a module of EDM's does: a call with its source code and its state."""

    def __init__(self, class_name: str, state: dict[str, Any], **meta: Any) -> None:
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": CANARY_SOURCE,
            "class_name": class_name,
            "state": state,
            **meta,
        }

    def __reduce__(self) -> Any:
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


@pytest.fixture
def edm_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that EDM's pickles name, there only while a test writes one."""
    module = types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta: Any) -> None:
        raise AssertionError("called")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)


def edm_arguments(**layout: Any) -> dict[str, Any]:
    """SongUNet's arguments for a layout."""
    fourier, fir = layout.get("embedding") != "positional", layout.get("resample") != "box"
    return {
        "img_resolution": 32,
        "in_channels": 3,
        "out_channels": 3,
        "label_dim": layout.get("classes", 0),
        "augment_dim": layout.get("augment", 0),
        "model_channels": layout["width"],
        "channel_mult": layout["multipliers"],
        "num_blocks": layout["blocks"],
        "dropout": 0.13,
        "embedding_type": "fourier" if fourier else "positional",
        "channel_mult_noise": 2 if fourier else 1,
        "resample_filter": [1, 3, 3, 1] if fir else [1, 1],
        "encoder_type": layout.get("encoder", "residual"),
        "decoder_type": layout.get("decoder", "standard"),
    }


def recorded(module: nn.Module, class_name: str, **state: Any) -> Any:
    """A module of ours as EDM would pickle it."""
    names = {"Linear", "Conv2d", "GroupNorm"}
    children: dict[str, Any] = OrderedDict()
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleDict):
            children[name] = nn.ModuleDict()
            for key, entry in child.items():
                children[name]._modules[key] = recorded(entry, type(entry).__name__)
        elif (
            isinstance(child, Block) or type(child).__name__ in names or list(child.parameters()) or name == "map_noise"
        ):
            children[name] = recorded(child, type(child).__name__)
    buffers = OrderedDict(module.named_buffers(recurse=False)) if class_name == "Fourier" else OrderedDict()
    if isinstance(module, BlurredConv):
        buffers["resample_filter"] = module.kernel[None, None].clone()
    attributes = {"training": False, "skip_scale": np.sqrt(0.5), "_non_persistent_buffers_set": set(), **state}
    parameters = OrderedDict(module.named_parameters(recurse=False))
    whole = {"_parameters": parameters, "_buffers": buffers, "_modules": children, "_init_args": (), "_init_kwargs": {}}
    return Recorded(class_name, {**whole, **attributes})


def edm_content(network: NCSNpp, layout: dict[str, Any], wrapper: str = "EDMPrecond", **attributes: Any) -> Any:
    """What EDM's training loop saves."""
    song = recorded(network, "SongUNet", _init_kwargs=edm_arguments(**layout))
    root = {"_parameters": {}, "_buffers": {}, "_modules": {"model": song}, "_init_args": (), **attributes}
    return {"ema": Recorded(wrapper, root), "loss_fn": None, "augment_pipe": None, "dataset_kwargs": {}}


class Dhariwal:
    """DhariwalUNet, run from its file's names, written from the published layout alone."""

    def __init__(self, multipliers: list[int], blocks: int, attention: list[int], width: int, classes: int = 0) -> None:
        self.multipliers, self.blocks, self.attention, self.width = multipliers, blocks, attention, width
        self.arguments = {
            "img_resolution": 32,
            "in_channels": 3,
            "out_channels": 3,
            "label_dim": classes,
            "model_channels": width,
            "channel_mult": multipliers,
            "num_blocks": blocks,
            "attn_resolutions": attention,
            "label_dropout": 0.1,
        }

    def made(self, outputs: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random tensors, in the order of the file."""
        tensors: dict[str, Tensor] = {}

        def add(name: str, *shape: int, bias: bool = True) -> None:
            norm = len(shape) == 1
            scale = 1.0 if norm else math.prod(shape[1:]) ** -0.5
            tensors[f"{name}.weight"] = norm + scale * torch.randn(shape, generator=generator)
            if bias:
                tensors[f"{name}.bias"] = torch.randn(shape[0], generator=generator) / 4

        def block(name: str, cin: int, cout: int, attends: bool, resampled: bool = False) -> None:
            add(f"{name}.norm0", cin)
            add(f"{name}.conv0", cout, cin, 3, 3)
            if resampled:
                tensors[f"{name}.conv0.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
            add(f"{name}.affine", 2 * cout, 4 * self.width)
            add(f"{name}.norm1", cout)
            add(f"{name}.conv1", cout, cout, 3, 3)
            if cin != cout:
                add(f"{name}.skip", cout, cin, 1, 1)
            elif resampled:
                tensors[f"{name}.skip.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
            if attends:
                add(f"{name}.norm2", cout)
                add(f"{name}.qkv", 3 * cout, cout, 1, 1)
                add(f"{name}.proj", cout, cout, 1, 1)

        add("map_layer0", 4 * self.width, self.width)
        add("map_layer1", 4 * self.width, 4 * self.width)
        if self.arguments["label_dim"]:
            add("map_label", 4 * self.width, self.arguments["label_dim"], bias=False)
        add("enc.32x32_conv", self.width, 3, 3, 3)
        skips, cout = [self.width], self.width
        for level, multiplier in enumerate(self.multipliers):
            rows = 32 >> level
            if level:
                block(f"enc.{rows}x{rows}_down", cout, cout, attends=False, resampled=True)
                skips.append(cout)
            for index in range(self.blocks):
                cin, cout = cout, self.width * multiplier
                block(f"enc.{rows}x{rows}_block{index}", cin, cout, rows in self.attention)
                skips.append(cout)
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            rows = 32 >> level
            if level == len(self.multipliers) - 1:
                block(f"dec.{rows}x{rows}_in0", cout, cout, attends=True)
                block(f"dec.{rows}x{rows}_in1", cout, cout, attends=False)
            else:
                block(f"dec.{rows}x{rows}_up", cout, cout, attends=False, resampled=True)
            for index in range(self.blocks + 1):
                cin, cout = cout + skips.pop(), self.width * multiplier
                block(f"dec.{rows}x{rows}_block{index}", cin, cout, rows in self.attention)
        add("out_norm", cout)
        add("out_conv", outputs, cout, 3, 3)
        self.tensors = tensors
        return tensors

    def __call__(self, x: Tensor, c: Tensor, onehot: Tensor | None = None) -> Tensor:
        """Run it on x (B, 3, 32, 32), noise labels (B,) and one-hot labels."""
        own = self.tensors
        angle = c[:, None] * torch.tensor([10000.0 ** (-2 * j / self.width) for j in range(self.width // 2)])
        e = F.silu(F.linear(torch.cat([angle.cos(), angle.sin()], 1), *self.pair("map_layer0")))
        e = F.linear(e, *self.pair("map_layer1"))
        e = F.silu(e if onehot is None else e + onehot @ own["map_label.weight"].T)
        skips: list[Tensor] = []
        h = x
        for name in dict.fromkeys(".".join(key.split(".")[:2]) for key in own if key.startswith(("enc", "dec"))):
            if name.startswith("dec") and "block" in name:
                h = torch.cat([h, skips.pop()], 1)
            h = F.conv2d(h, *self.pair(name), padding=1) if name.endswith("conv") else self.block(name, h, e)
            if name.startswith("enc"):
                skips.append(h)
        assert not skips
        return F.conv2d(F.silu(self.norm("out_norm", h)), *self.pair("out_conv"), padding=1)

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, min(32, x.shape[1] // 4), *self.pair(name), eps=1e-5)

    def block(self, name: str, x: Tensor, e: Tensor) -> Tensor:
        h = F.silu(self.norm(f"{name}.norm0", x))
        if name.endswith("down"):
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif name.endswith("up"):
            h, x = (a.repeat_interleave(2, 2).repeat_interleave(2, 3) for a in (h, x))
        h = F.conv2d(h, *self.pair(f"{name}.conv0"), padding=1)
        scale, shift = F.linear(e, *self.pair(f"{name}.affine"))[:, :, None, None].chunk(2, 1)
        h = F.silu(self.norm(f"{name}.norm1", h) * (1 + scale) + shift)
        h = F.conv2d(h, *self.pair(f"{name}.conv1"), padding=1)
        x = h + (F.conv2d(x, *self.pair(f"{name}.skip")) if f"{name}.skip.weight" in self.tensors else x)
        if f"{name}.qkv.weight" not in self.tensors:
            return x
        heads = x.shape[1] // 64
        qkv = F.conv2d(self.norm(f"{name}.norm2", x), *self.pair(f"{name}.qkv"))
        q, k, v = qkv.reshape(len(x) * heads, 64, 3, -1).unbind(2)
        a = torch.einsum("nqk,nck->ncq", torch.einsum("ncq,nck->nqk", q, k / 8).softmax(2), v)
        return x + F.conv2d(a.reshape(x.shape), *self.pair(f"{name}.proj"))

    def content(self, wrapper: str, **attributes: Any) -> Any:
        """What EDM's training loop saves, as a tree of modules of their own."""

        def module(tensors: dict[str, Tensor], **state: Any) -> Any:
            heads = dict.fromkeys(name.split(".")[0] for name in tensors if "." in name)
            children = {
                h: module({n[len(h) + 1 :]: t for n, t in tensors.items() if n.startswith(h + ".")}) for h in heads
            }
            here = {name: tensor for name, tensor in tensors.items() if "." not in name}
            buffers = {name: here.pop(name) for name in list(here) if name == "resample_filter"}
            parameters = {name: nn.Parameter(tensor) for name, tensor in here.items()}
            whole = {"_parameters": parameters, "_buffers": buffers, "_modules": children}
            return Recorded("UNetBlock", {**whole, "_non_persistent_buffers_set": set(), **state})

        arguments = {**self.arguments, "out_channels": len(self.tensors["out_conv.bias"])}
        network = module(self.tensors, _init_args=(), _init_kwargs=arguments)
        network.meta["class_name"] = "DhariwalUNet"
        root = {"_parameters": {}, "_buffers": {}, "_modules": {"model": network}, "_init_args": (), **attributes}
        return {"ema": Recorded(wrapper, root)}


def write_pickle(path: Path, content: Any, protocol: int = 4) -> Path:
    with path.open("wb") as file:
        pickle.dump(content, file, protocol)
    return path
