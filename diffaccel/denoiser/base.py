"""Denoisers: networks with preconditioning, and exact denoisers for tests.

A network is independent of the diffusion process: it maps (input, noise conditioning, class) to an output shaped like
the input. A denoiser computes the network's input and interprets its output on one process.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from diffaccel.deferred import check
from diffaccel.errors import UsageError
from diffaccel.parts.registry import Registry
from diffaccel.process import Prediction, Process, batch_of


def augment_args(augment: Tensor | None) -> tuple[Tensor, ...]:
    """Augmentation labels as positional arguments: none without labels, because not every network accepts them."""
    return () if augment is None else (augment,)


class Denoiser(nn.Module, ABC):
    """E[x_0 | x_t] and E[eps | x_t] on one process.

    Attributes:
        process: Forward process of the states x_t.
        ratio_range: Smallest and largest noise-to-data ratio of its training (or where an exact denoiser is valid).
    """

    process: Process
    ratio_range: tuple[float, float]
    condition: Tensor | None = None
    """Bound class labels, (B,), or None."""
    source: dict[str, Any] | None = None
    """Provenance of weights imported from another codebase (format, EMA or raw, units, SHA-256), or None."""
    any_process = False
    """Whether the weights are valid on every process, because the network depends on the noise-to-data ratio alone."""

    def __call__(self, x_t: Tensor, t: Tensor | float, *labels: Tensor | None, **named: Tensor | None) -> Prediction:
        """Predict the image and the noise; see :meth:`forward`. A time given as a number holds for the whole batch."""
        return super().__call__(x_t, batch_of(t, x_t), *labels, **named)

    @abstractmethod
    def forward(
        self, x_t: Tensor, t: Tensor, condition: Tensor | None = None, augment: Tensor | None = None
    ) -> Prediction:
        """Predict the image and the noise.

        Args:
            x_t: States, (B, C, H, W).
            t: Times, (B,).
            condition: Class labels, (B,); None for the null class.
            augment: Augmentation labels, (B, L); None for no augmentation, as in sampling.
        """

    @property
    def network(self) -> nn.Module:
        """The module whose forward pass counts as one network evaluation; the denoiser itself if it is exact."""
        return self

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next((tensor.device for tensor in (*self.parameters(), *self.buffers())), torch.device("cpu"))

    def given(self, condition: Tensor | None) -> "Denoiser":
        """Bind class labels (B,), so that solvers and priors don't handle them."""
        return self if condition is None else ConditionedDenoiser(self, condition)

    def guided(self, weight: float) -> "Denoiser":
        """Apply classifier-free guidance with the bound labels.

        Raises:
            UsageError: No labels are bound.
        """
        raise UsageError(
            "solver.guidance needs class labels: set network.classes, and a prior without chains, or remove it"
        )

    def select(self, index: Tensor) -> "Denoiser":
        """Restrict the bound labels to the samples ``index`` of the batch, in that order."""
        return self

    def check_range(self, ratio: Tensor) -> None:
        """Check that the denoiser was trained on the start levels, with a tolerance of 0.1 % for rounding.

        Args:
            ratio: Noise-to-data ratios, (B,).

        Raises:
            UsageError: A ratio is outside ``ratio_range``.
        """
        low, high = self.ratio_range
        check(
            (ratio >= low * 0.999) & (ratio <= high * 1.001),
            lambda: UsageError(
                f"sampling would start at a noise-to-data ratio in [{ratio.min().item():.4g}, {ratio.max().item():.4g}]"
                f", but the denoiser is trained on [{low:.4g}, {high:.4g}]: choose a start level (ratio_star, "
                "sigma_max) in this range, or use another denoiser"
            ),
        )


class ConditionedDenoiser(Denoiser):
    """A denoiser with bound class labels.

    Args:
        denoiser: The conditional denoiser.
        condition: Class labels, (B,).
    """

    condition: Tensor

    def __init__(self, denoiser: Denoiser, condition: Tensor) -> None:
        super().__init__()
        self.process, self.ratio_range = denoiser.process, denoiser.ratio_range
        self.denoiser, self.condition = denoiser, condition

    @property
    @override
    def network(self) -> nn.Module:
        return self.denoiser.network

    @override
    def select(self, index: Tensor) -> Denoiser:
        return ConditionedDenoiser(self.denoiser.select(index), self.condition[index])

    @override
    def forward(
        self, x_t: Tensor, t: Tensor, condition: Tensor | None = None, augment: Tensor | None = None
    ) -> Prediction:
        return self.denoiser(x_t, t, self.condition if condition is None else condition, *augment_args(augment))

    @override
    def guided(self, weight: float) -> Denoiser:
        """See :class:`Denoiser`.

        Raises:
            UsageError: The network was not trained without labels.
        """
        if not getattr(self.network, "null_class", True):
            raise UsageError(
                "solver.guidance needs a network that was also trained without labels, which this network was not: set "
                "solver.guidance=0, or use a network fitted with training.label_drop"
            )
        return GuidedDenoiser(self.denoiser, self.condition, weight)


class GuidedDenoiser(ConditionedDenoiser):
    """Classifier-free guidance: (1 + w) prediction(label) - w prediction(null class), two evaluations a sample.

    Args:
        denoiser: The conditional denoiser, trained with some labels dropped.
        condition: Class labels, (B,).
        weight: Guidance weight w; 0 for no guidance.

    References:
        Classifier-Free Diffusion Guidance (Ho and Salimans, 2022), https://arxiv.org/abs/2207.12598, Eq. 6
    """

    def __init__(self, denoiser: Denoiser, condition: Tensor, weight: float) -> None:
        super().__init__(denoiser, condition)
        self.weight = weight

    @override
    def select(self, index: Tensor) -> Denoiser:
        return GuidedDenoiser(self.denoiser.select(index), self.condition[index], self.weight)

    @override
    def forward(
        self, x_t: Tensor, t: Tensor, condition: Tensor | None = None, augment: Tensor | None = None
    ) -> Prediction:
        conditional = super().forward(x_t, t, condition, augment)
        unconditional = self.denoiser(x_t, t, None, *augment_args(augment))
        return Prediction(*(a + self.weight * (a - b) for a, b in zip(conditional, unconditional, strict=True)))


DENOISERS: Registry[Denoiser] = Registry(
    "denoiser", builtins=["diffaccel.denoiser", "diffaccel.pretrained.denoisers"], context=["process", "network"]
)
DENOISERS.base(Denoiser)
