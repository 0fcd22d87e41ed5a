"""Denoisers: networks with preconditioning, and exact denoisers for tests.

A network is independent of the diffusion process: it maps (input, noise conditioning, condition) to an output shaped
like the input. A denoiser computes the network's input and interprets its output on one process.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.condition import Condition, Observation
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
    condition: Condition | None = None
    """Bound condition of the batch, or None."""
    source: dict[str, Any] | None = None
    """Provenance of weights imported from another codebase (format, EMA or raw, units, SHA-256), or None."""
    any_process = False
    """Whether the weights are valid on every process, because the network depends on the noise-to-data ratio alone."""

    def __call__(
        self, x_t: Tensor, t: Tensor | float, condition: Condition | Tensor | None = None, *args: Any, **named: Any
    ) -> Prediction:
        """Predict the image and the noise; see :meth:`forward`.

        A time given as a number holds for the whole batch. Class labels (B,) may be given in place of a condition.
        """
        return super().__call__(x_t, batch_of(t, x_t), Condition.of(condition), *args, **named)

    @abstractmethod
    def forward(
        self, x_t: Tensor, t: Tensor, condition: Condition | None = None, augment: Tensor | None = None
    ) -> Prediction:
        """Predict the image and the noise.

        Args:
            x_t: States, (B, C, H, W).
            t: Times, (B,).
            condition: Condition; None for the null condition.
            augment: Augmentation labels, (B, L); None for no augmentation, as in sampling.
        """

    @property
    def network(self) -> nn.Module:
        """The module whose forward pass counts as one network evaluation; the denoiser itself if it is exact."""
        return self

    @property
    def condition_encoders(self) -> dict[str, nn.Module]:
        """Parts of the network that depend on the condition alone, by name, which run in :meth:`given`."""
        return {} if self.network is self else getattr(self.network, "condition_encoders", {})

    def condition_for(self, network: nn.Module) -> Condition | None:
        """Return the bound condition for a network that is called directly, such as a generator."""
        return self.condition

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next((tensor.device for tensor in (*self.parameters(), *self.buffers())), torch.device("cpu"))

    def given(self, condition: Condition | Tensor | None, observation: Observation | None = None) -> "Denoiser":
        """Bind a condition, or class labels (B,), so that solvers and priors don't handle them.

        Without gradients, the ``condition_encoders`` of the network run here, instead of in each evaluation.

        Args:
            condition: Condition of the batch; None for no condition.
            observation: Part of the samples that the condition determines, which is imposed on predictions; None for
                no such part.
        """
        if condition is None:
            return self
        from diffaccel.denoiser.conditioned import ConditionedDenoiser  # which is a denoiser itself

        bound = Condition.of(condition)
        assert bound is not None
        return ConditionedDenoiser(self, bound, observation)

    def guided(self, weight: float, interval: Sequence[float] | None = None) -> "Denoiser":
        """Apply classifier-free guidance with the bound condition.

        Args:
            weight: Guidance weight w, 0 for no guidance.
            interval: Lowest and highest noise-to-data ratio at which guidance acts; None for all.

        Raises:
            UsageError: No condition is bound.
        """
        raise UsageError(
            "solver.guidance needs a condition: set network.classes, and a prior without chains, or remove it"
        )

    def select(self, index: Tensor) -> "Denoiser":
        """Restrict the bound condition to the samples ``index`` of the batch, in that order."""
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


DENOISERS: Registry[Denoiser] = Registry(
    "denoiser", builtins=["diffaccel.denoiser", "diffaccel.pretrained.denoisers"], context=["process", "network"]
)
DENOISERS.base(Denoiser)
