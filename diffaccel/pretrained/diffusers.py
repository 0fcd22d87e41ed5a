"""Folders of diffusers: a pipeline, or its ``unet`` alone; configuration and tensors are read here, without diffusers.

Two of UNet2DModel's layouts are networks that are built here: the skip / skip NCSN++ (``fourier``) and DDPM's
(``positional``). Every key of a configuration has the value that the layout asks for, or the folder is refused.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffaccel.pretrained.checkpoint import Pretrained, assemble, build_on_meta, check_names
from diffaccel.pretrained.diffusers_names import aliases, names_of_ddpm, names_of_ncsnpp, shape_in
from diffaccel.pretrained.pickles import refuse
from diffaccel.pretrained.torchfile import Stored, read_torch

MAX_JSON = 10_000_000
"""Largest configuration or index, in bytes."""
WEIGHTS = "diffusion_pytorch_model"

_ANY = object()
_COMMON: dict[str, tuple[Any, Any]] = {  # key -> (diffusers' default, what the layouts ask for)
    "_class_name": (None, "UNet2DModel"),
    "act_fn": ("silu", "silu"),
    "add_attention": (True, True),
    "attn_norm_num_groups": (None, None),
    "class_embed_type": (None, None),
    "dropout": (0.0, _ANY),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "norm_eps": (1e-5, 1e-6),
    "num_class_embeds": (None, None),
    "num_train_timesteps": (None, _ANY),
    "resnet_time_scale_shift": ("default", "default"),
    "attention_head_dim": (8, None),
    "time_embedding_dim": (None, None),
}
LAYOUTS: dict[str, dict[str, tuple[Any, Any]]] = {
    "fourier": {
        **_COMMON,
        "center_input_sample": (False, _ANY),
        "downsample_padding": (1, _ANY),
        "downsample_type": ("conv", _ANY),
        "flip_sin_to_cos": (True, _ANY),
        "freq_shift": (0, _ANY),
        "mid_block_scale_factor": (1, math.sqrt(2)),
        "norm_num_groups": (32, None),
        "upsample_type": ("conv", _ANY),
    },
    "positional": {
        **_COMMON,
        "center_input_sample": (False, False),
        "downsample_padding": (1, 0),
        "downsample_type": ("conv", "conv"),
        "flip_sin_to_cos": (True, False),
        "freq_shift": (0, 1),
        "mid_block_scale_factor": (1, 1),
        "norm_num_groups": (32, _ANY),
        "upsample_type": ("conv", "conv"),
    },
}
_SIZES = {
    "sample_size",
    "in_channels",
    "out_channels",
    "layers_per_block",
    "block_out_channels",
    "down_block_types",
    "up_block_types",
    "time_embedding_type",
}


def read_diffusers(path: Path, options: Mapping[str, Any]) -> Pretrained:
    """Read a folder of diffusers.

    Args:
        path: The folder.
        options: ``sigma_max`` of a network of the VE SDE, in units of its data; ``weights`` is not to be chosen.

    Raises:
        UsageError: A file is missing, damaged or hostile, or the layout is none of the two.
    """
    origin = str(path)
    if "weights" in options:
        raise refuse(origin, "a folder holds one set of weights: leave weights= out")
    folder = path / "unet" if (path / "unet").is_dir() else path
    config = _read_json(folder / "config.json")
    scheduler_file = next((f for f in (path / "scheduler", path) if (f / "scheduler_config.json").is_file()), None)
    scheduler = {} if scheduler_file is None else _read_json(scheduler_file / "scheduler_config.json")
    layout = _check_config(config, origin)
    network, shape = _network(config, layout, origin)
    found = aliases(read_folder_weights(folder))
    on_meta = build_on_meta(origin, network, shape, len(found))
    entries = names_of_ncsnpp(on_meta) if layout == "fourier" else names_of_ddpm(on_meta)
    check_names(origin, {entry.name: shape_in(found, entry) for entry in entries}, found)
    tensors = assemble(origin, entries, found, on_meta)
    if layout == "fourier":
        centred = bool(config.get("center_input_sample", False))
        denoiser, process = _ve(scheduler, 2.0 if centred else 1.0, options.get("sigma_max"), origin)
        units = "[0, 1] in the file: noise levels doubled, once" if centred else "[-1, 1], as in the file"
    else:
        denoiser, process, units = (
            _discrete(scheduler, origin),
            {"name": "edm", "sigma_max": 1e3},
            "[-1, 1], as in the file",
        )
    return Pretrained(
        shape, network, denoiser, process, tensors, {"format": "diffusers", "weights": "file's", "units": units}
    )


def weights_files(folder: Path) -> list[Path]:
    """Files of a folder's weights, all in safetensors if there are such.

    Raises:
        UsageError: There are none, or an index names files elsewhere.
    """
    if (folder / "unet").is_dir():
        folder = folder / "unet"
    for variant in ("", ".fp16"):
        single, index = (folder / f"{WEIGHTS}{variant}.safetensors{end}" for end in ("", ".index.json"))
        if single.is_file():
            return [single]
        if index.is_file():
            names = _read_json(index).get("weight_map")
            files = set(names.values()) if isinstance(names, dict) else set()
            if not files or not all(isinstance(name, str) and Path(name).name == name for name in files):
                raise refuse(str(index), "it names no files of its own folder")
            return [folder / name for name in sorted(files)]
    if (folder / f"{WEIGHTS}.bin").is_file():
        return [folder / f"{WEIGHTS}.bin"]
    raise refuse(str(folder), f"it holds no {WEIGHTS}.safetensors, no .fp16 variant, no index, and no .bin")


def read_folder_weights(folder: Path) -> dict[str, Stored]:
    """Name -> tensor, of all of a folder's files."""
    found: dict[str, Stored] = {}
    for file in weights_files(folder):
        found |= _of_bin(file) if file.suffix == ".bin" else _of_safetensors(file)
    return found


