"""Counters of network evaluations and FLOPs.

One evaluation is one sample in one forward pass. Evaluations are counted by a hook on the network, not derived from a
formula, so that correctors, Langevin steps and burn-in are included.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from typing_extensions import override

from diffaccel.condition import Condition
from diffaccel.nn.compiling import uncompiled

_aten = torch.ops.aten
FORMULAS = {
    **flop_registry,
    # Without these, PyTorch counts no attention on CPUs, where the memory format decides on the kernel.
    **dict.fromkeys(
        (_aten._scaled_dot_product_flash_attention_for_cpu, _aten._scaled_dot_product_fused_attention_overrideable),
        flop_registry[_aten._scaled_dot_product_flash_attention],
    ),
}
"""Operation -> function of its arguments that returns its FLOPs."""

_HOOKING = threading.Lock()
"""Held while hooks are added and removed: PyTorch's numbers of hooks are not safe from other threads."""
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


class FlopCounter(TorchDispatchMode):
    """Count FLOPs by the formulas of ``torch.utils.flop_counter``: matrix products and convolutions only.

    ``FlopCounterMode``, which has the same formulas, also counts by module, and imports TorchDynamo, which takes a
    second.

    Attributes:
        total: FLOPs of all operations; a multiplication and an addition count as two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: PyTorch imports TorchDynamo to exclude a mode from graphs, and there are none here."""
        return False

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, formula = kwargs or {}, FORMULAS.get(func._overloadpacket)
        if formula is None:
            with self:  # composite operations, such as attention in inference mode, are counted by their parts
                if (output := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return output
        output = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=output)
        return output


class EvaluationCounter:
    """Context manager that counts evaluations and FLOPs of networks.

    Only calls of the thread that enters it are counted, because samplers in other threads may share the networks.

    Args:
        networks: Networks by name.
        flops: FLOPs by name from an earlier counter, which are not measured again.

    Attributes:
        evaluations: Number of evaluations by name, including burn-in.
        burn_in: Number of evaluations in burn-in by name.
        flops: FLOPs per evaluation by name, measured on the first call by :class:`FlopCounter`.
    """

    def __init__(self, networks: Mapping[str, nn.Module], flops: Mapping[str, float] | None = None) -> None:
        self.networks = dict(networks)
        self.evaluations: Counter[str] = Counter()
        self.burn_in: Counter[str] = Counter()
        self.flops = dict(flops or {})
        self._stack = ExitStack()

    def __enter__(self) -> "EvaluationCounter":
        with _HOOKING:
            for name, module in self.networks.items():
                self._watch(name, module)
        return self

    def __exit__(self, *error: object) -> None:
        with _HOOKING:
            self._stack.close()

    def _watch(self, network: str, module: nn.Module) -> None:
        measuring: list[tuple[FlopCounter, Any, int]] = []
        thread = threading.get_ident()

        def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if threading.get_ident() != thread:
                return
            samples = inputs[0].size if isinstance(inputs[0], Condition) else len(inputs[0])
            name = _OTHER_NAME.get() or network
            self.evaluations[name] += samples
            if _BURNING_IN.get():
                self.burn_in[name] += samples
            if name not in self.flops and samples and not measuring:
                eager = uncompiled()  # the counter can't see operations of compiled graphs
                eager.__enter__()
                mode = FlopCounter()
                mode.__enter__()
                measuring.append((mode, eager, samples))

        def after(_: nn.Module, inputs: tuple[Any, ...], output: Tensor | None) -> None:
            # Dispatch modes belong to a thread, so that only the one that entered a mode may leave it.
            if measuring and threading.get_ident() == thread:
                mode, eager, samples = measuring.pop()
                mode.__exit__(None, None, None)
                eager.__exit__(None, None, None)
                if output is None:  # the call failed: measure the next one
                    return
                self.flops[_OTHER_NAME.get() or network] = mode.total / samples

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
