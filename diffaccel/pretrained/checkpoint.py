"""Common representation of checkpoints of all formats: tensors by diffaccel's names, and parts."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffaccel.denoiser import DENOISERS, Denoiser
from diffaccel.errors import UsageError
from diffaccel.nn import NETWORKS
from diffaccel.prior import PRIORS
from diffaccel.process import PROCESSES
from diffaccel.weights import Weights, assign_weights, hash_files
from diffaccel.weights.pickles import refuse, short
from diffaccel.weights.torchfile import Stored


@dataclass(frozen=True)
class Pretrained:
    """Checkpoint of a denoiser for data in [-1, 1].

    Attributes:
        shape: Image shape (C, H, W).
        network: Network, as in an experiment's ``network``.
        denoiser: Preconditioning, as in an experiment's ``denoiser``.
        process: Process of the training, as in an experiment's ``process``; other processes can be used as well.
        tensors: Tensors of the network by name, float32.
        source: Provenance: format, weights (``ema`` or ``raw``), conversion of units, SHA-256.
        header: Header of the file, see :mod:`~diffaccel.weights.header`.
    """

    shape: tuple[int, int, int]
    network: dict[str, Any]
    denoiser: dict[str, Any]
    process: dict[str, Any]
    tensors: dict[str, Tensor]
    source: dict[str, Any]
    header: Mapping[str, Any] = field(default_factory=dict)

    @property
    def description(self) -> dict[str, Any]:
        """Header of a file with the tensors: that of the original file, with the parts by their present names."""
        return {
            **self.header,
            "kind": "denoiser",
            "shape": list(self.shape),
            "classes": self.network.get("classes") or 0,
            "network": self.network,
            "denoiser": self.denoiser,
            "process": self.process,
        }

    @property
    def shared_prior(self) -> dict[str, Any] | None:
        """Prior of the fit, as in an experiment, if the network is its generator, too; None for other priors."""
        prior = self.header.get("prior", {})
        return dict(prior) if prior.get("generator") == "shared" else None

    @classmethod
    def of(cls, weights: Weights) -> "Pretrained":
        """Read a denoiser's weights, whose header determines the network.

        Raises:
            UsageError: The weights are of another kind or damaged, or the header is incomplete or does not match them.
        """
        weights = weights.of("denoiser")
        origin, header = str(weights.path), weights.header
        if missing := [key for key in ("network", "denoiser", "process", "shape") if not header.get(key)]:
            raise refuse(origin, f"its header does not say {', '.join(missing)}")
        network, denoiser, process = (dict(header[part]) for part in ("network", "denoiser", "process"))
        if "augmentations" in network:  # name of the key in files of earlier versions
            network["augment"] = network.pop("augmentations")
        channels, height, width = header["shape"]
        shape: tuple[int, int, int] = (channels, height, width)
        tensors = unwrap(origin, weights.read())
        on_meta = build_on_meta(origin, network, shape, len(tensors))
        expected = {name: tuple(tensor.shape) for name, tensor in on_meta.state_dict().items()}
        check_names(origin, expected, {n: Stored(t.dtype, tuple(t.shape), t.clone) for n, t in tensors.items()})
        source = dict(header.get("source", {"format": "diffaccel"}))
        return cls(shape, network, denoiser, process, tensors, source, header)

    def build(self) -> Denoiser:
        """Build the denoiser with its weights, in evaluation mode, for the noise levels that it was trained on."""
        network = NETWORKS.build(self.network, shape=self.shape)
        assign_weights(self.tensors, network, "its weights")
        mark_condition(self.header, network)
        denoiser = DENOISERS.build(self.denoiser, network=network, process=PROCESSES.build(self.process))
        (low, high), (least, most) = denoiser.ratio_range, self._trained_ratios(denoiser)
        denoiser.ratio_range = max(low, least), min(high, most)
        return denoiser.requires_grad_(False).eval()

    def is_truncated(self, denoiser: Denoiser) -> bool:
        """Whether the training of a denoiser, made by :meth:`build`, left out the highest levels of its process."""
        whole = DENOISERS.build(self.denoiser, network=denoiser.network, process=denoiser.process)
        return bool(denoiser.ratio_range[1] < 0.999 * whole.ratio_range[1])

    def _trained_ratios(self, denoiser: Denoiser) -> tuple[float, float]:
        """Lowest and highest noise-to-data ratio of the training; infinite ends if the header does not limit them."""
        least, most = self.header.get("trained_ratios", (0.0, math.inf))
        if self.shared_prior is None or "trained_ratios" in self.header:
            return least, most
        # Headers of version 0.1 contain the highest level of a truncated diffusion as its prior only.
        return least, PRIORS.build(self.shared_prior, denoiser=denoiser, shape=self.shape).highest_ratio(denoiser)


def mark_condition(header: Mapping[str, Any], network: nn.Module) -> None:
    """Note on a network what it was never trained without, by the header of its weights.

    The attributes, among them ``null_class``, are those of :func:`~diffaccel.condition.trained_without`.
    """
    for part, key in (("labels", "label_drop"), ("others", "condition_drop")):
        if key in header:
            setattr(network, f"null_{part}", header[key] != 0)
        if header.get(key) == 0:
            network.null_class = False  # type: ignore[assignment]  # an attribute of the network


class Entry(NamedTuple):
    """Tensor of a file, and its place in a network.

    Attributes:
        name: Name in the file.
        shape: Shape in the file.
        own: Name in diffaccel's network.
        rows: Rows of ``own`` that the tensor fills; None for all.
        transposed: Whether the tensor is [in, out], to be converted to a 1x1 convolution.
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
    """Describe a denoiser of another codebase by a header.

    Args:
        path: File or folder.
        shape: Image shape (C, H, W).
        parts: Mapping with ``network``, ``denoiser`` and ``process``.
        source: Provenance, at least the ``format``.
        read: Function that reads the tensors by diffaccel's names.
        files: Files of a folder.
    """
    provenance = {**source, "sha256": hash_files(path, files)}
    header = {"kind": "denoiser", "shape": list(shape), "classes": parts["network"].get("classes") or 0, **parts}
    return Weights(path, str(source["format"]), "denoiser", {**header, "source": provenance}, read, files)


