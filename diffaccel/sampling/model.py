"""A trained model, as a sampler takes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffaccel.denoiser import Denoiser

if TYPE_CHECKING:
    from diffaccel.sampling.sampler import Sampler

Part = str | Mapping[str, Any] | None
"""A part by name, by name and keys, or the model's own."""


@dataclass(frozen=True)
class Model:
    """A denoiser with its weights, and how its experiment samples from it.

    Attributes:
        name: The experiment, or the checkpoint.
        denoiser: E[x_0 | x_t] and E[eps | x_t] on a process.
        shape: Image shape (C, H, W).
        derive: (prior, solver) -> sampler with those parts in place of the experiment's own, as its keys ``prior`` and
            ``solver`` would set them; None keeps the experiment's.
    """

    name: str
    denoiser: Denoiser
    shape: tuple[int, int, int]
    derive: Callable[[Part, Part], Sampler]
