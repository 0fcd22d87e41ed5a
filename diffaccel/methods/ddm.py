"""Decoupled diffusion (Huang et al., 2023), arXiv 2306.13720: image to zero and zero to noise, a head for each."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from diffaccel.denoiser.decoupled import DecoupledDenoiser, Heads
from diffaccel.errors import UsageError
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
    """A denoiser with two heads (or one) on the decoupled process, and the losses of both.

        L = w_1(t) |phi - phi*|^2 + w_2(t) |eps - eps*|^2 + w_r(t) |x_0 - x_0*|

    each a mean over an image and with weights of its own. It samples from pure noise with any solver; the paper's is
    ``bridge``, and its 10 steps are 11 evaluations.

    Args:
        weighting: ``unit``: all outputs of the network weigh alike, in units of their targets; ``reference``: 1 / t and
            1 / (1 - t + t_min); ``later``, that of the authors' later code; ``none``: 1 and 1.
        l1: Whether absolute errors join the squared ones, half and half.
        reconstruction: Term in the image that both heads say together: ``pixel`` and ``latent`` with the reference's
            w_r, (1 - t)^2 and 1 - t; ``later`` with -ln(t) / 2, which weighs LPIPS of the image of C alone or, without
            LPIPS, as ``latent`` does; ``none`` for none.
        perceptual_weight: Weight of LPIPS within it; 0 for none. The reference reads it as yes or no.
        parts: Those of :class:`Diffusion`; the denoiser is a :class:`~diffaccel.denoiser.decoupled.DecoupledDenoiser`,
            or an exact one.

    Raises:
        UsageError: An unknown choice, or options that don't go together.

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
            raise UsageError(f"method 'ddm' needs process=decoupled, not {self.denoiser.process}")
        for key, choice, known in (
            ("weighting", weighting, Weighting),
            ("reconstruction", reconstruction, Reconstruction),
        ):
            if choice not in get_args(known):
                raise UsageError(f"method 'ddm': {key} {choice!r} is none of {', '.join(get_args(known))}")
        if weighting == "unit" and (l1 or reconstruction != "none"):
            raise UsageError(
                "method.weighting=unit is a squared error alone: set method.weighting=later, reference or none"
            )
        if perceptual_weight and (reconstruction == "none" or self.shape[0] != 3):
            raise UsageError(
                "method 'ddm': perceptual_weight needs a reconstruction term and images of three channels: set "
                "method.reconstruction=pixel, or method.perceptual_weight=0"
            )
        self.process: Decoupled = self.denoiser.process
        self.weighting, self.l1, self.reconstruction = weighting, l1, reconstruction
        self.perceptual_weight = perceptual_weight
        self._lpips: list[nn.Module] = []

    def phases(self) -> list[Phase]:
        """See :class:`Diffusion`.

        Raises:
            UsageError: The denoiser is exact, or has no heads; or LPIPS is asked for and can't be had.
        """
        phases = super().phases()
        if not isinstance(self.denoiser, DecoupledDenoiser):
            raise UsageError("method 'ddm' trains heads: set denoiser=decoupled")
        # Not a submodule: it is in no checkpoint, no average, no optimiser, and no train() reaches it.
        self._lpips = [build_lpips()] if self.perceptual_weight else []
        return phases

    def level_loss(
        self, x_0: Tensor, t: Tensor, noise: NoiseStreams, condition: Tensor | None, augment: Tensor | None
    ) -> Tensor:
        """The loss of the class at times t, (B,)."""
        assert isinstance(self.denoiser, DecoupledDenoiser)
        eps, phi = noise.normal(x_0), self.process.attenuation.draw(x_0, noise)
        if self.weighting == "unit":
            return self.denoiser.loss(x_0, t, eps, condition, augment, phi)
        x_t = self.process.diffuse(x_0, phi, t, eps)
        heads = self.denoiser.predict_heads(x_t, t, condition, augment)
        return self.main_loss(heads, Heads(phi, eps), t) + self.reconstruction_loss(heads, x_0, x_t, t)

    def weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """w_1 and w_2 at times (B,); the later code's are V / v and, about, V / (1 - t) or V / (1 - t)^2."""
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
        """Weighted errors of both heads, (B,)."""
        phi, eps = (self._error(said, true) for said, true in zip(heads, target, strict=True))
        w_1, w_2 = (weight.to(phi) for weight in self.weights(t))
        return w_1 * phi + w_2 * eps

    def _error(self, said: Tensor, true: Tensor) -> Tensor:
        """Mean squared error of each sample, or its mean with the absolute one, (B,)."""
        error = (said - true).flatten(1)
        squared = error.square().mean(1)
        return 0.5 * (squared + error.abs().mean(1)) if self.l1 else squared

    def reconstruction_loss(self, heads: Heads, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Weighted error of the image, (B,): one weight a sample."""
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
        """Weighted LPIPS of images that needn't lie in [-1, 1], (B,)."""
        lpips = self._lpips[0].to(x_0.device)
        return self.perceptual_weight * lpips(image, x_0).reshape(len(x_0))
