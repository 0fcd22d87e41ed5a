"""Counting, on the networks themselves: evaluations and FLOPs, whoever calls them.

One evaluation is one sample through one forward. Nothing is derived from a formula: a hook on the module sees every
batch that enters it, so correctors, Langevin steps and burn-in count like any other call.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

_BURNING_IN: ContextVar[bool] = ContextVar("burning_in", default=False)
_APART: ContextVar[str | None] = ContextVar("apart", default=None)


@contextmanager
def burn_in() -> Iterator[None]:
    """Mark what runs inside as burn-in, which counters report apart as well."""
    token = _BURNING_IN.set(True)
    try:
        yield
    finally:
        _BURNING_IN.reset(token)


@contextmanager
def counted_apart(name: str) -> Iterator[None]:
    """Count what runs inside under a name that is no network's: it stands in no budget, but its FLOPs do count."""
    token = _APART.set(name)
    try:
        yield
    finally:
        _APART.reset(token)


class EvaluationCounter:
    """Counts samples through each network while it is entered as a context.

    Args:
        networks: Name -> module.
        flops: Those known of an earlier counter, which are not measured again.

    Attributes:
        evaluations: Samples per network, burn-in included.
        burn_in: The part of them spent in burn-in.
        flops: FLOPs of one sample through one forward, measured on each network's first call (multiplications and
            additions apart, matrix products and convolutions only, as ``torch.utils.flop_counter`` counts).
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
            samples, name = len(inputs[0]), _APART.get() or network
            self.evaluations[name] += samples
            if _BURNING_IN.get():
                self.burn_in[name] += samples
            if name not in self.flops and samples and not measuring:
                eager = torch.compiler.set_stance("force_eager")  # a compiled graph hides its operations
                eager.__enter__()
                mode = FlopCounterMode(display=False)
                mode.__enter__()
                measuring.append((mode, eager, samples))

        def after(_: nn.Module, inputs: tuple[Any, ...], output: Tensor | None) -> None:
            if measuring:
                mode, eager, samples = measuring.pop()
                mode.__exit__(None, None, None)
                eager.__exit__(None, None, None)
                if output is None:  # the call failed: the next one is measured
                    return
                self.flops[_APART.get() or network] = mode.get_total_flops() / samples

        self._stack.callback(after, module, (), None)  # an interrupt in the network calls no hook
        self._stack.callback(module.register_forward_pre_hook(before).remove)
        self._stack.callback(module.register_forward_hook(after, always_call=True).remove)

    def total_flops(self) -> float:
        """FLOPs of everything counted."""
        return sum(count * self.flops.get(name, 0.0) for name, count in self.evaluations.items())
