"""Names of the tensors of diffusers' UNet2DModel, for the two supported networks."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from diffaccel.nn.ddpm import Attention, DDPMUNet, Downsample, ResidualBlock, Upsample
from diffaccel.nn.ncsnpp import NCSNpp
from diffaccel.pretrained.checkpoint import Entry
from diffaccel.weights.torchfile import Stored

_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def aliases(found: Mapping[str, Stored]) -> dict[str, Stored]:
    """Replace names of older revisions by current ones."""
    named = {}
    for name, value in found.items():
        *front, last, end = name.split(".") if name.count(".") > 1 else ["", "", name]
        named[".".join([*front, _OLD.get(last, last), end]) if last else name] = value
    older = named.pop("time_proj.W", None)  # some files contain the tensor twice
    if older is not None:
        named.setdefault("time_proj.weight", older)
    return named


def shape_in(found: Mapping[str, Stored], entry: Entry) -> tuple[int, ...]:
    """Return the expected shape of a tensor; linear layers of attention are 1x1 convolutions in some revisions."""
    as_convolution = (*entry.shape, 1, 1)
    convolved = len(entry.shape) == 2 and entry.name in found and found[entry.name].shape == as_convolution
    return as_convolution if convolved else entry.shape


def _pairs(name: str, own: str, module: Any) -> list[Entry]:
    """Entries of weight and bias."""
    return [Entry(f"{name}.{end}", tuple(getattr(module, end).shape), f"{own}.{end}") for end in ("weight", "bias")]


def _residual(name: str, own: str, block: Any, names: tuple[str, ...]) -> list[Entry]:
    theirs = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")
    layers = [(a, b, getattr(block, b)) for a, b in zip(theirs, names, strict=True)]
    return [
        entry
        for a, b, layer in layers
        if not isinstance(layer, nn.Identity)
        for entry in _pairs(f"{name}.{a}", f"{own}.{b}", layer)
    ]


def _attention(name: str, qkv: str, out: str, width: int, interleaved: bool) -> list[Entry]:
    entries = []
    for j, (theirs, own) in enumerate([("to_q", qkv), ("to_k", qkv), ("to_v", qkv), ("to_out.0", out)]):
        rows = None if j == 3 else slice(j, None, 3) if interleaved else slice(j * width, (j + 1) * width)
        entries.append(Entry(f"{name}.{theirs}.weight", (width, width), f"{own}.weight", rows))
        entries.append(Entry(f"{name}.{theirs}.bias", (width,), f"{own}.bias", rows))
    return entries


def names_of_ncsnpp(network: nn.Module) -> list[Entry]:
    """Return the entries of the tensors of a skip / skip NCSN++."""
    assert isinstance(network, NCSNpp)
    last = len(network.sizes) - 1
    entries = [Entry("time_proj.weight", tuple(network.map_noise.freqs.shape), "map_noise.freqs")]
    entries += _pairs("time_embedding.linear_1", "map_layer0", network.map_layer0)
    entries += _pairs("time_embedding.linear_2", "map_layer1", network.map_layer1)

    def block(name: str, own: str, attention: str = "") -> None:
        module: Any = network.get_submodule(own)
        entries.extend(_residual(name, own, module, ("norm0", "conv0", "affine", "norm1", "conv1", "skip")))
        if module.attends:
            entries.extend(_pairs(f"{attention}.group_norm", f"{own}.norm2", module.norm2))
            entries.extend(_attention(attention, f"{own}.qkv", f"{own}.proj", module.norm2.num_channels, True))

    def pair(name: str, own: str) -> None:
        entries.extend(_pairs(name, own, network.get_submodule(own)))

    pair("conv_in", f"enc.{network.sizes[0]}_conv")
    for level, size in enumerate(network.sizes):
        down, up = f"down_blocks.{level}", f"up_blocks.{last - level}"
        for j in range(network.blocks):
            block(f"{down}.resnets.{j}", f"enc.{size}_block{j}", f"{down}.attentions.{j}")
        if level < last:
            below = network.sizes[level + 1]
            block(f"{down}.resnet_down", f"enc.{below}_down")
            pair(f"{down}.skip_conv", f"enc.{below}_aux_skip")
        for j in range(network.blocks + 1):
            block(f"{up}.resnets.{j}", f"dec.{size}_block{j}", f"{up}.attentions.0")
        if level:
            block(f"{up}.resnet_up", f"dec.{network.sizes[level - 1]}_up")
        pair(f"{up}.skip_norm" if level else "conv_norm_out", f"dec.{size}_aux_norm")
        pair(f"{up}.skip_conv" if level else "conv_out", f"dec.{size}_aux_conv")
    block("mid_block.resnets.0", f"dec.{network.sizes[-1]}_in0", "mid_block.attentions.0")
    block("mid_block.resnets.1", f"dec.{network.sizes[-1]}_in1")
    return entries


def names_of_ddpm(network: nn.Module) -> list[Entry]:
    """Return the entries of the tensors of DDPM's U-Net."""
    assert isinstance(network, DDPMUNet)
    entries = _pairs("time_embedding.linear_1", "embed_time.layers.0", network.embed_time.layers[0])
    entries += _pairs("time_embedding.linear_2", "embed_time.layers.2", network.embed_time.layers[2])
    entries += _pairs("conv_in", "stem", network.stem)
    entries += _pairs("conv_norm_out", "norm", network.norm) + _pairs("conv_out", "out", network.out)

    def add(layer: Any, own: str, name: str, number: int) -> None:
        if isinstance(layer, ResidualBlock):
            names = ("norm_1", "conv_1", "project", "norm_2", "conv_2", "skip")
            entries.extend(_residual(f"{name}.resnets.{number}", own, layer, names))
        elif isinstance(layer, Attention):
            attention = f"{name}.attentions.{number}"
            if not isinstance(layer.norm, nn.Identity):
                entries.extend(_pairs(f"{attention}.group_norm", f"{own}.norm", layer.norm))
            entries.extend(_attention(attention, f"{own}.qkv", f"{own}.out", layer.out.out_channels, False))
        elif isinstance(layer, Downsample | Upsample):
            kind = "downsamplers" if isinstance(layer, Downsample) else "upsamplers"
            entries.extend(_pairs(f"{name}.{kind}.0.conv", f"{own}.conv", layer.conv))

    level = number = 0
    stage: Any
    for index, stage in enumerate(network.down):
        # A resolution ends with its downsampling, which is a separate stage.
        for place, layer in enumerate(stage):
            add(layer, f"down.{index}.{place}", f"down_blocks.{level}", number)
        halves = isinstance(stage[0], Downsample)
        level, number = (level + 1, 0) if halves else (level, number + 1)
    for place, layer in enumerate(network.middle):
        add(layer, f"middle.{place}", "mid_block", int(place > 0 and isinstance(layer, ResidualBlock)))
    level = number = 0
    for index, stage in enumerate(network.up):
        for place, layer in enumerate(stage):
            add(layer, f"up.{index}.{place}", f"up_blocks.{level}", number)
        doubles = isinstance(stage[-1], Upsample)
        level, number = (level + 1, 0) if doubles else (level, number + 1)
    return entries
