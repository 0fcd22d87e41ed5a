"""Conversion of configurations of diffusers' UNet2DModel and schedulers to networks, denoisers and processes.

A folder is refused if a key has a value that is not supported.
"""

import math
from collections.abc import Mapping
from typing import Any

from diffaccel.weights.pickles import refuse, short

Node = dict[str, Any]

_ANY = object()
_COMMON: dict[str, tuple[Any, Any]] = {  # key -> (diffusers' default, what the layouts have)
    "_class_name": (None, "UNet2DModel"),
    "act_fn": ("silu", ("silu", "swish")),
    "class_embed_type": (None, None),
    "downsample_type": ("conv", "conv"),
    "dropout": (0.0, _ANY),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "num_class_embeds": (None, None),
    "num_train_timesteps": (None, _ANY),
    "time_embedding_dim": (None, None),
    "upsample_type": ("conv", "conv"),
}
LAYOUTS: dict[str, dict[str, tuple[Any, Any]]] = {
    "fourier": {
        **_COMMON,
        "add_attention": (True, True),
        "attention_head_dim": (8, None),
        "attn_norm_num_groups": (None, None),
        "center_input_sample": (False, (False, True)),
        "downsample_padding": (1, _ANY),
        "downsample_type": ("conv", _ANY),
        "flip_sin_to_cos": (True, _ANY),
        "freq_shift": (0, _ANY),
        "mid_block_scale_factor": (1, math.sqrt(2)),
        "norm_eps": (1e-5, 1e-6),
        "norm_num_groups": (32, None),
        "resnet_time_scale_shift": ("default", "default"),
        "upsample_type": ("conv", _ANY),
    },
    "positional": {
        **_COMMON,
        "add_attention": (True, (True, False)),
        "attention_head_dim": (8, _ANY),
        "attn_norm_num_groups": (None, _ANY),
        "center_input_sample": (False, False),
        "downsample_padding": (1, (0, 1)),
        "flip_sin_to_cos": (True, (True, False)),
        "freq_shift": (0, (0, 1)),
        "mid_block_scale_factor": (1, 1),
        "norm_eps": (1e-5, _ANY),
        "norm_num_groups": (32, _ANY),
        "resnet_time_scale_shift": ("default", ("default", "scale_shift")),
    },
}
_SIZES: dict[str, Any] = {  # with diffusers' defaults
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": [224, 448, 672, 896],
    "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
    "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    "time_embedding_type": "positional",
}
AVERAGE = {"decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"}
"""Keys of diffusers' EMAModel."""


def read_config(config: Mapping[str, Any], size: int | None, origin: str) -> tuple[Node, tuple[int, int, int]]:
    """Convert a configuration of UNet2DModel to the arguments of a network and the image shape.

    Args:
        config: Configuration.
        size: Size of the images in pixels, if given by the user.
        origin: Name of the file, for messages.

    Raises:
        UsageError: A key is unknown or has an unsupported value.
    """
    given = {**_SIZES, **config}
    layout = given["time_embedding_type"]
    if config.get("_class_name") != "UNet2DModel" or layout not in ("fourier", "positional"):
        what = f"class {short(config.get('_class_name'))} with {short(layout)} time embedding"
        raise refuse(origin, f"its configuration is of {what}, readable is a current UNet2DModel")
    layouts = LAYOUTS[layout]
    for key in config:
        if key not in layouts and key not in _SIZES and key not in AVERAGE and not key.startswith("_"):
            raise refuse(origin, f"its configuration has a key {key[:40]!r} that is not known here")
    given |= {key: config.get(key, default) for key, (default, _) in layouts.items()}
    for key, (_, allowed) in layouts.items():
        options = allowed if isinstance(allowed, tuple) else (allowed,)
        if allowed is not _ANY and not any(_same(option, given[key]) for option in options):
            built = " or ".join(map(str, options))
            raise refuse(origin, f"{key} is {short(given[key])}, built here is {built} (for {layout} embedding)")
    shape = _shape(given, size, origin)
    network = _blocks(given, shape[1], origin)
    return {**network, **(_ncsnpp(given, origin) if layout == "fourier" else _ddpm(given, origin))}, shape


def _same(allowed: Any, value: Any) -> bool:
    """Compare two values, where 1 equals 1.0 but not True."""
    if type(allowed) in (int, float) and type(value) in (int, float):
        return math.isclose(value, allowed, rel_tol=1e-4)
    return type(allowed) is type(value) and bool(allowed == value)


