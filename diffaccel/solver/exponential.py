"""Multistep solvers that integrate a polynomial through earlier predictions exactly, on any grid.

The polynomial interpolates eps as a function of rho (DEIS) or x_0 as a function of lambda = -ln(rho) (DPM-Solver++):

    d(x / alpha) / d(rho) = eps,    d(x / sigma) / d(lambda) = x_0 / rho.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.deferred import to_device
from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.process import Process, VariancePreserving, expand
from diffaccel.solver.base import SOLVERS, Past, Trajectory, ddim_step, log_step, where_finite
from diffaccel.solver.multistep import Multistep


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

    For ``count`` 2, the integral for k = 1 is replaced by h B(h) / 2 with B(h) = 1 - exp(-h), as in DPM-Solver++(2M)
    and in UniPC's B_2; both are equal to leading order.
    """
    moments = [-torch.expm1(-h)]
    for k in range(1, count):
        moments.append(h**k - k * moments[-1])
    if count == 2:
        moments[1] = h * moments[0] / 2
    return torch.stack(moments)


def rho_moments(length: Tensor, count: int) -> Tensor:
    """Integrals of u^k over [0, ``length``] for k < ``count``: (B,) -> (count, B)."""
    return torch.stack([length ** (k + 1) / (k + 1) for k in range(count)])


def time_moments(clock: Process, start: Tensor, end: Tensor, count: int) -> Tensor:
    """Integrals of (tau - tau_start)^k d(rho) from ratio ``start`` to ``end`` for k < ``count``: (B,) -> (count, B).

    Gauss's rule in ln(rho), in which the time tau(rho) of the known processes is smooth. The linear process is off by
    less than 1e-12 in one step from ratio 80 to 0.002, relative to the step.

    Args:
        clock: Process whose time at ratio rho is tau.
        start: Ratios at which the steps start, (B,).
        end: Ratios at which they end, (B,).
        count: Number of moments.
    """
    points, weights = (to_device(torch.as_tensor(one)[:, None], start.device) for one in _GAUSS)
    half = (end / start).log() / 2
    ratio = start * (half * (1 + points)).exp()
    passed = clock.time(ratio) - clock.time(start)
    return torch.stack([(half * weights * ratio * passed**k).sum(0) for k in range(count)])


_GAUSS = np.polynomial.legendre.leggauss(64)
"""Points in [-1, 1] and weights of Gauss's rule."""


def add_weighted(x: Tensor, weights: Tensor, terms: Iterable[Tensor]) -> Tensor:
    """Add sum_k weights_k terms_k to ``x`` (B, ...), with weights (n, B) and n terms like ``x``."""
    for weight, term in zip(weights, terms, strict=True):
        x = x + expand(weight, x) * term
    return x


def data_weights(
    process: Process,
    t: Tensor,
    s: Tensor,
    past: list[Past],
    moments: Callable[[Tensor, int], Tensor] = data_moments,
) -> Tensor:
    """Weights of the predictions ``past``, the prediction at t first, in the correction of a DDIM step, (n, B).

    Args:
        process: Forward process.
        t: Current times, (B,).
        s: Target times, (B,).
        past: Predictions that the polynomial of x_0 in lambda interpolates.
        moments: Function (h, n) -> integrals of the powers of lambda - lambda_t, or what a method has in their place.
    """
    nodes = torch.stack([log_step(process, t, u) for _, u in past])
    return process.alpha(s) * correction_weights(nodes, moments(log_step(process, t, s), len(past)))


