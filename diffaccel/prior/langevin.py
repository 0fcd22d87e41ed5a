"""Langevin-Gibbs chain on (y, sigma): Denoising Langevin Gibbs (Kim and Ye, 2022), arXiv 2209.14593.

A chain alternates a Langevin step on y = x / alpha at its current noise level with an update of the level from
p(sigma | y). Each state is by construction a sample at its own level, from which a solver can start, so that levels can
be kept low and the integration short.
"""

from typing import Annotated, Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from diffaccel.deferred import check
from diffaccel.denoiser import Denoiser
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams
from diffaccel.prior.base import PRIORS, GaussianPrior
from diffaccel.prior.chain import ChainPrior, ChainState, record, require
from diffaccel.prior.posterior import ClassifierPosterior, LevelPosterior, Update
from diffaccel.process import expand
from diffaccel.solver import SOLVERS, Karras
from diffaccel.solver.onestep import StochasticHeun


def langevin_step(y: Tensor, eps: Tensor, ratio: Tensor, eta: Tensor, z: Tensor, corrected: bool = False) -> Tensor:
    """Take one unadjusted Langevin step on y = x_0 + ratio * noise, whose score is -eps / ratio.

        y' = y + (eta / 2) score + sqrt(eta') z

    Discretisation adds eta^2 / (4 ratio^2) to the variance, so that the level drifts upwards. ``corrected`` subtracts
    this excess from the injected noise, eta' = max(0, eta - eta^2 / (4 ratio^2)), which cancels the drift to leading
    order. The reference has eta' = eta.

    Args:
        y: States, (B, C, H, W).
        eps: Predicted noise of the states, (B, C, H, W).
        ratio: Noise-to-data ratios of the states, (B,).
        eta: Step sizes, (B,), in squared units of the data.
        z: Standard normal noise, (B, C, H, W).
        corrected: Whether to subtract the excess variance.
    """
    variance = (eta - (eta / (2 * ratio)).square()).clamp_min(0) if corrected else eta
    return y - expand(eta / (2 * ratio), y) * eps + expand(variance.sqrt(), y) * z