def _of_bin(file: Path) -> dict[str, Stored]:
    content = read_torch(file)
    if not isinstance(content, dict) or not all(isinstance(value, Stored) for value in content.values()):
        raise refuse(str(file), "it is no mapping of names to tensors")
    return {str(name): value for name, value in content.items()}


def _of_safetensors(file: Path) -> dict[str, Stored]:
    def stored(tensor: Tensor) -> Stored:
        return Stored(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    try:
        with safe_open(file, framework="pt") as opened:
            return {name: stored(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise refuse(str(file), f"it is missing, truncated or no safetensors file ({error})") from None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise refuse(str(file.parent), f"it holds no {file.name}: give a folder of diffusers with a UNet2DModel")
    if file.stat().st_size > MAX_JSON:
        raise refuse(str(file), f"it has more than {MAX_JSON} bytes")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise refuse(str(file), f"it is no JSON ({str(error)[:60]})") from None
    if not isinstance(content, dict):
        raise refuse(str(file), "it holds no mapping of keys to values")
    return content


# Configuration


def _check_config(config: Mapping[str, Any], origin: str) -> str:
    """Compare each key with what its layout asks for; returns the layout.

    Raises:
        UsageError: A key has another value, or is not known.
    """
    layout = config.get("time_embedding_type", "positional")
    if config.get("_class_name") != "UNet2DModel" or layout not in ("fourier", "positional"):
        raise refuse(origin, f"its class is {str(config.get('_class_name'))[:40]!r}, readable is a current UNet2DModel")
    asked = LAYOUTS[layout]
    for key in config:
        if key not in asked and key not in _SIZES and not key.startswith("_"):
            raise refuse(origin, f"its configuration has a key {key[:40]!r} that is not known here")
    for key, (default, value) in asked.items():
        given = config.get(key, default)
        equal = given == value or (isinstance(value, float) and _near(given, value))
        if value is not _ANY and not equal:
            raise refuse(origin, f"{key} is {str(given)[:40]}, built here is {value} (for {layout} embedding)")
    return layout


def _near(given: Any, value: float) -> bool:
    return isinstance(given, int | float) and math.isclose(given, value, rel_tol=1e-4)


def _network(config: Mapping[str, Any], layout: str, origin: str) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """Our network's arguments and the image shape."""
    widths, blocks, size = (config.get(key) for key in ("block_out_channels", "layers_per_block", "sample_size"))
    channels, dropout = config.get("in_channels", 3), config.get("dropout", 0.0)
    integers = isinstance(widths, list) and [*widths, blocks, size, channels]
    if not integers or not all(type(n) is int and 0 < n < 10_000 for n in integers):
        raise refuse(origin, "block_out_channels, layers_per_block, sample_size or in_channels is missing or no number")
    assert isinstance(widths, list) and isinstance(size, int) and isinstance(channels, int)
    if config.get("out_channels", 3) != channels:
        raise refuse(origin, "out_channels differs from in_channels: a learned variance is not read")
    base = 128 if layout == "fourier" else 1
    if widths[0] < base or any(width % widths[0] for width in widths):
        raise refuse(origin, f"block_out_channels {widths[:8]} are no multiples of the first, or it is below {base}")
    names = ("SkipDownBlock2D", "SkipUpBlock2D") if layout == "fourier" else ("DownBlock2D", "UpBlock2D")
    down, up = config.get("down_block_types"), config.get("up_block_types")
    attends = [
        level for level in range(len(widths)) if isinstance(down, list) and f"Attn{names[0]}" in down[level : level + 1]
    ]
    expected = [[("Attn" if level in attends else "") + name for level in range(len(widths))] for name in names]
    if [down, up] != [expected[0], expected[1][::-1]]:
        raise refuse(origin, f"its blocks are not {names[0]}, {names[1]} with Attn before some, the same down and up")
    if size % 2 ** (len(widths) - 1):
        raise refuse(origin, f"sample_size {size} can't be halved {len(widths) - 1} times")
    network = {
        "name": "ncsnpp" if layout == "fourier" else "ddpm",
        "width": widths[0],
        "multipliers": [width // widths[0] for width in widths],
        "blocks": blocks,
        "attention": [size // 2**level for level in attends],
        "dropout": float(dropout),
    }
    own = (
        {"encoder": "skip", "decoder": "skip"} if layout == "fourier" else {"groups": config.get("norm_num_groups", 32)}
    )
    return {**network, **own}, (channels, size, size)


def _ve(scheduler: Mapping[str, Any], unit: float, given: Any, origin: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Denoiser and process of the VE SDE, for data whose range is 2 / ``unit`` wide."""
    high = given if given is not None else scheduler.get("sigma_max", 1348.0)
    low = scheduler.get("sigma_min", 0.01)
    if given is None and high == 1348.0:
        raise refuse(
            origin, "its scheduler has diffusers' default sigma_max or none, which says nothing: give sigma_max="
        )
    if not all(isinstance(level, int | float) for level in (low, high)) or not 0 < low < high < 1e5:
        raise refuse(origin, "its scheduler's sigma_min and sigma_max are no range of noise levels")
    low, high = unit * low, unit * high
    denoiser = {"name": "ve", "unit": unit, "ratio_min": low, "ratio_max": high}
    return denoiser, {"name": "ve", "sigma_min": low, "sigma_max": high}


def _discrete(scheduler: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Denoiser of DDPM's discrete levels."""
    if not scheduler:
        raise refuse(origin, "it has no scheduler_config.json, which tells the betas")
    predictions = {"epsilon": "eps", "v_prediction": "v"}
    keys = {"prediction_type": "epsilon", "beta_schedule": "linear", "variance_type": "fixed_small"}
    prediction, schedule, variance = (scheduler.get(key, default) for key, default in keys.items())
    if prediction not in predictions or schedule not in ("linear", "scaled_linear"):
        raise refuse(origin, f"its scheduler has {str(prediction)[:40]!r} on {str(schedule)[:40]!r} betas")
    if str(variance).startswith("learned") or scheduler.get("trained_betas") or scheduler.get("rescale_betas_zero_snr"):
        raise refuse(origin, "its scheduler has a learned variance, betas of its own, or rescaled ones")
    numbers = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
    steps, start, end = (scheduler.get(key, default) for key, default in numbers.items())
    if type(steps) is not int or not 2 <= steps <= 100_000 or not all(isinstance(b, int | float) for b in (start, end)):
        raise refuse(origin, "its scheduler's num_train_timesteps or betas are no numbers")
    if not 0 < start < end < 1:
        raise refuse(origin, "its scheduler's betas do not rise within 0 and 1")
    return {
        "name": "discrete_vp",
        "steps": steps,
        "beta_start": start,
        "beta_end": end,
        "schedule": schedule,
        "predicts": predictions[prediction],
    }
