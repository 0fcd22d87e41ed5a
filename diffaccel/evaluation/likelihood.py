"""Likelihood under the probability flow, exact up to solver error, and variational bound of the reverse SDE.

In y = x / alpha, all processes have the same bound and the same flow, dy / d rho = eps(y, rho) with
d ln q / d rho = -div eps. Both are returned as densities of x at the lowest level, in the denoiser's coordinates.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffaccel.denoiser import Denoiser
from diffaccel.noise import NoiseStreams
from diffaccel.process import Process, expand
from diffaccel.solver.adaptive import dormand_prince

LogDensity = Callable[[Tensor], Tensor]
"""Log-density of states x_T (B, C, H, W), in nats: (B,)."""


def levels_of(process: Process, ratio: float, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return noise-to-data ratio, time and alpha of a level, (count,) float64 each."""
    ratios = torch.full((count,), ratio, dtype=torch.float64, device=device)
    t = process.time(ratios)
    return ratios, t, process.alpha(t)


# The probability flow


def flow_log_prob(
    denoiser: Denoiser,
    log_prob: LogDensity,
    x: Tensor,
    ratio_min: float,
    ratio_star: float,
    probe: Tensor | None = None,
    tol: float = 1e-5,
    max_steps: int = 1000,
) -> Tensor:
    """Compute the log-density of x under the probability flow from a distribution of starting states.

    Args:
        denoiser: Denoiser.
        log_prob: Log-density of the starting states.
        x: Samples at ``ratio_min``, (B, C, H, W).
        ratio_min: Noise-to-data ratio of x.
        ratio_star: Noise-to-data ratio of the starting states.
        probe: Directions for the divergence, see :func:`probability_flow`.
        tol: Relative and absolute tolerance of a step.
        max_steps: Maximum number of steps per sample.

    Returns:
        Log-density in nats, (B,) float64.

    Raises:
        UsageError: ``max_steps`` is too small.
    """
    ((x_star, volume),) = probability_flow(denoiser, x, ratio_min, [ratio_star], probe, tol, max_steps)
    return log_prob(x_star) + volume


