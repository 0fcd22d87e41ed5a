"""Densities: normalised laws of y = x / alpha = x_0 + ratio eps, which sampling starts from and likelihoods end in."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffaccel.errors import UsageError
from diffaccel.parts.registry import Registry

DENSITIES: Registry["Density"] = Registry(
    "density", group="diffaccel.densities", builtins=["diffaccel.density"], context=["shape", "ratio"]
)


@dataclass(frozen=True)
class TrainingImages:
    """What a density is fitted to.

    Attributes:
        read: (rank, world) -> that process's whole batches: their index among all, and images in [-1, 1] (B, C, H, W).
        rank: This process.
        world: Number of processes.
        flip: Whether mirrored images are as likely.
        seed: Seed of noise and of initial values.
    """

    read: Callable[[int, int], Iterator[tuple[int, Tensor]]]
    rank: int = 0
    world: int = 1
    flip: bool = False
    seed: int = 0

    def own(self) -> Iterator[tuple[int, Tensor]]:
        """This process's share."""
        return self._mirrored(self.read(self.rank, self.world))

    def all(self) -> Iterator[tuple[int, Tensor]]:
        """The whole."""
        return self._mirrored(self.read(0, 1))

    def _mirrored(self, batches: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        for index, images in batches:
            yield index, torch.cat([images, images.flip(-1)]) if self.flip else images


@DENSITIES.base
class Density(nn.Module, ABC):
    """A law of y at the noise-to-data ratio ``ratio``, the same on every process.

    A draw is a function of standard normal numbers and one uniform number, so that it belongs to an image's stream.
    Its state holds the level, which is checked when a file or a checkpoint is read.

    Args:
        shape: Shape of y, (C, H, W).
        ratio: The level.

    Attributes:
        noise_size: Normal numbers that one draw takes.
    """

    evaluations = 1
    """Evaluations that a draw counts as: one, as every model's forward, whatever it costs (FLOPs say that)."""
    bound = True
    """Whether a fit holds at one level. What keeps moments of clean data is right at every level."""
    normalised = True
    """Whether it has a log-density; one that has none only samples."""
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
        """Number of scalars of y, D."""
        return math.prod(self.shape)

    @abstractmethod
    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        """Draw y, (B, C, H, W), from standard normal numbers z (B, noise_size) and uniform ones u (B,)."""

    @abstractmethod
    def log_prob(self, y: Tensor) -> Tensor:
        """Normalised log-density of y (B, C, H, W), in nats: (B,) float64.

        Raises:
            UsageError: It has none: it only samples.
        """

    def fit(self, images: TrainingImages) -> None:
        """Fit what has a closed form or is fitted by EM; all processes call it, the first one's result counts."""

    def loss(self, y: Tensor) -> Tensor:
        """What a trained density minimises, (B,): -log nu(y) in bits per dimension."""
        return -self.log_prob(y) / (self.size * math.log(2))

    def at(self, ratio: float) -> "Density":
        """The same density at another level; its tensors are shared.

        Raises:
            UsageError: It was fitted at one level.
        """
        if self.bound and ratio != self.ratio:
            raise UsageError(
                f"the density is fitted at ratio_star {self.ratio:.6g} and has no other level: fit another"
            )
        other = copy.copy(self)
        other.ratio = ratio
        return other

    def broadcast(self) -> None:
        """Give every process what the first one has."""
        if dist.is_available() and dist.is_initialized():
            for tensor in self.state_dict().values():
                dist.broadcast(tensor, 0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        level = state_dict.get(f"{prefix}level")
        if level is not None and not math.isclose(level.item(), self.ratio, rel_tol=1e-6):
            raise UsageError(
                f"the density's weights are of ratio_star {level.item():.6g}, the experiment's prior starts at "
                f"{self.ratio:.6g}: set prior.T or prior.ratio_star to theirs, or fit a density at that level"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


@DENSITIES.register("normal")
class NormalDensity(Density):
    """White noise, N(0, (std^2 + ratio^2) I): the control, which knows nothing of the data but their scale.

    With ``std`` 1 it is the paper's N(0, I) on a variance preserving process at every T; with 0, its start on variance
    exploding ones. Nothing is fitted, and drawing noise is no evaluation.

    Args:
        shape: See :class:`Density`.
        ratio: See :class:`Density`.
        std: Deviation of the data.
    """

    evaluations = 0
    bound = False

    def __init__(self, shape: tuple[int, int, int], ratio: float, std: float = 1.0) -> None:
        super().__init__(shape, ratio)
        self.std = std
        self.fitted.fill_(True)

    @property
    def variance(self) -> float:
        """Of each scalar."""
        return self.std**2 + self.ratio**2

    def forward(self, z: Tensor, u: Tensor) -> Tensor:  # noqa: D102
        return self.variance**0.5 * z.reshape(-1, *self.shape)

    def log_prob(self, y: Tensor) -> Tensor:  # noqa: D102
        return gaussian_log_prob(y.flatten(1), torch.full_like(y[0].flatten(), self.variance, dtype=torch.float64))


def gaussian_log_prob(c: Tensor, variances: Tensor) -> Tensor:
    """Log-density of independent N(0, variances) coordinates: (B, d), (d,) or (B, d) -> (B,), summed in float64."""
    return -0.5 * (c.double().square() / variances + (2 * math.pi * variances).log()).sum(-1)
