"""Denoisers with a bound condition, and classifier-free guidance."""

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from diffaccel.condition import Condition, Observation
from diffaccel.denoiser.base import Denoiser, augment_args
from diffaccel.errors import UsageError
from diffaccel.process import DecoupledPrediction, Prediction, combined, expand

SMALLEST = 1e-12
"""Smallest noise-to-data ratio by which a change of the image is divided."""


class EncodesConditions(Protocol):
    """A network with ``condition_encoders``."""

    def encoded(self, condition: Condition) -> Condition:
        """Add the features of a condition, so that evaluations don't compute them."""


class ConditionedDenoiser(Denoiser):
    """A denoiser with a bound condition.

    Args:
        denoiser: The conditional denoiser.
        condition: Condition of the batch.
        observation: Part of the samples that the condition determines, which is imposed on every prediction, see
            :func:`imposed`; None for no such part.
        encoded: The condition with the features that the network computes from it alone; by default computed here,
            unless gradients are enabled.
    """

    condition: Condition

    def __init__(
        self,
        denoiser: Denoiser,
        condition: Condition,
        observation: Observation | None = None,
        encoded: Condition | None = None,
    ) -> None:
        super().__init__()
        self.process, self.ratio_range = denoiser.process, denoiser.ratio_range
        self.denoiser, self.condition, self.observation = denoiser, condition, observation
        if encoded is None and denoiser.condition_encoders and not torch.is_grad_enabled():
            encoded = cast(EncodesConditions, denoiser.network).encoded(condition)
        self.encoded = encoded

    @property
    @override
    def network(self) -> nn.Module:
        return self.denoiser.network

    @override
    def select(self, index: Tensor) -> Denoiser:
        encoded = None if self.encoded is None else self.encoded.select(index)
        return ConditionedDenoiser(self.denoiser.select(index), self.condition.select(index), self.observation, encoded)

    @override
    def condition_for(self, network: nn.Module) -> Condition:
        # Features have no gradients, and belong to one network.
        encoded = None if torch.is_grad_enabled() or network is not self.network else self.encoded
        return self.condition if encoded is None else encoded

    @override
    def forward(
        self, x_t: Tensor, t: Tensor, condition: Condition | None = None, augment: Tensor | None = None
    ) -> Prediction:
        prediction = self.predicted(x_t, t, condition or self.condition_for(self.network), augment)
        return prediction if self.observation is None else imposed(self.observation, prediction, t, self)

    def predicted(self, x_t: Tensor, t: Tensor, condition: Condition, augment: Tensor | None) -> Prediction:
        """Predict the image and the noise, before the observed part is imposed; see :meth:`forward`."""
        return self.denoiser(x_t, t, condition, *augment_args(augment))

    @override
    def guided(self, weight: float, interval: Sequence[float] | None = None) -> Denoiser:
        """See :class:`Denoiser`.

        Raises:
            UsageError: The network was not trained without condition.
        """
        if not getattr(self.network, "null_class", True):
            raise UsageError(
                "solver.guidance needs a network that was also trained without condition, which this network was not: "
                "set solver.guidance=0, or use a network fitted with training.label_drop (or condition_drop)"
            )
        return GuidedDenoiser(self.denoiser, self.condition, weight, interval, self.observation, self.encoded)


class GuidedDenoiser(ConditionedDenoiser):
    """Classifier-free guidance: (1 + w) prediction(condition) - w prediction(no condition), two evaluations a sample.

    With w = 0 this is the conditional prediction, with w = -1 the unconditional one. Codes that call 1 + w the guidance
    scale have 1 for no guidance. Outside of ``interval`` the prediction is the conditional one, in one evaluation.

    Args:
        denoiser: The conditional denoiser, trained with some conditions dropped.
        condition: Condition of the batch.
        weight: Guidance weight w; 0 for no guidance.
        interval: Lowest and highest noise-to-data ratio at which guidance acts; None for all.
        observation: See :class:`ConditionedDenoiser`.
        encoded: See :class:`ConditionedDenoiser`.

    References:
        Classifier-Free Diffusion Guidance (Ho and Salimans, 2022), https://arxiv.org/abs/2207.12598, Eq. 6
        Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion Models
        (Kynkaanniemi et al., 2024), https://arxiv.org/abs/2404.07724, Eq. 5
    """

    def __init__(
        self,
        denoiser: Denoiser,
        condition: Condition,
        weight: float,
        interval: Sequence[float] | None = None,
        observation: Observation | None = None,
        encoded: Condition | None = None,
    ) -> None:
        super().__init__(denoiser, condition, observation, encoded)
        self.weight, self.interval = weight, interval

    @override
    def select(self, index: Tensor) -> Denoiser:
        selected, encoded = (None if one is None else one.select(index) for one in (self.condition, self.encoded))
        assert selected is not None
        return GuidedDenoiser(
            self.denoiser.select(index), selected, self.weight, self.interval, self.observation, encoded
        )

    @override
    def predicted(self, x_t: Tensor, t: Tensor, condition: Condition, augment: Tensor | None) -> Prediction:
        conditional = super().predicted(x_t, t, condition, augment)
        acts = torch.ones_like(t, dtype=torch.bool) if self.interval is None else within(self, t, self.interval)
        if self.interval is None or acts.all():
            unconditional = self.denoiser(x_t, t, None, *augment_args(augment))
            return combined(self._extrapolated, conditional, unconditional)
        if not acts.any():
            return conditional
        index = acts.nonzero()[:, 0]  # levels may differ within a batch, as in adaptive solvers
        chosen = None if augment is None else augment[index]
        unconditional = self.denoiser.select(index)(x_t[index], t[index], None, *augment_args(chosen))
        guided = combined(lambda a, b: self._extrapolated(a[index], b), conditional, unconditional)
        return combined(lambda a, b: a.index_copy(0, index, b), conditional, guided)

    def _extrapolated(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        return conditional + self.weight * (conditional - unconditional)


def within(denoiser: Denoiser, t: Tensor, interval: Sequence[float]) -> Tensor:
    """Whether the noise-to-data ratios at times t (B,) are in an interval, (B,) bool; 0.1 % is allowed for rounding."""
    ratio, (low, high) = denoiser.process.ratio(t.double()), interval
    return (ratio >= low * 0.999) & (ratio <= high * 1.001)


def imposed(observation: Observation, prediction: Prediction, t: Tensor, denoiser: Denoiser) -> Prediction:
    """Impose the observed part of a condition's image on a prediction, and change the noise so that x_t is the same.

    The change is eps - (new x_0 - x_0) / ratio, which is none at infinite ratio, where the image has no part in x_t.
    """
    condition = denoiser.condition
    assert condition is not None
    assert condition.image is not None
    image = condition.image.to(prediction.x_0)
    x_0 = observation.impose(prediction.x_0, image, condition)
    change = x_0 - prediction.x_0
    eps = prediction.eps - change / expand(denoiser.process.ratio(t).clamp_min(SMALLEST), change)
    if not isinstance(prediction, DecoupledPrediction):
        return Prediction(x_0, eps)
    phi = torch.cat([prediction.phi[:, : -x_0.shape[1]], prediction.phi[:, -x_0.shape[1] :] - change], dim=1)
    return DecoupledPrediction(x_0, eps, phi)
