"""Pickles of EDM: {ema, ...}, where each module is a record with its source code, which is ignored.

The ``state`` of a module is its ``__dict__``: parameters, buffers, children, and the arguments of its constructor.

References:
    Elucidating the Design Space (Karras et al., 2022), https://arxiv.org/abs/2206.00364, authors' code
"""

import io
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from diffaccel.denoiser import DENOISERS
from diffaccel.nn.ncsnpp import resampling_kernel
from diffaccel.pretrained.checkpoint import assemble, build_on_meta, check_names, foreign, refuse_unused
from diffaccel.pretrained.edm_networks import NETWORKS
from diffaccel.weights import FORMATS, File, Format, Weights
from diffaccel.weights.pickles import (
    Attributed,
    make_dict,
    make_set,
    open_file,
    refuse,
    run_pickle,
    short,
)
from diffaccel.weights.torchfile import Storage, Stored, read_stream, torch_globals

MAX_DEPTH, MAX_TENSORS = 16, 10_000
"""Limits of the tree of modules, because a pickle may share a child between many parents."""


class Recipe(Attributed):
    """Stand-in for a module, with the name of its class and its ``__dict__``."""

    def __init__(self, class_name: str = "container", state: Mapping[str, Any] | None = None) -> None:
        self.class_name, self.state = class_name, state or {}

    def set_state(self, state: Any) -> None:
        """Set the ``__dict__`` of a container of torch."""
        self.state = state