def _whole(given: Mapping[str, Any], key: str, origin: str, low: int = 1) -> int:
    value = given[key]
    if type(value) is not int or not low <= value < 10_000:
        raise refuse(origin, f"{key} is {short(value)}, which is no number from {low} to 10000")
    return value


def _number(given: Mapping[str, Any], key: str, origin: str, high: float = 1.0) -> float:
    value = given[key]
    if type(value) not in (int, float) or not 0 <= value < high:
        raise refuse(origin, f"{key} is {short(value)}, which is no number from 0 to {high:g}")
    return float(value)


def _shape(given: Mapping[str, Any], size: int | None, origin: str) -> tuple[int, int, int]:
    channels, sizes = _whole(given, "in_channels", origin), given["sample_size"]
    if given["out_channels"] != channels:
        raise refuse(origin, "out_channels differs from in_channels: a learned variance is not read")
    if sizes is None and size is None:
        raise refuse(origin, "sample_size is null: give size=, in pixels")
    pair = [size] * 2 if size is not None else sizes if isinstance(sizes, list) and len(sizes) == 2 else [sizes] * 2
    rows, columns = (_whole({"sample_size": value}, "sample_size", origin) for value in pair)
    return channels, rows, columns


def _blocks(given: Mapping[str, Any], rows: int, origin: str) -> Node:
    """Widths, number of blocks and attention of both layouts."""
    widths, blocks = given["block_out_channels"], _whole(given, "layers_per_block", origin)
    if not isinstance(widths, list) or not 0 < len(widths) <= 16:
        raise refuse(origin, f"block_out_channels is {short(widths)}, which is no list of numbers")
    widths = [_whole({"block_out_channels": width}, "block_out_channels", origin) for width in widths]
    if rows % 2 ** (len(widths) - 1):
        raise refuse(origin, f"images of {rows} rows can't be halved {len(widths) - 1} times")
    kind = "Skip" if given["time_embedding_type"] == "fourier" else ""
    attention = []
    for way, listed in (("Down", given["down_block_types"]), ("Up", given["up_block_types"])):
        plain, attending = f"{kind}{way}Block2D", f"Attn{kind}{way}Block2D"
        if (
            not isinstance(listed, list)
            or len(listed) != len(widths)
            or any(name not in (plain, attending) for name in listed)
        ):
            raise refuse(origin, f"{way.lower()}_block_types are not {len(widths)} of {plain} and {attending}")
        ordered = listed if way == "Down" else listed[::-1]
        attention.append([rows // 2**level for level, name in enumerate(ordered) if name == attending])
    network: Node = {
        "width": widths[0],
        "multipliers": [width // widths[0] if width % widths[0] == 0 else width / widths[0] for width in widths],
        "blocks": blocks,
        "attention": attention[0],
        "dropout": _number(given, "dropout", origin),
    }
    return network if attention[0] == attention[1] else {**network, "attention_up": attention[1]}


def _ncsnpp(given: Mapping[str, Any], origin: str) -> Node:
    """Arguments of NCSN++."""
    widths, down, up = given["block_out_channels"], given["down_block_types"], given["up_block_types"]
    if widths[0] < 128 or any(width % widths[0] for width in widths):
        raise refuse(origin, f"block_out_channels {widths[:8]} are no multiples of the first, or it is below 128")
    if [name.startswith("Attn") for name in down] != [name.startswith("Attn") for name in up[::-1]]:
        raise refuse(origin, "its blocks do not attend at the same resolutions down and up")
    return {"name": "ncsnpp", "encoder": "skip", "decoder": "skip"}


def _ddpm(given: Mapping[str, Any], origin: str) -> Node:
    """Arguments of DDPM's U-Net that differ from those of the published networks."""
    film = given["resnet_time_scale_shift"] == "scale_shift"
    network: Node = {"name": "ddpm", "groups": _whole(given, "norm_num_groups", origin)}
    own: Node = {
        "eps": _number(given, "norm_eps", origin),
        "film": film,
        "symmetric": bool(given["downsample_padding"]),
        "cosines_first": given["flip_sin_to_cos"],
        "shift": int(given["freq_shift"]),
        "middle_attention": given["add_attention"],
        "head_width": None,
        "middle_groups": 0 if film else None,
    }
    for key, name in (("head_width", "attention_head_dim"), ("middle_groups", "attn_norm_num_groups")):
        if given[name] is not None:
            own[key] = _whole(given, name, origin)
    published: Node = {"eps": 1e-6, "film": False, "symmetric": False, "cosines_first": False, "shift": 1}
    published |= {"middle_attention": True, "head_width": None, "middle_groups": None}
    return network | {key: value for key, value in own.items() if value != published[key]}


# Schedulers


_LEVELS = {"DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "DDIMInverse", "PNDM", "DPMSolverMultistep"}
_LEVELS |= {"DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep", "EulerDiscrete", "EulerAncestralDiscrete"}
_LEVELS |= {"HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "LMSDiscrete", "RePaint"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x_0"}
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


def _check_class(scheduler: Mapping[str, Any], known: set[str], origin: str) -> None:
    """Check that a scheduler is of a known class, whose keys have the same meaning."""
    name = scheduler.get("_class_name")
    if name is not None and (not isinstance(name, str) or name.removesuffix("Scheduler") not in known):
        raise refuse(origin, f"its scheduler is {short(name)}, which is none for this network")


def read_ve(scheduler: Mapping[str, Any], unit: float, given: Any, origin: str) -> tuple[Node, Node]:
    """Create denoiser and process of the VE SDE.

    Args:
        scheduler: Configuration of the scheduler.
        unit: Width of [-1, 1] relative to the range of the data.
        given: Highest level, if given by the user.
        origin: Name of the file, for messages.

    Raises:
        UsageError: The scheduler is of another process, or does not determine the levels.
    """
    _check_class(scheduler, {"ScoreSdeVe"}, origin)
    high = stated_sigma_max(scheduler) if given is None else given
    low = scheduler.get("sigma_min", 0.01)
    if high is None:
        raise refuse(
            origin, "its scheduler has diffusers' default sigma_max or none, which says nothing: give sigma_max="
        )
    if not all(type(level) in (int, float) for level in (low, high)) or not 0 < low < high < 1e5:
        raise refuse(origin, "its scheduler's sigma_min and sigma_max are no range of noise levels")
    low, high = unit * low, unit * high
    denoiser = {"name": "ve", "unit": unit, "ratio_min": low, "ratio_max": high}
    return denoiser, {"name": "ve", "sigma_min": low, "sigma_max": high}


def stated_sigma_max(scheduler: Mapping[str, Any]) -> Any:
    """Return the highest level in a scheduler's configuration; None for diffusers' default, which says nothing."""
    found = scheduler.get("sigma_max")
    return None if found == 1348.0 else found


def read_levels(scheduler: Mapping[str, Any], origin: str) -> Node:
    """Create the denoiser of DDPM's discrete levels.

    Raises:
        UsageError: The scheduler is of another process, or has unsupported levels or outputs.
    """
    if not scheduler:
        raise refuse(origin, "it has no scheduler_config.json with the betas")
    _check_class(scheduler, _LEVELS, origin)
    keys = {"prediction_type": "epsilon", "beta_schedule": "linear", "variance_type": "fixed_small"}
    prediction, schedule, variance = (scheduler.get(key, default) for key, default in keys.items())
    if not isinstance(prediction, str) or prediction not in PREDICTIONS or schedule not in SCHEDULES:
        raise refuse(origin, f"its scheduler has {short(prediction)} on {short(schedule)} betas")
    if str(variance).startswith("learned") or scheduler.get("trained_betas") or scheduler.get("rescale_betas_zero_snr"):
        raise refuse(origin, "its scheduler has a learned variance, betas of its own, or rescaled ones")
    numbers = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
    steps, start, end = (scheduler.get(key, default) for key, default in numbers.items())
    betas = all(type(beta) in (int, float) for beta in (start, end))
    if type(steps) is not int or not 2 <= steps <= 100_000 or not betas:
        raise refuse(origin, "its scheduler's num_train_timesteps or betas are no numbers")
    if not 0 < start < end < 1:
        raise refuse(origin, "its scheduler's betas do not rise within 0 and 1")
    levels = {"steps": steps, "beta_start": start, "beta_end": end, "schedule": schedule}
    return {"name": "discrete_vp", **levels, "predicts": PREDICTIONS[prediction]}