def probability_flow(
    denoiser: Denoiser,
    x: Tensor,
    ratio_min: float,
    ratios: Sequence[float],
    probe: Tensor | None = None,
    tol: float = 1e-5,
    max_steps: int = 1000,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Follow the probability flow from the data through the levels of several starts.

        ln q(x) = ln nu(x_T) + V(x),    V = D ln(alpha_T / alpha) + int div eps d rho,    dy / d rho = eps(y, rho)

    Step sizes are chosen per sample, so that values do not depend on the batch. One forward pass yields drift and
    divergence. The state is float64; the network runs in the precision of x.

    Args:
        denoiser: Denoiser.
        x: Samples at ``ratio_min``, (B, C, H, W).
        ratio_min: Noise-to-data ratio of x.
        ratios: Noise-to-data ratios to stop at, in increasing order.
        probe: Directions e (B, C, H, W) with E e e^T = I for the unbiased estimate e^T (d eps / dy) e of the
            divergence, fixed along the trajectory; None for the exact divergence, which requires D backward passes.
        tol: Relative and absolute tolerance of a step.
        max_steps: Maximum number of steps per sample between two levels, including rejected steps.

    Yields:
        At each level, x_T (B, C, H, W) and V (B,) float64, in nats.

    Raises:
        UsageError: ``max_steps`` is too small.

    References:
        Score-Based Generative Modeling through SDEs (Song et al., 2021), https://arxiv.org/abs/2011.13456, Eq. 39
    """
    process, size = denoiser.process, x[0].numel()
    _, _, alpha = levels_of(process, ratio_min, len(x), x.device)
    state = torch.cat([(x.double() / expand(alpha, x.double())).flatten(1), torch.zeros_like(alpha)[:, None]], dim=1)
    for low, high in pairwise([ratio_min, *ratios]):
        rate = math.log(high / low)

        def slope(index: Tensor, u: Tensor, state: Tensor, low: float = low, rate: float = rate) -> Tensor:
            rho = low * (rate * u).exp()
            y = state[:, :-1].reshape(-1, *x.shape[1:])
            chosen = None if probe is None else probe[index]
            eps, divergence = flow_and_divergence(denoiser.select(index), y.to(x), rho, chosen)
            return (rate * rho)[:, None] * torch.cat([eps.flatten(1), divergence[:, None]], dim=1).to(state)

        state = dormand_prince(slope, state, 0.0, 1.0, tol, max_steps)
        _, _, alpha_star = levels_of(process, high, len(x), x.device)
        x_star = (expand(alpha_star, state) * state[:, :-1]).reshape(x.shape).to(x)
        yield x_star, state[:, -1] + size * (alpha_star / alpha).log()


def flow_and_divergence(denoiser: Denoiser, y: Tensor, rho: Tensor, probe: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute eps(y, rho), (B, C, H, W), and its divergence, (B,)."""
    with torch.inference_mode(False), torch.enable_grad():
        y = y.detach().clone().requires_grad_()
        eps = denoiser(*denoiser.process.from_ratio(y, rho)).eps
        if probe is not None:
            (product,) = torch.autograd.grad(eps, y, probe.to(eps))
            return eps.detach(), (product * probe.to(product)).flatten(1).sum(1)
        flat, divergence = eps.flatten(1), torch.zeros_like(rho)
        for i in range(flat.shape[1]):
            (row,) = torch.autograd.grad(flat[:, i].sum(), y, retain_graph=True)
            divergence = divergence + row.flatten(1)[:, i]
        return eps.detach(), divergence


def rademacher(noise: NoiseStreams, like: Tensor) -> Tensor:
    """Draw independent random signs with the shape of ``like`` (B, ...)."""
    return torch.where(noise.normal(like) < 0, -1.0, 1.0).to(like)


# Images


def dequantised(images: Tensor, noise: NoiseStreams) -> Tensor:
    """Spread uint8 images (B, C, H, W) uniformly over their cells: 2 (k + u) / 256 - 1, in [-1, 1]."""
    u = torch.special.ndtr(noise.normal(images.double()))
    return (2 * (images.double() + u) / 256 - 1).float()


def bits_per_dim(log_q: Tensor, size: int, width: float | None = 2.0) -> Tensor:
    """Compute -log2 of the probability of 8-bit images per dimension, from densities of the dequantised images.

    Args:
        log_q: Log-densities, in nats.
        size: Number of dimensions of an image, D.
        width: Width of the range of 256 cells, 2 for [-1, 1]; None for data that are not quantised.
    """
    offset = 0.0 if width is None else 8 - math.log2(width)
    return -log_q / (size * math.log(2)) + offset


# The bound


class Bound(NamedTuple):
    """Terms of E ln q(x) >= E ln nu(x_T) - I + R at several levels T, one row per image, in nats.

    Attributes:
        start: ln nu(x_T) by name of the density, (B, L) each.
        score_matching: I(T), the likelihood-weighted denoising score matching loss, (B, L).
        entropy: R(T) = D ln(sigma_T / sigma), equal for all images, (L,).
    """

    start: dict[str, Tensor]
    score_matching: Tensor
    entropy: Tensor

    def total(self, name: str) -> Tensor:
        """Return L(T) for the density ``name``, (B, L)."""
        return self.start[name] - self.score_matching + self.entropy


def bound(
    denoiser: Denoiser,
    starts: dict[str, list[LogDensity]],
    x_0: Tensor,
    ratio_min: float,
    ratios: list[float],
    noise: NoiseStreams,
    draws: int = 16,
) -> Bound:
    """Compute the bound of the log-density of x at ``ratio_min``, given x_0, for the reverse SDE from several levels.

        I(T) = 1/2 int g^2 E |s + z / sigma|^2 dt = int E |eps(x_t) - z|^2 d ln(rho)

    All starts and densities share the drawn levels and noise, so that their differences have smaller errors than their
    values.

    Args:
        denoiser: Denoiser.
        starts: Name of the density -> log-density of the starting states at each of ``ratios``.
        x_0: Data, (B, C, H, W).
        ratio_min: Lowest noise-to-data ratio, epsilon.
        ratios: Noise-to-data ratios of the levels T, (L,).
        noise: Noise streams of the B images.
        draws: Number of draws of level and noise per image, stratified over ln(rho); each takes one evaluation.

    References:
        Franzese et al. (2023), https://arxiv.org/abs/2206.05173, section 2; R in closed form for every process
    """
    process, size = denoiser.process, x_0[0].numel()
    tops = torch.tensor(ratios, dtype=torch.float64, device=x_0.device)
    (_, t_min, _), t_star = levels_of(process, ratio_min, 1, x_0.device), process.time(tops)
    z = noise.normal(x_0)
    rows: dict[str, list[Tensor]] = {name: [] for name in starts}
    for i, ratio in enumerate(ratios):
        x_star, _ = process.from_ratio(x_0 + ratio * z, torch.full((len(x_0),), ratio, dtype=torch.float64).to(tops))
        for name, densities in starts.items():
            rows[name].append(densities[i](x_star))
    return Bound(
        {name: torch.stack(columns, 1) for name, columns in rows.items()},
        score_matching(denoiser, x_0, ratio_min, tops, noise, draws),
        size * (process.sigma(t_star) / process.sigma(t_min)).log(),
    )


@torch.no_grad()
def score_matching(
    denoiser: Denoiser, x_0: Tensor, ratio_min: float, ratios: Tensor, noise: NoiseStreams, draws: int
) -> Tensor:
    """Compute I(T) of :func:`bound` at each of ``ratios`` (L,): (B, L), in nats."""
    span = math.log(ratios.max().item() / ratio_min)
    total = torch.zeros(len(x_0), len(ratios), dtype=torch.float64, device=x_0.device)
    for i in range(draws):
        u = (i + noise.uniform().to(x_0.device)) / draws
        rho, z = ratio_min * (span * u).exp(), noise.normal(x_0)
        eps = denoiser(*denoiser.process.from_ratio(x_0 + expand(rho, z) * z, rho)).eps
        error = (eps - z).flatten(1).double().square().sum(1)
        total += error[:, None] * (rho[:, None] <= ratios)
    return span / draws * total


@torch.no_grad()
def decoding(denoiser: Denoiser, x_0: Tensor, ratio_min: float, noise: NoiseStreams) -> Tensor:
    """Compute the difference between the bounds of ln q(x_0) and ln q(x_epsilon), with a Gaussian decoder.

    Delta = D / 2 + D ln(alpha) - |sigma s(x, epsilon) + z|^2 / 2, with one draw per image: (B,), in nats. The mean of
    the decoder is the denoised image.
    """
    ratio, _, alpha = levels_of(denoiser.process, ratio_min, len(x_0), x_0.device)
    z = noise.normal(x_0)
    eps = denoiser(*denoiser.process.from_ratio(x_0 + expand(ratio, z) * z, ratio)).eps
    error = (eps - z).flatten(1).double().square().sum(1)
    return x_0[0].numel() * (0.5 + alpha.log()) - 0.5 * error
