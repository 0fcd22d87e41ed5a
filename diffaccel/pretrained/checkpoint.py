"""What a checkpoint comes to, whatever its format: tensors under our names, and the parts that they belong to."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffaccel.denoiser import DENOISERS, Denoiser
from diffaccel.errors import UsageError
from diffaccel.nn import NETWORKS
from diffaccel.process import PROCESSES
from diffaccel.weights import Weights, assign_weights, hash_files
from diffaccel.weights.pickles import refuse
from diffaccel.weights.torchfile import Stored


@dataclass(frozen=True)
class Pretrained:
    """A denoiser's checkpoint that was read, in units of [-1, 1].

    Attributes:
        shape: Image shape (C, H, W).
        network: Its network, as an experiment's ``network`` has it.
        denoiser: Its preconditioning, as ``denoiser`` has it.
        process: The process that it was trained on, as ``process`` has it; another one serves as well.
        tensors: The network's, by name, float32.
        source: Format, weights (``ema`` or ``raw``), what became of its units, SHA-256.
    """

    shape: tuple[int, int, int]
    network: dict[str, Any]
    denoiser: dict[str, Any]
    process: dict[str, Any]
    tensors: dict[str, Tensor]
    source: dict[str, Any]

    @property
    def description(self) -> dict[str, Any]:
        """All but the tensors: the header of a file that holds them."""
        return {
            "kind": "denoiser",
            "shape": list(self.shape),
            "classes": self.network.get("classes") or 0,
            "network": self.network,
            "denoiser": self.denoiser,
            "process": self.process,
            "source": self.source,
        }

    @classmethod
    def of(cls, weights: Weights) -> "Pretrained":
        """Read a denoiser's weights, whose header determines the network.

        Raises:
            UsageError: The weights are of another kind, damaged, or their header lacks a part or doesn't fit them.
        """
        weights = weights.of("denoiser")
        origin, header = str(weights.path), weights.header
        if missing := [key for key in ("network", "denoiser", "process", "shape") if not header.get(key)]:
            raise refuse(origin, f"its header does not say {', '.join(missing)}")
        network, denoiser, process = (dict(header[part]) for part in ("network", "denoiser", "process"))
        if "augmentations" in network:  # the key's name in files that earlier versions wrote
            network["augment"] = network.pop("augmentations")
        channels, height, width = header["shape"]
        shape: tuple[int, int, int] = (channels, height, width)
        tensors = unwrap(origin, weights.read())
        on_meta = build_on_meta(origin, network, shape, len(tensors))
        expected = {name: tuple(tensor.shape) for name, tensor in on_meta.state_dict().items()}
        check_names(origin, expected, {n: Stored(t.dtype, tuple(t.shape), t.clone) for n, t in tensors.items()})
        return cls(shape, network, denoiser, process, tensors, dict(header.get("source", {"format": "diffaccel"})))

    def build(self) -> Denoiser:
        """Build the denoiser with its weights, ready to sample."""
        network = NETWORKS.build(self.network, shape=self.shape)
        assign_weights(self.tensors, network, "its weights")
        denoiser = DENOISERS.build(self.denoiser, network=network, process=PROCESSES.build(self.process))
        return denoiser.requires_grad_(False).eval()


class Entry(NamedTuple):
    """A tensor of a file and where it goes.

    Attributes:
        name: In the file.
        shape: In the file.
        own: In our network.
        rows: Which rows of ``own`` it fills; None for all.
        transposed: Whether [in, out], to become a 1x1 convolution.
    """

    name: str
    shape: tuple[int, ...]
    own: str
    rows: slice | None = None
    transposed: bool = False


def foreign(
    path: Path,
    shape: tuple[int, int, int],
    parts: Mapping[str, Any],
    source: Mapping[str, Any],
    read: Callable[[], dict[str, Tensor]],
    files: tuple[Path, ...] = (),
) -> Weights:
    """Describe a denoiser of another program by a header of ours.

    Args:
        path: The file or folder.
        shape: Image shape (C, H, W).
        parts: Its ``network``, ``denoiser`` and ``process``.
        source: Provenance: at least its ``format``.
        read: Reads the tensors under our names.
        files: The files of a folder.
    """
    provenance = {**source, "sha256": hash_files(path, files)}
    header = {"kind": "denoiser", "shape": list(shape), "classes": parts["network"].get("classes") or 0, **parts}
    return Weights(path, str(source["format"]), "denoiser", {**header, "source": provenance}, read, files)


def assemble(origin: str, entries: list[Entry], found: Mapping[str, Stored], network: nn.Module) -> dict[str, Tensor]:
    """Read a file's tensors and bring them to our names and shapes."""
    tensors = load_finite(origin, {entry.name: found[entry.name] for entry in entries})
    made = {name: torch.empty(tensor.shape, device="cpu") for name, tensor in network.state_dict().items()}
    for entry in entries:
        rows = made[entry.own] if entry.rows is None else made[entry.own][entry.rows]
        value = tensors.pop(entry.name)
        rows.copy_((value.T if entry.transposed else value).reshape(rows.shape))
    return made


