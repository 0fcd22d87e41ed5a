"""Folders in diffusers format: pipelines, outputs of the training script, or folders of a network.

Two layouts of UNet2DModel are supported: the skip / skip NCSN++ (``fourier``) and DDPM's U-Net (``positional``), with
the options of diffusers' tutorials and training script. AutoencoderKL is read as the auto-encoder of latents. The
package diffusers is not required.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffaccel.nn import NCSNpp
from diffaccel.pretrained import diffusers_autoencoder
from diffaccel.pretrained.checkpoint import (
    assemble,
    build_on_meta,
    check_names,
    foreign,
    refuse_unused,
    replaced,
    unwrap,
)
from diffaccel.pretrained.diffusers_config import AVERAGE, read_config, read_levels, read_ve, stated_sigma_max
from diffaccel.pretrained.diffusers_names import aliases, names_of_ddpm, names_of_ncsnpp, shape_in
from diffaccel.weights import FORMATS, File, Format, Weights
from diffaccel.weights.pickles import open_file, refuse
from diffaccel.weights.torchfile import Stored, read_torch

MAX_JSON = 10_000_000
"""Maximum size of a configuration or index, in bytes."""
WEIGHTS = "diffusion_pytorch_model"
SCHEDULER = "scheduler_config.json"
NETWORKS = {"ema": "unet_ema", "raw": "unet"}
"""Weights -> folder in the output of the training script."""


class Parts(NamedTuple):
    """Parts of a checkpoint.

    Attributes:
        network: Folder of configuration and weights.
        config: Configuration of the network.
        weights: ``ema``, ``raw``, or ``file's`` if there is no choice.
        scheduler: Configuration of the scheduler, if there is one.
        files: Files of the weights.
    """

    network: Path
    config: dict[str, Any]
    weights: str
    scheduler: Path | None
    files: list[Path]


def find_parts(path: Path, weights: str | None = None) -> Parts:
    """Find network, scheduler and weights of a folder.

    Args:
        path: Folder of a pipeline, of a checkpoint in it, or of a network; averaged weights are preferred.
        weights: ``ema`` or ``raw``, if the folder has both.

    Raises:
        UsageError: The folder contains no network, or not the requested weights.
    """
    there = {kind: path / name for kind, name in NETWORKS.items() if (path / name / "config.json").is_file()}
    if (path / "config.json").is_file():
        network, chosen = path, "file's"
    elif not there:
        within = sorted(folder.name for folder in path.glob("checkpoint-*") if folder.is_dir())
        hint = f"give one of {', '.join(within[-5:])} in it" if within else "give a folder of diffusers' UNet2DModel"
        raise refuse(str(path), f"it holds no config.json, unet or unet_ema: {hint}")
    elif len(there) == 1:
        ((chosen, network),) = there.items()
        chosen = "file's"  # a pipeline's unet may be averaged as well
    else:
        chosen = weights or "ema"
        network = there[chosen]
    config = _read_json(network / "config.json")
    if AVERAGE & config.keys():
        chosen = "ema"
    main, files = _choose(network, weights if chosen == "file's" else None)
    chosen = main or chosen
    if weights not in (None, chosen):
        raise refuse(str(path), f"it holds one set of weights and doesn't say that it is {weights}: leave weights= out")
    folders = [network, network.parent / "scheduler", network.parent.parent / "scheduler", path, path / "scheduler"]
    scheduler = next((folder / SCHEDULER for folder in folders if (folder / SCHEDULER).is_file()), None)
    return Parts(network, config, chosen, scheduler, files)


def _choose(folder: Path, weights: str | None) -> tuple[str | None, list[Path]]:
    """Choose the files of a network, with safetensors preferred to .bin, and the main files to a variant.

    Returns:
        ``ema`` or ``raw``, None if the names of the files do not determine it, and the files.
    """
    found: dict[str, dict[str, Path]] = {}  # variant -> suffix -> file or index
    for file in sorted(folder.glob(f"{WEIGHTS}*")):
        if (match := _NAME.fullmatch(file.name)) and file.is_file():
            variant = match["variant"] or match["of_index"] or ""
            found.setdefault(variant, {}).setdefault(match["suffix"], file)
    if weights == "raw" and "non_ema" in found and "" in found:
        variant = "non_ema"
    elif "" in found:
        variant = ""
    elif len(found) == 1:
        (variant,) = found
    elif found:
        raise refuse(str(folder), f"it holds the variants {', '.join(found)} and no {WEIGHTS}.safetensors: keep one")
    else:
        raise refuse(str(folder), f"it holds no {WEIGHTS}.safetensors or .bin, no variant and no index of them")
    both = "" in found and "non_ema" in found
    known = {"non_ema": "raw", "ema": "ema"}.get(variant) or ("ema" if both else None)
    files = found[variant]
    return known, _shards(files.get("safetensors") or files["bin"])


_NAME = re.compile(
    rf"{WEIGHTS}(\.(?P<variant>\w+))?\.(?P<suffix>safetensors|bin)(\.index(\.(?P<of_index>\w+))?\.json)?"
)
"""Name of weights or of their index, with or without a variant."""


def _shards(file: Path) -> list[Path]:
    """Files of an index, or the file itself."""
    if file.suffix != ".json":
        return [file]
    names = _read_json(file).get("weight_map")
    files = set(names.values()) if isinstance(names, dict) and all(isinstance(n, str) for n in names.values()) else ()
    if not files or any(Path(name).name != name or not name.endswith((".safetensors", ".bin")) for name in files):
        raise refuse(str(file), "it names no files of its own folder")
    return [file.parent / name for name in sorted(files)]


@FORMATS.register("diffusers")
class Diffusers(Format):
    """Folders of diffusers."""

    def recognises(self, file: File) -> bool:
        """See :class:`Format`; recognises any folder, and weights in a folder of diffusers."""
        of_one = file.path.name.startswith(WEIGHTS) and (file.path.parent / "config.json").is_file()
        return file.path.is_dir() or of_one

    def open(self, file: File, options: Mapping[str, Any]) -> Weights:
        """Read the configurations, and the names and shapes of the weights.

        Args:
            file: Folder.
            options: ``weights`` (``ema`` or ``raw``) if a folder has both; ``size`` of the images in pixels;
                ``sigma_max`` of a network for the VE SDE, in units of its data.

        Raises:
            UsageError: A file is missing, damaged or contains code, the layout is not supported, or an option is given
                that the weights do not have.
        """
        path, origin = file.path, str(file.path)
        if not path.is_dir():
            raise refuse(origin, f"it is part of a folder of diffusers: give the folder, {path.parent}")
        parts = find_parts(path, options.get("weights"))
        if diffusers_autoencoder.is_autoencoder(parts.config):
            refuse_unused(origin, options, "weights")
            found = read_weights(parts.files)
            return diffusers_autoencoder.open_autoencoder(path, parts.config, found, _identity(parts))
        scheduler = {} if parts.scheduler is None else _read_json(parts.scheduler)
        network, shape = read_config(parts.config, options.get("size"), origin)
        found = aliases(unwrap(origin, read_weights(parts.files)))
        on_meta = build_on_meta(origin, network, shape, len(found))
        fourier, units = isinstance(on_meta, NCSNpp), "[-1, 1], as in the file"
        entries = names_of_ncsnpp(on_meta) if fourier else names_of_ddpm(on_meta)
        check_names(origin, {entry.name: shape_in(found, entry) for entry in entries}, found)
        if fourier:
            centred = bool(parts.config.get("center_input_sample", False))
            denoiser, process = read_ve(scheduler, 2.0 if centred else 1.0, options.get("sigma_max"), origin)
            units = "[0, 1] in the file: noise levels doubled, once" if centred else units
        else:
            denoiser, process = read_levels(scheduler, origin), {"name": "edm", "sigma_max": 1e3}
        refuse_unused(origin, options, "weights", "size", *(["sigma_max"] if fourier else []))
        stated = {"size": parts.config.get("sample_size"), "sigma_max": stated_sigma_max(scheduler)}
        source = {"format": "diffusers", "weights": parts.weights, "units": units, **replaced(stated, options)}
        nodes = {"network": network, "denoiser": denoiser, "process": process}
        files = _identity(parts)
        return foreign(path, shape, nodes, source, lambda: assemble(origin, entries, found, on_meta), files)


def identity_files(path: Path, weights: str | None = None) -> tuple[Path, ...]:
    """Return the files of a folder's checkpoint; for ``weights`` see :func:`find_parts`."""
    return _identity(find_parts(path, weights))


