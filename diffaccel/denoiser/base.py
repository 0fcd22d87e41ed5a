"""Denoisers: preconditioning around a network, and exact ones to test against.

A network knows nothing of diffusion: it maps (input, noise conditioning, class) to an output of the input's shape. A
denoiser says what goes in and what the output means, on one process.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.errors import UsageError
from diffaccel.parts.registry import Registry
from diffaccel.process import Prediction, Process


def augment_args(augment: Tensor | None) -> tuple[Tensor, ...]:
    """Augmentation labels as an argument, if there are any: not everything takes them."""
    return () if augment is None else (augment,)


class Denoiser(nn.Module, ABC):
    """E[x_0 | x_t] and E[eps | x_t] on one process.

    Attributes:
        process: The process whose x_t it takes.
        ratio_range: Least and largest noise-to-data ratio that it was trained on (or is exact on).
    """

    process: Process
    ratio_range: tuple[float, float]
    condition: Tensor | None = None
    """Class labels (B,) that are bound, if any."""
    source: dict[str, Any] | None = None
    """Where weights of another program come from: format, ema or raw, units, SHA-256."""
    any_process = False
    """Whether the same weights serve on every process: the network depends on the noise-to-data ratio alone."""

    @abstractmethod
    def forward(
        self, x_t: Tensor, t: Tensor, condition: Tensor | None = None, augment: Tensor | None = None
    ) -> Prediction:
        """Predict at states ``x_t`` (B, C, H, W) and times ``t`` (B,).

        Args:
            x_t: States, (B, C, H, W).
            t: Times, (B,).
            condition: Class labels, (B,); None for the null class.
            augment: Augmentation labels, (B, L); None for none, as in sampling.
        """

    @property
    def network(self) -> nn.Module:
        """The module whose forward is one network evaluation; an exact denoiser is its own."""
        return self

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next((tensor.device for tensor in (*self.parameters(), *self.buffers())), torch.device("cpu"))

    def given(self, condition: Tensor | None) -> "Denoiser":
        """Bind class labels (B,), so that solvers and priors never see them."""
        return self if condition is None else ConditionedDenoiser(self, condition)

    def guided(self, weight: float) -> "Denoiser":
        """Guide by the bound labels (classifier-free).

        Raises:
            UsageError: None are bound.
        """
        raise UsageError(
            "solver.guidance needs class labels: set network.classes, and a prior without chains, or remove it"
        )

    def select(self, index: Tensor) -> "Denoiser":
        """Keep what is bound to some samples of the batch, in the order of ``index``."""
        return self

    def check_range(self, ratio: Tensor) -> None:
        """Refuse start levels that the denoiser was not trained on.

        Raises:
            UsageError: A ratio in (B,) lies outside ``ratio_range``; 0.1 % is allowed for rounding.
        """
        low, high = self.ratio_range
        if len(ratio) and not (low * 0.999 <= ratio.min().item() and ratio.max().item() <= high * 1.001):
            raise UsageError(
                f"sampling would start at a noise-to-data ratio in [{ratio.min().item():.4g}, {ratio.max().item():.4g}]"
                f", but the denoiser is trained on [{low:.4g}, {high:.4g}]: choose a start level (ratio_star, "
                "sigma_max) inside, or another denoiser"
            )


class ConditionedDenoiser(Denoiser):
    """A denoiser with its class labels bound.

    Args:
        denoiser: The conditional one.
        condition: Class labels, (B,).
    """

    condition: Tensor

    def __init__(self, denoiser: Denoiser, condition: Tensor) -> None:
        super().__init__()
        self.process, self.ratio_range = denoiser.process, denoiser.ratio_range
        self.denoiser, self.condition = denoiser, condition

    @property
    def network(self) -> nn.Module:  # noqa: D102
        return self.denoiser.network

    def select(self, index: Tensor) -> Denoiser:  # noqa: D102
        return ConditionedDenoiser(self.denoiser.select(index), self.condition[index])

    def forward(  # noqa: D102
        self, x_t: Tensor, t: Tensor, condition: Tensor | None = None, augment: Tensor | None = None
    ) -> Prediction:
        return self.denoiser(x_t, t, self.condition if condition is None else condition, *augment_args(augment))

    def guided(self, weight: float) -> Denoiser:
        """See :class:`Denoiser`.

        Raises:
            UsageError: The network was never trained without labels.
        """
        if not getattr(self.network, "null_class", True):
            raise UsageError(
                "solver.guidance needs a network that was trained without labels too, and this one never was: set "
                "solver.guidance=0, or take a network fitted with training.label_drop"
            )
        return GuidedDenoiser(self.denoiser, self.condition, weight)


class GuidedDenoiser(ConditionedDenoiser):
    """Classifier-free guidance: (1 + w) prediction(label) - w prediction(null class), two evaluations a sample.

    Args:
        denoiser: The conditional one, trained with some labels dropped.
        condition: Class labels, (B,).
        weight: w; 0 guides nothing.

    References:
        Classifier-Free Diffusion Guidance (Ho and Salimans, 2022), https://arxiv.org/abs/2207.12598, Eq. 6
    """

    def __init__(self, denoiser: Denoiser, condition: Tensor, weight: float) -> None:
        super().__init__(denoiser, condition)
        self.weight = weight

    def select(self, index: Tensor) -> Denoiser:  # noqa: D102
        return GuidedDenoiser(self.denoiser.select(index), self.condition[index], self.weight)

    def forward(  # noqa: D102
        self, x_t: Tensor, t: Tensor, condition: Tensor | None = None, augment: Tensor | None = None
    ) -> Prediction:
        given, free = super().forward(x_t, t, condition, augment), self.denoiser(x_t, t, None, *augment_args(augment))
        return Prediction(*(a + self.weight * (a - b) for a, b in zip(given, free, strict=True)))


DENOISERS: Registry[Denoiser] = Registry(
    "denoiser", builtins=["diffaccel.denoiser", "diffaccel.pretrained.denoisers"], context=["process", "network"]
)
DENOISERS.base(Denoiser)
