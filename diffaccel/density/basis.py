"""Orthogonal bases with almost uncorrelated coordinates of images, and the mean and variances of the data."""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from einops import einsum
from torch import Tensor, nn
from typing_extensions import override

from diffaccel.collective import all_reduce
from diffaccel.density.base import TrainingImages
from diffaccel.errors import UsageError
from diffaccel.metrics.moments import MomentSums

BasisName = Literal["pca", "dct"]


class Basis(nn.Module, ABC):
    """Coordinates c = Q^T (x - mean) with Q orthogonal, so that c and x have the same density.

    Args:
        shape: Image shape (C, H, W).

    Attributes:
        mean: Mean of the data, (D,).
        variances: Variances of the data's coordinates in decreasing order, (D,).
    """

    mean: Tensor
    variances: Tensor

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape, self.size = shape, math.prod(shape)
        self.register_buffer("mean", torch.zeros(self.size))
        self.register_buffer("variances", torch.ones(self.size))

    @abstractmethod
    def rotate(self, x: Tensor) -> Tensor:
        """Q^T x: (B, D) -> (B, D)."""

    @abstractmethod
    def rotate_back(self, c: Tensor) -> Tensor:
        """Q c: (B, D) -> (B, D)."""

    @abstractmethod
    def fit(self, images: TrainingImages) -> None:
        """Compute mean, rotation and variances from float64 sums over all ranks.

        Raises:
            UsageError: Fewer than two images.
        """

    def coordinates(self, x: Tensor) -> Tensor:
        """Coordinates of images: (B, C, H, W) -> (B, D)."""
        return self.rotate(x.flatten(1) - self.mean.to(x))

    def images(self, c: Tensor) -> Tensor:
        """Images with given coordinates: (B, D) -> (B, C, H, W)."""
        return (self.rotate_back(c) + self.mean.to(c)).reshape(-1, *self.shape)


class PrincipalBasis(Basis):
    """Basis of eigenvectors of the covariance, which takes memory D^2 and time D^3 to compute."""

    vectors: Tensor

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__(shape)
        self.register_buffer("vectors", torch.eye(self.size))

    @override
    def rotate(self, x: Tensor) -> Tensor:
        return x @ self.vectors.to(x)

    @override
    def rotate_back(self, c: Tensor) -> Tensor:
        return c @ self.vectors.to(c).T

    @override
    def fit(self, images: TrainingImages) -> None:
        sums = MomentSums(self.size, blocks=1).to(self.mean.device)
        for index, batch in images.own():
            sums.update(batch.flatten(1), index)
        moments = sums.compute()
        values, vectors = torch.linalg.eigh(moments.covariance)
        self.mean.copy_(moments.mean)
        self.variances.copy_(values.flip(0).clamp_min(0))
        self.vectors.copy_(vectors.flip(1))


class CosineBasis(Basis):
    """Rotation of the colours and the orthonormal DCT-II of rows and columns, which take memory 3 D.

    This basis is close to the eigenvectors of the covariance of natural images. The rotation of the colours
    diagonalises their covariance, summed over frequencies.
    """

    colours: Tensor
    order: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__(shape)
        channels, height, width = shape
        self.register_buffer("colours", torch.eye(channels))
        self.register_buffer("order", torch.arange(self.size))
        self.register_buffer("rows", cosines(height), persistent=False)
        self.register_buffer("columns", cosines(width), persistent=False)

    @override
    def rotate(self, x: Tensor) -> Tensor:
        return self._spectrum(x.reshape(-1, *self.shape), self.colours).flatten(1)[:, self.order]

    @override
    def rotate_back(self, c: Tensor) -> Tensor:
        spectrum = torch.empty_like(c)
        spectrum[:, self.order] = c
        return self._spectrum(spectrum.reshape(-1, *self.shape), self.colours, back=True).flatten(1)

    def _spectrum(self, x: Tensor, colours: Tensor, back: bool = False) -> Tensor:
        rows, columns, colours = self.rows.to(x), self.columns.to(x), colours.to(x)
        if back:
            rows, columns, colours = rows.T, columns.T, colours.T
        # One matrix at a time: a single einsum would first compute the product of all matrices.
        x = einsum(x, colours, "b c h w, c k -> b k h w")
        return einsum(einsum(x, rows, "b c h w, i h -> b c i w"), columns, "b c h w, j w -> b c h j")

    @override
    def fit(self, images: TrainingImages) -> None:
        channels, height, width = self.shape
        device, plain = self.mean.device, torch.eye(channels)
        count = torch.zeros(1, dtype=torch.float64, device=device)
        total = torch.zeros(channels, height, width, dtype=torch.float64, device=device)
        outer = torch.zeros(channels, channels, height, width, dtype=torch.float64, device=device)
        for _, batch in images.own():
            spectrum = self._spectrum(batch.to(total), plain.to(total))
            count += len(batch)
            total += spectrum.sum(0)
            outer += einsum(spectrum, spectrum, "b c h w, b k h w -> c k h w")
        n = all_reduce(count).item()
        if n < 2:
            raise UsageError(f"{n:.0f} images have no covariance: fit a density to at least 2")
        mean = all_reduce(total) / n
        covariance = (all_reduce(outer) - n * einsum(mean, mean, "c h w, k h w -> c k h w")) / (n - 1)
        colours = torch.linalg.eigh(covariance.sum((2, 3)))[1].flip(1)
        variances = einsum(colours, covariance, colours, "c k, c d h w, d k -> k h w").flatten().clamp_min(0)
        order = variances.argsort(descending=True, stable=True)
        self.mean.copy_(self._spectrum(mean[None], plain.to(mean), back=True).flatten())
        self.colours.copy_(colours)
        self.order.copy_(order)
        self.variances.copy_(variances[order])


def cosines(n: int) -> Tensor:
    """Matrix of the orthonormal DCT-II of length n, (frequency, position)."""
    k, position = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64) + 0.5
    matrix = (2 / n) ** 0.5 * (math.pi / n * k * position).cos()
    return torch.cat([matrix[:1] / 2**0.5, matrix[1:]]).float()


def make_basis(name: BasisName, shape: tuple[int, int, int]) -> Basis:
    """Make a basis, ``pca`` or ``dct``."""
    kinds: dict[str, type[Basis]] = {"pca": PrincipalBasis, "dct": CosineBasis}
    return kinds[name](shape)
