"""Compilation of networks by ``torch.compile``, for batches of one size."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

_EAGER: ContextVar[int] = ContextVar("eager", default=0)
"""Number of reasons to call no graphs."""


_STANCES: list[Any] = []
"""PyTorch's own switch for all compiled functions, while it is set."""


@contextmanager
def uncompiled() -> Iterator[None]:
    """Call compiled functions without their graphs in a ``with`` block, for example to count their operations.

    Blocks may end in the order in which they began: what was before the first holds again after the last.
    """
    if not _EAGER.get() and "torch._dynamo" in sys.modules:  # otherwise nothing is compiled; the import takes a second
        _STANCES.append(torch.compiler.set_stance("force_eager"))
        _STANCES[-1].__enter__()
    _EAGER.set(_EAGER.get() + 1)
    try:
        yield
    finally:
        _EAGER.set(_EAGER.get() - 1)
        if not _EAGER.get() and _STANCES:
            _STANCES.pop().__exit__(None, None, None)


class FixedBatch:
    """Compiled function of a batch, which fills up smaller batches to the largest size so far.

    A short last batch, or the samples that an adaptive solver still integrates, would otherwise be compiled for again,
    which takes longer than many evaluations. Training and sampling have sizes of their own.

    Args:
        function: Function of tensors whose first dimension is the batch.
        options: Options of Inductor.

    Attributes:
        eager: The function as given.
    """

    def __init__(self, function: Callable[..., Any], options: dict[str, Any] | None = None) -> None:
        self.eager = function
        self._compiled = torch.compile(function, options=options, dynamic=False)
        self._sizes: dict[bool, int] = {}

    def __call__(self, x: Tensor, *args: Any) -> Any:
        """Evaluate the function."""
        if _EAGER.get():
            return self.eager(x, *args)
        count, training = len(x), torch.is_grad_enabled()
        size = self._sizes[training] = max(count, self._sizes.get(training, 0))
        if count == size:
            return self._compiled(x, *args)
        output = self._compiled(*(_filled(one, count, size) for one in (x, *args)))
        return output[:count] if isinstance(output, Tensor) else type(output)(one[:count] for one in output)


def compile_forward(network: nn.Module, constant: bool) -> None:
    """Compile a network's forward pass.

    The module itself is unchanged, so that the names in checkpoints are, and hooks run outside the graph.

    Args:
        network: Network.
        constant: Whether the weights are constants of the graph, which is faster, where no gradient is computed.
    """
    network.forward = FixedBatch(network.forward, {"freezing": constant})


def is_compiled(network: nn.Module) -> bool:
    """Whether the forward pass of a network is compiled."""
    return isinstance(vars(network).get("forward"), FixedBatch)


def _filled(value: Any, count: int, size: int) -> Any:
    """Repeat the first sample of a batch up to a size."""
    if isinstance(value, tuple):  # a condition, and its features
        filled = [_filled(one, count, size) for one in value]
        return type(value)(*filled) if hasattr(value, "_fields") else tuple(filled)
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != count:
        return value
    return torch.cat([value, value[:1].expand(size - count, *value.shape[1:])])
