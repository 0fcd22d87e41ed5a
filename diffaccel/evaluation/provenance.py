"""Provenance of a point: versions, commit, device."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from diffaccel.version import __version__


def identity_hash(identity: Mapping[str, Any]) -> str:
    """Hash everything that determines a point or a set of images, to 16 hexadecimal characters."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a point depends on."""
    # Ours is that of the code which runs: an editable installation keeps the version that it was installed with.
    found = {"python": platform.python_version(), "diffaccel": __version__}
    for package in ("torch", "lightning", "torchmetrics", "torch-fidelity"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_commit(file: Path = Path(__file__)) -> str | None:
    """Return the commit of the running checkout, with ``+`` if it has changes; None outside a checkout.

    Args:
        file: Source file of the package. A package that is installed inside another project's repository is not
            tracked there, and the commit of that repository says nothing of the package.
    """
    git = ["git", "-C", str(file.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", file.name], capture_output=True, check=True)
        described = [*git, "describe", "--always", "--dirty=+", "--abbrev=12"]
        return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(device: torch.device) -> str:
    """Return the name of the accelerator, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
