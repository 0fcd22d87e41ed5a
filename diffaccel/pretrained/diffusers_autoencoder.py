"""Folders of diffusers' AutoencoderKL, for latents. The package diffusers is not required."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffaccel.errors import UsageError
from diffaccel.latents.base import AUTOENCODERS
from diffaccel.pretrained.checkpoint import Entry, assemble, check_names, unwrap
from diffaccel.pretrained.diffusers_names import aliases, shape_in
from diffaccel.weights import Weights, hash_files
from diffaccel.weights.pickles import refuse, short
from diffaccel.weights.torchfile import Stored

CLASS = "AutoencoderKL"
PART = "vae"
"""Folder of the auto-encoder in a pipeline."""
FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "act_fn": ("silu", ("silu", "swish")),
    "latents_mean": (None, (None,)),
    "latents_std": (None, (None,)),
}
"""Key -> diffusers' default, and the values that are read."""
IGNORED = ("force_upcast", "sample_size", "scaling_factor", "shift_factor")
"""Keys that do not change the network; the factors are read, and all encoding and decoding is in float32."""
SIZES: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
"""Key -> diffusers' default."""
SCALING = 0.18215
"""Default of the key ``scaling_factor``, that of Stable Diffusion."""


def folder_of(path: Path) -> Path:
    """Return the folder of the auto-encoder: that in a pipeline, or the path itself."""
    return path / PART if (path / PART / "config.json").is_file() else path


def is_autoencoder(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of an auto-encoder with a Gaussian posterior."""
    return config.get("_class_name") == CLASS


def read_config(config: Mapping[str, Any], origin: str) -> tuple[dict[str, Any], float, float]:
    """Convert a configuration to a part, the factor that latents are multiplied by, and what is subtracted before.

    Raises:
        UsageError: A key has a value that is not supported.
    """
    for key in config:
        if key not in FIXED and key not in SIZES and key not in IGNORED and not key.startswith("_"):
            raise refuse(origin, f"its configuration has a key {key[:40]!r} that is not known here")
    for key, (default, known) in FIXED.items():
        if config.get(key, default) not in known:
            raise refuse(origin, f"{key} is {short(config[key])}, built here is {' or '.join(map(str, known))}")
    given = {key: config.get(key, default) for key, default in SIZES.items()}
    widths = given["block_out_channels"]
    if not isinstance(widths, list) or not 0 < len(widths) <= 8 or not all(map(_is_count, widths)):
        raise refuse(origin, f"block_out_channels is {short(widths)}, which is no list of one to eight numbers")
    for key in ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups"):
        if not _is_count(given[key]):
            raise refuse(origin, f"{key} is {short(given[key])}, which is no number from 1 to 10000")
    for key, only in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if given[key] != [only] * len(widths):
            raise refuse(origin, f"{key} are not {len(widths)} of {only}")
    for one, other in (("in_channels", "out_channels"), ("use_quant_conv", "use_post_quant_conv")):
        if given[one] != given[other]:
            raise refuse(origin, f"{one} is {short(given[one])}, but {other} is {short(given[other])}")
    for key in ("mid_block_add_attention", "use_quant_conv"):
        if type(given[key]) is not bool:
            raise refuse(origin, f"{key} is {short(given[key])}, which is neither true nor false")
    factor, shift = config.get("scaling_factor", SCALING), config.get("shift_factor")
    shift = 0.0 if shift is None else shift
    if not all(type(value) in (int, float) for value in (factor, shift)) or not 0 < factor < 1e4 or abs(shift) > 1e4:
        raise refuse(origin, "its scaling_factor or shift_factor is no number")
    node = {
        "name": "kl",
        "widths": widths,
        "blocks": given["layers_per_block"],
        "channels": given["latent_channels"],
        "groups": given["norm_num_groups"],
        "attention": given["mid_block_add_attention"],
        "projections": given["use_quant_conv"],
    }
    return node, float(factor), float(shift)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 10_000


def open_autoencoder(
    path: Path, config: Mapping[str, Any], found: Mapping[str, Stored], files: tuple[Path, ...]
) -> Weights:
    """Describe an auto-encoder of diffusers by a header.

    Args:
        path: Folder.
        config: Configuration.
        found: Tensors by their names in the files.
        files: Files of the folder.

    Raises:
        UsageError: The layout is not supported, or the tensors don't fit the configuration.
    """
    origin = str(path)
    node, factor, shift = read_config(config, origin)
    depth, side = config.get("in_channels", 3), 2 ** len(node["widths"])
    if max(len(node["widths"]), 1) * node["blocks"] > len(found):
        raise refuse(origin, f"its network would have more layers than it has tensors ({len(found)})")
    try:
        with torch.device("meta"):
            network = AUTOENCODERS.build(node, shape=(depth, side, side))
    except UsageError as error:
        raise refuse(origin, str(error)) from None
    named = aliases(unwrap(origin, found))
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items() if "latent_" not in name}
    entries = [Entry(name, shape, name) for name, shape in own.items()]
    check_names(origin, {entry.name: shape_in(named, entry) for entry in entries}, named)

    def read() -> dict[str, torch.Tensor]:
        tensors = assemble(origin, entries, named, network)
        tensors["latent_mean"] = torch.full((node["channels"],), shift)
        tensors["latent_std"] = torch.tensor(1 / factor)
        return tensors

    source = {"format": "diffusers", "scaling_factor": factor, "shift_factor": shift, "sha256": hash_files(path, files)}
    header = {"kind": "autoencoder", "autoencoder": node, "source": source}
    return Weights(path, "diffusers", "autoencoder", header, read, files)
