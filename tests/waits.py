"""Training steps on a device without values, to find what would make the host wait for a GPU.

Tensors on PyTorch's device ``meta`` have a dtype and a shape, but no values. So a step runs there as on a GPU, up to
the first operation that needs a value on the host.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.optim import optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffaccel.condition import Condition
from diffaccel.data import Batch
from diffaccel.methods import TrainedModule
from diffaccel.training.finite import FiniteCheck

GPU = torch.device("meta")
MODULES_WITH_NOISE = ("training.module", "methods.base", "methods.small_t", "training.objectives")


class Waits(AssertionError):
    """An operation would wait for the GPU."""


class Refusing(TorchDispatchMode):
    """Raises an error at operations on a GPU that make the host wait."""

    NAMES = (
        "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim", "_unique", "_unique2",
        "_linalg_check_errors", "_linalg_eigh", "repeat_interleave", "bincount",
    )  # fmt: skip

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        name = func.overloadpacket.__name__
        if any(tensor.device == GPU for tensor in tensors):
            if name in self.NAMES:
                raise Waits(f"{func} reads a value")
            if name in ("index", "index_put", "index_put_", "_unsafe_index"):
                indices = [one for one in args[1] if one is not None]
                if any(one.dtype in (torch.bool, torch.uint8) for one in indices):
                    raise Waits(f"{func} by a mask counts its elements")
        result = func(*args, **kwargs)
        tensors += [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        if name in ("_to_copy", "copy_") and devices == {"cpu", "meta"} and blocking:
            raise Waits(f"{func} copies between host and GPU")
        return result


class RefusingNumbers(TorchFunctionMode):
    """Raises an error where numbers are copied to a GPU, which a dispatch mode does not see."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        makes = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor)
        if (makes or func is torch.Tensor.new_tensor) and result.device == GPU:
            raise Waits(f"{func.__name__} copies numbers to the GPU")
        return result


@contextmanager
def refusing() -> Iterator[None]:
    """Refuse what would wait for the GPU in a ``with`` block."""
    with Refusing(), RefusingNumbers():
        yield


class DeviceNoise:
    """What draws on the device of the index, without values."""

    def __init__(self, seed: int, index: torch.Tensor, purpose: str = "image", device: Any = None):
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def normal(self, like: torch.Tensor) -> torch.Tensor:
        return torch.randn_like(like)

    def uniform(self) -> torch.Tensor:
        return torch.rand(len(self.index), dtype=torch.float64, device=self.index.device)


def allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a step run on the device without values, where noise streams, autocast and fused optimisers do not."""
    for name in MODULES_WITH_NOISE:
        monkeypatch.setattr(f"diffaccel.{name}.NoiseStreams", DeviceNoise)
    autocast, fused = torch.autocast, optimizer._get_fused_kernels_supported_devices
    monkeypatch.setattr(torch, "autocast", lambda device_type, **options: autocast("cpu", **options))
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [*fused(), GPU.type])


def move(module: nn.Module) -> None:
    """Replace all weights and buffers by tensors of the same shape on the GPU."""
    for part in module.modules():
        for name, weight in [*part._parameters.items()]:
            if weight is not None:
                empty = torch.empty(weight.shape, dtype=weight.dtype, device=GPU)
                part._parameters[name] = nn.Parameter(empty, requires_grad=weight.requires_grad)
        for name, buffer in [*part._buffers.items()]:
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=GPU)
        if isinstance(part, L.LightningModule):
            part._device = GPU


def batch_on_gpu(shape: tuple[int, ...], classes: int, size: int = 8) -> Batch:
    labels = torch.randint(classes, (size,), device=GPU) if classes else None
    return Batch(
        torch.randn(size, *shape, device=GPU),
        None if labels is None else Condition(labels=labels),
        torch.arange(size, device=GPU),
    )


def attach(method: TrainedModule) -> None:
    """Prepare a method for a step, with Lightning's own optimisers and backward pass."""
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    method.trainer = trainer
    trainer.strategy._lightning_module = method
    trainer.strategy.optimizers = method.configure_optimizers()
    method._check = FiniteCheck(GPU, deferred=True)
    method.train()
