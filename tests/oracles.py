"""Exact laws that several tests compare with, and noise that is drawn at once."""

import math

import torch
from torch import Tensor, nn

from diffaccel.denoiser import Denoiser
from diffaccel.density import GaussianDensity, MixtureDensity
from diffaccel.prior import DensityPrior, Plan
from diffaccel.process import Prediction, Process, VariancePreserving, expand
from diffaccel.sampling import Sampler, Tweedie


class DiagonalMixture(Denoiser):
    """Exact for sum_k w_k N(m_k, diag(s_k)), (D, 1, 1) each; its noise prediction may be wrong by a factor.

    Args:
        weights: (K,).
        means: (K, D).
        variances: (K, D).
        process: Forward process.
        factor: On the predicted noise.
    """

    def __init__(self, weights, means, variances, process: Process | None = None, factor: float = 1.0) -> None:
        super().__init__()
        self.process, self.factor, self.ratio_range = process or VariancePreserving(), factor, (0.0, math.inf)
        self.weights, self.means, self.variances = (
            torch.tensor(values, dtype=torch.float64) for values in (weights, means, variances)
        )
        self.size = self.means.shape[1]

    def _parts(self, y: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        variances = self.variances.to(y) + ratio.to(y)[:, None, None].square()
        centred = y.flatten(1)[:, None] - self.means.to(y)
        exponent = -0.5 * (centred.square() / variances + (2 * math.pi * variances).log()).sum(2)
        return exponent + self.weights.to(y).log(), centred, variances

    def log_prob(self, y: Tensor, ratio: Tensor) -> Tensor:
        """Log-density of y = x / alpha at a ratio each: (B, D, 1, 1), (B,) -> (B,)."""
        return self._parts(y, ratio)[0].logsumexp(1)

    def forward(self, x_t, t, condition=None) -> Prediction:
        y, ratio = x_t / expand(self.process.alpha(t), x_t), self.process.ratio(t)
        each, centred, variances = self._parts(y, ratio)
        score = -(each.softmax(1)[:, :, None] * centred / variances).sum(1).reshape(y.shape)
        eps = -self.factor * expand(ratio, y) * score
        return Prediction(y - expand(ratio, y) * eps, eps)

    def sample(self, n: int) -> Tensor:
        """Data, (n, D, 1, 1) float64."""
        k = torch.multinomial(self.weights, n, replacement=True)
        x = self.means[k] + self.variances[k].sqrt() * torch.randn(n, self.size, dtype=torch.float64)
        return x[:, :, None, None]

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) of the data."""
        mean = self.weights @ self.means
        centred = self.means - mean
        return mean, torch.diag(self.weights @ self.variances) + torch.einsum(
            "k,ki,kj->ij", self.weights, centred, centred
        )

    def exact_prior(self, T: float) -> DensityPrior:
        """The true law at a time."""
        k = len(self.weights)
        prior = self._prior(T, {"name": "mixture", "components": k, "rank": self.size})
        assert isinstance(prior.density, MixtureDensity)
        prior.density.set_components(self.weights, self.means, torch.diag_embed(self.variances + prior.ratio_star**2))
        return prior

    def matched_prior(self, T: float) -> DensityPrior:
        """The Gaussian of the true law's mean and covariance."""
        prior, (mean, covariance) = self._prior(T, {"name": "gaussian"}), self.moments
        assert isinstance(prior.density, GaussianDensity)
        values, vectors = torch.linalg.eigh(covariance)
        prior.density.basis.mean.copy_(mean)
        prior.density.basis.variances.copy_(values)
        prior.density.basis.vectors.copy_(vectors)
        return prior

    def normal_prior(self, T: float) -> DensityPrior:
        """N(0, I) on a variance preserving process."""
        return self._prior(T, {"name": "normal"})

    def _prior(self, T: float, density) -> DensityPrior:
        prior = DensityPrior(self, (self.size, 1, 1), density, T=T).double()
        prior.density.fitted.fill_(True)
        return prior


def three_modes(process: Process | None = None, factor: float = 1.0) -> DiagonalMixture:
    """Three modes in the plane, of unequal weights and widths."""
    means, variances = [[2, 0], [-1, 1.5], [-1, -2]], [[0.1, 0.1], [0.2, 0.2], [0.05, 0.05]]
    return DiagonalMixture([0.5, 0.3, 0.2], means, variances, process, factor)


def one_gaussian(factor: float = 1.0) -> DiagonalMixture:
    """A Gaussian of four unequal variances."""
    return DiagonalMixture([1.0], [[0.5, -0.5, 1.0, 0.0]], [[0.05, 0.3, 1.5, 3.0]], factor=factor)


class BatchedNoise:
    """NoiseStreams from the global generator, where draws need not be told apart."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self):
        return self.count

    def normal(self, like):
        return torch.randn_like(like)

    def uniform(self):
        return torch.rand(self.count, dtype=torch.float64)


def assemble(method, denoiser, prior, solver, levels, training, shape, seed: int = 0, tweedie_ratio=None, **keys):
    """Build a method of parts."""
    tweedie = None if tweedie_ratio is None else Tweedie(tweedie_ratio)
    return method(
        sampler=Sampler(denoiser, prior, solver, shape, tweedie=tweedie),
        levels=levels,
        training=training,
        seed=seed,
        **keys,
    )


def plan_of(method, steps: int, chain_steps: int = 0) -> Plan:
    """Plan a method's own prior and solver without a budget."""
    return Plan(method.prior, method.sampler.solver, steps, chain_steps)


def split(plan: Plan) -> tuple[int, int]:
    """Steps of the solver and of the chain."""
    return plan.steps, plan.chain_steps


def stirred(module: nn.Module, std: float = 0.2) -> nn.Module:
    """Move the weights of a network off zero, so that layers that are initialised with zeros let something through."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module
