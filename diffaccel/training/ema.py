"""Exponential moving average of the sampled network."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Moving average of a module's parameters, counted in images.

    The half-life grows with the images seen up to its limit, so that the random start is forgotten quickly.

    Args:
        module: The network; its parameters are averaged, its buffers are not (none of ours change in training).
        half_life: Images after which a past value has half its weight.
        rampup: The half-life is at most this fraction of the images seen.

    References:
        Elucidating the Design Space (Karras et al., 2022), https://arxiv.org/abs/2206.00364, appendix F.2
    """

    def __init__(self, module: nn.Module, half_life: float, rampup: float = 0.05) -> None:
        self.module, self.half_life, self.rampup = module, half_life, rampup
        self.average = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    @torch.no_grad()
    def update(self, images: int, images_seen: int) -> None:
        """Move towards the current weights after a step of ``images`` images."""
        half_life = min(self.half_life, self.rampup * images_seen)
        keep = 0.5 ** (images / max(half_life, 1e-8))
        current = [parameter.detach() for parameter in self.module.parameters()]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - keep)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Give the module the averaged weights for the length of a ``with`` block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.module.named_parameters():
            current = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name] = current

    def to(self, device: torch.device) -> None:
        """Move the average to where the module is."""
        self.average = {name: tensor.to(device) for name, tensor in self.average.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average by parameter name."""
        return dict(self.average)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state_dict`."""
        # Copies: update works in place, and the caller's tensors are not ours to move.
        self.average = {name: state[name].to(tensor, copy=True) for name, tensor in self.average.items()}


def of_network(average: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """One network's part of the average over several, by its own parameter names."""
    return {key.removeprefix(f"{name}."): one for key, one in average.items() if key.startswith(f"{name}.")}
