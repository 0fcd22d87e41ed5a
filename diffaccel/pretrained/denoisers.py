"""Preconditionings of published networks, as denoisers on any process for data in [-1, 1].

They are defined in y = x / alpha and rho = sigma / alpha, so that they do not depend on the process.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import override

from diffaccel.condition import Condition
from diffaccel.denoiser import DENOISERS, EpsDenoiser, NetworkDenoiser
from diffaccel.errors import UsageError
from diffaccel.process import Prediction, Process, VariancePreserving, expand


@DENOISERS.register("ve")
class VEDenoiser(NetworkDenoiser):
    """Preconditioning of NCSN++ for the VE SDE: the network predicts -eps, conditioned on ln(rho).

        D(y; rho) = y + rho F(y; ln(rho / unit))

    The input of a network for data x in [0, 1] is also y = 2 x - 1, but its conditioning is the level in x, rho / 2.

    Args:
        network: See :class:`~diffaccel.denoiser.NetworkDenoiser`.
        process: See :class:`~diffaccel.denoiser.NetworkDenoiser`.
        unit: Width of [-1, 1] relative to the range of the training data: 2 for data in [0, 1], 1 for data in [-1, 1].
        ratio_min: Lowest trained noise-to-data ratio.
        ratio_max: Highest trained noise-to-data ratio.

    References:
        Elucidating the Design Space (Karras et al., 2022), https://arxiv.org/abs/2206.00364, Table 1, column VE
    """

    any_process = True

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        unit: float = 2.0,
        ratio_min: float = 0.02,
        ratio_max: float = 100.0,
    ) -> None:
        super().__init__(network, process, ratio_min, ratio_max)
        self.unit = unit

    def noise_conditioning(self, t: Tensor) -> Tensor:
        """Return c_noise = ln(rho / unit), (B,)."""
        return (self.process.ratio(t) / self.unit).log()

    def scale_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return y = x_t / alpha."""
        return x_t / expand(self.process.alpha(t), x_t)

    @override
    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return -eps

    @override
    def prediction(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        return Prediction(self.scale_input(x_t, t) + expand(self.process.ratio(t), x_t) * output, -output)


@DENOISERS.register("vp")
class VPDenoiser(EpsDenoiser):
    """Preconditioning of DDPM++ for the VP SDE: the network predicts eps, conditioned on the time as an index.

        D(y; rho) = y - rho F(y / sqrt(1 + rho^2); indices t(rho))

    Args:
        network: See :class:`~diffaccel.denoiser.NetworkDenoiser`.
        process: See :class:`~diffaccel.denoiser.NetworkDenoiser`.
        beta_0: beta(0) of the SDE that the network was trained on.
        beta_1: beta(1) of this SDE.
        indices: Index of t = 1.
        ratio_min: Lowest trained noise-to-data ratio; by default that of t = 1e-5.
        ratio_max: Highest trained noise-to-data ratio; by default that of t = 1.

    References:
        Elucidating the Design Space (Karras et al., 2022), https://arxiv.org/abs/2206.00364, Table 1, column VP
    """

    any_process = True

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        beta_0: float = 0.1,
        beta_1: float = 20.0,
        indices: float = 999.0,
        ratio_min: float | None = None,
        ratio_max: float | None = None,
    ) -> None:
        self.trained, self.indices = VariancePreserving(beta_0, beta_1), indices
        # Computed, because values in files are rounded to float32.
        ends = self.trained.ratio(torch.tensor([1e-5, 1.0], dtype=torch.float64, device="cpu")).tolist()
        super().__init__(network, process, ratio_min or ends[0], ratio_max or ends[1])

    def noise_conditioning(self, t: Tensor) -> Tensor:
        """Return the index of the trained SDE's time at this ratio, (B,)."""
        return self.indices * self.trained.time(self.process.ratio(t))

    def scale_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return y / sqrt(1 + rho^2)."""
        return x_t / expand(self._norm(t), x_t)

    def _norm(self, t: Tensor) -> Tensor:
        """Root of alpha^2 + sigma^2, (B,)."""
        return (self.process.alpha(t).square() + self.process.sigma(t).square()).sqrt()


@DENOISERS.register("discrete_vp")
class DiscreteVPDenoiser(VPDenoiser):
    """Preconditioning of DDPM in discrete steps: the network is conditioned on the index of a level.

    A ratio between two levels has a fractional index, linear in the logarithm of the ratio.

    Args:
        network: See :class:`~diffaccel.denoiser.NetworkDenoiser`.
        process: See :class:`~diffaccel.denoiser.NetworkDenoiser`.
        steps: Number of levels.
        beta_start: First beta.
        beta_end: Last beta.
        schedule: ``linear`` in beta, ``scaled_linear`` in its square root, ``sigmoid``, or ``squaredcos_cap_v2``, the
            cosine schedule, which has no first and last beta.
        predicts: Output of the network: ``eps``, ``v`` = alpha eps - sigma x_0, or ``x_0``.

    Raises:
        UsageError: The schedule or the prediction is unknown.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), https://arxiv.org/abs/2006.11239, Section 4
    """

    log_ratios: Tensor

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        steps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        schedule: str = "linear",
        predicts: str = "eps",
    ) -> None:
        if schedule not in BETAS or predicts not in ("eps", "v", "x_0"):
            raise UsageError(
                f"denoiser 'discrete_vp': schedule={schedule!r} must be one of {', '.join(BETAS)}, and "
                f"predicts={predicts!r} one of eps, v, x_0"
            )
        places = torch.linspace(0, 1, steps, dtype=torch.float64, device="cpu")
        kept = (1 - BETAS[schedule](places, beta_start, beta_end)).cumprod(0)
        log_ratios = 0.5 * ((1 - kept) / kept).log()
        low, high = log_ratios[[0, -1]].exp().tolist()
        super().__init__(network, process, ratio_min=low, ratio_max=high)
        self.predicts, self.schedule, self.betas = predicts, schedule, (beta_start, beta_end)
        self.register_buffer("log_ratios", log_ratios, persistent=False)

    def noise_conditioning(self, t: Tensor) -> Tensor:
        """Return the fractional index of the level, (B,)."""
        table, log_ratio = self.log_ratios, self.process.ratio(t).log().to(self.log_ratios)
        above = torch.searchsorted(table, log_ratio).clamp(1, len(table) - 1)
        fraction = (log_ratio - table[above - 1]) / (table[above] - table[above - 1])
        return (above - 1 + fraction).clamp(0, len(table) - 1)

    @override
    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        if self.predicts != "v":
            return eps if self.predicts == "eps" else x_0
        norm, alpha, sigma = self._norm(t), self.process.alpha(t), self.process.sigma(t)
        return expand(alpha / norm, eps) * eps - expand(sigma / norm, x_0) * x_0

    @override
    def prediction(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        if self.predicts == "eps":
            return super().prediction(output, x_t, t)
        if self.predicts == "x_0":
            alpha, sigma = expand(self.process.alpha(t), x_t), expand(self.process.sigma(t), x_t)
            return Prediction(output, (x_t - alpha * output) / sigma)
        norm, alpha, sigma = self._norm(t), self.process.alpha(t), self.process.sigma(t)
        a, s = expand(alpha / norm, x_t), expand(sigma / norm, x_t)
        scaled = x_t / expand(norm, x_t)
        return Prediction(a * scaled - s * output, s * scaled + a * output)


def _squaredcos(u: Tensor) -> Tensor:
    """Betas of the cosine schedule, at most 0.999, for indices divided by the largest index."""
    steps = len(u)
    share = ((torch.arange(steps + 1).to(u) / steps + 0.008) / 1.008 * math.pi / 2).cos().square()
    return (1 - share[1:] / share[:-1]).clamp(max=0.999)


BETAS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "linear": lambda u, first, last: first + (last - first) * u,
    "scaled_linear": lambda u, first, last: (first**0.5 + (last**0.5 - first**0.5) * u) ** 2,
    "sigmoid": lambda u, first, last: first + (last - first) * (12 * u - 6).sigmoid(),
    "squaredcos_cap_v2": lambda u, first, last: _squaredcos(u),
}
"""Schedule -> betas from the first to the last, for indices divided by the largest index."""


@DENOISERS.register("iddpm")
class IDDPMDenoiser(VPDenoiser):
    """Preconditioning of iDDPM: the network predicts eps and ignored variances, conditioned on the nearest level.

        D(y; rho) = y - rho F(y / sqrt(1 + rho^2); M - 1 - arg min_j |u_j - rho|)
        u_M = 0,  u_{j-1}^2 + 1 = (u_j^2 + 1) / max(abar(j - 1) / abar(j), C_1),  abar(j) = sin^2(pi j / 2 M (C_2 + 1))

    Args:
        network: See :class:`~diffaccel.denoiser.NetworkDenoiser`; only the first C output channels are used.
        process: See :class:`~diffaccel.denoiser.NetworkDenoiser`.
        steps: Number of levels, M.
        C_1: Minimum fraction of the signal's variance that a step preserves.
        C_2: Offset that prevents very small first steps.

    References:
        Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), https://arxiv.org/abs/2102.09672,
        Eq. 17; Elucidating the Design Space (Karras et al., 2022), https://arxiv.org/abs/2206.00364, Table 1, column
        iDDPM + DDIM
    """

    outputs = (2,)
    """Channels of the network's outputs in units of the image's: eps and the variances, as one."""

    levels: Tensor

    def __init__(
        self, network: nn.Module, process: Process, steps: int = 1000, C_1: float = 0.001, C_2: float = 0.008
    ) -> None:
        j = torch.arange(steps + 1, dtype=torch.float64, device="cpu")
        kept = (math.pi / 2 * j / steps / (C_2 + 1)).sin().square()
        share = (kept[:-1] / kept[1:]).clamp(min=C_1)  # of step j = 1 .. M
        levels = (share.flip(0).log().cumsum(0).neg().expm1()).sqrt()  # u_{M-1} .. u_0, by index of the network's
        super().__init__(network, process, ratio_min=levels[0].item(), ratio_max=levels[-1].item())
        self.register_buffer("levels", levels, persistent=False)

    def noise_conditioning(self, t: Tensor) -> Tensor:
        """Return the index of the nearest level, (B,)."""
        return (self.process.ratio(t).to(self.levels)[:, None] - self.levels).abs().argmin(1)

    def output(
        self, x_t: Tensor, t: Tensor, condition: Condition | None = None, augment: Tensor | None = None
    ) -> Tensor:
        """Run the network once, and return its output without variances, (B, C, H, W)."""
        return super().output(x_t, t, condition, augment)[:, : x_t.shape[1]]