def build_on_meta(origin: str, network: Mapping[str, Any], shape: tuple[int, int, int], tensors: int) -> nn.Module:
    """Build a network without memory, to know its names and shapes.

    Raises:
        UsageError: It would have more layers than the file has tensors, or can't be built.
    """
    lists, blocks = [len(value) for value in network.values() if isinstance(value, list)], network.get("blocks", 1)
    if type(blocks) is not int or max([1, *lists]) * blocks > tensors:
        raise refuse(origin, f"its network would have more layers than it has tensors ({tensors})")
    try:
        with torch.device("meta"):
            return NETWORKS.build(network, shape=shape)
    except UsageError as error:
        raise refuse(origin, str(error)) from None


def unwrap(origin: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what DataParallel and torch.compile put before all names, or within them.

    Raises:
        UsageError: Two names become one.
    """
    names = [".".join(part for part in name.split(".") if part != "_orig_mod") for name in found]
    while names and all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    if len(set(names)) < len(names):
        raise refuse(origin, "two of its tensors have one name, but for module. or _orig_mod. before it")
    return dict(zip(names, found.values(), strict=True))


def check_names(origin: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Stored]) -> None:
    """Compare a file's names and shapes with those of the layout that it seems to have.

    Raises:
        UsageError: They differ; the message names the first few.
    """
    missing, surplus = ([k for k in a if k not in b] for a, b in ((expected, found), (found, expected)))
    if missing or surplus:
        raise refuse(
            origin,
            f"missing are {missing[:3]}, surplus {surplus[:3]} ({len(missing)} and {len(surplus)} in all) for the "
            "layout that its other tensors have",
        )
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise refuse(origin, f"{name} has shape {found[name].shape}, its layout asks for {shape}")


def load_finite(origin: str, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Read tensors as float32.

    Raises:
        UsageError: One is no floating-point tensor, or holds NaN or infinity.
    """
    tensors = {}
    for name, entry in stored.items():
        if not entry.dtype.is_floating_point:
            raise refuse(origin, f"{name} is {entry.dtype}, a weight must be floating-point")
        tensors[name] = entry.load().float()
        if not tensors[name].isfinite().all():
            raise refuse(origin, f"{name} holds NaN or infinity")
    return tensors


def attention_size(origin: str, levels: Iterable[int], size: int | None) -> int:
    """Pixels of the images: asked for, or such that attention lies at 16x16, as in all published files.

    Args:
        origin: The file.
        levels: Levels with attention, finest 0.
        size: What the user says.

    Raises:
        UsageError: Neither tells.
    """
    found = sorted(levels)
    if size is None and len(found) != 1:
        raise refuse(origin, "nothing in it tells the images' size: give size=, in pixels")
    return size or 16 * 2 ** found[0]
