"""Reading and writing of safetensors files with a JSON description, with checks before tensors are used."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from diffaccel.errors import UsageError
from diffaccel.storage import write_whole
from diffaccel.text.mistaken import what_it_is


def file_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of the names and values of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def networks_sha256(groups: Iterable[Mapping[str, nn.Module]]) -> list[str]:
    """Return ``NAME=HASH`` of the weights of networks, which groups may share; equal ones are listed once."""
    networks = {id(network): (name, network) for group in groups for name, network in group.items()}
    hashes = (f"{name}={tensors_sha256(network.state_dict())[:16]}" for name, network in networks.values())
    return list(dict.fromkeys(hashes))


def save_weights(
    path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write tensors to a safetensors file atomically, with a description in its header.

    Args:
        path: File.
        tensors: Tensors by name.
        description: Description, see :mod:`~diffaccel.weights.header`.
        dtype: Data type of floating-point tensors in the file.

    Raises:
        UsageError: The file can't be written.
    """
    stored = {
        name: (tensor.detach().to("cpu", dtype) if tensor.is_floating_point() else tensor.detach().cpu()).contiguous()
        for name, tensor in tensors.items()
    }
    write_whole(path, serialize(stored, {"diffaccel": json.dumps(dict(description))}))


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file: float32 tensors and the description.

    Raises:
        UsageError: The file is missing, truncated, not a safetensors file, or contains values that are not finite.
    """
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        description = _description(file.metadata())
    check_finite(tensors, f"weights {path}", "get or train the file anew")
    return {n: tensor.float() if tensor.is_floating_point() else tensor for n, tensor in tensors.items()}, description


def read_header(path: Path) -> dict[str, Any]:
    """Read only the description; empty if the file has no description.

    Raises:
        UsageError: The file is missing, truncated, or not a safetensors file.
    """
    with _opened(path) as file:
        return _description(file.metadata())


def count_parameters(path: Path) -> int:
    """Count the real numbers in a safetensors file without reading them.

    Raises:
        UsageError: See :func:`read_header`.
    """
    with _opened(path) as file:
        tensors = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 (not a dict)
        return sum(math.prod(one.get_shape()) for one in tensors if "F" in one.get_dtype())


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file, and convert errors of its reader."""
    if not path.is_file():
        raise UsageError(f"weights {path} do not exist: train them with `diffaccel fit`, or give another file")
    try:
        if found := what_it_is(path):
            raise UsageError(f"weights {path} are not read: the file is {found}")
        with safe_open(path, framework="pt") as file:
            yield file
    except UsageError:  # a ValueError, too
        raise
    except OSError as error:
        raise UsageError(f"weights {path} can't be read: {error.strerror or error}") from None
    except (SafetensorError, ValueError, RecursionError) as error:  # the last two: JSON that is none, or no mapping
        raise UsageError(f"weights {path} are truncated or no safetensors file ({error}): get the file anew") from None


def check_finite(tensors: Mapping[str, Tensor], origin: str, remedy: str) -> None:
    """Check that weights are finite.

    Args:
        tensors: Tensors by name.
        origin: Name of the file, for the message.
        remedy: Remedy, for the message.

    Raises:
        UsageError: A tensor contains NaN or infinity; the message contains its name.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UsageError(f"{origin}: tensor {name!r} contains NaN or infinity: {remedy}")


def read_description(path: Path) -> dict[str, Any]:
    """Read only the description; empty if there is none or the file is not a readable safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return _description(file.metadata())
    except (SafetensorError, OSError, ValueError, RecursionError):  # the last two: JSON that is none, or no mapping
        return {}


def _description(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    content = json.loads((metadata or {}).get("diffaccel", "{}"))
    if not isinstance(content, dict):
        raise ValueError("its header is not a mapping")
    return content


def load_weights(path: Path, module: nn.Module) -> dict[str, Any]:
    """Load a safetensors file into a module and return the file's description.

    Raises:
        UsageError: See :func:`read_weights`; or names or shapes differ from those of the module.
    """
    tensors, description = read_weights(path)
    assign_weights(tensors, module, f"weights {path}")
    return description


def assign_weights(tensors: Mapping[str, Tensor], module: nn.Module, origin: str) -> None:
    """Copy named tensors to a module with the same names and shapes.

    Raises:
        UsageError: Names or shapes differ; the message contains the first differences.
    """
    own = module.state_dict()
    missing, surplus = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or surplus:
        raise UsageError(
            f"{origin} do not fit the network: missing {missing[:3]}, surplus {surplus[:3]}"
            f" ({len(missing)} and {len(surplus)} in all): does the experiment's network match the file?"
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise UsageError(
                f"{origin}: {name!r} has shape {tuple(tensor.shape)}, the network's is {tuple(own[name].shape)}:"
                " does the experiment's network match the file?"
            )
    # Not strict, because a module may omit a frozen network from its state.
    module.load_state_dict(dict(tensors), strict=False)