class Dtype(Attributed):
    """Stand-in for a dtype of NumPy, with its code and byte order."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.order = str(code), "<"

    def set_state(self, state: Any) -> None:
        """Set the byte order."""
        self.order = state[1]


def edm_globals(origin: str, spent: Iterator[int]) -> dict[tuple[str, str], Any]:
    """Create stand-ins for the names in EDM's pickles.

    Args:
        origin: Name of the file, for messages.
        spent: Counter of the operations of the pickle and of the pickles in its storages.
    """
    blobs: dict[int, bytes] = {}

    def reconstruct(meta: Any, *_: Any) -> Recipe:
        if not isinstance(meta, dict) or meta.get("type") != "class" or meta.get("version") != 6:
            version = short(meta.get("version")) if isinstance(meta, dict) else "none"
            raise refuse(origin, f"a module's record has version {version}, known is version 6 of type 'class'")
        if not isinstance(meta.get("state"), dict) or type(meta.get("class_name")) is not str:
            raise refuse(origin, "a module's record has no state or no class")
        return Recipe(meta["class_name"], meta["state"])

    def load_from_bytes(blob: Any) -> Storage:
        if type(blob) is not bytes or id(blob) in blobs:
            raise refuse(origin, "a storage in it has no bytes of its own")
        blobs[id(blob)] = blob
        found = read_stream(io.BytesIO(blob), f"{origin}, a storage in it,", spent)
        if not isinstance(found, Storage):
            raise refuse(origin, "a storage in it holds something else")
        return found

    def scalar(dtype: Any, raw: Any) -> Any:
        code = dtype.code if isinstance(dtype, Dtype) else ""
        if code[:1] not in "biuf" or code[1:] not in ("1", "2", "4", "8") or dtype.order not in ("<", "|", "="):
            raise refuse(origin, f"it holds a NumPy scalar of type {code[:20]!r}")
        return np.frombuffer(raw, dtype=code, count=1)[0].item()

    containers = ("ModuleDict", "ModuleList", "Sequential")
    return {
        **torch_globals(origin),
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): reconstruct,
        ("torch.storage", "_load_from_bytes"): load_from_bytes,
        **{("torch.nn.modules.container", name): Recipe for name in containers},
        ("builtins", "set"): make_set,
        ("dnnlib.util", "EasyDict"): make_dict,
        ("numpy", "dtype"): Dtype,
        ("numpy.core.multiarray", "scalar"): scalar,
        ("numpy._core.multiarray", "scalar"): scalar,
    }


@FORMATS.register("edm")
class EDM(Format):
    """Pickles of EDM, with any file name."""

    def recognises(self, file: File) -> bool:
        """See :class:`Format`; recognises pickles that are not files of torch.save."""
        return file.container == "pickle"

    def open(self, file: File, options: Mapping[str, Any]) -> Weights:
        """Read modules as data, and infer network and preconditioning from their arguments.

        Args:
            file: File.
            options: ``weights``, which can only be ``ema``.

        Raises:
            UsageError: The file is damaged or contains code, its network is not supported, or there are other options.
        """
        origin = f"checkpoint {file.path}"
        refuse_unused(origin, options, "weights")
        if options.get("weights", "ema") != "ema":
            raise refuse(origin, "it holds averaged weights only: leave weights=raw out")
        spent = itertools.count()
        content = run_pickle(open_file(file.path), origin, edm_globals(origin, spent), spent=spent)
        root = content.get("ema") if isinstance(content, dict) else None
        if not isinstance(root, Recipe):
            raise refuse(origin, "it is a pickle, but holds no network under 'ema', as EDM's do")
        denoiser, process = _preconditioning(root, origin)
        network, shape, found, listing = _network(root, origin)
        if tuple(network.get("heads", [1])) != getattr(DENOISERS[denoiser["name"]], "outputs", (1,)):
            raise refuse(origin, f"its network has not as many outputs as {root.class_name} reads")
        _check_filters(found, network.get("resample"), origin)
        on_meta = build_on_meta(origin, network, shape, len(found))
        entries = listing(on_meta)
        check_names(origin, {entry.name: entry.shape for entry in entries}, found)
        source = {"format": "edm", "weights": "ema", "units": "[-1, 1], as in the file", "wrapper": root.class_name}
        parts = {"network": network, "denoiser": denoiser, "process": process}
        return foreign(file.path, shape, parts, source, lambda: assemble(origin, entries, found, on_meta))


def _network(root: Recipe, origin: str) -> tuple[dict[str, Any], tuple[int, int, int], dict[str, Stored], Any]:
    """Network, image shape, tensors by name, and the function that lists a network's tensors under EDM's names."""
    child = _dict(root.state, "_modules", origin).get("model")
    if not isinstance(child, Recipe) or child.class_name not in NETWORKS:
        name = child.class_name[:40] if isinstance(child, Recipe) else "none"
        raise refuse(origin, f"its network is {name}, built here is {' and '.join(NETWORKS)}")
    found = state_of(child, origin)
    if child.state.get("_init_args"):
        raise refuse(origin, "its network was made with positional arguments")
    arguments, listing = NETWORKS[child.class_name]
    network, shape = arguments(_dict(child.state, "_init_kwargs", origin), origin)
    return network, shape, found, listing


def _dict(state: Any, key: str, origin: str) -> Mapping[str, Any]:
    """Mapping in the state of a module; empty if the key is missing."""
    value = state.get(key, {}) if isinstance(state, Mapping) else None
    if not isinstance(value, Mapping) or not all(type(name) is str for name in value):
        raise refuse(origin, f"a module's {key} is no mapping of names")
    return value


def state_of(root: Recipe, origin: str) -> dict[str, Stored]:
    """Collect the parameters and buffers of a module and its children, by the names of a state dict.

    Raises:
        UsageError: The state contains other values, or the tree is too deep or too large.
    """
    found: dict[str, Stored] = {}
    modules = itertools.count()

    def walk(module: Any, prefix: str, depth: int) -> None:
        many = next(modules) > MAX_TENSORS or len(found) > MAX_TENSORS
        if not isinstance(module, Recipe) or depth > MAX_DEPTH or many:
            raise refuse(origin, f"its modules are no tree at {prefix[:60] or 'the root'!r}")
        parameters, buffers = (_dict(module.state, key, origin) for key in ("_parameters", "_buffers"))
        skipped = module.state.get("_non_persistent_buffers_set", ())
        if not isinstance(skipped, set | frozenset | tuple | list):
            raise refuse(origin, f"its module {prefix[:60]!r} has no set of non-persistent buffers")
        kept = {name: value for name, value in buffers.items() if name not in skipped}
        for name, value in {**parameters, **kept}.items():
            if value is not None:
                if not isinstance(value, Stored):
                    raise refuse(origin, f"{prefix}{name[:60]} is no tensor")
                found[f"{prefix}{name}"] = value
        for name, child in _dict(module.state, "_modules", origin).items():
            if child is not None:
                walk(child, f"{prefix}{name}.", depth + 1)

    walk(root, "", 0)
    return found


def _check_filters(found: dict[str, Stored], resample: str | None, origin: str) -> None:
    """Compare the resampling filters in each layer of a file with those of the network, and remove them."""
    for name in [name for name in found if name.endswith(".resample_filter")]:
        kernel = found.pop(name)
        expected = resampling_kernel(resample or "box")
        if kernel.shape != (1, 1, *expected.shape) or not torch.allclose(kernel.load()[0, 0].float(), expected):
            raise refuse(origin, f"{name} is another filter than its network's")


# Preconditioning


def _preconditioning(root: Recipe, origin: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Denoiser and process of a preconditioning class."""

    def number(key: str, default: float) -> float:
        value = root.state.get(key, default)
        if not isinstance(value, int | float):
            raise refuse(origin, f"its {key} is no number")
        return float(value)

    if root.class_name == "EDMPrecond":
        low, high = number("sigma_min", 0.0) or 0.002, number("sigma_max", math.inf)
        high = 80.0 if math.isinf(high) else high
        denoiser = {"name": "karras", "sigma_data": number("sigma_data", 0.5), "ratio_min": low, "ratio_max": high}
        return denoiser, {"name": "edm", "sigma_max": high}
    if root.class_name == "VEPrecond":
        low, high = number("sigma_min", 0.02), number("sigma_max", 100.0)
        denoiser = {"name": "ve", "unit": 2.0, "ratio_min": low, "ratio_max": high}
        return denoiser, {"name": "ve", "sigma_min": low, "sigma_max": high}
    if root.class_name == "VPPrecond":
        betas = {"beta_0": number("beta_min", 0.1), "beta_1": number("beta_min", 0.1) + number("beta_d", 19.9)}
        return {"name": "vp", **betas, "indices": number("M", 1000) - 1}, {"name": "vp", **betas}
    if root.class_name == "iDDPMPrecond":
        steps, c_1, c_2 = number("M", 1000), number("C_1", 0.001), number("C_2", 0.008)
        if not (1 <= steps <= 10_000 and 0 < c_1 < 1 and 0 <= c_2 < 1):  # NaN too
            raise refuse(origin, f"its schedule has M = {steps:g}, C_1 = {c_1:g}, C_2 = {c_2:g}, which is none")
        process = {"name": "edm", "sigma_max": 80.0}  # EDM's start, far below the highest level
        return {"name": "iddpm", "steps": int(steps), "C_1": c_1, "C_2": c_2}, process
    known = "EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond"
    raise refuse(origin, f"its preconditioning is {root.class_name[:40]}, known are {known}")
