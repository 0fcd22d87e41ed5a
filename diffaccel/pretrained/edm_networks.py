"""Conversion of arguments and tensor names of the networks in EDM's pickles."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from diffaccel.nn.adm import ADMUNet, Block
from diffaccel.nn.ncsnpp import TAPS
from diffaccel.pretrained.checkpoint import Entry
from diffaccel.weights.pickles import refuse, short

Network = tuple[dict[str, Any], tuple[int, int, int]]
"""Network as in an experiment, and image shape."""


def _complete(name: str, arguments: Mapping[str, Any], defaults: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Add the defaults of missing arguments.

    Raises:
        UsageError: An argument is unknown or has another type.
    """
    given = {**defaults, **arguments}
    for key, value in given.items():
        if key not in defaults or not _alike(value, defaults[key]):
            raise refuse(origin, f"its {name} has {key[:40]} = {short(value)}, which is not known here")
    return given


def _alike(value: Any, default: Any) -> bool:
    """Whether a value has the type of the default and a plausible size."""
    if isinstance(default, list):
        return isinstance(value, list | tuple) and len(value) <= 16 and all(_alike(entry, 0) for entry in value)
    if isinstance(default, str):
        return isinstance(value, str)
    kinds = (int, float) if isinstance(default, float) else (int,)
    return type(value) in kinds and abs(value) < 1e5


def _null_class(given: Mapping[str, Any]) -> dict[str, Any]:
    """Whether a conditional network has a null class, which requires that labels were dropped in training."""
    return {"null_class": given["label_dropout"] > 0} if given["label_dim"] else {}


# SongUNet: NCSN++ and DDPM++, with the same tensor names as in diffaccel.


def _song_unet(arguments: Mapping[str, Any], origin: str) -> Network:
    """Convert the arguments of SongUNet."""
    given = _complete("SongUNet", arguments, _SONG_DEFAULTS, origin)
    filters = {taps: name for name, taps in TAPS.items()}
    taps, channels, pixels = tuple(given["resample_filter"]), given["in_channels"], given["img_resolution"]
    if taps not in filters or given["channel_mult_emb"] != 4 or given["out_channels"] != channels:
        raise refuse(origin, "its SongUNet has a resample_filter, channel_mult_emb or out_channels of another network")
    network: dict[str, Any] = {"name": "ncsnpp", "resample": filters[taps]}
    network |= {own: given[name] for name, own in _SONG_NAMES.items()}
    network |= {own: list(given[name]) for name, own in _SONG_LISTS.items()}
    network["noise_width"] = given["model_channels"] * given["channel_mult_noise"]
    network |= _null_class(given)
    return network, (channels, pixels, pixels)


def _song_listing(network: nn.Module) -> list[Entry]:
    return [Entry(name, tuple(tensor.shape), name) for name, tensor in network.state_dict().items()]


_SONG_NAMES = {
    "model_channels": "width",
    "num_blocks": "blocks",
    "embedding_type": "embedding",
    "encoder_type": "encoder",
    "decoder_type": "decoder",
    "dropout": "dropout",
    "label_dim": "classes",
    "augment_dim": "augment",
}
_SONG_LISTS = {"channel_mult": "multipliers", "attn_resolutions": "attention"}
_SONG_DEFAULTS: dict[str, Any] = {
    "img_resolution": 0,
    "in_channels": 0,
    "out_channels": 0,
    "model_channels": 128,
    "channel_mult": [1, 2, 2, 2],
    "channel_mult_emb": 4,
    "num_blocks": 4,
    "attn_resolutions": [16],
    "dropout": 0.10,
    "label_dim": 0,
    "augment_dim": 0,
    "label_dropout": 0.0,
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
}

# DhariwalUNet: ADM.


