"""Two-headed denoiser of the decoupled process: one head predicts the attenuation, the other the noise."""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from diffaccel.condition import Condition
from diffaccel.denoiser.base import DENOISERS
from diffaccel.denoiser.network import NetworkDenoiser
from diffaccel.errors import UsageError
from diffaccel.process import Decoupled, DecoupledPrediction, Prediction, Process, expand, require

Preconditioning = Literal["recommended", "reference", "later"]


class Heads(NamedTuple):
    """Outputs or targets of the two heads."""

    phi: Tensor
    """Parameters of the attenuation, (B, (free + 1) C, H, W)."""
    eps: Tensor
    """The noise, (B, C, H, W)."""


class Coefficients(NamedTuple):
    """Coefficients of C = skip_c x_t + out_c F_1, eps = skip_eps x_t + out_eps F_2, F = F(scale_in x_t); each (B,)."""

    scale_in: Tensor
    skip_c: Tensor
    out_c: Tensor
    skip_eps: Tensor
    out_eps: Tensor


@DENOISERS.register("decoupled")
class DecoupledDenoiser(NetworkDenoiser):
    """Denoiser with two heads, phi and eps, or with a single head that determines both.

    With V = Var(x_t) = (1 - t)^2 sigma_data^2 + v and targets of unit variance, which are then equal for both heads:

        C = -(1 - t) sigma_data^2 / V x_t + sigma_data sqrt(v / V) F_1(x_t / sqrt(V); ln t)
        eps = sqrt(v) / V x_t + (1 - t) sigma_data / sqrt(V) F_2

    Both heads determine the image, x_0 = x_t - H(t; phi) - sqrt(v) eps. For constant attenuation this is an average of
    the two heads' estimates with weights t and 1 - t. With a single head F_1, eps follows from
    x_t = (t - 1) C + sqrt(v) eps.

    The network's output is the concatenation of the heads; ``network.heads`` contains the number of channels of each.

    Args:
        network: See :class:`NetworkDenoiser`.
        process: Decoupled process.
        preconditioning: ``recommended`` for the above; ``later`` for the same with sigma_data = 1, as in the authors'
            later code; ``reference`` for their first code, on the clock t: scale_in = 1 / sqrt(1 + t),
            C = (t - 1) x_t + t / sqrt(1 + t) F_1, eps = sqrt(t) x_t + sqrt((1 - t) / (1 + t)) F_2.
        sigma_data: Standard deviation of the data, in units of [-1, 1].
        noise_scale: Factor of ln t in the noise conditioning. 1/4 suits the small networks here, as in EDM's
            ln(rho) / 4; the paper has 1.
        ratio_min: Smallest trained ratio; 0.01 is the reference's t = 1e-4 on the clock t.
        ratio_max: Largest trained ratio; infinity is t = 1.

    Raises:
        UsageError: The process is not decoupled, or the preconditioning or the network's heads don't match it.

    References:
        Decoupled Diffusion Models (Huang et al., 2023), https://arxiv.org/abs/2306.13720
    """

    process: Decoupled

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        preconditioning: Preconditioning = "recommended",
        sigma_data: float = 0.5,
        noise_scale: float = 0.25,
        ratio_min: float = 0.002,
        ratio_max: float = math.inf,
    ) -> None:
        super().__init__(network, process, ratio_min, ratio_max)
        if not isinstance(process, Decoupled):
            raise UsageError(f"denoiser 'decoupled' needs process=decoupled, not {process}: use denoiser=karras")
        if preconditioning not in get_args(Preconditioning):
            raise UsageError(f"denoiser 'decoupled': preconditioning is {preconditioning!r}: set it to one of "
                             f"{', '.join(get_args(Preconditioning))}")  # fmt: skip
        if preconditioning == "reference" and process.clock != "t":
            raise UsageError(
                "denoiser 'decoupled': denoiser.preconditioning=reference needs process.clock=t: use "
                "denoiser.preconditioning=later"
            )
        require(0 < sigma_data < math.inf, f"denoiser.sigma_data={sigma_data:g}: set the data's standard deviation")
        require(0 < noise_scale < math.inf, f"denoiser.noise_scale={noise_scale:g}: set a positive number")
        self.preconditioning, self.noise_scale = preconditioning, noise_scale
        self.sigma_data = 1.0 if preconditioning == "later" else sigma_data
        heads, two = tuple(getattr(network, "heads", (1,))), (process.attenuation.free + 1, 1)
        wanted = f"network.heads={two[0]},{two[1]}"
        if heads != two and (heads != (1,) or process.attenuation.free):
            raise UsageError(
                f"denoiser 'decoupled': the network's heads are {list(heads)}: set {wanted} for the "
                f"attenuation {type(process.attenuation).__name__}" + ("" if process.attenuation.free else ", or [1]")
            )
        self.single = heads == (1,)

    @override
    def noise_conditioning(self, t: Tensor) -> Tensor:
        """c_noise = noise_scale ln t, (B,)."""
        return self.noise_scale * t.log()

    @override
    def scale_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        return expand(self.coefficients(t).scale_in, x_t) * x_t

    def coefficients(self, t: Tensor) -> Coefficients:
        """Preconditioning at times ``t`` (B,), in the dtype of ``t``."""
        v, rest = self.process.sigma(t).square(), 1 - t
        if self.preconditioning == "reference":
            scale_in, skip_c, out_c = (1 + t).rsqrt(), -rest, t * (1 + t).rsqrt()
            if self.single:  # from x_t = (t - 1) C + sqrt(t) eps, without its cancellation
                return Coefficients(scale_in, skip_c, out_c, t.sqrt() * (2 - t), rest * (t / (1 + t)).sqrt())
            return Coefficients(scale_in, skip_c, out_c, t.sqrt(), (rest / (1 + t)).sqrt())
        variance = (rest * self.sigma_data).square() + v
        return Coefficients(
            variance.rsqrt(),
            -rest * self.sigma_data**2 / variance,
            self.sigma_data * (v / variance).sqrt(),
            v.sqrt() / variance,
            rest * self.sigma_data * variance.rsqrt(),
        )

    def _skip_free(self, t: Tensor) -> Tensor:
        """Regression coefficient of a free parameter on x_t, (B,), so that the network predicts the residual only."""
        attenuation = self.process.attenuation
        gain = attenuation.gain(t)
        variance = ((1 - t) * self.sigma_data).square() + gain.square() * attenuation.variance
        return gain * attenuation.variance / (variance + self.process.sigma(t).square())

    def heads(self, output: Tensor, x_t: Tensor, t: Tensor) -> Heads:
        """Convert a network output (B, sum(heads) C, H, W) to phi and eps."""
        k = self.coefficients(t)
        channels = x_t.shape[1]
        first, second = (output, output) if self.single else output.split([output.shape[1] - channels, channels], 1)
        c = expand(k.skip_c, x_t) * x_t + expand(k.out_c, x_t) * first[:, -channels:]
        others = first[:, :-channels].split(channels, 1) if self.process.attenuation.free else ()
        free = [expand(self._skip_free(t), x_t) * x_t + other for other in others]
        eps = expand(k.skip_eps, x_t) * x_t + expand(k.out_eps, x_t) * second
        return Heads(torch.cat([*free, c], 1), eps)

    def predict_heads(
        self, x_t: Tensor, t: Tensor, condition: Condition | None = None, augment: Tensor | None = None
    ) -> Heads:
        """Predict phi and eps by one network evaluation, for losses on the heads."""
        return self.heads(self.output(x_t, t, condition, augment), x_t, t)

    def image(self, heads: Heads, x_t: Tensor, t: Tensor) -> Tensor:
        """Image x_0 = x_t - H(t; phi) - sigma_t eps, without a division, (B, C, H, W)."""
        return x_t - self.process.attenuated(heads.phi, t) - expand(self.process.sigma(t), x_t) * heads.eps

    @override
    def prediction(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """See :class:`NetworkDenoiser`; the prediction includes phi, for the bridge."""
        heads = self.heads(output, x_t, t)
        heads = heads._replace(phi=self.process.attenuation.confine(heads.phi))
        return DecoupledPrediction(self.image(heads, x_t, t), heads.eps, heads.phi)

    @override
    def target(self, x_0: Tensor, eps: Tensor, t: Tensor, phi: Tensor | None = None) -> Tensor:
        """Targets of the heads' outputs, (B, sum(heads) C, H, W).

        Without free parameters, and unless ``preconditioning`` is ``reference``, both targets are
        (1 - t) sigma_data / sqrt(V) eps - sqrt(v / V) / sigma_data x_0, whose variance is 1. Free parameters in ``phi``
        add a term to both.
        """
        first, second = self._constant_targets(x_0, eps, t)
        if phi is None or not self.process.attenuation.free:
            return first if self.single else torch.cat([first, second], 1)
        k, channels = self.coefficients(t), x_0.shape[1]
        moved = self.process.attenuated(phi, t) + expand(t, x_0) * x_0  # contribution of the free parameters to x_t
        first = first + (phi[:, -channels:] + x_0 - expand(k.skip_c, x_0) * moved) / expand(k.out_c, x_0)
        second = second - expand(k.skip_eps / k.out_eps, x_0) * moved
        skipped = expand(self._skip_free(t), x_0) * self.process.diffuse(x_0, phi, t, eps)
        free = [one - skipped for one in phi[:, :-channels].split(channels, 1)]
        return torch.cat([*free, first, second], 1)

    def _constant_targets(self, x_0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Targets of both heads for constant attenuation."""
        v, rest = self.process.sigma(t).square(), 1 - t
        if self.preconditioning == "reference":
            first = expand((1 + t).sqrt() * rest / t.sqrt(), eps) * eps - expand((1 + t).sqrt() * (2 - t), x_0) * x_0
            return first, expand((rest * (1 + t)).sqrt(), eps) * (eps - expand(t.sqrt(), x_0) * x_0)
        norm = ((rest * self.sigma_data).square() + v).sqrt()
        both = expand(rest * self.sigma_data / norm, eps) * eps - expand(v.sqrt() / (norm * self.sigma_data), x_0) * x_0
        return both, both

    @override
    def loss(
        self,
        x_0: Tensor,
        t: Tensor,
        eps: Tensor,
        condition: Condition | None = None,
        augment: Tensor | None = None,
        phi: Tensor | None = None,
    ) -> Tensor:
        """See :class:`NetworkDenoiser`; ``phi`` contains the attenuation's parameters, if some of these are free."""
        x_t = self.process.marginal(x_0, t, eps) if phi is None else self.process.diffuse(x_0, phi, t, eps)
        error = self.output(x_t, t, condition, augment) - self.target(x_0, eps, t, phi)
        return error.square().flatten(1).mean(1)
