"""Checkpoints of other programs, and our own, as denoisers in units of [-1, 1]; no code of theirs is ever run.

| format | file | read by |
|---|---|---|
| score_sde_pytorch | ``.pth``, ``.pt`` | :mod:`~diffaccel.pretrained.score_sde` |
| EDM | ``.pkl`` | :mod:`~diffaccel.pretrained.edm` |
| diffusers | a folder | :mod:`~diffaccel.pretrained.diffusers` |
| ours | ``.safetensors`` | :func:`read_own` |
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffaccel.errors import UsageError, suggest
from diffaccel.pretrained import denoisers  # noqa: F401 (registers them)
from diffaccel.pretrained.checkpoint import Pretrained, build_on_meta, check_names, unwrap
from diffaccel.pretrained.diffusers import WEIGHTS, identity_files, read_diffusers
from diffaccel.pretrained.edm import read_edm
from diffaccel.pretrained.score_sde import read_score_sde
from diffaccel.storage import check_target
from diffaccel.text.escape import printable
from diffaccel.weights import file_sha256, read_description, read_weights, save_weights
from diffaccel.weights.pickles import open_file, refuse
from diffaccel.weights.torchfile import Stored

__all__ = [
    "FOREIGN",
    "OPTIONS",
    "Pretrained",
    "convert",
    "describe",
    "files_sha256",
    "is_pretrained",
    "read",
    "read_own",
]

FOREIGN = {".pth": read_score_sde, ".pt": read_score_sde, ".pkl": read_edm}
"""Suffix -> reader of other programs' files."""

OPTIONS = {"weights": str, "size": int, "sigma_max": float}
"""What a reader may be told that its file doesn't say: ``ema`` or ``raw`` weights, the images' size in pixels, the
largest noise level of a VE network in units of its own data."""


def read(path: Path | str, **options: Any) -> Pretrained:
    """Read a checkpoint.

    Args:
        path: A file, or a folder of diffusers.
        options: See ``OPTIONS``.

    Raises:
        UsageError: The file is missing, damaged, hostile, or of a layout that is not built here; the message says
            which, and why.
    """
    path = Path(path)
    for key, value in options.items():
        if key not in OPTIONS or (key == "weights" and value not in ("ema", "raw")):
            raise UsageError(f"{key}={value}: give weights=ema or raw, size= or sigma_max={suggest(key, OPTIONS)}")
    if not path.exists():
        raise UsageError(f"{path} does not exist: give a checkpoint's file, or a folder of diffusers")
    reader = (
        read_diffusers if path.is_dir() else read_own if path.suffix == ".safetensors" else FOREIGN.get(path.suffix)
    )
    if reader is None:
        raise refuse(
            str(path), f"its name ends in none of {', '.join([*FOREIGN, '.safetensors'])}, and it is no folder"
        )
    if path.is_file() and path.name.startswith(WEIGHTS) and (path.parent / "config.json").is_file():
        raise refuse(str(path), f"it is part of a folder of diffusers: give the folder, {path.parent}")
    found = reader(path, options)
    if reader is not read_own:
        found.source["sha256"] = files_sha256(path, options.get("weights"))
    return found


def files_sha256(path: Path, weights: str | None = None) -> str:
    """Hash a file; of a folder, the weights, its default ones or those asked for, and the configurations."""
    if path.is_file():
        return file_sha256(path)
    return hashlib.sha256("".join(file_sha256(file) for file in identity_files(path, weights)).encode()).hexdigest()


def is_pretrained(path: Path) -> bool:
    """Whether a checkpoint brings its own network and preconditioning: a foreign one, or one that was converted."""
    if path.suffix == ".safetensors" and path.is_file():
        return "source" in read_description(path)
    return path.is_dir() or path.suffix in FOREIGN


def read_own(path: Path, options: Mapping[str, Any]) -> Pretrained:
    """Read our safetensors, whose header says what they hold.

    Raises:
        UsageError: The header says nothing, or the file is damaged or doesn't fit its header.
    """
    origin = str(path)
    if options:
        raise refuse(origin, f"it was converted with its options: leave {sorted(options)[0]}= out")
    open_file(path).close()
    tensors, said = read_weights(path)
    tensors = unwrap(origin, tensors)
    parts = [said.get(key) for key in ("network", "denoiser", "process")]
    shape = said.get("shape")
    if not all(isinstance(part, dict) for part in parts) or not isinstance(shape, list):
        raise refuse(origin, "its header does not say network, denoiser, process and shape")
    if len(shape) != 3 or not all(type(size) is int and size > 0 for size in shape):
        raise refuse(origin, "its header's shape is not [channels, height, width]")
    channels, rows, columns = shape
    size: tuple[int, int, int] = (channels, rows, columns)
    network, denoiser, process = (dict(part) for part in parts if part is not None)
    if "augmentations" in network:  # the key's name in files that earlier versions wrote
        network["augment"] = network.pop("augmentations")
    on_meta = build_on_meta(origin, network, size, len(tensors))
    expected = {name: tuple(tensor.shape) for name, tensor in on_meta.state_dict().items()}
    check_names(origin, expected, {n: Stored(t.dtype, tuple(t.shape), t.clone) for n, t in tensors.items()})
    return Pretrained(size, network, denoiser, process, tensors, dict(said.get("source", {"format": "diffaccel"})))


def convert(source: Path, target: Path, **options: Any) -> Pretrained:
    """Read a checkpoint and write it as our safetensors, in float32.

    Raises:
        UsageError: As :func:`read`, or the target's name doesn't end in ``.safetensors``.
    """
    if target.suffix != ".safetensors":
        raise UsageError(f"{target}: a converted checkpoint's name ends in .safetensors")
    check_target(target)
    found = read(source, **options)
    save_weights(target, found.tensors, found.description, torch.float32)
    return found


def describe(found: Pretrained) -> str:
    """Say in a few lines what a checkpoint holds."""

    def part(node: Mapping[str, Any]) -> str:
        return ", ".join([str(node["name"]), *(f"{key} {value}" for key, value in node.items() if key != "name")])

    count = sum(tensor.numel() for tensor in found.tensors.values())
    rows = {
        "from": part({"name": found.source.get("format", "diffaccel"), **found.source}),
        "images": f"{found.shape}, in units of [-1, 1]",
        "network": part(found.network),
        "tensors": f"{len(found.tensors)}, {count:,} numbers",
        "denoiser": part(found.denoiser),
        "process": part(found.process),
    }
    return "\n".join(f"{key:9} {printable(value)}" for key, value in rows.items())
