"""Solvers of score SDEs, and the ODE form of one of them.

The equations are those of y = x / alpha, whose distribution at ratio rho is that of a variance exploding process at
sigma = rho, so the solvers run on any process. In terms of y, x_0 = y - rho eps and the score is -eps / rho. The
reference code (score_sde) has the same steps on VE, and others on VP, which are options here.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.deferred import check
from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.process import Prediction, Process, expand
from diffaccel.solver.base import SOLVERS, Past, Solver, Trajectory, log_step, where_finite
from diffaccel.solver.grid import Grid, LogSNR


def _state(process: Process, prediction: Prediction, s: Tensor, noise_left: Tensor) -> Tensor:
    """State alpha_s (x_0 + noise_left eps), or the DDIM step from infinite ratio, where ``noise_left`` is not finite.

    The steps here are computed without y, which is infinite where alpha is 0.

    Args:
        process: Forward process.
        prediction: Denoiser output at the current state.
        s: Target times, (B,).
        noise_left: Coefficients of the noise in y, (B,).
    """
    noise_left = torch.where(noise_left.isfinite(), noise_left, process.ratio(s))
    x_0, eps = prediction
    return expand(process.alpha(s), x_0) * (x_0 + expand(noise_left, eps) * eps)


def _removed(process: Process, t: Tensor, s: Tensor) -> Tensor:
    """D = rho_t^2 - rho_s^2, the variance of y that a step removes, (B,)."""
    return process.ratio(t).square() - process.ratio(s).square()


def _add_noise(process: Process, mean: Tensor, s: Tensor, variance: Tensor, trajectory: Trajectory) -> Tensor:
    """State mean + alpha_s sqrt(variance) z, without noise in steps to ratio 0 and from infinite ratio.

    Args:
        process: Forward process.
        mean: Mean of the step, (B, C, H, W).
        s: Target times, (B,).
        variance: Variances of the noise in y, (B,); not finite from infinite ratio.
        trajectory: State of the sampling loop.
    """
    if trajectory.final:
        return mean
    return mean + expand(process.alpha(s) * where_finite(variance.sqrt()), mean) * trajectory.noise.normal(mean)


@SOLVERS.register("probability_flow")
@dataclass(frozen=True)
class ProbabilityFlow(Solver):
    """ODE form of the reverse-diffusion predictor: y_s = y_t + D / 2 score.

    The order is 1. Half of the last level's noise remains in the sample, as in the reference code.

    Attributes:
        grid: See :class:`Solver`; the published levels are geometric.

    References:
        Score-Based Generative Modeling through SDEs (Song et al., 2021), https://arxiv.org/abs/2011.13456, appendix D.3
    """

    grid: Grid = LogSNR()

    @override
    def step(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, trajectory: Trajectory) -> Tensor:
        process = denoiser.process
        rho = process.ratio(t)
        return _state(process, denoiser(x_t, t), s, rho - _removed(process, t, s) / (2 * rho))


@dataclass(frozen=True)
class ReverseSDE(Solver):
    """Base class of the discretisations of the reverse SDE, with those of score_sde on variance preserving processes.

        x_s = (1 + growth) x_t + b score + sqrt(b) z,    b = beta(tau) Delta

    The reference code takes N steps of length Delta = 1 / N from N times t, spaced evenly from 1 to a smallest time,
    all with noise but the last, whose mean is the sample. tau is t or, where the code takes beta from a table of N
    entries, the time of the entry, spaced evenly from 1 to 0. Here the times are those of the grid, of which the linear
    map from [smallest, start] to [0, start] is the time of the entry. Delta is (N - 1) / N of the difference of
    consecutive entries. Both are the reference's for ``solver.grid=time`` from t = 1. With ``denoise=False`` they are t
    and the grid's step. A single step is DDIM's.

    Attributes:
        discretisation: ``ratio`` for steps in y, which are the reference's on VE, or ``score_sde`` for the reference's
            on VP, which require small beta(t) Delta: on ``vp``, more than 20 steps from t = 1.
    """

    grid: Grid = LogSNR()
    discretisation: Literal["ratio", "score_sde"] = "ratio"

    @override
    def check(self, process: Process) -> None:
        """See :class:`Solver`; ``score_sde`` requires a variance preserving process."""
        super().check(process)
        if self.discretisation == "score_sde" and not process.preserves_variance:
            raise UsageError(
                f"{type(self).__name__}: solver.discretisation=score_sde requires a variance preserving process, and "
                f"not {process}: use solver.discretisation=ratio, which is score_sde's on VE"
            )

    def _as_score_sde(self, steps: int) -> bool:
        """Whether steps are score_sde's on VP; a single one is not."""
        return self.discretisation == "score_sde" and not (self.denoise and steps == 1)

    def _tabulated(self, t: Tensor, s: Tensor, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        """Time tau and length Delta of the current step, (B,)."""
        if not self.denoise:
            return t, t - s
        tau, length = self._table(trajectory.times)
        return tau[trajectory.index], length[trajectory.index]

    def _table(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Times tau and lengths Delta of all steps between times (steps + 1, B), (steps, B) each."""
        if not self.denoise:
            return times[:-1], times[:-1] - times[1:]
        (start, *_, smallest, end), n = times, len(times) - 1
        tau = end + (times[:-1] - smallest) * (start - end) / (start - smallest)
        length = (tau[:-1] - tau[1:]) * (n - 1) / n
        return tau, torch.cat([length, length[-1:]])  # the last step is as long as the one before


def _score_step(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, b: Tensor, growth: Tensor, trajectory: Trajectory
) -> Tensor:
    """State (1 + growth) x_t + b score + sqrt(b) z, without noise in the last step, with b and growth (B,)."""
    score = -denoiser(x_t, t).eps / expand(denoiser.process.sigma(t), x_t)
    mean = expand(1 + growth, x_t) * x_t + expand(b, x_t) * score
    return mean if trajectory.final else mean + expand(b.sqrt(), x_t) * trajectory.noise.normal(x_t)


@SOLVERS.register("reverse_diffusion")
@dataclass(frozen=True)
class ReverseDiffusion(ReverseSDE):
    """Discretised reverse SDE: y_s = y_t + D score + sqrt(D) z, where the step to ratio 0 adds no noise.

    score_sde's on VP is x_s = (2 - sqrt(1 - beta)) x_t + beta score + sqrt(beta) z, with beta of its table.

    Attributes:
        grid: See :class:`Solver`; the published levels are geometric on VE.
        discretisation: ``ratio`` for the steps in y, which are the reference's on VE, or ``score_sde`` for the
            reference's on VP (sde_lib.py, ``VPSDE.discretize``), on ``solver.grid=time`` and in more than 20 steps.

    References:
        Score-Based Generative Modeling through SDEs (Song et al., 2021), https://arxiv.org/abs/2011.13456, appendix E
    """

    @override
    def check_steps(self, process: Process, t: Tensor, steps: int) -> None:
        """See :class:`Solver`; each beta of score_sde's table must be below 1."""
        times = self.grid(process, t, steps, self.denoise)
        if self._as_score_sde(steps):
            self._beta(process, *self._table(times), steps)

    @override
    def step(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, trajectory: Trajectory) -> Tensor:
        process = denoiser.process
        if self._as_score_sde(trajectory.steps):
            beta = self._beta(process, *self._tabulated(t, s, trajectory), trajectory.steps)
            return _score_step(denoiser, x_t, t, beta, 1 - (1 - beta).sqrt(), trajectory)
        rho, removed = process.ratio(t), _removed(process, t, s)
        return _add_noise(process, _state(process, denoiser(x_t, t), s, rho - removed / rho), s, removed, trajectory)

    def _beta(self, process: Process, tau: Tensor, length: Tensor, steps: int) -> Tensor:
        """Entries of score_sde's table at times tau of steps of a length, shaped like ``tau``."""
        beta = process.diffusion(tau).square() * length
        check(
            beta < 1,
            lambda: UsageError(
                f"{type(self).__name__}: {steps} steps are too few for solver.discretisation=score_sde, "
                f"whose beta is {beta.max().item():.3g} and must be below 1: raise nfe, or use "
                "solver.discretisation=ratio"
            ),
        )
        return beta


@SOLVERS.register("ancestral")
@dataclass(frozen=True)
class Ancestral(Solver):
    """DDPM's ancestral sampling: the posterior mean at the predicted x_0, and noise of one of two fixed variances.

    The mean is that of :class:`ReverseDiffusion`. The variance ``small`` is the posterior's, which gives DDIM with
    eta = 1 on a Markov process. The variance ``large`` is beta of the forward step from s to t on the variance
    preserving process with these ratios. Steps to ratio 0 and from infinite ratio add no noise.

    Attributes:
        variance: ``small``, which suits few steps, or ``large``, which suits many.
        clip: Whether to clamp predictions of x_0 to [-1, 1], as DDPM does for images.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), https://arxiv.org/abs/2006.11239, section 3.2
    """

    variance: Literal["small", "large"] = "large"
    clip: bool = False

    @override
    def step(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, trajectory: Trajectory) -> Tensor:
        process = denoiser.process
        rho_t, rho_s, removed = process.ratio(t), process.ratio(s), _removed(process, t, s)
        prediction = denoiser(x_t, t)
        if self.clip:
            x_0 = prediction.x_0.clamp(-1, 1)
            prediction = Prediction(x_0, (x_t - expand(process.alpha(t), x_t) * x_0) / expand(process.sigma(t), x_t))
        mean = _state(process, prediction, s, rho_t - removed / rho_t)
        share = rho_s.square() / rho_t.square() if self.variance == "small" else (1 + rho_s**2) / (1 + rho_t**2)
        return _add_noise(process, mean, s, removed * share, trajectory)


@SOLVERS.register("pc")
@dataclass(frozen=True)
class PredictorCorrector(ReverseDiffusion):
    """Predictor-corrector sampler: Langevin steps at each level, then a reverse-diffusion step to the next level.

        y <- y + a score + sqrt(2 a) z,    a = 2 (snr |z| / |score|)^2,
        that is x <- x + 2 sigma_t q (z - q eps),    q = snr |z| / |eps|

    The norms are per image, and not the reference code's means over the batch, so that images don't depend on their
    batch. ``solver.discretisation=score_sde`` multiplies a by 1 - beta, as the reference code does on VP. States at
    infinite ratio are not corrected.

    Attributes:
        discretisation: See :class:`ReverseDiffusion`.
        snr: Signal-to-noise ratio of a Langevin step; 0.16 for CIFAR-10.
        corrector_steps: Number of Langevin steps at each level, including the start level, one evaluation each.

    Raises:
        UsageError: snr is not positive, or corrector_steps is negative.

    References:
        Score-Based Generative Modeling through SDEs (Song et al., 2021), https://arxiv.org/abs/2011.13456,
        Algorithms 2 and 4, in the order of the authors' code
    """

    snr: float = 0.16
    corrector_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.snr > 0:
            raise UsageError(f"solver 'pc': snr is {self.snr}, it must be positive")
        if self.corrector_steps < 0:
            raise UsageError(f"solver 'pc': corrector_steps is {self.corrector_steps}, it must be 0 or more")

    @override
    def predictions(self, steps: int) -> int:
        return steps * (1 + self.corrector_steps)

    @override
    def step(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, trajectory: Trajectory) -> Tensor:
        process = denoiser.process
        for _ in range(self.corrector_steps):
            eps, z = denoiser(x_t, t).eps, trajectory.noise.normal(x_t)
            q = where_finite(self.snr * z.flatten(1).norm(dim=1) / eps.flatten(1).norm(dim=1))
            q = torch.where(process.ratio(t).isfinite(), q, torch.zeros_like(q))
            if self._as_score_sde(trajectory.steps):
                q = q * (1 - self._beta(process, *self._tabulated(t, s, trajectory), trajectory.steps)).sqrt()
            x_t = x_t + expand(2 * process.sigma(t) * q, x_t) * (z - expand(q, x_t) * eps)
        return super().step(denoiser, x_t, t, s, trajectory)


@SOLVERS.register("euler_maruyama")
@dataclass(frozen=True)
class EulerMaruyama(ReverseSDE):
    """Euler-Maruyama on the reverse SDE in h = ln(rho_t / rho_s): y_s = y_t + V score + sqrt(V) z, V = 2 h rho_t^2.

    The reference code takes N steps of length 1 / N from N levels at distances 1 / (N - 1). So each V is (N - 1) / N of
    the above, and the last step, to ratio 0, has the h of the previous step and adds no noise. Both are kept, to
    reproduce published results; ``denoise=False`` gives the plain scheme. A single step is DDIM's.

    score_sde's on VP is x_s = (1 + b / 2) x_t + b score + sqrt(b) z with b = beta(t) Delta.

    Attributes:
        grid: See :class:`Solver`; the published levels are geometric on VE.
        discretisation: ``ratio`` for the steps in y, which are the reference's on VE, or ``score_sde`` for the
            reference's on VP (sampling.py, ``EulerMaruyamaPredictor``), on ``solver.grid=time``.

    References:
        Score-Based Generative Modeling through SDEs (Song et al., 2021), https://arxiv.org/abs/2011.13456, appendix E
        Denoising MCMC (Kim and Ye, 2022), https://arxiv.org/abs/2209.14593
    """

    @override
    def step(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, trajectory: Trajectory) -> Tensor:
        process = denoiser.process
        if self._as_score_sde(trajectory.steps):
            b = process.diffusion(t).square() * self._tabulated(t, s, trajectory)[1]
            return _score_step(denoiser, x_t, t, b, b / 2, trajectory)
        prediction = denoiser(x_t, t)
        h = log_step(process, *((trajectory.past[0].t, t) if trajectory.final and trajectory.past else (t, s)))
        rho = process.ratio(t)
        variance = 2 * h * rho.square() * ((trajectory.steps - 1) / trajectory.steps if self.denoise else 1)
        trajectory.past = [Past(prediction, t)]
        return _add_noise(process, _state(process, prediction, s, rho - variance / rho), s, variance, trajectory)