def _dhariwal_unet(arguments: Mapping[str, Any], origin: str) -> Network:
    """Convert the arguments of DhariwalUNet, which has twice the output channels if it predicts variances."""
    given = _complete("DhariwalUNet", arguments, _DHARIWAL_DEFAULTS, origin)
    channels, pixels, outputs = given["in_channels"], given["img_resolution"], given["out_channels"]
    if given["channel_mult_emb"] != 4 or outputs not in (channels, 2 * channels):
        raise refuse(origin, "its DhariwalUNet has a channel_mult_emb or out_channels of another network")
    rows = [pixels // 2**level for level in range(len(given["channel_mult"]))]
    network: dict[str, Any] = {"name": "adm", "decouple": False, "heads": [1 if outputs == channels else 2]}
    network |= {own: given[name] for name, own in _DHARIWAL_NAMES.items()}
    network["multipliers"] = list(given["channel_mult"])
    network["attention"] = [size for size in given["attn_resolutions"] if size in rows]
    network |= _null_class(given)
    return network, (channels, pixels, pixels)


def _dhariwal_listing(network: nn.Module) -> list[Entry]:
    assert isinstance(network, ADMUNet)
    (decoder,), rows = network.decoders, network.shape[1]
    modules = {"map_layer0": "embed.first", "map_layer1": "embed.second", f"enc.{rows}x{rows}_conv": "stem"}
    modules |= {"map_augment": "embed.augment", "map_label": "embed.label"}
    modules |= {"out_norm": "decoders.0.norm", "out_conv": "decoders.0.out"}

    def place(theirs: str, ours: str) -> None:
        modules.update({f"{theirs}.{name}": f"{ours}.{own}" for name, own in _BLOCK_NAMES.items()})

    number = 0
    for index, block in enumerate(network.encoder):
        assert isinstance(block, Block)
        rows, number = (rows // 2, 0) if block.resample else (rows, number)
        place(f"enc.{rows}x{rows}_{'down' if block.resample else f'block{number}'}", f"encoder.{index}")
        number += not block.resample
    for index in range(2):
        place(f"dec.{rows}x{rows}_in{index}", f"decoders.0.middle.{index}")
    for level, stages in enumerate(decoder.levels):  # type: ignore[arg-type]
        if level:
            rows *= 2
            place(f"dec.{rows}x{rows}_up", f"decoders.0.levels.{level}.0")
        for index in range(len(stages) - bool(level)):
            place(f"dec.{rows}x{rows}_block{index}", f"decoders.0.levels.{level}.{index + bool(level)}")

    own, entries = network.state_dict(), []
    for name, module in modules.items():
        for kind in ("weight", "bias"):
            if (tensor := own.get(f"{module}.{kind}")) is not None:
                label = name == "map_label"  # a matrix for one-hot labels in the file, a table in diffaccel
                shape = tuple(tensor.T.shape) if label else tuple(tensor.shape)
                entries.append(Entry(f"{name}.{kind}", shape, f"{module}.{kind}", transposed=label))
    return entries


_BLOCK_NAMES = {
    "norm0": "norm_1",
    "conv0": "conv_1",
    "affine": "film",
    "norm1": "norm_2",
    "conv1": "conv_2",
    "skip": "skip",
    "norm2": "attention.norm",
    "qkv": "attention.qkv",
    "proj": "attention.out",
}
_DHARIWAL_NAMES = {
    "model_channels": "width",
    "num_blocks": "blocks",
    "dropout": "dropout",
    "label_dim": "classes",
    "augment_dim": "augment",
}
_DHARIWAL_DEFAULTS: dict[str, Any] = {
    "img_resolution": 0,
    "in_channels": 0,
    "out_channels": 0,
    "label_dim": 0,
    "augment_dim": 0,
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "channel_mult_emb": 4,
    "num_blocks": 3,
    "attn_resolutions": [32, 16, 8],
    "dropout": 0.10,
    "label_dropout": 0.0,
}

NETWORKS: dict[str, tuple[Callable[[Mapping[str, Any], str], Network], Callable[[nn.Module], list[Entry]]]] = {
    "SongUNet": (_song_unet, _song_listing),
    "DhariwalUNet": (_dhariwal_unet, _dhariwal_listing),
}
"""Network class of EDM's files -> functions that convert its arguments and its tensor names."""
