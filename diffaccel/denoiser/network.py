"""Denoisers from networks: prediction targets (eps, x_0, v) and preconditioning."""

import copy
import math
from abc import abstractmethod

import torch
from torch import Tensor, nn
from typing_extensions import override

from diffaccel.condition import Condition
from diffaccel.denoiser.base import DENOISERS, Denoiser, augment_args
from diffaccel.errors import UsageError
from diffaccel.process import Prediction, Process, expand, require


class NetworkDenoiser(Denoiser):
    """A network with preconditioning.

    Subclasses define the target of the network's output given (x_0, eps), and the prediction given the output. The loss
    is the squared error of the output against the target, so the parametrisation determines the weighting of levels.

    Args:
        network: Map of input (B, C, H, W), noise conditioning (B,) and condition or None to output (B, C, H, W).
        process: Forward process.
        ratio_min: Smallest trained noise-to-data ratio.
        ratio_max: Largest trained ratio; infinity for the largest ratio of the process.
        time_scale: Factor of t in the noise conditioning; None for 1 / t_max. The network ``ddpm`` requires indices:
            1 on the process ``vp_discrete``, T - 1 on ``vp``.

    Raises:
        UsageError: Not 0 < ratio_min < ratio_max, or ``time_scale`` is not positive and finite.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        ratio_min: float = 0.002,
        ratio_max: float = math.inf,
        time_scale: float | None = None,
    ) -> None:
        super().__init__()
        require(
            0 < ratio_min < ratio_max,
            f"denoiser: ratio_min is {ratio_min:g} and ratio_max {ratio_max:g}: set 0 < ratio_min < ratio_max",
        )
        require(
            time_scale is None or 0 < time_scale < math.inf,
            f"denoiser.time_scale={time_scale}: set a positive number, or null for 1 / t_max",
        )
        self._network, self.process, self.time_scale = network, process, time_scale
        top = process.ratio(torch.tensor(process.t_max, dtype=torch.float64, device="cpu")).item()
        self.ratio_range = (ratio_min, min(ratio_max, top))

    @property
    @override
    def network(self) -> nn.Module:
        return self._network

    def copy(self) -> "NetworkDenoiser":
        """Deep copy with an uncompiled network, because compiled functions refer to the original weights."""
        copied = copy.deepcopy(self)
        for name in ("forward", "encode"):
            vars(copied.network).pop(name, None)
        return copied

    def noise_conditioning(self, t: Tensor) -> Tensor:
        """Noise conditioning of the network: the scaled time, (B,)."""
        return t / self.process.t_max if self.time_scale is None else self.time_scale * t

    def scale_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Input of the network, (B, C, H, W)."""
        return x_t

    @abstractmethod
    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Target of the network's output, (B, C, H, W)."""

    @abstractmethod
    def prediction(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Convert a network output to a prediction of x_0 and eps."""

    def output(
        self, x_t: Tensor, t: Tensor, condition: Condition | None = None, augment: Tensor | None = None
    ) -> Tensor:
        """Evaluate the network, (B, C, H, W), and cast the output to the dtype of the state."""
        noise = self.noise_conditioning(t).to(x_t)
        return self._network(self.scale_input(x_t, t), noise, condition, *augment_args(augment)).to(x_t)

    @override
    def forward(
        self, x_t: Tensor, t: Tensor, condition: Condition | None = None, augment: Tensor | None = None
    ) -> Prediction:
        return self.prediction(self.output(x_t, t, condition, augment), x_t, t)

    def loss(
        self, x_0: Tensor, t: Tensor, eps: Tensor, condition: Condition | None = None, augment: Tensor | None = None
    ) -> Tensor:
        """Squared error of the output against its target, one value per sample.

        Args:
            x_0: Clean images, (B, C, H, W).
            t: Times, (B,).
            eps: Standard normal noise, (B, C, H, W).
            condition: Condition, or None.
            augment: Augmentation labels, (B, L), or None.

        Returns:
            Mean over C, H, W for each sample, (B,), in squared units of the target.
        """
        output = self.output(self.process.marginal(x_0, t, eps), t, condition, augment)
        return (output - self.target(x_0, eps, t)).square().flatten(1).mean(1)


@DENOISERS.register("eps")
class EpsDenoiser(NetworkDenoiser):
    """The network predicts the noise (DDPM, arXiv 2006.11239).

    At infinite ratio the noise doesn't determine x_0.

    Raises:
        UsageError: ``ratio_max`` is infinite on a process that ends at infinite ratio.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        ratio_min: float = 0.002,
        ratio_max: float = math.inf,
        time_scale: float | None = None,
    ) -> None:
        super().__init__(network, process, ratio_min, ratio_max, time_scale)
        if math.isinf(self.ratio_range[1]):
            raise UsageError(
                "denoiser 'eps' can't predict x_0 at the end of the process, where the noise-to-data ratio is infinite:"
                " set denoiser.ratio_max, or use denoiser=v, x0 or karras"
            )

    @override
    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps

    @override
    def prediction(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = expand(self.process.alpha(t), x_t), expand(self.process.sigma(t), x_t)
        return Prediction((x_t - sigma * output) / alpha, output)


@DENOISERS.register("x0")
class DataDenoiser(NetworkDenoiser):
    """The network predicts the data. The ratio must be positive."""

    @override
    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return x_0

    @override
    def prediction(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = expand(self.process.alpha(t), x_t), expand(self.process.sigma(t), x_t)
        return Prediction(output, (x_t - alpha * output) / sigma)


@DENOISERS.register("v")
class VelocityDenoiser(NetworkDenoiser):
    """The network predicts v = alpha eps - sigma x_0, which is well scaled at all noise levels.

    References:
        Progressive Distillation (Salimans and Ho, 2022), https://arxiv.org/abs/2202.00512
    """

    @override
    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return expand(self.process.alpha(t), x_0) * eps - expand(self.process.sigma(t), x_0) * x_0

    @override
    def prediction(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        norm = alpha.square() + sigma.square()  # 1 on a variance preserving process
        a, s = expand(alpha / norm, x_t), expand(sigma / norm, x_t)
        return Prediction(a * x_t - s * output, s * x_t + a * output)


@DENOISERS.register("karras")
class KarrasDenoiser(NetworkDenoiser):
    """EDM's preconditioning, as a function of the ratio rho on any process.

        D(y; rho) = c_skip y + c_out F(c_in y; ln(rho) / 4),    y = x_t / alpha_t

    The coefficients are written in terms of alpha and sigma, to avoid divisions by alpha and the cancellation in
    eps = (y - D) / rho.

    Args:
        network: See :class:`NetworkDenoiser`.
        process: See :class:`NetworkDenoiser`.
        sigma_data: Standard deviation of the data, in units of [-1, 1].
        ratio_min: Smallest trained ratio.
        ratio_max: Largest trained ratio, finite.

    Raises:
        UsageError: ``sigma_data`` is not positive and finite; see also :class:`NetworkDenoiser`.

    References:
        Elucidating the Design Space (Karras et al., 2022), https://arxiv.org/abs/2206.00364, Table 1
    """

    any_process = True

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        sigma_data: float = 0.5,
        ratio_min: float = 0.002,
        ratio_max: float = 80.0,
    ) -> None:
        super().__init__(network, process, ratio_min, ratio_max)
        require(0 < sigma_data < math.inf, f"denoiser.sigma_data={sigma_data:g}: set the data's standard deviation")
        self.sigma_data = sigma_data

    def _norm(self, t: Tensor) -> Tensor:
        """Standard deviation of x_t."""
        return (self.process.sigma(t).square() + (self.process.alpha(t) * self.sigma_data).square()).sqrt()

    @override
    def noise_conditioning(self, t: Tensor) -> Tensor:
        """c_noise = ln(rho) / 4, (B,)."""
        return self.process.ratio(t).log() / 4

    @override
    def scale_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """c_in y, which is x_t divided by its standard deviation."""
        return x_t / expand(self._norm(t), x_t)

    @override
    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """(x_0 - c_skip y) / c_out, whose variance is 1 at every level."""
        alpha, sigma, norm = self.process.alpha(t), self.process.sigma(t), self._norm(t)
        return expand(sigma / (norm * self.sigma_data), x_0) * x_0 - expand(alpha * self.sigma_data / norm, x_0) * eps

    @override
    def prediction(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        alpha, sigma, norm = self.process.alpha(t), self.process.sigma(t), self._norm(t)
        scaled = x_t / expand(norm, x_t)
        skip, out = alpha * self.sigma_data / norm, sigma / norm
        return Prediction(
            self.sigma_data * (expand(skip, x_t) * scaled + expand(out, x_t) * output),
            expand(out, x_t) * scaled - expand(skip, x_t) * output,
        )
