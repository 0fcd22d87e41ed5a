"""Precision of the networks in sampling, by Lightning's names."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from weakref import WeakKeyDictionary

import torch
from torch import nn

from diffaccel.errors import UsageError

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")
"""What networks can sample in."""
DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Precision -> data type of autocast."""

_WIDENED: WeakKeyDictionary[nn.Module, dict[str, torch.dtype]] = WeakKeyDictionary()
"""Module -> data types that its own weights had before :func:`convert` made them float64."""


def check_precision(precision: str) -> str:
    """Return a precision if it is one.

    Raises:
        UsageError: It is none.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision={precision!r} is none of {', '.join(PRECISIONS)}")
    return precision


def convert(network: nn.Module, precision: str) -> None:
    """Convert weights to float64 for ``64-true``, and for other precisions back to what they were before.

    Samplers share networks, so that another one may have converted them. Tensors that were float64 before, such as
    noise levels, are not changed.
    """
    for module in network.modules():
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        types = _WIDENED.pop(module, {})
        if precision == "64-true":
            narrow = {
                key: one.dtype for key, one in own.items() if one.is_floating_point() and one.dtype != torch.float64
            }
            _WIDENED[module] = types | narrow
            types = dict.fromkeys(narrow, torch.float64)
        for key, dtype in types.items():
            own[key].data = own[key].data.to(dtype)


def arithmetic(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Return the context in which networks are evaluated.

    Args:
        precision: Precision: ``32-true``, ``64-true`` (with float64 weights), ``bf16-mixed`` or ``16-mixed``.
        device: Device of the networks.
    """
    if precision == "64-true":
        return _double()
    return _mixed(DTYPES[precision], device) if precision in DTYPES else nullcontext()


@contextmanager
def _mixed(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    # Without the cache, because weights may change within the context, for example from raw to averaged ones.
    with torch.autocast(device.type, dtype=dtype, cache_enabled=False):
        yield


@contextmanager
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
