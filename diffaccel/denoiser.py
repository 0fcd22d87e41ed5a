"""Denoisers: preconditioning around a network, and exact ones to test against.

A network knows nothing of diffusion: it maps (input, noise conditioning, class) to an output of the input's shape. A
denoiser says what goes in and what the output means, on one process.
"""

import copy
import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.errors import UsageError
from diffaccel.process import EDMVarianceExploding, Prediction, Process, expand, require
from diffaccel.registry import Registry


def _given(augment: Tensor | None) -> tuple[Tensor, ...]:
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
        return self.denoiser(x_t, t, self.condition if condition is None else condition, *_given(augment))

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
        given, free = super().forward(x_t, t, condition, augment), self.denoiser(x_t, t, None, *_given(augment))
        return Prediction(*(a + self.weight * (a - b) for a, b in zip(given, free, strict=True)))


DENOISERS: Registry[Denoiser] = Registry("denoiser")


class NetworkDenoiser(Denoiser):
    """A network, what goes into it, and what its output means.

    Subclasses say how ``output`` relates to (x_0, eps) in both directions; the loss is the squared error of the output
    against its target, so each one's weighting is its parametrisation's own.

    Args:
        network: (input (B, C, H, W), noise (B,), condition (B,) or None) -> output (B, C, H, W).
        process: Forward process.
        ratio_min: Least trained noise-to-data ratio.
        ratio_max: Largest trained ratio; infinity stands for the process's own top.
        time_scale: What the network is told of the time is this times t; 1 / t_max for None. The network ``ddpm`` wants
            indices: 1 on the process ``vp_discrete``, T - 1 on ``vp``.

    Raises:
        UsageError: The ratios are no range, or ``time_scale`` is not positive and finite.
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
            f"denoiser: ratio_min={ratio_min:g} and ratio_max={ratio_max:g}: give 0 < ratio_min < ratio_max",
        )
        require(
            time_scale is None or 0 < time_scale < math.inf,
            f"denoiser.time_scale={time_scale}: give a positive number, or null for 1 / t_max",
        )
        self._network, self.process, self.time_scale = network, process, time_scale
        top = process.ratio(torch.tensor(process.t_max, dtype=torch.float64, device="cpu")).item()
        self.ratio_range = (ratio_min, min(ratio_max, top))

    @property
    def network(self) -> nn.Module:  # noqa: D102
        return self._network

    def copy(self) -> "NetworkDenoiser":
        """Copy, with a network and weights of its own, not compiled: what was compiled runs on the weights copied."""
        copied = copy.deepcopy(self)
        for name in ("forward", "encode"):
            vars(copied.network).pop(name, None)
        return copied

    def noise_conditioning(self, t: Tensor) -> Tensor:
        """What tells the network the noise level, (B,): the scaled time."""
        return t / self.process.t_max if self.time_scale is None else self.time_scale * t

    def scale_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """What the network sees of the state."""
        return x_t

    @abstractmethod
    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network's output should be, (B, C, H, W)."""

    @abstractmethod
    def prediction(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """What an output says of x_0 and eps."""

    def output(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """Run the network once, (B, C, H, W), in the state's dtype whatever the network computes in."""
        noise = self.noise_conditioning(t).to(x_t)
        return self._network(self.scale_input(x_t, t), noise, condition, *_given(augment)).to(x_t)

    def forward(  # noqa: D102
        self, x_t: Tensor, t: Tensor, condition: Tensor | None = None, augment: Tensor | None = None
    ) -> Prediction:
        return self.prediction(self.output(x_t, t, condition, augment), x_t, t)

    def loss(
        self, x_0: Tensor, t: Tensor, eps: Tensor, condition: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        """Squared error of the output against its target, one value per sample.

        Args:
            x_0: Clean images, (B, C, H, W).
            t: Times, (B,).
            eps: Standard normal noise, (B, C, H, W).
            condition: Class labels, (B,), or None.
            augment: Augmentation labels, (B, L), or None.

        Returns:
            Mean over C, H, W of each sample, (B,), in units of the target's.
        """
        output = self.output(self.process.marginal(x_0, t, eps), t, condition, augment)
        return (output - self.target(x_0, eps, t)).square().flatten(1).mean(1)


@DENOISERS.register("eps")
class EpsDenoiser(NetworkDenoiser):
    """The network predicts the noise (DDPM, arXiv 2006.11239).

    At infinite ratio its output says nothing of x_0.

    Raises:
        UsageError: The process ends at infinite ratio and ``ratio_max`` doesn't stop before.
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
                "denoiser 'eps' can't predict x_0 at the process's top, where the noise-to-data ratio is infinite: "
                "set denoiser.ratio_max, or take denoiser=v, x0 or karras"
            )

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:  # noqa: D102
        return eps

    def prediction(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:  # noqa: D102
        alpha, sigma = expand(self.process.alpha(t), x_t), expand(self.process.sigma(t), x_t)
        return Prediction((x_t - sigma * output) / alpha, output)


@DENOISERS.register("x0")
class DataDenoiser(NetworkDenoiser):
    """The network predicts the data; the ratio must be positive."""

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:  # noqa: D102
        return x_0

    def prediction(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:  # noqa: D102
        alpha, sigma = expand(self.process.alpha(t), x_t), expand(self.process.sigma(t), x_t)
        return Prediction(output, (x_t - alpha * output) / sigma)


@DENOISERS.register("v")
class VelocityDenoiser(NetworkDenoiser):
    """The network predicts v = alpha eps - sigma x_0, which is well scaled at both ends.

    References:
        Progressive Distillation (Salimans and Ho, 2022), https://arxiv.org/abs/2202.00512
    """

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:  # noqa: D102
        return expand(self.process.alpha(t), x_0) * eps - expand(self.process.sigma(t), x_0) * x_0

    def prediction(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:  # noqa: D102
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        norm = alpha.square() + sigma.square()  # 1 on a variance preserving process
        a, s = expand(alpha / norm, x_t), expand(sigma / norm, x_t)
        return Prediction(a * x_t - s * output, s * x_t + a * output)


@DENOISERS.register("karras")
class KarrasDenoiser(NetworkDenoiser):
    """EDM's preconditioning, at ratio rho on any process.

        D(y; rho) = c_skip y + c_out F(c_in y; ln(rho) / 4),    y = x_t / alpha_t

    Written in alpha and sigma, so that no coefficient divides by alpha alone and eps = (y - D) / rho doesn't cancel.

    Args:
        network: See :class:`NetworkDenoiser`.
        process: See :class:`NetworkDenoiser`.
        sigma_data: Standard deviation of the data, in units of [-1, 1].
        ratio_min: Least trained ratio.
        ratio_max: Largest trained ratio; a start at infinite ratio is out of range.

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
        require(0 < sigma_data < math.inf, f"denoiser.sigma_data={sigma_data:g}: give the data's standard deviation")
        self.sigma_data = sigma_data

    def _norm(self, t: Tensor) -> Tensor:
        """Standard deviation of x_t."""
        return (self.process.sigma(t).square() + (self.process.alpha(t) * self.sigma_data).square()).sqrt()

    def noise_conditioning(self, t: Tensor) -> Tensor:
        """c_noise = ln(rho) / 4, (B,)."""
        return self.process.ratio(t).log() / 4

    def scale_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """c_in y = x_t over its standard deviation."""
        return x_t / expand(self._norm(t), x_t)

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """(x_0 - c_skip y) / c_out, whose variance is 1 at every level."""
        alpha, sigma, norm = self.process.alpha(t), self.process.sigma(t), self._norm(t)
        return expand(sigma / (norm * self.sigma_data), x_0) * x_0 - expand(alpha * self.sigma_data / norm, x_0) * eps

    def prediction(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:  # noqa: D102
        alpha, sigma, norm = self.process.alpha(t), self.process.sigma(t), self._norm(t)
        scaled = x_t / expand(norm, x_t)
        skip, out = alpha * self.sigma_data / norm, sigma / norm
        return Prediction(
            self.sigma_data * (expand(skip, x_t) * scaled + expand(out, x_t) * output),
            expand(out, x_t) * scaled - expand(skip, x_t) * output,
        )


class MixtureDenoiser(Denoiser):
    """Exact for data from a mixture of isotropic Gaussians: an oracle for every solver, prior and chain.

    Args:
        means: Component means, (K, C, H, W).
        var: Variance within a component; 0 makes the data a finite set.
        weights: Component weights, (K,); None for equal ones.
        process: Forward process.
    """

    means: Tensor
    log_weights: Tensor

    def __init__(
        self, means: Tensor, var: float, weights: Tensor | None = None, process: Process | None = None
    ) -> None:
        super().__init__()
        self.process, self.var = process or EDMVarianceExploding(), var
        self.ratio_range = (0.0, math.inf)
        weights = torch.ones(len(means), dtype=means.dtype) if weights is None else weights
        self.register_buffer("means", means)
        self.register_buffer("log_weights", (weights / weights.sum()).log())

    def _square_distance(self, x: Tensor, alpha: Tensor) -> Tensor:
        """|x - alpha mean|^2 of each sample and component, (B, K)."""
        x, means = x.flatten(1), self.means.to(x).flatten(1)
        a = alpha.to(x)[:, None]
        return x.square().sum(1, keepdim=True) - 2 * a * (x @ means.T) + a.square() * means.square().sum(1)

    def forward(  # noqa: D102
        self, x_t: Tensor, t: Tensor, condition: Tensor | None = None, augment: Tensor | None = None
    ) -> Prediction:
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        variance = (alpha.square() * self.var + sigma.square()).to(x_t)
        logits = self.log_weights.to(x_t) - self._square_distance(x_t, alpha) / (2 * variance[:, None])
        mean = torch.einsum("bk,k...->b...", logits.softmax(1), self.means.to(x_t))
        residual = (x_t - expand(alpha, x_t) * mean) / expand(variance, x_t)
        return Prediction(mean + expand(alpha * self.var, x_t) * residual, expand(sigma, x_t) * residual)

    def log_prob(self, y: Tensor, ratio: Tensor) -> Tensor:
        """Log-density of y = x / alpha at each ratio: (B, C, H, W), (L,) -> (B, L), in nats."""
        variance = self.var + ratio.to(y).square()  # (L,)
        square = self._square_distance(y, torch.ones(len(y), dtype=y.dtype, device=y.device))
        exponent = self.log_weights.to(y) - square[:, None] / (2 * variance[:, None])  # (B, L, K)
        return exponent.logsumexp(2) - 0.5 * y[0].numel() * (2 * math.pi * variance).log()


@DENOISERS.register("mixture")
def mixture(process: Process, means: list[list[float]], std: float, weights: list[float]) -> MixtureDenoiser:
    """Exact denoiser of 2-D toy points, (2, 1, 1) each: means (K, 2), one standard deviation, weights (K,).

    Raises:
        UsageError: No means, a mean without two coordinates, or weights that are not positive or not one per mean.
    """
    if not means or any(len(mean) != 2 for mean in means) or len(weights) != len(means) or not min(weights) > 0:
        raise UsageError(
            f"denoiser 'mixture': means are {means} and weights {weights}: give pairs of coordinates, one or more, and "
            "a positive weight for each"
        )
    points = torch.tensor(means, dtype=torch.float32)[:, :, None, None]
    return MixtureDenoiser(points, std**2, torch.tensor(weights, dtype=torch.float32), process)


class GaussianDenoiser(MixtureDenoiser):
    """Exact for data from N(mean, var I), mean (C, H, W)."""

    def __init__(self, mean: Tensor, var: float, process: Process | None = None) -> None:
        super().__init__(mean[None], var, process=process)


class FiniteSetDenoiser(MixtureDenoiser):
    """Exact for data drawn from a finite set of images (N, C, H, W)."""

    def __init__(self, images: Tensor, process: Process | None = None) -> None:
        super().__init__(images, 0.0, process=process)
