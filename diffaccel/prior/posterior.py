"""Posteriors p(level | y), which estimate the noise level of a state in a Langevin-Gibbs chain."""

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
    """Ratios ratio_min (ratio_max / ratio_min)^u, with ``count`` values of u evenly spaced from 1 to 1 / 1000.

    The defaults are those of the DLG reference for CIFAR-10, for data in [-1, 1].

    Returns:
        Noise-to-data ratios, the largest first, (K,) float64.

    Raises:
        UsageError: There are fewer than 2 levels, or the ratios are not positive and increasing.
    """
    at_least(2, "posterior", count=count)
    positive("posterior", ratio_min=ratio_min)
    if not ratio_max > ratio_min:
        raise UsageError(f"posterior: ratio_max is {ratio_max}, it must be above ratio_min, {ratio_min}")
    return ratio_min * (ratio_max / ratio_min) ** torch.linspace(1.0, 0.001, count, dtype=torch.float64)


@POSTERIORS.base
class LevelPosterior(nn.Module, ABC):
    """Posterior q(k | y) over K noise levels.

    Attributes:
        levels: Noise-to-data ratios of the levels, (K,) float64.
    """

    levels: Tensor

    def __init__(self, levels: Tensor) -> None:
        super().__init__()
        self.register_buffer("levels", levels.double(), persistent=False)

    @abstractmethod
    def logits(self, y: Tensor) -> Tensor:
        """Compute the unnormalised log-posterior of y = x / alpha, (B, C, H, W) -> (B, K)."""

    def forward(self, y: Tensor, update: Update, noise: NoiseStreams) -> tuple[Tensor, Tensor]:
        """Choose a level for each state.

        Args:
            y: States x / alpha, (B, C, H, W).
            update: ``argmax`` (reference), ``sample`` (a Gibbs draw) or ``mean`` (mean of the log-level).
            noise: Noise streams of the chains; ``sample`` draws one uniform number from each.

        Returns:
            Noise-to-data ratios, (B,) float64, and whether the most probable level is the first or last one, (B,) bool.
        """
        logits = self.logits(y).double()
        best = logits.argmax(1)
        at_end = (best == 0) | (best == len(self.levels) - 1)
        if update == "argmax":
            return self.levels[best], at_end
        probability = logits.softmax(1)
        if update == "mean":
            return (probability @ self.levels.log()).exp(), at_end
        u = noise.uniform()
        index = (probability.cumsum(1) < u[:, None]).sum(1).clamp_max(len(self.levels) - 1)
        return self.levels[index], at_end


class ClassifierPosterior(LevelPosterior):
    """Posterior given by a trained classifier.

    The classifier's training labels are uniform over geometric levels, which implies the prior p(sigma) ~ 1 / sigma.

    Args:
        network: Network (B, C, H, W) -> logits (B, K).
        levels: Noise-to-data ratios, (K,).
    """

    def __init__(self, network: nn.Module, levels: Tensor) -> None:
        super().__init__(levels)
        self.network = network

    @override
    def logits(self, y: Tensor) -> Tensor:
        return self.network(y)

    def loss(self, x_0: Tensor, index: Tensor, eps: Tensor) -> Tensor:
        """Compute the cross-entropy of the level index.

        Args:
            x_0: Images, (B, C, H, W).
            index: Indices of the levels, (B,).
            eps: Standard normal noise, (B, C, H, W).

        Returns:
            Cross-entropy in nats, (B,).
        """
        ratio = self.levels[index].to(x_0)
        return F.cross_entropy(self.network(x_0 + ratio[:, None, None, None] * eps).float(), index, reduction="none")


class ExactPosterior(LevelPosterior):
    """Exact posterior for a mixture of Gaussians, with a uniform prior over the levels.

    Args:
        denoiser: Exact denoiser, which has closed-form marginal densities.
        levels: Noise-to-data ratios, (K,).
    """

    def __init__(self, denoiser: MixtureDenoiser, levels: Tensor) -> None:
        super().__init__(levels)
        self._denoiser = [denoiser]  # in a list, because a submodule would be registered twice

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
    """Build a noise-level classifier over geometric levels (see :class:`NoiseLevelClassifier`).

    Args:
        shape: Image shape (C, H, W).
        count: Number of levels.
        ratio_min: Lowest noise-to-data ratio.
        ratio_max: Highest noise-to-data ratio.
        width: Number of channels of the first convolution; each further convolution doubles the number.
        normalise: Whether to divide states by their root mean square, and to add its logarithm as a channel.
    """
    network = NoiseLevelClassifier(shape, count, width, normalise)
    return ClassifierPosterior(network, geometric_levels(count, ratio_min, ratio_max))


@POSTERIORS.register("exact")
def exact(denoiser: Denoiser, count: Count = 1000, ratio_min: float = 0.02, ratio_max: float = 100.0) -> ExactPosterior:
    """Build the exact posterior of an exact denoiser over geometric levels.

    Args:
        denoiser: Exact denoiser.
        count: Number of levels.
        ratio_min: Lowest noise-to-data ratio.
        ratio_max: Highest noise-to-data ratio.

    Raises:
        UsageError: The denoiser is not exact.
    """
    if not isinstance(denoiser, MixtureDenoiser):
        raise UsageError("posterior 'exact' requires an exact denoiser (mixture): set posterior=classifier")
    return ExactPosterior(denoiser, geometric_levels(count, ratio_min, ratio_max))
