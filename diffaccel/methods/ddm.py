"""Decoupled diffusion (Huang et al., 2023), arXiv 2306.13720: one head for the attenuation, one for the noise."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from diffaccel.condition import Condition
from diffaccel.denoiser.decoupled import DecoupledDenoiser, Heads
from diffaccel.errors import UsageError
from diffaccel.features.independence import feature_networks
from diffaccel.features.perceptual import build_lpips
from diffaccel.methods.base import Diffusion
from diffaccel.methods.registry import METHODS
from diffaccel.noise import NoiseStreams
from diffaccel.parts.checks import at_least
from diffaccel.process import Decoupled
from diffaccel.training.module import Phase

Weighting = Literal["unit", "reference", "later", "none"]
Reconstruction = Literal["none", "pixel", "latent", "later"]


@METHODS.register("ddm")
class DecoupledDiffusion(Diffusion):
    """Training of a denoiser with two heads, or one, on the decoupled process.

        L = w_1(t) |phi - phi*|^2 + w_2(t) |eps - eps*|^2 + w_r(t) |x_0 - x_0*|

    Each term is a mean over the image. Any solver can sample, from pure noise; the paper's solver is ``bridge``, whose
    10 steps take 11 evaluations.

    Args:
        weighting: Weights w_1 and w_2: ``unit`` weights all outputs equally in units of their targets, ``reference`` is
            1 / t and 1 / (1 - t + t_min), ``later`` is from the authors' later code, ``none`` is 1 and 1.
        l1: Whether to average squared and absolute errors instead of using squared errors alone.
        reconstruction: Loss of the image that both heads predict together: ``pixel`` and ``latent`` with the
            reference's w_r, (1 - t)^2 and 1 - t; ``later`` with w_r = -ln(t) / 2, applied to LPIPS of the image
            predicted by the attenuation head alone or, without LPIPS, to the same error as ``latent``; ``none`` for no
            such loss.
        perceptual_weight: Weight of LPIPS in the reconstruction loss; 0 for no LPIPS. The reference uses any other
            value as 1.
        parts: Arguments of :class:`Diffusion`; the denoiser is a
            :class:`~diffaccel.denoiser.decoupled.DecoupledDenoiser`, or exact.

    Raises:
        UsageError: A choice is unknown, or options are incompatible.

    References:
        Decoupled Diffusion Models (Huang et al., 2023), https://arxiv.org/abs/2306.13720, and its reference code
    """

    def __init__(
        self,
        weighting: Weighting = "unit",
        l1: bool = False,
        reconstruction: Reconstruction = "none",
        perceptual_weight: float = 0.0,
        **parts: Any,
    ) -> None:
        super().__init__(**parts)
        at_least(0, "method 'ddm'", perceptual_weight=perceptual_weight)
        if not isinstance(self.denoiser.process, Decoupled):
            raise UsageError(f"method 'ddm' requires process=decoupled, not {self.denoiser.process}")
        for key, choice, known in (
            ("weighting", weighting, Weighting),
            ("reconstruction", reconstruction, Reconstruction),
        ):
            if choice not in get_args(known):
                raise UsageError(f"method 'ddm': {key} is {choice!r}, it must be one of {', '.join(get_args(known))}")
        if weighting == "unit" and (l1 or reconstruction != "none"):
            raise UsageError(
                "method.weighting=unit excludes l1 and reconstruction: set method.weighting=later, reference or none"
            )
        if perceptual_weight and self.sampler.latents is not None:
            raise UsageError("method 'ddm': LPIPS compares images, not latents: set method.perceptual_weight=0")
        if perceptual_weight and (reconstruction == "none" or self.shape[0] != 3):
            raise UsageError(
                "method 'ddm': perceptual_weight requires a reconstruction loss and images with three channels: set "
                "method.reconstruction=pixel, or method.perceptual_weight=0"
            )
        self.process: Decoupled = self.denoiser.process
        self.weighting, self.l1, self.reconstruction = weighting, l1, reconstruction
        self.perceptual_weight = perceptual_weight
        self._lpips: list[nn.Module] = []

    def phases(self) -> list[Phase]:
        """See :class:`Diffusion`.

        Raises:
            UsageError: The denoiser is exact or has no heads, or LPIPS is not installed.
        """
        phases = super().phases()
        if not isinstance(self.denoiser, DecoupledDenoiser):
            raise UsageError("method 'ddm' requires a denoiser with heads: set denoiser=decoupled")
        # In a list, so that LPIPS is in no checkpoint, average or optimiser, and train() does not change it.
        self._lpips = [build_lpips()] if self.perceptual_weight else []
        return phases

    def feature_networks(self) -> list[str]:
        """See :class:`~diffaccel.training.module.TrainedModule`; VGG-16, with LPIPS."""
        return sorted({*super().feature_networks(), *feature_networks(self._lpips)})

    def level_loss(
        self, x_0: Tensor, t: Tensor, noise: NoiseStreams, condition: Condition | None, augment: Tensor | None
    ) -> Tensor:
        """Compute the loss of the class docstring at times t, (B,)."""
        assert isinstance(self.denoiser, DecoupledDenoiser)
        eps, phi = noise.normal(x_0), self.process.attenuation.draw(x_0, noise)
        if self.weighting == "unit":
            return self.denoiser.loss(x_0, t, eps, condition, augment, phi)
        x_t = self.process.diffuse(x_0, phi, t, eps)
        heads = self.denoiser.predict_heads(x_t, t, condition, augment)
        return self.main_loss(heads, Heads(phi, eps), t) + self.reconstruction_loss(heads, x_0, x_t, t)

    def weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Compute w_1 and w_2 at times (B,); ``later`` is V / v and about V / (1 - t) or V / (1 - t)^2."""
        if self.weighting == "none":
            return torch.ones_like(t), torch.ones_like(t)
        low = self.process.time(torch.full_like(t, self.denoiser.ratio_range[0]))
        rest = 1 - t + low
        if self.weighting == "reference":
            return 1 / t, 1 / rest
        if self.process.clock == "t":
            variance = t.square() - t + 1
            return variance / t, variance / rest
        return ((1 - t) / t).square() + 1, (t / rest).square() + 1

    def main_loss(self, heads: Heads, target: Heads, t: Tensor) -> Tensor:
        """Compute the weighted errors of both heads, (B,)."""
        phi, eps = (self._error(predicted, true) for predicted, true in zip(heads, target, strict=True))
        w_1, w_2 = (weight.to(phi) for weight in self.weights(t))
        return w_1 * phi + w_2 * eps

    def _error(self, predicted: Tensor, true: Tensor) -> Tensor:
        """Mean squared error of each sample, averaged with the mean absolute error if ``l1`` is set, (B,)."""
        error = (predicted - true).flatten(1)
        squared = error.square().mean(1)
        return 0.5 * (squared + error.abs().mean(1)) if self.l1 else squared

    def reconstruction_loss(self, heads: Heads, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Compute the weighted error of the image, (B,)."""
        if self.reconstruction == "none":
            return x_0.new_zeros(len(x_0))
        assert isinstance(self.denoiser, DecoupledDenoiser)
        image = self.denoiser.image(heads, x_t, t)
        absolute = (image - x_0).abs().flatten(1).mean(1)
        if self.reconstruction == "later":
            weight = (-0.5 * t.log()).to(absolute)
            return weight * (self._perceived(-heads.phi[:, -x_0.shape[1] :], x_0) if self._lpips else absolute)
        weight = ((1 - t) ** (2 if self.reconstruction == "pixel" else 1)).to(absolute)
        return weight * (absolute + self._perceived(image, x_0)) if self._lpips else weight * absolute

    def _perceived(self, image: Tensor, x_0: Tensor) -> Tensor:
        """Weighted LPIPS of images, which may exceed [-1, 1], (B,)."""
        lpips = self._lpips[0].to(x_0.device)
        return self.perceptual_weight * lpips(image, x_0).reshape(len(x_0))