def _identity(parts: Parts) -> tuple[Path, ...]:
    return *parts.files, parts.network / "config.json", *([parts.scheduler] if parts.scheduler else [])


def read_weights(files: list[Path]) -> dict[str, Stored]:
    """Read the names and tensors of all files."""
    found: dict[str, Stored] = {}
    for file in files:
        new = _of_bin(file) if file.suffix == ".bin" else _of_safetensors(file)
        if twice := found.keys() & new.keys():
            raise refuse(str(file), f"it holds {min(twice)[:60]!r}, as another file does")
        found |= new
    return found


def _of_bin(file: Path) -> dict[str, Stored]:
    content = read_torch(file)
    if not isinstance(content, dict) or not all(isinstance(value, Stored) for value in content.values()):
        raise refuse(str(file), "it is no mapping of names to tensors")
    return {str(name): value for name, value in content.items()}


def _of_safetensors(file: Path) -> dict[str, Stored]:
    def stored(tensor: Tensor) -> Stored:
        return Stored(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    open_file(file).close()
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: stored(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise refuse(str(file), f"it is truncated or no safetensors file ({error})") from None


def _read_json(file: Path) -> dict[str, Any]:
    with open_file(file, text=True) as opened:
        data = opened.read(MAX_JSON + 1)
    if len(data) > MAX_JSON:
        raise refuse(str(file), f"it has more than {MAX_JSON} bytes")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise refuse(str(file), f"it is no JSON ({str(error)[:60]})") from None
    if not isinstance(content, dict):
        raise refuse(str(file), "it holds no mapping of keys to values")
    return content
