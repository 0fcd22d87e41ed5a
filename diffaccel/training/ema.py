"""Exponential moving average of network weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Exponential moving average of a module's parameters, with a half-life in images.

    The half-life increases with the number of images seen up to its limit, so that the initial weights are forgotten
    quickly.

    Args:
        module: Network whose parameters are averaged; buffers are not, because no buffer changes in training.
        half_life: Number of images after which the weight of a past value is halved.
        rampup: Maximum half-life as a fraction of the images seen.

    Attributes:
        failed: 1 from when on the average must not change, otherwise 0, as a 0-dimensional tensor on the average's
            device, which is not read on the host; None for an average that changes in every step.
        in_use: Whether the module has the averaged weights, or a part of them.

    References:
        Elucidating the Design Space (Karras et al., 2022), https://arxiv.org/abs/2206.00364, appendix F.2
    """

    def __init__(self, module: nn.Module, half_life: float, rampup: float = 0.05) -> None:
        self.module, self.half_life, self.rampup = module, half_life, rampup
        self.failed: Tensor | None = None
        self.in_use = False
        self.average = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    @torch.no_grad()
    def update(self, images: int, images_seen: int) -> None:
        """Update the average after a step with ``images`` images."""
        half_life = min(self.half_life, self.rampup * images_seen)
        keep = 0.5 ** (images / max(half_life, 1e-8))
        average, current = list(self.average.values()), [parameter.detach() for parameter in self.module.parameters()]
        if self.failed is None:
            torch._foreach_lerp_(average, current, 1 - keep)
            return
        step = torch._foreach_sub(current, average)  # lerp takes no weight from the device
        torch._foreach_mul_(step, (1 - keep) * (1 - self.failed))
        torch._foreach_add_(average, step)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Use the averaged weights in the module within a ``with`` block."""
        self.in_use = True  # stays so after an interrupt within a swap, which leaves weights and averages mixed
        self._swap()
        try:
            yield
        finally:
            self._swap()
            self.in_use = False

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.module.named_parameters():
            current = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name] = current

    def to(self, device: torch.device) -> None:
        """Move the average to a device."""
        self.average = {name: tensor.to(device) for name, tensor in self.average.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average by parameter name."""
        return dict(self.average)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore an average returned by :meth:`state_dict`."""
        # Copies, because update works in place and must not change the caller's tensors.
        self.average = {name: state[name].to(tensor, copy=True) for name, tensor in self.average.items()}


def of_network(average: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the part of an average over several networks that belongs to one, by its own parameter names."""
    return {key.removeprefix(f"{name}."): one for key, one in average.items() if key.startswith(f"{name}.")}