def keep_lower(best: tuple[Tensor, Tensor], y: Tensor, ratio: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Replace the least noisy state of each chain by a strictly less noisy one.

    Args:
        best: Least noisy states so far, (B, C, H, W), and their ratios, (B,).
        y: New states, (B, C, H, W).
        ratio: Ratios of the new states, (B,).

    Returns:
        Least noisy states and their ratios, and whether each was replaced, (B,) bool.
    """
    lower = ratio < best[1]
    # torch.where instead of a product with a mask, so that a NaN in one branch does not spread to the other.
    return (torch.where(expand(lower, y).bool(), y, best[0]), torch.where(lower, ratio, best[1])), lower


@PRIORS.register("chain")
class LangevinGibbsPrior(ChainPrior):
    """Distribution of the least noisy state in a window of a Langevin-Gibbs chain.

    Values are for data in [-1, 1]. The paper's values, for data in [0, 1], are half of these for levels and a quarter
    for eta.

    Args:
        posterior: Posterior of the noise level, p(level | y).
        images_per_chain: Number of images per chain. The number of chains follows from the number of images, so that
            burn-in per image and length of the chains do not depend on it.
        chains: Number of parallel chains for any number of images; overrides ``images_per_chain``.
        eta: Step size of the Langevin steps, in squared units of the data.
        corrected: Whether the excess variance of the discretisation is subtracted from the noise (see
            :func:`langevin_step`); the reference does not subtract it.
        update: How the level is chosen from the posterior: ``argmax`` (reference), ``sample`` or ``mean``.
        carry: Whether the last state of the previous round may be chosen again (reference), which repeats about 3 to
            10 % of the starting states exactly.
        select: ``minimum`` chooses the least noisy state of the window (reference), ``last`` the last one, which is an
            unbiased draw of the chain.
        share: Fraction of the evaluations of an image that goes to the chain; the rest goes to the solver.
        chain_steps: Number of Langevin-Gibbs steps per image; overrides ``share``.
        init_steps: Number of solver steps from pure noise to the first states.
        init_solver: Solver for the first states; EDM's stochastic solver by default.
        renoise: Standard deviation of the noise added to the first states.
        warmup: Langevin-Gibbs steps after that, as [steps, eta] pairs; null stands for ``eta``.
        restart_every: Number of rounds after which ``chains`` restart from pure noise, with a burn-in that counts; null
            for no restarts. Chains of ``images_per_chain`` images end without it.
        burn_in_counted: Whether burn-in counts towards the NFE budget; the paper does not count it. Points contain both
            numbers (``nfe``, ``nfe_marginal``).

    Raises:
        UsageError: A value out of range.

    References:
        Denoising MCMC for Accelerating Diffusion-Based Generative Models (Kim and Ye, 2022),
        https://arxiv.org/abs/2209.14593
    """

    def __init__(
        self,
        posterior: LevelPosterior,
        images_per_chain: float = 50,
        chains: int | None = None,
        eta: float = 2.0,
        corrected: bool = False,
        update: Update = "argmax",
        carry: bool = True,
        select: str = "minimum",
        share: float = 0.5,
        chain_steps: int | None = None,
        init_steps: int = 19,
        init_solver: Annotated[dict[str, Any], SOLVERS] | None = None,
        renoise: float = 1.0,
        warmup: list[Any] = [[10, 2.0], [10, None]],  # noqa: B006 (read only; a list, for YAML)
        restart_every: int | None = None,
        burn_in_counted: bool = True,
    ) -> None:
        solver = SOLVERS.build(init_solver) if init_solver else StochasticHeun(Karras(0.02), S_max=2.0, S_min=0.1)
        super().__init__(
            images_per_chain, chains, share, chain_steps, init_steps, solver, restart_every, burn_in_counted
        )
        require(eta > 0, f"eta is {eta}, it must be positive")
        require(update in ("argmax", "sample", "mean"), f"update is {update!r}, it must be argmax, sample or mean")
        require(select in ("minimum", "last"), f"select is {select!r}, it must be minimum or last")
        require(renoise >= 0, f"renoise is {renoise}, it must not be negative")
        self.posterior = posterior
        self.eta, self.corrected, self.update = eta, corrected, update
        self.carry, self.select, self.renoise = carry, select, renoise
        self.warmup = [_warmup_pair(pair, eta) for pair in warmup]

    def auxiliary_networks(self) -> dict[str, nn.Module]:
        """Return the noise-level classifier, if the posterior is a classifier."""
        return {"classifier": self.posterior.network} if isinstance(self.posterior, ClassifierPosterior) else {}

    @property
    @override
    def burn_in_per_chain(self) -> float:
        return super().burn_in_per_chain + sum(steps for steps, _ in self.warmup)

    @override
    def warm_up(self, denoiser: Denoiser, noise: NoiseStreams, shape: tuple[int, ...]) -> None:
        self.posterior.logits(noise.normal(torch.empty(len(noise), *shape, device=denoiser.device)))

    def start(self, denoiser: Denoiser, state: ChainState) -> None:
        """Integrate from pure noise, add noise, and warm up."""
        shape = tuple(state.y.shape[1:])
        x_t, t = GaussianPrior()(denoiser, state.noise, shape)
        y = self.init_solver(denoiser, x_t, t, state.noise, self.init_steps)
        state.y = y + self.renoise * state.noise.normal(y)
        state.ratio, _ = self.posterior(state.y, self.update, state.noise)
        for steps, eta in self.warmup:
            for _ in range(steps):
                self.advance(denoiser, state, eta)

    @torch.no_grad()
    def advance(self, denoiser: Denoiser, state: ChainState, eta: float | Tensor) -> Tensor:
        """Take one Gibbs sweep in place: a Langevin step at the current level, and an update of the level.

        Returns:
            Whether each chain is at one of the two end levels, (B,) bool.

        Raises:
            UsageError: A level is outside the denoiser's range, or a state is NaN or infinite.
        """
        denoiser.check_range(state.ratio)
        x_t, t = denoiser.process.from_ratio(state.y, state.ratio)
        eps = denoiser(x_t, t).eps
        step = eta * torch.ones_like(state.ratio)
        state.y = langevin_step(state.y, eps, state.ratio, step, state.noise.normal(state.y), self.corrected)
        check(
            state.y.isfinite(),
            lambda: UsageError("a chain's state is NaN or infinite: lower prior.eta, or check the network's weights"),
        )
        state.ratio, at_end = self.posterior(state.y, self.update, state.noise)
        return at_end

    def advance_round(self, denoiser: Denoiser, state: ChainState, chain_steps: int) -> tuple[Tensor, Tensor]:
        """Take ``chain_steps`` sweeps and select one of the states."""
        best = (state.y, state.ratio if self.carry else torch.full_like(state.ratio, float("inf")))
        moved = torch.zeros_like(state.ratio, dtype=torch.bool)
        ends = torch.zeros_like(state.ratio)
        for _ in range(chain_steps):
            ends += self.advance(denoiser, state, self.eta)
            best, lower = keep_lower(best, state.y, state.ratio)
            moved |= lower
        y, ratio = best if self.select == "minimum" else (state.y, state.ratio)
        carried = (~moved).double().mean() if self.select == "minimum" else 0.0
        record(state, y, ratio, carried, ends.mean() / max(1, chain_steps))
        return y, ratio


def _warmup_pair(pair: Any, eta: float) -> tuple[int, float]:
    """Check a [steps, eta] pair, in which null stands for ``eta``."""
    steps, value = pair if isinstance(pair, list | tuple) and len(pair) == 2 else (None, None)
    value = eta if value is None else value
    require(
        isinstance(steps, int) and steps >= 0 and isinstance(value, int | float) and value > 0,
        f"warmup contains {pair!r}, it must consist of pairs [steps, eta] with a positive eta or null",
    )
    return cast(int, steps), float(value)
