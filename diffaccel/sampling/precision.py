"""Precision of the networks in sampling, by Lightning's names."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Precision -> data type of autocast."""


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
