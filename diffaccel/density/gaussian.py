"""Gaussian with the moments of the data, and a base class of densities that differ in the leading coordinates only."""

from abc import abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from diffaccel.density.base import DENSITIES, Density, TrainingImages, gaussian_log_prob
from diffaccel.density.basis import BasisName, make_basis


@DENSITIES.register("gaussian")
class GaussianDensity(Density):
    """Gaussian N(mean, C + ratio^2 I) with the moments of y, at every level from one decomposition of C.

    With the basis ``pca``, C is the full covariance. With ``dct``, C is diagonal in rotated colours and cosines.

    Args:
        shape: See :class:`Density`.
        ratio: See :class:`Density`.
        basis: ``pca`` or ``dct``.
    """

    bound = False

    def __init__(self, shape: tuple[int, int, int], ratio: float, basis: BasisName = "pca") -> None:
        super().__init__(shape, ratio)
        self.basis = make_basis(basis, self.shape)

    @property
    def variances(self) -> Tensor:
        """Variances of the coordinates of y, (D,) float64."""
        return self.basis.variances.double() + self.ratio**2

    @torch.no_grad()
    @override
    def fit(self, images: TrainingImages) -> None:
        self.basis.fit(images)
        self.fitted.fill_(True)

    @override
    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return self.basis.images(z * self.variances.sqrt().to(z))

    @override
    def log_prob(self, y: Tensor) -> Tensor:
        return gaussian_log_prob(self.basis.coordinates(y), self.variances)


class LeadingDensity(GaussianDensity):
    """The Gaussian, except that the ``rank`` leading coordinates have their own distribution.

    Leading coordinates are those of largest variance. The basis is orthogonal, and leading and other coordinates are
    independent, so log-densities add.

    Args:
        shape: See :class:`Density`.
        ratio: See :class:`Density`.
        basis: See :class:`GaussianDensity`.
        rank: Number of leading coordinates, limited to the dimension of y.
    """

    bound = True

    def __init__(self, shape: tuple[int, int, int], ratio: float, basis: BasisName, rank: int) -> None:
        super().__init__(shape, ratio, basis)
        self.rank = min(rank, self.size)

    @abstractmethod
    def draw(self, z: Tensor, u: Tensor) -> Tensor:
        """Draw leading coordinates (B, rank) from z (B, rank) and u (B,)."""

    @abstractmethod
    def leading_log_prob(self, c: Tensor) -> Tensor:
        """Log-density of leading coordinates (B, rank): (B,) float64."""

    @override
    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        rest = z[:, self.rank :] * self.variances[self.rank :].sqrt().to(z)
        return self.basis.images(torch.cat([self.draw(z[:, : self.rank], u).to(z), rest], dim=1))

    @override
    def log_prob(self, y: Tensor) -> Tensor:
        c = self.basis.coordinates(y)
        rest = gaussian_log_prob(c[:, self.rank :], self.variances[self.rank :])
        return self.leading_log_prob(c[:, : self.rank]) + rest
