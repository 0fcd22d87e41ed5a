"""Multistep solvers that integrate a polynomial through earlier predictions exactly, on any grid.

The polynomial interpolates eps as a function of rho (DEIS) or x_0 as a function of lambda = -ln(rho) (DPM-Solver++):

    d(x / alpha) / d(rho) = eps,    d(x / sigma) / d(lambda) = x_0 / rho.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.process import Process, expand
from diffaccel.solver.base import SOLVERS, Past, Solver, Trajectory, ddim_step, log_step, where_finite


def correction_weights(nodes: Tensor, moments: Tensor) -> Tensor:
    """Weights of f_k in the integral of K(u) (P(u) - f_0), where the polynomial P has the values f_k at the nodes u_k.

        P(u) - f_0 = sum_{j > 0} f[0..j] prod_{i < j} (u - u_i),
        f[0..j] = sum_{k <= j} f_k / prod_{i <= j, i != k} (u_k - u_i)

    In this form of Newton's a node at infinity drops its own term only, and P interpolates at the other nodes.

    Args:
        nodes: Nodes u_k, (n, B), distinct within a column. Infinite nodes are last in their column.
        moments: Integrals of K(u) u^k, (n, B).

    Returns:
        Weights, (n, B), with sum 0; all 0 where the first node or the moments are not finite.
    """
    weights, basis = torch.zeros_like(nodes), torch.zeros_like(nodes)
    basis[0] = 1  # coefficients of the product, constant first
    for j in range(1, len(nodes)):
        basis = basis.roll(1, 0) - nodes[j - 1] * basis
        gaps = nodes[: j + 1, None] - nodes[None, : j + 1]
        gaps.diagonal().fill_(1)
        weights[: j + 1] += where_finite((basis * moments).sum(0) / gaps.prod(1))
    return weights


def data_moments(h: Tensor, count: int) -> Tensor:
    """Integrals of exp(u - h) u^k over [0, h] for k < ``count``: (B,) -> (count, B).

    For ``count`` 2, the integral for k = 1 is replaced by h B(h) / 2 with B(h) = 1 - exp(-h), as in the published
    methods; both are equal to leading order.
    """
    moments = [-torch.expm1(-h)]
    for k in range(1, count):
        moments.append(h**k - k * moments[-1])
    if count == 2:
        moments[1] = h * moments[0] / 2
    return torch.stack(moments)


def add_weighted(x: Tensor, weights: Tensor, terms: Iterable[Tensor]) -> Tensor:
    """Add sum_k weights_k terms_k to ``x`` (B, ...), with weights (n, B) and n terms like ``x``."""
    for weight, term in zip(weights, terms, strict=True):
        x = x + expand(weight, x) * term
    return x


def data_weights(process: Process, t: Tensor, s: Tensor, past: list[Past]) -> Tensor:
    """Weights of the predictions ``past``, the prediction at t first, in the correction of a DDIM step, (n, B).

    The interpolating polynomial of x_0 in lambda is integrated by :func:`data_moments`.
    """
    nodes = torch.stack([log_step(process, t, u) for _, u in past])
    return process.alpha(s) * correction_weights(nodes, data_moments(log_step(process, t, s), len(past)))


@SOLVERS.register("dpmpp3m")
@dataclass(frozen=True)
class DPMSolverPP3M(Solver):
    """DPM-Solver++(3M): third order in lambda = -ln(rho), with data prediction.

        x_s = DDIM(x_0) + alpha_s (phi_2 D_1 - phi_3 D_2),    phi_2 = (e^-h - 1) / h + 1,    phi_3 = phi_2 / h - 1 / 2

    D_1 = h x_0' and D_2 = h^2 x_0'' are those of the parabola through three predictions. The authors' code has half of
    this D_2, which reduces the order to 2. The first step is DDIM's and the second that of ``dpmpp2m``. The method is
    of third order given exact starting values, and of second order with this start-up.

    References:
        DPM-Solver++ (Lu et al., 2022), https://arxiv.org/abs/2211.01095
    """

    @override
    def step(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, trajectory: Trajectory) -> Tensor:
        prediction, x_s = ddim_step(denoiser, x_t, t, s)
        trajectory.past = past = [Past(prediction, t), *trajectory.past][:3]
        if trajectory.final:
            return x_s
        weights = data_weights(denoiser.process, t, s, past)
        return add_weighted(x_s, weights, [earlier.prediction.x_0 for earlier in past])


@SOLVERS.register("deis")
@dataclass(frozen=True)
class DEIS(Solver):
    """rhoAB-DEIS: variable-step Adams-Bashforth on d(x / alpha) / d(rho) = eps.

        x_s = DDIM + alpha_s integral_{rho_t}^{rho_s} (P(rho) - eps) d(rho),    P the polynomial through earlier eps

    The polynomial is a function of rho, as in the paper's rhoAB. The paper's tAB has a polynomial in time, which
    depends on the process. The method is of order ``max_order`` on any grid given exact starting values, and at most of
    second order with its own start-up, which increases the order step by step.

    Attributes:
        max_order: Number of predictions combined, 1 to 4.

    Raises:
        UsageError: max_order is not 1, 2, 3 or 4.

    References:
        Fast Sampling with Exponential Integrator (Zhang and Chen, 2022), https://arxiv.org/abs/2204.13902
    """

    max_order: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_order not in (1, 2, 3, 4):
            raise UsageError(f"solver 'deis': max_order is {self.max_order}, it must be 1, 2, 3 or 4")

    @override
    def step(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, trajectory: Trajectory) -> Tensor:
        process, (prediction, x_s) = denoiser.process, ddim_step(denoiser, x_t, t, s)
        trajectory.past = past = [Past(prediction, t), *trajectory.past][: self.max_order]
        if trajectory.final:
            return x_s
        nodes = torch.stack([process.ratio(u) - process.ratio(t) for _, u in past])
        length = process.ratio(s) - process.ratio(t)
        moments = torch.stack([length ** (k + 1) / (k + 1) for k in range(len(past))])
        weights = correction_weights(nodes, moments)
        return add_weighted(x_s, process.alpha(s) * weights, [earlier.prediction.eps for earlier in past])