def assemble(origin: str, entries: list[Entry], found: Mapping[str, Stored], network: nn.Module) -> dict[str, Tensor]:
    """Read the tensors of a file, and convert them to diffaccel's names and shapes."""
    tensors = load_finite(origin, {entry.name: found[entry.name] for entry in entries})
    made = {name: torch.empty(tensor.shape, device="cpu") for name, tensor in network.state_dict().items()}
    for entry in entries:
        rows = made[entry.own] if entry.rows is None else made[entry.own][entry.rows]
        value = tensors.pop(entry.name)
        rows.copy_((value.T if entry.transposed else value).reshape(rows.shape))
    return made


def build_on_meta(origin: str, network: Mapping[str, Any], shape: tuple[int, int, int], tensors: int) -> nn.Module:
    """Build a network without memory, for its names and shapes.

    Raises:
        UsageError: The network would have more layers than the file has tensors, or can't be built.
    """
    lists, blocks = [len(value) for value in network.values() if isinstance(value, list)], network.get("blocks", 1)
    if type(blocks) is not int or max([1, *lists]) * blocks > tensors:
        raise refuse(origin, f"its network would have more layers than it has tensors ({tensors})")
    try:
        with torch.device("meta"):
            return NETWORKS.build(network, shape=shape)
    except UsageError as error:
        raise refuse(origin, str(error)) from None


def refuse_unused(origin: str, options: Mapping[str, Any], *used: str) -> None:
    """Check that the reader of a file uses all options.

    Args:
        origin: Name of the file, for messages.
        options: Options given by the user.
        used: Names of the options that the reader uses.

    Raises:
        UsageError: It uses fewer.
    """
    if unused := [key for key in options if key not in used]:
        raise refuse(origin, f"{unused[0]}={options[unused[0]]} has no use for weights of this kind: leave it out")


def replaced(stated: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, str]:
    """Return the entry of the provenance with the file's values that options replace; empty for none."""
    found = [f"{key}={short(value)}" for key, value in stated.items() if value not in (None, options.get(key, value))]
    return {"replaced": f"{' and '.join(found)} of the file"} if found else {}


def unwrap(origin: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Remove prefixes and infixes of DataParallel and torch.compile from names.

    Raises:
        UsageError: Two names become equal.
    """
    names = [".".join(part for part in name.split(".") if part != "_orig_mod") for name in found]
    while names and all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    if len(set(names)) < len(names):
        raise refuse(origin, "two of its tensors have one name, but for module. or _orig_mod. before it")
    return dict(zip(names, found.values(), strict=True))


def check_names(origin: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Stored]) -> None:
    """Compare the names and shapes in a file with those of the inferred layout.

    Raises:
        UsageError: Names or shapes differ; the message contains the first differences.
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
        UsageError: A tensor is not floating-point, or contains NaN or infinity.
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
    """Return the size of the images: as given, or such that attention is at 16x16, as in all published files.

    Args:
        origin: Name of the file, for messages.
        levels: Levels with attention; the finest level is 0.
        size: Size given by the user, in pixels.

    Raises:
        UsageError: The size is not given and can't be inferred.
    """
    found = sorted(levels)
    if size is None and len(found) != 1:
        raise refuse(origin, "nothing in it tells the images' size: give size=, in pixels")
    return size or 16 * 2 ** found[0]