@SOLVERS.register("dpmpp3m")
@dataclass(frozen=True)
class DPMSolverPP3M(Multistep):
    """DPM-Solver++(3M): three-step method in lambda = -ln(rho), with data prediction.

        x_s = DDIM(x_0) + alpha_s (phi_2 D_1 - phi_3 D_2),    phi_2 = (e^-h - 1) / h + 1,    phi_3 = phi_2 / h - 1 / 2

    The first step is DDIM's and the second that of ``dpmpp2m``. With P the parabola through three predictions,
    D_1 = h P'. The step is exact for a parabola if D_2 = h^2 P'', which is twice the second divided difference times
    h^2. The authors' code (dpm_solver_pytorch.py, ``multistep_dpm_solver_third_update``, as well as diffusers and
    k-diffusion) has no factor of two, that is D_2 = h^2 P'' / 2. The error of this step is h^3 x_0'' / 12 to leading
    order, so the published method is of order 2 at any start. With h^2 P'' the method is of order 3 given exact
    starting values, and of order 2 with its own start-up.

    Attributes:
        D2: ``published``, half of h^2 P'', or ``parabola``, h^2 P''.
        lower_order_final: Whether step k of S combines at most S + 1 - k predictions, if S < 10: the rule and the
            default of the authors' code (``sample``).

    References:
        DPM-Solver++ (Lu et al., 2022), https://arxiv.org/abs/2211.01095
    """

    lowers_below = 10

    lower_order_final: bool = True
    D2: Literal["published", "parabola"] = "published"

    @override
    def step(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, trajectory: Trajectory) -> Tensor:
        prediction, x_s = ddim_step(denoiser, x_t, t, s)
        past = self.combined(trajectory, Past(prediction, t), 3)
        if trajectory.final:
            return x_s
        weights = data_weights(denoiser.process, t, s, past, self._moments)
        return add_weighted(x_s, weights, [earlier.prediction.x_0 for earlier in past])

    def _moments(self, h: Tensor, count: int) -> Tensor:
        moments = data_moments(h, count)
        if count == 3 and self.D2 == "published":
            moments[2] /= 2
        return moments


@SOLVERS.register("deis")
@dataclass(frozen=True)
class DEIS(Multistep):
    """DEIS with an Adams-Bashforth polynomial: an exponential integrator of d(x / alpha) / d(rho) = eps.

        x_s = DDIM + alpha_s integral_{rho_t}^{rho_s} (P - eps) d(rho),    P the polynomial through earlier eps

    P is a polynomial in the time tau of a variance preserving process (tAB), whose integral is computed by quadrature,
    or in rho (rhoAB). On variance preserving processes tau is the time of the process, as in the authors' code, which
    supports no others. On other processes tau is the time of the linear process (beta from 0.1 to 20) at the ratio of
    the state, because x / alpha has the same distribution there. On EDM's process the time is rho itself, so that its
    own tAB would be rhoAB. (diff-sampler takes the linear process whose ratios at times 0.001 and 1 are 0.002 and 80.)

    The method is of order ``max_order`` on any grid given exact starting values, and at most of second order with its
    own start-up, which increases the order step by step.

    Attributes:
        max_order: Number of predictions combined, 1 to 4. The polynomial is of one degree less: ``ab_order`` 3 in the
            authors' code (qsh-zh/deis), its default, is 4 here.
        mode: ``tab`` for a polynomial in time, the method of the paper's results and of the example of the authors'
            code, or ``rhoab`` for a polynomial in rho.
        lower_order_final: Whether step k of S combines at most S + 1 - k predictions; the authors' code has no such
            rule.

    Raises:
        UsageError: max_order is not 1, 2, 3 or 4.

    References:
        Fast Sampling with Exponential Integrator (Zhang and Chen, 2022), https://arxiv.org/abs/2204.13902, Eqs. 14-15
    """

    max_order: int = 4
    mode: Literal["tab", "rhoab"] = "tab"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_order not in (1, 2, 3, 4):
            raise UsageError(f"solver 'deis': max_order is {self.max_order}, it must be 1, 2, 3 or 4")

    @override
    def step(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, trajectory: Trajectory) -> Tensor:
        process, (prediction, x_s) = denoiser.process, ddim_step(denoiser, x_t, t, s)
        past = self.combined(trajectory, Past(prediction, t), self.max_order)
        if trajectory.final:
            return x_s
        ratios, end = torch.stack([process.ratio(u) for _, u in past]), process.ratio(s)
        if self.mode == "rhoab":
            nodes, moments = ratios - ratios[0], rho_moments(end - ratios[0], len(past))
        else:
            clock = process if process.preserves_variance else VariancePreserving()
            times = torch.where(ratios.isfinite(), clock.time(ratios), torch.full_like(ratios, torch.inf))
            nodes, moments = times - times[0], time_moments(clock, ratios[0], end, len(past))
        weights = process.alpha(s) * correction_weights(nodes, moments)
        return add_weighted(x_s, weights, [earlier.prediction.eps for earlier in past])
