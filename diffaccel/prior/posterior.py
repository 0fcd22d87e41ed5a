"""p(level | y): how a Langevin-Gibbs chain finds the noise level of its state."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from diffaccel.denoiser import Denoiser, MixtureDenoiser
from diffaccel.errors import UsageError
from diffaccel.nn.classifier import NoiseLevelClassifier
from diffaccel.noise import NoiseStreams
from diffaccel.parts.checks import Count, at_least, positive
from diffaccel.parts.registry import Registry

POSTERIORS: Registry["LevelPosterior"] = Registry(
    "posterior",
    builtins=["diffaccel.prior.posterior"],
    context=["denoiser", "shape"],
    extra={"checkpoint": Path | None},
)

Update = Literal["argmax", "sample", "mean"]


def geometric_levels(count: int = 1000, ratio_min: float = 0.02, ratio_max: float = 100.0) -> Tensor:
    """Ratios ratio_min (ratio_max / ratio_min)^u, u from 1 down to 1 / 1000 in ``count`` equal steps: (K,) float64.

    Level 0 is the largest. The defaults are the DLG reference's for CIFAR-10 in units of [-1, 1].

    Raises:
        UsageError: Fewer than 2 levels, or ratios that are not positive and rising.
    """
    at_least(2, "posterior", count=count)
    positive("posterior", ratio_min=ratio_min)
    if not ratio_max > ratio_min:
        raise UsageError(f"posterior: ratio_max is {ratio_max}, it must be more than ratio_min, {ratio_min}")
    return ratio_min * (ratio_max / ratio_min) ** torch.linspace(1.0, 0.001, count, dtype=torch.float64)


@POSTERIORS.base
class LevelPosterior(nn.Module, ABC):
    """q(k | y) over K noise levels.

    Attributes:
        levels: Ratios of the levels, (K,) float64.
    """

    levels: Tensor

    def __init__(self, levels: Tensor) -> None:
        super().__init__()
        self.register_buffer("levels", levels.double(), persistent=False)

    @abstractmethod
    def logits(self, y: Tensor) -> Tensor:
        """Unnormalised log-posterior of y = x / alpha: (B, C, H, W) -> (B, K)."""

    def forward(self, y: Tensor, update: Update, noise: NoiseStreams) -> tuple[Tensor, Tensor]:
        """Give each state a level.

        Args:
            y: States x / alpha, (B, C, H, W).
            update: ``argmax`` (the reference's), ``sample`` (a Gibbs draw) or ``mean`` (of the log-level).
            noise: The chains' streams; ``sample`` takes one uniform number from each.

        Returns:
            Ratios (B,) float64 and whether the most probable level is one of the two ends, (B,) bool.
        """
        logits = self.logits(y).double()
        best = logits.argmax(1)
        at_end = (best == 0) | (best == len(self.levels) - 1)
        if update == "argmax":
            return self.levels[best], at_end
        probability = logits.softmax(1)
        if update == "mean":
            return (probability @ self.levels.log()).exp(), at_end
        u = noise.uniform().to(probability.device)
        index = (probability.cumsum(1) < u[:, None]).sum(1).clamp_max(len(self.levels) - 1)
        return self.levels[index], at_end


class ClassifierPosterior(LevelPosterior):
    """A trained classifier; its labels were drawn uniformly over the levels, so p(sigma) ~ 1 / sigma.

    Args:
        network: (B, C, H, W) -> logits (B, K).
        levels: Ratios, (K,).
    """

    def __init__(self, network: nn.Module, levels: Tensor) -> None:
        super().__init__(levels)
        self.network = network

    @override
    def logits(self, y: Tensor) -> Tensor:
        return self.network(y)

    def loss(self, x_0: Tensor, index: Tensor, eps: Tensor) -> Tensor:
        """Cross-entropy of the level's index: (B, C, H, W), (B,), (B, C, H, W) -> (B,), in nats."""
        ratio = self.levels[index].to(x_0)
        return F.cross_entropy(self.network(x_0 + ratio[:, None, None, None] * eps).float(), index, reduction="none")


class ExactPosterior(LevelPosterior):
    """Exact for a mixture of Gaussians, with equal probability for each level.

    Args:
        denoiser: The exact denoiser, whose marginal densities are known.
        levels: Ratios, (K,).
    """

    def __init__(self, denoiser: MixtureDenoiser, levels: Tensor) -> None:
        super().__init__(levels)
        self._denoiser = [denoiser]  # not a submodule: it belongs to the method

    @override
    def logits(self, y: Tensor) -> Tensor:
        return self._denoiser[0].log_prob(y.double(), self.levels)


@POSTERIORS.register("classifier")
def classifier(
    shape: tuple[int, int, int],
    count: Count = 1000,
    ratio_min: float = 0.02,
    ratio_max: float = 100.0,
    width: Count = 32,
    normalise: bool = True,
) -> ClassifierPosterior:
    """Build a noise classifier over geometric levels (see :class:`NoiseLevelClassifier`).

    Args:
        shape: Image shape (C, H, W).
        count: Number of levels.
        ratio_min: Lowest level, a noise-to-data ratio.
        ratio_max: Highest level.
        width: Channels of the first convolution; doubled by each next one.
        normalise: Whether a state is divided by its root mean square, and the logarithm of that added as a channel.
    """
    network = NoiseLevelClassifier(shape, count, width, normalise)
    return ClassifierPosterior(network, geometric_levels(count, ratio_min, ratio_max))


@POSTERIORS.register("exact")
def exact(denoiser: Denoiser, count: Count = 1000, ratio_min: float = 0.02, ratio_max: float = 100.0) -> ExactPosterior:
    """Build the exact posterior of an exact denoiser over geometric levels.

    Args:
        denoiser: Exact denoiser.
        count: Number of levels.
        ratio_min: Lowest level, a noise-to-data ratio.
        ratio_max: Highest level.

    Raises:
        UsageError: The denoiser is a network.
    """
    if not isinstance(denoiser, MixtureDenoiser):
        raise UsageError("posterior 'exact' needs an exact denoiser (mixture): take posterior=classifier")
    return ExactPosterior(denoiser, geometric_levels(count, ratio_min, ratio_max))
