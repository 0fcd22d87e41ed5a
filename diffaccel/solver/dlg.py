"""The six integrators of Denoising Langevin Gibbs, with the grids and constants of its reference code.

Its levels, of data in [0, 1], are half of these: they end at 0.01, and KAR2 adds noise between 0.05 and 1. ``steps`` is
the number of positive levels: the code's N is steps + 1 for KAR1 and KAR2, and steps for the others. All constants are
the same for CIFAR-10 and CelebA-HQ; the code's Tweedie step after each is the method's (``method.tweedie_ratio``).

References:
    Denoising MCMC (Kim and Ye, 2022), https://arxiv.org/abs/2209.14593, Figure 3 and reference code
"""

from diffaccel.solver.adaptive import RK45
from diffaccel.solver.base import SOLVERS
from diffaccel.solver.grid import Karras, LogSNR
from diffaccel.solver.onestep import Heun, StochasticHeun
from diffaccel.solver.stochastic import EulerMaruyama, ProbabilityFlow, ReverseDiffusion

RATIO_MIN, RATIO_CAP = 0.02, 1e4
"""Least level; and a cap above every start, as the code has none."""
KARRAS, GEOMETRIC = Karras(RATIO_MIN, RATIO_CAP), LogSNR(RATIO_MIN, RATIO_CAP)


@SOLVERS.register("dlg_kar1")
def kar1() -> Heun:
    """EDM's Algorithm 1."""
    return Heun(KARRAS)


@SOLVERS.register("dlg_kar2")
def kar2() -> StochasticHeun:
    """EDM's Algorithm 2, whose S_churn is divided by N."""
    return StochasticHeun(KARRAS, S_churn=80.0, S_min=0.1, S_max=2.0, S_noise=1.007, S_churn_over_N=True)


@SOLVERS.register("dlg_probability_flow")
def probability_flow() -> ProbabilityFlow:
    """Reverse diffusion's predictor in its ODE form."""
    return ProbabilityFlow(GEOMETRIC)


@SOLVERS.register("dlg_rk45")
def rk45(tol: float = 1e-5) -> RK45:
    """Dormand-Prince, for each sample apart; the code steps a batch as one."""
    return RK45(GEOMETRIC, tol=tol)


@SOLVERS.register("dlg_reverse_diffusion")
def reverse_diffusion() -> ReverseDiffusion:
    """Reverse diffusion's predictor."""
    return ReverseDiffusion(GEOMETRIC)


@SOLVERS.register("dlg_euler_maruyama")
def euler_maruyama() -> EulerMaruyama:
    """Euler-Maruyama, whose N steps of 1 / N lie 1 / (N - 1) apart."""
    return EulerMaruyama(GEOMETRIC)
