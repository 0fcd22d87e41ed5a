"""Mixtures of Gaussians of the leading coordinates with full covariances, fitted by scikit-learn."""

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.data.source import random_order
from diffaccel.density.base import DENSITIES, TrainingImages, gaussian_log_prob
from diffaccel.density.basis import BasisName
from diffaccel.density.gaussian import LeadingDensity
from diffaccel.errors import UsageError
from diffaccel.parts.optional import extra


@DENSITIES.register("mixture")
class MixtureDensity(LeadingDensity):
    """Mixture sum_k w_k N(m_k, S_k) of the leading coordinates of y, fitted by EM or by variational inference.

    EM continues over several draws of the noise, because a fit to a single draw would learn that draw. Eigenvalues of
    S_k are at least ratio^2, because y contains noise of this variance in every direction. For a Dirichlet process, the
    mixture consists of the posterior means of weights, means and covariances, because scikit-learn's ``score_samples``
    is not a normalised density (scikit-learn issue 10148).

    Args:
        shape: See :class:`Density`.
        ratio: See :class:`Density`.
        basis: See :class:`GaussianDensity`.
        rank: See :class:`LeadingDensity`.
        components: Number of components; for a Dirichlet process, the maximum.
        dirichlet: Whether to use a Dirichlet process, which infers the number of components with weight.
        concentration: Prior concentration of the Dirichlet process; None for 1 / components.
        rounds: Number of draws of the noise.
        iterations: Iterations of EM per draw.
        limit: Number of images to fit the components to, always the same random ones; None for all.

    Attributes:
        weights: Weights w_k, (K,).
        means: Means m_k, (K, rank).
        vectors: Eigenvectors of the covariances S_k, (K, rank, rank).
        values: Eigenvalues of the covariances S_k, (K, rank).
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
        """Set the mixture of the leading coordinates, and clamp eigenvalues of the covariances to ratio^2 or more.

        Args:
            weights: Weights w_k, (K,).
            means: Means m_k, (K, rank).
            covariances: Covariances S_k, (K, rank, rank).
        """
        values, vectors = torch.linalg.eigh(covariances)
        self.weights.copy_(weights)
        self.means.copy_(means)
        self.values.copy_(values.clamp_min(self.ratio**2))
        self.vectors.copy_(vectors)

    @torch.no_grad()
    @override
    def fit(self, images: TrainingImages) -> None:
        super().fit(images)
        if images.rank == 0:  # the result is broadcast to the other ranks
            self._fit_leading(self._leading(images), images.seed)

    def _leading(self, images: TrainingImages) -> np.ndarray:
        """Leading coordinates of clean images, (N, rank) float64."""
        batches = (batch for _, batch in images.all())
        found = torch.cat([self.basis.coordinates(batch.to(self.means))[:, : self.rank].cpu() for batch in batches])
        if self.limit is not None:  # not the first ones, which are of a single class in sorted data
            found = found[random_order(len(found))[: self.limit]]
        return found.double().numpy()

    def _fit_leading(self, clean: np.ndarray, seed: int) -> None:
        with extra("sklearn", needed_by="fitting density 'mixture'"):  # imported here, because it takes a second
            from sklearn.exceptions import ConvergenceWarning
            from sklearn.mixture import BayesianGaussianMixture, GaussianMixture

        if len(clean) <= self.components:
            raise UsageError(
                f"density 'mixture': {len(clean)} images are too few for {self.components} components: lower "
                "density.components"
            )
        options: dict[str, Any] = {"max_iter": self.iterations, "warm_start": True, "random_state": seed}
        if self.dirichlet:
            options["weight_concentration_prior"] = self.concentration
        kind = BayesianGaussianMixture if self.dirichlet else GaussianMixture
        model = kind(n_components=self.components, **options)
        rng = np.random.default_rng(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # there are only a few iterations per draw of the noise
            for _ in range(self.rounds):
                model.fit(clean + self.ratio * rng.standard_normal(clean.shape))
        fitted = (model.weights_, model.means_, model.covariances_)
        self.set_components(*(torch.from_numpy(array).to(self.means.device) for array in fitted))

    @override
    def draw(self, z: Tensor, u: Tensor) -> Tensor:
        k = torch.searchsorted(self.weights.double().cumsum(0), u.to(self.weights.device).double(), right=True)
        k = k.clamp_max(self.components - 1)  # the sum of the weights may round to less than 1
        scaled = (z * self.values[k].sqrt().to(z))[:, :, None]
        return self.means[k].to(z) + (self.vectors[k].to(z) @ scaled)[:, :, 0]

    @override
    def leading_log_prob(self, c: Tensor) -> Tensor:
        centred = c.double()[:, None] - self.means.double()  # (B, K, rank)
        along = torch.einsum("bki,kij->bkj", centred, self.vectors.double())
        each = gaussian_log_prob(along, self.values.double())
        return (each + self.weights.double().log()).logsumexp(1)
