"""What the layers of several networks share."""

from typing import TypeVar

from torch import nn

Layer = TypeVar("Layer", bound=nn.Module)


def zeroed(layer: Layer) -> Layer:
    """Initialise the parameters of a layer with zeros, and return it."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def groups_of(width: int) -> int:
    """Return the largest number of groups, at most 32, with at least 4 channels per group."""
    return next(groups for groups in range(min(32, max(1, width // 4)), 0, -1) if width % groups == 0)
