"""Checks and times of work on a device, for which the host does not wait.

A GPU works behind the host, which must not ask for a value before the next work is queued. Within
:meth:`Checks.collected`, a failed check is therefore an error only when the work is done, at :meth:`Checks.settle`.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor

_COLLECTED: ContextVar["Checks | None"] = ContextVar("collected", default=None)


class Checks:
    """Conditions on values on a device, with the errors that they raise if they don't hold."""

    def __init__(self) -> None:
        self._found: list[tuple[Tensor, Callable[[], Exception]]] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Collect the checks of :func:`check` in a ``with`` block."""
        token = _COLLECTED.set(self)
        try:
            yield
        finally:
            _COLLECTED.reset(token)

    def add(self, holds: Tensor, error: Callable[[], Exception]) -> None:
        """Add a check, and begin to copy its result to the host."""
        self._found.append((to_host(holds), error))

    def settle(self) -> None:
        """Raise the error of the first check that failed; the work on the device must be done."""
        found, self._found = self._found, []
        for holds, error in found:
            if not holds:
                raise error()


def check(holds: Tensor, error: Callable[[], Exception]) -> None:
    """Raise an error if a condition does not hold: at once, or when the collected checks are settled.

    Args:
        holds: Condition, a bool tensor; all of its elements must be true.
        error: Function that creates the error. It may wait for the device.
    """
    collected = _COLLECTED.get()
    if collected is not None:
        collected.add(holds.all(), error)
    elif not holds.all():
        raise error()


def runs_ahead(device: torch.device) -> bool:
    """Whether the host queues work for a device while it is still working."""
    return device.type == "cuda"


def is_deferring() -> bool:
    """Whether the host should not read values from a device now."""
    return _COLLECTED.get() is not None


class Stopwatch:
    """Stopwatch of work on a device, started when it is created.

    Args:
        device: Device of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._now()
        self._stop: float | torch.cuda.Event | None = None

    def stop(self) -> None:
        """Stop at the work that is queued now."""
        self._stop = self._now()

    @property
    def seconds(self) -> float:
        """Time from start to stop, for which the host waits."""
        assert self._stop is not None
        if isinstance(self._start, float) or isinstance(self._stop, float):
            return cast(float, self._stop) - cast(float, self._start)
        self._stop.synchronize()
        return self._start.elapsed_time(self._stop) / 1000

    def _now(self) -> "float | torch.cuda.Event":
        if self._device.type != "cuda":
            return time.perf_counter()
        with torch.cuda.device(self._device):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return event


def to_host(value: Any) -> Any:
    """Copy a tensor, or those in dictionaries and lists, to the host, which may read them after the queued work."""
    if isinstance(value, dict):
        return {key: to_host(one) for key, one in value.items()}
    if isinstance(value, list):
        return [to_host(one) for one in value]
    if not isinstance(value, Tensor) or value.device.type != "cuda":
        return value
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value.detach(), non_blocking=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host to a device, without waiting for the work that is queued there."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def as_numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the tensors of a record to numbers and lists of numbers."""
    return {key: value.tolist() if isinstance(value, Tensor) else value for key, value in record.items()}
