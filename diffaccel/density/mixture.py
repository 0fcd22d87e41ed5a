"""Mixtures of Gaussians with full covariances on the leading coordinates, fitted by scikit-learn."""

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.density.base import DENSITIES, TrainingImages, gaussian_log_prob
from diffaccel.density.basis import BasisName
from diffaccel.density.gaussian import LeadingDensity
from diffaccel.errors import UsageError


@DENSITIES.register("mixture")
class MixtureDensity(LeadingDensity):
    """sum_k w_k N(m_k, S_k) on the leading coordinates of y, by EM or by variational inference for a Dirichlet process.

    EM goes on over several draws of the noise, since on one alone it would learn that draw; and since y holds noise of
    ratio^2 in every direction, no eigenvalue of S_k is let below it. Of a Dirichlet process the posterior means of
    weights, means and covariances are taken as an ordinary mixture: scikit-learn's own ``score_samples`` of it is no
    normalised density (its issue 10148).

    Args:
        shape: See :class:`Density`.
        ratio: See :class:`Density`.
        basis: See :class:`GaussianDensity`.
        rank: See :class:`LeadingDensity`.
        components: Number of components, of a Dirichlet process the most.
        dirichlet: Whether a Dirichlet process decides how many have weight.
        concentration: Its prior concentration; None for 1 / components.
        rounds: Draws of the noise.
        iterations: Iterations of EM on each.
        limit: Images taken at most, the first ones.

    Attributes:
        weights: (K,).
        means: (K, rank).
        vectors: Eigenvectors of the covariances, (K, rank, rank).
        values: Their eigenvalues, (K, rank).
    """

    weights: Tensor
    means: Tensor
    vectors: Tensor
    values: Tensor

    def __init__(
        self,
        shape: tuple[int, int, int],
        ratio: float,
        basis: BasisName = "pca",
        rank: int = 32,
        components: int = 20,
        dirichlet: bool = False,
        concentration: float | None = None,
        rounds: int = 10,
        iterations: int = 10,
        limit: int | None = None,
    ) -> None:
        super().__init__(shape, ratio, basis, rank)
        if min(components, rounds, iterations) < 1:
            raise UsageError("density 'mixture': components, rounds and iterations must be 1 or more")
        self.components, self.dirichlet, self.concentration = components, dirichlet, concentration
        self.rounds, self.iterations, self.limit = rounds, iterations, limit
        k, r = components, self.rank
        self.register_buffer("weights", torch.full((k,), 1 / k))
        self.register_buffer("means", torch.zeros(k, r))
        self.register_buffer("vectors", torch.eye(r).repeat(k, 1, 1))
        self.register_buffer("values", torch.ones(k, r))

    @property
    def effective_components(self) -> float:
        """Exponential of the entropy of the weights."""
        return math.exp(torch.special.entr(self.weights.double()).sum().item())

    def set_components(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        """Take a mixture of the leading coordinates, (K,), (K, rank), (K, rank, rank), and keep eigenvalues up."""
        values, vectors = torch.linalg.eigh(covariances)
        self.weights.copy_(weights)
        self.means.copy_(means)
        self.values.copy_(values.clamp_min(self.ratio**2))
        self.vectors.copy_(vectors)

    @torch.no_grad()
    @override
    def fit(self, images: TrainingImages) -> None:
        super().fit(images)
        if images.rank == 0:  # the others are given the result
            self._fit_leading(self._leading(images), images.seed)

    def _leading(self, images: TrainingImages) -> np.ndarray:
        """Leading coordinates of clean images, (N, rank) float64."""
        found: list[Tensor] = []
        for _, batch in images.all():
            found.append(self.basis.coordinates(batch.to(self.means))[:, : self.rank].double().cpu())
            if self.limit is not None and sum(map(len, found)) >= self.limit:
                break
        return torch.cat(found)[: self.limit].numpy()

    def _fit_leading(self, clean: np.ndarray, seed: int) -> None:
        from sklearn.exceptions import ConvergenceWarning  # imported late: it takes a second
        from sklearn.mixture import BayesianGaussianMixture, GaussianMixture

        if len(clean) <= self.components:
            raise UsageError(f"{len(clean)} images can't fill {self.components} components: set density.components")
        options: dict[str, Any] = {"max_iter": self.iterations, "warm_start": True, "random_state": seed}
        if self.dirichlet:
            options["weight_concentration_prior"] = self.concentration
        kind = BayesianGaussianMixture if self.dirichlet else GaussianMixture
        model = kind(n_components=self.components, **options)
        rng = np.random.default_rng(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # each draw of the noise gets a few iterations
            for _ in range(self.rounds):
                model.fit(clean + self.ratio * rng.standard_normal(clean.shape))
        fitted = (model.weights_, model.means_, model.covariances_)
        self.set_components(*(torch.from_numpy(array).to(self.means.device) for array in fitted))

    @override
    def draw(self, z: Tensor, u: Tensor) -> Tensor:
        k = torch.searchsorted(self.weights.double().cumsum(0), u.to(self.weights.device).double(), right=True)
        k = k.clamp_max(self.components - 1)  # the weights' sum is rounded
        scaled = (z * self.values[k].sqrt().to(z))[:, :, None]
        return self.means[k].to(z) + (self.vectors[k].to(z) @ scaled)[:, :, 0]

    @override
    def leading_log_prob(self, c: Tensor) -> Tensor:
        centred = c.double()[:, None] - self.means.double()  # (B, K, rank)
        along = torch.einsum("bki,kij->bkj", centred, self.vectors.double())
        each = gaussian_log_prob(along, self.values.double())
        return (each + self.weights.double().log()).logsumexp(1)
