"""Trained models, from which samplers are built."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffaccel.denoiser import Denoiser

Part = str | Mapping[str, Any] | None
"""Part by name, by name and keys, or None for the model's own."""


@dataclass(frozen=True)
class Model:
    """Trained denoiser, with the sampling settings of its experiment.

    Attributes:
        name: Name of the experiment, or path of the checkpoint.
        denoiser: Denoiser with its weights.
        shape: Image shape (C, H, W).
        derive: Function (prior, solver) -> sampler with these parts, set like the experiment's keys ``prior`` and
            ``solver``; None keeps the experiment's part.
    """

    name: str
    denoiser: Denoiser
    shape: tuple[int, int, int]
    derive: Callable[[Part, Part], Any]
