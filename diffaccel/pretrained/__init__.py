"""Checkpoints of other codebases, and of diffaccel, as denoisers for data in [-1, 1]. Code in a file is never run.

| format | content | read by |
|---|---|---|
| score_sde_pytorch | a file of torch.save | :mod:`~diffaccel.pretrained.score_sde` |
| EDM | a pickle | :mod:`~diffaccel.pretrained.edm` |
| diffusers | a folder | :mod:`~diffaccel.pretrained.diffusers` |
| diffaccel | safetensors, a file of torch.save | :mod:`diffaccel.weights.formats` |
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import UsageError, suggest
from diffaccel.pretrained import denoisers, edm, score_sde  # noqa: F401 (registers them)
from diffaccel.pretrained.checkpoint import Pretrained
from diffaccel.pretrained.diffusers import identity_files
from diffaccel.storage import check_target
from diffaccel.text.escape import printable
from diffaccel.weights import Weights, hash_files, open_weights, save_weights

__all__ = ["OPTIONS", "Pretrained", "convert", "describe", "files_sha256", "inspect", "read"]

OPTIONS = {"weights": str, "size": int, "sigma_max": float}
"""Information that a file may lack -> type: ``ema`` or ``raw`` weights, the size of the images in pixels, and the
highest noise level of a VE network in units of its data."""


def read(path: Path | str, **options: Any) -> Pretrained:
    """Read a denoiser's checkpoint.

    Args:
        path: File, or folder in diffusers format.
        options: See ``OPTIONS``.

    Raises:
        UsageError: The file is missing, damaged, contains code, is of another kind, or has an unsupported layout.
    """
    return Pretrained.of(_open(Path(path), options))


def _open(path: Path, options: Mapping[str, Any]) -> Weights:
    for key, value in options.items():
        if key not in OPTIONS or (key == "weights" and value not in ("ema", "raw")):
            raise UsageError(f"{key}={value}: give weights=ema or raw, size= or sigma_max={suggest(key, OPTIONS)}")
    if not path.exists():
        raise UsageError(f"{path} does not exist: give a checkpoint's file, or a folder of diffusers")
    return open_weights(path, **options)


def files_sha256(path: Path, weights: str | None = None) -> str:
    """Compute the SHA-256 of a file, or of a folder's configurations and weights (``ema``, ``raw`` or default)."""
    return hash_files(path) if path.is_file() else hash_files(path, identity_files(path, weights))


def convert(source: Path, target: Path, **options: Any) -> Pretrained:
    """Convert a denoiser's checkpoint to diffaccel's safetensors format, in float32.

    Raises:
        UsageError: See :func:`read`; or the target's name does not end in ``.safetensors``.
    """
    if target.suffix != ".safetensors":
        raise UsageError(f"{target}: the name of a converted checkpoint must end in .safetensors")
    check_target(target)
    found = Pretrained.of(_open(source, options))
    save_weights(target, found.tensors, found.description, torch.float32)
    return found


def inspect(path: Path | str, **options: Any) -> str:
    """Describe a weights file of any kind in a few lines.

    Raises:
        UsageError: See :func:`read`, except for the kind.
    """
    weights = _open(Path(path), options)
    if weights.kind == "denoiser":
        return describe(Pretrained.of(weights))
    rows = {"from": weights.format} if weights.kind else {"from": f"{weights.format}, without a header of ours"}
    if weights.parts:
        rows["averaged"] = ", ".join(weights.parts)
    return _table({"kind": weights.kind or "unknown", **rows, **_rows(weights.header, weights.read())})


def describe(found: Pretrained) -> str:
    """Describe a denoiser's checkpoint in a few lines."""
    source = _part({"name": found.source.get("format", "diffaccel"), **found.source})
    return _table({"kind": "denoiser", "from": source, **_rows(found.description, found.tensors)})


def _rows(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Rows for the keys of a header."""
    rows = {}
    if shape := header.get("shape"):
        rows["images"] = f"{tuple(shape)}, in units of [-1, 1]"
    for key in ("network", "denoiser", "process", "prior", "posterior"):
        if header.get(key):
            rows[key] = _part(header[key])
    for key in ("density", "name", "channels", "dim", "widths", "blocks", "classes", "data", "experiment",
                "images_seen", "trained_ratios", "accuracy", "stands_on", "version"):  # fmt: skip
        if header.get(key) not in (None, 0, ""):
            rows[key] = str(header[key])
    if header.get("extractor"):
        rows["extractor"] = str(header["extractor"])
    count = sum(tensor.numel() for tensor in tensors.values())
    return {**rows, "tensors": f"{len(tensors)}, {count:,} numbers"}


def _part(node: Mapping[str, Any]) -> str:
    return ", ".join([str(node["name"]), *(f"{key} {value}" for key, value in node.items() if key != "name")])


def _table(rows: Mapping[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{key:{width}} {printable(value)}" for key, value in rows.items())
