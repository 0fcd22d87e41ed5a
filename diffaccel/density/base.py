"""Density models of y = x / alpha = x_0 + ratio eps, for the start of sampling and the end of likelihood ODEs."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from diffaccel.errors import UsageError
from diffaccel.parts.registry import Registry

DENSITIES: Registry["Density"] = Registry(
    "density", group="diffaccel.densities", builtins=["diffaccel.density"], context=["shape", "ratio"]
)


@dataclass(frozen=True)
class TrainingImages:
    """Images to fit a density to.

    Attributes:
        read: Function of (rank, world) that iterates over the batches of a rank, as pairs of the batch's global index
            and its images in [-1, 1], (B, C, H, W).
        rank: Rank of this process.
        world: Number of ranks.
        flip: Whether to add the mirrored images.
        seed: Seed of the noise and of initial values.
    """

    read: Callable[[int, int], Iterator[tuple[int, Tensor]]]
    rank: int = 0
    world: int = 1
    flip: bool = False
    seed: int = 0

    def own(self) -> Iterator[tuple[int, Tensor]]:
        """Batches of this rank."""
        return self._mirrored(self.read(self.rank, self.world))

    def all(self) -> Iterator[tuple[int, Tensor]]:
        """Batches of all ranks."""
        return self._mirrored(self.read(0, 1))

    def _mirrored(self, batches: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        for index, images in batches:
            yield index, torch.cat([images, images.flip(-1)]) if self.flip else images


@DENSITIES.base
class Density(nn.Module, ABC):
    """Density of y at a noise-to-data ratio. It is valid on every forward process.

    A draw is a function of standard normal numbers and one uniform number from the image's noise stream. The state dict
    contains the level, which is checked when weights are loaded.

    Args:
        shape: Shape of y, (C, H, W).
        ratio: Noise-to-data ratio.

    Attributes:
        noise_size: Number of normal numbers per draw.
    """

    evaluations = 1
    """Number of network evaluations that a draw counts as: one for every model; FLOPs are counted separately."""
    bound = True
    """Whether a fit is valid at one level only; densities from moments of clean data are valid at every level."""
    normalised = True
    """Whether the model has a log-density; otherwise, it can only sample."""
    fitted: Tensor

    def __init__(self, shape: tuple[int, int, int], ratio: float) -> None:
        super().__init__()
        self.shape, self.ratio = (shape[0], shape[1], shape[2]), ratio
        self.noise_size = math.prod(shape)
        if self.bound:
            self.register_buffer("level", torch.tensor(ratio, dtype=torch.float64))
        self.register_buffer("fitted", torch.tensor(False))

    @property
    def size(self) -> int:
        """Dimension D of y."""
        return math.prod(self.shape)

    @abstractmethod
    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        """Draw y, (B, C, H, W), from standard normal numbers z (B, noise_size) and uniform numbers u (B,)."""

    @abstractmethod
    def log_prob(self, y: Tensor) -> Tensor:
        """Normalised log-density of y (B, C, H, W), in nats: (B,) float64.

        Raises:
            UsageError: The model has no log-density.
        """

    def fit(self, images: TrainingImages) -> None:
        """Fit parameters with a closed form or by EM. All ranks must call this; the result of rank 0 is used."""

    def loss(self, y: Tensor) -> Tensor:
        """Training loss, (B,): the negative log-density of y in bits per dimension."""
        return -self.log_prob(y) / (self.size * math.log(2))

    def at(self, ratio: float) -> "Density":
        """Density at another level, with shared tensors.

        Raises:
            UsageError: The density is valid at one level only.
        """
        if self.bound and ratio != self.ratio:
            raise UsageError(
                f"the density is fitted at ratio_star {self.ratio:.6g}, not at {ratio:.6g}: fit one at this level"
            )
        other = copy.copy(self)
        other.ratio = ratio
        return other

    def broadcast(self) -> None:
        """Copy the state of rank 0 to all ranks."""
        if dist.is_available() and dist.is_initialized():
            for tensor in self.state_dict().values():
                dist.broadcast(tensor, 0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        level = state_dict.get(f"{prefix}level")
        if level is not None and not math.isclose(level.item(), self.ratio, rel_tol=1e-6):
            raise UsageError(
                f"the density's weights are for ratio_star {level.item():.6g}, but the experiment's prior starts at "
                f"{self.ratio:.6g}: set prior.T or prior.ratio_star to that of the weights, or fit another density"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


@DENSITIES.register("normal")
class NormalDensity(Density):
    """White noise N(0, (std^2 + ratio^2) I): a baseline that depends on the scale of the data only.

    With ``std`` 1 this is the paper's N(0, I) on a variance preserving process at every T. With 0, it is the paper's
    start on variance exploding processes. There is nothing to fit, and a draw counts as no evaluation.

    Args:
        shape: See :class:`Density`.
        ratio: See :class:`Density`.
        std: Standard deviation of the data.
    """

    evaluations = 0
    bound = False

    def __init__(self, shape: tuple[int, int, int], ratio: float, std: float = 1.0) -> None:
        super().__init__(shape, ratio)
        self.std = std
        self.fitted.fill_(True)

    @property
    def variance(self) -> float:
        """Variance of each element of y."""
        return self.std**2 + self.ratio**2

    @override
    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return self.variance**0.5 * z.reshape(-1, *self.shape)

    @override
    def log_prob(self, y: Tensor) -> Tensor:
        return gaussian_log_prob(y.flatten(1), torch.full_like(y[0].flatten(), self.variance, dtype=torch.float64))


def gaussian_log_prob(c: Tensor, variances: Tensor) -> Tensor:
    """Log-density of independent N(0, variances) coordinates: (B, d), (d,) or (B, d) -> (B,), summed in float64."""
    return -0.5 * (c.double().square() / variances + (2 * math.pi * variances).log()).sum(-1)
