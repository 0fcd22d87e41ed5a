"""Counters of network evaluations and FLOPs.

One evaluation is one sample in one forward pass. Evaluations are counted by a hook on the network, not derived from a
formula, so that correctors, Langevin steps and burn-in are included.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffaccel.nn.compiling import uncompiled

_BURNING_IN: ContextVar[bool] = ContextVar("burning_in", default=False)
_OTHER_NAME: ContextVar[str | None] = ContextVar("other_name", default=None)


@contextmanager
def burn_in() -> Iterator[None]:
    """Mark the evaluations in a ``with`` block as burn-in, which counters also report separately."""
    token = _BURNING_IN.set(True)
    try:
        yield
    finally:
        _BURNING_IN.reset(token)


@contextmanager
def counted_apart(name: str) -> Iterator[None]:
    """Count the evaluations in a ``with`` block under another name: excluded from NFE, included in FLOPs."""
    token = _OTHER_NAME.set(name)
    try:
        yield
    finally:
        _OTHER_NAME.reset(token)


class EvaluationCounter:
    """Context manager that counts evaluations and FLOPs of networks.

    Args:
        networks: Networks by name.
        flops: FLOPs by name from an earlier counter, which are not measured again.

    Attributes:
        evaluations: Number of evaluations by name, including burn-in.
        burn_in: Number of evaluations in burn-in by name.
        flops: FLOPs per evaluation by name, measured on the first call. ``torch.utils.flop_counter`` counts a
            multiplication and an addition as two, for matrix products and convolutions only.
    """

    def __init__(self, networks: Mapping[str, nn.Module], flops: Mapping[str, float] | None = None) -> None:
        self.networks = dict(networks)
        self.evaluations: Counter[str] = Counter()
        self.burn_in: Counter[str] = Counter()
        self.flops = dict(flops or {})
        self._stack = ExitStack()

    def __enter__(self) -> "EvaluationCounter":
        for name, module in self.networks.items():
            self._watch(name, module)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _watch(self, network: str, module: nn.Module) -> None:
        measuring: list[tuple[FlopCounterMode, Any, int]] = []

        def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            samples, name = len(inputs[0]), _OTHER_NAME.get() or network
            self.evaluations[name] += samples
            if _BURNING_IN.get():
                self.burn_in[name] += samples
            if name not in self.flops and samples and not measuring:
                eager = ExitStack()  # the counter can't see operations of compiled graphs
                eager.enter_context(torch.compiler.set_stance("force_eager"))
                eager.enter_context(uncompiled())
                mode = FlopCounterMode(display=False)
                mode.__enter__()
                measuring.append((mode, eager, samples))

        def after(_: nn.Module, inputs: tuple[Any, ...], output: Tensor | None) -> None:
            if measuring:
                mode, eager, samples = measuring.pop()
                mode.__exit__(None, None, None)
                eager.__exit__(None, None, None)
                if output is None:  # the call failed: measure the next one
                    return
                self.flops[_OTHER_NAME.get() or network] = mode.get_total_flops() / samples

        self._stack.callback(after, module, (), None)  # hooks are not called after an interrupt
        self._stack.callback(module.register_forward_pre_hook(before).remove)
        self._stack.callback(module.register_forward_hook(after, always_call=True).remove)


def total_flops(evaluations: Mapping[str, int], flops: Mapping[str, float]) -> float:
    """Return the FLOPs of all evaluations.

    Args:
        evaluations: Network -> number of evaluations.
        flops: Network -> FLOPs per evaluation; a network that is missing counts as 0.
    """
    return sum(count * flops.get(name, 0.0) for name, count in evaluations.items())
